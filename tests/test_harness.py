import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from looplm.checkpoints import save_checkpoint, save_pretrained
from looplm.config import LoopedConfig
from looplm.errors import InputError
from looplm.generation import generate
from looplm.harness import LoopedHarnessModel
from looplm.model import LoopedTransformer, Origin

ALPHABET = "0123456789+= ab\n"
VOCAB = {"[end]": 0, **{character: i for i, character in enumerate(ALPHABET, start=1)}}
ADDITIONS = [(a, b) for a in (1, 3, 4) for b in (2, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model with a tokenizer of characters."""
    torch.manual_seed(0)
    config = LoopedConfig(
        vocab_size=len(VOCAB),
        max_positions=24,
        width=16,
        num_heads=2,
        ffn_width=24,
        positions="rotary",
        tie_embeddings=False,
        init_std=0.4,
    )
    path = tmp_path_factory.mktemp("hf") / "model"
    save_pretrained(LoopedTransformer(config).eval(), path, num_loops=3)
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="[end]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[end]"}}))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks of ours: a choice, a generation, a perplexity."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"{a}+{b}=", "choices": [str(a + b), "0", "77"], "gold": 0, "text": f"{a}+{b}={a + b} ab " * 6}
        for a, b in ADDITIONS
    ]
    data = path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    made = {
        "own_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "own_answer": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n", "b"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "own_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    for name, fields in made.items():
        (path / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **fields}))  # JSON is YAML
    return path


def request(*arguments):
    return SimpleNamespace(args=arguments)


def score_by_definition(harness, context, continuation):
    """One text alone, one token after the other."""
    ids, total, greedy = list(context), 0.0, True
    for token in continuation:
        log_p = harness.model(torch.tensor([ids]), num_loops=harness.num_loops)[0, -1].log_softmax(-1)
        total, greedy = total + log_p[token].item(), greedy and log_p.argmax().item() == token
        ids.append(token)
    return total, greedy


@torch.no_grad()
def test_continuations_are_scored_as_by_definition(folder):
    harness = LoopedHarnessModel(str(folder), batch_size=3)
    assert harness.num_loops == 3
    pairs = [("1+2=", "3"), ("12+", "34=46"), ("", "7"), ("a b", " ab"), ("1", "1"), ("1+1+1+1+1+1+1", "=7")]
    scores = harness.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, scores, strict=True):
        ids = harness.tok_encode(context) or [0]
        expected = score_by_definition(harness, ids, harness.tok_encode(continuation))
        assert score == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    # What the model itself would say is greedy.
    said = generate(harness.model, torch.tensor([harness.tok_encode("1+2=")]), num_loops=3, max_new_tokens=2, end_id=-1)
    text = harness.tokenizer.decode(said[0].tolist())
    if len(text) == 2:
        assert harness.loglikelihood([request("1+2=", text)], disable_tqdm=True)[0][1]


@torch.no_grad()
def test_texts_longer_than_the_model_are_scored_in_windows_every_token_once(folder):
    harness = LoopedHarnessModel(str(folder), batch_size=2, num_loops=2)
    text = "1+2=3 ab " * 7
    (score,) = harness.loglikelihood_rolling([request(text)], disable_tqdm=True)
    ids, total, start = harness.tok_encode(text), 0.0, 0
    assert len(ids) == 63
    while start < len(ids):
        # Windows of 24 predictions; the last takes as much context as there is room for.
        end = min(start + 24, len(ids))
        context = [0, *ids][max(end - 24, 0) : start + 1]
        total += score_by_definition(harness, context, ids[start:end])[0]
        start = end
    assert score == pytest.approx(total, abs=1e-3)


def test_generation_stops_at_a_string_and_is_cut_before_it(folder):
    harness = LoopedHarnessModel(str(folder), batch_size=2)
    texts = ["1+2=", "12+34", "a b a", "7"]
    free = harness.generate_until([request(text, {"until": [], "max_gen_toks": 8}) for text in texts])
    for text, answer in zip(texts, free, strict=True):
        ids = torch.tensor([harness.tok_encode(text)])
        alone = generate(harness.model, ids, num_loops=3, max_new_tokens=8, end_id=0)[0].tolist()
        assert answer == harness.tokenizer.decode([token for token in alone if token != 0])
    longest = max(free, key=len)
    stop = longest[2:4]
    cut = harness.generate_until([request(text, {"until": stop, "max_gen_toks": 8}) for text in texts])
    assert cut == [answer.split(stop)[0] for answer in free]


def test_the_harness_runs_our_tasks_at_a_depth_from_its_command_line(folder, tasks, tmp_path):
    num_loops = 1  # not the usual number of the directory
    command = [sys.executable, "-m", "looplm", "eval", "--model", "looplm", "--include_path", str(tasks)]
    command += ["--model_args", f"pretrained={folder},num_loops={num_loops}", "--batch_size", "4"]
    command += ["--tasks", "own_choice,own_answer,own_text", "--output_path", str(tmp_path / "out.json")]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("out*.json")
    results = json.loads(written.read_text())["results"]
    harness = LoopedHarnessModel(str(folder), num_loops=num_loops)
    right = answers = bits = size = 0
    for a, b in ADDITIONS:
        scores = [
            score_by_definition(harness, harness.tok_encode(f"{a}+{b}="), harness.tok_encode(choice))[0]
            for choice in (str(a + b), "0", "77")
        ]
        right += scores.index(max(scores)) == 0
        (answer,) = harness.generate_until([request(f"{a}+{b}=", {"until": ["\n", "b"], "max_gen_toks": 6})])
        answers += answer == str(a + b)
        text = f"{a}+{b}={a + b} ab " * 6
        bits -= harness.loglikelihood_rolling([request(text)])[0] / torch.tensor(2.0).log().item()
        size += len(text)
    assert results["own_choice"]["acc,none"] == pytest.approx(right / len(ADDITIONS))
    assert results["own_answer"]["exact_match,none"] == pytest.approx(answers / len(ADDITIONS))
    assert results["own_text"]["bits_per_byte,none"] == pytest.approx(bits / size, abs=1e-4)


def test_what_cannot_be_evaluated_is_refused_in_one_line(folder, tmp_path):
    for arguments, message in (
        ({"pretrained": str(tmp_path / "none")}, "must be a directory or a hub id"),
        ({"pretrained": str(folder), "batch_size": "auto"}, "`batch_size` must be an integer from 1 to .* got 'auto'"),
        ({"pretrained": str(folder), "num_loops": -1}, "`num_loops` must be an integer from 0 to .* got -1"),
        ({"pretrained": str(folder), "num_loops": "abc"}, "`num_loops` must be an integer from 0 to .* got 'abc'"),
        ({"pretrained": str(folder), "dtype": "float17"}, "`dtype` must be one of .* got 'float17'"),
        ({"pretrained": str(folder), "dtype": "int64"}, "`dtype` must be one of .* got 'int64'"),
        ({"pretrained": str(folder), "device": "bogus"}, "`device` must be one that this machine has.* got 'bogus'"),
        ({"pretrained": str(folder), "device": "cuda:99"}, "`device` must be one that this machine has"),
        ({"pretrained": str(folder), "cache": "foo"}, "`cache` must be `per_loop`.* got 'foo'"),
        ({"pretrained": str(folder), "cache": 5}, "`cache` must be `per_loop`.* got 5"),
        ({"pretrained": str(folder), "max_length": 1}, "`max_length` must be an integer from 2 to .* got 1"),
        ({"pretrained": str(folder), "max_length": 25}, "`max_length` must be an integer from 2 to 24, got 25"),
        ({"pretrained": str(folder), "max_gen_toks": 0}, "`max_gen_toks` must be an integer from 1 to .* got 0"),
        ({"pretrained": str(folder), "loops": 3}, r"`model_args` must be of .* got \['loops'\]"),
        ({"num_loops": 3}, "`model_args` must hold `pretrained`"),
        ({"pretrained": 5}, "must be a directory or a hub id"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            LoopedHarnessModel.create_from_arg_obj(arguments, {"batch_size": 1})
        assert "\n" not in str(caught.value)
    bare = tmp_path / "bare"
    save_pretrained(LoopedTransformer(LoopedConfig(vocab_size=5, max_positions=4, width=4, num_heads=1)), bare)
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        LoopedHarnessModel(str(bare), num_loops=1)
    harness = LoopedHarnessModel(str(folder))
    with pytest.raises(InputError, match=r"`generation_kwargs` must be of .* got \['num_beams'\]"):
        harness.generate_until([request("1", {"num_beams": 4})])
    for options, message in (
        ({"max_gen_toks": 0}, "`max_gen_toks` must be an integer from 1"),
        ({"do_sample": True, "top_k": 0}, "`top_k` must be >= 1, got 0"),
        ({"do_sample": True, "top_k": 2.5}, "`top_k` must be an integer, got 2.5"),
        ({"temperature": "hot"}, "hot"),
        ({"until": [3]}, "`until` must be a text or a list of texts"),
    ):
        with pytest.raises(InputError, match=message):
            harness.generate_until([request("1", options)])


def changed(folder, target, **files):
    shutil.copytree(folder, target)
    for name, content in files.items():
        name = name.replace("__", ".")
        (target / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(target)


def test_files_of_a_tokenizer_that_cannot_be_used_are_refused_in_one_line(folder, tmp_path):
    small = Tokenizer(models.WordLevel({**VOCAB, "more": 40}, unk_token="[end]")).to_str()
    for number, (files, message) in enumerate(
        (
            ({"tokenizer__json": "{"}, "tokenizer.json is no tokenizer"),
            ({"tokenizer__json": small}, "has ids up to 40, the model takes 17 tokens"),
            ({"tokenizer_config__json": "["}, "'tokenizer_config.json' is no JSON"),
            ({"generation_config__json": []}, "'generation_config.json' must hold an object"),
            ({"generation_config__json": {"eos_token_id": 99}}, "`eos_token_id` of `generation_config.json` must be"),
        )
    ):
        with pytest.raises(InputError, match=message) as caught:
            LoopedHarnessModel(changed(folder, tmp_path / str(number), **files))
        assert "\n" not in str(caught.value)


def test_every_end_mark_ends_and_none_is_said(folder, tmp_path):
    free = LoopedHarnessModel(str(folder)).generate_until([request("12+34", {"max_gen_toks": 8})])[0]
    assert len(free) > 2
    second = VOCAB[free[1]]
    other = next(token for character, token in VOCAB.items() if token and character not in free)
    for number, (files, ends) in enumerate(
        (
            ({"generation_config__json": {"eos_token_id": [second, other]}}, [0, second, other]),
            ({"generation_config__json": {"eos_token_id": second}}, [0, second]),
        )
    ):
        harness = LoopedHarnessModel(changed(folder, tmp_path / str(number), **files))
        assert harness._ends == ends
        assert harness.generate_until([request("12+34", {"max_gen_toks": 8})]) == [free[: free.index(free[1])]]
    fields = {**json.loads((folder / "config.json").read_text()), "eos_token_id": [second, 0]}
    silent = {"tokenizer_config__json": {}, "config__json": fields}
    model = LoopedTransformer(LoopedConfig.from_dict(fields["architecture"])).eval()
    model.origin = Origin(config=fields, files={"tokenizer.json": (folder / "tokenizer.json").read_bytes()})
    save_checkpoint(model, tmp_path / "m.ckpt")  # a checkpoint that carries its tokenizer will do too
    for pretrained in (changed(folder, tmp_path / "silent", **silent), str(tmp_path / "m.ckpt")):
        assert LoopedHarnessModel(pretrained)._ends == [second, 0]


def test_a_stop_string_may_be_a_mark(folder, tmp_path):
    free = LoopedHarnessModel(str(folder)).generate_until([request("12+34", {"max_gen_toks": 8})])[0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([free[1]])
    harness = LoopedHarnessModel(changed(folder, tmp_path / "a", tokenizer__json=tokenizer.to_str()))
    for until in ([free[1]], [free[1:3]], free[1]):
        (answer,) = harness.generate_until([request("12+34", {"until": until, "max_gen_toks": 8})])
        whole = until if isinstance(until, str) else until[0]
        assert answer == free[: free.index(whole)].replace(free[1], "")


def test_a_drawn_answer_does_not_depend_on_its_batch(folder):
    wanted = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8}
    requests = [request(text, wanted) for text in ("1+2=", "12+34", "a b a", "7", "7")]
    answers = [LoopedHarnessModel(str(folder), batch_size=size).generate_until(requests) for size in (1, 2, 5)]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1
