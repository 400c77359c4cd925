"""Which rows are trained on, validated on and tested on: held-out questions never meet training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np

from looplm.corpora.corpus import Corpus, RowPolicy
from looplm.corpora.sources import Source
from looplm.corpora.token_table import TokenTable
from looplm.randomness import fold, hash_uint64

__all__ = ["Splits"]

_HELD_OUT_SEED = 2026  # the same rows for every seed of training


class Splits:
    r"""The corpora of ``train``, ``val`` and ``test``, each read when it is first asked for.

    Args:
        sources: Of each split; without any for ``val``, rows of training are held out.
        table: Gives the tokens of a source.
        policy: What becomes of rows that do not fit.
        num_val: Number of questions held out where ``val`` has no source.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from looplm import MathDataModule
        >>> folder = Path(tempfile.mkdtemp())
        >>> rows = [json.dumps({"question": f"{i}?", "answer": f"{i}."}) for i in range(20)]
        >>> _ = (folder / "rows.jsonl").write_text("\n".join(rows))
        >>> data = MathDataModule([Source(path=str(folder / "rows.jsonl"))], num_val=5, cache_dir=str(folder / "cache"))
        >>> len(data.splits.train[0]), len(data.splits.val[0])
        (15, 5)
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Source]],
        table: Callable[[Source], TokenTable],
        policy: RowPolicy,
        num_val: int,
    ) -> None:
        self.sources, self.policy, self.num_val = sources, policy, num_val
        self._table = table

    @property
    def train(self) -> list[Corpus]:
        """Training, without what is held out.

        Raises:
            InputError: If a source cannot be read or has no row that can be used; so in all splits.
        """
        return self._train_and_val[0]

    @cached_property
    def val(self) -> list[Corpus]:
        """Validation."""
        sources = self.sources["val"]
        return [Corpus(source, self._table(source), self.policy) for source in sources] or self._train_and_val[1]

    @cached_property
    def test(self) -> list[Corpus]:
        """The test sets: every row, since a solution that does not fit takes nothing away from the question."""
        policy = RowPolicy(max_tokens=self.policy.max_tokens, overlong="truncate", bad_rows=self.policy.bad_rows)
        return [Corpus(source, self._table(source), policy) for source in self.sources["test"]]

    @cached_property
    def held_out_keys(self) -> np.ndarray:
        """Keys of the questions of all validation and test sources, sorted."""
        keys = [self._table(source).key for split in ("val", "test") for source in self.sources[split]]
        return np.unique(np.concatenate(keys)) if keys else np.zeros(0, dtype=np.int64)

    @cached_property
    def _train_and_val(self) -> tuple[list[Corpus], list[Corpus]]:
        train = [Corpus(source, self._table(source), self.policy) for source in self.sources["train"]]
        for corpus in train:
            corpus.leave_out(self.held_out_keys, "in a held-out set")
        val: list[Corpus] = []
        if not self.sources["val"]:
            keys = _least_hashed(np.concatenate([corpus.keys for corpus in train]), self.num_val)
            for corpus in train:
                part = corpus.held_out(keys)
                if part is not None:
                    val.append(part)
                corpus.leave_out(keys, "held out for validation")
        return train, val


def _least_hashed(keys: np.ndarray, number: int) -> np.ndarray:
    """Return that many of the keys, those with the least hashes: a draw that other rows in the corpus do not change."""
    keys = np.unique(keys)
    return keys[np.argsort(hash_uint64(fold(_HELD_OUT_SEED, "val"), keys), kind="stable")[:number]]
