r"""Grading: is the final answer in a text equal to the true one?

Numbers are compared exactly, as fractions, words as texts; only what neither can decide goes to SymPy, in a process
with bounds on time and memory. Knows no model and no corpus.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Literal

from looplm.corpora.exact_numbers import read_number, same_number
from looplm.corpora.extraction import Rule, extract_answer
from looplm.corpora.latex import Parts, based_number, canonical, split_parts, to_latex, words_of
from looplm.corpora.symbolic import SymbolicComparer

__all__ = ["Grade", "Grader", "Verdict", "grade"]

Verdict = Literal["right", "wrong", "unparsable"]
Means = Literal["number", "text", "latex", "limit"]

_NUMBER: Means = "number"
_LONGEST = 2_000  # a longer final answer is none
_MOST_PARTS = 16
_MOST_LEVELS = 8  # of tuples in tuples; what is nested deeper is equal to its very text alone
_NEVER_PARTS = ("\\pm", "\\mp", "\\cup", "\\in", "\\begin", "<", ">", "\\le", "\\ge")


@dataclass(frozen=True)
class Grade:
    """What grading an answer found.

    Attributes:
        verdict: ``right``, ``wrong`` or ``unparsable``: no answer was found, or nothing could read it.
        rule: What the answer was found by: ``hashes``, ``boxed``, ``phrase``, ``last_number``; None: nothing was found.
        answer: The answer as written; empty if none was found.
        means: What decided: ``number``, ``text``, ``latex`` (SymPy), ``limit`` (it wanted more than its bounds); None:
            nothing was found.

    Example:
        >>> grade("The answer is 1/2.", "0.5").is_right
        True
    """

    verdict: Verdict
    rule: Rule | None = None
    answer: str = ""
    means: Means | None = None

    @property
    def is_right(self) -> bool:
        """Whether the answer is right."""
        return self.verdict == "right"


class Grader:
    """Grades answers, with bounds on what each may take.

    Nothing is started before an answer needs it; :meth:`close`, or leaving a ``with`` block, ends what was.

    Args:
        cpu_seconds: Processor time of a comparison by SymPy, in whole seconds.
        memory_mb: Address space of a comparison by SymPy, in MiB.

    Raises:
        ValueError: If a limit is out of its range.

    Example:
        >>> with Grader() as grader:
        ...     grader.grade("18 / 2 = 9 dollars. The answer is $9.00.", "9")
        Grade(verdict='right', rule='phrase', answer='$9.00', means='number')
    """

    def __init__(self, cpu_seconds: int = 3, memory_mb: int = 1024) -> None:
        self._comparer = SymbolicComparer(cpu_seconds, memory_mb)
        self._known: dict[tuple[str, str], tuple[Verdict, Means]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._comparer.cpu_seconds, self._comparer.memory_mb)

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process of SymPy, if there is one."""
        self._comparer.close()

    def grade(self, text: str, gold: str) -> Grade:
        r"""Find the final answer in a text and grade it.

        Args:
            text: What a model wrote.
            gold: The true final answer alone, for example ``72`` or ``\frac{3}{4}``.

        Returns:
            The grade.

        Raises:
            ValueError: If ``gold`` is empty.
            InputError: If LaTeX must be compared and math-verify is not installed.
        """
        if not gold.strip():
            raise ValueError("`gold` must be the final answer, got an empty text.")
        found = extract_answer(text)
        if found is None:
            return Grade("unparsable")
        verdict, means = self.compare(found.text, gold)
        return Grade(verdict, found.rule, found.text, means)

    def compare(self, answer: str, gold: str) -> tuple[Verdict, Means]:
        """Compare a final answer with the true one; see :meth:`grade`.

        Args:
            answer: A final answer alone.
            gold: The true one.

        Returns:
            The verdict and what decided it.
        """
        return self._compare(answer, gold, _MOST_LEVELS)

    def _compare(self, answer: str, gold: str, levels: int) -> tuple[Verdict, Means]:
        a, b = read_number(gold), read_number(answer)
        if a is not None and b is None and "=" in answer[:_LONGEST]:
            b = read_number(answer.rpartition("=")[2])  # x = 5; 2 + 3 = 5
        elif b is not None and a is None and gold.count("=") == 1:
            variable, _, value = gold.partition("=")
            a = read_number(value) if variable.strip().isalpha() else None
        if a is not None and b is not None:
            return "right" if same_number(a, b) else "wrong", "number"
        if canonical(answer[:_LONGEST]) == canonical(gold) and len(answer) <= _LONGEST:
            return "right", "text"
        if len(answer) > _LONGEST:
            return "unparsable", "limit"
        return self._compare_texts(answer, gold, levels)

    def _compare_texts(self, answer: str, gold: str, levels: int) -> tuple[Verdict, Means]:
        # A number is not its digits in another base, and words are no products of variables, as SymPy would have it.
        if based_number(gold) or based_number(answer):
            return "right" if based_number(gold) == based_number(answer) else "wrong", "text"
        choice = canonical(gold).strip("()")
        if len(choice) == 1 and choice.isupper():
            return "right" if canonical(answer).strip("()") == choice else "wrong", "text"
        words = words_of(gold)
        if words is not None:
            said = canonical(answer).lower()
            return "right" if said.removeprefix("the ").removeprefix("an ") == words else "wrong", "text"
        parts = split_parts(gold), split_parts(answer)
        if all(len(part.items) > 1 for part in parts) and not any(sign in answer + gold for sign in _NEVER_PARTS):
            return self._compare_parts(parts[1], parts[0], levels)
        return self._compare_latex(answer, gold)

    def _compare_parts(self, answer: Parts, gold: Parts, levels: int) -> tuple[Verdict, Means]:
        if levels == 0:
            return "wrong", "text"
        kinds = [(part.opening, part.closing) if part.is_ordered else ("{", "}") for part in (answer, gold)]
        if kinds[0] != kinds[1] or len(answer.items) != len(gold.items) or len(gold.items) > _MOST_PARTS:
            return "wrong", "text"
        left, means = list(answer.items), _NUMBER
        for true in gold.items:
            # In order there is one candidate; in a set any that is left.
            for place in [0] if gold.is_ordered else range(len(left)):
                verdict, how = self._compare(left[place], true, levels - 1)
                means = how if how != _NUMBER else means
                if verdict == "unparsable":
                    return verdict, how
                if verdict == "right":
                    del left[place]
                    break
            else:
                return "wrong", means
        return "right", means

    def _compare_latex(self, answer: str, gold: str) -> tuple[Verdict, Means]:
        key = (to_latex(gold), to_latex(answer))
        if key not in self._known:
            verdicts: dict[str, tuple[Verdict, Means]] = {
                "equal": ("right", "latex"),
                "different": ("wrong", "latex"),
                "unreadable": ("unparsable", "latex"),
                "limit": ("unparsable", "limit"),
            }
            if len(self._known) >= 10_000:
                self._known.clear()
            self._known[key] = verdicts[self._comparer.compare(*key)]
        return self._known[key]


@cache
def _shared_grader() -> Grader:
    return Grader()


def grade(text: str, gold: str) -> Grade:
    r"""Find the final answer in a text and grade it; see :class:`Grader`, which has the bounds as options.

    Args:
        text: What a model wrote.
        gold: The true final answer alone.

    Returns:
        Verdict, the rule that found the answer, the answer, and what decided.

    Raises:
        ValueError: If ``gold`` is empty.
        InputError: If LaTeX must be compared and math-verify is not installed.

    Example:
        >>> grade("48 / 2 = 24\n#### 24", "24").verdict
        'right'
        >>> grade(r"Thus \boxed{\frac{3}{4}}", "0.75").verdict
        'right'
        >>> grade("I do not know.", "24").verdict
        'unparsable'
    """
    return _shared_grader().grade(text, gold)
