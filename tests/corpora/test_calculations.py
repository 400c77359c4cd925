"""Bare calculations: right, with parts of one, and split as the word problems are."""

import itertools
import re
from fractions import Fraction

import pytest

from looplm.corpora.calculations import calculations
from looplm.corpora.word_problems import SPLITS, split_of_graph, word_problems
from looplm.errors import InputError

_FORM = re.compile(r"How much is (?P<a>\S+) (?P<sign>[-+*/]) (?P<b>\S+)\?")
_VALUES = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right_and_has_parts_of_one_in_it(split):
    problems = list(calculations(3, split, 60))
    assert len({problem.question for problem in problems}) == 60
    for problem in problems:
        found = _FORM.fullmatch(problem.question)
        a, b = Fraction(found["a"]), Fraction(found["b"])
        value = _VALUES[found["sign"]](a, b)
        assert Fraction(problem.final) == value
        assert (
            problem.answer
            == f"That is {found['a']} {found['sign']} {found['b']} = {problem.final}.\n#### {problem.final}"
        )
        assert max(a.denominator, b.denominator, value.denominator) > 1
        assert problem.steps == 1


def test_what_a_test_problem_computes_is_in_no_training_calculation():
    trained = {problem.graph.canonical(with_numbers=True) for problem in calculations(0, "train", 1500)}
    asked = [problem.graph for problem in word_problems(1, "test", 400, max_steps=1)]
    assert trained.isdisjoint(graph.canonical(with_numbers=True) for graph in asked)
    assert {split_of_graph(graph) for graph in asked} == {"test"}


def test_a_shorter_set_begins_a_longer_one():
    longer = calculations(5, "train", 40)
    assert [p.row() for p in calculations(5, "train", 20)] == [p.row() for p in itertools.islice(longer, 20)]


def test_more_than_there_are_is_one_line():
    with pytest.raises(InputError, match=r"there are only about \d+ different test calculations, got 99999 asked for"):
        list(calculations(0, "test", 99_999))


@pytest.mark.parametrize(("split", "num_rows", "name"), [("dev", 1, "split"), ("train", -1, "num_rows")])
def test_a_wrong_argument_is_named(split, num_rows, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        next(calculations(0, split, num_rows))
