import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.config import LoopedConfig
from looplm.generation import (
    GenerationOptions,
    generate,
    generate_at_depths,
    generate_with_loops,
    stream_tokens,
)
from looplm.model import LoopedTransformer
from looplm.scoring import log_likelihoods_at_depths, predictions_at_depths

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


class Told:
    """A model that must not be asked anything."""

    def __init__(self, model):
        self.config, self.training = model.config, model.training

    def embed(self, *arguments):
        raise AssertionError("computed before it was checked")

    step = decode = embed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.tensor([1, 2])}, r"`tokens` must be integers \(B, T\).* got torch.int64 \(2,\)"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"one row and one token, got torch.int64 \(1, 0\)"),
        ({"tokens": torch.zeros(0, 3, dtype=torch.long)}, r"at least one row .* \(0, 3\)"),
        ({"tokens": torch.ones(1, 2)}, "must be integers .* got torch.float32"),
        ({"tokens": torch.tensor([[1, VOCAB]])}, r"must be in \[0, 5\) \(`vocab_size`\), got 1 to 5"),
        ({"tokens": torch.tensor([[1, -1]])}, "got -1 to 1"),
        ({"stop": [5]}, r"`stop` must hold sequences of at least one id, got \[5\]"),
        ({"stop": [[]]}, "`stop` must hold sequences"),
        ({"stop": "ab"}, "`stop` must hold sequences"),
        ({"end_id": None}, "`end_id` must be an integer, got None"),
        ({"num_loops": 2.0}, "`num_loops` must be an integer, got 2.0"),
        ({"num_loops": True}, "`num_loops` must be an integer, got True"),
        ({"max_new_tokens": "3"}, "`max_new_tokens` must be an integer, got '3'"),
        ({"max_new_tokens": 2**40}, r"have 12 tokens \(`max_positions`\), got a prompt of 2 and .* 1099511627776"),
        ({"max_new_tokens": 12}, "got a prompt of 2 and `max_new_tokens` 12"),
        ({"cache": "foo"}, "`cache` must be `per_loop`, `last` or `ring"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_computed(changes, message):
    request = {"tokens": torch.tensor([[1, 2]]), "num_loops": 2, "max_new_tokens": 3, "end_id": -1, **changes}
    for model in (Told(build()), build()):
        with pytest.raises(ValueError, match=message) as caught:
            generate(model, request["tokens"], **{k: v for k, v in request.items() if k != "tokens"})
        assert "\n" not in str(caught.value)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        generate(Told(build().train()), torch.tensor([[1, 2]]), num_loops=1, max_new_tokens=1, end_id=-1)


def test_a_continuation_may_fill_the_model_to_its_last_position():
    for cache in ("auto", "none"):
        tokens = generate(build(), torch.ones(1, 10).long(), num_loops=1, max_new_tokens=3, end_id=-1, cache=cache)
        assert tokens.shape == (1, 3)


def test_a_row_is_drawn_by_its_key_wherever_it_stands():
    model, tokens, keys = build(3), torch.tensor([[1, 2], [3, 4], [2, 2]]), torch.tensor([70, 80, 90])
    options = GenerationOptions(num_loops=2, max_new_tokens=6, end_id=-1, temperature=5.0)

    def drawn(order):
        steps = stream_tokens(model, tokens[order], options, row_keys=keys[order])
        return torch.stack([step.tokens for step in steps], 1)

    assert torch.equal(drawn([2, 0, 1]), drawn([0, 1, 2])[[2, 0, 1]])


def padded(prompts):
    longest = max(map(len, prompts))
    tokens = torch.tensor([[1] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return tokens, mask


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_row_goes_on_to_its_own_limit_and_to_the_models_last_position(positions, cached):
    model = build(4, positions)
    prompts = [[1, 2, 3, 4, 1, 2, 3], [4], [2, 2, 1]]
    tokens, mask = padded(prompts)
    room = torch.tensor([model.config.max_positions + 1 - len(prompt) for prompt in prompts])
    model = model if cached else _WithoutCache(model)
    draw = {"depths": [1, 3], "end_id": -1, "temperature": 2.0}
    together = generate_at_depths(
        model, tokens, attention_mask=mask, max_new_tokens=12, row_limits=room, row_keys=torch.arange(3), **draw
    )
    assert room.tolist() == [6, 12, 10]
    for row, prompt in enumerate(prompts):
        key = torch.tensor([row])
        alone = generate_at_depths(model, torch.tensor([prompt]), max_new_tokens=int(room[row]), row_keys=key, **draw)
        assert torch.equal(together[:, row, : room[row]], alone[:, 0])
        assert (together[:, row, room[row] :] == -1).all()
    for wrong in (torch.tensor([1, 2]), torch.tensor([1, 0, 2]), torch.tensor([1, 13, 2])):
        with pytest.raises(ValueError, match=r"`row_limits` must be \(3,\), each from 1 to"):
            generate_at_depths(
                model, tokens, attention_mask=mask, max_new_tokens=12, row_limits=wrong, depths=[1], end_id=-1
            )


def test_padding_on_the_right_of_a_prompt_is_refused():
    with pytest.raises(ValueError, match="padded on the left"):
        generate(
            build(),
            torch.tensor([[1, 2]]),
            num_loops=1,
            max_new_tokens=1,
            end_id=-1,
            attention_mask=torch.tensor([[1, 0]]),
        )


def test_streamed_tokens_are_the_generated_ones_and_ended_rows_cost_nothing():
    model = build(2)
    tokens, mask = padded([[1, 2, 3], [4], [2, 2]])
    options = GenerationOptions(num_loops=3, max_new_tokens=6, end_id=END)
    steps = list(stream_tokens(model, tokens, options, mask))
    result = generate_with_loops(model, tokens, options, mask)
    assert torch.equal(torch.stack([step.tokens for step in steps], 1), result.tokens)
    assert torch.equal(
        result.tokens, generate(model, tokens, num_loops=3, max_new_tokens=6, end_id=END, attention_mask=mask)
    )
    ended = torch.zeros(3, dtype=torch.bool)
    for step in steps:
        assert torch.equal(step.loops, torch.where(ended, 0, 3))
        assert (step.tokens[ended] == END).all()
        ended |= step.tokens == END
        assert torch.equal(step.finished, ended)


def test_a_stream_computes_no_token_that_was_not_asked_for():
    model = build()
    steps = []
    model.core[0].register_forward_hook(lambda *_: steps.append(1))
    stream = stream_tokens(model, torch.tensor([[1, 2]]), GenerationOptions(num_loops=2, max_new_tokens=5, end_id=-1))
    counts = []
    for _ in range(3):
        next(stream)
        counts.append(len(steps))
    assert counts == [2, 4, 6]


def test_stop_sequences_end_a_row_and_stay_in_it():
    model = build(5)
    tokens, mask = padded([[1, 2, 3], [4], [2, 2], [3, 1]])
    free = generate(model, tokens, num_loops=2, max_new_tokens=8, end_id=-1, attention_mask=mask).tolist()
    stop = [free[0][2:4], [VOCAB + 1]]  # the second never comes
    stopped = generate(model, tokens, num_loops=2, max_new_tokens=8, end_id=-1, attention_mask=mask, stop=stop).tolist()
    for whole, row in zip(free, stopped, strict=True):
        places = [n for n in range(2, len(whole) + 1) if whole[n - 2 : n] == stop[0]]
        expected = whole[: places[0]] if places else whole
        assert row == (expected + [-1] * len(row))[: len(row)]
    # A stop sequence that stands in the prompt is none of the continuation's.
    again = generate(model, tokens, num_loops=2, max_new_tokens=8, end_id=-1, attention_mask=mask, stop=[[1, 2, 3]])
    assert again.shape == (4, 8) or 3 in again


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_row_is_drawn_alike_in_any_batch(cache):
    model = build(3)
    tokens, mask = padded([[1, 2, 3], [4], [2, 2]])
    draw = {"num_loops": 2, "max_new_tokens": 6, "end_id": END, "temperature": 5.0, "top_p": 0.99, "cache": cache}
    together = generate(model, tokens, attention_mask=mask, **draw)
    for count in (1, 2):
        part = generate(model, tokens[:count], attention_mask=mask[:count], **draw)
        assert torch.equal(together[:count, : part.shape[1]], part)
    assert torch.equal(together, generate(model, tokens, attention_mask=mask, **draw))
    assert not torch.equal(together, generate(model, tokens, attention_mask=mask, **draw, seed=1))


@pytest.mark.parametrize("cached", [True, False])
def test_depths_that_share_a_prompt_are_each_as_alone(cached):
    model = build(4, "rotary")
    tokens, mask = padded([[1, 2, 3], [4], [2, 2]])
    calls = []
    model.core[0].register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    depths = [0, 2, 5]
    looped = model if cached else _WithoutCache(model)
    together = generate_at_depths(
        looped, tokens, depths=depths, max_new_tokens=5, end_id=END, attention_mask=mask, stop=[[3, 3]]
    )
    if cached:
        assert calls.count(3) == 5  # the prompt ran to the greatest depth, once
    for depth, rows in zip(depths, together, strict=True):
        alone = generate(
            model, tokens, num_loops=depth, max_new_tokens=5, end_id=END, attention_mask=mask, stop=[[3, 3]]
        )
        assert torch.equal(rows[:, : alone.shape[1]], alone)
        assert (rows[:, alone.shape[1] :] == END).all()


class _WithoutCache:
    def __init__(self, model):
        self.model = model

    def embed(self, inputs, attention_mask=None, initial_hidden=None):
        return self.model.embed(inputs, attention_mask, initial_hidden)

    def step(self, state):
        return self.model.step(state)

    def decode(self, state):
        return self.model.decode(state)


def test_log_likelihoods_of_one_pass_are_those_of_every_depth():
    model = build(1)
    tokens, mask = padded([[1, 2, 3, 4], [4, 2], [2, 2, 1]])
    labels = torch.tensor([[2, 3, 4, 0], [-100, -100, 2, 3], [-100, 2, 1, -100]])
    scores, right = log_likelihoods_at_depths(model, tokens, labels, [0, 1, 4], mask)
    for index, depth in enumerate([0, 1, 4]):
        log_p = model(tokens, num_loops=depth, attention_mask=mask).log_softmax(-1)
        for b in range(3):
            for i in range(4):
                label = labels[b, i].item()
                expected = 0.0 if label == -100 else log_p[b, i, label].item()
                assert scores[index, b, i].item() == pytest.approx(expected, abs=1e-5)
                assert right[index, b, i].item() == (label in (-100, log_p[b, i].argmax().item()))
