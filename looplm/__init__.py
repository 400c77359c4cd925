"""looplm: train, measure and serve looped language models that hold their accuracy at any depth.

A looped model is three functions: ``embed`` makes the latent state, ``step`` applies the shared block once, ``decode``
reads logits off a state. All the rest is written against those three, so a model of your own that has them gets all of
it. ``help(looplm.NAME)`` says what a name takes and shows it in an example; ``python -m looplm`` lists the commands.

Contract
    LoopedModel, LoopState, unroll         the three functions, what they pass on, and the loop
    CachedLoopedModel, LoopKVCache         the same with keys and values kept by loop
    LoopedConfig, LoopedTransformer        our own such model, and its architecture as data
    from_pretrained, save_pretrained       a Hugging Face directory in and out (Ouro, Huginn, our own)

Train
    LoopLM, MuonAdamW, ShardedStrategy     the LightningModule; an optimiser; FSDP 2
    ArithmeticDataModule, MathDataModule   sums made by index; corpora of problems and solutions
    STARSObjective                         cross-entropy and a penalty, at a depth that is drawn
    Penalty                                to subclass: JacobianPenalty, LastStepPenalty, StarsReleasePenalty
    SettlingPenalty                        in a penalty's place: the residual learns to tell when a token is done
    DepthSampler                           to subclass: FixedDepth, UniformDepth, PoissonDepth, LogNormalDepth,
                                           LogUniformDepth; ScheduledDepth of DepthStage follows the steps
    NonFiniteGuard, SaveOnSignal, ProgressLines, ThroughputMeter
                                           callbacks for any Lightning project

Measure
    predictions_at_depths, log_likelihoods_at_depths
                                           what every depth says of given tokens, in one pass
    DepthExactMatch, DepthTokenAccuracy, DepthSettling
                                           metrics by depth
    DepthAccuracyCurve, GradedAnswers, LatentDynamicsMonitor, StabilityWarning
                                           callbacks that draw curves by depth, grade answers, watch the latent state
    mean_gain, spectral_norm, spectral_radius
                                           how much a step stretches perturbations, estimated
    leading_eigenvalues, exact_spectrum    the same from eigenvalues

Generate
    generate, generate_with_loops, generate_at_depths, stream_tokens
                                           one depth, with the loops told, many depths at once, token by token
    GenerationOptions, Generation, TokenStep
                                           what they take and give
    ExitRule                               to subclass, reads LoopSignals: ResidualExit, KLExit, EntropyExit,
                                           ConfidenceExit, GateExit; exit_distribution
    inspect_depths, inspect_exits          one problem's answer by depth and by exit

Example:
    >>> import looplm, torch
    >>> config = looplm.LoopedConfig(vocab_size=11, max_positions=16, width=16, num_heads=2, ffn_width=32)
    >>> model, prompt = looplm.LoopedTransformer(config).eval(), torch.tensor([[3, 1, 4]])
    >>> [state.depth for state in looplm.unroll(model, model.embed(prompt), 3)]
    [0, 1, 2, 3]
    >>> looplm.generate_at_depths(model, prompt, depths=[1, 4, 16], max_new_tokens=5, end_id=-1).shape
    torch.Size([3, 1, 5])
    >>> state = model.embed(prompt)
    >>> def step_fn(hidden):
    ...     return model.step(looplm.LoopState(hidden, state.context, state.depth)).hidden
    >>> looplm.mean_gain(step_fn, state.hidden, generator=torch.Generator()).value.shape
    torch.Size([1])

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
    "DepthStage": "looplm.depth",
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
    "LoopSignals": "looplm.exits",
    "LoopState": "looplm.loop",
    "LoopedConfig": "looplm.config",
    "LoopedModel": "looplm.loop",
    "LoopedTransformer": "looplm.model",
    "MathDataModule": "looplm.corpora.mathematics",
    "MuonAdamW": "looplm.optimizers",
    "NonFiniteGuard": "looplm.callbacks.non_finite",
    "Penalty": "looplm.stability.penalty",
    "PoissonDepth": "looplm.depth",
    "ProgressLines": "looplm.callbacks.progress_lines",
    "ResidualExit": "looplm.exits",
    "STARSObjective": "looplm.objective",
    "SaveOnSignal": "looplm.callbacks.preemption",
    "ScheduledDepth": "looplm.depth",
    "ShardedStrategy": "looplm.strategy",
    "SettlingPenalty": "looplm.stability.settling",
    "StabilityWarning": "looplm.callbacks.stability_warning",
    "StarsReleasePenalty": "looplm.stability.penalty",
    "ThroughputMeter": "looplm.callbacks.throughput",
    "TokenStep": "looplm.generation",
    "UniformDepth": "looplm.depth",
    "exact_spectrum": "looplm.stability.spectra",
    "exit_distribution": "looplm.exits",
    "from_pretrained": "looplm.checkpoints",
    "generate": "looplm.generation",
    "generate_at_depths": "looplm.generation",
    "generate_with_loops": "looplm.generation",
    "inspect_depths": "looplm.inspection",
    "inspect_exits": "looplm.inspection",
    "leading_eigenvalues": "looplm.stability.spectra",
    "log_likelihoods_at_depths": "looplm.scoring",
    "mean_gain": "looplm.stability.estimators",
    "predictions_at_depths": "looplm.scoring",
    "save_pretrained": "looplm.checkpoints",
    "spectral_norm": "looplm.stability.estimators",
    "spectral_radius": "looplm.stability.estimators",
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
        DepthStage,
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
        LoopSignals,
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
    from looplm.stability.estimators import mean_gain, spectral_norm, spectral_radius
    from looplm.stability.penalty import JacobianPenalty, LastStepPenalty, Penalty, StarsReleasePenalty
    from looplm.stability.settling import SettlingPenalty
    from looplm.stability.spectra import exact_spectrum, leading_eigenvalues
    from looplm.strategy import ShardedStrategy


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'looplm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
