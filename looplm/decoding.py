"""Rows of a batch that are run loop by loop and token by token, each to its own depth.

Knows the contract of looped models and exit rules; chooses no tokens. A model that can make a cache
(:class:`~looplm.loop.CachedLoopedModel`) runs only the new token; any other is run anew on the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from looplm.exits import ExitRule, LoopSignals
from looplm.loop import CachedLoopedModel, LoopedModel, LoopState

__all__ = ["Rows"]


class Rows:
    """The rows that are being continued, with their cache or, without one, their whole text.

    Args:
        model: Any looped model over token ids, in eval mode.
        tokens: Prompts, ``(R, T)``.
        attention_mask: Non-zero at real positions, ``(R, T)``; None: no padding.
        num_loops: Most loops a token can run.
        max_new_tokens: Longest continuation.
        cache: See :class:`~looplm.generation.GenerationOptions`.
        exit_rule: When a token may stop looping.

    Raises:
        ValueError: If the model cannot do what the cache or the rule asks for.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> prompts = torch.tensor([[1, 2, 3]])
        >>> rows = Rows(model.eval(), prompts, None, num_loops=4, max_new_tokens=2, cache="last", exit_rule=None)
    """

    def __init__(
        self,
        model: LoopedModel,
        tokens: Tensor,
        attention_mask: Tensor | None,
        *,
        num_loops: int,
        max_new_tokens: int,
        cache: str,
        exit_rule: ExitRule | None,
    ) -> None:
        self.model = cast(Any, model)  # a cache is no part of the contract
        self.tokens, self.mask, self.exit_rule = tokens, attention_mask, exit_rule
        self.can_cache = isinstance(model, CachedLoopedModel)
        policy = ("per_loop" if self.can_cache else "none") if cache == "auto" else cache
        if policy != "none" and not self.can_cache:
            raise ValueError(
                f"`cache: {policy}` needs a model with `make_cache`, {type(self.model).__name__} has none."
            )
        if self.exit_rule is not None and self.exit_rule.needs_gate and not hasattr(model, "exit_logit"):
            raise ValueError(f"{type(self.exit_rule).__name__} needs a model with `exit_logit`, a learned gate.")
        self.cache: Any = None
        if policy != "none":
            # The last token of a continuation is never read.
            capacity = tokens.shape[1] + max_new_tokens - 1
            self.cache = self.model.make_cache(len(tokens), capacity, num_loops, policy)

    def select(self, kept: Tensor) -> None:
        """Go on with some of the rows."""
        if self.cache is not None:
            self.cache = self.cache.select(kept)
        else:
            self.tokens, self.mask = self.tokens[kept], None if self.mask is None else self.mask[kept]

    def first(self, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Run the prompts; return the last token's logits ``(R, V)`` and loops ``(R,)``."""
        return self._loop(self._embed(self.tokens, self.mask), limits)

    def first_at(self, depths: Sequence[int]) -> Tensor:
        """Run the prompts to several depths; the rows become K · B. Returns the last tokens' logits ``(K·B, V)``."""
        batch, state, reached = len(self.tokens), self._embed(self.tokens, self.mask), []
        for depth in range(depths[-1] + 1):
            if depth in depths:
                reached.append(state)
            if depth < depths[-1]:
                state = self._step(state, self.cache)
        if self.cache is None:
            self.tokens = self.tokens.repeat(len(depths), 1)
            self.mask = None if self.mask is None else self.mask.repeat(len(depths), 1)
            return torch.cat([self._logits(state, None) for state in reached])
        self.cache = self.cache.repeat(len(depths))
        groups = torch.arange(len(depths) * batch, device=self.tokens.device).view(len(depths), batch)
        # The coda leaves other keys and values at every depth.
        return torch.cat(
            [self._logits(state, self.cache.select(group)) for state, group in zip(reached, groups, strict=True)]
        )

    def following(self, chosen: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Append a token ``(R,)`` to every row; return the next one's logits and loops."""
        if self.cache is not None:
            return self._loop(self._embed(chosen[:, None], None), limits)
        self.tokens = torch.cat([self.tokens, chosen[:, None]], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self._loop(self._embed(self.tokens, self.mask), limits)

    def _embed(self, tokens: Tensor, mask: Tensor | None) -> LoopState:
        cached = () if self.cache is None else (None, self.cache)
        state: LoopState = self.model.embed(tokens, mask, *cached)
        return state

    def _step(self, state: LoopState, cache: Any) -> LoopState:
        following: LoopState = self.model.step(state) if cache is None else self.model.step(state, cache)
        return following

    def _logits(self, state: LoopState, cache: Any) -> Tensor:
        logits: Tensor = self.model.decode(state, cache, 1) if self.can_cache else self.model.decode(state)
        return logits[:, -1]

    def _loop(self, state: LoopState, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Loop each row until its limit or its exit; rows that have stopped are no longer computed."""
        rule, cache = self.exit_rule, self.cache
        least, most = (int(bound) for bound in limits.aminmax())
        if rule is None and least == most:
            for _ in range(most):
                state = self._step(state, cache)
            return self._logits(state, cache), limits
        loops, out = limits.clone(), None
        active = torch.arange(len(limits), device=limits.device)
        watch = None if rule is None else _Watch(rule)
        for depth in range(most + 1):
            leave = limits[active] <= depth
            logits = None
            if watch is not None and depth > 0:
                logits = self._logits(state, cache) if watch.rule.needs_logits else None
                gate = self.model.exit_logit(state)[:, -1] if watch.rule.needs_gate else None
                wants = watch(depth, state, logits, gate) & ~leave
                if bool(wants.any()) and cache is not None:
                    cache.select(wants.nonzero().squeeze(1)).fill_skipped(depth)
                leave = leave | wants
            if bool(leave.any()):
                going = leave.nonzero().squeeze(1)
                if logits is None:
                    everyone = len(going) == len(active)
                    part = state if everyone else state.select(going)
                    chosen = self._logits(part, cache if everyone or cache is None else cache.select(going))
                else:
                    chosen = logits[going]
                out = chosen.new_zeros(len(limits), chosen.shape[-1]) if out is None else out
                out[active[going]] = chosen
                loops[active[going]] = depth
                kept = (~leave).nonzero().squeeze(1)
                if len(kept) == 0:
                    break
                active, state = active[kept], state.select(kept)
                cache = None if cache is None else cache.select(kept)
                if watch is not None:
                    watch.select(kept)
            if watch is not None:
                watch.before(state)
            state = self._step(state, cache)
        assert out is not None, "every row has a limit"
        return out, loops


class _Watch:
    """What an exit rule has to remember of the active rows, and of which of their tokens it is asked.

    A rule that reads states alone is asked of every token that is run, and a row stops where all may: whatever follows
    reads the keys and values of a whole prompt, of which the last token may be done long before the others. Logits and
    gates are those of the last token.
    """

    def __init__(self, rule: ExitRule) -> None:
        self.rule = rule
        self.reads_all = not (rule.needs_logits or rule.needs_gate)
        self.previous: Tensor | None = None
        self.logits: Tensor | None = None
        self.survival: Tensor | None = None

    def before(self, state: LoopState) -> None:
        self.previous = self._tokens(state)

    def __call__(self, depth: int, state: LoopState, logits: Tensor | None, gate: Tensor | None) -> Tensor:
        hidden = self._tokens(state)
        if gate is not None:
            # 1 − σ(g) = σ(−g), which does not round to 0; in bfloat16 σ(6.25) would already be 1.
            stay = (-gate.to(torch.promote_types(gate.dtype, torch.float32))).sigmoid()
            self.survival = stay if self.survival is None else self.survival * stay
        assert self.previous is not None, "a step comes first"
        signals = LoopSignals(
            depth=depth,
            previous=self.previous.flatten(0, 1),
            hidden=hidden.flatten(0, 1),
            logits=logits,
            previous_logits=self.logits,
            survival=self.survival,
        )
        self.logits = logits
        may_stop = self.rule(signals).view(hidden.shape[:2])
        real = state.context.get("attention_mask")
        if real is not None and real.shape == may_stop.shape:
            may_stop = may_stop | ~real.bool()
        wants = may_stop.all(1)
        return wants if depth >= self.rule.min_loops else torch.zeros_like(wants)

    def select(self, kept: Tensor) -> None:
        self.logits = None if self.logits is None else self.logits[kept]
        self.survival = None if self.survival is None else self.survival[kept]

    def _tokens(self, state: LoopState) -> Tensor:
        """Return the states that the rule is asked of, ``(R, T, D)``; of states without a token dimension T is 1."""
        leaves: list[Tensor] = pytree.tree_leaves(state.hidden)
        if all(leaf.ndim > 2 for leaf in leaves):
            chosen = leaves if self.reads_all else [leaf[:, -1:] for leaf in leaves]
            return torch.cat([leaf.flatten(2) for leaf in chosen], dim=-1)
        return torch.cat([(leaf[:, -1] if leaf.ndim > 2 else leaf).flatten(1) for leaf in leaves], dim=1)[:, None]
