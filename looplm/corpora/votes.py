"""What several samples of one problem are worth: the majority's answer, and pass@k.

Knows answers as texts and a grader that says which are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from looplm.corpora.exact_numbers import ExactNumber, read_number, same_number
from looplm.corpora.extraction import extract_answer
from looplm.corpora.grading import Grader
from looplm.corpora.latex import canonical

__all__ = ["Vote", "majority_vote", "pass_at_k"]


@dataclass(frozen=True)
class Vote:
    """The answer that most samples gave.

    Attributes:
        answer: The answer, as the first sample that gave it wrote it.
        num_votes: Samples that gave it, or one equal to it.
        num_answers: Samples in which an answer was found.

    Example:
        >>> Vote("42", num_votes=3, num_answers=4).num_votes
        3
    """

    answer: str
    num_votes: int
    num_answers: int


@dataclass
class _Ballot:
    answer: str
    spellings: set[str] = field(default_factory=set)
    number: ExactNumber | None = None
    is_comparable: bool = True  # False: it wanted more than its bounds, only its very text is equal to it
    num_votes: int = 1


def majority_vote(texts: Sequence[str], grader: Grader) -> Vote | None:
    r"""Return the answer that most samples gave (self-consistency, Wang et al. 2023, arXiv 2203.11171).

    Equal answers count together however they are written; samples without an answer do not vote; of two answers with
    as many votes the one given first wins.

    Args:
        texts: What the model wrote, one text a sample.
        grader: Says which answers are equal.

    Returns:
        The winner, to be graded by ``grader.compare(vote.answer, gold)``; None where no sample holds an answer.

    Raises:
        InputError: If LaTeX must be compared and math-verify is not installed.

    Example:
        >>> with Grader() as grader:
        ...     majority_vote(["#### 1/2", "so 3", r"\boxed{0.5}"], grader)
        Vote(answer='1/2', num_votes=2, num_answers=3)
    """
    found = [extraction.text for extraction in map(extract_answer, texts) if extraction is not None]
    ballots: list[_Ballot] = []
    for answer in found:
        _cast(answer, ballots, grader)
    if not ballots:
        return None
    winner = max(ballots, key=lambda ballot: ballot.num_votes)  # the first of the greatest
    return Vote(winner.answer, winner.num_votes, len(found))


def _cast(answer: str, ballots: list[_Ballot], grader: Grader) -> None:
    spelling, number = canonical(answer), read_number(answer)
    own = _Ballot(answer, {spelling}, number)
    same = next((ballot for ballot in ballots if spelling in ballot.spellings), None)
    for ballot in ballots if same is None else ():
        if number is not None and ballot.number is not None:
            is_equal = same_number(number, ballot.number)
        elif not ballot.is_comparable:
            continue
        else:
            verdict, means = grader.compare(answer, ballot.answer)
            is_equal = verdict == "right"
            if means == "limit":
                own.is_comparable = False  # no more time for it
                break
        if is_equal:
            same = ballot
            break
    if same is None:
        ballots.append(own)
    else:
        same.num_votes += 1
        same.spellings.add(spelling)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the chance that at least one of k samples is right, estimated without bias from n ≥ k samples.

    ``1 − C(n − c, k) / C(n, k)`` for c right ones (Chen et al. 2021, arXiv 2107.03374, equation 1); ``1 − (1 − c/n)^k``
    would be too low.

    Args:
        num_samples: n, the samples of the problem.
        num_right: c, those that are right.
        k: How many tries count as one.

    Raises:
        ValueError: Unless 0 ≤ ``num_right`` ≤ ``num_samples`` and 1 ≤ ``k`` ≤ ``num_samples``.

    Example:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
        (0.25, 0.5, 1.0)
    """
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"`num_right` must be >= 0 and <= `num_samples` ({num_samples}), got {num_right}.")
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` must be >= 1 and <= `num_samples` ({num_samples}), got {k}.")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
