"""Second derivatives of a cross-entropy row, in plain differentiable ops (autograd takes it from there).

legend:  x logits, z = C(x), p = softmax(z), l = log p, H = -sum p l, w class weights,
         Y one-hot target or w * soft target y,
         <a> = sum_j p_j a_j, upstream c = (c_nll, c_lse, c_smooth, c_entropy), c_. row-shaped,
         mass a = c_nll Y + c_smooth w, A = sum_j a_j + c_lse
first:   g = dL/dz = A p - a - c_entropy p (l + H)
second:  for a direction u in z, with d = u - <u> and h = -<u (l + H)>:  dp = p d,  dl = d,  dH = h, so
         Hess u = A p d - c_entropy p (d (l + H + 1) + h),  h = -<d (l + H)> as well, for <l + H> = 0
cap:     dL/dx = C' g, hence for a direction v in x:  C' Hess(C' v) + C'' v g
Symmetric, so the same product serves tangents and cotangents. Derived step by step in docs/derivation.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_ops._modes import is_none
from torch_ops._rows import dispatch as rows
from torch_ops._rules.softmax import LogSoftmax, LogSoftmaxBwd, log_softmax, softmax

_Up = Sequence[Tensor | None]


class Curvature:
    """Products with the derivatives of (nll, lse, smooth, entropy) and of their gradients, row by row."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dim: int,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.dim, self.scale, self.softcap, self.dtype = dim, scale, softcap, logits.dtype
        self.target, self.soft = target, target.is_floating_point()
        if not self.soft:  # an ignored row reaches no result, not even through 0 * NaN
            self.marks = rows.of_rows(target, logits.dim(), dim)
            logits = logits.masked_fill((self.marks == rows.IGNORED).unsqueeze(dim), 0.0)
        self.z = rows.capped(logits, scale, softcap)
        self.p = softmax(self.z, dim)
        self.w = rows.class_row(weight, self.z, dim)
        self.slope = rows.slope(logits, scale, softcap)
        if softcap is not None:
            tanh = torch.tanh(rows.compute(logits) * (scale / softcap))
            self.bend = -2.0 * tanh * self.slope * (scale / softcap)  # C''
        self.each = not self.soft and target.dim() == logits.dim()  # K a row
        if self.each:
            self.index = target.clamp(min=0)
        elif self.soft:
            y = target.to(self.z.dtype)
            self.mass = y if self.w is None else y * self.w
        else:
            self.mass = torch.zeros_like(self.p)
            if not is_none(self.p.shape[dim]):
                index = target.clamp(0, self.p.shape[dim] - 1).unsqueeze(dim)
                self.mass = self.mass.scatter(dim, index, 1.0)

    def tangents(
        self,
        dx: Tensor | None,
        dy: Tensor | None,
        dw: Tensor | None,
        *,
        smooth: bool,
        entropy: bool,
    ) -> list[Tensor | None]:
        """Directional derivatives of [nll, lse, smooth, entropy] along logits, soft target and weight."""
        u = torch.zeros_like(self.p) if dx is None else self.slope * rows.compute(dx)
        d = self._centred(u)
        nll = -(d.gather(self.dim, self.index) if self.each else (self.mass * d).sum(self.dim))
        out = [nll, (self.p * u).sum(self.dim), None, None]
        if smooth:
            out[2] = -self._times_w(d).sum(self.dim)
        if entropy:
            out[3] = -(self.p * d * self._surprise()).sum(self.dim)
        if dy is not None or dw is not None:
            dmass, dw_row = self._mass_along(dy, dw)
            if self.soft:
                out[0] = nll - (dmass * self._log_p()).sum(self.dim)
            if smooth and dw_row is not None:
                out[2] = out[2] - (dw_row * self._log_p()).sum(self.dim)
        return [None if t is None else self._rows(t, self.target if i == 0 else None) for i, t in enumerate(out)]

    def hessian_vector(self, v: Tensor, upstream: _Up) -> Tensor:
        """d(dL/dlogits) along the logits' direction v, for fixed upstream gradients."""
        total, _ = self._masses(upstream)
        u = self.slope * rows.compute(v)
        d = self._centred(u)
        hv = total * self.p * d
        if upstream[3] is not None:
            s = self._surprise()
            h = -(self.p * d * s).sum(self.dim, keepdim=True)
            hv = hv - upstream[3].unsqueeze(self.dim) * self.p * (d * (s + 1.0) + h)
        out = self.slope * hv
        if self.softcap is not None:
            out = out + self.bend * rows.compute(v) * self._gradient(upstream)
        return self._full(out)

    def mass_gradient(self, upstream: _Up, by_target: bool, by_weight: bool) -> tuple[Tensor | None, Tensor | None]:
        """(dL/dy, dL/dw): -log p times the coefficient of y_j and of w_j."""
        return self._by_mass(-self._log_p(), upstream, by_target, by_weight)

    def mass_hessian_vector(
        self, v: Tensor, upstream: _Up, by_target: bool, by_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Derivative of <v, dL/dlogits> by (y, w)."""
        u = self.slope * rows.compute(v)
        return self._by_mass(-self._centred(u), upstream, by_target, by_weight)

    def gradient_by_mass(self, dy: Tensor | None, dw: Tensor | None, upstream: _Up) -> Tensor:
        """d(dL/dlogits) along directions of the soft target and the class weights."""
        dmass, dw_row = self._mass_along(dy, dw)
        a = torch.zeros_like(self.p)
        if upstream[0] is not None and self.soft:
            a = a + upstream[0].unsqueeze(self.dim) * dmass
        if upstream[2] is not None and dw_row is not None:
            a = a + upstream[2].unsqueeze(self.dim) * dw_row
        return self._full(-self.slope * self._pulled(a))

    def _by_mass(
        self, factor: Tensor, upstream: _Up, by_target: bool, by_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        d_nll, _, d_smooth, _ = (None if c is None else c.unsqueeze(self.dim) for c in upstream)
        to_y = to_w = None
        if by_target and d_nll is not None:
            to_y = (self._times_w(d_nll) * factor).to(self.target.dtype)
        if by_weight:
            coefficient = torch.zeros_like(factor)
            if d_nll is not None and self.soft:
                coefficient = coefficient + d_nll * self.target.to(self.z.dtype)
            if d_smooth is not None:
                coefficient = coefficient + d_smooth
            terms = coefficient * factor
            if not self.soft:
                terms = terms.masked_fill((self.marks == rows.IGNORED).unsqueeze(self.dim), 0.0)
            to_w = terms.movedim(self.dim, -1).reshape(-1, terms.shape[self.dim]).sum(0)
        return to_y, to_w

    def _mass_along(self, dy: Tensor | None, dw: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(direction of Y, direction of w as a row)."""
        dw_row = rows.class_row(dw, self.p, self.dim)
        dmass = torch.zeros_like(self.p)
        if dy is not None:
            dmass = dmass + self._times_w(dy.to(self.z.dtype))
        if dw_row is not None and self.soft:
            dmass = dmass + self.target.to(self.z.dtype) * dw_row
        return dmass, dw_row

    def _masses(self, upstream: _Up) -> tuple[Tensor, Tensor]:
        """(A, a)."""
        d_nll, d_lse, d_smooth, _ = (None if c is None else c.unsqueeze(self.dim) for c in upstream)
        a = torch.zeros_like(self.p)
        if upstream[0] is not None and self.each:
            a = a.scatter_add(self.dim, self.index, upstream[0].masked_fill(self.target < 0, 0.0))
        elif d_nll is not None:
            a = a + d_nll * self.mass
        if d_smooth is not None:
            a = a + d_smooth * self._times_w(torch.ones_like(self.p))
        total = a.sum(self.dim, keepdim=True)
        return (total if d_lse is None else total + d_lse), a

    def _gradient(self, upstream: _Up) -> Tensor:
        g = -self._pulled(self._masses(upstream)[1])
        if upstream[1] is not None:
            g = g + upstream[1].unsqueeze(self.dim) * self.p
        if upstream[3] is not None:
            g = g - upstream[3].unsqueeze(self.dim) * self.p * self._surprise()
        return g

    def _surprise(self) -> Tensor:
        """l + H."""
        return self._centred(self._log_p())

    def _centred(self, u: Tensor) -> Tensor:
        """u - <u>, at a confident row's maximum too."""
        return rows.centred(u, self.p, self.dim)

    def _pulled(self, a: Tensor) -> Tensor:
        """a - p sum(a), what log_softmax makes of a cotangent: at a confident row's maximum too."""
        _, m, rest = LogSoftmax.apply(self.z, self.dim)  # pyright: ignore[reportGeneralTypeIssues]
        return LogSoftmaxBwd.apply(a, self.z, m, rest, self.dim)  # pyright: ignore[reportReturnType]

    def _log_p(self) -> Tensor:
        """l, 0 where it is -inf: such a class takes no part, not even through 0 * inf."""
        log_p = log_softmax(self.z, self.dim)
        return log_p.masked_fill(log_p == -math.inf, 0.0)

    def _times_w(self, x: Tensor) -> Tensor:
        return x if self.w is None else x * self.w

    def _rows(self, x: Tensor, marks: Tensor | None) -> Tensor:
        return x if self.soft else _marked(x, self.marks if marks is None else marks)

    def _full(self, x: Tensor) -> Tensor:
        return (x if self.soft else _marked(x, self.marks.unsqueeze(self.dim))).to(self.dtype)


def _marked(x: Tensor, target: Tensor) -> Tensor:
    return x.masked_fill(target == rows.INVALID, math.nan).masked_fill(target == rows.IGNORED, 0.0)
