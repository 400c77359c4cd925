"""Bare calculations with decimals and fractions, as word problems about measures hold them: ``How much is 4.25 * 2?``.

Of word problems these are the smaller part and the one with the hardest sums; without a story they cost a third of the
tokens. Splits are those of the word problems: what a test problem computes is in no training calculation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from looplm.corpora.problems import Split
from looplm.corpora.word_problem_draft import Draws, NoDraft, draw_draft
from looplm.corpora.word_problem_scenes import SCENES
from looplm.corpora.word_problems import SPLITS, WordProblem, split_of_graph
from looplm.errors import InputError
from looplm.randomness import fold

__all__ = ["calculations"]

_EQUATION = re.compile(r"(\S+ [-+*/] \S+) = \S+")
_MEASURES = [scene for scene in SCENES if scene.style is not None]
_MOST_REPEATS = 20_000


def calculations(seed: int, split: Split, num_rows: int) -> Iterator[WordProblem]:
    """Yield different calculations with a decimal or a fraction in them; a shorter set begins a longer one.

    Args:
        seed: The stream's seed.
        split: ``train``, ``val`` or ``test``.
        num_rows: How many.

    Yields:
        Problems of one step without a story.

    Raises:
        ValueError: If an argument is out of its range.
        InputError: If there are not as many different ones.

    Example:
        >>> (problem,) = calculations(0, "train", 1)
        >>> problem.question, problem.answer.splitlines()
        ('How much is 13 - 11.5?', ['That is 13 - 11.5 = 1.5.', '#### 1.5'])
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    if num_rows < 0:
        raise ValueError(f"`num_rows` must be >= 0, got {num_rows}.")
    seen: set[str] = set()
    index = 0
    for row in range(num_rows):
        for _ in range(_MOST_REPEATS):
            problem = _draw(seed, split, index)
            index += 1
            if problem is not None and problem.question not in seen:
                break
        else:
            raise InputError(f"there are only about {row} different {split} calculations, got {num_rows} asked for.")
        seen.add(problem.question)
        yield problem


def _draw(seed: int, split: Split, index: int) -> WordProblem | None:
    try:
        draft = draw_draft(Draws(fold(seed, "calculation", index)), 1, _MEASURES)
    except NoDraft:
        return None
    (line,) = draft.lines
    equation = _EQUATION.search(line)
    assert equation is not None, "every line of a solution has one"
    numbers = [*draft.graph.leaves.values(), draft.graph.answer]
    if all(number.denominator == 1 for number in numbers) or split_of_graph(draft.graph) != split:
        return None
    answer = f"That is {equation[0]}.\n#### {draft.final}"
    return WordProblem(f"How much is {equation[1]}?", answer, draft.final, 1, draft.graph)
