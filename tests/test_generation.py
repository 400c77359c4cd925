import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.config import LoopedConfig
from looplm.generation import generate, predictions_at_depths
from looplm.model import LoopedTransformer

VOCAB, END = 5, 0


def build(seed=0, positions="learned"):
    torch.manual_seed(seed)
    config = LoopedConfig(
        vocab_size=VOCAB,
        max_positions=12,
        width=8,
        num_heads=2,
        ffn_width=16,
        positions=positions,
        tie_embeddings=False,  # a tied head tends to repeat the last token
        init_std=0.8,
        dropout=0.0,
    )
    return LoopedTransformer(config).double().eval()


def greedy_by_definition(model, prompt, num_loops, max_new_tokens):
    """One prompt without padding, one token at a time."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(model(torch.tensor([tokens]), num_loops=num_loops)[0, -1].argmax().item())
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("seed", range(4))
def test_a_left_padded_batch_is_answered_like_each_prompt_alone(positions, seed):
    model = build(seed, positions)
    prompts = [[1, 2, 3, 4], [4], [2, 2], [3, 1, 4]]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[1] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    answers = generate(model, tokens, num_loops=3, max_new_tokens=6, end_id=END, attention_mask=mask).tolist()
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = greedy_by_definition(model, prompt, 3, 6)
        assert answer == expected + [END] * (len(answer) - len(expected))


def test_generation_stops_when_every_row_has_ended():
    model = build()
    prompt = torch.tensor([[1, 2], [1, 2]])
    # The only non-zero row of the head points along the state, so the end mark wins.
    model.head.weight.data.zero_()
    model.head.weight.data[END] = model.final_norm(model.step(model.embed(prompt)).hidden)[0, -1]
    assert generate(model, prompt, num_loops=1, max_new_tokens=5, end_id=END).tolist() == [[END], [END]]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(sorted))
def test_one_pass_equals_a_run_for_every_depth(seed, depths):
    model = build(seed)
    tokens = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    one_pass = predictions_at_depths(model, tokens, depths, mask)
    separate = [model(tokens, num_loops=depth, attention_mask=mask).argmax(-1) for depth in depths]
    assert torch.equal(one_pass, torch.stack(separate))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 4))
def test_greedy_decoding_is_right_exactly_where_every_teacher_forced_token_is(seed, answer_length, num_loops):
    model = build(seed)
    prompt = torch.randint(1, VOCAB, (8, 3), generator=torch.Generator().manual_seed(seed))
    greedy = generate(model, prompt, num_loops=num_loops, max_new_tokens=answer_length, end_id=-1)
    # Half of the references are what the model says, the others differ from it in one token.
    reference = greedy.clone()
    place = seed % answer_length
    reference[4:, place] = (reference[4:, place] + 1) % VOCAB
    inputs = torch.cat([prompt, reference], dim=1)[:, :-1]
    forced = predictions_at_depths(model, inputs, [num_loops])[0, :, 2:]
    teacher_forced_right = (forced == reference).all(1)
    assert torch.equal(teacher_forced_right, (greedy == reference).all(1))
    assert teacher_forced_right.tolist() == [True] * 4 + [False] * 4


def test_generation_takes_no_gradient():
    model = build()
    assert not predictions_at_depths(model, torch.tensor([[1, 2]]), [1]).requires_grad
    generate(model, torch.tensor([[1, 2]]), num_loops=1, max_new_tokens=2, end_id=END)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 0, "num_loops": 1}, {"max_new_tokens": 1, "num_loops": -1}])
def test_impossible_requests_are_refused(arguments):
    with pytest.raises(ValueError, match="`max_new_tokens` must be >= 1 and `num_loops` >= 0, got"):
        generate(build(), torch.tensor([[1]]), end_id=END, **arguments)


def test_continuations_longer_than_the_model_are_refused():
    with pytest.raises(ValueError, match="max_positions"):
        generate(build(), torch.ones(1, 10, dtype=torch.long), num_loops=1, max_new_tokens=4, end_id=-1)
