r"""Mathematical texts as texts: spellings that are the same, words, and tuples taken apart. Evaluates nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from looplm.corpora.exact_numbers import plain_signs

__all__ = ["Parts", "based_number", "canonical", "split_parts", "to_latex", "words_of"]

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]|\\q?quad(?![A-Za-z])|\^\s*\{?\s*\\circ\s*\}?|\\?\$|~"
    r"|\*\*$|^\*\*"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_SHORT_SCRIPT = re.compile(r"([\^_])\s*\{\s*([0-9A-Za-z])\s*\}")
_SPACES = re.compile(r"\s+")
_IDLE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_BASED = re.compile(r"([0-9A-Z]+)_\{?([0-9]{1,2})\}?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,'-]*")
_PLAIN_TO_LATEX = {
    "√": "\\sqrt ",
    "π": "\\pi ",
    "∞": "\\infty ",
    "∪": "\\cup ",
    "∈": "\\in ",
    "≤": "\\le ",
    "≥": "\\ge ",
}
_PLAIN_TO_LATEX |= {"**": "^", "*": " \\cdot ", "±": "\\pm ", "·": " \\cdot ", "÷": " / "}
_SQRT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)|\\sqrt\s*\(([^()]*)\)")
_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")


def canonical(text: str) -> str:
    r"""Write a text so that spellings of the same thing are equal: spaces, dollar signs, ``\left``, ``\dfrac``.

    Example:
        >>> canonical(r"\left( \dfrac{1}{2} , 3 \right).")
        '(\\frac{1}{2},3)'
    """
    text = _WRAPPED.sub(r" \1 ", plain_signs(text).replace("{,}", ",").replace(",\\!", ","))
    text = _FRACTION.sub(r"\\frac", _DROPPED.sub(" ", text))
    text = _SHORT_SCRIPT.sub(r"\1\2", text)
    # A space between letters or digits may part two things; any other says nothing.
    return _IDLE_SPACE.sub("", _SPACES.sub(" ", text.strip())).rstrip(".")


def words_of(text: str) -> str | None:
    r"""Return a text that is words, in lower case; None where it may be mathematics.

    Example:
        >>> words_of(r"\text{Evelyn}"), words_of("p - q"), words_of("ab")
        ('evelyn', None, None)
    """
    plain = canonical(text)
    if not _WORDS.fullmatch(plain):
        return None
    is_named = _WRAPPED.search(text) is not None or any(len(word) > 3 for word in plain.split())
    return plain.lower() if is_named else None


def based_number(text: str) -> tuple[str, str] | None:
    """Return digits and base of a number such as ``52_8``; None for anything else.

    Example:
        >>> based_number("52_8"), based_number("52")
        (('52', '8'), None)
    """
    match = _BASED.fullmatch(canonical(text))
    return None if match is None else (match[1], match[2])


@dataclass(frozen=True)
class Parts:
    """A text taken apart at the commas of its highest level.

    Attributes:
        opening: The bracket around it, ``(``, ``[`` or ``{``; empty if there is none.
        closing: The bracket that ends it.
        items: What the commas part, at least one.

    Example:
        >>> Parts("(", ")", ("1", "2")).is_ordered
        True
    """

    opening: str
    closing: str
    items: tuple[str, ...]

    @property
    def is_ordered(self) -> bool:
        """Whether it is a tuple or an interval rather than a set or a list of solutions."""
        return self.opening in ("(", "[")


def split_parts(text: str) -> Parts:
    r"""Take a tuple, interval, set or list apart.

    Example:
        >>> split_parts(r"(3, \frac{1}{2}]")
        Parts(opening='(', closing=']', items=('3', '\\frac{1}{2}'))
        >>> split_parts("1, -2").items
        ('1', '-2')
    """
    text = canonical(text).replace("\\{", "⟨").replace("\\}", "⟩").replace("\\lbrace", "⟨").replace("\\rbrace", "⟩")
    outer = _is_enclosed(text)
    inner = text[1:-1] if outer else text
    items, depth, start = [], 0, 0
    for place, sign in enumerate(inner):
        depth += (sign in "([{⟨") - (sign in ")]}⟩")
        if sign == "," and depth == 0:
            items.append(inner[start:place])
            start = place + 1
    items.append(inner[start:])
    names = {"⟨": "{", "⟩": "}"}
    opening, closing = (names.get(text[0], text[0]), names.get(text[-1], text[-1])) if outer else ("", "")
    return Parts(opening, closing, tuple(item.replace("⟨", "\\{").replace("⟩", "\\}").strip() for item in items))


def _is_enclosed(text: str) -> bool:
    """Whether the first bracket closes with the last sign."""
    if len(text) < 2 or text[0] not in "([⟨" or text[-1] not in ")]⟩":
        return False
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{⟨") - (sign in ")]}⟩")
        if depth == 0:
            return place == len(text) - 1
    return False


def to_latex(text: str) -> str:
    r"""Write signs and names of plain text as LaTeX, for a parser that knows nothing else.

    Example:
        >>> to_latex("2*sqrt(5) + π")
        '2 \\cdot \\sqrt{5} + \\pi'
    """
    text = plain_signs(text).replace("$", "")
    for plain, latex in _PLAIN_TO_LATEX.items():
        text = text.replace(plain, latex)
    text = _SQRT.sub(lambda match: f"\\sqrt{{{match[1] or match[2] or ''}}}", text)
    return _PI.sub(r"\\pi ", text).strip().rstrip(".")
