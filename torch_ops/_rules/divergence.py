"""A student's row against a teacher's as an autograd.Function with analytic derivatives of every order.

legend:  x the student's logits, s = C(x), p = softmax(s), q the teacher's, a constant, d = log p - log q
         u = f'(p/q), <a> = sum_j p_j a_j, c the row's upstream gradient
first:   g = dL/ds = c p (u - <u>);  dL/dx = C' g
second:  for a direction v in x, w = C' v in s and h = w - <w> in d:  dp = p h,  du = u' h, with u' = du/dd, so
         Hess w = c p (h (u - <u> + u') - <h (u - <u> + u')>),  and along x:  C' Hess w + C'' v g
         forward_kl  u + u' = 1: Hess w = c p h          reverse_kl  u' = 1          tv  u' = 0
         jsd         u' = (1 - beta) beta q / m, m = beta q + (1 - beta) p
Symmetric, so the same product serves tangents and cotangents.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softmax_ext.contract import teacher_has_no_gradient
from torch_ops._rows import dispatch as rows
from torch_ops._rows.divergence import Pair, divergence_bwd, divergence_fwd, log_ratio
from torch_ops._rules.function import Rule, batch_first, forward_rule, in_graph
from torch_ops._rules.softmax import softmax


@in_graph
def divergence_row(student: Tensor, teacher: Tensor, keep: Tensor | None, *pair: Any) -> Tensor:
    """The divergence of each row, with every derivative by the student's logits."""
    return Divergence.apply(student, teacher, keep, *pair)[0]  # pyright: ignore


class Divergence(Rule):
    """(divergence, state) of each row. Saves both arrays of logits, keep and the state."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, keep: Tensor | None, *pair: Any) -> tuple[Tensor, Tensor]:
        return divergence_fwd(student, teacher, keep, pair=Pair(*pair))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        student, teacher, keep, *pair = inputs
        ctx.pair, state = Pair(*pair), output[1]
        ctx.mark_non_differentiable(state)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, keep, state)
        ctx.save_for_forward(student, teacher, keep)

    @staticmethod
    def backward(ctx: Any, d_value: Tensor | None, _: None) -> Any:
        student, teacher, keep, state = ctx.saved_tensors
        if d_value is None or not ctx.needs_input_grad[0]:
            return (None,) * 10
        return DivergenceBwd.apply(student, teacher, keep, state, d_value, *ctx.pair), *(None,) * 9

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor | None, dt: Tensor | None, *_: None) -> Any:
        if dt is not None:
            raise teacher_has_no_gradient("divergence", "teacher")
        return (None if dx is None else Curve(saved[0], saved[1], saved[2], ctx.pair).tangent(dx)), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, student: Tensor, teacher: Tensor, keep: Any, dim: int, *rest: Any) -> Any:
        arrays = batch_first(info, in_dims, student, teacher, keep)
        return Divergence.apply(*arrays, dim + 1, *rest), (0, 0)


class DivergenceBwd(Rule):
    """dL/d(student) as a function of the logits and the upstream gradient: linear in the last."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, keep: Tensor | None, state: Tensor, d_value: Tensor, *pair: Any
    ) -> Tensor:
        return divergence_bwd(student, teacher, keep, state, d_value, pair=Pair(*pair))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *arrays, _, _, _, _, _, _, _ = inputs
        ctx.pair = Pair(*inputs[5:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * 12
        student, teacher, keep, _, d_value = ctx.saved_tensors
        curve = Curve(student, teacher, keep, ctx.pair)
        d_student = curve.hessian_vector(v, d_value) if ctx.needs_input_grad[0] else None
        d_upstream = curve.tangent(v) if ctx.needs_input_grad[4] else None
        return d_student, None, None, None, d_upstream, *(None,) * 7

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor | None, _t: Any, _k: Any, _s: Any, d_up: Tensor | None, *_: None) -> Any:
        student, teacher, keep, state, d_value = saved
        out = torch.zeros_like(student)
        if dx is not None:
            out = out + Curve(student, teacher, keep, ctx.pair).hessian_vector(dx, d_value)
        if d_up is not None:
            out = out + DivergenceBwd.apply(student, teacher, keep, state, d_up, *ctx.pair)
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        arrays = batch_first(info, in_dims, *args[:5])
        return DivergenceBwd.apply(*arrays, args[5] + 1, *args[6:]), 0


class LogRatio(Rule):
    """log p - log q of every class, its last digits included; its derivative by the student is log p's."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, *pair: Any) -> Tensor:
        return log_ratio(student, teacher, pair=Pair(*pair))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.pair = Pair(*inputs[2:])
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        p, slope = LogRatio._at(x, ctx.pair)
        return (slope * (g - p * g.sum(ctx.pair.dim, keepdim=True))).to(x.dtype), *(None,) * 8

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor, *_: None) -> Any:
        p, slope = LogRatio._at(saved[0], ctx.pair)
        w = slope * rows.compute(dx)
        return w - (p * w).sum(ctx.pair.dim, keepdim=True)

    @staticmethod
    def vmap(info: Any, in_dims: Any, student: Tensor, teacher: Tensor, dim: int, *rest: Any) -> Any:
        return LogRatio.apply(*batch_first(info, in_dims, student, teacher), dim + 1, *rest), 0

    @staticmethod
    def _at(x: Tensor, pair: Pair) -> tuple[Tensor, Any]:
        p = softmax(rows.capped(x, pair.scale, pair.softcap), pair.dim)
        return p, rows.slope(x, pair.scale, pair.softcap)


class Curve:
    """Products with the derivatives of a row's divergence and of its gradient, in plain differentiable ops."""

    def __init__(self, student: Tensor, teacher: Tensor, keep: Tensor | None, pair: Pair) -> None:
        self.pair, self.dim, self.dtype, self.keep = pair, pair.dim, student.dtype, keep
        if keep is not None:  # such a row reaches no result, not even through 0 * NaN
            student, teacher = (x.masked_fill(~keep.unsqueeze(pair.dim), 0.0) for x in (student, teacher))
        self.slope = rows.slope(student, pair.scale, pair.softcap)
        if pair.softcap is not None:
            tanh = torch.tanh(rows.compute(student) * (pair.scale / pair.softcap))
            self.bend = -2.0 * tanh * self.slope * (pair.scale / pair.softcap)  # C''
        self.p = softmax(rows.capped(student, pair.scale, pair.softcap), self.dim)
        self.q = softmax(rows.capped(teacher, pair.teacher_scale, pair.teacher_softcap), self.dim)
        d = LogRatio.apply(student, teacher, *pair)
        self.d = torch.where(d.isfinite(), d, 0.0)  # pyright: ignore[reportAttributeAccessIssue]
        self.d = torch.where(self.q.isnan(), math.nan, self.d)  # a teacher without a distribution
        if pair.kind == "reverse_kl":  # an infinite divergence has no derivative
            lost = ((self.p > 0) & (d == math.inf)).any(self.dim, keepdim=True)
            self.d = torch.where(lost, math.nan, self.d)

    def tangent(self, dx: Tensor) -> Tensor:
        """The divergence's derivative along a direction of the logits."""
        t = (self._gradient() * self.slope * rows.compute(dx)).sum(self.dim)
        return t if self.keep is None else t.masked_fill(~self.keep, 0.0)

    def hessian_vector(self, v: Tensor, upstream: Tensor) -> Tensor:
        """d(dL/dx) along a direction v of the logits, for a fixed upstream gradient."""
        w = self.slope * rows.compute(v)
        h = w - (self.p * w).sum(self.dim, keepdim=True)
        if self.pair.kind == "forward_kl":
            product = self.p * h
        else:
            u, u_more = self._u()
            turned = self.p * h * (u - (self.p * u).sum(self.dim, keepdim=True) + u_more)
            product = turned - self.p * turned.sum(self.dim, keepdim=True)
        out = self.slope * product
        if self.pair.softcap is not None:
            out = out + self.bend * rows.compute(v) * self._gradient()
        out = out * upstream.unsqueeze(self.dim)
        if self.keep is not None:
            out = out.masked_fill(~self.keep.unsqueeze(self.dim), 0.0)
        return out.to(self.dtype)

    def _gradient(self) -> Tensor:
        """The divergence's derivative by s."""
        w = weighed(self.d, self.p, self.q, self.pair)
        return w if self.pair.kind == "forward_kl" else w - self.p * w.sum(self.dim, keepdim=True)

    def _u(self) -> tuple[Tensor, Tensor]:
        return steepness(self.d, self.p, self.q, self.pair)


def weighed(d: Tensor, p: Tensor, q: Tensor, pair: Pair) -> Tensor:
    """p u, p - q for forward_kl, to be differentiated by d and p."""
    if pair.kind == "forward_kl":
        near = d.abs() < 0.7
        close = -p * torch.expm1(-torch.where(near, d, 0.0))  # p - q
        return torch.where(near & (p > 0) & (q > 0), close, p - q)  # d says nothing where a side has no class
    return p * steepness(d, p, q, pair)[0]


def steepness(d: Tensor, p: Tensor, q: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """(u, u')."""
    if pair.kind == "reverse_kl":
        return d, torch.ones_like(d)
    gone = (q == 0) & (p > 0)  # a teacher without the class is infinitely far behind, whatever d holds there
    if pair.kind == "tv":
        return torch.where(gone, 0.5, 0.5 * torch.sign(d)), torch.zeros_like(d)
    # log(m / p) by whichever exponential does not overflow
    b, ahead = pair.beta, d >= 0
    up, down = torch.where(ahead, d, 0.0), torch.where(ahead, 0.0, d)
    log = torch.where(ahead, torch.log1p(b * torch.expm1(-up)), torch.log1p((1 - b) * torch.expm1(down)) - down)
    log = torch.where(gone, math.log1p(-b), log)
    share = torch.where(gone, 0.0, torch.sigmoid(math.log(b / (1 - b)) - d))  # beta q / m
    return (b - 1) * log, (1 - b) * share
