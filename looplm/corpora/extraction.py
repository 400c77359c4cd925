r"""Where in a text the final answer stands. Knows nothing of what it is worth.

Everything here takes time linear in the text, whatever the text.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

from looplm.corpora.exact_numbers import plain_signs, read_number

__all__ = ["Extraction", "Rule", "extract_answer", "last_boxed"]

Rule = Literal["hashes", "boxed", "phrase", "last_number"]

_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_HEADING = re.compile(r"[A-Za-z]{2,}\s.*|.*:")
# A model that was not stopped begins the next problem.
_RUN_ON = re.compile(r"\n\s{0,8}(?:\*\*)?(?:Q|Question|Problem|Exercise|User|Human)(?:\*\*)?\s?[0-9]{0,4}\s?:")
_BRACES = re.compile(r"\\[{}\\]|\\(?:boxed|fbox)\s{0,4}\{|[{}]")
_BOXED_TOKEN = re.compile(r"\\boxed\s{1,4}([^\s{}$\\]+)")
_PHRASE = re.compile(
    r"\b(?:answer|result|solution)\b(?:[^.:=\n?]{0,60}?)"
    r"(?:\b(?:is|are|was|equals|be|comes to)\b|[:=])(?:\s*(?:therefore|thus|then|now|simply|just|exactly)\b)?"
    r"[\s:=*]*([^\n]*)",
    re.IGNORECASE,
)
_MATHS = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|\*|\")")
_REASON = re.compile(r"[,;]\s+(?=(?:since|because|which|where|so|as|and so|i\.e)\b)|\s+(?=because\b|since\b)")
_LEADING = re.compile(r"(?:[-+]?\s?[$€£]?|[$€£][-+]?)\s?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?\s?%?")
_GOES_ON = re.compile(
    r"[,;]?\s+(?!(?:and|or|to|plus|minus|times|over|pi|sqrt|mod|divided|million|billion|thousand|percent)\b)"
    r"[A-Za-z]{2,}|[,;:]?\s*$"
)
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)])[-−–])?(?:\\?[$€£]\s?)?(?<![\w.])"
    r"(?:\\[dt]?frac\{[0-9]{1,40}\}\{[0-9]{1,40}\}"
    r"|(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,400}|(?=\.[0-9]))(?:\.[0-9]{1,400})?(?:/[0-9]{1,40})?)"
    r"(?:\s?\\?%)?"
)
_BOLD = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])")  # a power stands between two numbers
_LONGEST_CANDIDATE = 2_000
_TAIL = 4_000


@dataclass(frozen=True)
class Extraction:
    """An answer that was found.

    Attributes:
        text: The answer as it was written.
        rule: What it was found by.

    Example:
        >>> Extraction("42", "marker").text
        '42'
    """

    text: str
    rule: Rule


def last_boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{…}`` that closes holds, braces nested to any depth; None if there is none.

    Example:
        >>> last_boxed(r"\boxed{1} so \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    opened: list[int] = []  # where a group begins; negative for one that is not boxed
    found: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "}":
            start = opened.pop() if opened else -1
            if start >= 0 and (found is None or start > found[0]):
                found = (start, match.start())
        elif token == "{":
            opened.append(-1)
        elif len(token) > 2:
            opened.append(match.end())
    if found is not None:
        return text[found[0] : found[1]].strip()
    tokens = _BOXED_TOKEN.findall(text)
    return tokens[-1] if tokens else None


def extract_answer(text: str) -> Extraction | None:
    r"""Find the final answer in a solution.

    In this order: the first ``#### x`` whose x is a number (what follows it is a model that was not stopped; a heading
    is no answer); the last ``\boxed{x}``; the last "the answer is x", "Answer: x" and the like; the last ``#### x``;
    the last number. A next problem that the model went on to (``Question:`` on a line of its own) is left out.

    Args:
        text: What the model wrote.

    Returns:
        The answer and the rule; None where the text holds none.

    Example:
        >>> extract_answer("48/2 = 24\n#### 24")
        Extraction(text='24', rule='hashes')
        >>> extract_answer("So the answer is $18 because 3 * 6 = 18.")
        Extraction(text='$18', rule='phrase')
        >>> extract_answer("She keeps 3 of 7.")
        Extraction(text='7', rule='last_number')
    """
    run_on = _RUN_ON.search(text)
    if run_on is not None:
        found = _extract(text[: run_on.start()])
        if found is not None:
            return found
    return _extract(text)


def _extract(text: str) -> Extraction | None:
    last_hashes = ""
    for match in _HASHES.finditer(text):
        content = match[1].strip()
        if read_number(content) is not None:
            return Extraction(content, "hashes")
        if content and not _HEADING.fullmatch(content):
            last_hashes = content
    boxed = last_boxed(text) if "\\boxed" in text or "\\fbox" in text else None
    if boxed:
        return Extraction(boxed, "boxed")
    phrase = _last_phrase(text)
    if phrase:
        return Extraction(phrase, "phrase")
    if last_hashes:
        return Extraction(last_hashes, "hashes")
    number = _last_number(text)
    return None if number is None else Extraction(number, "last_number")


def _last_phrase(text: str) -> str | None:
    found = None
    for match in _PHRASE.finditer(text):
        found = _candidate(match[1][:_LONGEST_CANDIDATE]) or found
    return found


def _candidate(text: str) -> str | None:
    """Return the answer in what stands after "the answer is"."""
    maths = _MATHS.match(text)
    if maths is not None:
        inner = next(group for group in maths.groups() if group is not None).strip()
        if not re.search(r"[0-9][^\\{}]*\s[a-z]{2,}", inner):  # "$18 and $5" are amounts, not mathematics
            return inner
    text = _BOLD.sub("", text).strip()
    leading = _LEADING.match(text)
    if leading is not None and _GOES_ON.match(text, leading.end()):
        return leading[0].strip()
    text = _REASON.split(_SENTENCE_END.split(text, maxsplit=1)[0], maxsplit=1)[0].strip(" \t\"'`")
    if re.search(r"\s[A-Za-z]{2,}\s+[A-Za-z]{2,}|^[A-Za-z]{2,}\s", text) and "\\" not in text:  # prose
        number = _last_number(text)
        return number if number is not None else text
    return text or None


def _last_number(text: str) -> str | None:
    # Nearly always it stands near the end; the whole text is read only where it does not.
    for part in (text[-_TAIL:], text) if len(text) > _TAIL else (text,):
        last = deque(_LAST_NUMBER.finditer(part), maxlen=1)
        if last:
            return last[0][0].strip()
    plain = plain_signs(text)
    return None if plain == text else _last_number(plain)
