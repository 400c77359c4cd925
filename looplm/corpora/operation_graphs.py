"""Arithmetic as a graph: which operations act on which numbers, without names and words.

The canonical form is equal for two graphs exactly if one becomes the other by renaming nodes and swapping the operands
of sums and products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product

__all__ = ["OperationGraph", "Step", "apply_operation"]

COMMUTATIVE = ("+", "*")


def apply_operation(operation: str, left: Fraction, right: Fraction) -> Fraction:
    """Compute one step exactly.

    Raises:
        ZeroDivisionError: In a division by zero.

    Example:
        >>> apply_operation("/", Fraction(3), Fraction(4))
        Fraction(3, 4)
    """
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    return left * right if operation == "*" else left / right


@dataclass(frozen=True)
class Step:
    """One operation; operands are nodes.

    Attributes:
        operation: ``+``, ``-``, ``*`` or ``/``.
        left: Node of the left operand.
        right: Node of the right operand.

    Example:
        >>> Step("+", 0, 1).operation
        '+'
    """

    operation: str
    left: int
    right: int


@dataclass(frozen=True)
class OperationGraph:
    """Numbers and the steps on them. A node is a number (a leaf) or a step; the highest step is the answer.

    Attributes:
        leaves: The numbers by node.
        steps: The steps by node; operands have lower nodes than the step.

    Example:
        >>> graph = OperationGraph({0: Fraction(12), 1: Fraction(5)}, {2: Step("+", 0, 1), 3: Step("+", 0, 2)})
        >>> graph.answer
        Fraction(29, 1)
        >>> graph.canonical()
        '+(+(a,b),a)'
        >>> graph.canonical(with_numbers=True)
        '+(+(a=12,b=5),a=12)'
    """

    leaves: Mapping[int, Fraction]
    steps: Mapping[int, Step]
    _shapes: dict[tuple[int, bool], str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def root(self) -> int:
        """Node of the answer."""
        return max(self.steps)

    @property
    def answer(self) -> Fraction:
        """The exact value of the last step."""
        return self.values()[self.root]

    def values(self) -> dict[int, Fraction]:
        """Return the exact value of every node."""
        values = dict(self.leaves)
        for node in sorted(self.steps):
            step = self.steps[node]
            values[node] = apply_operation(step.operation, values[step.left], values[step.right])
        return values

    def needed(self) -> set[int]:
        """Return the nodes that the answer depends on, itself included."""
        found, todo = set(), [self.root]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                if node in self.steps:
                    todo += [self.steps[node].left, self.steps[node].right]
        return found

    def canonical(self, *, with_numbers: bool = False) -> str:
        """Return the form that renaming and swapping do not change; nodes that are used twice have one name.

        Args:
            with_numbers: Whether the numbers belong to it.
        """
        # Where operands of a sum look alike, either may stand first; the least of all ways is the form.
        open_nodes = [
            node
            for node in sorted(self.needed() & set(self.steps))
            if self.steps[node].operation in COMMUTATIVE
            and self._shape(self.steps[node].left, with_numbers) == self._shape(self.steps[node].right, with_numbers)
        ]
        ways = product((False, True), repeat=len(open_nodes))
        return min(self._write(dict(zip(open_nodes, way, strict=True)), with_numbers) for way in ways)

    def _operands(self, node: int, with_numbers: bool, is_swapped: bool = False) -> tuple[int, int]:
        step = self.steps[node]
        pair = (step.left, step.right)
        if step.operation not in COMMUTATIVE:
            return pair
        shapes = [self._shape(operand, with_numbers) for operand in pair]
        return pair if (shapes[0] < shapes[1] or (shapes[0] == shapes[1] and not is_swapped)) else pair[::-1]

    def _shape(self, node: int, with_numbers: bool) -> str:
        """Return the expression below a node, with no regard to what is used twice."""
        key = (node, with_numbers)
        if key not in self._shapes:
            if node in self.leaves:
                shape = f"a={self.leaves[node]}" if with_numbers else "a"
            else:
                step = self.steps[node]
                operands = [self._shape(step.left, with_numbers), self._shape(step.right, with_numbers)]
                operands = sorted(operands) if step.operation in COMMUTATIVE else operands
                shape = f"{step.operation}({','.join(operands)})"
            self._shapes[key] = shape
        return self._shapes[key]

    def _write(self, swapped: Mapping[int, bool], with_numbers: bool) -> str:
        names: dict[int, str] = {}

        def write(node: int) -> str:
            if node in names:
                # A number's name says enough; a step that is used again is named by when it was first met.
                return names[node]
            if node in self.leaves:
                letter = chr(ord("a") + sum(name[0].isalpha() for name in names.values()))
                names[node] = f"{letter}={self.leaves[node]}" if with_numbers else letter
                return names[node]
            left, right = self._operands(node, with_numbers, swapped.get(node, False))
            text = f"{self.steps[node].operation}({write(left)},{write(right)})"
            names[node] = f"#{sum(name[0] == '#' for name in names.values())}"
            return text

        return write(self.root)
