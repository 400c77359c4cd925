"""What `explore` opens, what it answers, and what it refuses, without its server."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import SUMS, random_model, run_of_sums, run_of_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from looplm.checkpoints import load_checkpoint, save_checkpoint, save_pretrained
from looplm.cli import main
from looplm.commands.explorer.forms import TextForm
from looplm.commands.explorer.opening import open_model
from looplm.commands.explorer.session import Limits, Session, shown_depths
from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.corpora.bpe import BPETokenizer
from looplm.corpora.pretrained_tokenizer import PretrainedTokenizer
from looplm.corpora.templates import SolutionText
from looplm.corpora.text_tokenizer import ByteTokenizer, CorpusCharTokenizer, TextTokenizer
from looplm.corpora.token_table import RowEncoder
from looplm.errors import InputError
from looplm.generation import generate

QUESTION = "Ann’s 3 <|end|> apples\n+ 4?"
CORPUS = ["how many apples, how many pears 0123456789"] * 9


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of_sums(tmp_path_factory.mktemp("explore") / "sums")


def _learnt(tokenizer: TextTokenizer) -> TextTokenizer:
    tokenizer.learn(CORPUS)
    return tokenizer


# Opening.


@pytest.mark.parametrize("what", ["", "checkpoints/last.ckpt"])
def test_run_and_its_checkpoint_are_asked_as_they_were_trained(sums: Path, what: str) -> None:
    form = open_model(str(sums / what)).form
    data = ArithmeticDataModule(**SUMS)
    batch = data.training_batch(0)
    row = batch["labels"][0]
    ids = batch["input_ids"][0]
    first = int((row != -100).int().argmax())
    problem = data.tokenizer.decode(ids[: first + 1].tolist())
    assert form.encode(problem) == ids[: first + 1].tolist()
    answer = row[row != -100].tolist()
    assert form.answer(answer) == form.expected(problem)
    assert answer[-1:] == form.end_ids


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CorpusCharTokenizer(), BPETokenizer(vocab_size=300)])
def test_model_of_texts_reads_what_its_run_read(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    template = "Q: {question}\nA:\n"
    run = run_of_texts(tmp_path / "run", _learnt(tokenizer), template=template)
    encoder = RowEncoder(SolutionText(template, "{answer}", None), tokenizer)
    form = open_model(str(run)).form
    assert form.encode(QUESTION) == encoder.encode_prompts([QUESTION])[0].tolist()
    assert form.end_ids == [encoder.prompts.end_id]
    # An exported directory has the tokenizer and no run: the template is the user's to give.
    save_pretrained(load_checkpoint(run / "checkpoints" / "last.ckpt"), tmp_path / "hf", num_loops=4)
    exported = open_model(str(tmp_path / "hf"), template=template).form
    plain = "Ann has 3 apples"
    assert exported.encode(plain) == encoder.encode_prompts([plain])[0].tolist()
    (ids,) = tokenizer.encode([plain])
    assert open_model(str(tmp_path / "hf")).form.encode(plain) == list(ids.ids)
    assert exported.answer(list(ids.ids)) == plain


@given(text=st.text(alphabet="aé日𝄞\n ", min_size=1))
def test_a_character_of_several_tokens_is_shown_whole(text: str) -> None:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    form = TextForm(tokenizer, str, end_ids=[], example="a")
    ids = form.encode(text)
    assert "".join(form.tokens(ids)) == text.replace("\n", "⏎").replace(" ", "␣")
    assert len(form.tokens(ids)) == len(ids)
    cut = form.tokens(ids[:-1])  # perhaps within a character
    shown = "".join(cut).rstrip("�")
    assert len(cut) == len(ids) - 1
    assert text.replace("\n", "⏎").replace(" ", "␣").startswith(shown)


def test_chat_template_is_rendered_as_in_training(tmp_path: Path) -> None:
    characters = sorted({*"usersystemant\n<>|_im abcdefghij"})
    vocabulary = {token: i for i, token in enumerate(["<|im_end|>", "<|im_start|>", *characters])}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="<|im_end|>"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    tokenizer = PretrainedTokenizer(str(tmp_path / "tokenizer"))
    run = run_of_texts(tmp_path / "run", tokenizer, template="chat", system_prompt="be a")
    encoder = RowEncoder(SolutionText("chat", "{answer}", "be a"), tokenizer)
    form = open_model(str(run)).form
    assert form.encode("add a") == encoder.encode_prompts(["add a"])[0].tolist()
    assert form.encode("add a")[0] == vocabulary["<|im_start|>"]
    assert form.end_ids == [vocabulary["<|im_end|>"]]


def test_weights_without_a_run_are_opened_with_the_config_of_theirs(sums: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(sums / "checkpoints" / "last.ckpt"), tmp_path / "alone.ckpt")
    opened = open_model(str(tmp_path / "alone.ckpt"), config=sums / "config.yaml")
    assert opened.form.expected("12+34") == "46"
    with pytest.raises(InputError, match="`--config`"):
        open_model(str(tmp_path / "alone.ckpt"))


# Answering.


def test_answer_of_every_depth_is_that_of_generation(sums: Path) -> None:
    session = Session(open_model(str(sums)), Limits(max_depth=12, max_new_tokens=5))
    page = session.answer({"problem": "12+34", "max_depth": 9})
    data = ArithmeticDataModule(**SUMS)
    model = load_checkpoint(sums / "checkpoints" / "last.ckpt")
    prompt = data.tokenizer.encode_batch([data.prompt(12, "+", 34)])
    assert page["depths"] == list(range(10))
    assert len({page["answers"][n]["text"] for n in page["chosen"]}) > 1
    for depth, number in zip(page["depths"], page["chosen"], strict=True):
        said = generate(model, prompt, num_loops=depth, max_new_tokens=5, end_id=data.end_id)
        assert page["answers"][number]["text"] == data.encoder.form.read_answer(data.tokenizer.decode(said[0].tolist()))
    assert page["expected"] == "46"
    assert [exit["name"] for exit in page["exits"]] == ["residual", "kl", "entropy", "confidence"]
    assert all(1 <= loops <= 9 for exit in page["exits"] for loops in exit["loops"])
    json.dumps(page, allow_nan=False)


def test_learned_gate_is_an_exit_of_its_own(tmp_path: Path) -> None:
    session = Session(open_model(str(run_of_sums(tmp_path, exit_gate=True))), Limits())
    page = session.answer({"problem": "12+34", "max_depth": 4})
    assert [exit["name"] for exit in page["exits"]][-1] == "gate"


def test_state_that_is_not_finite_is_null_on_the_page(tmp_path: Path) -> None:
    run = run_of_sums(tmp_path)
    model = load_checkpoint(run / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        for parameter in model.core.parameters():
            parameter.fill_(torch.inf)
    save_checkpoint(model, run / "checkpoints" / "last.ckpt")
    page = Session(open_model(str(run)), Limits()).answer({"problem": "12+34", "max_depth": 2})
    assert page["answers"][-1]["residual"][1][0] is None
    json.dumps(page, allow_nan=False)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ([], "must be an object"),
        ({"problem": "1+1", "depth": 3}, "must be an object of ['max_depth', 'problem']"),
        ({}, "`problem`"),
        ({"problem": " \n"}, "`problem`"),
        ({"problem": 7}, "`problem`"),
        ({"problem": "1" * 2001}, "at most 2,000 characters, got 2,001"),
        ({"problem": "12+34", "max_depth": 65}, "`max_depth` must be an integer from 1 to 64, got 65"),
        ({"problem": "12+34", "max_depth": 0}, "`max_depth`"),
        ({"problem": "12+34", "max_depth": True}, "`max_depth`"),
        ({"problem": "12+34", "max_depth": 2.0}, "`max_depth`"),
        ({"problem": "12+34", "max_depth": "9" * 500}, "`max_depth`"),
        ({"problem": "two and two"}, "expected a problem such as 12+34"),
        ({"problem": "12*34"}, "the operation must be one of ['+']"),
        ({"problem": "1234567+7654321"}, "more than the 16 the model takes"),
        ({"problem": "\ud800"}, "expected a problem"),
    ],
)
def test_wrong_request_is_refused_in_one_line(sums: Path, request_: Any, named: str) -> None:
    with pytest.raises(InputError) as refused:
        Session(open_model(str(sums)), Limits()).answer(request_)
    assert named in str(refused.value)
    assert len(str(refused.value)) < 300


def test_text_that_the_model_cannot_take_is_refused(tmp_path: Path) -> None:
    session = Session(open_model(str(run_of_texts(tmp_path, ByteTokenizer(), template="{question}"))), Limits())
    assert session.answer({"problem": "a" * 96, "max_depth": 1})["answers"]
    with pytest.raises(InputError, match="97 tokens, the model takes 96"):
        session.answer({"problem": "a" * 97})
    # A lone surrogate is replaced, not a failure.
    assert session.answer({"problem": "\ud800", "max_depth": 1})["prompt"] == ["?"]


def test_computation_that_takes_too_long_is_stopped(sums: Path) -> None:
    session = Session(open_model(str(sums)), Limits(max_seconds=1e-9))
    with pytest.raises(InputError, match="stopped after 1e-09 seconds"):
        session.answer({"problem": "12+34"})


def test_shown_depths_are_few_and_reach_the_greatest() -> None:
    for greatest in (1, 2, 31, 32, 33, 40, 64, 100, 1024, 10**6):
        depths = shown_depths(greatest)
        assert depths == sorted(set(depths))
        assert (depths[0], depths[-1]) == (0, greatest)
        assert len(depths) <= 33


# The command line.


def _refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["explore", "--no_browser", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("looplm: error: ")
    assert err.count("\n") == 1
    return err


def test_what_cannot_be_opened_is_refused(sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"PK nonsense")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "meta.pt").touch()
    (sharded / ".metadata").touch()
    assert "no/such/run" in _refused(capsys, "no/such/run")
    assert "is no run directory" in _refused(capsys, tmp_path)
    assert "broken.ckpt" in _refused(capsys, tmp_path / "broken.ckpt")
    assert "consolidate" in _refused(capsys, sharded)
    assert "`--template` has no effect" in _refused(capsys, sums, "--template", "chat")
    assert "`template` must be" in _refused(
        capsys, run_of_texts(tmp_path / "texts", ByteTokenizer()), "--template", "no place"
    )
    other = run_of_sums(tmp_path / "other")
    save_checkpoint(random_model(9, 16), other / "checkpoints" / "last.ckpt")
    assert "another run" in _refused(capsys, other)
    (other / "config.yaml").write_text("data: [")
    assert "is no config.yaml of a run" in _refused(capsys, other)
    assert "`--device` must be one that this machine has" in _refused(capsys, sums, "--device", "abacus")
    assert "`max_seconds` must be > 0, got 0.0" in _refused(capsys, sums, "--max_seconds", "0")
    assert "`max_depth` must be >= 1, got 0" in _refused(capsys, sums, "--max_depth", "0")


def test_port_that_is_taken_is_refused(sums: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"`--port` {port} cannot be used: Address already in use" in _refused(capsys, sums, "--port", port)
    assert "`--port` must be from 0 to 65535, got 65536" in _refused(capsys, sums, "--port", 65536)
