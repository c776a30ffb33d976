"""The linear head as autograd.Functions: first derivatives by hand-written loops, all others by chunks of rows.

legend:  z = X WT + b (N, V), never whole; G = dL/dz, from the row functions
formula: dX = G W,  dW = GT X,  db = sum_i G_i
source:  document 3's chain rule dE/dw = dE/da da/dz dz/dw, document 4's G; docs/derivation.md
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from torch_ops import _head_classes as classes
from torch_ops import _head_tokens as tokens
from torch_ops import _rows as rows
from torch_ops._arrays import forward_rule, in_graph, is_constant
from torch_ops._chunks import DERIVED, RowMap, batched, pulled_back, pushed_forward, run, that_fit
from torch_ops._head_parts import by_hand, scaled
from torch_ops.cross_entropy import _row


class Plan(NamedTuple):
    """The static part of a head's rows."""

    scale: float
    softcap: float | None
    smooth: bool
    entropy: bool
    argmax: bool
    lean: bool
    chunk_size: int | None

    def derived_size(self, x: Tensor, linear_weight: Tensor) -> int:
        """Rows in a chunk where a derivative is derived in plain ops."""
        n, v = x.shape[0], linear_weight.shape[0]
        if self.chunk_size is None:
            return that_fit(None, v * DERIVED, x.itemsize)
        return max(1, n * self.chunk_size // max(1, v)) if self.lean else self.chunk_size

    def values(self) -> int:
        """How many differentiable results a row has."""
        return 2 + self.smooth + self.entropy

    def row_map(self) -> RowMap:
        """(x, linear_weight, linear_bias, target, weight) -> (nll, lse, [smooth], [entropy], m, rest), by rows of x."""

        def call(x: Tensor, lw: Tensor, lb: Tensor | None, target: Tensor, w: Tensor | None) -> tuple[Tensor, ...]:
            if not target.is_floating_point():  # an ignored row reaches no result, not even through 0 * NaN
                x = x.masked_fill((target == rows.IGNORED).unsqueeze(1), 0.0)
            z = F.linear(x, lw, lb)
            out = _row(z, target, w, 1, self.scale, self.softcap, self.smooth, self.entropy, False)
            return (*out, rows.capped(z.detach(), self.scale, self.softcap).argmax(1)) if self.argmax else out

        return RowMap(call, (True, False, False, True, False), (True,) * (self.values() + 2 + self.argmax))


@in_graph
def head_rows(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    *plan: Any,
) -> tuple[Tensor, ...]:
    """(nll, lse, [smooth], [entropy], m, rest, [argmax]) of each row."""
    arrays = (x, linear_weight, linear_bias, target, weight)
    if is_constant(*arrays):
        return _rows_fwd(*arrays, Plan(*plan))
    return HeadRows.apply(*arrays, Plan(*plan))  # pyright: ignore[reportReturnType]


@in_graph
def head_sum(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    a: Tensor | None,
    s: Tensor | None,
    c: Tensor | None,
    index: Tensor | None,
    *plan: Any,
) -> Tensor:
    """sum_i a_i nll_i + s_i smooth_i + c_i lse_i^2 over the rows of x that `index` names (None: all)."""
    arrays = (x, linear_weight, linear_bias, target, weight)
    if _one_pass(*arrays, a, s, c):
        return HeadSum.apply(*arrays, a, s, c, index, Plan(*plan))  # pyright: ignore[reportReturnType]
    x = x if index is None else x.index_select(0, index)
    return weighted(head_rows(x, *arrays[1:], *plan), a, s, c)


def weighted(values: Any, a: Tensor | None, s: Tensor | None, c: Tensor | None) -> Tensor:
    """The sum of head_sum from the values of each row."""
    terms = [] if a is None else [a * values[0]]
    if s is not None:
        terms.append(s * values[2])
    if c is not None:
        terms.append(c * values[1].square())
    return sum(terms[1:], terms[0]).sum()


class HeadRows(Function):
    """(nll, lse, [smooth], [entropy], m, rest, [argmax]) of each row. Saves its inputs and some row numbers."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _rows_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arrays, ctx.plan = inputs
        m, rest = output[ctx.plan.values() : ctx.plan.values() + 2]
        h = output[ctx.plan.values() - 1] if ctx.plan.entropy else None
        ctx.mark_non_differentiable(*output[ctx.plan.values() :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, m, rest, None if h is None else h.detach())
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        given = iter(grads)
        ups = [next(given), next(given), *(next(given) if on else None for on in (ctx.plan.smooth, ctx.plan.entropy))]
        needs = tuple(ctx.needs_input_grad[:5])
        out: list[Tensor | None] = [None] * 6
        if any(u is not None for u in ups):
            found: Any = HeadBwd.apply(*ctx.saved_tensors, *ups, ctx.plan, needs)
            for i, g in zip((i for i in range(5) if needs[i]), found, strict=True):
                out[i] = g
        return tuple(out)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        plan, along = ctx.plan, range(ctx.plan.values())
        size = plan.derived_size(*saved[:2])
        out = pushed_forward(plan.row_map(), size, saved, tangents[:5], along)
        return *out, None, None, *[None] * plan.argmax

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, lw: Any, lb: Any, target: Any, w: Any, plan: Plan) -> Any:
        if all(at is None for at in (in_dims[1], in_dims[2], in_dims[4])):  # one head: examples are rows
            x, target = (
                a.expand(info.batch_size, *a.shape) if at is None else a.movedim(at, 0)
                for a, at in ((x, in_dims[0]), (target, in_dims[3]))
            )
            out = HeadRows.apply(x.flatten(0, 1), lw, lb, target.flatten(0, 1), w, plan)
            out = tuple(v.unflatten(0, x.shape[:2]) for v in out)  # pyright: ignore[reportGeneralTypeIssues]
            return out, (0,) * len(out)
        args = (x, lw, lb, target, w)
        return batched(info, in_dims[:5], plan.row_map(), _size_of_one(plan, args, in_dims), args)


class HeadBwd(Function):
    """Those needed of (dX, dW, db, d_target, d_weight) as a function of everything: linear in the upstreams."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _rows_bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arrays, ctx.plan, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        fn, size, args, places = _as_map(ctx.saved_tensors, ctx.plan, ctx.needs)
        out: list[Tensor | None] = [None] * 14
        found = pulled_back(fn, size, args, cotangents, [ctx.needs_input_grad[i] for i in places])
        for i, g in zip(places, found, strict=True):
            out[i] = g
        return tuple(out)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        fn, size, args, places = _as_map(saved, ctx.plan, ctx.needs)
        return pushed_forward(fn, size, args, [tangents[i] for i in places], range(len(fn.out_rows)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, plan, needs = args
        fn, _, given, places = _as_map(arrays, plan, needs)
        size = _size_of_one(plan, arrays, in_dims)
        return batched(info, [in_dims[i] for i in places], fn, size, given)


def _as_map(arrays: Any, plan: Plan, needs: tuple[bool, ...]) -> tuple[RowMap, int, list[Any], list[int]]:
    """(the gradient as a row map, its chunk, its arguments, their places among HeadBwd's)."""
    ups = [i for i, u in enumerate(arrays[8:12]) if u is not None]
    # Results exist without gaps: smooth and entropy stand where the plan has them.
    names = [0, 1, *[2] * plan.smooth, *[3] * plan.entropy]
    wrt = [i for i, need in enumerate(needs) if need]
    fn = plan.row_map().pullback(wrt, [names.index(i) for i in ups])
    places = [*range(5), *(8 + i for i in ups)]
    return fn, plan.derived_size(*arrays[:2]), [arrays[i] for i in places], places


def _size_of_one(plan: Plan, arrays: Any, in_dims: Any) -> int:
    """The chunk of one example."""
    x, lw = (a if at is None else a.select(at, 0) for a, at in zip(arrays[:2], in_dims[:2], strict=True))
    return plan.derived_size(x, lw)


class HeadSum(Function):
    """head_sum with its gradients formed in the forward pass: three matmuls, and G in the logits' memory.

    Saves dX, dW (unrounded) and db beside its inputs; the backward pass scales them: in half precision a factor
    of 1/N on G itself would flush most of it to 0.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *arrays, plan = args
        a, s, c = arrays[5:8]
        needs = tuple(x is not None and x.requires_grad for x in arrays[:3])
        values, grads = _sum_fwd_bwd(*arrays, plan, needs)
        ctx.plan = plan
        ctx.save_for_backward(*arrays, *grads, *values, *[None] * (s is None))
        return weighted(values, a, s, c)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (g,) = upstream
        x, lw, lb, target, w, a, s, c, index, dx, dw, db, nll, lse, smooth = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated: once more, as a function of everything
            arrays = [v for v in (x, lw, lb, a, s, c) if v is not None and v.requires_grad]
            with_index = x if index is None else x.index_select(0, index)
            total = weighted(head_rows(with_index, lw, lb, target, w, *ctx.plan), a, s, c)
            found = iter(torch.autograd.grad(total, arrays, g, create_graph=True))
            grads = [next(found) if v is not None and v.requires_grad else None for v in (x, lw, lb, a, s, c)]
            return *grads[:3], None, None, *grads[3:], None, None
        d_x, d_w, d_b = (
            d if d is None else scaled(d, g, like.dtype) for d, like in zip((dx, dw, db), (x, lw, lb), strict=True)
        )
        d_a, d_s, d_c = (
            g * value if need else None
            for value, need in zip(
                (nll, smooth, lse if c is None else lse.square()), ctx.needs_input_grad[5:8], strict=True
            )
        )
        return d_x, d_w, d_b, None, None, d_a, d_s, d_c, None, None


def _one_pass(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    *coefficients: Tensor | None,
) -> bool:
    """Whether a first derivative is wanted that the forward pass can form."""
    head = (x, linear_weight, linear_bias)
    return (
        torch.is_grad_enabled()
        and any(v is not None and v.requires_grad for v in head)
        and not any(v is not None and v.requires_grad for v in (target, weight))
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and forward_ad._current_level < 0
        and by_hand(*head, target, weight, *coefficients)
    )


def _rows_fwd(x: Tensor, lw: Tensor, lb: Tensor | None, target: Tensor, w: Tensor | None, plan: Plan) -> Any:
    arrays = (x, lw, lb, target, w)
    if not by_hand(*arrays):
        return run(plan.row_map(), that_fit(None, lw.shape[0], x.itemsize), *arrays)
    door = classes if plan.lean else tokens
    return tuple(
        door.head_fwd(
            *arrays,
            scale=plan.scale,
            softcap=plan.softcap,
            smooth=plan.smooth,
            entropy=plan.entropy,
            argmax=plan.argmax,
            chunk_size=plan.chunk_size,
        )
    )


def _rows_bwd(*args: Any) -> Any:
    *arrays, plan, needs = args
    if not by_hand(*arrays):
        fn, size, given, _ = _as_map(arrays, plan, needs)
        return run(fn, size, *given)
    peak, arrays[8:] = _levelled(arrays[0].dtype, arrays[8:])
    door = classes if plan.lean else tokens
    layout = {"scale": plan.scale, "softcap": plan.softcap, "needs": needs, "chunk_size": plan.chunk_size}
    found = door.head_bwd(*arrays[:8], arrays[8:], **layout)
    out = [d for d, need in zip(found, needs, strict=True) if need]
    return tuple(out) if peak is None else tuple(scaled(d, peak, d.dtype) for d in out)


def _levelled(dtype: torch.dtype, upstream: list[Any]) -> tuple[Tensor | None, list[Any]]:
    """(the largest upstream gradient as a power of 2, the upstreams by it), for float16: 1/N would flush G to 0."""
    given = [u for u in upstream if u is not None]
    if dtype != torch.float16 or not given[0].numel():
        return None, upstream
    top = torch.stack([u.abs().max() for u in given]).max()
    _, exponent = torch.frexp(top)
    peak = torch.where((top > 0) & top.isfinite(), torch.ldexp(torch.ones_like(top), exponent), 1.0)
    return peak, [u if u is None else u / peak for u in upstream]


def _sum_fwd_bwd(*args: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    *arrays, plan, needs = args
    layout = {"scale": plan.scale, "softcap": plan.softcap, "needs": needs, "chunk_size": plan.chunk_size}
    return tokens.head_fwd_bwd(*arrays, **layout)
