"""Where the time of a step goes, by kind of operation: the authors' procedure beside ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from .training_step import SPARING, addition_model, authors_step, model_step

__all__ = ["kind_of", "step_profile"]

# The first whose word is in the name of an operation takes it.
_KINDS = {
    "attention kernels": ("scaled_dot_product", "softmax", "masked_fill"),
    "matrix products": ("mm",),
    "norm kernels": ("native_layer_norm",),
    "GELU kernels": ("gelu",),
    "copies": ("copy_", "::cat", "fill_", "zero"),
    "optimiser": ("Optimizer.",),
    "sums and other arithmetic": ("::add", "::mul", "::sub", "::div", "::sum", "::exp", "::neg", "::pow", "::sqrt"),
}
_REST = "the rest"


def kind_of(operation: str) -> str:
    """Return the kind of an operation of torch's profile."""
    return next((kind for kind, words in _KINDS.items() if any(word in operation for word in words)), _REST)


def _kind(event: FunctionEvent) -> str:
    """Return the kind of an event: what an optimiser calls is the optimiser's."""
    above: FunctionEvent | None = event
    while above is not None:
        if kind_of(above.name) == "optimiser":
            return "optimiser"
        above = above.cpu_parent
    return kind_of(event.name)


def _milliseconds(step: Callable[[], None], num_steps: int) -> Counter[str]:
    """Return the CPU's own time of a step by kind."""
    step()  # warm up
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(num_steps):
            step()
    spent: Counter[str] = Counter()
    for event in recorded.events():
        spent[_kind(event)] += event.self_cpu_time_total / 1000 / num_steps
    return spent


def step_profile(width: int, num_steps: int) -> str:
    """Return a Markdown table: milliseconds and shares of both steps."""
    model = addition_model(width)
    before, after = (_milliseconds(step, num_steps) for step in (authors_step(model), model_step(model, SPARING)))
    lines = [f"| width {width} | the authors' procedure (ms) | % | STARS step (ms) | % |", "|---|---|---|---|---|"]
    for kind in (*_KINDS, _REST):
        cells = (f"{spent[kind]:.1f} | {100 * spent[kind] / spent.total():.0f}" for spent in (before, after))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines.append(f"| together | {before.total():.1f} | 100 | {after.total():.1f} | 100 |")
    return "\n".join(lines)
