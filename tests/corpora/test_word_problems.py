"""Problems are right, readable, different, and split as promised; checked without the generator's own arithmetic."""

from __future__ import annotations

import operator
import random
import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.corpora.grading import Grader
from looplm.corpora.operation_graphs import OperationGraph, Step
from looplm.corpora.word_problems import SPLITS, draw_word_problem, split_of_graph, word_problems
from looplm.errors import InputError

LINE = re.compile(r"[A-Z][^=]*?([0-9./]+) ([-+*/]) ([0-9./]+) = ([0-9./]+)( [a-z].*)?\.")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
WORDS = {"twice": 2, "half": 2, "a third": 3, "a quarter": 4, "a fifth": 5}


def numbers_in(question: str) -> Counter[Fraction]:
    """Every number that a question states, in digits or words."""
    found = Counter(Fraction(text) for text in re.findall(r"[0-9]+(?:\.[0-9]+|/[0-9]+)?", question))
    for word, number in WORDS.items():
        found[Fraction(number)] += len(re.findall(rf"\b{word} as many\b", question))
    return found


@given(st.integers(0, 2**40), st.sampled_from(SPLITS), st.integers(0, 2**40))
def test_every_solution_follows_from_the_question_and_is_exact(seed: int, split: str, index: int) -> None:
    problem = draw_word_problem(seed, split, index)
    *lines, last = problem.answer.split("\n")
    assert last == f"#### {problem.final}"
    assert len(lines) == problem.steps
    stated, known, unused = numbers_in(problem.question), Counter[Fraction](), set[Fraction]()
    for line in lines:
        match = LINE.fullmatch(line)
        assert match is not None, line
        left, right, result = Fraction(match[1]), Fraction(match[3]), Fraction(match[4])
        assert OPERATIONS[match[2]](left, right) == result
        for operand in (left, right):
            assert stated[operand] or known[operand], (operand, problem.question)
            unused.discard(operand)
        known[result] += 1
        unused.add(result)
    assert unused == {Fraction(problem.final)}  # no step is idle


def solve(graph: OperationGraph, node: int) -> Fraction:
    if node in graph.leaves:
        return graph.leaves[node]
    step = graph.steps[node]
    return OPERATIONS[step.operation](solve(graph, step.left), solve(graph, step.right))


@pytest.mark.parametrize("split", SPLITS)
def test_the_graph_gives_the_answer_and_every_step_is_needed(split: str) -> None:
    for problem in word_problems(3, split, 120):
        graph = problem.graph
        assert solve(graph, max(graph.steps)) == Fraction(problem.final)
        assert len(graph.steps) == problem.steps == len(graph.needed() & set(graph.steps))
        assert set(graph.leaves) <= graph.needed()
        values = [solve(graph, node) for node in (*graph.leaves, *graph.steps)]
        assert all(0 < value <= 220 for value in values)


def test_questions_are_sentences() -> None:
    for problem in word_problems(5, "train", 600):
        text = problem.question
        *sentences, question, end = re.split(r"(?<=[.?])(?: |$)", text)
        assert end == ""
        assert re.fullmatch(r"How many [^.?{}]+\?", question), text
        assert all(re.fullmatch(r"[A-Z0-9](?:[^.?{} ]|\.(?=[0-9])| (?! ))+\.", sentence) for sentence in sentences), (
            text
        )
        assert " ," not in text
        assert not re.search(r"-[0-9]", text), text
        assert not re.search(r"(?<![0-9./])1 (?:more |fewer )?[a-z]*[^ous ]s\b", text), text  # 1 apples
        # Apples, seats and days come whole.
        measures = ("litres", "kilograms", "kilometres", "hours", "metres", "cups")
        assert any(word in text for word in measures) or not re.search(r"[0-9][./][0-9]", text), text


def test_words_are_few_and_texts_short_enough_for_a_small_model() -> None:
    problems = list(word_problems(6, "train", 1200))
    words = {word.strip(".,?") for problem in problems for word in f"{problem.question} {problem.answer}".split()}
    assert len({word for word in words if word.isalpha()}) < 400
    assert max(len(problem.question) + len(problem.answer) for problem in problems) < 1500
    assert {Fraction(problem.final).denominator for problem in problems} > {1, 2}


def test_problem_is_a_function_of_seed_split_and_index() -> None:
    alone = draw_word_problem(1, "train", 57)
    assert alone == draw_word_problem(1, "train", 57)
    others = [draw_word_problem(2, "train", 57), draw_word_problem(1, "val", 57), draw_word_problem(1, "train", 63)]
    assert all(other.question != alone.question for other in others)


def test_corpus_has_no_question_twice_and_every_number_of_steps_equally_often() -> None:
    problems = list(word_problems(0, "train", 1500))
    assert len({problem.question for problem in problems}) == 1500
    assert Counter(problem.steps for problem in problems) == dict.fromkeys(range(1, 7), 250)
    assert problems[:100] == list(word_problems(0, "train", 100))


def test_splits_share_no_graph_and_short_problems_no_graph_with_its_numbers() -> None:
    forms = {
        split: {p.graph.canonical(with_numbers=p.steps < 3) for p in word_problems(11, split, 240)} for split in SPLITS
    }
    assert not forms["train"] & forms["test"]
    assert not forms["train"] & forms["val"]
    assert not forms["val"] & forms["test"]
    assert all(len(forms[split]) > 80 for split in SPLITS)


def test_another_seed_draws_the_same_splits() -> None:
    assert all(split_of_graph(p.graph) == split for split in SPLITS for p in word_problems(99, split, 30))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_canonical_form_knows_neither_order_nor_names(seed: int, index: int, rng: random.Random) -> None:
    graph = draw_word_problem(seed, "train", index).graph
    nodes = sorted(graph.leaves) + sorted(graph.steps)
    leaves = sorted(graph.leaves, key=lambda node: rng.random())
    new = {node: place for place, node in enumerate([*leaves, *sorted(graph.steps)])}
    steps = {}
    for node, step in graph.steps.items():
        pair = [new[step.left], new[step.right]]
        if step.operation in "+*" and rng.random() < 0.5:
            pair.reverse()
        steps[new[node]] = Step(step.operation, *pair)
    twin = OperationGraph({new[node]: graph.leaves[node] for node in leaves}, steps)
    assert len(nodes) == len(new)
    assert twin.canonical() == graph.canonical()
    assert twin.canonical(with_numbers=True) == graph.canonical(with_numbers=True)


def test_canonical_form_tells_a_number_used_twice_from_two_numbers() -> None:
    leaves = {node: Fraction(2) for node in range(4)}
    shared = OperationGraph(leaves, {4: Step("+", 0, 1), 5: Step("+", 2, 0), 6: Step("+", 4, 5)})
    apart = OperationGraph(leaves, {4: Step("+", 0, 1), 5: Step("+", 2, 3), 6: Step("+", 4, 5)})
    other = OperationGraph(leaves, {4: Step("+", 0, 1), 5: Step("-", 2, 3), 6: Step("+", 4, 5)})
    assert len({shared.canonical(), apart.canonical(), other.canonical()}) == 3


def test_grading_agrees_with_every_solution_and_with_no_other() -> None:
    problems = list(word_problems(8, "test", 120))
    with Grader() as grader:
        for problem, other in pairwise(problems):
            assert grader.grade(problem.answer, problem.final).is_right
            assert grader.grade(problem.answer, other.final).is_right == (problem.final == other.final)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "`split` must be one of train, val, test, got 'dev'"),
        ({"min_steps": 0}, "`min_steps` and `max_steps` must be 1 <= min <= max <= 6, got 0 and 6"),
        ({"min_steps": 4, "max_steps": 3}, "got 4 and 3"),
        ({"max_steps": 7}, "got 1 and 7"),
    ],
)
def test_argument_out_of_range_is_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_word_problem(0, arguments.pop("split", "train"), 0, **arguments)


def test_more_problems_than_there_are_is_an_error_of_the_users() -> None:
    assert issubclass(InputError, ValueError)
    with pytest.raises(ValueError, match="`num_problems` must be >= 0, got -1"):
        list(word_problems(0, "train", -1))


def test_distractors_add_sentences_and_leave_the_default_problems_as_they_are() -> None:
    def sentences(**options: float) -> int:
        return sum(problem.question.count(".") for problem in word_problems(0, "train", 100, max_steps=1, **options))

    assert sentences(distractors=0) < sentences() < sentences(distractors=1)
    assert [*word_problems(0, "val", 5)] == [*word_problems(0, "val", 5, distractors=0.25)]
    with pytest.raises(ValueError, match=r"`distractors` must be 0 <= chance <= 1, got 1\.5"):
        next(word_problems(0, "train", 1, distractors=1.5))
