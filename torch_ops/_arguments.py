"""What a door asks of its arguments first: their facts for the contract, autocast's type, a target of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softmax_ext.contract import Array, LossOptions
from torch_ops._modes import has_autocast

_DEFAULTS = tuple(vars(LossOptions()).values())
_TYPES = [*map(type, _DEFAULTS)]


def is_default(given: tuple[Any, ...]) -> bool:
    """Whether a loss's options, in LossOptions' order, are those of a call without any."""
    # Types first: True == 1 == 1.0, and a tensor's == is no answer.
    return [*map(type, given)] == _TYPES and given == _DEFAULTS


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


def parts_of(target: Any) -> tuple[Any, ...]:
    """The tensors of a target: one, or the two of a sparse pair."""
    return tuple(target) if isinstance(target, tuple | list) else (target,)


def halves(target: Any) -> tuple[Any, Any]:
    """(ids, probabilities) of a sparse pair, (target, None) of any other."""
    return tuple(target) if isinstance(target, tuple | list) else (target, None)


def describe_target(target: Any) -> Any:
    """`describe`, of a pair each."""
    if isinstance(target, tuple | list) and len(target) == 2:
        return tuple(None if t is None else describe(t) for t in target)
    return None if target is None else describe(target)


def autocast_dtype(builtin: Callable[..., Tensor], x: Tensor) -> torch.dtype | None:
    """The type the built-in would compute in under the autocast that is on, else None."""
    device = x.device.type
    if not (has_autocast(device) and torch.is_autocast_enabled(device) and x.is_floating_point()):
        return None
    # Each device has its own list of ops that autocast widens: ask the built-in.
    dtype = builtin(x.detach().new_zeros(1), dim=-1).dtype
    return None if dtype == x.dtype else dtype


def autocast(x: Any, *more: Any) -> tuple[Any, ...]:
    """The arrays in the type F.linear would compute in under the autocast that is on."""
    arrays = (x, *more)
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    if not (has_autocast(device) and torch.is_autocast_enabled(device)):
        return arrays
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
        for a in arrays
    )


def one_row(x: Any, linear_weight: Any, target: Any, group: Any) -> Any:
    """The target of a 1-d input, which may be (1,) as in F.cross_entropy."""
    if not all(isinstance(a, Tensor) for a in (x, linear_weight, target)) or x.dim() != 1 or target.shape != (1,):
        return target
    whole = linear_weight.shape[:1] == (1,) and group is None
    return target if target.is_floating_point() or whole else target[0]


def alike(found: Any) -> Any:
    """(loss, statistics), these of the loss's subclass: Tensor.__torch_function__ does not look into a dict."""
    if isinstance(found, tuple) and isinstance(found[1], dict):
        kind = type(found[0])
        return found[0], {k: v.as_subclass(kind) if type(v) is Tensor else v for k, v in found[1].items()}
    return found


def enter_graph() -> None:
    """Tell the compiler about the marked functions (it is imported only by those who compile)."""
    if torch.compiler.is_compiling():
        from torch_ops import _compiler  # noqa: F401
