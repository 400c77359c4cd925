"""Huginn, or Raven (recurrent-pretraining, arXiv 2502.05171): its fields and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from looplm.config import LoopedConfig
from looplm.errors import InputError
from looplm.families.config_fields import FieldReader, build_config
from looplm.families.family import Family, ForeignTensor, Part, whole

__all__ = ["Huginn"]


class Huginn(Family):
    """Huginn.

    Example:
        >>> Huginn().write_config(LoopedConfig.huginn_3_5b(), num_loops=32)["mean_recurrence"]
        32
    """

    model_type = "huginn_raven"
    loops_field = "mean_recurrence"

    def read_config(self, fields: Mapping[str, Any]) -> LoopedConfig:
        """See :class:`~looplm.families.family.Family`."""
        read = FieldReader(fields)
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
        return build_config(
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
        """See :class:`~looplm.families.family.Family`."""
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
        """See :class:`~looplm.families.family.Family`."""
        d, f, heads, head_width = config.width, config.ffn_width, config.num_heads, config.head_width
        found = [whole("transformer.wte.weight", "token_embedding.weight", config.vocab_size, d)]
        stages = {
            "prelude": ("prelude", config.num_prelude_layers),
            "core_block": ("core", config.num_core_layers),
            "coda": ("coda", config.num_coda_layers),
        }
        for their_stage, (our_stage, num_layers) in stages.items():
            for layer in range(num_layers):
                theirs, ours = f"transformer.{their_stage}.{layer}.", f"{our_stage}.{layer}."
                found += [
                    whole(f"{theirs}norm_1.weight", f"{ours}attention_norm.weight", d),
                    whole(f"{theirs}norm_2.weight", f"{ours}attention_out_norm.weight", d),
                    whole(f"{theirs}norm_3.weight", f"{ours}ffn_norm.weight", d),
                    whole(f"{theirs}norm_4.weight", f"{ours}ffn_out_norm.weight", d),
                    whole(f"{theirs}attn.Wqkv.weight", f"{ours}attention.qkv.weight", 3 * d, d),
                    whole(f"{theirs}attn.proj.weight", f"{ours}attention.out.weight", d, d),
                    ForeignTensor(
                        f"{theirs}mlp.fc.weight",
                        (2 * f, d),
                        (Part(f"{ours}ffn.gate.weight", 0, f), Part(f"{ours}ffn.up.weight", 0, f)),
                    ),
                    whole(f"{theirs}mlp.proj.weight", f"{ours}ffn.down.weight", d, f),
                ]
                if config.qk_bias:
                    biases = (Part(f"{ours}attention.{name}_bias", 0, heads) for name in "qk")
                    found.append(ForeignTensor(f"{theirs}attn.qk_bias", (2, 1, heads, head_width), tuple(biases)))
        found += [
            whole("transformer.adapter.weight", "injection.weight", d, 2 * d),
            whole("transformer.ln_f.weight", "final_norm.weight", d),
        ]
        return (
            found if config.tie_embeddings else [*found, whole("lm_head.weight", "head.weight", config.vocab_size, d)]
        )
