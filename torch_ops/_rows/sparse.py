"""cross_entropy of K class indices a row by kernels that know one, and sums over a row's equal ids.

The row itself is a kernel's, as if it had one target that nothing comes back to; the K entries that have one are
written after it, from logits that were read before. Formulas as in csrc/cross_entropy_classes.h.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_ops._modes import is_plain
from torch_ops._rows import triton
from torch_ops._rows.arithmetic import capped, slope, weight_sums
from torch_ops._rows.classes import IGNORED, MASKED, of_rows


def by_class(ids: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of a (N, K) over the slots of this slot's class, over all others, whether it is its class's first).

    `a` is 0 where an id names no class; the sums keep its type or more. No sum is a difference of two.
    """
    if a.device.type != "xpu" and triton.serves_matrix(a) and is_plain(ids):
        return triton.ops.by_class(ids, a)
    at, order = ids.sort(dim=1, stable=True)
    begins = torch.ones_like(at, dtype=torch.bool)
    begins[:, 1:] = at[:, 1:] != at[:, :-1]
    place = begins.cumsum(1) - 1
    sums = torch.zeros_like(a).scatter_add(1, place, a.gather(1, order))
    zero = torch.zeros_like(a[:, :1])
    before = torch.cat([zero, sums.cumsum(1)[:, :-1]], 1)
    after = torch.cat([sums.flip(1).cumsum(1).flip(1)[:, 1:], zero], 1)
    own, others = (torch.empty_like(a).scatter(1, order, s.gather(1, place)) for s in (sums, before + after))
    return own, others, torch.empty_like(begins).scatter(1, order, begins) & (ids >= 0)


class Rows:
    """Rows of logits and their K targets along `dim`, as the kernels of one target take them."""

    def __init__(self, ops: Any, logits: Tensor, target: Tensor, dim: int, scale: float, softcap: float | None) -> None:
        self.ops, self.logits, self.target, self.layout = ops, logits, target, (dim, scale, softcap)
        self.dim, self.marks = dim, of_rows(target, logits.dim(), dim)
        self.raw = logits.gather(dim, target.clamp(min=0))
        self.z = capped(self.raw, scale, softcap)

    def nll(self, m: Tensor, rest: Tensor) -> Tensor:
        """-log p at each id."""
        # m is a kernel's: what rounds otherwise here must not make an nll below 0, which would say MASKED
        d = (self.z - m.unsqueeze(self.dim)).clamp(max=0.0)
        log_total = torch.log1p(rest).unsqueeze(self.dim)
        nll = (log_total - d).masked_fill((d == -math.inf) & log_total.isfinite(), MASKED)
        return nll.masked_fill(self.target < IGNORED, math.nan).masked_fill(self.target == IGNORED, 0.0)

    def fwd(self, weight: Tensor | None, smooth: bool, entropy: bool) -> tuple[Tensor, ...]:
        """cross_entropy_fwd."""
        _, *values = self.ops.cross_entropy_fwd(self.logits, self.marks, weight, *self.layout, smooth, entropy)
        return self.nll(*values[-2:]), *values

    def lse_upstream(self, each: Tensor, d_lse: Tensor | None) -> Tensor:
        """What multiplies all p_j of a row, without smoothing."""
        total = each.sum(self.dim, dtype=torch.float64)
        return (total if d_lse is None else total + d_lse).to(self.z.dtype)

    def bwd(
        self,
        weight: Tensor | None,
        m: Tensor,
        rest: Tensor,
        d_nll: Tensor | None,
        d_lse: Tensor | None,
        d_smooth: Tensor | None,
        d_entropy: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        """cross_entropy_bwd, over `out`, which is the logits, or into a new array."""
        each = self._each(d_nll)
        h = None
        if d_entropy is not None:
            h = self.ops.cross_entropy_fwd(self.logits, self.marks, None, *self.layout, False, True)[2:]
        args = (None, self.lse_upstream(each, d_lse), d_smooth, d_entropy, *self.layout)
        if out is None:
            dx = self.ops.cross_entropy_bwd(self.logits, self.marks, weight, m, rest, *args)
        else:
            self.ops.cross_entropy_bwd_(out, self.marks, weight, m, rest, *args)
            dx = out
        self._write(dx, weight, m, rest, each, d_lse, d_smooth, d_entropy, h)
        return dx

    def fwd_bwd(
        self,
        weight: Tensor | None,
        d_nll: Tensor | None,
        d_lse: Tensor | None,
        d_smooth: Tensor | None,
        d_entropy: Tensor | None,
        smooth: bool,
        entropy: bool,
    ) -> tuple[Tensor, ...]:
        """cross_entropy_fwd's values, the gradient over the logits."""
        each, told = self._each(d_nll), entropy or d_entropy is not None
        args = (None, self.lse_upstream(each, d_lse), d_smooth, d_entropy, *self.layout, smooth, told)
        _, *values = self.ops.cross_entropy_fwd_bwd_(self.logits, self.marks, weight, *args)
        m, rest = values[-2:]
        h = [values[1 + smooth], m, rest] if told else None
        self._write(self.logits, weight, m, rest, each, d_lse, d_smooth, d_entropy, h)
        if told and not entropy:
            del values[1 + smooth]
        return self.nll(m, rest), *values

    def _each(self, d_nll: Tensor | None) -> Tensor:
        return torch.zeros_like(self.z) if d_nll is None else d_nll.masked_fill(self.target < 0, 0.0)

    def _by_row(self, a: Tensor) -> Tensor:
        return a.movedim(self.dim, -1).reshape(-1, self.target.shape[self.dim])

    def _write(
        self,
        dx: Tensor,
        weight: Tensor | None,
        m: Tensor,
        rest: Tensor,
        each: Tensor,
        d_lse: Tensor | None,
        d_smooth: Tensor | None,
        d_entropy: Tensor | None,
        h: list[Tensor] | None,
    ) -> None:
        """dL/dlogits at the ids of rows that have a gradient; h: entropy, m and rest of the classes here."""
        sums = by_class(self._by_row(self.target), self._by_row(each))[:2]
        shape = self.target.movedim(self.dim, -1).shape
        own, others = (s.reshape(shape).movedim(-1, self.dim).double() for s in sums)
        wide = lambda a: a.unsqueeze(self.dim).double()  # noqa: E731
        d, total = self.z.double() - wide(m), 1.0 + wide(rest)
        e = torch.exp(d)
        # A class that holds more than half is the maximum, whatever its last bit is here.
        top = 2.0 * e > total
        p, q = e / total, torch.where(top, wide(rest), total - e) / total
        if d_lse is not None:
            others = others + wide(d_lse)
        dz = others * p - own * q
        if d_smooth is not None and weight is None:
            dz = dz + wide(d_smooth) * (self.logits.shape[self.dim] * p - 1.0)
        elif d_smooth is not None and weight is not None:
            whole, aside, largest = weight_sums(weight.double())
            w = weight.double()[self.target.clamp(min=0)]
            dz = dz + wide(d_smooth) * torch.where(top & (w == largest), aside - whole * q, whole * p - w)
        if d_entropy is not None and h is not None:
            log_p = (d - torch.log1p(wide(rest))).masked_fill(~(e > 0), 0.0)
            dz = dz - wide(d_entropy) * p * (log_p + _entropy_here(wide(m), wide(rest), *map(wide, h)))
        dz = (dz * slope(self.raw, *self.layout[1:])).to(dx.dtype)
        named = self.target.masked_fill((self.marks < 0).unsqueeze(self.dim), IGNORED)
        self.ops.place_(dx, named, dz, self.dim)


def _entropy_here(m: Tensor, rest: Tensor, entropy: Tensor, own_m: Tensor, own_rest: Tensor) -> Tensor:
    """The entropy that a gradient told m and rest of whole rows takes: of the classes here, which may be a shard's."""
    d, log_total = own_m - m, torch.log1p(rest)
    share = torch.exp(d) * (1.0 + own_rest) / (1.0 + rest)
    found = log_total + share * (entropy - (d + torch.log1p(own_rest)))
    return torch.where(d == -math.inf, log_total, found)
