"""Batched generation: greedy or drawn, streamed, with exits, at one depth or many.

Knows the contract of looped models, not the transformer; how rows are run with or without a cache stands in
:mod:`looplm.decoding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.cache import kept_loops
from looplm.config import LoopedConfig
from looplm.decoding import Rows
from looplm.exits import ExitRule
from looplm.loop import LoopedModel, check_depths
from looplm.sampling import Sampling

__all__ = [
    "Generation",
    "GenerationOptions",
    "TokenStep",
    "generate",
    "generate_at_depths",
    "generate_with_loops",
    "stream_tokens",
]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a batch is continued.

    Raises:
        ValueError: If a value is outside its range or has no effect.

    Example:
        >>> GenerationOptions(num_loops=8, max_new_tokens=16, end_id=2, temperature=0.7).sampling().temperature
        0.7
    """

    num_loops: int
    """Depth of every token, or the greatest where there is an exit."""
    max_new_tokens: int
    """Longest continuation."""
    end_id: int
    """Id that ends a continuation; −1: none does."""
    cache: str = "auto"
    """``per_loop`` (exact), ``last``, ``ring(k)``, ``none``; ``auto``: ``per_loop`` where the model can, else none."""
    exit_rule: ExitRule | None = None
    """When a token may stop looping. A prompt stops as a whole: where all its tokens may, if the rule reads states
    alone; else along with its last token."""
    temperature: float = 0.0
    """0: greedy; see :class:`~looplm.sampling.Sampling`."""
    top_k: int | None = None
    """See :class:`~looplm.sampling.Sampling`."""
    top_p: float | None = None
    """See :class:`~looplm.sampling.Sampling`."""
    seed: int = 0
    """See :class:`~looplm.sampling.Sampling`."""
    stop: Sequence[Sequence[int]] = ()
    """Sequences of ids that end a continuation as ``end_id`` does; they stay in it."""

    def __post_init__(self) -> None:
        for name in ("num_loops", "max_new_tokens", "end_id"):
            if not _is_integer(getattr(self, name)):
                raise ValueError(f"`{name}` must be an integer, got {getattr(self, name)!r}.")
        if self.max_new_tokens < 1 or self.num_loops < 0:
            raise ValueError(
                f"`max_new_tokens` must be >= 1 and `num_loops` >= 0, got {self.max_new_tokens} and {self.num_loops}."
            )
        if not isinstance(self.stop, Sequence) or not all(map(_is_stop, self.stop)):
            raise ValueError(f"`stop` must hold sequences of at least one id, got {self.stop!r}.")
        if self.cache not in ("auto", "none"):
            kept_loops(self.cache, self.num_loops)
        self.sampling()

    def sampling(self) -> Sampling:
        """Return how tokens are chosen."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_stop(sequence: object) -> bool:
    return isinstance(sequence, Sequence) and len(sequence) > 0 and all(map(_is_integer, sequence))


@dataclass(frozen=True, kw_only=True)
class TokenStep:
    """One token of every row.

    Example:
        >>> finished = torch.tensor([False, True])
        >>> step = TokenStep(tokens=torch.tensor([5, 2]), loops=torch.tensor([3, 8]), finished=finished)
        >>> step.loops.tolist()
        [3, 8]
    """

    tokens: Tensor
    """int64 ``(B,)``; ``end_id`` in rows that had ended before."""
    loops: Tensor
    """Loops that each token took, int64 ``(B,)``; 0 in rows that had ended before."""
    finished: Tensor
    """Which rows have ended, bool ``(B,)``."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Continuations and what they cost.

    Example:
        >>> Generation(tokens=torch.tensor([[5, 2, 2]]), loops=torch.tensor([[3, 5, 0]])).mean_loops
        4.0
    """

    tokens: Tensor
    """int64 ``(B, N)``; after its end a row holds ``end_id``."""
    loops: Tensor
    """Loops that each token took, int64 ``(B, N)``; 0 after a row's end."""

    @property
    def mean_loops(self) -> float:
        """Mean over the tokens that were generated."""
        return (self.loops.sum() / (self.loops > 0).sum().clamp_min(1)).item()


def generate(
    model: LoopedModel,
    tokens: Tensor,
    *,
    num_loops: int,
    max_new_tokens: int,
    end_id: int,
    attention_mask: Tensor | None = None,
    cache: str = "auto",
    exit_rule: ExitRule | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Continue a batch of prompts. For loops used see :func:`generate_with_loops`, for streaming :func:`stream_tokens`.

    Args:
        model: Any looped model over token ids, in eval mode.
        tokens: Prompts, int64 ``(B, T)``, padded on the left where ``attention_mask`` ``(B, T)`` is zero.
        num_loops: Depth of every token, or the greatest where there is an exit.
        max_new_tokens: Longest continuation.
        end_id: Id that ends a continuation; −1: none does.
        attention_mask: Non-zero at real positions; None: no padding.
        cache: ``per_loop`` (exact), ``last``, ``ring(k)``, ``none``, or ``auto``: ``per_loop`` where the model can.
        exit_rule: When a token may stop looping.
        temperature: 0: greedy.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the fewest tokens whose probability reaches p.
        seed: Seed of the draws.
        stop: Sequences of ids that end a continuation as ``end_id`` does; they stay in it.

    Returns:
        The continuations, int64 ``(B, N)``, N ≤ ``max_new_tokens``; after its end a row holds ``end_id``.

    Raises:
        ValueError: If a value is outside its range or has no effect, the padding is not on the left, the model is not
            in evaluation mode, or it cannot take that many tokens.

    Example:
        >>> from looplm import LoopedTransformer, ResidualExit
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> rule = ResidualExit(0.05)
        >>> tokens = generate(model.eval(), prompts, num_loops=8, max_new_tokens=4, end_id=0, exit_rule=rule)
        >>> tokens.shape[0]
        2
    """
    options = GenerationOptions(
        num_loops=num_loops,
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        cache=cache,
        exit_rule=exit_rule,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    return generate_with_loops(model, tokens, options, attention_mask).tokens


def generate_with_loops(
    model: LoopedModel, tokens: Tensor, options: GenerationOptions, attention_mask: Tensor | None = None
) -> Generation:
    """Continue a batch of prompts and report the loops that every token took; see :func:`generate`.

    Example:
        >>> from looplm import KLExit, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> options = GenerationOptions(num_loops=8, max_new_tokens=4, end_id=0, exit_rule=KLExit(0.01))
        >>> result = generate_with_loops(model.eval(), torch.tensor([[1, 2, 3]]), options)
        >>> 1 <= result.mean_loops <= 8
        True
    """
    steps = list(stream_tokens(model, tokens, options, attention_mask))
    return Generation(
        tokens=torch.stack([step.tokens for step in steps], dim=1),
        loops=torch.stack([step.loops for step in steps], dim=1),
    )


def stream_tokens(
    model: LoopedModel,
    tokens: Tensor,
    options: GenerationOptions,
    attention_mask: Tensor | None = None,
    row_keys: Tensor | None = None,
) -> Iterator[TokenStep]:
    """Return an iterator over the next token of every row, each as soon as it is known; see :func:`generate`.

    ``row_keys`` names each row in the draws, int64 ``(B,)``; None: its place in the batch.

    Example:
        >>> from looplm import LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> options = GenerationOptions(num_loops=4, max_new_tokens=3, end_id=0)
        >>> for step in stream_tokens(model.eval(), torch.tensor([[1, 2]]), options):
        ...     assert step.tokens.shape == (1,)
    """
    _check_padding(tokens, attention_mask)
    lengths = _lengths(tokens, options.max_new_tokens)
    rows = _rows(model, tokens, attention_mask, options, lengths)
    limits = torch.full((len(tokens),), options.num_loops, device=tokens.device)
    with torch.no_grad():
        logits, loops = rows.first(limits)
    keys = torch.arange(len(tokens)) if row_keys is None else row_keys
    return _continue(rows, logits, loops, limits, options, keys, lengths)


def generate_at_depths(
    model: LoopedModel,
    tokens: Tensor,
    *,
    depths: Sequence[int],
    max_new_tokens: int,
    end_id: int,
    attention_mask: Tensor | None = None,
    stop: Sequence[Sequence[int]] = (),
    temperature: float = 0.0,
    seed: int = 0,
    row_keys: Tensor | None = None,
    row_limits: Tensor | None = None,
) -> Tensor:
    """Continue a batch of prompts at K depths, which share one pass over the prompt.

    With a cache the prompt is run once, to the greatest depth; what loop t leaves in it does not depend on how many
    loops follow. Then all K · B rows are decoded as one batch, each to its own depth.

    Args:
        model: Any looped model over token ids, in eval mode.
        tokens: Prompts, int64 ``(B, T)``, padded on the left.
        depths: K strictly increasing depths.
        max_new_tokens: Longest continuation.
        end_id: Id that ends a continuation; −1: none does.
        attention_mask: Non-zero at real positions; None: no padding.
        stop: Sequences of ids that end a continuation.
        temperature: 0: greedy; see :class:`~looplm.sampling.Sampling`. Draws are the same at all depths.
        seed: Seed of the draws.
        row_keys: Names each row in the draws, int64 ``(B,)``; None: its place in the batch.
        row_limits: Longest continuation of each row, int64 ``(B,)``; None: ``max_new_tokens``. A row that reaches it
            holds ``end_id`` from there on.

    Returns:
        int64 ``(K, B, N)``; after its end a row holds ``end_id``.

    Raises:
        ValueError: If ``depths`` is empty, negative or not strictly increasing, or a value is out of its range.

    Example:
        >>> from looplm import LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> generate_at_depths(model.eval(), prompts, depths=[1, 4], max_new_tokens=2, end_id=0).shape[:2]
        torch.Size([2, 2])
    """
    depths = check_depths("depths", depths)
    options = GenerationOptions(
        num_loops=depths[-1],
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        stop=stop,
        temperature=temperature,
        seed=seed,
    )
    _check_padding(tokens, attention_mask)
    lengths = _lengths(tokens, max_new_tokens, row_limits)
    rows = _rows(model, tokens, attention_mask, options, lengths)
    limits = torch.tensor(depths, device=tokens.device).repeat_interleave(len(tokens))
    with torch.no_grad():
        logits = rows.first_at(depths)
    keys = torch.arange(len(tokens)) if row_keys is None else row_keys.cpu()
    named = (keys.repeat(len(depths)), lengths.repeat(len(depths)))
    steps = list(_continue(rows, logits, limits, limits, options, *named))
    return torch.stack([step.tokens for step in steps], dim=1).view(len(depths), len(tokens), -1)


def _lengths(tokens: Tensor, max_new_tokens: int, row_limits: Tensor | None = None) -> Tensor:
    """Return the longest continuation of each row, ``(B,)``."""
    if row_limits is None:
        return torch.full(tokens.shape[:1], max_new_tokens, device=tokens.device)
    if row_limits.shape != tokens.shape[:1] or bool(((row_limits < 1) | (row_limits > max_new_tokens)).any()):
        raise ValueError(
            f"`row_limits` must be {tuple(tokens.shape[:1])}, each from 1 to `max_new_tokens` ({max_new_tokens}), got "
            f"{row_limits.tolist()}."
        )
    return row_limits.to(tokens.device)


def _rows(
    model: LoopedModel,
    tokens: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    lengths: Tensor,
) -> Rows:
    _check_request(model, tokens, attention_mask, lengths)
    return Rows(
        model,
        tokens,
        attention_mask,
        num_loops=options.num_loops,
        max_new_tokens=options.max_new_tokens,
        cache=options.cache,
        exit_rule=options.exit_rule,
    )


def _check_request(model: LoopedModel, tokens: Tensor, attention_mask: Tensor | None, lengths: Tensor) -> None:
    """Refuse, before anything is computed, what would fail on the way or go wrong in silence."""
    if getattr(model, "training", False):
        raise ValueError("the model must be in evaluation mode to generate: call `model.eval()`.")
    integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.ndim != 2 or tokens.numel() == 0 or not integers:
        raise ValueError(
            f"`tokens` must be integers (B, T) with at least one row and one token, got {tokens.dtype} "
            f"{tuple(tokens.shape)}."
        )
    config = getattr(model, "config", None)
    if not isinstance(config, LoopedConfig):
        return
    least, most = (int(bound) for bound in tokens.aminmax())
    if least < 0 or most >= config.vocab_size:
        raise ValueError(f"`tokens` must be in [0, {config.vocab_size}) (`vocab_size`), got {least} to {most}.")
    prompts = torch.full_like(lengths, tokens.shape[1])
    if attention_mask is not None and attention_mask.shape == tokens.shape:
        prompts = (attention_mask != 0).sum(1)  # padding has no position
    worst = int((prompts + lengths).argmax())
    prompt, length = int(prompts[worst]), int(lengths[worst])
    # The last token of a continuation is never read.
    if prompt + length - 1 > config.max_positions:
        raise ValueError(
            f"a sequence may have {config.max_positions} tokens (`max_positions`), got a prompt of {prompt} and "
            f"`max_new_tokens` {length}."
        )


def _check_padding(tokens: Tensor, attention_mask: Tensor | None) -> None:
    if attention_mask is not None and attention_mask.shape == tokens.shape and not bool(attention_mask[:, -1].all()):
        raise ValueError("prompts must be padded on the left: `attention_mask` is zero at the last token of a row.")


@torch.no_grad()
def _continue(
    rows: Rows,
    logits: Tensor,
    loops: Tensor,
    limits: Tensor,
    options: GenerationOptions,
    keys: Tensor,
    lengths: Tensor,
) -> Iterator[TokenStep]:
    """Yield tokens, from the logits that choose the first ones on; rows that have ended are no longer computed."""
    sample, num_rows, device = options.sampling(), len(logits), logits.device
    live = torch.arange(num_rows, device=device)
    written = torch.empty(num_rows, 0, dtype=torch.long, device=device)
    for place in range(options.max_new_tokens):
        chosen = sample(logits, keys[live.cpu()], place)
        written = torch.cat([written, chosen[:, None]], dim=1)
        ended = chosen == options.end_id
        for sequence in options.stop:
            if len(sequence) <= written.shape[1]:
                ended |= (written[:, -len(sequence) :] == torch.tensor(sequence, device=device)).all(1)
        tokens = torch.full((num_rows,), options.end_id, device=device).index_copy(0, live, chosen)
        used = torch.zeros(num_rows, dtype=torch.long, device=device).index_copy(0, live, loops)
        finished = torch.ones(num_rows, dtype=torch.bool, device=device).index_copy(0, live, ended)
        yield TokenStep(tokens=tokens, loops=used, finished=finished)
        left = ended | (lengths[live] == place + 1)
        if bool(left.all()):
            return
        if bool(left.any()):
            kept = (~left).nonzero().squeeze(1)
            live, chosen, written, limits = live[kept], chosen[kept], written[kept], limits[kept]
            rows.select(kept)
        logits, loops = rows.following(chosen, limits)
