"""Accuracy by depth against a reference in plain Python, in one process and in two."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm import DepthExactMatch, DepthSettling, DepthTokenAccuracy
from looplm.metrics import depth_summary

Sample = tuple[int, list[int], list[list[int]]]  # index, labels, predictions at each depth


def _reference(samples: list[Sample], num_depths: int) -> tuple[list[float], list[float]]:
    """Return exact match and token accuracy at each depth; each index counts once, its first occurrence."""
    seen: dict[int, Sample] = {}
    for sample in samples:
        seen.setdefault(sample[0], sample)
    exact, token = [], []
    for k in range(num_depths):
        whole = [
            all(p == label for p, label in zip(preds[k], labels, strict=True) if label != -100)
            for _, labels, preds in seen.values()
            if any(label != -100 for label in labels)
        ]
        single = [
            p == label
            for _, labels, preds in seen.values()
            for p, label in zip(preds[k], labels, strict=True)
            if label != -100
        ]
        exact.append(sum(whole) / len(whole) if whole else math.nan)
        token.append(sum(single) / len(single) if single else math.nan)
    return exact, token


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[list[Sample]]]:
    """Draw batches in which a sample may come again, as a distributed sampler's do, with the same content."""
    num_depths, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    # Few ids: predictions are often right.
    row = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    labels = st.lists(st.sampled_from([-100, 0, 1]), min_size=length, max_size=length)
    preds = st.lists(row, min_size=num_depths, max_size=num_depths)
    samples = [(i, draw(labels), draw(preds)) for i in range(draw(st.integers(1, 5)))]
    return num_depths, draw(
        st.lists(st.lists(st.sampled_from(samples), min_size=1, max_size=4), min_size=1, max_size=4)
    )


def _tensors(batch: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index, labels, preds = (torch.tensor(column) for column in zip(*batch, strict=True))
    return preds.transpose(0, 1), labels, index


@settings(deadline=None, max_examples=60)
@given(batches())
def test_values_are_those_of_the_definition(drawn: tuple[int, list[list[Sample]]]) -> None:
    num_depths, split = drawn
    exact_match, token_accuracy = DepthExactMatch(num_depths), DepthTokenAccuracy(num_depths)
    for batch in split:
        exact_match.update(*_tensors(batch))
        token_accuracy.update(*_tensors(batch))
    samples = [sample for batch in split for sample in batch]
    exact, token = _reference(samples, num_depths)
    assert exact_match.compute().tolist() == pytest.approx(exact, nan_ok=True)
    assert token_accuracy.compute().tolist() == pytest.approx(token, nan_ok=True)
    labelled = {index for index, labels, _ in samples if any(label != -100 for label in labels)}
    assert exact_match.num_samples == token_accuracy.num_samples == len(labelled)


@settings(deadline=None, max_examples=20)
@given(batches())
def test_without_indices_every_sample_counts(drawn: tuple[int, list[list[Sample]]]) -> None:
    num_depths, split = drawn
    metric = DepthExactMatch(num_depths)
    for batch in split:
        preds, labels, _ = _tensors(batch)
        metric.update(preds, labels)
    flat = [sample for batch in split for sample in batch]
    exact, _ = _reference([(i, labels, preds) for i, (_, labels, preds) in enumerate(flat)], num_depths)
    assert metric.compute().tolist() == pytest.approx(exact, nan_ok=True)


def _right_by_sample(samples: list[Sample], num_depths: int) -> list[list[bool]]:
    """Return whether each labelled sample, its first occurrence, is right at each depth."""
    seen: dict[int, Sample] = {}
    for sample in samples:
        seen.setdefault(sample[0], sample)
    return [
        [all(p == label for p, label in zip(preds[k], labels, strict=True) if label != -100) for k in range(num_depths)]
        for _, labels, preds in seen.values()
        if any(label != -100 for label in labels)
    ]


@settings(deadline=None, max_examples=60)
@given(batches())
def test_settling_is_that_of_the_definition(drawn: tuple[int, list[list[Sample]]]) -> None:
    num_depths, split = drawn
    metric, exact_match = DepthSettling(num_depths), DepthExactMatch(num_depths)
    for batch in split:
        metric.update(*_tensors(batch))
        exact_match.update(*_tensors(batch))
    rows = _right_by_sample([sample for batch in split for sample in batch], num_depths)
    settled, escaped = [], []
    for k in range(num_depths):
        settled.append(sum(any(row[: k + 1]) for row in rows))
        escaped.append(sum(any(row[i] and not row[j] for j in range(k + 1) for i in range(j)) for row in rows))
    curves = metric.compute()
    assert curves.shape == (2, num_depths)
    if not rows:
        assert bool(curves.isnan().all())
        return
    assert curves[0].tolist() == pytest.approx([value / len(rows) for value in settled])
    assert curves[1].tolist() == pytest.approx([value / len(rows) for value in escaped])
    # What is right now has been right; what has been right and has not escaped is right now.
    now = exact_match.compute()
    assert bool((curves[0] - curves[1] <= now + 1e-6).all())
    assert bool((now <= curves[0] + 1e-6).all())


def test_an_answer_that_comes_back_has_escaped_all_the_same() -> None:
    metric = DepthSettling(4)
    labels = torch.tensor([[1], [1]])
    metric.update(torch.tensor([[[1], [0]], [[0], [0]], [[1], [1]], [[1], [1]]]), labels)
    assert metric.compute().tolist() == [[0.5, 0.5, 1.0, 1.0], [0.0, 0.5, 0.5, 0.5]]


def test_summary_says_when_answers_settle_and_how_many_escape() -> None:
    summary = depth_summary([1, 2, 4, 8], [0.3, 0.6, 0.8, 0.7], settling=([0.3, 0.6, 0.8, 0.8], [0.0, 0.0, 0.0, 0.1]))
    # Of the 0.8 that ever settle, half have at depth 2 and 99 % at depth 4.
    assert summary["settling_depth_median"] == 2.0
    assert summary["settling_depth_p99"] == 4.0
    assert summary["escapes"] == 0.1
    never = depth_summary([1, 8], [0.0, 0.0], settling=([0.0, 0.0], [0.0, 0.0]))
    assert never == {"peak": 0.0, "peak_depth": 1.0, "escapes": 0.0}


def test_ignored_positions_change_nothing() -> None:
    labels = torch.tensor([[-100, 3, 4]])
    values = []
    for ignored in (0, 3, -100):
        metric = DepthExactMatch(1)
        metric.update(torch.tensor([[[ignored, 3, 4]]]), labels)
        values.append(metric.compute().item())
    assert values == [1.0, 1.0, 1.0]


def test_labels_may_have_any_number_of_dimensions() -> None:
    labels = torch.tensor([[[1, 2], [3, -100]], [[1, 2], [3, 4]]])
    preds = torch.stack([labels, torch.zeros_like(labels)])
    preds[0, 1, 1, 1] = 9
    exact_match, token_accuracy = DepthExactMatch(2), DepthTokenAccuracy(2)
    exact_match.update(preds, labels)
    token_accuracy.update(preds, labels)
    assert exact_match.compute().tolist() == [0.5, 0.0]
    assert token_accuracy.compute().tolist() == pytest.approx([6 / 7, 0.0])


def test_reset_forgets() -> None:
    metric = DepthExactMatch(1)
    metric.update(torch.tensor([[[1]]]), torch.tensor([[1]]), torch.tensor([0]))
    metric.reset()
    metric.update(torch.tensor([[[0]]]), torch.tensor([[1]]), torch.tensor([0]))
    assert metric.compute().tolist() == [0.0]


@pytest.mark.parametrize("metric", [DepthExactMatch, DepthSettling, DepthTokenAccuracy])
@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 2, 4), (2, 5), (2, 3, 5)])
def test_predictions_of_another_shape_are_refused_with_both_shapes(metric: type, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 5\)") as caught:
        metric(2).update(torch.zeros(shape, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long))
    assert str(shape) in str(caught.value)


def test_number_of_depths_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`num_depths` must be >= 1, got 0"):
        DepthExactMatch(0)


# Rank 0 reads three batches, rank 1 one; sample 4 is repeated to fill up, as a distributed sampler does.
_LABELS = torch.tensor([[1, 1], [2, -100], [3, 3], [4, 4], [5, 5]])
_PREDS = torch.stack([_LABELS.clamp(min=0), torch.tensor([[1, 1], [2, 7], [3, 0], [0, 0], [5, 5]])])
_SHARES = [[[0, 2], [4], [1]], [[3, 4]]]


def _worker(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    metrics = [DepthExactMatch(2), DepthTokenAccuracy(2), DepthSettling(2)]
    for rows in _SHARES[rank]:
        for metric in metrics:
            metric.update(_PREDS[:, rows], _LABELS[rows], torch.tensor(rows))
    values = [metric.compute() for metric in metrics]
    with metrics[0].sync_context():
        num_samples = metrics[0].num_samples
    # Synchronising must leave each process its own share.
    torch.save({"values": values, "num_samples": num_samples, "own": metrics[0].num_samples}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_uneven_shares_give_the_value_of_one(tmp_path: Path) -> None:
    run_ranks(_worker, str(tmp_path), num_ranks=2)
    expected = []
    for metric in (DepthExactMatch(2), DepthTokenAccuracy(2), DepthSettling(2)):
        metric.update(_PREDS, _LABELS, torch.arange(5))
        expected.append(metric.compute().tolist())
    for rank, own in enumerate((4, 2)):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert [value.tolist() for value in result["values"]] == expected
        assert result["num_samples"] == 5
        assert result["own"] == own


def test_summary_gives_the_peak_and_what_is_left_of_it() -> None:
    summary = depth_summary([0, 4, 8, 16, 40, 100], [0.0, 0.8, 0.8, 0.4, 0.2, 0.0], mean_depth=5.0)
    # 2 × 5 = 10, 4 × 5 = 20, 8 × 5 = 40, 16 × 5 = 80: the first depths at least as large are 16, 40, 40 and 100.
    assert summary == {"peak": 0.8, "peak_depth": 4.0, "at_02x": 0.5, "at_04x": 0.25, "at_08x": 0.25, "at_16x": 0.0}


def test_summary_says_nothing_of_depths_it_has_not_seen() -> None:
    assert depth_summary([1, 8], [0.5, 1.0], mean_depth=4.0) == {"peak": 1.0, "peak_depth": 8.0, "at_02x": 1.0}
    assert depth_summary([1, 8], [0.5, 1.0]) == {"peak": 1.0, "peak_depth": 8.0}


def test_summary_of_a_model_that_is_never_right_has_no_ratios() -> None:
    assert depth_summary([1, 8], [0.0, 0.0], mean_depth=1.0) == {"peak": 0.0, "peak_depth": 1.0}


def test_forward_gives_the_batch_and_accumulates_also_for_one_depth() -> None:
    metric = DepthTokenAccuracy(1)
    assert metric(torch.tensor([[[1, 2]]]), torch.tensor([[1, 0]])).tolist() == [0.5]
    assert metric(torch.tensor([[[1, 2]]]), torch.tensor([[1, 2]])).tolist() == [1.0]
    assert metric.compute().tolist() == [0.75]


def test_a_sample_may_have_one_label() -> None:
    """Of a classifier, say: then whole answer and token are the same."""
    labels = torch.tensor([1, 2, -100, 0])
    preds = torch.stack([torch.zeros_like(labels), torch.tensor([1, 2, 7, 7])])
    for metric in (DepthExactMatch(2), DepthTokenAccuracy(2)):
        metric.update(preds, labels)
        assert metric.compute().tolist() == pytest.approx([1 / 3, 2 / 3])
