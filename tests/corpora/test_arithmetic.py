"""The arithmetic DataModule: streams and sets that depend on nothing but their index."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from looplm import ArithmeticDataModule
from looplm.corpora.arithmetic import DigitStage
from looplm.corpora.problems import OPERATIONS
from looplm.errors import InputError


def _data(**options: Any) -> ArithmeticDataModule:
    return ArithmeticDataModule(**{"min_digits": 1, "max_digits": 3, "batch_size": 8, **options})


def _texts(data: ArithmeticDataModule, batch: dict[str, Any]) -> list[str]:
    """Return each row's whole text, from its inputs and its last label."""
    texts = []
    for inputs, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        last = int((labels != -100).nonzero()[-1])
        texts.append(data.tokenizer.decode([*inputs[: last + 1].tolist(), int(labels[last])]))
    return texts


def _pairs(data: ArithmeticDataModule, batch: dict[str, Any]) -> set[tuple[str, ...]]:
    """Return each row's operation and operands, the smaller first; for commuting operations."""
    pairs = set()
    for text in _texts(data, batch):
        problem = text.split("=")[0]
        operation = "+" if "+" in problem else "*"
        pairs.add((operation, *sorted(problem.split(operation), key=int)))
    return pairs


def _equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 5))
def test_training_problem_does_not_depend_on_the_batch_size(batch_size: int, micro_batch: int, seed: int) -> None:
    small, one = _data(batch_size=batch_size, seed=seed), _data(batch_size=1, seed=seed)
    batch = small.training_batch(micro_batch)
    alone = [_texts(one, one.training_batch(int(index)))[0] for index in batch["index"]]
    assert _texts(small, batch) == alone


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 50))
def test_two_ranks_read_what_one_process_with_the_doubled_batch_reads(micro_batch: int) -> None:
    ranks = _data(batch_size=5)
    whole = _data(batch_size=10)
    shares = [ranks.training_batch(micro_batch, rank=rank, world_size=2) for rank in range(2)]
    together = whole.training_batch(micro_batch)
    assert torch.cat([share["index"] for share in shares]).tolist() == together["index"].tolist()
    assert [text for share in shares for text in _texts(ranks, share)] == _texts(whole, together)


def test_stream_never_repeats_an_index() -> None:
    data = _data(batch_size=3)
    indices = [
        int(i) for m in range(4) for rank in range(2) for i in data.training_batch(m, rank=rank, world_size=2)["index"]
    ]
    assert indices == list(range(24))


def test_seed_changes_the_stream_and_not_the_held_out_sets() -> None:
    first, second = _data(seed=0), _data(seed=1)
    assert _texts(first, first.training_batch(0)) != _texts(second, second.training_batch(0))
    for split in ("val", "test"):
        assert _equal(first.held_out(split, 20, 2, 3), second.held_out(split, 20, 2, 3))


def test_training_validation_and_test_share_no_problem_not_even_commuted() -> None:
    data = _data(min_digits=1, max_digits=2, batch_size=4000, operations=["+", "*"])
    train, val, test = (
        _pairs(data, batch)
        for batch in (data.training_batch(0), data.held_out("val", 400, 1, 2), data.held_out("test", 400, 1, 2))
    )
    assert min(len(train), len(val), len(test)) > 100
    assert not train & val
    assert not train & test
    assert not val & test


def test_held_out_sets_hold_no_problem_twice() -> None:
    data = _data()
    texts = _texts(data, data.held_out("test", 300, 2, 2))
    assert len(texts) == len(set(texts)) == 300


def test_smaller_held_out_set_than_asked_for_is_said() -> None:
    data = _data()
    with pytest.warns(UserWarning, match=r"only \d+ different val problems were drawn of the 500 asked for"):
        columns = data.held_out("val", 500, 1, 1)
    assert 1 <= len(columns["index"]) < 100


@settings(deadline=None, max_examples=30)
@given(st.booleans(), st.booleans(), st.integers(0, 20), st.sampled_from([["+"], ["-"], ["*"], list(OPERATIONS)]))
def test_labels_are_the_next_tokens_of_answer_and_end_alone(
    reverse_operands: bool, reverse_answer: bool, micro_batch: int, operations: list[str]
) -> None:
    data = _data(operations=operations, reverse_operands=reverse_operands, reverse_answer=reverse_answer)
    batch = data.training_batch(micro_batch)
    inputs, labels, real = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert inputs.shape == labels.shape == real.shape
    for row in range(len(inputs)):
        length = int(real[row].sum())
        # Padding stands on the right.
        assert real[row].tolist() == [True] * length + [False] * (len(real[row]) - length)
        asked = (labels[row] != -100).nonzero().flatten().tolist()
        # Aligned: what is asked at a position is the input of the next.
        assert all(int(labels[row, i]) == int(inputs[row, i + 1]) for i in asked if i + 1 < length)
        prompt = data.tokenizer.decode(inputs[row, : asked[0] + 1].tolist())
        target = data.tokenizer.decode([int(labels[row, i]) for i in asked])
        assert asked == list(range(asked[0], length))
        assert prompt.endswith("= ")
        assert target.endswith("§")
        _check_answer(prompt.removesuffix("= "), target.removesuffix("§"), reverse_operands, reverse_answer)


def _check_answer(problem: str, written: str, reverse_operands: bool, reverse_answer: bool) -> None:
    """Compare with Python's integers."""
    operation = next(character for character in problem if character in OPERATIONS)
    a, b = (int(part[::-1] if reverse_operands else part) for part in problem.split(operation))
    answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
    assert (written[::-1] if reverse_answer else written) == str(answer)


def test_negative_answers_occur() -> None:
    data = _data(operations=["-"], reverse_answer=False)
    assert any("= -" in text for text in _texts(data, data.training_batch(0)))


def test_every_sequence_fits_into_max_positions() -> None:
    data = _data(operations=list(OPERATIONS), test_digits=[5], batch_size=500)
    widths = [data.training_batch(m)["input_ids"].shape[1] for m in range(3)]
    widths += [batch["input_ids"].shape[1] for loader in data.test_dataloader() for batch in loader]
    assert max(widths) < data.max_positions


def test_digit_stages_switch_at_their_optimiser_step() -> None:
    stages = [
        DigitStage(start_step=0, min_digits=1, max_digits=1),
        DigitStage(start_step=3, min_digits=2, max_digits=2),
        DigitStage(start_step=5, min_digits=4, max_digits=4),
    ]
    data = _data(digit_stages=stages, max_digits=4, min_digits=4)
    digits = [
        {len(text.split("+")[0]) for text in _texts(data, data.training_batch(40, optimizer_step=step))}
        for step in range(7)
    ]
    assert digits == [{1}, {1}, {1}, {2}, {2}, {4}, {4}]


@given(st.sampled_from([0.0, 0.3, 1.0]), st.integers(2, 9), st.integers(0, 100))
def test_nines_are_columns_a_carry_runs_through(nines: float, digits: int, micro_batch: int) -> None:
    options: dict[str, Any] = {"operations": ["+", "-"], "min_digits": digits, "max_digits": digits, "batch_size": 200}
    plain, data = _data(**options), _data(**options, nines=nines)
    if nines == 0.0:
        same = zip(plain.training_batch(micro_batch).values(), data.training_batch(micro_batch).values(), strict=True)
        assert all(torch.equal(first, second) for first, second in same)
    sums, differences = [], []
    for text in _texts(data, data.training_batch(micro_batch)):
        a, operation, b = re.match(r"(\d+)([+-])(\d+)=", text).groups()  # type: ignore[union-attr]
        assert len(a) == len(b) == digits
        assert "0" not in (a[0], b[0])
        columns = [int(x) + int(y) == 9 for x, y in zip(a[1:], b[1:], strict=True)]
        (sums if operation == "+" else differences).extend(columns)
    least = math.sqrt(0.25 / len(sums))  # a standard deviation, at most
    assert np.mean(sums) == pytest.approx(nines + 0.1 * (1 - nines), abs=5 * least)
    assert np.mean(differences) == pytest.approx(0.1, abs=5 * least)


class _Reader(L.LightningModule):
    """Trains nothing worth having; records the texts it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, int]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.trainer.global_step, int(batch["index"][0]), batch["input_ids"].shape[1]))
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(data: ArithmeticDataModule, module: _Reader, max_steps: int, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def test_stages_follow_optimiser_steps_under_gradient_accumulation() -> None:
    stages = [
        DigitStage(start_step=0, min_digits=1, max_digits=1),
        DigitStage(start_step=2, min_digits=3, max_digits=3),
    ]
    module = _Reader()
    _fit(_data(digit_stages=stages, batch_size=4), module, max_steps=4, accumulate_grad_batches=3)
    assert [index for _, index, _ in module.seen] == list(range(0, 48, 4))
    short, long = ({width for step, _, width in module.seen if (step >= 2) == late} for late in (False, True))
    assert max(short) < min(long)


def test_stream_continues_where_the_trainer_stands() -> None:
    data, module = _data(batch_size=4), _Reader()
    trainer = _fit(data, module, max_steps=3)
    # A loader that is made anew, as for a second epoch or after a resume, must not begin at the beginning.
    batch = next(iter(trainer.datamodule.train_dataloader()))
    assert int(batch["index"][0]) == 12
    assert _equal(batch, data.training_batch(3))


def test_epochs_continue_the_stream() -> None:
    module = _Reader()
    _fit(_data(batch_size=4), module, max_steps=6, limit_train_batches=2)
    assert [index for _, index, _ in module.seen] == list(range(0, 24, 4))


def test_loader_without_a_trainer_is_the_stream_from_its_beginning() -> None:
    data = _data()
    for micro_batch, batch in zip(range(3), data.train_dataloader(), strict=False):
        assert _equal(batch, data.training_batch(micro_batch))


def test_evaluation_batches_hold_the_whole_set_in_order() -> None:
    data = _data(num_val=10, eval_batch_size=4, test_digits=[1, 4], num_test=3)
    batches = list(data.val_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(10))
    loaders = data.test_dataloader()
    assert [next(iter(loader)).get("split") for loader in loaders] == [None, "digits_1", "digits_4"]
    four_digits = _texts(data, next(iter(loaders[2])))
    assert {len(text.split("+")[0]) for text in four_digits} == {4}


def _write_rows(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


GOOD = {"a": 12, "op": "+", "b": 34, "answer": 46}


@pytest.mark.filterwarnings("ignore:.*may occur in training")
def test_test_file_is_tested_on_in_its_order(tmp_path: Path) -> None:
    path = _write_rows(tmp_path / "test.jsonl", GOOD, {"a": 5, "op": "-", "b": 17, "answer": -12})
    data = _data(operations=["+", "-"], test_file=path)
    (loader,) = data.test_dataloader()
    assert _texts(data, next(iter(loader))) == ["12+34= 64§", "5-17= 21-§"]


def test_written_test_set_is_the_held_out_one(tmp_path: Path) -> None:
    data = _data(operations=list(OPERATIONS))
    data.write_test_set(str(tmp_path / "test.jsonl"), 25)
    (loader,) = _data(operations=list(OPERATIONS), test_file=str(tmp_path / "test.jsonl")).test_dataloader()
    assert _texts(data, next(iter(loader))) == _texts(data, data.held_out("test", 25, 1, 3))


def test_rows_of_a_test_file_that_training_may_hold_are_counted(tmp_path: Path) -> None:
    rows = [{"a": a, "op": "+", "b": 11, "answer": a + 11} for a in range(10, 60)]
    data = _data(test_file=_write_rows(tmp_path / "test.jsonl", *rows))
    with pytest.warns(UserWarning, match=r"(3|4)\d of 50 rows of .* may occur in training"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("not json", "Expecting value"),
        ("", "Expecting value"),
        ("[1, 2]", "list indices"),
        ({"a": 1, "op": "+", "b": 2}, "no key 'answer'"),
        ({**GOOD, "answer": 47}, "12\\+34 is not 47"),
        ({**GOOD, "a": "12"}, "must be integers"),
        ({**GOOD, "a": True, "answer": 35}, "must be integers"),
        ({**GOOD, "b": 34.0}, "must be integers"),
        ({**GOOD, "op": "/"}, "`op` one of"),
        ({**GOOD, "op": ["+"]}, "`op` one of"),
        ({**GOOD, "a": -12, "answer": 22}, "1 to 9 digits"),
        ({**GOOD, "a": 10**9, "answer": 10**9 + 34}, "1 to 9 digits"),
        ({**GOOD, "op": "*", "answer": 408}, "one of \\['\\+'\\]"),  # not among the data's operations
    ],
)
def test_bad_row_of_a_test_file_is_named_by_file_and_line(tmp_path: Path, bad: Any, what: str) -> None:
    path = _write_rows(tmp_path / "test.jsonl", GOOD, bad, GOOD)
    with pytest.raises(InputError, match=what) as caught:
        _data(test_file=path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_test_file_without_rows_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="empty has no rows"):
        _data(test_file=str(tmp_path / "empty"))
    with pytest.raises(InputError, match="missing cannot be read"):
        _data(test_file=str(tmp_path / "missing"))
    (tmp_path / "latin1").write_bytes(b"\xa7\n")
    with pytest.raises(InputError, match="latin1 cannot be read"):
        _data(test_file=str(tmp_path / "latin1"))


def test_predict_file_is_padded_on_the_left_and_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "problems.txt"
    path.write_text("1+2\n\n  123 + 45 =\n", encoding="utf-8")
    data = _data(predict_file=str(path))
    data.setup("predict")
    assert data.predict_problems == [(1, "+", 2), (123, "+", 45)]
    batch = next(iter(data.predict_dataloader()))
    assert [data.tokenizer.decode(row) for row in batch["input_ids"].tolist()] == ["1+2= ", "123+45= "]
    assert batch["attention_mask"].tolist() == [[False] * 3 + [True] * 5, [True] * 8]
    assert data.tokenizer.decode([batch["end_id"]]) == "§"


def test_problems_are_read_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("7+8\n"))
    data = _data()
    data.setup("predict")
    assert data.predict_problems == [(7, "+", 8)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("hello", "expected a problem such as 12\\+34"),
        ("3*4", "operation must be one of \\['\\+'\\]"),
        ("123456+1", "tokens are more than the"),
    ],
)
def test_bad_line_of_a_predict_file_is_named(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "problems.txt"
    path.write_text(f"1+2\n\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=what) as caught:
        _data(predict_file=str(path)).setup("predict")
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_empty_predict_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "problems.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"problems\.txt holds no problems"):
        _data(predict_file=str(tmp_path / "problems.txt")).setup("predict")


@pytest.mark.parametrize("reverse_answer", [True, False])
def test_generated_answers_are_read_most_significant_digit_first(reverse_answer: bool, tmp_path: Path) -> None:
    (tmp_path / "problems.txt").write_text("5+7\n0+0\n", encoding="utf-8")
    data = _data(reverse_answer=reverse_answer, predict_file=str(tmp_path / "problems.txt"))
    data.setup("predict")
    written = ["21§§" if reverse_answer else "12§§", "0§§§"]
    assert data.predicted_lines([data.tokenizer.encode_batch(written)]) == ["5+7=12", "0+0=0"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"operations": []}, "`operations`"),
        ({"operations": ["+", "+"]}, "`operations`"),
        ({"operations": ["/"]}, "`operations`"),
        ({"min_digits": 0}, "`digits`"),
        ({"min_digits": 4}, "`digits`"),
        ({"max_digits": 10}, "`digits`"),
        ({"test_digits": [10]}, "`test_digits`"),
        ({"digit_stages": [DigitStage(start_step=0, min_digits=3, max_digits=2)]}, "`digit_stages`"),
        ({"digit_stages": [DigitStage(start_step=5, min_digits=1, max_digits=2)]}, "`digit_stages`"),
        ({"nines": 1.5}, "`nines`"),
        ({"operations": ["-"], "nines": 0.5}, "`nines`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"eval_batch_size": 0}, "`eval_batch_size`"),
        ({"num_val": 0}, "`num_val`"),
        ({"num_test": 0}, "`num_test`"),
    ],
)
def test_value_outside_its_range_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _data(**options)


def test_other_batches_go_on_with_the_row_where_the_checkpoint_stopped() -> None:
    before, after = (ArithmeticDataModule(batch_size=size) for size in (4, 6))
    position = {**before.state_dict(), "batches": 3, "rows_per_batch": 8}  # of two processes
    after.load_state_dict(position)
    rows = [after.training_batch(batch, rank=rank, world_size=2)["index"] for batch in (3, 4) for rank in range(2)]
    assert torch.cat(rows).tolist() == list(range(24, 48))
    again = ArithmeticDataModule(batch_size=12)  # one process takes as many: from the same origin
    again.load_state_dict({**position, "batches": 5, "rows_per_batch": 12, "batch": 3, "row": 24})
    assert again.training_batch(5)["index"].tolist() == list(range(48, 60))
