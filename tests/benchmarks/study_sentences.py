"""The numbers in the README's sentences about the study, from its rows. No training, a second. Use:

python -m tests.benchmarks.study_sentences [ROWS.csv]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from scipy.stats import spearmanr

from looplm.commands.curves import Curve, Group
from looplm.commands.rows import read_rows

PLACEMENTS = {
    "pre_norm": "Pre-Norm",
    "sandwich_branch": "Pre-Sandwich",
    "post_norm": "Post-Norm",
    "sandwich_dual": "Post-Sandwich",
}
NORMS = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm", "simple_norm": "SimpleNorm"}
SEEDS = (0, 1, 2)


def percent_of_peak(run: Curve, depth: int) -> float:
    return 100 * run.exact_match[run.depths.index(depth)] / max(run.exact_match)


def _spread(values: tuple[float, float, float] | None, form: str) -> str:
    assert values is not None
    return f"{values[0]:{form}} ({values[1]:{form}}–{values[2]:{form}})"


def sentences(rows: Path) -> Iterator[str]:
    """Yield a line for each number or row of numbers, written as in the README."""
    runs = {run.name: run for run in read_rows(rows).values()}

    def group(*configs: str) -> Group:
        return Group(name="", runs=[runs[f"{config}_seed{seed}"] for config in configs for seed in SEEDS])

    for placement, name in PLACEMENTS.items():
        found = group(*(f"{placement}_{norm}" for norm in NORMS))
        norm, radius, gain = (
            _spread(found.deepest(quantity), form)
            for quantity, form in (("state_norm", ",.0f"), ("spectral_radius", ".2f"), ("mean_gain", ".2f"))
        )
        yield f"{name} at 128 loops: state norm {norm}, ρ {radius}, mean gain {gain}"
    for norm, name in NORMS.items():
        found = group(*(f"{placement}_{norm}" for placement in PLACEMENTS))
        left = {depth: found.spread([percent_of_peak(run, depth) for run in found.runs]) for depth in (8, 32)}
        yield f"{name} at 8 loops: {_spread(left[8], '.1f')} % of the peak; at 32 {_spread(left[32], '.1f')}"
    for depth in (32, 256):
        pairs = [[runs[f"{name}_seed{seed}"] for name in ("stars", "depth_log_normal")] for seed in SEEDS]
        gained = [percent_of_peak(stars, depth) - percent_of_peak(random, depth) for stars, random in pairs]
        yield f"STARS less log-normal depth at {depth} loops: {', '.join(f'{points:+.1f}' for points in gained)} points"
    alone = group("jsrr_only")
    yield f"JSRR alone at 32 loops: {_spread(alone.spread([percent_of_peak(run, 32) for run in alone.runs]), '.1f')} %"
    left_at_32 = {name: percent_of_peak(run, 32) for name, run in runs.items()}
    radii, gains = ({name: run.deepest(q) for name, run in runs.items()} for q in ("spectral_radius", "mean_gain"))
    for sign, is_meant in (("<", lambda radius: radius < 1), ("≥", lambda radius: radius >= 1)):
        percents = [left_at_32[name] for name, radius in radii.items() if is_meant(radius)]
        half = sum(percent >= 50 for percent in percents)
        yield f"ρ {sign} 1: at 32 loops at least half of the peak is left in {half} of {len(percents)} runs"
    for name, values in (("ρ", radii), ("the mean gain", gains)):
        correlation = spearmanr(list(values.values()), list(left_at_32.values())).statistic
        yield f"rank correlation of {name} with accuracy at 32 loops: {correlation:+.2f}"


if __name__ == "__main__":
    print("\n".join(sentences(Path(*sys.argv[1:] or ["data/study.csv"]))))
