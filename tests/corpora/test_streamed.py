"""Streaming says what became of the rows while it reads them, for a run may never reach a corpus's end."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from looplm.corpora.corpus import RowPolicy
from looplm.corpora.sources import Source
from looplm.corpora.streamed import StreamedOrder
from looplm.corpora.templates import SolutionText
from looplm.corpora.text_tokenizer import CorpusCharTokenizer
from looplm.corpora.token_table import RowEncoder
from looplm.errors import InputError


def _order(path: Path, **policy: Any) -> StreamedOrder:
    tokenizer = CorpusCharTokenizer()
    tokenizer.learn(["0123456789+= "])
    return StreamedOrder(
        [Source(path=str(path), name="sums")],
        RowEncoder(SolutionText("{question} ", "{answer}", None), tokenizer),
        RowPolicy(max_tokens=32, **policy),
        path.parent / "cache",
        held_out=np.zeros(0, dtype=np.int64),
        batching="shuffled",
        batch_size=1,
        row_tokens=32,
        shuffle_buffer=0,
        seed=0,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    lines = [json.dumps({"question": f"{i}+1=", "answer": str(i + 1)}) for i in range(600)]
    lines[3] = '{"question": "half a li'
    lines[5] = json.dumps({"question": "5 + 1 = ¿", "answer": "6"})
    lines[7] = json.dumps({"question": "7+" * 20, "answer": "7"})
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "sums.jsonl"


def test_what_is_left_out_is_told_at_each_doubling(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = _order(path, bad_rows="skip").batches(0)
    with caplog.at_level(logging.INFO):
        list(islice(batches, 520))
    first, second = (message for message in caplog.messages if message.startswith("sums"))
    assert first.startswith("sums: 254 of 256 rows; left out: 1 ")
    assert second.startswith("sums: 510 of 512 rows; left out: 1 ")
    for said in (first, second):
        assert "1 longer than 32 tokens" in said
        assert said.endswith("; 1 hold something that the tokenizer has no id for")


def test_tokens_that_would_have_joined_are_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order = _order(path, bad_rows="skip")
    encode = order.encoder
    order.encoder = lambda rows: _joined(encode(rows))  # type: ignore[assignment]
    with caplog.at_level(logging.INFO):
        list(islice(order.batches(0), 260))
    assert "; in 254 a token would have joined prompt and solution, which were encoded apart" in caplog.text


def _joined(encoded: Any) -> Any:
    encoded.joined[:] = True
    return encoded


def test_a_broken_line_is_an_error_unless_it_is_to_be_skipped(path: Path) -> None:
    with pytest.raises(InputError, match="line 4"):
        next(_order(path).batches(0))
