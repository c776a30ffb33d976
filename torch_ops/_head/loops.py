"""The linear head's loops by the memory they take, fast or lean, of upstream gradients that no type rounds to 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ops._head import fast, lean
from torch_ops._head.linear import Linear, formed_in
from torch_ops._head.rounding import levelled, scaled
from torch_ops._rules.plan import Plan


def fwd(x: Tensor, *args: Any) -> list[Tensor]:
    """[nll, lse, [smooth], [entropy], m, rest, [argmax]] of each row."""
    lw, lb, up, target, weight, *plan = args
    p = Plan(*plan)
    return (lean if p.lean else fast).fwd(x, Linear(lw, lb, up), target, weight, p)


def bwd(*args: Any) -> list[Tensor]:
    """Those needed of dX, dW, db, d_up, d_target, d_weight."""
    (x, lw, lb, up, target, weight, m, rest, h), needs, plan = args[:9], args[13], Plan(*args[14:])
    peak, upstream = levelled(args, [*args[9:13]])
    loops = lean if plan.lean else fast
    found = loops.bwd(x, Linear(lw, lb, up), target, weight, m, rest, h, upstream, needs, plan)
    return [d if peak is None else scaled(d, peak, d.dtype) for d in found if d is not None]


def fwd_bwd(*args: Any) -> list[Tensor]:
    """[nll, lse, [smooth]] of the weighted sum, and those needed of [dX, dW, db, d_up], unrounded."""
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


def fwd_bwd_one_type(*args: Any) -> list[Tensor]:
    """fwd_bwd as an op of a graph."""
    # Whether a half-precision dW was summed or is one product depends on the number of rows: a graph has one type.
    out, needs = fwd_bwd(*args), args[10]
    first = 2 + (args[7] is not None)
    types = [t for t, need in zip(types_of_gradients(args[0], args[4]), needs, strict=True) if need]
    return [*out[:first], *(g.to(t) for g, t in zip(out[first:], types, strict=True))]


def types_of_gradients(x: Tensor, target: Tensor) -> tuple[torch.dtype, ...]:
    """Of dX, dW, db and d_up as a graph has them, before they are scaled."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return (kind if x.dtype == torch.float16 else formed_in(x, target)), kind, kind, kind
