"""Arithmetic problems: drawn by index, split by a hash of themselves, written as text."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.corpora.problems import (
    MAX_DIGITS,
    OPERATIONS,
    Problems,
    Split,
    TextForm,
    draw_problems,
    in_split,
    parse_problem,
    split_of,
)

SPLITS: tuple[Split, ...] = get_args(Split)
operands = st.integers(0, 10**MAX_DIGITS - 1)
python_answer = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def _one(a: int, operation: str, b: int) -> Problems:
    columns = ([a], [OPERATIONS.index(operation)], [b])
    return Problems(*(np.array(column, dtype=np.int64) for column in columns))


def _rows(problems: Problems) -> list[tuple[int, int, int]]:
    return list(zip(problems.a.tolist(), problems.operation.tolist(), problems.b.tolist(), strict=True))


def _draw(seed: int, indices: np.ndarray, split: Split = "train", min_digits: int = 1, max_digits: int = 4) -> Problems:
    return draw_problems(
        seed, indices, operations=OPERATIONS, min_digits=min_digits, max_digits=max_digits, split=split
    )


@settings(deadline=None, max_examples=50)
@given(operands, st.sampled_from(OPERATIONS), operands)
def test_answers_are_those_of_python_integers(a: int, operation: str, b: int) -> None:
    assert _one(a, operation, b).answers.tolist() == [python_answer[operation](a, b)]


def test_largest_product_does_not_overflow() -> None:
    largest = 10**MAX_DIGITS - 1
    assert _one(largest, "*", largest).answers.tolist() == [largest**2]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**40), st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.sampled_from(SPLITS))
def test_problem_is_a_function_of_seed_and_index_alone(seed: int, indices: list[int], split: Split) -> None:
    together = _rows(_draw(seed, np.array(indices), split))
    alone = [_rows(_draw(seed, np.array([index]), split))[0] for index in indices]
    assert together == alone


def test_other_seeds_draw_other_problems() -> None:
    indices = np.arange(100)
    assert _rows(_draw(0, indices)) != _rows(_draw(1, indices))


@settings(deadline=None, max_examples=50)
@given(operands, st.sampled_from(OPERATIONS), operands)
def test_commuted_problems_share_a_split_and_only_those_that_commute(a: int, operation: str, b: int) -> None:
    # Otherwise a held-out sum would be seen in training as its mirror image.
    same = split_of(_one(a, operation, b)) == split_of(_one(b, operation, a))
    assert bool(same.all()) or operation == "-"


def test_subtraction_is_split_by_order() -> None:
    a, b = np.arange(200), np.arange(1000, 1200)
    minus = np.full(200, OPERATIONS.index("-"))
    assert (split_of(Problems(a, minus, b)) != split_of(Problems(b, minus, a))).any()


@pytest.mark.parametrize("split", SPLITS)
def test_drawn_problems_belong_to_their_split_and_to_no_other(split: Split) -> None:
    drawn = _draw(3, np.arange(300), split)
    assert {other: bool(in_split(drawn, other).any()) for other in SPLITS} == {
        other: other == split for other in SPLITS
    }


def test_every_problem_belongs_to_exactly_one_split_and_most_to_training() -> None:
    a, b = (column.ravel() for column in np.meshgrid(np.arange(100), np.arange(100)))
    problems = Problems(a, np.zeros_like(a), b)
    shares = np.stack([in_split(problems, split) for split in SPLITS])
    assert (shares.sum(0) == 1).all()
    assert shares.mean(1) == pytest.approx([14 / 16, 1 / 16, 1 / 16], abs=0.02)


@pytest.mark.parametrize(("min_digits", "max_digits"), [(1, 1), (2, 2), (1, 4), (9, 9)])
def test_operands_have_the_asked_number_of_digits_and_both_the_same(min_digits: int, max_digits: int) -> None:
    drawn = _draw(0, np.arange(2000), min_digits=min_digits, max_digits=max_digits)
    digits = [(len(str(a)), len(str(b))) for a, _, b in _rows(drawn)]
    assert all(first == second for first, second in digits)
    seen, counts = np.unique([first for first, _ in digits], return_counts=True)
    assert seen.tolist() == list(range(min_digits, max_digits + 1))
    assert counts / 2000 == pytest.approx(np.full(len(seen), 1 / len(seen)), abs=0.05)


def test_operations_are_equally_frequent() -> None:
    operation = _draw(0, np.arange(3000)).operation
    assert np.bincount(operation) / 3000 == pytest.approx(np.full(3, 1 / 3), abs=0.05)


@settings(deadline=None, max_examples=50)
@given(
    operands,
    st.sampled_from([*OPERATIONS, "−", "×"]),
    operands,
    st.sampled_from(["{}{}{}", " {} {} {} = ", "{}{}{}=\n"]),
)
def test_parsing_inverts_writing(a: int, operation: str, b: int, form: str) -> None:
    ascii_operation = {"−": "-", "×": "*"}.get(operation, operation)
    assert parse_problem(form.format(a, operation, b)) == (a, ascii_operation, b)


@pytest.mark.parametrize("text", ["", "12", "12+", "+3", "1+2+3", "1/2", "1+-2", "1.5+2", "1+2=3", "one+two", "1 2+3"])
def test_what_is_no_problem_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a problem such as 12\+34, got") as caught:
        parse_problem(text)
    assert repr(text) in str(caught.value)


def test_text_form_is_the_papers() -> None:
    prompt, target = TextForm().write(1234, "+", 5678, 6912)
    assert prompt + target == "1234+5678= 2196§"


@pytest.mark.parametrize(
    ("reverse_operands", "reverse_answer", "text"),
    [
        (False, False, "120-345= -225§"),
        (True, False, "021-543= -225§"),
        (False, True, "120-345= 522-§"),
        (True, True, "021-543= 522-§"),
    ],
)
def test_digits_are_reversed_as_asked(reverse_operands: bool, reverse_answer: bool, text: str) -> None:
    form = TextForm(reverse_operands=reverse_operands, reverse_answer=reverse_answer)
    assert "".join(form.write(120, "-", 345, -225)) == text


@settings(deadline=None, max_examples=50)
@given(operands, st.sampled_from(OPERATIONS), operands, st.booleans(), st.booleans())
def test_answer_is_read_as_it_was_written(a: int, operation: str, b: int, operand_order: bool, order: bool) -> None:
    form = TextForm("Q {a} {op} {b} A {answer} E", operand_order, order)
    answer = python_answer[operation](a, b)
    _, target = form.write(a, operation, b, answer)
    assert form.read_answer(target + "garbage") == str(answer)


def test_escaped_braces_are_text() -> None:
    assert TextForm("{{{a}{op}{b}: {answer}}}").write(1, "+", 2, 3) == ("{1+2: ", "3}")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.data())
def test_no_text_is_longer_than_the_longest(num_digits: int, data: st.DataObject) -> None:
    form = TextForm()
    number = st.integers(0, 10**num_digits - 1)
    a, b, operation = data.draw(number), data.draw(number), data.draw(st.sampled_from(OPERATIONS))
    text = "".join(form.write(a, operation, b, python_answer[operation](a, b)))
    assert len(text) <= form.longest((operation,), num_digits)


def test_alphabet_holds_every_character_of_the_text_once() -> None:
    form = TextForm("say {a} {op} {b} ~> {answer}.")
    text = "".join(form.write(1, "*", 2, 2))
    assert set(text) <= set(form.alphabet)
    assert len(set(form.alphabet)) == len(form.alphabet)


@pytest.mark.parametrize(
    "template",
    [
        "{a}{op}{b}={answer}",  # nothing ends the answer
        "{a}{op}={answer}§",  # no second operand
        "{a}{op}{b}={answer}{answer}§",
        "{answer}={a}{op}{b}§",  # the answer stands first
        "{a}{op}{b}{c}={answer}§",
        "{a}{op}{b}= {answer",  # no format string
        "{a}{op}{b}=0{answer}§",  # a digit in the text would be read as the answer's
        "{a}{op}{b}-> {answer}§",
        "{a}{op}{b}§ {answer}§",  # the end mark stands in the prompt
        "{a}{op}{b}= {answer}..",  # generation stops at the first, so the answer would keep a mark
        "{a!r}{op}{b}= {answer}§",  # quotes are not in the alphabet
        "{a:>5}{op}{b}= {answer}§",
        "{a}{op}{b}= {answer:>5}§",
    ],
)
def test_unusable_template_is_refused_and_shown(template: str) -> None:
    with pytest.raises(ValueError, match="`template`") as caught:
        TextForm(template)
    assert repr(template) in str(caught.value)
