"""The architecture of a looped transformer as plain data. Knows no torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

__all__ = ["LoopedConfig"]

NormPlacement = Literal["pre_norm", "post_norm", "sandwich_branch", "sandwich_dual"]
NormType = Literal["layer_norm", "rms_norm", "simple_norm"]
Positions = Literal["learned", "rotary"]
Activation = Literal["gelu", "swiglu"]
RotaryPairs = Literal["half_split", "interleaved"]
InputInjection = Literal["none", "add", "linear", "diagonal"]
StateInit = Literal["embedding", "normal", "zeros"]

# Types of the fields, as they are written below.
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "bool": (bool,),
}
_MOST_NUMBERS = 2**40  # in one matrix; far beyond what exists, and far below what overflows
_LIKE_INIT_STD = math.sqrt(2 / 5)  # Huginn: √D · n with n of standard deviation √(2 / 5D), whatever D


@dataclass(frozen=True, kw_only=True)
class LoopedConfig:
    """Architecture of a :class:`~looplm.model.LoopedTransformer`; the defaults are the paper's addition model.

    Ouro, Huginn and Parcae's injection are values of these fields, see the presets and ``input_injection``.

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
    """Attention heads; must divide ``width`` unless ``attention_head_width`` is given."""
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); must divide ``num_heads``; None: as many as ``num_heads``."""
    attention_head_width: int | None = None
    """Width of one head; None: ``width / num_heads``."""
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
    """``learned`` adds a table to the embedding; ``rotary`` turns queries and keys."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies; for ``rotary`` only."""
    rotary_pairs: RotaryPairs = "half_split"
    """Which features turn together: j with j + d/2, or (``interleaved``) 2j with 2j + 1; for ``rotary`` only."""
    activation: Activation = "gelu"
    """``swiglu`` has a third matrix: ``W_down(silu(W_gate x) · W_up x)``."""
    input_injection: InputInjection = "none"
    """What each step sees of the prelude's output e: nothing, ``h + e``, ``W [h; e]``, or Parcae's ``Ā h + Δ B e``.

    Ā = exp(−Δ·exp(a)) is diagonal and in (0, 1) whatever its parameters (arXiv 2604.12946)."""
    state_init: StateInit = "embedding"
    """h₀: the prelude's output, a truncated normal draw (Huginn), or zero; the latter two need an injection."""
    state_init_std: float = _LIKE_INIT_STD
    """Standard deviation of the draw before it is truncated at three of them; for ``normal`` only."""
    embedding_scale: float = 1.0
    """Factor on the embedding, learned positions included, not on the head (Huginn: √D)."""
    loop_norm: bool = False
    """Whether the final norm ends every loop, so that the next one starts from the normed state (Ouro).

    Without a coda the head then reads the state as it is."""
    coda_norm: bool = False
    """Whether the final norm, with the same gain, also stands before the coda (Huginn)."""
    exit_gate: bool = False
    """Whether there is a learned gate ``σ(w·h + b)`` that says after each loop whether to stop (Ouro)."""
    tie_embeddings: bool = True
    """Whether the head uses the embedding's matrix."""
    use_bias: bool = True
    """Whether the linear maps of a block have biases."""
    qk_bias: bool = False
    """Whether queries and keys have a bias of their own before they are turned (Huginn)."""
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
            ("rotary_pairs", RotaryPairs),
            ("input_injection", InputInjection),
            ("state_init", StateInit),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"`{name}` must be one of {get_args(allowed)}, got {getattr(self, name)!r}.")
        self._check_types()
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
        for name in ("norm_eps", "deepnorm_alpha", "rope_theta", "init_std", "state_init_std", "embedding_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be > 0, got {getattr(self, name)}.")
            if not getattr(self, name) <= sys.float_info.max:
                raise ValueError(f"`{name}` must be finite, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")
        self._check_combinations()

    def _check_types(self) -> None:
        # A config may come from anyone's file; a dataclass takes whatever it is given.
        for field in fields(self):
            kinds = _KINDS.get(str(field.type))
            value = getattr(self, field.name)
            # To Python a bool is an integer.
            if kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                raise ValueError(f"`{field.name}` must be of type {field.type}, got {value!r}.")

    def _check_combinations(self) -> None:
        if self.attention_head_width is not None and self.attention_head_width < 1:
            raise ValueError(f"`attention_head_width` must be >= 1, got {self.attention_head_width}.")
        if self.attention_head_width is None and self.width % self.num_heads:
            raise ValueError(f"`num_heads` must divide `width` ({self.width}), got {self.num_heads}.")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(f"`num_kv_heads` must divide `num_heads` ({self.num_heads}), got {self.num_kv_heads}.")
        attended = self.num_heads * self.head_width
        for name in ("vocab_size", "max_positions", "ffn_width", "width", "num_heads"):
            rows = attended if name == "num_heads" else getattr(self, name)
            if rows * self.width > _MOST_NUMBERS:
                raise ValueError(
                    f"`{name}` asks for a matrix of more than {_MOST_NUMBERS} numbers, got {getattr(self, name)} with "
                    f"`width` {self.width}."
                )
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"`positions: rotary` needs an even head width, got {self.head_width}.")
        if self.deepnorm_alpha != 1.0 and self.norm_placement != "post_norm":
            raise ValueError(
                f"`deepnorm_alpha` has an effect with `norm_placement: post_norm` only, got {self.deepnorm_alpha} "
                f"with {self.norm_placement!r}."
            )
        for name, neutral in (("rope_theta", 10_000.0), ("rotary_pairs", "half_split")):
            if getattr(self, name) != neutral and self.positions != "rotary":
                raise ValueError(f"`{name}` has an effect with `positions: rotary` only, got {getattr(self, name)!r}.")
        if self.state_init_std != _LIKE_INIT_STD and self.state_init != "normal":
            raise ValueError(
                f"`state_init_std` has an effect with `state_init: normal` only, got {self.state_init_std}."
            )
        if self.state_init != "embedding" and self.input_injection == "none":
            raise ValueError(
                f"`state_init: {self.state_init}` needs an `input_injection`: the state would never see the input."
            )
        if self.loop_norm and self.coda_norm:
            raise ValueError("`loop_norm` and `coda_norm` exclude each other: the state would be normed twice.")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads if self.attention_head_width is None else self.attention_head_width

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

    def for_weights(self, pretrained: LoopedConfig) -> LoopedConfig:
        """Return the architecture of pretrained weights, for a run that was asked for this one.

        Fields at their default follow the weights, and any other must be as there. The run's tokens and positions may
        be fewer. ``dropout`` is no property of weights: it is always the run's.

        Args:
            pretrained: The architecture of the weights.

        Raises:
            ValueError: Names the fields that the weights cannot have.

        Example:
            >>> asked = LoopedConfig(vocab_size=11, max_positions=8, dropout=0.1)
            >>> asked.for_weights(LoopedConfig.ouro_1_4b()) == replace(LoopedConfig.ouro_1_4b(), dropout=0.1)
            True
        """
        differing = []
        for field in fields(self):
            asked, there = getattr(self, field.name), getattr(pretrained, field.name)
            if field.name in ("vocab_size", "max_positions"):
                differing += [f"`{field.name}` at most {there}, got {asked}"] if asked > there else []
            elif field.name != "dropout" and asked not in (field.default, there):
                differing.append(f"`{field.name}` {there!r}, got {asked!r}")
        if differing:
            raise ValueError(f"the pretrained weights need {'; '.join(differing)}.")
        return replace(pretrained, dropout=self.dropout)

    @classmethod
    def stars_addition(cls, *, vocab_size: int, max_positions: int) -> LoopedConfig:
        """The paper's addition model: the defaults of this class."""
        return cls(vocab_size=vocab_size, max_positions=max_positions)

    @classmethod
    def ouro_1_4b(cls) -> LoopedConfig:
        """Ouro-1.4B (ByteDance LoopLM): 24 layers looped, the final norm inside the loop, a learned exit gate.

        Example:
            >>> LoopedConfig.ouro_1_4b().num_core_layers
            24
        """
        return cls(
            vocab_size=49152,
            max_positions=65536,
            width=2048,
            num_heads=16,
            ffn_width=5632,
            num_core_layers=24,
            norm_placement="sandwich_branch",
            norm_type="rms_norm",
            norm_eps=1e-6,
            positions="rotary",
            rope_theta=1_000_000.0,
            activation="swiglu",
            loop_norm=True,
            exit_gate=True,
            tie_embeddings=False,
            use_bias=False,
            dropout=0.0,
        )

    @classmethod
    def huginn_3_5b(cls) -> LoopedConfig:
        """Huginn-3.5B (Raven): prelude 2, core 4, coda 2, a random state joined with the input at every loop.

        Example:
            >>> LoopedConfig.huginn_3_5b().state_init
            'normal'
        """
        return cls(
            vocab_size=65536,
            max_positions=4096,
            width=5280,
            num_heads=55,
            ffn_width=17920,
            num_prelude_layers=2,
            num_core_layers=4,
            num_coda_layers=2,
            norm_placement="sandwich_dual",
            norm_type="rms_norm",
            norm_eps=1e-6,
            positions="rotary",
            rope_theta=50_000.0,
            rotary_pairs="interleaved",
            activation="swiglu",
            input_injection="linear",
            state_init="normal",
            embedding_scale=math.sqrt(5280),
            coda_norm=True,
            use_bias=False,
            qk_bias=True,
            dropout=0.0,
        )
