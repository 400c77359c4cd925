"""Jacobian-vector products of a step at a state, differentiable with respect to the step's parameters.

Knows nothing of models: a step is any callable that maps a state to the next.

================== ==================================================== ==============================================
name               what it does                                         use it
================== ==================================================== ==============================================
finite_difference  ``(Φ(h + εv) − Φ(h − εv)) / 2ε``                      by default: any kernel, any norm, any strategy
jvp                forward-mode automatic differentiation               as the exact reference; with bfloat16 weights
vjp                ``Jᵀ u`` in place of ``J v``, reverse mode           with steps that have no forward-mode derivative
================== ==================================================== ==============================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from looplm.stability.vectors import Hidden, StepFn, per_sequence_dot, scale, squared_norm

__all__ = ["PRODUCTS", "ProductName", "finite_difference", "jvp", "narrowed_products", "product_named", "vjp"]

ProductName: TypeAlias = Literal["finite_difference", "jvp", "vjp"]


def _centred_normalise(x: Tensor, num_dims: int, centre: bool, eps: float) -> Tensor:
    dims = tuple(range(-num_dims, 0))
    if centre:
        x = x - x.mean(dims, keepdim=True)
    return x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)


def _primitive_layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    x = _centred_normalise(input, len(normalized_shape), True, eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _primitive_rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = _centred_normalise(input, len(normalized_shape), False, eps)
    return x if weight is None else x * weight


class _PrimitiveNorms(TorchFunctionMode):
    """Computes LayerNorm and RMSNorm by primitive operations.

    PyTorch's derivative of forward-mode AD through the fused LayerNorm treats mean and variance as constants: the
    product is right, its gradient is not, and nothing says so (pytorch issue 196700).
    """

    _replacements: dict[Any, Callable[..., Tensor]] = {  # noqa: RUF012 - read only
        torch.nn.functional.layer_norm: _primitive_layer_norm,
        torch.layer_norm: _primitive_layer_norm,
        torch.nn.functional.rms_norm: _primitive_rms_norm,
        torch.rms_norm: _primitive_rms_norm,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._replacements.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def _exact_derivatives() -> Iterator[None]:
    # Fused attention kernels have no forward-mode derivative: the mathematical form has. Compiled code has none either.
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), _PrimitiveNorms():
        yield


@contextlib.contextmanager
def _needs_forward_mode() -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        marks = ("forward AD", "forward mode", "jvp", "functorch", "checkpoint")
        if not any(mark in str(error) for mark in marks):
            raise
        raise NotImplementedError(
            f"`jvp` cannot go through this step: use `finite_difference` or `vjp`. {error}"
        ) from error


@contextlib.contextmanager
def _needs_wide_state(hidden: Hidden) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        narrow = {x.dtype for x in pytree.tree_leaves(hidden) if torch.finfo(x.dtype).bits < 32}
        if not narrow or "dtype" not in str(error):
            raise
        raise RuntimeError(
            f"`finite_difference` evaluates a step whose state is {narrow.pop()} in float32, which this step refuses: "
            "use `jvp` or `vjp`, or keep the weights in float32 (precision `bf16-mixed` in place of `bf16-true`). "
            f"{error}"
        ) from error


def _check_double_backward(outputs: Sequence[Tensor]) -> None:
    """Raise where a recorded gradient cannot be differentiated again; torch itself says so only in ``backward``."""
    todo = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(todo)
    while todo:
        node: Any = todo.pop()
        name = node.name()
        if any(mark in name for mark in ("NotImplemented", "DelayedError", "CompiledFunctionBackward")):
            raise NotImplementedError(
                f"`vjp` is to be differentiated, but this step has no second derivative in reverse mode ({name}): "
                "use `finite_difference` or `jvp`."
            )
        following = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= following
        todo += following


def jvp(step_fn: StepFn, hidden: Hidden, vector: Hidden) -> Hidden:
    """Return ``J v`` with ``J = ∂Φ/∂h`` at ``hidden``, by forward-mode automatic differentiation.

    Args:
        step_fn: Φ, one application of the loop.
        hidden: The state, ``(B, …)`` or a dict of such; sequences must not interact in Φ.
        vector: v, of the same structure and shapes.

    Returns:
        ``J v``, of the same structure and shapes; differentiable with respect to what Φ uses.

    Raises:
        NotImplementedError: If Φ has no forward-mode derivative; the message names the products to use.

    Example:
        >>> h, v = torch.tensor([[2.0]]), torch.tensor([[1.0]])
        >>> jvp(lambda x: x**2, h, v)
        tensor([[4.]])
    """
    with _needs_forward_mode(), _exact_derivatives():
        pushed: Hidden = torch.func.jvp(step_fn, (hidden,), (vector,))[1]
    return pushed


def vjp(step_fn: StepFn, hidden: Hidden, vector: Hidden) -> Hidden:
    """Return ``Jᵀ u`` at ``hidden``, by reverse-mode automatic differentiation.

    Arguments and shapes as in :func:`jvp`. Where gradients are recorded the result is differentiable with respect to
    what Φ uses (double backward), which fused attention kernels do not offer: then, and only then, attention takes its
    mathematical form.

    Raises:
        RuntimeError: Inside ``torch.inference_mode``, where nothing can be differentiated in reverse.
        NotImplementedError: If gradients are recorded and Φ has no second derivative in reverse mode.

    Example:
        >>> h, u = torch.tensor([[2.0]]), torch.tensor([[1.0]])
        >>> vjp(lambda x: x**2, h, u).item()
        4.0
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("`vjp` does not work in torch.inference_mode; use `jvp`, `finite_difference` or no_grad.")
    differentiable = torch.is_grad_enabled()
    leaves, spec = pytree.tree_flatten(hidden)
    math_attention = sdpa_kernel(SDPBackend.MATH) if differentiable else contextlib.nullcontext()
    # Compiled code cannot be differentiated twice.
    with torch.compiler.set_stance("force_eager"), torch.enable_grad(), math_attention:
        inputs = [x if x.requires_grad and differentiable else x.detach().requires_grad_() for x in leaves]
        inner = per_sequence_dot(step_fn(pytree.tree_unflatten(inputs, spec)), vector).sum()
        pulled = torch.autograd.grad(inner, inputs, create_graph=differentiable, materialize_grads=True)
    if differentiable:
        _check_double_backward(pulled)
    product: Hidden = pytree.tree_unflatten(list(pulled), spec)
    return product


def finite_difference(step_fn: StepFn, hidden: Hidden, vector: Hidden) -> Hidden:
    """Return ``J v`` by central differences, in float32 or better, autocast off.

    The step is ``ε = eps^(1/3) · ‖h‖ / ‖v‖`` for each sequence, with eps the precision of the number type: 5e-5 of
    J v in float32, 1e-10 in float64. Φ must be deterministic (dropout off). Arguments, shapes and differentiability
    as in :func:`jvp`. Where float32 products are narrowed (:func:`narrowed_products`) the gradient of ``mean ‖Jv‖²`` is
    off by 1 % (tf32) or 7 % (bf16), 4e-5 otherwise: emulated on a block of width 128.

    Raises:
        RuntimeError: If Φ refuses a float32 state because its weights are bfloat16; the message names the products to
            use.

    Example:
        >>> h, v = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
        >>> round(finite_difference(lambda x: x**2, h, v).item(), 6)
        4.0
    """
    device_type = pytree.tree_leaves(hidden)[0].device.type
    with torch.autocast(device_type, enabled=False):
        wide = pytree.tree_map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), hidden)
        vector = pytree.tree_map(lambda v, x: v.to(x.dtype), vector, wide)
        precision = max(torch.finfo(x.dtype).eps ** (1 / 3) for x in pytree.tree_leaves(wide))
        tiny = torch.finfo(torch.float32).tiny
        # A state at the origin and a vector without real positions have no scale of their own.
        norms = (squared_norm(x).detach().sqrt() for x in (wide, vector))
        state_norm, vector_norm = (torch.where(norm > tiny, norm, 1.0) for norm in norms)
        eps = precision * state_norm / vector_norm
        shift = scale(vector, eps)
        with _needs_wide_state(hidden):
            ahead = step_fn(pytree.tree_map(torch.add, wide, shift))
            behind = step_fn(pytree.tree_map(torch.sub, wide, shift))
        return scale(pytree.tree_map(torch.sub, ahead, behind), 0.5 / eps)


def narrowed_products(device_type: str) -> str | None:
    """Return what float32 matrix products are narrowed to on a device, ``tf32`` or ``bf16``; None: to nothing.

    ``torch.set_float32_matmul_precision`` asks for it, and so do some images' environment variables.

    Example:
        >>> narrowed_products("cpu") is None
        True
    """
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision: str = backend.matmul.fp32_precision
    return precision if precision in ("tf32", "bf16") else None


PRODUCTS: dict[str, Callable[[StepFn, Hidden, Hidden], Hidden]] = {
    "finite_difference": finite_difference,
    "jvp": jvp,
    "vjp": vjp,
}


def product_named(method: str) -> Callable[[StepFn, Hidden, Hidden], Hidden]:
    """Return a product by its name.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> product_named("jvp") is jvp
        True
    """
    if method not in PRODUCTS:
        raise ValueError(f"`method` must be one of {sorted(PRODUCTS)}, got {method!r}.")
    return PRODUCTS[method]
