"""The linear head's loops behind three functions: run here and now, or as one opaque node where somebody looks on.

A compiler would unroll a loop over chunks for one number of rows, and move the pieces so that several chunks of
logits are alive at once. A selective checkpoint that kept some of a loop's products, which are written over, would
hand one back for another. Exported programs hold no op of ours: there, and for tensors that dispatch on what is done
to them, the same rows are computed in plain functional ops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ops._head import fast, lean
from torch_ops._head.linear import Linear, formed_in
from torch_ops._head.rounding import levelled, scaled
from torch_ops._modes import is_observed
from torch_ops._rules.plan import Plan

_HEAD = "Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor? up, Tensor target, Tensor? weight"
_UPSTREAM = "Tensor? d_nll, Tensor? d_lse, Tensor? d_smooth, Tensor? d_entropy"
_PLAN = "float scale, float? softcap, bool smooth, bool entropy, bool argmax, bool lean, int? chunk_size"
_library = torch.library.Library("softmax_ext", "FRAGMENT")
_library.define(f"head_fwd({_HEAD}, {_PLAN}) -> Tensor[]")
_library.define(f"head_bwd({_HEAD}, Tensor m, Tensor rest, Tensor? h, {_UPSTREAM}, bool[] needs, {_PLAN}) -> Tensor[]")
_library.define(
    f"head_fwd_bwd({_HEAD}, Tensor? a, Tensor? s, Tensor? c, Tensor? index, bool[] needs, {_PLAN}) -> Tensor[]"
)


def fwd(arrays: Sequence[Any], plan: Plan) -> list[Tensor]:
    """[nll, lse, [smooth], [entropy], m, rest, [argmax]] of each row."""
    return _as_one("head_fwd", _fwd, arrays)(*arrays, *plan)


def bwd(arrays: Sequence[Any], needs: Sequence[bool], plan: Plan) -> list[Tensor]:
    """Those needed of dX, dW, db, d_up, d_target, d_weight."""
    return _as_one("head_bwd", _bwd, arrays)(*arrays, needs, *plan)


def fwd_bwd(
    arrays: Sequence[Any], needs: Sequence[bool], plan: Plan
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """([nll, lse, smooth], [dX, dW, db, d_up]) of the weighted sum, the latter unrounded."""
    out = _as_one("head_fwd_bwd", _fwd_bwd, arrays)(*arrays, needs, *plan)
    smooth = arrays[7] is not None
    found = iter(out[2 + smooth :])
    return [*out[:2], out[2] if smooth else None], [next(found) if need else None for need in needs]


def _as_one(name: str, loop: Callable[..., list[Tensor]], arrays: Sequence[Any]) -> Callable[..., list[Tensor]]:
    """The loop, or the op that hides it from whoever is shown the ops on the arrays."""
    if not is_observed(*arrays):
        return loop
    if "torch.utils.flop_counter" in sys.modules:  # its import takes a quarter of PyTorch's own
        from torch_ops._head import flops

        flops.tell()
    return getattr(torch.ops.softmax_ext, name)


def _fwd(x: Tensor, *args: Any) -> list[Tensor]:
    lw, lb, up, target, weight, *plan = args
    p = Plan(*plan)
    return (lean if p.lean else fast).fwd(x, Linear(lw, lb, up), target, weight, p)


def _bwd(*args: Any) -> list[Tensor]:
    (x, lw, lb, up, target, weight, m, rest, h), needs, plan = args[:9], args[13], Plan(*args[14:])
    peak, upstream = levelled(args, [*args[9:13]])
    loops = lean if plan.lean else fast
    found = loops.bwd(x, Linear(lw, lb, up), target, weight, m, rest, h, upstream, needs, plan)
    return [d if peak is None else scaled(d, peak, d.dtype) for d in found if d is not None]


def _fwd_bwd(*args: Any) -> list[Tensor]:
    values, grads = sums(args[:10], args[10], Plan(*args[11:]))
    return [*values, *(g for g in grads if g is not None)]


def sums(
    arrays: Sequence[Any],
    needs: Sequence[bool],
    plan: Plan,
    visit: Callable[..., Sequence[Tensor]] = fast.visit,
    over: Callable[[Tensor], Tensor] = lambda own: own,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """fast.fwd_bwd of levelled upstream gradients."""
    x, lw, lb, up, target, weight, a, s, c, index = arrays
    peak, (a, _, s, _) = levelled(arrays, [a, None if c is None else 2.0 * c, s, None], over)
    if peak is not None and c is not None:
        c = c / peak
    values, grads = fast.fwd_bwd(x, Linear(lw, lb, up), target, weight, a, s, c, index, needs, plan, visit)
    # Levelled gradients leave in the compute type: dX times the peak may be out of float16's range until it is scaled.
    return values, [g if g is None or peak is None else scaled(g, peak, peak.dtype) for g in grads]


def _fwd_bwd_one_type(*args: Any) -> list[Tensor]:
    # Whether a half-precision dW was summed or is one product depends on the number of rows: a graph has one type.
    out, needs = _fwd_bwd(*args), args[10]
    first = 2 + (args[7] is not None)
    types = [t for t, need in zip(_types_of_gradients(args[0], args[4]), needs, strict=True) if need]
    return [*out[:first], *(g.to(t) for g, t in zip(out[first:], types, strict=True))]


def _types_of_gradients(x: Tensor, target: Tensor) -> tuple[torch.dtype, ...]:
    """Of dX, dW, db and d_up as a graph has them, before they are scaled."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return (kind if x.dtype == torch.float16 else formed_in(x, target)), kind, kind, kind


for _name, _loop in (("head_fwd", _fwd), ("head_bwd", _bwd), ("head_fwd_bwd", _fwd_bwd_one_type)):
    _library.impl(_name, _loop, "CompositeExplicitAutograd")


def _own_like(x: Tensor, target: Tensor) -> list[Tensor]:
    """nll: a number a row, or one for each of its K classes."""
    shape = target.shape if target.dim() == 2 and not target.is_floating_point() else target.shape[:1]
    return _row_like(x, shape, 1)


def _row_like(x: Tensor, n: Any, count: int) -> list[Tensor]:
    return [x.new_empty(n, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(count)]


def _dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.register_fake("softmax_ext::head_fwd")
def _(*args: Any) -> list[Tensor]:
    x, plan = args[0], Plan(*args[6:])
    argmax = [x.new_empty(x.shape[0], dtype=torch.int64)] * plan.argmax
    return _own_like(x, args[4]) + _row_like(x, x.shape[0], plan.values + 1) + argmax


@torch.library.register_fake("softmax_ext::head_bwd")
def _(*args: Any) -> list[Tensor]:
    return [_dense_like(v, v.dtype) for v, need in zip(args[:6], args[13], strict=True) if need]


@torch.library.register_fake("softmax_ext::head_fwd_bwd")
def _(*args: Any) -> list[Tensor]:
    x, target, s, needs = args[0], args[4], args[7], args[10]
    types = _types_of_gradients(x, target)
    grads = [_dense_like(v, t) for v, t, need in zip(args[:4], types, needs, strict=True) if need]
    return _own_like(x, target) + _row_like(x, target.shape[0], 1 + (s is not None)) + grads
