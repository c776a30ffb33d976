"""The loops of two heads behind three functions, as those of one head are in ops.py: for the same reasons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_ops._head.ops import dense_like, hidden
from torch_ops._rows.native import STATE, describe

if TYPE_CHECKING:
    from torch_ops._head.two_heads import Plan

_HEADS = (
    "Tensor x, Tensor linear_weight, Tensor? linear_bias, "
    "Tensor teacher_x, Tensor teacher_weight, Tensor? teacher_bias, Tensor? keep"
)
_PLAN = (
    "str kind, float beta, float scale, float? softcap, float teacher_scale, float? teacher_softcap, "
    "bool lean, int? chunk_size"
)
_library = torch.library.Library("softmax_ext", "FRAGMENT")
_library.define(f"two_heads_fwd({_HEADS}, {_PLAN}) -> Tensor[]")
_library.define(f"two_heads_bwd({_HEADS}, Tensor state, Tensor up, bool[] needs, {_PLAN}) -> Tensor[]")
_library.define(f"two_heads_fwd_bwd({_HEADS}, Tensor up, bool[] needs, {_PLAN}) -> Tensor[]")


def fwd(arrays: Sequence[Any], plan: Plan) -> tuple[Tensor, Tensor]:
    """(the divergences, the state of each row) of x, linear_weight, linear_bias, the teacher's three, keep."""
    if not hidden(*arrays):
        return _loops().fwd(arrays, plan)
    value, state = torch.ops.softmax_ext.two_heads_fwd(*arrays, *_flat(plan))
    return value, state


def bwd(arrays: Sequence[Any], state: Tensor, up: Tensor, needs: Sequence[bool], plan: Plan) -> list[Tensor]:
    """Those needed of dX, dW, db."""
    if not hidden(*arrays, state, up):
        return _some(_loops().bwd(arrays, state, up, needs, plan))
    return torch.ops.softmax_ext.two_heads_bwd(*arrays, state, up, needs, *_flat(plan))


def fwd_bwd(arrays: Sequence[Any], up: Tensor, needs: Sequence[bool], plan: Plan) -> tuple[Tensor, list[Tensor | None]]:
    """(the divergences, [dX, dW, db] from the rows' upstream gradients, unrounded)."""
    if not hidden(*arrays, up):
        return _loops().fwd_bwd(arrays, up, needs, plan)
    value, *grads = torch.ops.softmax_ext.two_heads_fwd_bwd(*arrays, up, needs, *_flat(plan))
    found = iter(grads)
    return value, [next(found) if need else None for need in needs]


def _flat(plan: Plan) -> tuple[Any, ...]:
    return (*plan.pair[1:], plan.lean, plan.chunk_size)  # a head's classes stand second


def _plan(*flat: Any) -> Plan:
    return _loops().Plan.of(*flat)


def _some(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [g for g in grads if g is not None]


def _loops() -> Any:
    from torch_ops._head import two_heads

    return two_heads


def _open_fwd(*args: Any) -> list[Tensor]:
    return [*_loops().fwd(args[:7], _plan(*args[7:]))]


def _open_bwd(*args: Any) -> list[Tensor]:
    *arrays, state, up = args[:9]
    return _some(_loops().bwd(arrays, state, up, args[9], _plan(*args[10:])))


def _open_fwd_bwd(*args: Any) -> list[Tensor]:
    # Whether a gradient was summed or is one product depends on the number of rows: a graph has one type.
    value, grads = _loops().fwd_bwd(args[:7], args[7], args[8], _plan(*args[9:]))
    types = _types(args[0], args[3])
    return [value, *(g.to(t) for g, t in zip(grads, types, strict=True) if g is not None)]


def _types(x: Tensor, teacher_x: Tensor) -> tuple[torch.dtype, ...]:
    """Of dX, dW and db as a graph has them, before they are scaled."""
    formed = _loops().formed_in_both(x, teacher_x)
    kind = torch.promote_types(formed, torch.float32)
    return (kind if x.dtype == torch.float16 else formed), kind, kind


def _value_like(x: Tensor, teacher_x: Tensor) -> Tensor:
    kind = torch.promote_types(torch.promote_types(x.dtype, teacher_x.dtype), torch.float32)
    return x.new_empty(x.shape[0], dtype=kind)


def _fwd_like(*args: Any) -> list[Tensor]:
    value = _value_like(args[0], args[3])
    return [value, value.new_empty(value.shape[0], STATE)]


def _bwd_like(*args: Any) -> list[Tensor]:
    return [dense_like(v, v.dtype) for v, need in zip(args[:3], args[9], strict=True) if need]


def _fwd_bwd_like(*args: Any) -> list[Tensor]:
    given = zip(args[:3], _types(args[0], args[3]), args[8], strict=True)
    return [_value_like(args[0], args[3]), *(dense_like(v, t) for v, t, need in given if need)]


_OPENED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "two_heads_fwd": (_open_fwd, _fwd_like),
    "two_heads_bwd": (_open_bwd, _bwd_like),
    "two_heads_fwd_bwd": (_open_fwd_bwd, _fwd_bwd_like),
}
for _name, (_loop, _like) in _OPENED.items():
    _library.impl(_name, _loop, "CompositeExplicitAutograd")
describe("softmax_ext", {name: like for name, (_, like) in _OPENED.items()}, _library)
