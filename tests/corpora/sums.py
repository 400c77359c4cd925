"""A small corpus of sums, a chat template, and where the real corpora are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GSM8K = Path(__file__).parents[3] / "shared" / "corpora" / "gsm8k_train.jsonl"

ROWS = [
    {
        "question": f"Ann has {a} apples, and Zoë gives her {b}.  How many?",
        "answer": f"{a} + {b} = {a + b}\n#### {a + b}",
    }
    for a in range(2, 22)
    for b in range(1, 6)
]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
