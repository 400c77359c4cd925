import json
from dataclasses import FrozenInstanceError

import pytest

from looplm.config import LoopedConfig

SIZE = {"vocab_size": 17, "max_positions": 16}


def test_defaults_are_the_addition_model_of_the_paper():
    config = LoopedConfig.stars_addition(**SIZE)
    assert config == LoopedConfig(**SIZE)
    assert config.to_dict() == {
        **SIZE,
        "width": 512,
        "num_heads": 8,
        "num_kv_heads": None,
        "attention_head_width": None,
        "ffn_width": 1024,
        "num_prelude_layers": 0,
        "num_core_layers": 1,
        "num_coda_layers": 0,
        "norm_placement": "sandwich_dual",
        "norm_type": "layer_norm",
        "norm_eps": 1e-5,
        "deepnorm_alpha": 1.0,
        "positions": "learned",
        "rope_theta": 10_000.0,
        "rotary_pairs": "half_split",
        "activation": "gelu",
        "input_injection": "none",
        "state_init": "embedding",
        "state_init_std": 0.4**0.5,
        "embedding_scale": 1.0,
        "loop_norm": False,
        "coda_norm": False,
        "exit_gate": False,
        "tie_embeddings": True,
        "use_bias": True,
        "qk_bias": False,
        "dropout": 0.1,
        "init_std": 0.02,
    }


def test_plain_data_restores_the_config():
    config = LoopedConfig(**SIZE, width=24, num_heads=6, num_kv_heads=2, positions="rotary", rope_theta=5e5)
    assert LoopedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_is_immutable():
    with pytest.raises(FrozenInstanceError):
        LoopedConfig(**SIZE).width = 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_placement": "middle"}, "`norm_placement` must be one of .*sandwich_dual.*got 'middle'"),
        ({"norm_type": "batch_norm"}, "`norm_type` must be one of"),
        ({"positions": "alibi"}, "`positions` must be one of"),
        ({"activation": "relu"}, "`activation` must be one of"),
        ({"input_injection": "concat"}, "`input_injection` must be one of"),
        ({"state_init": "random"}, "`state_init` must be one of"),
        ({"attention_head_width": 0}, "`attention_head_width` must be >= 1, got 0"),
        ({"rotary_pairs": "interleaved"}, "`rotary_pairs` has an effect with `positions: rotary` only"),
        ({"state_init": "zeros"}, "`state_init: zeros` needs an `input_injection`"),
        ({"state_init_std": 1.0}, "`state_init_std` has an effect with `state_init: normal` only, got 1.0"),
        ({"embedding_scale": 0.0}, "`embedding_scale` must be > 0"),
        ({"loop_norm": True, "coda_norm": True}, "`loop_norm` and `coda_norm` exclude each other"),
        ({"vocab_size": 0}, "`vocab_size` must be >= 1, got 0"),
        ({"num_core_layers": 0}, "`num_core_layers` must be >= 1, got 0"),
        ({"num_prelude_layers": -1}, "`num_prelude_layers` must be >= 0, got -1"),
        ({"norm_eps": 0.0}, "`norm_eps` must be > 0"),
        ({"init_std": float("nan")}, "`init_std` must be > 0, got nan"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"num_heads": 7}, r"`num_heads` must divide `width` \(512\), got 7"),
        ({"num_kv_heads": 3}, r"`num_kv_heads` must divide `num_heads` \(8\), got 3"),
        ({"num_kv_heads": 0}, "`num_kv_heads` must divide"),
        ({"positions": "rotary", "width": 9, "num_heads": 3}, "even head width, got 3"),
        ({"deepnorm_alpha": 2.0}, "`deepnorm_alpha` has an effect with `norm_placement: post_norm` only"),
        ({"rope_theta": 5e5}, "`rope_theta` has an effect with `positions: rotary` only"),
    ],
)
def test_wrong_or_ineffective_values_are_refused_with_their_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        LoopedConfig(**{**SIZE, **changes})


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ValueError, match=r"unknown architecture fields \['widht'\]"):
        LoopedConfig.from_dict({**SIZE, "widht": 8})
    with pytest.raises(ValueError, match=r"missing architecture fields \['max_positions'\]"):
        LoopedConfig.from_dict({"vocab_size": 8})
