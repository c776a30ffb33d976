"""What the ops share about tensors: their facts for the contract, autocast, vmap layout, compiler graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from softmax_ext.contract import Array

_F = TypeVar("_F", bound=Callable[..., Any])

IN_GRAPH: list[Callable[..., Any]] = []


def describe(x: Any) -> Array:
    """The facts of a tensor that the contract's rules ask for."""
    if not isinstance(x, Tensor):
        return Array((), f"{type(x).__name__} object", "other")
    dtype = str(x.dtype).removeprefix("torch.")
    if x.layout != torch.strided or x.is_nested:
        return Array((), "nested" if x.is_nested else str(x.layout).removeprefix("torch."), "sparse")
    if x.is_floating_point():
        kind = "float"
    elif x.dtype == torch.bool:
        kind = "bool"
    else:
        kind = "complex" if x.is_complex() else "int"
    return Array(tuple(x.shape), dtype, kind, str(x.device))


def has_autocast(device: str) -> bool:
    """torch.amp.is_autocast_available, which PyTorch 2.11's compiler cannot trace: a constant to it (_compiler.py)."""
    return torch.amp.is_autocast_available(device)


def autocast_dtype(builtin: Callable[..., Tensor], x: Tensor) -> torch.dtype | None:
    """The type the built-in would compute in under the autocast that is on, else None."""
    device = x.device.type
    if not (has_autocast(device) and torch.is_autocast_enabled(device) and x.is_floating_point()):
        return None
    # Each device has its own list of ops that autocast widens: ask the built-in.
    dtype = builtin(x.detach().new_zeros(1), dim=-1).dtype
    return None if dtype == x.dtype else dtype


def is_transformed(x: Tensor) -> bool:
    """Whether torch.func is at work on x: its values cannot be looked at, its memory not be written."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def is_constant(*args: Any) -> bool:
    """Whether nobody differentiates or maps what is computed from the arguments now."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    if forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled():
        for x in args:  # any() over a generator would double the time
            if isinstance(x, Tensor) and x.requires_grad:
                return False
    return True


class Rule(Function):
    """An autograd.Function (forward and setup_context apart) whose call costs no more than a small row."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The outputs of forward, with the derivative where somebody wants it."""
        if is_constant(*args):
            return cls.forward(*args)
        if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportAttributeAccessIssue]
            return super().apply(*args)
        # Function.apply does the same after an inspect.signature, which fills in defaults (ours have none) and
        # takes 16 of its 23 us on a 2-core x86-64.
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # pyright: ignore[reportAttributeAccessIssue]


def is_untracked(*arrays: Tensor | None) -> bool:
    """Whether nobody differentiates or batches what is computed from the arrays now."""
    return not torch.is_grad_enabled() and not any(
        x is not None
        and (
            is_transformed(x)
            or torch._C._functorch.is_legacy_batchedtensor(x)  # pyright: ignore[reportAttributeAccessIssue]
            or forward_ad.unpack_dual(x).tangent is not None
        )
        for x in arrays
    )


def batch_first(info: Any, in_dims: tuple[int | None, ...], *arrays: Any) -> tuple[Any, ...]:
    """The arrays of a vmap rule with their batch dimension first, expanded where they have none."""
    return tuple(
        x if x is None else x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
        for x, at in zip(arrays, in_dims, strict=False)
    )


def forward_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A jvp rule `rule(ctx, saved, *tangents)` that can itself be differentiated in forward mode.

    PyTorch calls jvp with forward mode switched off, so a rule written in plain ops loses every outer level (a
    jvp of a jvp is silently 0). Switched on again, the saved inputs still carry the tangents of the level
    being computed, which must not enter its own tangent: hence the primals (level 0 is the only one there is;
    while a function is compiled PyTorch does not know it is current).
    """

    @wraps(rule)
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [x if x is None else forward_ad.unpack_dual(x, level=0).primal for x in ctx.saved_tensors]
            return rule(ctx, saved, *tangents)

    return jvp


def in_graph(fn: _F) -> _F:
    """Mark a function that applies an autograd.Function with jvp, which torch.compile cannot inline.

    Such a function enters the compiler's graph as one node and is traced, with all its rules, by the stage that
    follows. It takes tensors and Python constants only.
    """
    IN_GRAPH.append(fn)
    return fn


def enter_graph() -> None:
    """Tell the compiler about the marked functions (it is imported only by those who compile)."""
    if torch.compiler.is_compiling():
        from torch_ops import _compiler  # noqa: F401
