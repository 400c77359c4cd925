"""The published model families: their config fields and tensor names, and ours. All foreign names stand here.

Knows configs and names; reads and writes no file and holds no weights.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from looplm.config import LoopedConfig
from looplm.errors import InputError

__all__ = ["FAMILIES", "Family", "ForeignTensor", "Part", "family_named", "family_of"]


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` of one of our tensors.

    Example:
        >>> Part("core.0.attention.query.weight", 0, 16).stop
        16
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a published checkpoint: ``parts`` one below the other, in another ``shape``.

    Example:
        >>> ForeignTensor("model.norm.weight", (16,), (Part("final_norm.weight", 0, 16),)).shape
        (16,)
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class Family(ABC):
    """How one kind of checkpoint describes itself and names its tensors.

    Example:
        >>> family_named("ouro").loops_field
        'total_ut_steps'
    """

    model_type: str
    """The ``model_type`` of its config.json."""
    loops_field: str
    """The field that holds the usual number of loops."""

    @abstractmethod
    def read_config(self, fields: Mapping[str, Any]) -> LoopedConfig:
        """Return our config of a config.json.

        Raises:
            InputError: If a field is missing or asks for what the family's description does not cover.
        """

    @abstractmethod
    def write_config(self, config: LoopedConfig, num_loops: int) -> dict[str, Any]:
        """Return the fields of config.json."""

    @abstractmethod
    def tensors(self, config: LoopedConfig) -> list[ForeignTensor]:
        """Return all tensors that hold weights; those of our own that no part names do not exist."""

    def fits(self, config: LoopedConfig) -> bool:
        """Return whether a config of ours is one of this family, whatever it says of training."""
        try:
            again = self.read_config(self.write_config(config, 1))
        except ValueError:
            return False
        return replace(config, dropout=again.dropout, init_std=again.init_std) == again


class _Reader:
    """Reads fields and says in one line what is wrong with them; null is as good as absent."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = {name: value for name, value in fields.items() if value is not None}

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"config.json: `{name}` must be an integer, got {value!r:.200}.")
        if not least <= value < 2**31:
            raise InputError(f"config.json: `{name}` must be >= {least} and < 2**31, got {value!r:.200}.")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"config.json: `{name}` must be a number, got {value!r:.200}.")
        if not 0 < value <= sys.float_info.max:
            raise InputError(f"config.json: `{name}` must be > 0 and finite, got {value!r:.200}.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"config.json: `{name}` must be true or false, got {value!r:.200}.")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuse a value that would need other code; a missing field has the first of the allowed values."""
        value = self.fields.get(name, allowed[0])
        if value not in allowed:
            raise InputError(f"config.json: `{name}` must be one of {list(allowed)}, got {value!r:.200}.")

    def rope_theta(self, default: float) -> float:
        """Return the base of the rotary positions, which newer directories hold in ``rope_parameters``."""
        bases = {"rope_theta": self.number("rope_theta", default)} if "rope_theta" in self.fields else {}
        for name in ("rope_parameters", "rope_scaling"):
            rope = self.fields.get(name, {})
            if not isinstance(rope, dict):
                raise InputError(f"config.json: `{name}` must be an object, got {rope!r:.200}.")
            inner = _Reader(rope)
            kinds = {kind: inner.fields.get(kind, "default") for kind in ("rope_type", "type")}
            if any(kind != "default" for kind in kinds.values()):
                raise InputError(f"config.json: `{name}`: only the default rotary positions are known: {rope!r:.200}.")
            if "rope_theta" in inner.fields:
                bases[f"{name}.rope_theta"] = inner.number("rope_theta", default)
        if len(set(bases.values())) > 1:
            raise InputError(f"config.json: `rope_theta` must be one number, got {bases}.")
        return next(iter(bases.values()), default)


def _built(make: Callable[[], LoopedConfig]) -> LoopedConfig:
    try:
        return make()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config.json: {error}") from error


class _Ouro(Family):
    """Ouro (ByteDance LoopLM)."""

    model_type = "ouro"
    loops_field = "total_ut_steps"

    def read_config(self, fields: Mapping[str, Any]) -> LoopedConfig:
        read = _Reader(fields)
        read.expect("hidden_act", "silu")
        read.expect("attention_bias", False)
        read.expect("use_sliding_window", False)
        read.count("total_ut_steps")
        layers = read.count("num_hidden_layers")
        kinds = read.fields.get("layer_types")
        if kinds is not None and not (isinstance(kinds, list) and len(kinds) == layers):
            raise InputError(
                f"config.json: `layer_types` must be a list of `num_hidden_layers` {layers} names, got {kinds!r:.200}."
            )
        for kind in kinds or []:
            if kind != "full_attention":
                raise InputError(f"config.json: `layer_types` must all be 'full_attention', got {kind!r:.200}.")
        heads, width = read.count("num_attention_heads"), read.count("hidden_size")
        head_width = read.count("head_dim", max(width // heads, 1))
        return _built(
            lambda: LoopedConfig(
                vocab_size=read.count("vocab_size"),
                max_positions=read.count("max_position_embeddings"),
                width=width,
                num_heads=heads,
                num_kv_heads=read.count("num_key_value_heads", heads),
                attention_head_width=None if head_width * heads == width else head_width,
                ffn_width=read.count("intermediate_size"),
                num_core_layers=layers,
                norm_placement="sandwich_branch",
                norm_type="rms_norm",
                norm_eps=read.number("rms_norm_eps", 1e-6),
                positions="rotary",
                rope_theta=read.rope_theta(10_000.0),
                activation="swiglu",
                loop_norm=True,
                exit_gate=True,
                tie_embeddings=read.flag("tie_word_embeddings", False),
                use_bias=False,
                dropout=0.0,
                init_std=read.number("initializer_range", 0.02),
            )
        )

    def write_config(self, config: LoopedConfig, num_loops: int) -> dict[str, Any]:
        own_head_width = {} if config.attention_head_width is None else {"head_dim": config.attention_head_width}
        return {
            "architectures": ["OuroForCausalLM"],
            "model_type": "ouro",
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.ffn_width,
            "num_hidden_layers": config.num_core_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            **own_head_width,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_positions,
            "initializer_range": config.init_std,
            "rms_norm_eps": config.norm_eps,
            "use_cache": True,
            "tie_word_embeddings": config.tie_embeddings,
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": config.num_core_layers,
            "layer_types": ["full_attention"] * config.num_core_layers,
            "attention_dropout": 0.0,
            "total_ut_steps": num_loops,
            "early_exit_threshold": 1.0,
        }

    def fits(self, config: LoopedConfig) -> bool:
        # Ouro spells the number of key/value heads out.
        return super().fits(replace(config, num_kv_heads=config.kv_heads))

    def tensors(self, config: LoopedConfig) -> list[ForeignTensor]:
        d, q, kv, f = config.width, config.num_heads, config.kv_heads, config.ffn_width
        q, kv = q * config.head_width, kv * config.head_width
        found = [_whole("model.embed_tokens.weight", "token_embedding.weight", config.vocab_size, d)]
        for layer in range(config.num_core_layers):
            theirs, ours = f"model.layers.{layer}.", f"core.{layer}."
            rows = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
            for name, (start, stop) in rows.items():
                part = Part(f"{ours}attention.qkv.weight", start, stop)
                found.append(ForeignTensor(f"{theirs}self_attn.{name}.weight", (stop - start, d), (part,)))
            found += [
                _whole(f"{theirs}self_attn.o_proj.weight", f"{ours}attention.out.weight", d, q),
                _whole(f"{theirs}mlp.gate_proj.weight", f"{ours}ffn.gate.weight", f, d),
                _whole(f"{theirs}mlp.up_proj.weight", f"{ours}ffn.up.weight", f, d),
                _whole(f"{theirs}mlp.down_proj.weight", f"{ours}ffn.down.weight", d, f),
                _whole(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", d),
                _whole(f"{theirs}input_layernorm_2.weight", f"{ours}attention_out_norm.weight", d),
                _whole(f"{theirs}post_attention_layernorm.weight", f"{ours}ffn_norm.weight", d),
                _whole(f"{theirs}post_attention_layernorm_2.weight", f"{ours}ffn_out_norm.weight", d),
            ]
        found += [
            _whole("model.norm.weight", "final_norm.weight", d),
            _whole("model.early_exit_gate.weight", "exit_gate.weight", 1, d),
            _whole("model.early_exit_gate.bias", "exit_gate.bias", 1),
        ]
        return (
            found if config.tie_embeddings else [*found, _whole("lm_head.weight", "head.weight", config.vocab_size, d)]
        )


class _Huginn(Family):
    """Huginn / Raven (recurrent-pretraining)."""

    model_type = "huginn_raven"
    loops_field = "mean_recurrence"

    def read_config(self, fields: Mapping[str, Any]) -> LoopedConfig:
        read = _Reader(fields)
        read.expect("bias", False)
        read.expect("block_class_name", "SandwichBlock")
        read.expect("norm_class_name", "RMSNorm_llama", "RMSNorm")
        read.expect("mlp_class_name", "GatedMLP")
        read.expect("nonlin_name", "SiLU")
        read.expect("injection_type", "linear")
        read.expect("state_init", "like-init", "zero")
        read.count("mean_recurrence")
        width = read.count("n_embd")
        prelude, core, coda = (
            read.count(f"n_layers_in_{part}", least=least)
            for part, least in (("prelude", 0), ("recurrent_block", 1), ("coda", 0))
        )
        if read.count("n_layers", prelude + core + coda) != prelude + core + coda:
            raise InputError(f"config.json: `n_layers` must be {prelude + core + coda}, got {fields['n_layers']}.")
        multiple = read.count("padding_multiple", 1)
        padded = -(-read.count("vocab_size") // multiple) * multiple
        return _built(
            lambda: LoopedConfig(
                vocab_size=read.count("padded_vocab_size", padded),
                max_positions=read.count("block_size"),
                width=width,
                num_heads=read.count("n_heads"),
                ffn_width=read.count("intermediate_size"),
                num_prelude_layers=prelude,
                num_core_layers=core,
                num_coda_layers=coda,
                norm_placement="sandwich_dual",
                norm_type="rms_norm",
                norm_eps=read.number("norm_eps", 1e-6),
                positions="rotary",
                rope_theta=read.number("rope_base", 50_000.0),
                rotary_pairs="interleaved",
                activation="swiglu",
                input_injection="linear",
                state_init="zeros" if read.fields.get("state_init") == "zero" else "normal",
                embedding_scale=math.sqrt(width),
                coda_norm=True,
                tie_embeddings=read.flag("tie_embeddings", True),
                use_bias=False,
                qk_bias=read.flag("qk_bias", True),
                dropout=0.0,
                init_std=math.sqrt(2 / (5 * width)),
            )
        )

    def write_config(self, config: LoopedConfig, num_loops: int) -> dict[str, Any]:
        return {
            "architectures": ["RavenForCausalLM"],
            "model_type": "huginn_raven",
            "n_embd": config.width,
            "n_heads": config.num_heads,
            "n_layers": config.num_prelude_layers + config.num_core_layers + config.num_coda_layers,
            "block_size": config.max_positions,
            "vocab_size": config.vocab_size,
            "padding_multiple": 1,
            "tie_embeddings": config.tie_embeddings,
            "intermediate_size": config.ffn_width,
            "bias": False,
            "architecture_class_name": "RecurrentGPT",
            "block_class_name": "SandwichBlock",
            "norm_class_name": "RMSNorm_llama",
            "norm_eps": config.norm_eps,
            "mlp_class_name": "GatedMLP",
            "nonlin_name": "SiLU",
            "init_strategy": "takase",
            "init_orthogonal": False,
            "state_init": "zero" if config.state_init == "zeros" else "like-init",
            "injection_type": "linear",
            "n_layers_in_recurrent_block": config.num_core_layers,
            "mean_recurrence": num_loops,
            "sampling_scheme": "poisson-lognormal-filling",
            "mean_backprop_depth": min(8, num_loops),
            "n_layers_in_prelude": config.num_prelude_layers,
            "n_layers_in_coda": config.num_coda_layers,
            "qk_bias": config.qk_bias,
            "activation_checkpoint_impl": "per-iteration",
            "rope_base": config.rope_theta,
        }

    def tensors(self, config: LoopedConfig) -> list[ForeignTensor]:
        d, f, heads, head_width = config.width, config.ffn_width, config.num_heads, config.head_width
        found = [_whole("transformer.wte.weight", "token_embedding.weight", config.vocab_size, d)]
        stages = {
            "prelude": ("prelude", config.num_prelude_layers),
            "core_block": ("core", config.num_core_layers),
            "coda": ("coda", config.num_coda_layers),
        }
        for their_stage, (our_stage, num_layers) in stages.items():
            for layer in range(num_layers):
                theirs, ours = f"transformer.{their_stage}.{layer}.", f"{our_stage}.{layer}."
                found += [
                    _whole(f"{theirs}norm_1.weight", f"{ours}attention_norm.weight", d),
                    _whole(f"{theirs}norm_2.weight", f"{ours}attention_out_norm.weight", d),
                    _whole(f"{theirs}norm_3.weight", f"{ours}ffn_norm.weight", d),
                    _whole(f"{theirs}norm_4.weight", f"{ours}ffn_out_norm.weight", d),
                    _whole(f"{theirs}attn.Wqkv.weight", f"{ours}attention.qkv.weight", 3 * d, d),
                    _whole(f"{theirs}attn.proj.weight", f"{ours}attention.out.weight", d, d),
                    ForeignTensor(
                        f"{theirs}mlp.fc.weight",
                        (2 * f, d),
                        (Part(f"{ours}ffn.gate.weight", 0, f), Part(f"{ours}ffn.up.weight", 0, f)),
                    ),
                    _whole(f"{theirs}mlp.proj.weight", f"{ours}ffn.down.weight", d, f),
                ]
                if config.qk_bias:
                    biases = (Part(f"{ours}attention.{name}_bias", 0, heads) for name in "qk")
                    found.append(ForeignTensor(f"{theirs}attn.qk_bias", (2, 1, heads, head_width), tuple(biases)))
        found += [
            _whole("transformer.adapter.weight", "injection.weight", d, 2 * d),
            _whole("transformer.ln_f.weight", "final_norm.weight", d),
        ]
        return (
            found if config.tie_embeddings else [*found, _whole("lm_head.weight", "head.weight", config.vocab_size, d)]
        )


def _whole(theirs: str, ours: str, *shape: int) -> ForeignTensor:
    return ForeignTensor(theirs, shape, (Part(ours, 0, shape[0]),))


FAMILIES: tuple[Family, ...] = (_Ouro(), _Huginn())
"""All families but our own, whose tensors have our names."""


def family_named(model_type: Any) -> Family:
    """Return the family of a config.json's ``model_type``.

    Raises:
        InputError: If it is unknown.

    Example:
        >>> family_named("huginn_raven").loops_field
        'mean_recurrence'
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ["looplm", *(family.model_type for family in FAMILIES)]
    raise InputError(f"config.json: `model_type` must be one of {known}, got {model_type!r:.200}.")


def family_of(config: LoopedConfig) -> Family | None:
    """Return the family that a config of ours belongs to, or None.

    Example:
        >>> family_of(LoopedConfig.ouro_1_4b()).model_type
        'ouro'
        >>> family_of(LoopedConfig.stars_addition(vocab_size=17, max_positions=16)) is None
        True
    """
    return next((family for family in FAMILIES if family.fits(config)), None)
