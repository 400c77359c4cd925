"""How one word problem is drawn: holders whose quantities depend on one another, then a question.

Knows scenes and graphs; nothing of splits, seeds and files. Everything is decided by the numbers that it is given.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from looplm.corpora.operation_graphs import OperationGraph, Step, apply_operation
from looplm.corpora.word_problem_scenes import (
    CHANGES,
    CHANGES_OF_MEASURES,
    LAST_TAILS,
    LAST_TAILS_OF_GOODS,
    LAST_TAILS_OF_MEASURES,
    SCENES,
    Tail,
)

__all__ = ["DISTRACTORS", "Draft", "Draws", "NoDraft", "draw_draft"]

T = TypeVar("T")
DISTRACTORS = 0.25
"""Chance of each of the two sentences at most that the answer does not need."""
_LARGEST = {None: 200, "decimal": 40, "fraction": 12}  # of a result, by how the scene writes parts of one
_LARGEST_DRAWN = {"decimal": 12, "fraction": 4}
_DENOMINATORS = {None: (1,), "decimal": (1, 2, 4), "fraction": (1, 2, 3, 4, 6)}
_TIMES = {2: "twice", 3: "3 times", 4: "4 times", 5: "5 times"}
_PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}


class NoDraft(Exception):
    """No numbers or names fit; draw again.

    Example:
        >>> raise NoDraft("no whole number fits")
        Traceback (most recent call last):
        ...
        looplm.corpora.word_problem_draft.NoDraft: no whole number fits
    """


class Draws:
    """Choices as a function of a seed, the same in every version of Python (which promises this of random() alone).

    Example:
        >>> draws = Draws(0)
        >>> 1 <= draws.between(1, 6) <= 6
        True
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def between(self, least: int, most: int) -> int:
        """Return an integer, both ends included.

        Raises:
            NoDraft: If there is none.
        """
        if most < least:
            raise NoDraft
        return least + int(self._random() * (most - least + 1))

    def happens(self, chance: float) -> bool:
        """Return True with this chance."""
        return self._random() < chance

    def one_of(self, options: Sequence[T]) -> T:
        """Return one of the options, equally often.

        Raises:
            NoDraft: If there are none.
        """
        return options[self.between(0, len(options) - 1)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in some order."""
        left = list(items)
        return [left.pop(self.between(0, len(left) - 1)) for _ in items]


@dataclass(frozen=True)
class _Holder:
    name: str
    node: int
    value: Fraction
    basis: str = ""  # the holder that it has more or fewer than


@dataclass(frozen=True)
class Draft:
    """A problem before its split is known.

    Attributes:
        question: The problem.
        lines: The solution, a line a step.
        graph: What is computed.
        final: The answer as it is written.

    Example:
        >>> draft = draw_draft(Draws(0), num_steps=2)
        >>> len(draft.lines)
        2
    """

    question: str
    lines: tuple[str, ...]
    graph: OperationGraph
    final: str


def draw_draft(draws: Draws, num_steps: int, distractors: float = DISTRACTORS) -> Draft:
    """Draw a problem of so many steps, each of which the answer needs.

    Args:
        draws: What decides.
        num_steps: How many steps.
        distractors: Chance of each of the two sentences at most that the answer does not need.

    Raises:
        NoDraft: If numbers or names did not fit.

    Example:
        >>> draw_draft(Draws(0), num_steps=1).final.strip() != ""
        True
    """
    return _Drafting(draws).draw(num_steps, distractors)


class _Drafting:
    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.scene = draws.one_of(SCENES)
        self.names = draws.shuffled(self.scene.holders)
        self.holders: list[_Holder] = []
        self.statements: list[str] = []
        self.lines: list[str] = []
        self.leaves: dict[int, Fraction] = {}
        self.steps: dict[int, Step] = {}
        self.values: dict[int, Fraction] = {}
        # Parts of one are of one size in a problem: halves, quarters; for cups also thirds.
        self.unit = Fraction(1)
        if self.scene.style == "decimal":
            self.unit = draws.one_of([Fraction(1), Fraction(1, 2), Fraction(1, 2), Fraction(1, 4)])
        elif self.scene.style == "fraction":
            self.unit = draws.one_of([Fraction(1, 2), Fraction(1, 3), Fraction(1, 4)])

    # Numbers

    def quantity(self, least: int, most: int) -> Fraction:
        """Draw a number of things; of measures a smaller one, in units."""
        if self.scene.style is None:
            return Fraction(self.draws.between(least, most))
        return self.draws.between(1, int(min(most, _LARGEST_DRAWN[self.scene.style]) / self.unit)) * self.unit

    def leaf(self, value: Fraction | int) -> int:
        node = len(self.values)
        self.leaves[node] = self.values[node] = Fraction(value)
        return node

    def step(self, operation: str, left: int, right: int) -> tuple[int, str]:
        """Add a step; return its node and how the solution writes it."""
        a, b = self.values[left], self.values[right]
        value = apply_operation(operation, a, b)
        if not (0 < value <= _LARGEST[self.scene.style] and self.fits(value)):
            raise NoDraft
        node = len(self.values)
        self.steps[node], self.values[node] = Step(operation, left, right), value
        number = self.scene.number
        return node, f"{number(a)} {operation} {number(b)} = {number(value)}"

    def fits(self, value: Fraction) -> bool:
        """Whether the scene can have so much."""
        return value.denominator in _DENOMINATORS[self.scene.style]

    # Holders

    def add(self, phrase: str, node: int, written: str = "", basis: str = "") -> _Holder:
        """Add a holder that has what the phrase says, and the line that computes it."""
        if not self.names:
            raise NoDraft
        holder = _Holder(self.names.pop(), node, self.values[node], basis)
        self.holders.append(holder)
        self.statements.append(self.scene.statement(phrase, holder.name))
        if written:
            self.lines.append(self.scene.statement(f"{written} {self.scene.thing(holder.value)}", holder.name))
        return holder

    def holder(self, num_steps: int) -> _Holder:
        """Add a holder whose quantity takes so many steps, and those that it depends on."""
        if num_steps == 0:
            node = self.leaf(self.quantity(2, 50))
            return self.add(self.scene.amount(self.values[node]), node)
        if num_steps == 1 and self.draws.happens(0.5):
            return self.holder_of_numbers()
        if num_steps == 1 or self.draws.happens(0.65):
            return self.holder_by_number(self.holder(num_steps - 1))
        return self.holder_by_pair(num_steps)

    def holder_of_numbers(self) -> _Holder:
        """Add a holder whose quantity is one step on two numbers."""
        scene, draws = self.scene, self.draws
        operation = draws.one_of([*"-*", *("+" if scene.kinds else ""), *("/" if scene.can_move else "")])
        if operation == "+":
            a, b = self.quantity(2, 40), self.quantity(2, 40)
            phrase = f"{scene.kind(a, 0)} and {scene.kind(b, 1)}"
        elif operation == "-":
            a, b = self.quantity(10, 60), self.quantity(2, 30)
            phrase = f"all but {scene.number(b)} of {scene.amount(a)}"
        elif operation == "*":
            a, b = Fraction(draws.between(2, 9)), self.quantity(2, 12)
            phrase = f"{a} {scene.packs} of {scene.amount(b)} each"
        else:
            b = Fraction(draws.between(2, 6))
            a = b * self.quantity(2, 12)
            phrase = f"one of {b} equal shares of {scene.amount(a)}"
        return self.add(phrase, *self.step(operation, self.leaf(a), self.leaf(b)))

    def holder_by_number(self, other: _Holder) -> _Holder:
        """Add a holder that has more, fewer, several times or part of what another has."""
        scene, draws, things = self.scene, self.draws, self.scene.things[1]
        than = scene.reference(other.name)
        operation = draws.one_of(["+", "-", "*", "/"])
        if operation in "+-":
            k = self.quantity(2, 20)
            word = "more" if operation == "+" else "fewer"
            number = scene.number(k)
            phrase = (
                f"{number} {word} {scene.thing(k)} than {than}"
                if scene.style is not None or draws.happens(0.7)
                else f"{number} {scene.thing(k)} {word} than {than}"
            )
            return self.add(phrase, *self.step(operation, other.node, self.leaf(k)), basis=other.name)
        if operation == "*":
            factor = draws.between(2, 5)
            phrase = f"{_TIMES[factor]} as many {things} as {than}"
        else:
            factor = draws.one_of([k for k in _PARTS if self.fits(other.value / k)])
            phrase = f"{_PARTS[factor]} as many {things} as {than}"
        return self.add(phrase, *self.step(operation, other.node, self.leaf(factor)))

    def pair(self, num_steps: int) -> tuple[_Holder, _Holder, bool]:
        """Add two holders that take so many steps together; also whether their difference says something new."""
        first_steps = self.draws.between(0, num_steps)
        before = len(self.holders)
        first = self.holder(first_steps)
        below = [holder for holder in self.holders[before:] if holder is not first]
        if first_steps == num_steps and below and self.draws.happens(0.6):
            second = self.draws.one_of(below)
        else:
            second = self.holder(num_steps - first_steps)
        is_new = first.basis != second.name and second.basis != first.name and first.value != second.value
        return (first, second, is_new) if first.value >= second.value else (second, first, is_new)

    def holder_by_pair(self, num_steps: int) -> _Holder:
        """Add a holder that has the sum or the difference of two others."""
        more, less, is_new = self.pair(num_steps - 1)
        scene, things = self.scene, self.scene.things[1]
        if is_new and self.draws.happens(0.35):
            phrase = f"as many {things} as the difference between {more.name}'s count and {less.name}'s count"
            return self.add(phrase, *self.step("-", more.node, less.node))
        word = self.draws.one_of(["together", "together", "combined"])
        phrase = f"as many {things} as {scene.reference(*self.in_order(more, less))} {word}"
        return self.add(phrase, *self.step("+", *self.nodes_in_order(more, less)))

    def in_order(self, *holders: _Holder) -> list[str]:
        """Return names in the order in which they were introduced."""
        return [holder.name for holder in sorted(holders, key=self.holders.index)]

    def nodes_in_order(self, *holders: _Holder) -> list[int]:
        return [holder.node for holder in sorted(holders, key=self.holders.index)]

    # The problem

    def draw(self, num_steps: int, distractors: float) -> Draft:
        draws = self.draws
        most_tails = min(num_steps, 2) if self.scene.can_change else min(num_steps, 1)
        num_tails = next((t for t in range(most_tails, 0, -1) if draws.happens((0, 0.4, 0.2)[t])), 0)
        left = num_steps - num_tails
        tails: list[str] = []
        if left >= 1 and draws.happens(0.4):
            more, less, is_new = self.pair(left - 1)
            if is_new and num_tails == 0 and draws.happens(0.4):
                node, written = self.step("-", more.node, less.node)
                question = self.scene.question_of_difference(more.name, less.name)
                phrase = f"{written} more {self.scene.thing(self.values[node])} than {self.scene.reference(less.name)}"
                self.lines.append(self.scene.statement(phrase, more.name))
            else:
                names = self.in_order(more, less)
                node, written = self.step("+", *self.nodes_in_order(more, less))
                question = self.scene.question(*names)
                self.lines.append(self.scene.statement(f"{written} {self.scene.thing(self.values[node])}", *names))
                tails, question = self.tails(num_tails, node, self.scene.those(*names), question)
        else:
            holder = self.holder(left)
            question = self.scene.question(holder.name, wording=draws.between(0, 2))
            tails, question = self.tails(num_tails, holder.node, self.scene.those(holder.name), question)
        graph = OperationGraph(dict(self.leaves), dict(self.steps))
        self.distract(distractors)
        statements = draws.shuffled(self.statements) if draws.happens(0.25) else self.statements
        text = " ".join([*statements, *tails, question])
        return Draft(text, tuple(self.lines), graph, self.scene.number(graph.answer))

    def tails(self, num_tails: int, node: int, those: str, question: str) -> tuple[list[str], str]:
        """Return the sentences of what happens to a quantity, and the question that they lead to."""
        is_whole, sentences = self.scene.style is None, []
        for place in range(num_tails):
            goods = LAST_TAILS_OF_GOODS if self.scene.can_move else LAST_TAILS
            last = goods if is_whole else LAST_TAILS_OF_MEASURES
            changes = CHANGES if is_whole else CHANGES_OF_MEASURES
            must_change = place < num_tails - 1
            tail = self.draws.one_of(
                changes if must_change or (self.scene.can_change and self.draws.happens(0.4)) else last
            )
            sentence, node = self.tail(tail, node, those, is_rest=place > 0)
            sentences.append(sentence)
            question = self.fill(tail.question)
            those = self.fill(tail.rest)
        return sentences, question

    def tail(self, tail: Tail, node: int, those: str, *, is_rest: bool) -> tuple[str, int]:
        value = self.values[node]
        k = self.number_of(tail, value)
        left, right = (self.leaf(k), node) if tail.operation == "goal" else (node, self.leaf(k))
        node, written = self.step("-" if tail.operation == "goal" else tail.operation, left, right)
        result = self.values[node]
        unit = self.scene.thing(result) if tail.unit is None else tail.unit[result != 1]
        self.lines.append(f"That is {written} {unit}.")
        # What is left is counted, so its name is plural also where the things are one mass.
        sentence = self.fill(
            tail.sentence,
            is_plural=is_rest,
            later="After that" if is_rest else "Later",
            k=self.scene.number(k),
            amount=self.scene.amount(k),
            those=those,
        )
        return sentence, node

    def number_of(self, tail: Tail, value: Fraction) -> Fraction:
        draws = self.draws
        if tail.operation == "/":
            return Fraction(draws.one_of([k for k in range(2, 9) if self.fits(value / k) and value >= k]))
        if tail.operation == "*":
            return Fraction(draws.between(2, 6))
        if tail.operation == "-":
            if value <= 2:
                raise NoDraft
            return Fraction(draws.between(2, min(20, int(value) - 1)))
        if tail.operation == "+":
            return Fraction(draws.between(2, 20))
        return Fraction(int(value) + draws.between(2, 20))

    def fill(self, text: str, *, is_plural: bool = False, **words: Any) -> str:
        scene = self.scene
        plural, single = ("were", "was") if scene.is_past else ("are", "is")
        verb = single if scene.is_mass and not is_plural else plural
        return text.format(are=verb, were=plural, was=single, things=scene.things[1], **words)

    def distract(self, chance: float) -> None:
        """Add sentences that the answer does not need, at the end or between the others."""
        draws, scene = self.draws, self.scene
        for may_be_fact in (True, False):  # two facts might contradict each other
            if not draws.happens(chance) or not (self.names or may_be_fact):
                continue
            if self.names and (not may_be_fact or draws.happens(0.5)):
                name = self.names.pop()
                phrase = scene.amount(self.quantity(2, 50))
                if draws.happens(0.4):
                    k = self.quantity(2, 20)
                    other = scene.reference(draws.one_of(self.holders).name)
                    phrase = f"{scene.number(k)} more {scene.thing(k)} than {other}"
                sentence = scene.statement(phrase, name)
            else:
                name = draws.one_of(self.holders).name
                fact = draws.one_of(scene.facts).format(holder=name, n=draws.between(5, 12))
                sentence = fact[0].upper() + fact[1:]
            self.statements.insert(draws.between(1, len(self.statements)), sentence)
