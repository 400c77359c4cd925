"""Accuracy: by depth, and of one training batch. Knows predictions and labels, not models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["DepthExactMatch", "DepthSettling", "DepthTokenAccuracy", "depth_summary", "share_all_right"]


def _check_shapes(depth_preds: Tensor, labels: Tensor, num_depths: int) -> None:
    if depth_preds.shape != (num_depths, *labels.shape):
        raise ValueError(
            f"`depth_preds` must be (K, B, …) = {(num_depths, *labels.shape)}, the labels' shape at each of "
            f"{num_depths} depths, but got {tuple(depth_preds.shape)}."
        )


def _by_token(depth_preds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens are right ``(K, B, N)`` and which are labelled ``(B, N)``; one label a sample is N = 1."""
    return (depth_preds == labels).unsqueeze(-1).flatten(2), (labels != -100).unsqueeze(-1).flatten(1)


def _exact_match_update(depth_preds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether all labelled tokens are right ``(B, K)`` and whether there are any ``(B,)``, as int64."""
    right, labelled = _by_token(depth_preds, labels)
    right = (right | ~labelled).all(-1).T
    exists = labelled.any(-1)
    return (right & exists[:, None]).long(), exists.long()


def _token_accuracy_update(depth_preds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of right labelled tokens ``(B, K)`` and of labelled tokens ``(B,)``."""
    right, labelled = _by_token(depth_preds, labels)
    return (right & labelled).sum(-1).T, labelled.sum(-1)


class _DepthMetric(Metric):
    """Keeps per-sample counts, so that samples a distributed sampler repeats count once."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    right: list[Tensor]
    count: list[Tensor]
    indices: list[Tensor]

    def __init__(self, num_depths: int) -> None:
        super().__init__()
        if num_depths < 1:
            raise ValueError(f"`num_depths` must be >= 1, got {num_depths}.")
        self.num_depths = num_depths
        for name in ("right", "count", "indices"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def _wrap_compute(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # torchmetrics makes a single value a scalar; the curve of one depth stays a curve.
        wrapped = super()._wrap_compute(compute)

        @wraps(compute)
        def curve(*args: Any) -> Tensor:
            values: Tensor = wrapped(*args)
            return values.reshape(-1, self.num_depths).squeeze(0)

        return curve

    def _update(self, counts: tuple[Tensor, Tensor], indices: Tensor | None) -> None:
        right, count = counts
        self.right.append(right)
        self.count.append(count)
        self.indices.append(torch.full_like(count, -1) if indices is None else indices.to(count))

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Return the counts of all samples, each index once; samples without one (−1) all count."""
        if not len(self.indices):
            nothing = torch.zeros(0, dtype=torch.long, device=self.device)
            return nothing.reshape(0, self.num_depths), nothing
        right, count, indices = (dim_zero_cat(x) for x in (self.right, self.count, self.indices))
        order = indices.argsort(stable=True)
        ordered = indices[order]
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = (ordered[1:] != ordered[:-1]) | (ordered[1:] < 0)
        return right[order][first], count[order][first]

    def compute(self) -> Tensor:
        """Return the curve, float32 ``(…, K)``; see the class."""
        return self._compute(*self._kept())

    def _compute(self, right: Tensor, count: Tensor) -> Tensor:
        """Return the share of what is right at each depth, float32 ``(K,)``; NaN where nothing was labelled."""
        return right.sum(0).double().div(count.sum()).float()

    @property
    def num_samples(self) -> int:
        """Number of samples counted so far on this process (on all of them while synchronised)."""
        return int((self._kept()[1] > 0).sum())


class DepthExactMatch(_DepthMetric):
    """Share of samples whose labelled tokens are all right, at each of K depths.

    As input to ``update``:

    - ``depth_preds``: predicted ids, int64 ``(K, B, …)``; ``depth_preds[k, b, i]`` answers ``labels[b, i]``.
    - ``labels``: int64 ``(B, …)``; −100 is ignored.
    - ``indices``: sample numbers, int64 ``(B,)``, or None; a number seen again is not counted again.

    As output of ``compute``: float32 ``(K,)``. For a unique answer this equals exact match of greedy decoding: if every
    next token is right given the true prefix, greedy decoding never leaves it, and conversely.

    Args:
        num_depths: K.

    Example:
        >>> metric = DepthExactMatch(num_depths=2)
        >>> labels = torch.tensor([[-100, 3, 4], [-100, 5, 6]])
        >>> metric.update(torch.stack([labels, torch.tensor([[0, 3, 4], [0, 5, 0]])]), labels)
        >>> metric.compute()
        tensor([1.0000, 0.5000])
    """

    def update(self, depth_preds: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Count a batch; for the arguments see the class."""
        _check_shapes(depth_preds, labels, self.num_depths)
        self._update(_exact_match_update(depth_preds, labels), indices)


class DepthTokenAccuracy(_DepthMetric):
    """Share of labelled tokens that are right, at each of K depths, teacher-forced.

    Arguments, input and output as in :class:`DepthExactMatch`.

    Example:
        >>> metric = DepthTokenAccuracy(num_depths=1)
        >>> metric.update(torch.tensor([[[1, 2, 0]]]), torch.tensor([[-100, 2, 4]]))
        >>> metric.compute()
        tensor([0.5000])
    """

    def update(self, depth_preds: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Count a batch; for the arguments see the class."""
        _check_shapes(depth_preds, labels, self.num_depths)
        self._update(_token_accuracy_update(depth_preds, labels), indices)


class DepthSettling(_DepthMetric):
    """When whole answers become right, and whether they stay so: two distributions over samples, at each of K depths.

    The *settling depth* of a sample is the first evaluated depth at which its answer is right; it has *escaped* at the
    first later one at which it is wrong. Exact match hides both: one answer lost and another found leave it as it is.
    What happens between two evaluated depths is not seen.

    As input to ``update``: as in :class:`DepthExactMatch`.

    As output of ``compute``: float32 ``(2, K)``. Row 0: share of the samples with settling depth <= depth (the
    distribution function of the settling depth; its last value falls short of 1 by the samples that are never right).
    Row 1: share of the samples that have escaped by then. NaN where nothing was labelled. For every depth
    ``settled − escaped <= exact match <= settled``.

    Args:
        num_depths: K.

    Example:
        >>> metric = DepthSettling(num_depths=3)
        >>> labels = torch.tensor([[1], [2]])
        >>> metric.update(torch.tensor([[[1], [0]], [[0], [2]], [[1], [2]]]), labels)  # right: yes no yes, no yes yes
        >>> metric.compute().tolist()
        [[0.5, 1.0, 1.0], [0.0, 0.5, 0.5]]
    """

    def update(self, depth_preds: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Count a batch; for the arguments see :class:`DepthExactMatch`."""
        _check_shapes(depth_preds, labels, self.num_depths)
        self._update(_exact_match_update(depth_preds, labels), indices)

    def _compute(self, right: Tensor, count: Tensor) -> Tensor:
        settled = right[count > 0].cummax(1).values
        escaped = (settled - right[count > 0]).cummax(1).values
        return torch.stack([settled, escaped]).double().mean(1).float()


def depth_summary(
    depths: Sequence[int],
    accuracy: Sequence[float],
    mean_depth: float | None = None,
    settling: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """Summarise a curve: its peak, how much of it is left at multiples of the mean trained depth, and settling.

    Args:
        depths: K increasing depths.
        accuracy: The accuracy at each.
        mean_depth: Mean trained depth (loops); None: no multiples.
        settling: What :class:`DepthSettling` computes, ``(2, K)``; None: nothing of it.

    Returns:
        ``peak``, ``peak_depth`` (the smallest that reaches it), and for m in 2, 4, 8, 16, if the curve goes that far,
        ``at_{m:02d}x``: accuracy as a fraction of the peak at the first evaluated depth ≥ m × mean depth. With
        ``settling`` also ``settling_depth_median`` and ``settling_depth_p99`` (of the samples that settle: the first
        evaluated depths by which 50 and 99 % of them have) and ``escapes`` (share of all samples).

    Example:
        >>> depth_summary([0, 4, 8], [0.0, 1.0, 0.5], mean_depth=4.0)
        {'peak': 1.0, 'peak_depth': 4.0, 'at_02x': 0.5}
        >>> depth_summary([4, 8], [0.5, 0.9], settling=[[0.5, 1.0], [0.0, 0.1]])["escapes"]
        0.1
    """
    peak = max(accuracy)
    summary = {"peak": float(peak), "peak_depth": float(depths[list(accuracy).index(peak)])}
    for multiple in (2, 4, 8, 16) if mean_depth else ():
        beyond = [value for depth, value in zip(depths, accuracy, strict=True) if depth >= multiple * (mean_depth or 0)]
        if beyond and peak > 0:
            summary[f"at_{multiple:02d}x"] = float(beyond[0] / peak)
    if settling is not None:
        settled, escaped = settling
        if settled[-1] > 0:
            for name, share in (("median", 0.5), ("p99", 0.99)):
                reached = (depth for depth, value in zip(depths, settled, strict=True) if value >= share * settled[-1])
                summary[f"settling_depth_{name}"] = float(next(reached))
        summary["escapes"] = float(escaped[-1])
    return summary


def share_all_right(right: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the share of sequences that are right throughout; where rows are packed, of their documents.

    Args:
        right: Whether a token is right or not asked for, ``(B, T)``.
        attention_mask: ``(B, T)``; integers number the documents of a row, 0 is padding.

    Example:
        >>> right = torch.tensor([[True, True, False, True]])
        >>> share_all_right(right, None).item(), share_all_right(right, torch.tensor([[1, 1, 2, 0]])).item()
        (0.0, 0.5)
    """
    if attention_mask is None or attention_mask.dtype == torch.bool or attention_mask.is_floating_point():
        return right.all(-1).float().mean()
    documents = attention_mask.long().clamp(max=right.shape[1])  # not their maximum, which a GPU would have to tell
    counts = torch.zeros(len(right), right.shape[1] + 1, device=right.device)
    tokens = counts.scatter_add(1, documents, torch.ones_like(counts[:, 1:]))[:, 1:]
    wrong = counts.scatter_add(1, documents, (~right).float())[:, 1:]
    return ((wrong == 0) & (tokens > 0)).sum() / (tokens > 0).sum().clamp_min(1)
