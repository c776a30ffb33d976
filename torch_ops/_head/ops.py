"""The linear head's loops behind three functions: run here and now, or as one opaque node where somebody looks on.

A compiler would unroll a loop over chunks for one number of rows, and move the pieces so that several chunks of
logits are alive at once. A selective checkpoint that kept some of a loop's products, which are written over, would
hand one back for another. Exported programs hold no op of ours: there, and for tensors that dispatch on what is done
to them, the same rows are computed in plain functional ops.

Saved graphs name the ops, so this file is loaded with the package; the loops are with the first head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_ops._modes import is_observed
from torch_ops._rows.native import describe
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
    return _as_one("fwd", arrays)(*arrays, *plan)


def bwd(arrays: Sequence[Any], needs: Sequence[bool], plan: Plan) -> list[Tensor]:
    """Those needed of dX, dW, db, d_up, d_target, d_weight."""
    return _as_one("bwd", arrays)(*arrays, needs, *plan)


def fwd_bwd(
    arrays: Sequence[Any], needs: Sequence[bool], plan: Plan
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """([nll, lse, smooth], [dX, dW, db, d_up]) of the weighted sum, the latter unrounded."""
    out = _as_one("fwd_bwd", arrays)(*arrays, needs, *plan)
    smooth = arrays[7] is not None
    found = iter(out[2 + smooth :])
    return [*out[:2], out[2] if smooth else None], [next(found) if need else None for need in needs]


def _as_one(way: str, arrays: Sequence[Any]) -> Callable[..., list[Tensor]]:
    """The loop, or the op that hides it."""
    return getattr(torch.ops.softmax_ext, f"head_{way}") if hidden(*arrays) else getattr(_loops(), way)


def hidden(*arrays: Any) -> bool:
    """Whether somebody is shown the ops on the arrays, to whom a loop is to be one."""
    if not is_observed(*arrays):
        return False
    if "torch.utils.flop_counter" in sys.modules:  # its import takes a quarter of PyTorch's own
        from torch_ops._head import flops

        flops.tell()
    return True


def _loops() -> Any:
    from torch_ops._head import loops

    return loops


def _opened(loop: str, *args: Any) -> list[Tensor]:
    """An op of that loop, called by whoever."""
    return getattr(_loops(), loop)(*args)


for _name, _loop in (("head_fwd", "fwd"), ("head_bwd", "bwd"), ("head_fwd_bwd", "fwd_bwd_one_type")):
    _library.impl(_name, partial(_opened, _loop), "CompositeExplicitAutograd")


def _own_like(x: Tensor, target: Tensor) -> list[Tensor]:
    """nll: a number a row, or one for each of its K classes."""
    shape = target.shape if target.dim() == 2 and not target.is_floating_point() else target.shape[:1]
    return _row_like(x, shape, 1)


def _row_like(x: Tensor, n: Any, count: int) -> list[Tensor]:
    return [x.new_empty(n, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(count)]


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _fwd_like(*args: Any) -> list[Tensor]:
    x, plan = args[0], Plan(*args[6:])
    argmax = [x.new_empty(x.shape[0], dtype=torch.int64)] * plan.argmax
    return _own_like(x, args[4]) + _row_like(x, x.shape[0], plan.values + 1) + argmax


def _bwd_like(*args: Any) -> list[Tensor]:
    return [dense_like(v, v.dtype) for v, need in zip(args[:6], args[13], strict=True) if need]


def _fwd_bwd_like(*args: Any) -> list[Tensor]:
    x, target, s, needs = args[0], args[4], args[7], args[10]
    types = _loops().types_of_gradients(x, target)
    grads = [dense_like(v, t) for v, t, need in zip(args[:4], types, needs, strict=True) if need]
    return _own_like(x, target) + _row_like(x, target.shape[0], 1 + (s is not None)) + grads


describe("softmax_ext", {"head_fwd": _fwd_like, "head_bwd": _bwd_like, "head_fwd_bwd": _fwd_bwd_like}, _library)
