"""MathDataModule: what it trains on, what it evaluates, and that a run with it can stop, resume and travel."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from sums import ROWS, write_lines
from tokenizers import Tokenizer
from torch import Tensor

from looplm import LoopedConfig, LoopLM, MathDataModule, STARSObjective, UniformDepth, from_pretrained
from looplm.checkpoints import load_checkpoint
from looplm.cli import main
from looplm.corpora.bpe import BPETokenizer
from looplm.corpora.pretrained_tokenizer import PretrainedTokenizer
from looplm.corpora.sources import Source
from looplm.corpora.text_tokenizer import ByteTokenizer, CorpusCharTokenizer
from looplm.errors import InputError

BATCHINGS = ["shuffled", "bucketed", "packed"]


@pytest.fixture
def make(tmp_path: Path, corpus_file: Path) -> Callable[..., MathDataModule]:
    def build(**changes: Any) -> MathDataModule:
        arguments: dict[str, Any] = {
            "train": [Source(path=str(corpus_file))],
            "max_tokens": 128,
            "batch_size": 4,
            "num_val": 10,
            "cache_dir": str(tmp_path / "cache"),
        }
        return MathDataModule(**{**arguments, **changes})

    return build


def _questions(data: MathDataModule, batch: dict[str, Tensor]) -> list[str]:
    texts = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].long(), strict=True):
        for number in range(1, int(mask.max()) + 1):
            text = data.tokenizer.decode(ids[mask == number].tolist())
            texts.append(text.removeprefix("Question: ").split("\nSolution:")[0])
    return texts


def _said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_an_epoch_trains_on_every_row_that_is_not_held_out_once(
    make: Callable[..., MathDataModule], batching: str
) -> None:
    data = make(batching=batching, batch_size=1)
    data.prepare_data()
    data.setup("fit")
    trained = [
        question for i in range(data.order.rows_per_epoch) for question in _questions(data, data.training_batch(i))
    ]
    held_out = [question for batch in data.val_dataloader()[0] for question in _questions(data, batch)]
    if batching == "bucketed":  # sorted within blocks that do not end with the epoch
        trained += [q for i in range(data.order.rows_per_epoch, 96) for q in _questions(data, data.training_batch(i))]
        assert len(trained) == 96
    else:
        assert len(trained) == 90
    assert set(trained) | set(held_out) == {row["question"] for row in ROWS}
    assert not set(trained) & set(held_out)
    assert len(held_out) == 10


@pytest.mark.parametrize("batching", BATCHINGS)
def test_ranks_share_the_stream_that_one_would_read(make: Callable[..., MathDataModule], batching: str) -> None:
    alone, shared = make(batching=batching, batch_size=6), make(batching=batching, batch_size=2)
    for number in (0, 7):
        parts = [shared.training_batch(number, rank=rank, world_size=3) for rank in range(3)]
        expected = alone.training_batch(number)
        assert sorted(torch.cat([part["index"] for part in parts]).tolist()) == sorted(expected["index"].tolist())
        assert sorted(q for part in parts for q in _questions(shared, part)) == sorted(_questions(alone, expected))


def test_held_out_rows_do_not_depend_on_the_seed_and_batches_do(make: Callable[..., MathDataModule]) -> None:
    first, second = make(seed=0), make(seed=1)
    assert first.splits.val[0].rows.tolist() == second.splits.val[0].rows.tolist()
    assert _questions(first, first.training_batch(0)) != _questions(second, second.training_batch(0))
    again = make(seed=0)
    again.training_batch(3)
    assert torch.equal(again.training_batch(0)["input_ids"], first.training_batch(0)["input_ids"])


def test_questions_of_a_test_set_are_not_trained_on(make: Callable[..., MathDataModule], tmp_path: Path) -> None:
    test_rows = [{"question": row["question"].upper() + " ", "final": "7"} for row in ROWS[:20]]
    test = Source(path=str(write_lines(tmp_path / "test.jsonl", test_rows)), answer=None, final="final")
    data = make(test=[test])
    assert len(data.splits.train[0]) == 70
    assert "20 in a held-out set" in data.splits.train[0].report()


def test_sources_are_mixed_by_weight(make: Callable[..., MathDataModule], corpus_file: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", [{"question": f"What is {i}?", "answer": f"{i}"} for i in range(40)])
    sources = [Source(path=str(corpus_file)), Source(path=str(other), weight=3.0)]
    data = make(train=sources, batching="shuffled", batch_size=1024)
    asked = _questions(data, data.training_batch(2))
    assert sum(question.startswith("What is") for question in asked) == 768


def test_what_became_of_every_row_is_said(
    make: Callable[..., MathDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS[:30], {"question": "q", "answer": " "}, {"question": "q", "answer": "long " * 40}, {"question": "x"}]
    path = write_lines(tmp_path / "mixed.jsonl", rows)
    with caplog.at_level(logging.INFO):
        data = make(train=[Source(path=str(path))], num_val=3)
        data.setup("fit")
    assert (
        "train mixed: 27 of 33 rows; left out: 2 empty, 1 longer than 128 tokens, 3 held out for validation"
        in _said(caplog)
    )
    assert "val mixed: 3 of 3 rows" in _said(caplog)
    with caplog.at_level(logging.INFO):
        make(train=[Source(path=str(path))], overlong="truncate").setup("fit")
    assert "(1 of them cut)" in _said(caplog)
    with pytest.raises(InputError, match=r"row 32: 2.. tokens are more than `max_tokens` 128"):
        make(train=[Source(path=str(path))], overlong="error").setup("fit")


@pytest.mark.parametrize("streaming", [False, True], ids=["kept", "streamed"])
def test_row_that_is_no_text_is_an_error_or_counted(
    make: Callable[..., MathDataModule],
    corpus_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    streaming: bool,
) -> None:
    rows = [*ROWS[:8], {"question": "q\0", "answer": "a"}, {"question": "q", "answer": "b"}]
    path = write_lines(tmp_path / "nul.jsonl", rows)
    changes: dict[str, Any] = {
        "train": [Source(path=str(path))],
        "val": [Source(path=str(corpus_file), split="train[8:]")],
    }
    if streaming:
        changes |= {"streaming": True, "shuffle_buffer": 0}

    def read(data: MathDataModule) -> None:
        next(data.streamed_batches(1)) if streaming else data.setup("fit")

    with pytest.raises(InputError, match=r"nul.jsonl, row 9, column 'question': with a NUL character"):
        read(make(**changes))
    with caplog.at_level(logging.INFO):
        read(make(**changes, bad_rows="skip"))
    assert "9 of 10 rows; left out: 1 with a NUL character" in _said(caplog)


def test_row_of_a_part_is_named_as_one(make: Callable[..., MathDataModule], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "nul.jsonl", [*ROWS[:20], {"question": "q\0", "answer": "a"}])
    for split, name in (("train", "row 21"), ("train[15:]", r"row 6 of train\[15:\]")):
        with pytest.raises(InputError, match=f"nul.jsonl, {name}, column 'question': with a NUL character"):
            make(train=[Source(path=str(path), split=split)]).setup("fit")
    with pytest.raises(InputError, match=r"row 1 of train\[15:20\]: .* tokens are more than `max_tokens`"):
        make(train=[Source(path=str(path), split="train[15:20]")], overlong="error", max_tokens=20).setup("fit")


def test_broken_line_is_skipped_and_counted_where_that_is_asked_for(
    make: Callable[..., MathDataModule], corpus_file: Path
) -> None:
    with corpus_file.open("a") as file:
        file.write('{"question": "half a li\n')
    with pytest.raises(InputError, match="line 101: no JSON"):
        make().setup("fit")
    assert "1 broken" in make(bad_rows="skip").splits.train[0].report()


def test_answer_of_ten_megabytes_is_left_out_and_counted(make: Callable[..., MathDataModule], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "big.jsonl", [*ROWS, {"question": "q", "answer": "x" * 10_000_000}])
    assert "1 longer than 128 tokens" in make(train=[Source(path=str(path))]).splits.train[0].report()


def test_test_batches_hold_what_generation_and_grading_need(
    make: Callable[..., MathDataModule], tmp_path: Path
) -> None:
    rows = [{**ROWS[0], "final": "3"}, {"question": "Why?", "answer": "because " * 30, "final": "7"}]
    first = Source(path=str(write_lines(tmp_path / "first.jsonl", rows)), final="final")
    second = Source(path=str(write_lines(tmp_path / "second.jsonl", rows)), answer=None, final="final", name="other")
    data = make(test=[first, second], tokenizer=CorpusCharTokenizer())
    batch, other = (next(iter(loader)) for loader in data.test_dataloader())
    assert (batch["source"], batch["split"], other["split"]) == ("first", "first", "other")
    assert batch["final"] == other["final"] == other["answer"] == ["3", "7"]
    assert batch["answer"] == [row["answer"] for row in rows]
    assert batch["index"].tolist() == [0, 1]
    assert batch["end_id"] == data.end_id
    prompts = [
        data.tokenizer.decode(ids[mask].tolist())
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    assert prompts == [f"Question: {row['question']}\nSolution:\n" for row in rows]
    assert bool(batch["prompt_mask"][:, -1].all())
    # The second solution does not fit: the row is there to be answered, but has no labels.
    assert (batch["labels"] != -100).any(1).tolist() == [True, False]
    assert (other["labels"] != -100).any(1).tolist() == [True, True]


def test_characters_that_training_had_not_are_counted(make: Callable[..., MathDataModule], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "other.jsonl", [ROWS[0], {"question": "¿Cuánto?", "answer": "5 €"}])
    data = make(tokenizer=CorpusCharTokenizer(), test=[Source(path=str(path))])
    assert data.splits.test[0].report() == "other: 2 of 2 rows; 1 hold something that the tokenizer has no id for"


def test_limits_of_held_out_sets(make: Callable[..., MathDataModule], corpus_file: Path) -> None:
    source = Source(path=str(corpus_file), split="train[50:]")
    data = make(
        train=[Source(path=str(corpus_file), split="train[:50]")], val=[source], num_val=7, test=[source], num_test=3
    )
    assert sum(len(batch["index"]) for batch in data.val_dataloader()[0]) == 7
    assert sum(len(batch["index"]) for batch in data.test_dataloader()[0]) == 3
    assert sum(len(batch["index"]) for batch in make().test_dataloader()[0]) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batching": "sorted"}, "`batching` must be one of"),
        ({"overlong": "keep"}, "`overlong` must be one of"),
        ({"bad_rows": "keep"}, "`bad_rows` must be one of"),
        ({"row_tokens": 200}, "`row_tokens` has no effect"),
        ({"batching": "packed", "row_tokens": 64}, "`row_tokens` must be >= 128"),
        ({"shuffle_buffer": 10}, "`shuffle_buffer` has no effect"),
        ({"streaming": True}, "`streaming: true` needs `val`"),
        ({"batch_size": 0}, "`batch_size` must be >= 1"),
        ({"max_positions": 100}, "`max_positions` must be >= 128"),
        ({"max_tokens": 1}, "`max_tokens` must be >= 2"),
        ({"solution": "{final}"}, "needs the column `final`"),
        ({"train": []}, "`train` must hold a source"),
        ({"test": [Source(path="a/b"), Source(path="c/b")]}, "must be its own, got 'b' twice"),
    ],
)
def test_wrong_value_names_its_field(
    make: Callable[..., MathDataModule], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_corpus_of_which_nothing_can_be_used_is_an_error(make: Callable[..., MathDataModule], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "blank.jsonl", [{"question": " ", "answer": "x"}])
    with pytest.raises(InputError, match="no row can be used: blank: 0 of 1 rows; left out: 1 empty"):
        make(train=[Source(path=str(path))]).setup("fit")


def test_learnt_tokenizer_is_kept_and_shared(
    make: Callable[..., MathDataModule], monkeypatch: pytest.MonkeyPatch, corpus_file: Path
) -> None:
    first = make(tokenizer=BPETokenizer(300))
    files = first.tokenizer.files()

    def refuse(*_: object) -> None:
        raise AssertionError("learnt a second time")

    monkeypatch.setattr(BPETokenizer, "learn", refuse)
    assert make(tokenizer=BPETokenizer(300)).tokenizer.files() == files
    with pytest.raises(AssertionError):
        make(tokenizer=BPETokenizer(301)).tokenizer  # noqa: B018
    write_lines(corpus_file, ROWS[1:])
    with pytest.raises(AssertionError):
        make(tokenizer=BPETokenizer(300)).tokenizer  # noqa: B018


def test_warns_where_generation_would_read_other_prompts(
    make: Callable[..., MathDataModule], save_tokenizer: Callable[..., Path]
) -> None:
    tokenizer = PretrainedTokenizer(str(save_tokenizer()))
    data = make(tokenizer=tokenizer, template="{question}\n\n")
    with pytest.warns(UserWarning, match="64 prompts 64 have other tokens"):
        data.setup("fit")


# Streaming.


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("shuffle_buffer", [0, 30])
def test_streamed_batches_begin_anywhere_and_lose_nothing(
    make: Callable[..., MathDataModule], corpus_file: Path, batching: str, shuffle_buffer: int
) -> None:
    data = make(
        train=[Source(path=str(corpus_file), split="train")],
        val=[Source(path=str(_part(corpus_file)))],
        streaming=True,
        shuffle_buffer=shuffle_buffer,
        batching=batching,
        batch_size=2,
        tokenizer=CorpusCharTokenizer(),
    )
    stream = data.streamed_batches(0)
    batches = [next(stream) for _ in range(160)]
    later = data.streamed_batches(37)
    for batch in batches[37:40]:
        again = next(later)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    asked = [question for batch in batches for question in _questions(data, batch)]
    held_out = {row["question"] for row in ROWS[:5]}
    assert set(asked) == {row["question"] for row in ROWS} - held_out
    halves = [next(data.streamed_batches(5, rank=rank, world_size=2)) for rank in (0, 1)]
    together = [q for half in halves for q in _questions(data, half)]
    assert len(set(torch.cat([half["index"] for half in halves]).tolist())) == 4
    if batching == "shuffled":
        assert sorted(together) == sorted(q for batch in batches[10:12] for q in _questions(data, batch))


def _part(corpus_file: Path) -> Path:
    return write_lines(corpus_file.with_name("held_out.jsonl"), ROWS[:5])


# With the model, the trainer and the command line.


class _Stop(Exception):
    pass


class _StopAt(L.Callback):
    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Stop


class _Seen(L.Callback):
    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.indices.append(batch["index"].tolist())


def _fit(
    data: MathDataModule, folder: Path, *callbacks: L.Callback, ckpt_path: Path | None = None
) -> tuple[dict[str, Tensor], list[list[int]]]:
    config = LoopedConfig(
        vocab_size=data.vocab_size, max_positions=data.max_positions, width=16, num_heads=2, ffn_width=32, dropout=0.1
    )
    module = LoopLM(config, STARSObjective(depth_sampler=UniformDepth(1, 3)), val_depths=[1, 2], seed=5)
    seen = _Seen()
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=6,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, seen, *callbacks],
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except _Stop:
        pass
    return module.state_dict(), seen.indices


@pytest.mark.parametrize("batching", ["bucketed", "packed", "streamed"])
def test_resumed_run_has_the_weights_of_an_undisturbed_one(
    make: Callable[..., MathDataModule], tmp_path: Path, corpus_file: Path, batching: str
) -> None:
    changes: dict[str, Any] = {"batching": batching, "tokenizer": BPETokenizer(300)}
    if batching == "streamed":
        changes |= {"batching": "packed", "streaming": True, "val": [Source(path=str(_part(corpus_file)))]}
    whole, all_indices = _fit(make(**changes), tmp_path / "whole")
    _, first_indices = _fit(make(**changes), tmp_path / "cut", _StopAt(3))
    resumed, indices = _fit(make(**changes), tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert first_indices + indices == all_indices
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_checkpoint_of_another_tokenizer_or_stream_is_noticed(
    make: Callable[..., MathDataModule], corpus_file: Path, tmp_path: Path
) -> None:
    saved = make(tokenizer=CorpusCharTokenizer()).state_dict()
    make(tokenizer=CorpusCharTokenizer()).load_state_dict(saved)
    with pytest.raises(InputError, match="another tokenizer"):
        make(tokenizer=ByteTokenizer()).load_state_dict(saved)
    folder = tmp_path / "cut"
    _fit(make(), folder, _StopAt(2))
    with pytest.warns(UserWarning, match="the resume is not exact"):
        _fit(make(seed=9), folder, ckpt_path=folder / "last.ckpt")


@pytest.mark.parametrize("batching", ["shuffled", "packed", "bucketed", "streamed"])
def test_larger_batches_go_on_with_the_row_where_the_checkpoint_stopped(
    make: Callable[..., MathDataModule], tmp_path: Path, corpus_file: Path, batching: str
) -> None:
    changes: dict[str, Any] = {"batching": batching}
    if batching == "streamed":
        changes |= {"batching": "shuffled", "streaming": True, "val": [Source(path=str(_part(corpus_file)))]}
    seen: list[int] = []
    # Two processes would share the eight rows of the second part.
    for number, (batch_size, stop) in enumerate([(4, 3), (8, 1), (2, 9)]):
        last = tmp_path / "last.ckpt" if number else None
        is_inexact = batching == "bucketed" and number > 0
        with pytest.warns(UserWarning, match="some rows come again") if is_inexact else contextlib.nullcontext():
            _, indices = _fit(make(**changes, batch_size=batch_size), tmp_path, _StopAt(stop), ckpt_path=last)
        assert {len(batch) for batch in indices} == {batch_size}
        seen += [index for batch in indices for index in batch]
    assert len(seen) == 3 * 4 + 1 * 8 + 2 * 2
    if batching != "bucketed":
        assert sorted(seen) == list(range(len(seen)))


def _config(tmp_path: Path, corpus_file: Path, **data: Any) -> Path:
    arguments = {
        "train": [{"path": str(corpus_file)}],
        "max_tokens": 128,
        "batch_size": 4,
        "num_val": 8,
        "cache_dir": str(tmp_path / "cache"),
        **data,
    }
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 3,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "run"),
        },
        "model": {
            "config": {"width": 16, "num_heads": 2, "ffn_width": 32, "positions": "rotary", "dropout": 0.0},
            "objective": {"depth_sampler": {"class_path": "FixedDepth", "init_args": {"depth": 2}}},
            "val_depths": [1, 2],
            "test_depths": [1, 2],
        },
        "data": {"class_path": "MathDataModule", "init_args": arguments},
    }
    path = tmp_path / "math.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "data",
    [
        {"batching": "bucketed"},
        {"batching": "packed", "tokenizer": {"class_path": "BPETokenizer", "init_args": {"vocab_size": 300}}},
    ],
    ids=["bytes", "packed-bpe"],
)
def test_command_line_fits_tests_and_exports_with_the_tokenizer(
    tmp_path: Path, corpus_file: Path, data: dict[str, Any]
) -> None:
    config = _config(tmp_path, corpus_file, **data)
    assert main(["fit", "--config", str(config)]) == 0
    assert main(["test", "--config", str(tmp_path / "run" / "config.yaml")]) == 0
    rows = (tmp_path / "run" / "test_curve.csv").read_text().splitlines()
    assert rows[0].startswith("split,depth,exact_match,token_accuracy")
    assert len(rows) == 3

    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["export", str(checkpoint), str(tmp_path / "exported"), "--num_loops", "2"]) == 0
    library = Tokenizer.from_file(str(tmp_path / "exported" / "tokenizer.json"))
    model = from_pretrained(tmp_path / "exported")
    assert library.get_vocab_size() == model.config.vocab_size
    assert json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    assert load_checkpoint(checkpoint).origin is not None


def test_command_line_takes_a_directory_of_transformers(
    tmp_path: Path, corpus_file: Path, save_tokenizer: Callable[..., Path]
) -> None:
    tokenizer = {
        "class_path": "PretrainedTokenizer",
        "init_args": {"path": str(save_tokenizer()), "num_embeddings": 640},
    }
    config = _config(tmp_path, corpus_file, tokenizer=tokenizer, template="chat", system_prompt="Be brief.")
    assert main(["fit", "--config", str(config)]) == 0
    model = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert model.config.vocab_size == 640
    assert model.origin is not None
    assert "tokenizer.json" in model.origin.files


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [{"path": "nowhere.jsonl"}]}, "must be a file, a directory or a hub id, got 'nowhere.jsonl'"),
        ({"train": [{"path": "CORPUS", "answer": "solution"}]}, "column 'solution' is missing"),
        ({"train": [{"path": "CORPUS", "weight": -1.0}]}, "`weight` must be > 0, got -1.0"),
        ({"train": [{"path": "CORPUS", "colour": "red"}]}, "colour"),
        ({"template": "no place"}, "`template` must be `chat` or hold {question} once"),
        ({"tokenizer": {"class_path": "BPETokenizer", "init_args": {"vocab_size": 9}}}, "`vocab_size` must be >= 258"),
        ({"max_tokens": 20}, "no row can be used"),
        ({"batching": "sorted"}, "sorted"),
    ],
)
def test_mistake_ends_in_one_line(
    tmp_path: Path, corpus_file: Path, data: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in data.get("train", ()):
        source["path"] = source["path"].replace("CORPUS", str(corpus_file))
    assert main(["fit", "--config", str(_config(tmp_path, corpus_file, **data))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("looplm: error: ")
    assert message in error


def test_packed_batch_of_the_module_gives_each_document_its_own_loss(make: Callable[..., MathDataModule]) -> None:
    data = make(batching="packed", row_tokens=256)
    torch.manual_seed(0)
    config = LoopedConfig(
        vocab_size=data.vocab_size, max_positions=data.max_positions, width=16, num_heads=2, ffn_width=32
    )
    model = LoopLM(config).model.eval()
    batch = data.training_batch(0)
    documents = data.order.row(int(batch["index"][0]))
    with torch.no_grad():
        packed = model(batch["input_ids"], 3, batch["attention_mask"])[0]
        for number, document in enumerate(documents, start=1):
            alone = model(torch.from_numpy(document.ids[:-1].astype(np.int64))[None], 3)[0]
            torch.testing.assert_close(packed[batch["attention_mask"][0] == number], alone, atol=1e-5, rtol=0)
    assert len(documents) > 1
