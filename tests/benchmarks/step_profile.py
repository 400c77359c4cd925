"""Where the time of a STARS step goes, by operation."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from .training_step import STARS, addition_model, model_step

__all__ = ["step_profile"]


def step_profile(width: int, num_steps: int) -> str:
    """Return torch's table of operations, the largest share of the CPU's own time first."""
    step = model_step(addition_model(width), STARS)
    step()  # warm up
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(num_steps):
            step()
    return recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=48)
