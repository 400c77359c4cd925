"""Grading against whole published corpora: 500 rows of each here, all of them with ``-m slow``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from looplm.corpora.grading import Grader

CORPORA = Path(__file__).parents[3] / "shared" / "corpora"
if not CORPORA.is_dir():
    pytest.skip("the corpora are not here", allow_module_level=True)

SIZES = [pytest.param(500, id="500"), pytest.param(None, id="all", marks=pytest.mark.slow)]
EQUAL = {("5", "x=5")}  # neighbours in MATH-500 that are spelt differently and the same answer
PHRASINGS = [
    "{}",
    "#### {}",
    "The answer is {}.",
    "So the final answer is: **{}**",
    "Answer: ${}.00",
    "12 more than before, so the answer is {} because 2 + 2 = 4.",
    "Therefore, the final answer is $\\boxed{{{}}}$. I hope it is correct.",
    "\\[ \\boxed{{{} \\text{{ apples}}}} \\]",
    "After 3 days they have {} apples left.",
    "The correct answer is \\({}\\).",
    "9 - 2 = 7\nThe result is x = {}",
    "The answer to the question is {} dollars a day, which is 5 less than 100.\n\nQuestion: What is 1 + 1?\nAnswer: 2",
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


def rows_of(name: str, size: int | None) -> list[dict[str, str]]:
    with (CORPORA / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file][:size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "math500_test"])
def test_every_reference_solution_is_right(name: str, size: int | None, grader: Grader) -> None:
    rows = rows_of(name, size)
    assert [row["final"] for row in rows if not grader.grade(row["answer"], row["final"]).is_right] == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "svamp_test", "math500_test"])
def test_answers_of_the_next_row_are_wrong(name: str, size: int | None, grader: Grader) -> None:
    rows = rows_of(name, size)
    pairs = [(a["final"], b["final"]) for a, b in pairwise(rows) if a["final"] != b["final"]]
    pairs = [pair for pair in pairs if pair not in EQUAL]
    judged = [(pair, grader.grade(f"\\boxed{{{pair[0]}}}", pair[1]).verdict) for pair in pairs]
    other = [case for case in judged if case[1] != "wrong"]
    assert len(other) <= len(pairs) / 1000, other


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("phrasing", PHRASINGS)
def test_plain_finals_are_right_in_any_phrasing(phrasing: str, size: int | None, grader: Grader) -> None:
    finals = [row["final"] for row in rows_of("svamp_test", size)]
    assert [final for final in finals if not grader.grade(phrasing.format(final), final).is_right] == []


def test_two_thousand_answers_are_graded_in_a_second(grader: Grader) -> None:
    rows = rows_of("gsm8k_train", 2000)
    start = time.process_time()
    for row in rows:
        grader.grade(row["answer"], row["final"])
    assert len(rows) / (time.process_time() - start) >= 2000
