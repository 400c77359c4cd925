"""Training on corpora that are larger than the disk: rows are read, checked, encoded and batched as they come.

Knows no trainer. What is random access elsewhere is an iterator here: batch n is reached by reading what is before it,
so a resumed run reads the same batches, after the time that takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from looplm.corpora.batches import Example
from looplm.corpora.corpus import RowPolicy, describe_fault, describe_length, report
from looplm.corpora.interleave import Interleave, shuffled
from looplm.corpora.packing import best_fit
from looplm.corpora.rows import Fault, check_rows, question_key
from looplm.corpora.sources import Source, load_rows, read_batches
from looplm.corpora.stream import StreamOrigin
from looplm.corpora.token_table import RowEncoder
from looplm.corpora.training_order import BUCKET, Batching, bucketed
from looplm.errors import InputError
from looplm.randomness import fold

__all__ = ["StreamedOrder"]

_BEGINNING = StreamOrigin()
_READ = 256  # rows encoded together
_PACKED_WINDOW = 64  # rows that are packed together


class StreamedOrder:
    """Batches of examples, read from the beginning.

    What became of a source's rows is told when 256 of its first epoch are read, each time as many again are, and at the
    epoch's end: a run may never come there.

    Args:
        sources: The sources.
        encoder: Encodes rows.
        policy: What happens to rows that cannot be used.
        cache_dir: Where ``datasets`` keeps what it must.
        held_out: Keys of questions that are not trained on, int64.
        batching: See :class:`~looplm.corpora.training_order.TrainingOrder`.
        batch_size: Rows of a batch on each process.
        row_tokens: Positions of a packed row.
        shuffle_buffer: Rows among which the next one is drawn; 0: the order of the source.
        seed: Of all orders.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: RowEncoder,
        policy: RowPolicy,
        cache_dir: Path,
        *,
        held_out: np.ndarray,
        batching: Batching,
        batch_size: int,
        row_tokens: int,
        shuffle_buffer: int,
        seed: int,
    ) -> None:
        self.sources, self.encoder, self.policy, self.cache_dir = list(sources), encoder, policy, cache_dir
        self.held_out = set(held_out.tolist())
        self.batching, self.batch_size, self.row_tokens = batching, batch_size, row_tokens
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self._mix = Interleave([1] * len(self.sources), [source.weight for source in self.sources], seed)

    def batches(
        self, start: int, rank: int = 0, world_size: int = 1, origin: StreamOrigin = _BEGINNING
    ) -> Iterator[list[list[Example]]]:
        """Yield the rows of each batch from number ``start`` on; ranks share what one would read."""
        whole = self.batch_size * world_size
        for number, batch in enumerate(self._whole_batches(whole, origin.row), start=origin.batch):
            if number >= start:
                yield batch[rank::world_size]

    def _whole_batches(self, size: int, first_row: int) -> Iterator[list[list[Example]]]:
        examples = self._mixed()
        if self.batching == "packed":
            rows = islice(self._packed(examples), first_row, None)
            while True:
                yield [next(rows) for _ in range(size)]
        examples = islice(examples, first_row, None)
        block = 0
        while True:
            if self.batching == "shuffled":
                yield [[next(examples)] for _ in range(size)]
                continue
            window = [next(examples) for _ in range(BUCKET * size)]
            lengths = np.array([len(example.ids) for example in window])
            for batch in bucketed(lengths, size, self.seed, block):
                yield [[window[item]] for item in batch]
            block += 1

    def _packed(self, examples: Iterator[Example]) -> Iterator[list[Example]]:
        block = 0
        while True:
            window, tokens = [], 0
            while tokens < _PACKED_WINDOW * self.row_tokens:
                window.append(next(examples))
                tokens += len(window[-1].ids) - 1
            window.sort(key=lambda example: -len(example.ids))
            rows = best_fit(np.array([len(example.ids) - 1 for example in window]), self.row_tokens)
            for row in shuffled(len(rows), self.seed, "packed_window", block):
                yield [window[item] for item in rows[row]]
            block += 1

    def _mixed(self) -> Iterator[Example]:
        endless = [self._endless(number) for number in range(len(self.sources))]
        index = 0
        while True:
            yield next(endless[self._mix.source(index)])
            index += 1

    def _endless(self, number: int) -> Iterator[Example]:
        source, epoch = self.sources[number], 0
        while True:
            tally = _Tally(source)
            yield from self._once(source, number, epoch, tally)
            if epoch == 0:
                tally.tell()
            if not tally.num_used:
                raise InputError(f"no row can be used: {report(source.label, tally.counts)}.")
            epoch += 1

    def _once(self, source: Source, number: int, epoch: int, tally: _Tally) -> Iterator[Example]:
        skip = self.policy.bad_rows == "skip"
        rows: Any = load_rows(source, self.cache_dir / "sources", skip_malformed=skip, streaming=True)
        if self.shuffle_buffer:
            seed = fold(self.seed, "stream", number, epoch) % 2**32
            rows = rows.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        first = 0
        for batch in read_batches(source, rows, _READ):
            checked = check_rows(source, batch)
            encoded = self.encoder(checked)
            for row, ids in enumerate(encoded.ids):
                fault, length, num_prompt = int(checked.fault[row]), len(ids), int(encoded.num_prompt[row])
                name = f"row {first + row + 1}" + (" of the shuffled stream" if self.shuffle_buffer else "")
                if fault not in (Fault.NONE, Fault.EMPTY) and self.policy.bad_rows == "error":
                    raise InputError(describe_fault(source, name, fault, int(checked.part[row])))
                if length > self.policy.max_tokens and self.policy.overlong == "error":
                    raise InputError(describe_length(source, name, length, self.policy.max_tokens))
                verdict = self.policy.verdict(fault, length, num_prompt)
                if verdict in ("kept", "cut") and question_key(checked.question[row]) in self.held_out:
                    verdict = "held out"
                tally.add(verdict, bool(encoded.joined[row]), bool(encoded.unknown[row]))
                if epoch == 0 and tally.is_due:
                    tally.tell()
                if verdict in ("kept", "cut"):
                    yield Example(ids[: self.policy.max_tokens], num_prompt)
            first += len(encoded.ids)


class _Tally:
    """What became of the rows of a source so far."""

    def __init__(self, source: Source) -> None:
        self.label, self.counts = source.label, Counter[str]()
        self.num_read = self.num_used = self.num_joined = self.num_unknown = 0

    def add(self, verdict: str, is_joined: bool, has_unknown: bool) -> None:
        self.counts[verdict] += 1
        self.num_read += 1
        if verdict in ("kept", "cut"):
            self.num_used += 1
            self.num_joined += is_joined
            self.num_unknown += has_unknown

    @property
    def is_due(self) -> bool:
        return self.num_read >= _READ and self.num_read & (self.num_read - 1) == 0

    def tell(self) -> None:
        rank_zero_info(report(self.label, self.counts, num_joined=self.num_joined, num_unknown=self.num_unknown))
