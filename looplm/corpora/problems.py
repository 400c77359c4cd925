"""Arithmetic problems: which exist, how they are drawn by index, how they are split, how they are written.

Knows nothing of tensors' use, batches of a trainer or models.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Literal

import numpy as np

from looplm.randomness import fold, hash_uint64

__all__ = ["OPERATIONS", "Problems", "Split", "TextForm", "draw_problems", "exact_result", "parse_problem", "split_of"]

OPERATIONS = ("+", "-", "*")
MAX_DIGITS = 9
Split = Literal["train", "val", "test"]
_NUM_BUCKETS = 16  # one for test, one for validation, the rest for training
_PROBLEM = re.compile(r"\s*(\d+)\s*([+\-*−×])\s*(\d+)\s*(?:=\s*)?")
_ASCII_OPERATIONS = {"−": "-", "×": "*"}


@dataclass(frozen=True)
class Problems:
    """N problems as columns.

    Attributes:
        a: First operands, int64 ``(N,)``.
        operation: Indices into :data:`OPERATIONS`, int64 ``(N,)``.
        b: Second operands, int64 ``(N,)``.

    Example:
        >>> Problems(np.array([12]), np.array([0]), np.array([34])).answers.tolist()  # operation 0 is addition
        [46]
    """

    a: np.ndarray
    operation: np.ndarray
    b: np.ndarray

    def __len__(self) -> int:
        return len(self.a)

    def take(self, rows: np.ndarray) -> Problems:
        """Return the chosen rows."""
        return Problems(self.a[rows], self.operation[rows], self.b[rows])

    @property
    def answers(self) -> np.ndarray:
        """The exact results, int64 ``(N,)``."""
        return np.choose(self.operation, [self.a + self.b, self.a - self.b, self.a * self.b])


def split_of(problems: Problems) -> np.ndarray:
    """Return each problem's bucket: 0 = test, 1 = validation, 2 and more = training; int64 ``(N,)``.

    The bucket is a hash of the problem alone, so the splits are disjoint whatever the seed; ``a+b`` and ``b+a`` (and
    ``a×b``, ``b×a``) share one.

    Example:
        >>> problems = Problems(np.array([12, 13]), np.array([0, 0]), np.array([34, 34]))
        >>> split_of(problems).shape
        (2,)
    """
    ordered = problems.operation == OPERATIONS.index("-")
    first = np.where(ordered, problems.a, np.minimum(problems.a, problems.b))
    second = np.where(ordered, problems.b, np.maximum(problems.a, problems.b))
    inner = hash_uint64(fold(0, "split"), first * len(OPERATIONS) + problems.operation)
    hashes = hash_uint64(fold(0, "split"), second) ^ hash_uint64(1, inner)
    buckets: np.ndarray = (hashes % np.uint64(_NUM_BUCKETS)).astype(np.int64)
    return buckets


def in_split(problems: Problems, split: Split) -> np.ndarray:
    """Return which problems belong to a split, bool ``(N,)``."""
    bucket = split_of(problems)
    return bucket >= 2 if split == "train" else bucket == ("test", "val").index(split)


def _draw_operand(key: int, indices: np.ndarray, num_digits: np.ndarray) -> np.ndarray:
    least = np.where(num_digits == 1, 0, 10 ** (num_digits - 1))
    size = (10**num_digits - least).astype(np.uint64)
    return least + (hash_uint64(key, indices) % size).astype(np.int64)


def _with_nines(key: int, indices: np.ndarray, drawn: Problems, num_digits: np.ndarray, chance: float) -> np.ndarray:
    """Return second operands of which some digits make nine with those above them; no operand begins with a 0."""
    b = np.zeros_like(drawn.b)
    for place in range(int(num_digits.max())):
        power = 10**place
        above, own = drawn.a // power % 10, drawn.b // power % 10
        picked = (hash_uint64(fold(key, "place", place), indices) >> np.uint64(11)) * 2.0**-53 < chance
        allowed = (above < 9) | (place < num_digits - 1) | (num_digits == 1)
        changed = picked & allowed & (drawn.operation == OPERATIONS.index("+"))
        b += np.where(changed, 9 - above, own) * power * (place < num_digits)
    return b


def draw_problems(
    seed: int,
    indices: np.ndarray,
    *,
    operations: tuple[str, ...],
    min_digits: int,
    max_digits: int,
    split: Split,
    nines: float = 0.0,
) -> Problems:
    """Draw problem i of a stream: a pure function of ``(seed, i)`` and the arguments.

    The number of digits is uniform in the range and the same for both operands; operands have no leading zeros.
    Candidates outside ``split`` are drawn again.

    Args:
        seed: The stream's seed.
        indices: Which problems, int64 ``(N,)``.
        operations: Some of :data:`OPERATIONS`, equally often.
        min_digits: Fewest digits of an operand.
        max_digits: Most digits of an operand.
        split: Which split the problems must belong to.
        nines: Chance of each column of a sum, beside one in ten, to be made up to nine: there a carry runs through.

    Returns:
        N problems.

    Example:
        >>> drawn = draw_problems(0, np.arange(4), operations=("+",), min_digits=2, max_digits=2, split="train")
        >>> bool((split_of(drawn) >= 2).all())
        True
    """
    codes = np.array([OPERATIONS.index(operation) for operation in operations])
    a, operation, b = (np.zeros(len(indices), dtype=np.int64) for _ in range(3))
    missing = np.arange(len(indices))
    for attempt in range(10_000):
        keys = [fold(seed, f"problem/{part}", attempt) for part in ("digits", "operation", "a", "b")]
        index = indices[missing]
        span = np.uint64(max_digits - min_digits + 1)
        num_digits = min_digits + (hash_uint64(keys[0], index) % span).astype(np.int64)
        operation[missing] = codes[hash_uint64(keys[1], index) % np.uint64(len(codes))]
        a[missing] = _draw_operand(keys[2], index, num_digits)
        b[missing] = _draw_operand(keys[3], index, num_digits)
        if nines:
            new = Problems(a, operation, b).take(missing)
            b[missing] = _with_nines(fold(seed, "problem/nines", attempt), index, new, num_digits, nines)
        drawn = Problems(a, operation, b)
        missing = missing[~in_split(drawn.take(missing), split)]
        if not len(missing):
            return drawn
    raise ValueError(f"no {split} problems with {min_digits} to {max_digits} digits and operations {operations}.")


def parse_problem(text: str) -> tuple[int, str, int]:
    """Read a problem such as ``12+34``, spaces and a final ``=`` allowed.

    Returns:
        First operand, operation (one of :data:`OPERATIONS`), second operand.

    Raises:
        ValueError: If the text is none.

    Example:
        >>> parse_problem(" 12 + 34 = ")
        (12, '+', 34)
    """
    match = _PROBLEM.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a problem such as 12+34, got {text.strip()!r}.")
    a, operation, b = match.groups()
    return int(a), _ASCII_OPERATIONS.get(operation, operation), int(b)


def exact_result(a: int, operation: str, b: int) -> int:
    """Return the result of a problem.

    Example:
        >>> exact_result(12, "-", 34)
        -22
    """
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


class TextForm:
    """How a problem is written: prompt, then answer and end mark.

    Args:
        template: Python format string with each of ``{a}``, ``{op}``, ``{b}``, ``{answer}`` once, the answer last,
            followed by an end mark. What stands before ``{answer}`` is the prompt.
        reverse_operands: Whether operands are written least significant digit first.
        reverse_answer: Whether the answer is written least significant digit first (the paper's way).

    Raises:
        ValueError: If the template is none of the above.

    Example:
        >>> TextForm().write(1234, "+", 5678, 6912)
        ('1234+5678= ', '2196§')
    """

    def __init__(
        self, template: str = "{a}{op}{b}= {answer}§", reverse_operands: bool = False, reverse_answer: bool = True
    ) -> None:
        try:
            fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"`template` is no format string ({error}), got {template!r}.") from None
        prompt, _, end = template.partition("{answer}")
        literal = "".join(text for text, *_ in string.Formatter().parse(template))
        names = [str(name) for _, name, _, _ in fields]
        plain = not any(spec or conversion for _, _, spec, conversion in fields)
        if sorted(names) != ["a", "answer", "b", "op"] or names[-1] != "answer" or not plain or not end:
            raise ValueError(
                "`template` must have {a}, {op}, {b}, {answer} once each and plain, {answer} last and an end mark "
                f"after it, got {template!r}."
            )
        if set(literal) & set("0123456789-\0") or literal.count(literal[-1]) > 1:
            raise ValueError(f"`template` must not hold digits or '-', nor its end mark twice, got {template!r}.")
        self.prompt, self.end = prompt, end.format()
        self.reverse_operands, self.reverse_answer = reverse_operands, reverse_answer
        self.alphabet = "0123456789" + "".join(OPERATIONS) + "".join(sorted(set(literal) - set(OPERATIONS)))

    def write(self, a: int, operation: str, b: int, answer: int) -> tuple[str, str]:
        """Return the prompt and the target (answer and end mark)."""
        step = -1 if self.reverse_operands else 1
        prompt = self.prompt.format(a=str(a)[::step], op=operation, b=str(b)[::step])
        return prompt, str(answer)[:: -1 if self.reverse_answer else 1] + self.end

    def read_answer(self, text: str) -> str:
        """Return the answer in a generated text, most significant digit first, without the end mark."""
        answer = text.split(self.end)[0]
        return answer[::-1] if self.reverse_answer else answer

    def longest(self, operations: tuple[str, ...], num_digits: int) -> int:
        """Return the length of the longest prompt and target, in characters."""
        largest, least = 10**num_digits - 1, 0 if num_digits == 1 else 10 ** (num_digits - 1)
        candidates = {"+": largest + largest, "-": least - largest, "*": largest * largest}
        return max(sum(map(len, self.write(largest, op, largest, candidates[op]))) for op in operations)
