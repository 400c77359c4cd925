"""How many floating-point operations a training step of the looped transformer needs. Knows shapes, runs nothing.

Counted as the field does for model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B; and
``torch.utils.flop_counter``): matrix products alone, two operations a multiply-add, attention without the saving that
its causal mask allows, and nothing for what activation checkpointing computes a second time.
"""

from __future__ import annotations

from looplm.config import LoopedConfig
from looplm.stability.penalty import JacobianPenalty, Penalty
from looplm.stability.settling import SettlingPenalty

__all__ = ["forward_flops", "penalty_flops", "training_flops"]


def _qkv(config: LoopedConfig, batch_size: int, length: int) -> int:
    """Return the FLOPs of a block's first product, queries, keys and values, in one direction."""
    return 2 * batch_size * length * config.width * (config.num_heads + 2 * config.kv_heads) * config.head_width


def _queries(config: LoopedConfig, num_queries: int) -> int:
    return 2 * num_queries * config.width * config.num_heads * config.head_width


def _per_query(config: LoopedConfig, num_queries: int, length: int) -> int:
    """Return the FLOPs of a block beside keys and values: a query, what it attends to and what follows from it."""
    attended = config.num_heads * config.head_width
    out = 2 * num_queries * attended * config.width
    scores_and_mixture = 2 * 2 * num_queries * length * attended
    ffn = (3 if config.activation == "swiglu" else 2) * 2 * num_queries * config.width * config.ffn_width
    return _queries(config, num_queries) + out + scores_and_mixture + ffn


def _block(config: LoopedConfig, batch_size: int, length: int) -> int:
    tokens = batch_size * length
    keys_and_values = _qkv(config, batch_size, length) - _queries(config, tokens)
    return keys_and_values + _per_query(config, tokens, length)


def _step(config: LoopedConfig, batch_size: int, length: int) -> int:
    joined = {"none": 0, "add": 0, "linear": 2, "diagonal": 1}[config.input_injection]
    injection = 2 * batch_size * length * joined * config.width**2
    return injection + config.num_core_layers * _block(config, batch_size, length)


def _head(config: LoopedConfig, num_logits: int) -> int:
    return 2 * num_logits * config.width * config.vocab_size


def _without_input_gradient(config: LoopedConfig, batch_size: int, length: int) -> int:
    """Return what the backward pass of a loop saves where its state is detached: no gradient is wanted of it.

    A gain before the first product, or an injected input, still asks for that product's gradient.
    """
    has_gain = config.norm_placement != "post_norm" and config.norm_type != "simple_norm"
    return 0 if has_gain or config.input_injection != "none" else _qkv(config, batch_size, length)


def forward_flops(
    config: LoopedConfig,
    batch_size: int,
    length: int,
    num_loops: int,
    num_logits: int | None = None,
    num_queries: int | None = None,
) -> int:
    """Return the FLOPs of a forward pass without a cache.

    Args:
        config: The architecture.
        batch_size: B, sequences.
        length: T, tokens a sequence, padding included.
        num_loops: Loops that are run.
        num_logits: Positions whose logits are computed: in training those with a label; None: all B·T.
        num_queries: Positions from which the last loop's last block attends, see
            :class:`~looplm.objective.ObjectiveOutput`; None: all B·T.

    Example:
        >>> config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32)
        >>> forward_flops(config, 2, 5, 4) - forward_flops(config, 2, 5, 3)  # a loop
        44160
    """
    outer = (config.num_prelude_layers + config.num_coda_layers) * _block(config, batch_size, length)
    loops = num_loops * _step(config, batch_size, length)
    spared = 0 if num_queries is None else _per_query(config, batch_size * length - num_queries, length)
    return outer + loops - spared + _head(config, batch_size * length if num_logits is None else num_logits)


def training_flops(
    config: LoopedConfig,
    batch_size: int,
    length: int,
    num_loops: int,
    backprop_loops: int | None = None,
    num_logits: int | None = None,
    num_queries: int | None = None,
) -> int:
    """Return the FLOPs of a forward and a backward pass at the depth that is run.

    Arguments as in :func:`forward_flops`; for ``backprop_loops`` see :class:`~looplm.objective.STARSObjective`: the
    loops before the last that many run forward only, and the prelude too unless its output is injected.

    Example:
        >>> config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32)
        >>> training_flops(config, 2, 5, 4) / forward_flops(config, 2, 5, 4)
        3.0
        >>> training_flops(config, 2, 5, 100, backprop_loops=2) - training_flops(config, 2, 5, 99, backprop_loops=2)
        44160
    """
    forward = forward_flops(config, batch_size, length, num_loops, num_logits, num_queries)
    if backprop_loops is None or num_loops <= backprop_loops:
        return 3 * forward
    backward = forward - (num_loops - backprop_loops) * _step(config, batch_size, length)
    if config.input_injection == "none":
        backward -= config.num_prelude_layers * _block(config, batch_size, length)
    without = _without_input_gradient(config, batch_size, length)
    if without and num_queries is not None and backprop_loops == config.num_core_layers == 1:
        without -= _queries(config, batch_size * length - num_queries)
    return forward + 2 * backward - without


def penalty_flops(
    config: LoopedConfig,
    batch_size: int,
    length: int,
    penalty: Penalty | SettlingPenalty,
    state_is_spared: bool = False,
) -> int:
    """Return the FLOPs of a stability term and of its gradient.

    Exact where Jacobian products are finite differences, two evaluations of the step each. The other products are taken
    for as much; what PyTorch runs for a differentiated ``jvp`` is about four thirds of it.

    Args:
        config: The architecture.
        batch_size: B, sequences of the batch, of which the penalty takes its share.
        length: T, tokens a sequence.
        penalty: The term; one without a product costs nothing.
        state_is_spared: Whether it has to run the last step of its share again, see ``spare_unlabelled`` of
            :class:`~looplm.objective.STARSObjective`.

    Example:
        >>> config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32)
        >>> penalty_flops(config, 8, 5, JacobianPenalty(fraction=0.25))  # 2 sequences, 2 evaluations, 3 passes
        264960
    """
    if isinstance(penalty, SettlingPenalty) or penalty.method is None:
        return 0
    rows = max(1, round(penalty.fraction * batch_size))
    step = _step(config, rows, length)
    last = 2 * (3 * step - _without_input_gradient(config, rows, length)) + (step if state_is_spared else 0)
    if not isinstance(penalty, JacobianPenalty):
        return last
    before = {"mean_gain": 0, "spectral_radius": penalty.num_iterations - 1, "spectral_norm": penalty.num_iterations}
    # One of JᵀJ is a product and, for the transpose, a forward pass and its gradient.
    each = 2 * step if penalty.quantity != "spectral_norm" else 2 * step + _pulled_back(config, rows, length)
    return last + before[penalty.quantity] * each


def _pulled_back(config: LoopedConfig, batch_size: int, length: int) -> int:
    """Return the FLOPs of ``Jᵀu`` alone: a matrix needs one product for it, attention's two matrices four."""
    attended = config.num_heads * config.head_width
    attention = config.num_core_layers * 2 * 2 * batch_size * length**2 * attended
    return 2 * _step(config, batch_size, length) + attention
