"""Rows of validation and test with all that evaluation needs of them: labels, prompt, gold answer. Knows no trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from looplm.corpora.batches import Example, padded_batch, padded_prompts
from looplm.corpora.corpus import Corpus
from looplm.corpora.rows import Rows, check_rows
from looplm.corpora.token_table import RowEncoder, plain_hash

__all__ = ["EvaluationRows", "evaluation_batch"]


class EvaluationRows(Dataset[dict[str, Any]]):
    """The rows of a corpus with all that evaluation needs of them.

    Args:
        corpus: The rows.
        texts: The source's columns.
        encoder: Encodes prompts.
        limit: At most that many rows; None: all.
    """

    def __init__(self, corpus: Corpus, texts: Any, encoder: RowEncoder, limit: int | None = None) -> None:
        self.corpus, self.encoder = corpus, encoder
        self.number = len(corpus) if limit is None else min(limit, len(corpus))
        self._texts = texts.select_columns(corpus.source.needed)

    def __len__(self) -> int:
        return self.number

    @property
    def fingerprint(self) -> str:
        """What tells these rows, and how they are put to a model, from others."""
        rows = self.corpus.rows[: self.number]
        questions, lengths = (column[rows].tolist() for column in (self.corpus.table.key, self.corpus.table.lengths))
        return plain_hash(questions, lengths, self.encoder.settings())

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[int]) -> list[dict[str, Any]]:
        """Return several rows, which is faster than one by one."""
        places = [int(self.corpus.rows[item]) for item in items]
        texts: Rows = check_rows(self.corpus.source, self._texts[places])
        prompts = self.encoder.encode_prompts(texts.question)
        return [
            {
                "example": self._example(item),
                "prompt": prompts[number],
                "final": texts.final[number],
                "answer": texts.answer[number],
                "index": places[number],
            }
            for number, item in enumerate(items)
        ]

    def _example(self, item: int) -> Example:
        example, row = self.corpus.example(item), int(self.corpus.rows[item])
        if len(example.ids) < self.corpus.table.lengths[row] and self.corpus.policy.overlong == "truncate":
            # "All tokens right" of a part would say nothing of the whole.
            return Example(example.ids, len(example.ids))
        return example


def evaluation_batch(rows: list[dict[str, Any]], pad_id: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Return rows of :class:`EvaluationRows` as a batch; see :class:`~looplm.corpora.mathematics.MathDataModule`.

    Args:
        rows: B rows.
        pad_id: Id of padding.
        extra: What all batches of the set have in common.

    Example:
        >>> import numpy as np
        >>> from looplm.corpora.batches import Example
        >>> example = Example(np.array([5, 6, 2]), num_prompt=2)
        >>> row = {"prompt": np.array([5, 6]), "example": example, "index": 0, "final": "6", "answer": "It is 6."}
        >>> evaluation_batch([row], pad_id=0, extra={"source": "gsm8k"})["prompt_ids"].tolist()
        [[5, 6]]
    """
    prompt_ids, prompt_mask = padded_prompts([row["prompt"] for row in rows], pad_id)
    return {
        **padded_batch([row["example"] for row in rows], pad_id),
        "index": torch.tensor([row["index"] for row in rows]),
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "final": [row["final"] for row in rows],
        "answer": [row["answer"] for row in rows],
        **extra,
    }
