"""The README's sentences about the study say what its rows say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .study_sentences import sentences

ROOT = Path(__file__).parents[2]
LINES = list(sentences(ROOT / "data" / "study.csv"))
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("−", "-").split())


def test_norms_and_gains_are_those_of_the_sentence() -> None:
    assert LINES[0] == (
        "Pre-Norm at 128 loops: state norm 1,468 (726–2,345), ρ 1.00 (1.00–1.00), mean gain 1.00 (1.00–1.00)"
    )
    assert len(LINES) == 14
    assert all("state norm 25 (" in line for line in LINES if line.startswith("Post-"))
    assert max(float(most) for most in re.findall(r"at 32 \S+ \(\S+–(\S+)\)$", "\n".join(LINES), re.M)) == 8.0


@pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("Post-")])
def test_the_readme_has_its_numbers(line: str) -> None:
    said = line.split("; at 32")[0].split(", ρ 1.00")[0]
    numbers = re.findall(r"[-+]?\d[\d,.]* \([^)]+\)|[-+]\d+\.\d+|\d+ of \d+", said)
    assert numbers
    assert [number for number in numbers if number not in README] == []
