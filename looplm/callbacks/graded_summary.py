"""Graded answers in numbers: accuracy by depth with an interval, votes, pass@k, lengths. Knows plain rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from looplm.corpora.votes import pass_at_k

__all__ = ["bootstrap_interval", "graded_summary"]


def bootstrap_interval(
    values: np.ndarray, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile bootstrap interval of a mean over problems (Efron 1979).

    All rows of ``values`` are resampled together, so that intervals of depths can be compared.

    Args:
        values: ``(…, N)``, N problems.
        confidence: Share of the resampled means within the interval.
        num_resamples: How often N problems are drawn with replacement.
        seed: Seed of the draws.

    Returns:
        Least and greatest, ``(…)`` each.

    Raises:
        ValueError: If there is no problem, or a number is out of its range.

    Example:
        >>> low, high = bootstrap_interval(np.array([0.0, 1.0] * 50))
        >>> round(float(low), 1), round(float(high), 1)
        (0.4, 0.6)
    """
    if values.shape[-1] == 0 or not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            "`values` need a problem at least, `confidence` must be in (0, 1) and `num_resamples` >= 1, got "
            f"{values.shape[-1]} problems, {confidence} and {num_resamples}."
        )
    number = values.shape[-1]
    rng = np.random.default_rng(seed)
    # How often each problem is drawn, a resample a row: the means are then one product.
    counts = rng.multinomial(number, np.full(number, 1 / number), size=num_resamples)
    means = values @ counts.T / number
    ends = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=-1)
    return ends[0], ends[1]


def graded_summary(rows: Sequence[Mapping[str, Any]], *, confidence: float = 0.95) -> list[dict[str, Any]]:
    """Return one row a source and depth.

    Args:
        rows: Graded answers: ``source``, ``index``, ``depth``, ``sample``, ``verdict`` (``right``, ``wrong`` or
            ``unparsable``), ``num_tokens``, and ``majority_right`` where there are several samples. Every problem of a
            source has an answer at each of its depths, with as many samples.
        confidence: Of the intervals.

    Returns:
        ``source``, ``depth``, ``num_problems``; ``accuracy`` (mean over problems and samples) with ``low`` and
        ``high``; ``drop``: points of accuracy below the source's best depth; ``mean_tokens`` of an answer and the share
        ``unparsable``; with S > 1 samples ``majority`` and ``pass_at_k`` for k = 2, 4, … and S.

    Raises:
        ValueError: If an answer is missing.

    Example:
        >>> row = {"source": "gsm8k", "depth": 4, "sample": 0, "num_tokens": 9}
        >>> rows = [{**row, "index": 0, "verdict": "right"}, {**row, "index": 1, "verdict": "wrong"}]
        >>> graded_summary(rows)[0]["accuracy"]
        0.5
    """
    summary: list[dict[str, Any]] = []
    for source in dict.fromkeys(str(row["source"]) for row in rows):
        own = [row for row in rows if row["source"] == source]
        depths, problems = (sorted({int(row[name]) for row in own}) for name in ("depth", "index"))
        num_samples = 1 + max(int(row["sample"]) for row in own)
        shape = (len(depths), len(problems), num_samples)
        right, tokens, unparsable = (np.zeros(shape) for _ in range(3))
        is_there, majority = np.zeros(shape, dtype=bool), np.zeros(shape[:2])
        places = {
            name: {value: i for i, value in enumerate(values)}
            for name, values in (("depth", depths), ("index", problems))
        }
        for row in own:
            where = places["depth"][int(row["depth"])], places["index"][int(row["index"])]
            is_there[where][int(row["sample"])] = True
            right[where][int(row["sample"])] = row["verdict"] == "right"
            unparsable[where][int(row["sample"])] = row["verdict"] == "unparsable"
            tokens[where][int(row["sample"])] = row["num_tokens"]
            majority[where] = bool(row.get("majority_right", False))
        if not is_there.all():
            k, i, sample = np.argwhere(~is_there)[0]
            raise ValueError(
                f"`rows` must hold every answer, {(~is_there).sum()} are missing: problem {problems[i]} of {source!r} "
                f"has none at depth {depths[k]}, sample {sample}."
            )
        accuracy = right.mean(2)
        low, high = bootstrap_interval(accuracy, confidence=confidence)
        means = accuracy.mean(1)
        for k, depth in enumerate(depths):
            line = {
                "source": source,
                "depth": depth,
                "num_problems": len(problems),
                "accuracy": float(means[k]),
                "low": float(low[k]),
                "high": float(high[k]),
                "drop": float(100 * (means.max() - means[k])),
                "mean_tokens": float(tokens[k].mean()),
                "unparsable": float(unparsable[k].mean()),
            }
            if num_samples > 1:
                line["majority"] = float(majority[k].mean())
                tries = [2**i for i in range(1, num_samples.bit_length()) if 2**i < num_samples] + [num_samples]
                hits = right[k].sum(1).astype(int)
                line |= {f"pass_at_{t}": float(np.mean([pass_at_k(num_samples, c, t) for c in hits])) for t in tries}
            summary.append(line)
    return summary
