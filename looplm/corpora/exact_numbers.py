"""Numbers as people and models write them, read exactly. Knows no LaTeX but that of numbers, and no float.

Whatever is not certainly one number is refused, so that ``72x``, ``1,00`` and ``5 or 6`` are none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["ExactNumber", "plain_signs", "read_number", "same_number"]

MAX_CHARACTERS = 400  # longer ones are compared as texts; arithmetic on them would not be bounded
_SIGNS: dict[int, str | None] = {ord(sign): "-" for sign in "−‐‑‒–—﹣"}
_SIGNS |= {ord(space): " " for space in "\u00a0\u2007\u3000\t"}
_SIGNS |= dict.fromkeys(map(ord, "\u2009\u202f\u200b\u2060\ufeff"))
_SIGNS |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width ASCII
_SIGNS |= {ord(sign): text for sign, text in {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3"}.items()}
_SIGNS |= {ord("×"): "\\times ", ord("⁄"): "/", ord("∕"): "/", ord("°"): "^\\circ "}
_SIGNS |= {ord(sign): f"^{{{digit}}}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}

_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")
_SPACING = re.compile(r"\\[!,;: ]|\\q?quad\b|~|\\(?:left|right|displaystyle)\b")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_CURRENCY = re.compile(r"\\?[$]|[€£¥₹]|\b(?:USD|EUR|GBP)\b")
_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
_DECIMAL = rf"(?:(?:{_DIGITS})(?:\.[0-9]*)?|\.[0-9]+)"
_PART = r"\{\s*([-+]?[0-9]+(?:\.[0-9]+)?)\s*\}|([0-9])"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?:
        (?:(?P<whole>[0-9]+)\s*)?\\[dtc]?frac\s*(?:{_PART})\s*(?:{_PART})
      | (?:(?P<mixed>[0-9]+)\s+)?(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS})
      | (?P<decimal>{_DECIMAL})
        (?:(?:[eE]|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{{?)(?P<power>[-+]?[0-9]{{1,3}})\}}?)?
    )(?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_SCALES = {
    "%": Fraction(1, 100),
    "percent": Fraction(1, 100),
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}
# A unit is words; what could be algebra, a second number or a connective is none.
_UNIT = re.compile(
    r"(?:\s*(?:\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|cm|mm|km|kg|mg|ml|mL|ft|lbs?|mph|am|pm|hrs?|min|sec)\b"
    r"|\s+[A-Za-z]{2,})(?:[\s/.-]+[A-Za-z]+|\s*(?:\^\s*\{?[23]\}?))*\s*"
)
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|plus|minus|times|over|mod|pi|sqrt|cos|sin|tan|log|ln|exp|half|halves|thirds?|quarters?|"
    r"hundredths|dividedby|divided|by|equals|is|are|if|not|than|less|more|dozens?|pairs?)\b"
)


@dataclass(frozen=True)
class ExactNumber:
    """A number and the scale that a word or sign after it gives.

    Attributes:
        face: The number as it stands.
        scale: 1/100 for a percent sign, 10⁶ for ``million``, else 1.

    Example:
        >>> ExactNumber(Fraction(3, 2), Fraction(1, 100))  # 1.5 %
        ExactNumber(face=Fraction(3, 2), scale=Fraction(1, 100))
    """

    face: Fraction
    scale: Fraction = Fraction(1)


def plain_signs(text: str) -> str:
    """Write full-width digits, minus signs, vulgar fractions and odd spaces in ASCII.

    Example:
        >>> plain_signs("−１２½")
        '-12 1/2'
    """
    return text if text.isascii() else text.translate(_SIGNS)


def read_number(text: str) -> ExactNumber | None:
    r"""Read a text that is one number, with currency, percent sign or unit allowed.

    Args:
        text: For example ``$1,080.50``, ``-3/4``, ``1\frac{4}{5}``, ``72 apples``, ``2.5 million``.

    Returns:
        The exact number; None where the text is something else.

    Example:
        >>> read_number("$1,080.50")
        ExactNumber(face=Fraction(2161, 2), scale=Fraction(1, 1))
        >>> read_number(r"1\frac{4}{5}").face
        Fraction(9, 5)
        >>> read_number("72x") is None
        True
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return ExactNumber(Fraction(int(text)))
    text = plain_signs(text)
    if "\\" in text or "{" in text or "~" in text:
        text = text.replace("{,}", ",")
        text = re.sub(r",\\!\s*", ",", text)
        text = re.sub(r"(?<=[0-9])\\,(?=[0-9]{3})", "", text)
        text = _WRAPPED.sub(r" \1 ", text)
        text = _SPACING.sub(" ", text).replace("\\%", "%")
    text = _CURRENCY.sub("", text).strip(" *").rstrip(".").strip()
    match = _NUMBER.match(text)
    if match is None:
        return None
    face = _face(match)
    scale = _scale(match["rest"])
    return None if face is None or scale is None else ExactNumber(face, scale)


def _face(match: re.Match[str]) -> Fraction | None:
    """Return the value of a match of ``_NUMBER``; None for a division by zero."""
    if match["decimal"] is not None:
        digits = match["decimal"].replace(",", "")
        value = Fraction(f"0{digits}" if digits.startswith(".") else digits.rstrip("."))
        if match["power"] is not None:
            value *= Fraction(10) ** int(match["power"])
    else:
        if match["over"] is not None:
            over, under = (Fraction(match[name].replace(",", "")) for name in ("over", "under"))
            whole = match["mixed"]
        else:
            parts = [part for part in match.groups()[2:6] if part is not None]  # of the two arguments of \frac
            over, under, whole = Fraction(parts[0]), Fraction(parts[1]), match["whole"]
        if under == 0:
            return None
        value = over / under
        if whole is not None:
            if not 0 <= value < 1:  # 2 7/5 and 2\frac{-1}{3} are no mixed numbers
                return None
            value += int(whole)
    return -value if match["sign"] == "-" else value


def _scale(rest: str) -> Fraction | None:
    """Return the scale that stands after a number; None if what stands there is no unit."""
    if not rest.strip():
        return Fraction(1)
    head, *words = rest.replace("%", " % ").split()
    scale = _SCALES.get(head.lower()) if rest[0] in " %" else None
    unit = rest if scale is None else "".join(f" {word}" for word in words)
    if unit and (not _UNIT.fullmatch(unit) or _NO_UNIT.search(unit)):
        return None
    return Fraction(1) if scale is None else scale


def same_number(a: ExactNumber, b: ExactNumber) -> bool:
    """Whether two numbers are equal; a percent sign or ``million`` may stand on one of them only.

    ``72%`` is 72 (the question gave the unit) and 0.72, but ``72%`` is not ``7200%`` and ``5 million`` is not
    ``5 thousand``.

    Example:
        >>> same_number(read_number("72%"), read_number("72.0")), same_number(read_number("5"), read_number("-5"))
        (True, False)
    """
    if a.face * a.scale == b.face * b.scale:
        return True
    return a.face == b.face and a.scale != b.scale and 1 in (a.scale, b.scale)
