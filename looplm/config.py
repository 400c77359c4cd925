"""The architecture of a looped transformer as plain data. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

__all__ = ["LoopedConfig"]

NormPlacement = Literal["pre_norm", "post_norm", "sandwich_branch", "sandwich_dual"]
NormType = Literal["layer_norm", "rms_norm", "simple_norm"]
Positions = Literal["learned", "rotary"]
Activation = Literal["gelu", "swiglu"]
InputInjection = Literal["none", "add", "linear"]


@dataclass(frozen=True, kw_only=True)
class LoopedConfig:
    """Architecture of a :class:`~looplm.model.LoopedTransformer`; the defaults are the paper's addition model.

    Raises:
        ValueError: If a field is outside its range or two fields contradict each other.

    Example:
        >>> LoopedConfig(vocab_size=17, max_positions=16).width
        512
    """

    vocab_size: int
    """Number of token ids."""
    max_positions: int
    """Longest sequence, in tokens (the size of the table of learned positions)."""
    width: int = 512
    """Width D of the latent state."""
    num_heads: int = 8
    """Attention heads; must divide ``width``."""
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); must divide ``num_heads``; None: as many as ``num_heads``."""
    ffn_width: int = 1024
    """Width of the MLP's hidden layer."""
    num_prelude_layers: int = 0
    """Unshared blocks before the loop."""
    num_core_layers: int = 1
    """Blocks of Φ, applied at every loop with the same weights."""
    num_coda_layers: int = 0
    """Unshared blocks after the loop."""
    norm_placement: NormPlacement = "sandwich_dual"
    """Where the norms of a block stand: PAPER's Pre-Norm, Post-Norm, Pre-Sandwich, Post-Sandwich."""
    norm_type: NormType = "layer_norm"
    """``simple_norm`` is LayerNorm without gain and bias."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""
    deepnorm_alpha: float = 1.0
    """DeepNorm: ``N(α·x + f(x))``; for ``post_norm`` only."""
    positions: Positions = "learned"
    """``learned`` adds a table to the embedding; ``rotary`` turns queries and keys (half-split pairs)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies; for ``rotary`` only."""
    activation: Activation = "gelu"
    """``swiglu`` has a third matrix: ``W_down(silu(W_gate x) · W_up x)``."""
    input_injection: InputInjection = "none"
    """What each step sees of the prelude's output e: nothing, ``h + e``, or ``W [h; e]``."""
    tie_embeddings: bool = True
    """Whether the head uses the embedding's matrix."""
    use_bias: bool = True
    """Whether the linear maps of a block have biases."""
    dropout: float = 0.1
    """Dropout after the embedding, on attention weights and on each branch; 0 ≤ p < 1."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("norm_placement", NormPlacement),
            ("norm_type", NormType),
            ("positions", Positions),
            ("activation", Activation),
            ("input_injection", InputInjection),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"`{name}` must be one of {get_args(allowed)}, got {getattr(self, name)!r}.")
        for name, least in (
            ("vocab_size", 1),
            ("max_positions", 1),
            ("width", 1),
            ("num_heads", 1),
            ("ffn_width", 1),
            ("num_core_layers", 1),
            ("num_prelude_layers", 0),
            ("num_coda_layers", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}.")
        for name in ("norm_eps", "deepnorm_alpha", "rope_theta", "init_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be > 0, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"`num_heads` must divide `width` ({self.width}), got {self.num_heads}.")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(f"`num_kv_heads` must divide `num_heads` ({self.num_heads}), got {self.num_kv_heads}.")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"`positions: rotary` needs an even head width, got {self.head_width}.")
        if self.deepnorm_alpha != 1.0 and self.norm_placement != "post_norm":
            raise ValueError(
                f"`deepnorm_alpha` has an effect with `norm_placement: post_norm` only, got {self.deepnorm_alpha} "
                f"with {self.norm_placement!r}."
            )
        if self.rope_theta != 10_000.0 and self.positions != "rotary":
            raise ValueError(f"`rope_theta` has an effect with `positions: rotary` only, got {self.rope_theta}.")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, fit for YAML, JSON and ``weights_only`` checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopedConfig:
        """Build a config from plain data.

        Raises:
            ValueError: If a key is unknown or a required one is missing.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown architecture fields {unknown}; known are {sorted(known)}.")
        missing = sorted({"vocab_size", "max_positions"} - set(values))
        if missing:
            raise ValueError(f"missing architecture fields {missing}.")
        return cls(**values)

    @classmethod
    def stars_addition(cls, *, vocab_size: int, max_positions: int) -> LoopedConfig:
        """The paper's addition model: the defaults of this class."""
        return cls(vocab_size=vocab_size, max_positions=max_positions)
