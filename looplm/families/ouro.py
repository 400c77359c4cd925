"""Ouro (ByteDance, arXiv 2510.25741), which calls itself LoopLM: its fields and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from looplm.config import LoopedConfig
from looplm.errors import InputError
from looplm.families.config_fields import FieldReader, build_config
from looplm.families.family import Family, ForeignTensor, Part, whole

__all__ = ["Ouro"]


class Ouro(Family):
    """Ouro.

    Example:
        >>> Ouro().write_config(LoopedConfig.ouro_1_4b(), num_loops=4)["total_ut_steps"]
        4
    """

    model_type = "ouro"
    loops_field = "total_ut_steps"

    def read_config(self, fields: Mapping[str, Any]) -> LoopedConfig:
        """See :class:`~looplm.families.family.Family`."""
        read = FieldReader(fields)
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
        return build_config(
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
        """See :class:`~looplm.families.family.Family`."""
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
        """See :class:`~looplm.families.family.Family`; the number of key/value heads is always spelt out here."""
        return super().fits(replace(config, num_kv_heads=config.kv_heads))

    def tensors(self, config: LoopedConfig) -> list[ForeignTensor]:
        """See :class:`~looplm.families.family.Family`."""
        d, q, kv, f = config.width, config.num_heads, config.kv_heads, config.ffn_width
        q, kv = q * config.head_width, kv * config.head_width
        found = [whole("model.embed_tokens.weight", "token_embedding.weight", config.vocab_size, d)]
        for layer in range(config.num_core_layers):
            theirs, ours = f"model.layers.{layer}.", f"core.{layer}."
            rows = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
            for name, (start, stop) in rows.items():
                part = Part(f"{ours}attention.qkv.weight", start, stop)
                found.append(ForeignTensor(f"{theirs}self_attn.{name}.weight", (stop - start, d), (part,)))
            found += [
                whole(f"{theirs}self_attn.o_proj.weight", f"{ours}attention.out.weight", d, q),
                whole(f"{theirs}mlp.gate_proj.weight", f"{ours}ffn.gate.weight", f, d),
                whole(f"{theirs}mlp.up_proj.weight", f"{ours}ffn.up.weight", f, d),
                whole(f"{theirs}mlp.down_proj.weight", f"{ours}ffn.down.weight", d, f),
                whole(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", d),
                whole(f"{theirs}input_layernorm_2.weight", f"{ours}attention_out_norm.weight", d),
                whole(f"{theirs}post_attention_layernorm.weight", f"{ours}ffn_norm.weight", d),
                whole(f"{theirs}post_attention_layernorm_2.weight", f"{ours}ffn_out_norm.weight", d),
            ]
        found += [
            whole("model.norm.weight", "final_norm.weight", d),
            whole("model.early_exit_gate.weight", "exit_gate.weight", 1, d),
            whole("model.early_exit_gate.bias", "exit_gate.bias", 1),
        ]
        return (
            found if config.tie_embeddings else [*found, whole("lm_head.weight", "head.weight", config.vocab_size, d)]
        )
