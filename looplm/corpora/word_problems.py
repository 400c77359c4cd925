"""Grade-school word problems of one to six steps with worked solutions: which exist, how they are drawn and split.

Problem i of a split is a function of (seed, split, i). Splits are disjoint by construction, whatever the seeds:
problems of three steps and more by operation graph, without numbers and names; those of one and two by graph and
numbers. Knows no tokenizer, trainer or model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from looplm.corpora.operation_graphs import OperationGraph
from looplm.corpora.problems import Split
from looplm.corpora.word_problem_draft import DISTRACTORS, Draws, NoDraft, draw_draft
from looplm.errors import InputError
from looplm.randomness import fold

__all__ = ["MAX_STEPS", "SPLITS", "WordProblem", "draw_word_problem", "split_of_graph", "word_problems"]

MAX_STEPS = 6
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_NUM_BUCKETS = 16  # one for test, one for validation, the rest for training
_NUMBERS_COUNT_TO = 2  # so few steps have so few graphs that the numbers must tell problems apart
_MOST_ATTEMPTS = 20_000
_MOST_REPEATS = 2_000


@dataclass(frozen=True)
class WordProblem:
    """A problem and its solution.

    Attributes:
        question: The problem, in sentences.
        answer: The solution: a line a step with ``a + b = c`` in it, then ``#### x``.
        final: x, the answer alone: an integer, a decimal or a fraction.
        steps: How many operations it takes.
        graph: What is computed.

    Example:
        >>> (problem,) = word_problems(0, "train", 1, max_steps=1)
        >>> sorted(problem.row())
        ['answer', 'final', 'question', 'steps']
    """

    question: str
    answer: str
    final: str
    steps: int
    graph: OperationGraph

    def row(self) -> dict[str, str | int]:
        """Return ``question``, ``answer``, ``final`` and ``steps``, as corpora have them."""
        return {"question": self.question, "answer": self.answer, "final": self.final, "steps": self.steps}


def split_of_graph(graph: OperationGraph) -> Split:
    """Return the split to which all problems with this graph belong (for one and two steps: graph and numbers).

    Example:
        >>> (problem,) = word_problems(0, "test", 1, min_steps=3, max_steps=3)
        >>> split_of_graph(problem.graph)
        'test'
    """
    num_steps = len(graph.steps)
    form = graph.canonical(with_numbers=num_steps <= _NUMBERS_COUNT_TO)
    bucket = fold(0, f"split of word problems/{form}") % _NUM_BUCKETS
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


def _check(split: str, min_steps: int, max_steps: int, distractors: float) -> None:
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    if not 1 <= min_steps <= max_steps <= MAX_STEPS:
        raise ValueError(
            f"`min_steps` and `max_steps` must be 1 <= min <= max <= {MAX_STEPS}, got {min_steps} and {max_steps}."
        )
    if not 0 <= distractors <= 1:
        raise ValueError(f"`distractors` must be 0 <= chance <= 1, got {distractors}.")


def draw_word_problem(
    seed: int,
    split: Split,
    index: int,
    *,
    min_steps: int = 1,
    max_steps: int = MAX_STEPS,
    distractors: float = DISTRACTORS,
) -> WordProblem:
    """Draw problem i of a split.

    Args:
        seed: The stream's seed.
        split: ``train``, ``val`` or ``test``.
        index: i; consecutive ones have every number of steps equally often.
        min_steps: Fewest steps.
        max_steps: Most steps.
        distractors: Chance of each of the two sentences at most that the answer does not need.

    Returns:
        The problem; the same for the same arguments, on every machine.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> problem = draw_word_problem(0, "train", 0)
        >>> print(problem.question)
        Jack owns 48 stamps. Later, 9 stamps are added to Jack's stamps. How many stamps are there by then?
        >>> print(problem.answer)
        That is 48 + 9 = 57 stamps.
        #### 57
    """
    _check(split, min_steps, max_steps, distractors)
    num_steps = min_steps + index % (max_steps - min_steps + 1)
    for attempt in range(_MOST_ATTEMPTS):
        try:
            draws = Draws(fold(seed, f"word problem/{split}", num_steps, index, attempt))
            draft = draw_draft(draws, num_steps, distractors)
        except NoDraft:
            continue
        if split_of_graph(draft.graph) == split:
            answer = "\n".join([*draft.lines, f"#### {draft.final}"])
            return WordProblem(draft.question, answer, draft.final, num_steps, draft.graph)
    raise AssertionError(f"no {split} problem of {num_steps} steps in {_MOST_ATTEMPTS} draws")


def word_problems(
    seed: int,
    split: Split,
    num_problems: int,
    *,
    min_steps: int = 1,
    max_steps: int = MAX_STEPS,
    distractors: float = DISTRACTORS,
) -> Iterator[WordProblem]:
    """Yield different problems, every number of steps equally often (up to one); a shorter set begins a longer one.

    Args:
        seed: The stream's seed.
        split: ``train``, ``val`` or ``test``.
        num_problems: How many.
        min_steps: Fewest steps.
        max_steps: Most steps.
        distractors: Chance of each of the two sentences at most that the answer does not need.

    Yields:
        Problems whose questions all differ, in the order of the stream.

    Raises:
        ValueError: If an argument is out of its range.
        InputError: If there are not as many different problems.

    Example:
        >>> [problem.steps for problem in word_problems(0, "train", 4, max_steps=2)]
        [1, 2, 1, 2]
    """
    _check(split, min_steps, max_steps, distractors)
    if num_problems < 0:
        raise ValueError(f"`num_problems` must be >= 0, got {num_problems}.")
    span = max_steps - min_steps + 1
    seen: set[str] = set()
    next_index = list(range(span))
    for row in range(num_problems):
        for _ in range(_MOST_REPEATS):
            index = next_index[row % span]
            next_index[row % span] += span
            problem = draw_word_problem(
                seed, split, index, min_steps=min_steps, max_steps=max_steps, distractors=distractors
            )
            if problem.question not in seen:
                break
        else:
            raise InputError(f"there are only about {row} different {split} problems, got {num_problems} asked for.")
        seen.add(problem.question)
        yield problem
