"""Keys and values of earlier tokens, one slot for each loop and layer, allocated once.

Knows tensors and slots; no attention, no model. What is stored are keys after their bias and rotation.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KVSlot", "LoopKVCache", "kept_loops"]


def kept_loops(policy: str, num_loops: int) -> int:
    """Return how many loops' keys and values a cache policy keeps.

    Args:
        policy: ``per_loop`` (all of them: exact), ``last`` (one) or ``ring(k)`` (k, loop t in place t mod k).
        num_loops: Loops that will be run.

    Raises:
        ValueError: If the policy is none of these.

    Example:
        >>> [kept_loops(policy, 8) for policy in ("per_loop", "last", "ring(3)", "ring(20)")]
        [8, 1, 3, 8]
    """
    if policy == "per_loop":
        return max(num_loops, 1)
    if policy == "last":
        return 1
    ring = re.fullmatch(r"ring\((\d{1,9})\)", policy) if isinstance(policy, str) else None
    if ring is None or int(ring[1]) < 1:
        raise ValueError(f"`cache` must be `per_loop`, `last` or `ring(k)` with k >= 1, got {policy!r}.")
    return min(int(ring[1]), max(num_loops, 1))


@dataclass(frozen=True)
class KVSlot:
    """The keys and values of one loop and layer; see :class:`LoopKVCache`.

    Attributes:
        keys: ``(B, H, S, d)``, H key/value heads, S places for tokens.
        values: The same.
        rows: The samples that are computed now, ``(R,)``; None: all.
        start: Where the tokens that are computed now begin.

    Example:
        >>> slot = KVSlot(keys=torch.zeros(1, 2, 8, 4), values=torch.zeros(1, 2, 8, 4), rows=None, start=3)
        >>> keys, values = slot.append(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))  # the fourth token
        >>> keys.shape
        torch.Size([1, 2, 4, 4])
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None
    start: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of the new tokens, ``(R, H, T, d)``; return those of all tokens so far, ``(R, H, S', d)``."""
        end = self.start + keys.shape[2]
        if self.rows is None:
            self.keys[:, :, self.start : end] = keys
            self.values[:, :, self.start : end] = values
            return self.keys[:, :, :end], self.values[:, :, :end]
        self.keys[self.rows, :, self.start : end] = keys
        self.values[self.rows, :, self.start : end] = values
        return self.keys[self.rows, :, :end], self.values[self.rows, :, :end]


class LoopKVCache:
    """Preallocated keys and values of a looped model: slot = loop · layers + layer, then the layers outside the loop.

    A token in loop t attends to what earlier tokens left in the slots of loop t. With the policy ``per_loop`` every
    loop has slots of its own and decoding is exact. With ``ring(k)`` loop t uses the slots of loop t mod k: memory of k
    loops; what earlier tokens left there is from their latest loop with the same remainder. ``last`` is ``ring(1)``.
    Both are exact only for k ≥ ``num_loops``; elsewhere what they cost depends on the model, see ``python -m looplm
    exits``: one whose input enters once, before the loop, can lose everything, because a new token's first loops then
    no longer meet the earlier tokens' first states.

    Args:
        num_loops: Most loops that can be run.
        num_core_layers: Layers inside the loop.
        num_outer_layers: Layers before and after it.
        batch_size: B.
        max_tokens: S, the most tokens a row can have, padding included.
        num_kv_heads: H.
        head_width: d.
        policy: ``per_loop``, ``last`` or ``ring(k)``.
        dtype: Of keys and values.
        device: Where they are.

    Raises:
        ValueError: If a count is out of its range or the policy is unknown.

    Example:
        >>> cache = LoopKVCache(num_loops=4, num_core_layers=3, num_outer_layers=0, batch_size=2, max_tokens=8,
        ...                     num_kv_heads=2, head_width=16)
        >>> cache.keys.shape
        torch.Size([12, 2, 2, 8, 16])
    """

    def __init__(
        self,
        *,
        num_loops: int,
        num_core_layers: int,
        num_outer_layers: int,
        batch_size: int,
        max_tokens: int,
        num_kv_heads: int,
        head_width: int,
        policy: str = "per_loop",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, least in (
            ("num_loops", num_loops, 0),
            ("batch_size", batch_size, 1),
            ("max_tokens", max_tokens, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be >= {least}, got {value}.")
        self.policy, self.num_loops, self.num_core_layers = policy, num_loops, num_core_layers
        self.num_kept = kept_loops(policy, num_loops)
        shape = (
            self.num_kept * num_core_layers + num_outer_layers,
            batch_size,
            num_kv_heads,
            max_tokens,
            head_width,
        )
        # Zeros, not garbage: a masked key still enters the sum, and 0 · NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.real = torch.ones(batch_size, max_tokens, dtype=torch.bool, device=device)
        self.has_padding = False
        self.rows: Tensor | None = None
        self.start = self.length = 0

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    @property
    def exact(self) -> bool:
        """Whether cached decoding equals decoding without a cache."""
        return self.num_kept >= self.num_loops

    def core_slot(self, loop: int, layer: int) -> KVSlot:
        """Return the slot of a layer in a loop (counted from 0).

        Raises:
            ValueError: If the cache was made for fewer loops.
        """
        if loop >= self.num_loops:
            raise ValueError(f"the cache was made for `num_loops` {self.num_loops}, got a step after {loop} loops.")
        return self._slot((loop % self.num_kept) * self.num_core_layers + layer)

    def outer_slot(self, layer: int) -> KVSlot:
        """Return the slot of a layer outside the loop, prelude first."""
        return self._slot(self.num_kept * self.num_core_layers + layer)

    def _slot(self, index: int) -> KVSlot:
        return KVSlot(self.keys[index], self.values[index], self.rows, self.start)

    def extend(self, num_rows: int, num_tokens: int, real: Tensor | None) -> Tensor | None:
        """Make room for the next tokens.

        Args:
            num_rows: Rows of the batch that is computed now.
            num_tokens: T new tokens a row.
            real: ``(R, T)``, False at padding; None: none is.

        Returns:
            Which tokens so far are real, ``(R, S')``; None where all are.

        Raises:
            ValueError: If they do not fit.
        """
        expected = len(self.real) if self.rows is None else len(self.rows)
        end = self.length + num_tokens
        if num_rows != expected or end > self.real.shape[1]:
            raise ValueError(
                f"the cache holds {expected} rows of at most {self.real.shape[1]} tokens, got {num_rows} rows and "
                f"token {end}."
            )
        self.start, self.length = self.length, end
        rows = slice(None) if self.rows is None else self.rows
        if real is not None and not bool(real.all()):
            self.has_padding = True
            self.real[rows, self.start : end] = real
        return self.real[rows, :end] if self.has_padding else None

    def select(self, rows: Tensor) -> LoopKVCache:
        """Return a view of the rows ``(R,)`` on the same memory, at the same token."""
        view = copy.copy(self)
        view.rows = rows if self.rows is None else self.rows[rows]
        return view

    def repeat(self, times: int) -> LoopKVCache:
        """Return a copy whose batch is this one ``times`` times over."""
        twin = copy.copy(self)
        twin.keys, twin.values = self.keys.repeat(1, times, 1, 1, 1), self.values.repeat(1, times, 1, 1, 1)
        twin.real = self.real.repeat(times, 1)
        return twin

    def fill_skipped(self, loops_run: int) -> None:
        """Leave the last computed keys and values of the current tokens in the loops that they do not run.

        Exact for these tokens; for later ones, which run deeper, an approximation: a full run would have left others.

        Args:
            loops_run: Loops the tokens of these rows have run.
        """
        last = loops_run - 1
        if last < 0:
            return
        rows = slice(None) if self.rows is None else self.rows
        places = {loop % self.num_kept for loop in range(loops_run, self.num_loops)} - {last % self.num_kept}
        for layer in range(self.num_core_layers):
            source = (last % self.num_kept) * self.num_core_layers + layer
            for place in places:
                slot = place * self.num_core_layers + layer
                for store in (self.keys, self.values):
                    store[slot][rows, :, self.start : self.length] = store[source][rows, :, self.start : self.length]
