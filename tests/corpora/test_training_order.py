"""Order, batches by length and packed rows: functions of seed and index that neither repeat nor lose a row."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from looplm.corpora.batches import Example, packed_batch, padded_batch, padded_prompts
from looplm.corpora.interleave import BLOCK, Interleave, block_counts
from looplm.corpora.packing import Packing, best_fit
from looplm.corpora.training_order import bucketed
from looplm.errors import InputError

weights = st.lists(st.floats(0.05, 20), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(weights)
def test_every_block_has_its_shares(given_weights: list[float]) -> None:
    assume(min(given_weights) / sum(given_weights) * BLOCK >= 1)  # less is refused
    counts = block_counts(given_weights)
    assert counts.sum() == BLOCK
    shares = np.array(given_weights) / sum(given_weights) * BLOCK
    assert (np.abs(counts - shares) < 1).all()
    mix = Interleave([7] * len(counts), given_weights, seed=1)
    for block in (0, 3):
        drawn = Counter(mix(block * BLOCK + i)[0] for i in range(BLOCK))
        assert [drawn[source] for source in range(len(counts))] == counts.tolist()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 5))
def test_no_item_comes_again_before_all_have_come(sizes: list[int], seed: int) -> None:
    mix = Interleave(sizes, [1.0 + number for number in range(len(sizes))], seed)
    seen: dict[int, list[int]] = {source: [] for source in range(len(sizes))}
    for index in range(2 * BLOCK):
        source, item, epoch = mix(index)
        assert epoch == len(seen[source]) // sizes[source]
        seen[source].append(item)
    for source, items in seen.items():
        for start in range(0, len(items) - sizes[source], sizes[source]):
            assert sorted(items[start : start + sizes[source]]) == list(range(sizes[source]))


def test_sample_is_a_function_of_seed_and_index() -> None:
    forwards, backwards = Interleave([50, 9], [3, 1], seed=4), Interleave([50, 9], [3, 1], seed=4)
    indices = [0, 5, 1023, 1024, 9999]
    assert [forwards(i) for i in indices] == [backwards(i) for i in reversed(indices)][::-1]
    assert [forwards(i) for i in range(50)] != [Interleave([50, 9], [3, 1], seed=5)(i) for i in range(50)]


def test_weight_that_would_get_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="1 of 1024 samples"):
        block_counts([1.0, 1e-6])


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=80).map(lambda values: np.array(values, dtype=np.int64))


@settings(deadline=None, max_examples=50)
@given(lengths)
def test_packed_rows_hold_every_document_once_and_fit(found: np.ndarray) -> None:
    found = -np.sort(-found)
    rows = best_fit(found, 30)
    assert sorted(document for row in rows for document in row) == list(range(len(found)))
    assert all(found[row].sum() <= 30 for row in rows)
    # Best fit opens a row only where no other has room: two rows that are half empty would share one.
    assert sum(found[row].sum() <= 15 for row in rows) <= 1


@settings(deadline=None, max_examples=30)
@given(lengths, st.integers(0, 4))
def test_every_epoch_packs_every_document_into_as_many_rows(found: np.ndarray, epoch: int) -> None:
    packing = Packing(found, 30, seed=2)
    rows = [packing.documents(row, epoch) for row in range(len(packing))]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(found)))
    assert all(found[row].sum() <= 30 for row in rows)


def test_epochs_pack_differently() -> None:
    packing = Packing(np.array([5] * 20 + [3] * 20), 16, seed=2)
    rows = [[tuple(packing.documents(row, epoch)) for row in range(len(packing))] for epoch in (0, 1, 0)]
    assert rows[0] == rows[2]
    assert rows[0] != rows[1]


def test_packed_rows_are_nearly_full() -> None:
    found = np.random.default_rng(0).integers(20, 400, 100_000)
    rows = best_fit(-np.sort(-found), 2048)
    assert found.sum() / (2048 * len(rows)) > 0.99


def test_buckets_hold_every_example_once_with_like_lengths() -> None:
    found = np.random.default_rng(0).integers(1, 100, 32 * 4)
    batches = bucketed(found, 4, seed=0, block=3)
    assert sorted(batches.ravel().tolist()) == list(range(128))
    padding = (found[batches].max(1, keepdims=True) - found[batches]).sum() / found.sum()
    assert padding < 0.05
    assert not (np.diff(found[batches].max(1)) >= 0).all()  # the batches themselves are in no order


examples = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6).map(
    lambda sizes: [
        Example(np.arange(10 * i + 1, 10 * i + 1 + p + s, dtype=np.int32), p) for i, (p, s) in enumerate(sizes)
    ]
)


@settings(deadline=None, max_examples=50)
@given(examples)
def test_labels_are_the_tokens_after_the_prompt_each_predicted_by_the_one_before(found: list[Example]) -> None:
    padded, packed = padded_batch(found, 0), packed_batch([found], 80, 0)
    for row, example in enumerate(found):
        mask = padded["attention_mask"][row]
        assert padded["input_ids"][row][mask].tolist() == example.ids[:-1].tolist()
        mine = packed["attention_mask"][0] == row + 1
        assert packed["input_ids"][0][mine].tolist() == example.ids[:-1].tolist()
        for inputs, labels in (
            (padded["input_ids"][row], padded["labels"][row]),
            (packed["input_ids"][0][mine], packed["labels"][0][mine]),
        ):
            asked = labels != -100
            assert labels[asked].tolist() == example.ids[example.num_prompt :].tolist()
            assert (inputs[asked] + 1).tolist() == labels[asked].tolist()
    assert bool((packed["labels"][0][packed["attention_mask"][0] == 0] == -100).all())


def test_example_without_labels_and_prompts_of_unequal_length() -> None:
    batch = padded_batch([Example(np.array([1, 2, 3], dtype=np.int32), 3)], 0)
    assert batch["labels"].tolist() == [[-100, -100]]
    ids, mask = padded_prompts([np.array([5]), np.array([6, 7])], 0)
    assert ids.tolist() == [[0, 5], [6, 7]]
    assert torch.equal(mask, torch.tensor([[False, True], [True, True]]))
