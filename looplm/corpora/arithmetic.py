"""Arithmetic as a LightningDataModule: an endless training stream and fixed held-out sets, each a function of index.

Knows the trainer (where the stream stands) but no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from looplm.corpora.lines import input_lines, input_name
from looplm.corpora.problems import (
    MAX_DIGITS,
    OPERATIONS,
    Problems,
    Split,
    TextForm,
    draw_problems,
    exact_result,
    in_split,
    parse_problem,
)
from looplm.corpora.stream import StreamOrigin, TrainingStream, batches_per_step, rows_per_batch, trained_batches
from looplm.corpora.tokenizer import CharTokenizer
from looplm.depth import check_starts
from looplm.errors import InputError
from looplm.randomness import fold

__all__ = ["ArithmeticDataModule", "DigitStage"]

_EVALUATION_SEED = 2026  # held-out sets are the same for every seed of training


@dataclass(frozen=True, kw_only=True)
class DigitStage:
    """Digits of the training problems from an optimiser step on.

    Example:
        >>> stages = [DigitStage(start_step=start, min_digits=1, max_digits=most) for start, most in ((0, 1), (300, 3))]
        >>> data = ArithmeticDataModule(min_digits=1, max_digits=3, digit_stages=stages)
    """

    start_step: int
    """Optimiser step from which the stage is in force."""
    min_digits: int
    """Fewest digits of an operand."""
    max_digits: int
    """Most digits of an operand."""


def _check_digits(name: str, min_digits: int, max_digits: int) -> None:
    if not 1 <= min_digits <= max_digits <= MAX_DIGITS:
        raise ValueError(f"`{name}` needs 1 <= min <= max <= {MAX_DIGITS}, got {min_digits} to {max_digits}.")


class _Encoder:
    """Turns problems into aligned tensors. Knows the text form and the tokenizer."""

    def __init__(self, form: TextForm) -> None:
        self.form = form
        self.tokenizer = CharTokenizer(form.alphabet)

    def texts(self, problems: Problems) -> list[tuple[str, str]]:
        columns = (problems.a, problems.operation, problems.b, problems.answers)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [self.form.write(a, OPERATIONS[operation], b, answer) for a, operation, b, answer in rows]

    def batch(self, problems: Problems, indices: np.ndarray) -> dict[str, Tensor]:
        texts = self.texts(problems)
        tokens = self.tokenizer.encode_batch([prompt + target for prompt, target in texts])
        num_tokens = torch.tensor([len(prompt) + len(target) for prompt, target in texts])
        num_prompt = torch.tensor([len(prompt) for prompt, _ in texts])
        # Position i of the inputs predicts token i + 1, so the last token of a row is never an input.
        position = torch.arange(tokens.shape[1] - 1)
        real = position < num_tokens[:, None] - 1
        asked = real & (position >= num_prompt[:, None] - 1)
        return {
            "input_ids": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].masked_fill(~asked, -100),
            "attention_mask": real,
            "index": torch.from_numpy(indices),
        }


class _Rows(Dataset[dict[str, Any]]):
    """A set in memory, by row."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["index"])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row] for name, column in self.columns.items()}


class ArithmeticDataModule(L.LightningDataModule):
    """Addition, subtraction and multiplication, written as text, with the loss on the answer.

    A batch is a dict: ``input_ids`` int64 ``(B, T)``; ``labels`` int64 ``(B, T)``, the token that each position must
    predict, −100 outside the answer and its end mark; ``attention_mask`` bool ``(B, T)``, padding on the right;
    ``index`` int64 ``(B,)``. Training problem i is a function of (seed, i). Training, validation and test problems are
    disjoint by construction (see :func:`~looplm.corpora.problems.split_of`) and held-out sets hold no problem twice.

    Args:
        operations: Some of ``+``, ``-``, ``*``, equally often.
        min_digits: Fewest digits of an operand; both operands have the same number.
        max_digits: Most digits of an operand.
        digit_stages: Other digit ranges for the training stream by optimiser step; none: the range above throughout.
        nines: Chance of each column of a sum, beside the one in ten, to be made up to nine, where a carry from the
            right runs through; in held-out sets too. Long carries are rare in sums drawn evenly.
        template: Text form, see :class:`~looplm.corpora.problems.TextForm`.
        reverse_operands: Whether operands are written least significant digit first.
        reverse_answer: Whether the answer is written least significant digit first.
        batch_size: Training problems a step on each process.
        eval_batch_size: Problems a batch in validation, test and prediction.
        num_val: Validation problems.
        num_test: Test problems; fewer if the digits do not give as many (said in a warning).
        test_file: JSON lines with integers ``a``, ``b``, ``answer`` and string ``op`` to test on in their place.
        test_digits: Further test sets, one for each of these numbers of digits (length generalisation).
        predict_file: Problems to answer, one a line, for ``predict``; ``-``: standard input.
        seed: Seed of the training stream.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> data = ArithmeticDataModule(max_digits=1, min_digits=1, batch_size=2)
        >>> data.training_batch(0)["input_ids"].shape
        torch.Size([2, 7])
    """

    def __init__(
        self,
        operations: list[str] = ["+"],  # noqa: B006 - read only, and shown in the command line's help
        min_digits: int = 4,
        max_digits: int = 4,
        digit_stages: list[DigitStage] | None = None,
        nines: float = 0.0,
        template: str = "{a}{op}{b}= {answer}§",
        reverse_operands: bool = False,
        reverse_answer: bool = True,
        batch_size: int = 512,
        eval_batch_size: int = 250,
        num_val: int = 500,
        num_test: int = 1000,
        test_file: str | None = None,
        test_digits: list[int] | None = None,
        predict_file: str = "-",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not operations or len(set(operations)) != len(operations) or not set(operations) <= set(OPERATIONS):
            raise ValueError(f"`operations` must be some of {list(OPERATIONS)}, each once, got {operations}.")
        _check_digits("digits", min_digits, max_digits)
        if digit_stages is not None:
            check_starts("digit_stages", [stage.start_step for stage in digit_stages])
        for stage in digit_stages or []:
            _check_digits("digit_stages", stage.min_digits, stage.max_digits)
        for digits in test_digits or []:
            _check_digits("test_digits", digits, digits)
        if not 0 <= nines <= 1:
            raise ValueError(f"`nines` must be in [0, 1], got {nines}.")
        if nines and "+" not in operations:
            raise ValueError(f"`nines` has no effect without '+' in `operations`, got {nines}.")
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("num_val", num_val),
            ("num_test", num_test),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        self.operations = tuple(operations)
        self.min_digits, self.max_digits, self.nines = min_digits, max_digits, nines
        self.digit_stages = digit_stages or [DigitStage(start_step=0, min_digits=min_digits, max_digits=max_digits)]
        self.encoder = _Encoder(TextForm(template, reverse_operands, reverse_answer))
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_val, self.num_test = num_val, num_test
        self.test_file, self.test_digits, self.predict_file = test_file, list(test_digits or []), predict_file
        self.seed = seed
        self._origin = StreamOrigin()
        self.predict_problems: list[tuple[int, str, int]] = []
        widest = max(max_digits, *(stage.max_digits for stage in self.digit_stages), *self.test_digits, 1)
        if test_file is not None:
            widest = max(widest, _num_digits(_read_test_file(test_file, self.operations)))
        self.max_positions = self.encoder.form.longest(self.operations, widest)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.encoder.tokenizer.vocab_size

    @property
    def tokenizer(self) -> CharTokenizer:
        """The tokenizer of prompts and answers."""
        return self.encoder.tokenizer

    def training_batch(
        self, micro_batch: int, *, optimizer_step: int | None = None, rank: int = 0, world_size: int = 1
    ) -> dict[str, Tensor]:
        """Return one batch of the training stream; shapes as in the class.

        Args:
            micro_batch: Number of batches before it.
            optimizer_step: Optimiser step it belongs to; None: ``micro_batch``.
            rank: This process.
            world_size: Number of processes; together they read the stream that one would.
        """
        step = micro_batch if optimizer_step is None else optimizer_step
        stage = [stage for stage in self.digit_stages if stage.start_step <= step][-1]
        first = self._origin.first_row(micro_batch, world_size * self.batch_size) + rank * self.batch_size
        indices = np.arange(first, first + self.batch_size)
        key = fold(self.seed, "train")
        return self.encoder.batch(self._draw(key, indices, "train", stage.min_digits, stage.max_digits), indices)

    def held_out(self, split: Split, size: int, min_digits: int, max_digits: int) -> dict[str, Any]:
        """Return a fixed held-out set of at most ``size`` different problems, as columns of N rows."""
        kept = self._held_out_problems(split, size, min_digits, max_digits)
        return self.encoder.batch(kept, np.arange(len(kept)))

    def write_test_set(self, path: str, size: int) -> None:
        """Write the held-out test set as JSON lines with ``a``, ``op``, ``b``, ``answer``, as ``test_file`` reads them.

        Args:
            path: The file to write.
            size: Number of problems.
        """
        kept = self._held_out_problems("test", size, self.min_digits, self.max_digits)
        columns = (kept.a, kept.operation, kept.b, kept.answers)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        lines = [json.dumps({"a": a, "op": OPERATIONS[op], "b": b, "answer": answer}) for a, op, b, answer in rows]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _held_out_problems(self, split: Split, size: int, min_digits: int, max_digits: int) -> Problems:
        key = fold(_EVALUATION_SEED, split, min_digits, max_digits)
        drawn = self._draw(key, np.arange(4 * size), split, min_digits, max_digits)
        rows = np.stack([drawn.a, drawn.operation, drawn.b], axis=1)
        _, first = np.unique(rows, axis=0, return_index=True)
        kept = drawn.take(np.sort(first)[:size])
        if len(kept) < size:
            rank_zero_warn(f"only {len(kept)} different {split} problems were drawn of the {size} asked for.")
        return kept

    def _draw(self, key: int, indices: np.ndarray, split: Split, min_digits: int, max_digits: int) -> Problems:
        return draw_problems(
            key,
            indices,
            operations=self.operations,
            min_digits=min_digits,
            max_digits=max_digits,
            split=split,
            nines=self.nines,
        )

    def setup(self, stage: str) -> None:
        """Read the files that the stage needs."""
        if stage == "predict":
            self.predict_problems = self._read_predict_file()

    def predicted_lines(self, continuations: Iterable[Tensor]) -> list[str]:
        """Return what ``predict`` prints: a line a problem, the answer's most significant digit first.

        Args:
            continuations: Generated ids of each batch, ``(B, N)``.
        """
        rows = [row for batch in continuations for row in batch.tolist()]
        answers = [self.encoder.form.read_answer(self.tokenizer.decode(row)) for row in rows]
        problems = zip(self.predict_problems, answers, strict=True)
        return [f"{a}{op}{b}={answer}" for (a, op, b), answer in problems]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the endless training stream, from where the trainer stands."""
        trainer = self.trainer

        def make_batch(micro_batch: int) -> dict[str, Tensor]:
            if trainer is None:
                return self.training_batch(micro_batch)
            return self.training_batch(
                micro_batch,
                optimizer_step=micro_batch // trainer.accumulate_grad_batches,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )

        position, per_step = partial(trained_batches, trainer), partial(batches_per_step, trainer)
        stream = TrainingStream(lambda start: map(make_batch, count(start)), position, per_step)
        return DataLoader(stream, batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how much of the stream has been read."""
        return self._origin.state(self.trainer, self.batch_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint's run stopped, with whatever batches."""
        self._origin = StreamOrigin.resumed(state_dict, rows_per_batch(self.trainer, self.batch_size))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the validation set."""
        return self._loader("", self.held_out("val", self.num_val, self.min_digits, self.max_digits))

    def test_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """Return the test set, then one set for each of ``test_digits``."""
        if self.test_file is None:
            columns = self.held_out("test", self.num_test, self.min_digits, self.max_digits)
        else:
            problems = _read_test_file(self.test_file, self.operations)
            seen = int(in_split(problems, "train").sum())
            if seen:
                rank_zero_warn(f"{seen} of {len(problems)} rows of {self.test_file} may occur in training.")
            columns = self.encoder.batch(problems, np.arange(len(problems)))
        sets = {"": columns}
        for digits in self.test_digits:
            sets[f"digits_{digits}"] = self.held_out("test", self.num_test, digits, digits)
        return [self._loader(name, columns) for name, columns in sets.items()]

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the prompts of ``predict_file``, padded on the left."""
        prompts = [self.prompt(*problem) for problem in self.predict_problems]
        tokens = self.tokenizer.encode_batch(prompts, left=True)
        columns = {"input_ids": tokens, "attention_mask": tokens != self.tokenizer.pad_id}
        return self._loader("", {**columns, "index": torch.arange(len(prompts))})

    @property
    def end_id(self) -> int:
        """Id of the end mark."""
        return self.tokenizer.id_of(self.encoder.form.end[-1])

    def read_problem(self, text: str, max_positions: int) -> tuple[int, str, int]:
        """Read a problem such as ``12+34`` that a model can be asked.

        Args:
            text: See :func:`~looplm.corpora.problems.parse_problem`.
            max_positions: Tokens that the model takes.

        Returns:
            First operand, operation, second operand.

        Raises:
            ValueError: If it is none, its operation is not among ``operations``, or it does not fit.

        Example:
            >>> ArithmeticDataModule().read_problem(" 12 + 34 =", max_positions=32)
            (12, '+', 34)
        """
        a, op, b = parse_problem(text)
        if op not in self.operations:
            raise ValueError(f"the operation must be one of {list(self.operations)}, got {op!r}.")
        length = sum(map(len, self.encoder.form.write(a, op, b, exact_result(a, op, b))))
        if length > max_positions:
            raise ValueError(f"{length} tokens are more than the {max_positions} the model takes.")
        return a, op, b

    def prompt(self, a: int, op: str, b: int) -> str:
        """Return the text before the answer of a problem.

        Example:
            >>> ArithmeticDataModule().prompt(12, "+", 34)
            '12+34= '
        """
        return self.encoder.form.write(a, op, b, 0)[0]

    def _read_predict_file(self) -> list[tuple[int, str, int]]:
        source, problems = input_name(self.predict_file), []
        for number, line in enumerate(input_lines(self.predict_file), start=1):
            if not line.strip():
                continue
            try:
                problem = self.read_problem(line, self.max_positions)
            except ValueError as error:
                raise InputError(f"{source}, line {number}: {error}") from None
            problems.append(problem)
        if not problems:
            raise InputError(f"{source} holds no problems.")
        return problems

    def _loader(self, name: str, columns: dict[str, Any]) -> DataLoader[dict[str, Any]]:
        extra = {"split": name} if name else {}
        collate = partial(_collate, extra={**extra, "end_id": self.end_id})
        return DataLoader(_Rows(columns), batch_size=self.eval_batch_size, collate_fn=collate)


def _collate(rows: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
    return {**torch.utils.data.default_collate(rows), **extra}


def _num_digits(problems: Problems) -> int:
    return len(str(int(max(problems.a.max(), problems.b.max()))))


def _read_test_file(path: str, operations: tuple[str, ...]) -> Problems:
    rows = []
    for number, line in enumerate(input_lines(path), start=1):
        try:
            row = json.loads(line)
            a, op, b, answer = (row[name] for name in ("a", "op", "b", "answer"))
            if not all(type(value) is int for value in (a, b, answer)) or op not in operations:
                raise ValueError(f"`a`, `b`, `answer` must be integers and `op` one of {list(operations)}")
            if min(a, b) < 0 or max(a, b) >= 10**MAX_DIGITS:
                raise ValueError(f"operands must have 1 to {MAX_DIGITS} digits")
            if answer != exact_result(a, op, b):
                raise ValueError(f"{a}{op}{b} is not {answer}")
        except (ValueError, KeyError, TypeError) as error:
            what = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{path}, line {number}: {what}; got {line[:80]!r}.") from None
        rows.append((a, OPERATIONS.index(op), b))
    if not rows:
        raise InputError(f"{path} has no rows.")
    return Problems(*np.array(rows, dtype=np.int64).T)
