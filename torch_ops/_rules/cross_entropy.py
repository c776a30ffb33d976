"""A cross-entropy row as an autograd.Function with analytic derivatives of every order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softmax_ext.contract import LossOptions
from torch_ops._modes import is_eager, is_sole, is_untracked, is_wanted, may_overwrite
from torch_ops._rows import dispatch as rows
from torch_ops._rows import native, triton
from torch_ops._rules.curvature import Curvature
from torch_ops._rules.function import Rule, batch_first, forward_rule, in_graph
from torch_ops._rules.kept import given_back, kept
from torch_ops._rules.plan import Plan

_IGNORED = LossOptions().ignored


@in_graph
def row(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    scale: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
    inplace: bool,
) -> tuple[Tensor, ...]:
    """(nll, lse, [smooth], [entropy], m, rest) of each row, with every derivative."""
    return CrossEntropy.apply(logits, target, weight, dim, scale, softcap, smooth, entropy, inplace)  # pyright: ignore


class CrossEntropy(Rule):
    """(nll, lse, [smooth], [entropy], m, rest) of each row. Saves logits, target, weight, m and rest."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dim: int,
        scale: float,
        softcap: float | None,
        smooth: bool,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        layout: dict[str, Any] = {"dim": dim, "scale": scale, "softcap": softcap}
        return rows.cross_entropy_fwd(logits, target, weight, **layout, smooth=smooth, entropy=entropy)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, target, weight, dim, *plan, ctx.inplace = inputs
        ctx.plan, ctx.layout = Plan(*plan), (dim, *plan[:2])
        m, rest = output[-2:]
        ctx.mark_non_differentiable(m, rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, m, kept(ctx, rest))
        ctx.save_for_forward(logits, target, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        logits, target, weight, m, rest = ctx.saved_tensors
        rest = given_back(ctx, rest)
        upstream = ctx.plan.upstream(grads)
        d_logits = d_target = d_weight = None
        if all(g is None for g in upstream):
            return (None,) * 9
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:  # before the logits are overwritten
            curve = Curvature(logits, target, weight, *ctx.layout)
            d_target, d_weight = curve.mass_gradient(upstream, *ctx.needs_input_grad[1:3])
        if ctx.needs_input_grad[0]:
            d_logits = _input_bwd((logits, target, weight, m, rest, *upstream), ctx.layout, inplace=ctx.inplace)
        return d_logits, d_target, d_weight, *(None,) * 6

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor | None, dy: Any, dw: Tensor | None, *_: None) -> Any:
        curve = Curvature(*saved, *ctx.layout)
        plan = ctx.plan
        nll, lse, smooth, entropy = curve.tangents(dx, dy, dw, smooth=plan.smooth, entropy=plan.entropy)
        return nll, lse, *[smooth] * plan.smooth, *[entropy] * plan.entropy, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, logits: Any, target: Any, weight: Any, dim: int, *rest: Any) -> Any:
        logits, target = batch_first(info, in_dims, logits, target)
        rest = (*rest[:-1], False)  # the batch may be an expanded view: nothing to write over
        if in_dims[2] is None:
            out = CrossEntropy.apply(logits, target, weight, dim + 1, *rest)
        else:  # class weights that differ by example: one at a time, the kernels share one vector
            each = zip(logits, target, weight.movedim(in_dims[2], 0), strict=True)
            outs = [CrossEntropy.apply(x, t, w, dim, *rest) for x, t, w in each]
            out = tuple(torch.stack(values) for values in zip(*outs, strict=True))  # pyright: ignore
        return out, (0,) * len(out)  # pyright: ignore[reportArgumentType]


class CrossEntropyBwd(Rule):
    """dL/dlogits as a function of logits, targets, weights and upstream gradients: linear in the last."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        m: Tensor,
        rest: Tensor,
        d_nll: Tensor | None,
        d_lse: Tensor | None,
        d_smooth: Tensor | None,
        d_entropy: Tensor | None,
        dim: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        upstream = (d_nll, d_lse, d_smooth, d_entropy)
        return rows.cross_entropy_bwd(logits, target, weight, m, rest, *upstream, dim=dim, scale=scale, softcap=softcap)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *arrays, dim, scale, softcap = inputs
        ctx.layout = (dim, scale, softcap)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * 12
        logits, target, weight, _, _, *upstream = ctx.saved_tensors
        curve = Curvature(logits, target, weight, *ctx.layout)
        needs = ctx.needs_input_grad
        d_logits = curve.hessian_vector(v, upstream) if needs[0] else None
        d_target, d_weight = curve.mass_hessian_vector(v, upstream, *needs[1:3])
        tangents = curve.tangents(v, None, None, smooth=needs[7], entropy=needs[8])
        d_upstream = [t if need else None for t, need in zip(tangents, needs[5:9], strict=True)]
        return d_logits, d_target, d_weight, None, None, *d_upstream, None, None, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Any, dy: Any, dw: Any, _m: Any, _rest: Any, *tangents: Any) -> Any:
        logits, target, weight, m, rest, *upstream = saved
        curve = Curvature(logits, target, weight, *ctx.layout)
        out = torch.zeros_like(logits)
        if dx is not None:
            out = out + curve.hessian_vector(dx, upstream)
        if dy is not None or dw is not None:
            out = out + curve.gradient_by_mass(dy, dw, upstream)
        along = tangents[:4]
        if any(t is not None for t in along):
            out = out + CrossEntropyBwd.apply(logits, target, weight, m, rest, *along, *ctx.layout)
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, dim, scale, softcap = args
        logits, target, _, *per_row = batch_first(info, in_dims, *arrays)
        weight = arrays[2]
        if in_dims[2] is None:
            return CrossEntropyBwd.apply(logits, target, weight, *per_row, dim + 1, scale, softcap), 0
        weights = weight.movedim(in_dims[2], 0)
        outs = [
            CrossEntropyBwd.apply(x, t, w, *(r if r is None else r[i] for r in per_row), dim, scale, softcap)
            for i, (x, t, w) in enumerate(zip(logits, target, weights, strict=True))
        ]
        return torch.stack(outs), 0  # pyright: ignore[reportArgumentType]


def mean(input: Any, target: Any, inplace: bool) -> Tensor | None:
    """The loss without options, by a short way; None where that is not for these arguments."""
    if type(target) is not Tensor or target.is_nested:
        return None
    if native.serves_directly(input):
        if not is_wanted(input):
            found = native.cross_entropy_mean(input, target, False)
            return found[0] if found else None
        return CrossEntropyMean.recorded(input, target, inplace and may_overwrite(input))[0]
    elif triton.serves_directly(input) and triton.serves_indices(target):
        if (input.dim(), input.shape[:1], input.device) != (2, target.shape, target.device):
            return None
        target = triton.ops.canonical(target, input.shape[1], _IGNORED)
    else:
        return None
    return CrossEntropyMean.apply(input, target, inplace and may_overwrite(input))[0]


class CrossEntropyMean(Rule):
    """(loss, m, rest, kept), or nothing but None: row and reduction in one. Saves these, logits and target."""

    @staticmethod
    def forward(logits: Tensor, target: Tensor, inplace: bool) -> tuple[Tensor | None, ...]:
        if triton.serves(logits, 1):
            return triton.cross_entropy_mean(logits, target)
        # there all rows are kept, or it is not for these targets
        return *(native.cross_entropy_mean(logits, target, True) or [None] * 3), None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        if output[0] is not None:
            ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
            ctx.set_materialize_grads(False)
            _, m, rest, count = output
            ctx.save_for_backward(*inputs[:2], m, kept(ctx, rest), count)
            ctx.inplace = inputs[2]

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> Any:
        if d_loss is None:
            return None, None, None
        logits, target, m, rest, count = ctx.saved_tensors
        rest = given_back(ctx, rest)
        if count is None and not (ctx.inplace or torch.is_grad_enabled()) and native.serves_directly(logits):
            return native.cross_entropy_mean_bwd(logits, target, m, rest, d_loss), None, None
        count = len(target) if count is None else count.clamp(min=1)  # of a mean over nothing the gradient is 0
        args = (logits, target, None, m, rest, (d_loss / count).expand(len(target)), None, None, None)
        return _input_bwd(args, (1, 1.0, None), inplace=ctx.inplace), None, None


def _input_bwd(args: tuple[Any, ...], layout: Sequence[Any], *, inplace: bool) -> Any:
    """dL/d(logits), over the logits where `inplace` says so and no derivative of it is asked for."""
    if not (inplace and is_untracked(*args) and is_eager(args[0]) and is_sole(args[0])):
        return CrossEntropyBwd.apply(*args, *layout)
    dim, scale, softcap = layout
    return rows.cross_entropy_bwd(*args, dim=dim, scale=scale, softcap=softcap, out=args[0].detach())
