"""Votes of equal answers count together; pass@k has no bias."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.corpora.grading import Grader
from looplm.corpora.votes import Vote, majority_vote, pass_at_k


def test_equal_answers_count_together_and_silence_does_not_vote() -> None:
    texts = ["#### 3", "I do not know.", r"\boxed{2k}", "#### 3.0", r"\boxed{k + k}", "The answer is $3.00"]
    with Grader() as grader:
        assert majority_vote(texts, grader) == Vote("3", 3, 5)
        assert majority_vote([*texts, r"\boxed{3k-k}", r"\boxed{2 k}"], grader) == Vote("2k", 4, 7)


def test_of_equal_votes_the_first_answer_wins() -> None:
    with Grader() as grader:
        assert majority_vote(["so 4", "so 3", "so 3", "so 4"], grader) == Vote("4", 2, 4)
        assert majority_vote(["so 3", "so 4", "so 4", "so 3"], grader) == Vote("3", 2, 4)


def _nested(levels: int, core: str) -> str:
    return r"\boxed{" + "(1," * levels + core + ")" * levels + "}"


def test_answers_nested_without_bound_are_voted_on() -> None:
    with Grader() as grader:
        assert majority_vote([_nested(400, "2"), _nested(400, "3"), _nested(400, "3")], grader).num_votes == 2
        assert majority_vote([_nested(8, "2"), _nested(8, "2.0")], grader).num_votes == 2
        assert majority_vote([_nested(9, "2"), _nested(9, "2.0")], grader).num_votes == 1


def test_no_answer_no_vote() -> None:
    with Grader() as grader:
        assert majority_vote(["none", ""], grader) is None
        assert majority_vote([], grader) is None


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(case: tuple[int, int, int]) -> None:
    n, right, k = case
    draws = list(combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("n", "right", "k", "name"), [(4, 5, 1, "num_right"), (4, -1, 1, "num_right"), (4, 1, 5, "k")])
def test_counts_that_cannot_be_are_refused_by_name(n: int, right: int, k: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        pass_at_k(n, right, k)
