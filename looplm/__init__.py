"""looplm: train, measure and serve looped language models that hold their accuracy at any depth.

Every public name loads its module when it is first used, so that ``import looplm`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ArithmeticDataModule": "looplm.corpora.arithmetic",
    "CachedLoopedModel": "looplm.loop",
    "ConfidenceExit": "looplm.exits",
    "DepthAccuracyCurve": "looplm.callbacks.depth_accuracy",
    "DepthExactMatch": "looplm.metrics",
    "DepthSampler": "looplm.depth",
    "DepthSettling": "looplm.metrics",
    "DepthTokenAccuracy": "looplm.metrics",
    "EntropyExit": "looplm.exits",
    "ExitRule": "looplm.exits",
    "FixedDepth": "looplm.depth",
    "GateExit": "looplm.exits",
    "Generation": "looplm.generation",
    "GenerationOptions": "looplm.generation",
    "GradedAnswers": "looplm.callbacks.graded_answers",
    "JacobianPenalty": "looplm.stability.penalty",
    "KLExit": "looplm.exits",
    "LastStepPenalty": "looplm.stability.penalty",
    "LatentDynamicsMonitor": "looplm.callbacks.latent_dynamics",
    "LogNormalDepth": "looplm.depth",
    "LogUniformDepth": "looplm.depth",
    "LoopKVCache": "looplm.cache",
    "LoopLM": "looplm.module",
    "LoopState": "looplm.loop",
    "LoopedConfig": "looplm.config",
    "LoopedModel": "looplm.loop",
    "LoopedTransformer": "looplm.model",
    "MathDataModule": "looplm.corpora.mathematics",
    "MuonAdamW": "looplm.optimizers",
    "NonFiniteGuard": "looplm.callbacks.non_finite",
    "PoissonDepth": "looplm.depth",
    "ProgressLines": "looplm.callbacks.progress_lines",
    "ResidualExit": "looplm.exits",
    "STARSObjective": "looplm.objective",
    "SaveOnSignal": "looplm.callbacks.preemption",
    "ScheduledDepth": "looplm.depth",
    "ShardedStrategy": "looplm.strategy",
    "StabilityWarning": "looplm.callbacks.stability_warning",
    "StarsReleasePenalty": "looplm.stability.penalty",
    "ThroughputMeter": "looplm.callbacks.throughput",
    "TokenStep": "looplm.generation",
    "UniformDepth": "looplm.depth",
    "exit_distribution": "looplm.exits",
    "from_pretrained": "looplm.checkpoints",
    "generate": "looplm.generation",
    "generate_at_depths": "looplm.generation",
    "generate_with_loops": "looplm.generation",
    "inspect_depths": "looplm.inspection",
    "inspect_exits": "looplm.inspection",
    "log_likelihoods_at_depths": "looplm.scoring",
    "predictions_at_depths": "looplm.scoring",
    "save_pretrained": "looplm.checkpoints",
    "stream_tokens": "looplm.generation",
    "unroll": "looplm.loop",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from looplm.cache import LoopKVCache
    from looplm.callbacks.depth_accuracy import DepthAccuracyCurve
    from looplm.callbacks.graded_answers import GradedAnswers
    from looplm.callbacks.latent_dynamics import LatentDynamicsMonitor
    from looplm.callbacks.non_finite import NonFiniteGuard
    from looplm.callbacks.preemption import SaveOnSignal
    from looplm.callbacks.progress_lines import ProgressLines
    from looplm.callbacks.stability_warning import StabilityWarning
    from looplm.callbacks.throughput import ThroughputMeter
    from looplm.checkpoints import from_pretrained, save_pretrained
    from looplm.config import LoopedConfig
    from looplm.corpora.arithmetic import ArithmeticDataModule
    from looplm.corpora.mathematics import MathDataModule
    from looplm.depth import (
        DepthSampler,
        FixedDepth,
        LogNormalDepth,
        LogUniformDepth,
        PoissonDepth,
        ScheduledDepth,
        UniformDepth,
    )
    from looplm.exits import (
        ConfidenceExit,
        EntropyExit,
        ExitRule,
        GateExit,
        KLExit,
        ResidualExit,
        exit_distribution,
    )
    from looplm.generation import (
        Generation,
        GenerationOptions,
        TokenStep,
        generate,
        generate_at_depths,
        generate_with_loops,
        stream_tokens,
    )
    from looplm.inspection import inspect_depths, inspect_exits
    from looplm.loop import CachedLoopedModel, LoopedModel, LoopState, unroll
    from looplm.metrics import DepthExactMatch, DepthSettling, DepthTokenAccuracy
    from looplm.model import LoopedTransformer
    from looplm.module import LoopLM
    from looplm.objective import STARSObjective
    from looplm.optimizers import MuonAdamW
    from looplm.scoring import log_likelihoods_at_depths, predictions_at_depths
    from looplm.stability.penalty import JacobianPenalty, LastStepPenalty, StarsReleasePenalty
    from looplm.strategy import ShardedStrategy


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'looplm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
