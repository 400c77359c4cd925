"""The looped transformer. Knows nothing of text, losses or training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looplm.cache import KVSlot, LoopKVCache
from looplm.config import LoopedConfig
from looplm.layers import Block, DiagonalInjection, KeptPositions, Norm, rotary_angles
from looplm.loop import Hidden, LoopState, unroll_at
from looplm.origin import Origin
from looplm.randomness import fold

__all__ = ["LoopedTransformer", "Origin"]

_NOISE_BLOCK = 16  # positions whose initial states are drawn together in evaluation
_MOST_KEPT = 0.75  # share of the positions beyond which too little is spared for a gathering and a mask


class LoopedTransformer(nn.Module):
    """A causal transformer whose core blocks are applied ``num_loops`` times: prelude, core (looped), coda.

    Fulfils :class:`~looplm.loop.CachedLoopedModel`. Shapes: token ids ``(B, T)``, latent state ``(B, T, D)``,
    logits ``(B, T, V)``.

    With ``state_init: normal`` h₀ is random. In training it is drawn from the global state, which a training step seeds
    from its key, as for dropout. In evaluation it is a fixed function of the position alone, so that an answer depends
    neither on the batch around it nor on whether a cache is used.

    Example:
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> model(torch.zeros(2, 5, dtype=torch.long), num_loops=3).shape
        torch.Size([2, 5, 11])
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.config = config
        self.origin: Origin | None = None
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        has_table = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_positions, config.width) if has_table else None
        self.dropout = nn.Dropout(config.dropout)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.num_prelude_layers))
        self.core = nn.ModuleList(Block(config) for _ in range(config.num_core_layers))
        self.coda = nn.ModuleList(Block(config) for _ in range(config.num_coda_layers))
        self.injection: nn.Linear | DiagonalInjection | None = None
        if config.input_injection == "linear":
            self.injection = nn.Linear(2 * config.width, config.width, bias=False)
        elif config.input_injection == "diagonal":
            self.injection = DiagonalInjection(config)
        self.final_norm = Norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        # No objective here trains the gate; a parameter without gradient would stop data-parallel training.
        self.exit_gate = nn.Linear(config.width, 1).requires_grad_(False) if config.exit_gate else None
        self._compiled: Callable[..., Tensor] | None = None
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        initial_hidden: Hidden | None = None,
        cache: LoopKVCache | None = None,
    ) -> LoopState:
        """Embed token ids and run the prelude.

        Args:
            inputs: Token ids, ``(B, T)``.
            attention_mask: ``(B, T)``, non-zero at real positions; padding may stand left or right. None: no padding.
                Integers number the documents of a packed row (0: padding): a token sees earlier tokens of its own
                document only, and positions begin anew in each, so that every document is computed as if alone.
            initial_hidden: h₀ in place of the config's ``state_init``, ``(B, T, D)``.
            cache: Holds the tokens before these, which ``inputs`` then continues.

        Returns:
            The state h₀ ``(B, T, D)`` and the context of every step.

        Raises:
            ValueError: If a sequence (a document, where rows are packed) is longer than ``max_positions``, the mask has
                another shape, or packed rows meet a cache.
        """
        batch, length = inputs.shape
        start = 0 if cache is None else cache.length
        if attention_mask is not None and attention_mask.shape != inputs.shape:
            raise ValueError(f"`attention_mask` must be {tuple(inputs.shape)}, got {tuple(attention_mask.shape)}.")
        real = None if attention_mask is None else attention_mask.bool()
        documents = _documents(attention_mask)
        if documents is None:
            longest = start + length
            so_far = real if cache is None else cache.extend(batch, length, real)
            mask, position_ids = _mask_and_positions(so_far, start, length, inputs.device)
            if longest > self.config.max_positions and so_far is not None:
                longest = int(position_ids.max()) + 1  # padding on the left has no position
        else:
            if cache is not None:
                raise ValueError("a cache holds one document a row, got an `attention_mask` that numbers several.")
            mask, position_ids = _mask_and_positions_of_documents(documents)
            longest = int(position_ids.max()) + 1
        if longest > self.config.max_positions:
            raise ValueError(
                f"a sequence may have {self.config.max_positions} tokens (`max_positions`), got {longest}."
            )
        context: dict[str, Any] = {"attention_mask": real, "mask": mask, "rotary": None}
        hidden = self.token_embedding(inputs)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(position_ids)
        else:
            context["rotary"] = rotary_angles(position_ids, self.config.head_width, self.config.rope_theta)
        if self.config.embedding_scale != 1.0:
            hidden = hidden * self.config.embedding_scale
        slots = [None] * len(self.prelude) if cache is None else [*map(cache.outer_slot, range(len(self.prelude)))]
        hidden = self._blocks(self.prelude, self.dropout(hidden), context, slots)
        context["injected"] = None if self.config.input_injection == "none" else hidden
        return LoopState(self._initial(hidden, position_ids) if initial_hidden is None else initial_hidden, context)

    def _initial(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """Return h₀ where the caller gives none."""
        if self.config.state_init == "embedding":
            return hidden
        if self.config.state_init == "zeros":
            return torch.zeros_like(hidden)
        std = self.config.state_init_std
        if self.training:
            return nn.init.trunc_normal_(torch.empty_like(hidden), std=std, a=-3 * std, b=3 * std)
        drawn, first = [], int(position_ids.min()) // _NOISE_BLOCK
        for block in range(first, int(position_ids.max()) // _NOISE_BLOCK + 1):
            noise = torch.empty(_NOISE_BLOCK, hidden.shape[-1])
            generator = torch.Generator().manual_seed(fold(0, "initial_state", block))
            drawn.append(nn.init.trunc_normal_(noise, std=std, a=-3 * std, b=3 * std, generator=generator))
        table = torch.cat(drawn).to(hidden)
        return table[position_ids - first * _NOISE_BLOCK].expand_as(hidden)

    def step(self, state: LoopState, cache: LoopKVCache | None = None) -> LoopState:
        """Apply Φ once: inject the input, the core blocks, ``loop_norm``; ``(B, T, D)`` to ``(B, T, D)``.

        Args:
            state: The state; pure in it where there is no cache.
            cache: What ``embed`` was given; the slots of loop ``state.depth`` are read and written.
        """
        hidden = self._inject(state)
        if cache is None:
            hidden = self._core_blocks(self.core, hidden, state.context)
        else:
            slots = [cache.core_slot(state.depth, layer) for layer in range(len(self.core))]
            hidden = self._blocks(self.core, hidden, state.context, slots)
        return state.advance(self.final_norm(hidden) if self.config.loop_norm else hidden)

    def _inject(self, state: LoopState) -> Tensor:
        hidden: Any = state.hidden
        injected = state.context["injected"]
        if isinstance(self.injection, DiagonalInjection):
            hidden = self.injection(hidden, injected)
        elif self.injection is not None:
            hidden = self.injection(torch.cat([hidden, injected], dim=-1))
        elif injected is not None:
            hidden = hidden + injected
        return cast(Tensor, hidden)

    def decode(
        self, state: LoopState, cache: LoopKVCache | None = None, logits_to_keep: int | Tensor | None = None
    ) -> Tensor:
        """Coda, final norm and head: return logits ``(B, T, V)``.

        Args:
            state: The state.
            cache: What ``embed`` was given; holds the coda's keys and values.
            logits_to_keep: Only the last that many positions, ``(B, n, V)``; or only those where a bool ``(B, T)`` is
                True, ``(N, V)`` in the order of the rows; None: all T.
        """
        hidden = self.final_norm(state.hidden) if self.config.coda_norm else state.hidden
        first = len(self.prelude)
        indices = range(first, first + len(self.coda))
        slots = [None for _ in indices] if cache is None else [cache.outer_slot(layer) for layer in indices]
        hidden = self._blocks(self.coda, hidden, state.context, slots)
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[logits_to_keep]
        elif logits_to_keep is not None:
            hidden = hidden[:, -logits_to_keep:]
        return self._read_out(hidden)

    def _read_out(self, hidden: Tensor) -> Tensor:
        if not self.config.loop_norm or len(self.coda) > 0:
            hidden = self.final_norm(hidden)
        return F.linear(hidden, self.token_embedding.weight if self.head is None else self.head.weight)

    def step_and_decode(self, state: LoopState, logits_to_keep: Tensor) -> tuple[Tensor, LoopState | None, int]:
        """Return the logits after one more step, where they are wanted, and what was run for them.

        In a training step nothing but the head and a penalty reads the last states. So the last block runs keys and
        values of all positions, and queries, output and MLP of those with a label alone, padded to as many a row; it is
        never compiled. Where few are spared, or with a coda, this is ``decode(step(state))``.

        Args:
            state: The state before the step.
            logits_to_keep: Bool ``(B, T)``, True where logits are wanted.

        Returns:
            ``(N, V)``, in the order of the rows; None and B·Q, or the whole state and B·T.
        """
        kept = KeptPositions.of(logits_to_keep)
        most = kept.index.shape[1]
        if len(self.coda) or not 0 < most <= _MOST_KEPT * logits_to_keep.shape[1]:
            last = self.step(state)
            return self.decode(last, logits_to_keep=logits_to_keep), last, logits_to_keep.numel()
        *blocks, last_block = self.core
        hidden = self._core_blocks(blocks, self._inject(state), state.context)
        hidden = self._blocks([last_block], hidden, state.context, kept=kept)[kept.real]
        for is_normed in (self.config.loop_norm, self.config.coda_norm):
            hidden = self.final_norm(hidden) if is_normed else hidden
        return self._read_out(hidden), None, kept.index.numel()

    def exit_logit(self, state: LoopState) -> Tensor:
        """Return the learned gate's ``w·h + b``, ``(B, T)``; its sigmoid is the probability to stop here.

        Raises:
            ValueError: If the model has no gate.
        """
        if self.exit_gate is None:
            raise ValueError("the model has no learned gate (`exit_gate: true` in its config).")
        gate: Tensor = self.exit_gate(state.hidden)
        return gate.squeeze(-1)

    def make_cache(self, batch_size: int, max_tokens: int, num_loops: int, policy: str = "per_loop") -> LoopKVCache:
        """Return an empty cache for ``embed``, ``step`` and ``decode``.

        Args:
            batch_size: B.
            max_tokens: Prompt and continuation, padding included.
            num_loops: Most loops that will be run.
            policy: See :class:`~looplm.cache.LoopKVCache`.
        """
        return LoopKVCache(
            num_loops=num_loops,
            num_core_layers=len(self.core),
            num_outer_layers=len(self.prelude) + len(self.coda),
            batch_size=batch_size,
            max_tokens=max_tokens,
            num_kv_heads=self.config.kv_heads,
            head_width=self.config.head_width,
            policy=policy,
            dtype=self.token_embedding.weight.dtype,
            device=self.token_embedding.weight.device,
        )

    def compile_core(self, backend: str = "inductor") -> None:
        """Let training run the core blocks through ``torch.compile``, a block a graph, whatever the number of loops.

        The number of graphs does not depend on the depths: one with gradient, one more each for the first loop of
        truncated backpropagation, the loops before it, and the penalty. Weights keep their names. Evaluation,
        generation and whatever has a cache run as before, and so do the products ``jvp`` and ``vjp``: compiled code
        has neither a forward-mode nor a second derivative.

        Args:
            backend: One of ``torch.compiler.list_backends()``.
        """
        self._compiled = torch.compile(_run_block, backend=backend)

    def forward(self, inputs: Tensor, num_loops: int, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits ``(B, T, V)`` after ``num_loops`` steps."""
        ((_, state),) = unroll_at(self, self.embed(inputs, attention_mask), [num_loops])
        return self.decode(state)

    def _core_blocks(self, blocks: Iterable[nn.Module], hidden: Tensor, context: Any) -> Tensor:
        """Run core blocks without a cache, compiled where training asks for it."""
        # Evaluation has neither; the penalty, dropout off, has gradients.
        if self._compiled is None or not (self.training or torch.is_grad_enabled()):
            return self._blocks(blocks, hidden, context)
        for block in blocks:
            hidden = self._compiled(block, hidden, context["mask"], context["rotary"])
        return hidden

    def _blocks(
        self,
        blocks: Iterable[nn.Module],
        hidden: Any,
        context: Any,
        slots: Sequence[KVSlot | None] | None = None,
        kept: KeptPositions | None = None,
    ) -> Tensor:
        """Run blocks in turn, at ``kept`` alone, where given."""
        blocks = list(blocks)
        for block, slot in zip(blocks, [None] * len(blocks) if slots is None else slots, strict=True):
            hidden = block(hidden, context["mask"], context["rotary"], slot, kept)
        return cast(Tensor, hidden)


def _run_block(block: Block, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    output: Tensor = block(hidden, mask, rotary)
    return output


def _mask_and_positions(
    real: Tensor | None, start: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Return what the last ``length`` of ``start + length`` tokens may attend to, and their positions.

    Args:
        real: ``(B, start + length)``, False at padding; None: none is.
        start: Tokens before.
        length: T.
        device: Where the result is.

    Returns:
        The mask ``(B or 1, 1, T, start + T)``, or None where the causal one is enough; position ids ``(B or 1, T)``.
    """
    # Causal attention never looks right, so only padding on the left (or inside) needs a mask of its own.
    if real is not None and bool((real[:, 1:] & ~real[:, :-1]).any()):
        position_ids = (real.long().cumsum(1) - 1).clamp(min=0)[:, start:]
        causal = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)
        # A padded query would see nothing at all, and softmax over nothing is NaN: it sees itself.
        itself = causal & ~causal.tril(start - 1)
        return (real[:, None, None, :] & causal) | itself, position_ids
    position_ids = torch.arange(start, start + length, device=device)[None]
    if start and length > 1:
        return torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)[None, None], position_ids
    return None, position_ids


def _documents(attention_mask: Tensor | None) -> Tensor | None:
    """Return the mask where it tells documents of a row apart; None where every row is one sequence."""
    if attention_mask is None or attention_mask.dtype == torch.bool or attention_mask.is_floating_point():
        return None
    # One document a row, whatever its number, is plain causal attention, for which there are faster kernels.
    first = attention_mask.amax(1, keepdim=True)
    return attention_mask if bool(((attention_mask != first) & (attention_mask != 0)).any()) else None


def _mask_and_positions_of_documents(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return block-diagonal causal attention and positions that count within each document.

    Args:
        documents: The document that each token belongs to, ``(B, T)``; 0: padding.

    Returns:
        The mask ``(B, 1, T, T)`` and position ids ``(B, T)``.
    """
    own = (documents[:, :, None] == documents[:, None, :]).tril()  # padding sees padding: never nothing at all
    return own[:, None], (own.sum(-1) - 1) * (documents != 0)
