"""A head's rows by slices of the vocabulary, all rows at once: nothing but row numbers outlives a slice.

legend:  slice k has maximum m_k, rest_k, lse_k = m_k + log1p(rest_k); M, rest, lse are of the slices seen so far
merge:   with M' = max(M, m_k), the side that holds M' keeps its rest and the other adds exp(m - M') (1 + rest):
         rest' = rest + exp(m_k - M) (1 + rest_k), or with the sides exchanged
mass:    sum_j a_j (-log p_j) over slice k is known with lse_k in the place of lse: moving it to lse' adds
         A_k (lse' - lse_k), A_k = sum of a_j in the slice. smooth is this with a = w, a soft nll with a = w y
entropy: sum_j p_j (-log p_j) over slice k becomes P_k (H_k + lse' - lse_k), P_k = exp(lse_k - lse')
All differences lse' - lse are formed as (M' - m) + (log1p(rest') - log1p(rest)): no cancellation, no 0 * inf.
A slice whose logits are all -inf takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from torch_ops._head.chunks import spans, that_fit
from torch_ops._head.linear import (
    PIECE_OF_WEIGHT,
    Linear,
    MassGradient,
    first_maximum,
    formed_in,
    ignored_rows,
    without,
)
from torch_ops._head.rounding import scaled
from torch_ops._rows import dispatch as rows
from torch_ops._rules.plan import Plan


def fwd(x: Tensor, head: Linear, target: Tensor, weight: Tensor | None, plan: Plan) -> list[Tensor]:
    """[nll, lse, [smooth], [entropy], m, rest, [argmax]] of each row."""
    soft, kind = target.is_floating_point(), torch.promote_types(x.dtype, torch.float32)
    state = _Merged(x.shape[0], x.new_empty(0, dtype=kind), soft=soft, smooth=plan.smooth, entropy=plan.entropy)
    each = not soft and target.dim() == 2  # K a row
    at_target = torch.full_like(target, math.nan, dtype=kind) if each else torch.full_like(state.m, math.nan)
    best, where = torch.full_like(state.m, -math.inf), torch.zeros_like(state.m, dtype=torch.int64)
    for i, j, z in Slices(x, head, target, plan.chunk_size):
        inside, local = (None, target[:, i:j]) if soft else _local(target, i, j)
        w = None if weight is None else weight[i:j]
        some = torch.zeros_like(target[:, :1]).sum(1) if each else local  # nothing of a slice's own nll is used
        values = rows.cross_entropy_fwd(z, some, w, **plan.wanted)
        dead = _dead(z, values[-2])
        state.add(values, dead, _mass(local, w, kind) if soft else None, _total(w, j - i, state.m))
        if inside is not None and j > i:
            picked = z.gather(1, local if each else local.unsqueeze(1))
            at_target = torch.where(inside, _as_maximum(picked, plan).view_as(inside), at_target)
        if plan.argmax:
            value, position = first_maximum(z, plan.scale, plan.softcap)
            more = (value > best) | (value.isnan() & ~best.isnan())
            best, where = torch.where(more, value, best), torch.where(more, position + i, where)
    if plan.argmax and not head.classes:
        where.fill_(-1)
    return state.done(target, at_target) + [where] * plan.argmax


def bwd(
    x: Tensor,
    head: Linear,
    target: Tensor,
    weight: Tensor | None,
    m: Tensor,
    rest: Tensor,
    h: Tensor | None,
    upstream: list[Any],
    needs: Sequence[bool],
    plan: Plan,
) -> list[Tensor | None]:
    """[dX, dW, db, d_up, d_target, d_weight], those needed, from the rows' upstream gradients."""
    ignored, soft, dtype, kind = ignored_rows(target), target.is_floating_point(), x.dtype, m.dtype
    slices = Slices(without(x, ignored, 0, x.shape[0]), head, target, plan.chunk_size)
    x, dx = slices.x, torch.zeros_like(slices.x, dtype=kind) if needs[0] else None
    shared, mass = head.gradient(*needs[1:4], summed=False), MassGradient(target, weight, *needs[4:6])
    cuts = [None if weight is None else weight[i:j] for i, j in slices.spans]
    of_row: list[Any] = [None] * len(cuts)
    elsewhere = []
    if upstream[2] is not None:
        of_row = _of_others([_total(w, j - i, m) for (i, j), w in zip(slices.spans, cuts, strict=True)])
    if soft and upstream[0] is not None:
        masses = [_mass(target[:, i:j], w, kind) for (i, j), w in zip(slices.spans, cuts, strict=True)]
        elsewhere = [upstream[0] * of_others for of_others in _of_others(masses)]
    for k, (i, j, z) in enumerate(slices):
        w, own = cuts[k], _own_upstream(upstream, target, i, j, of_row[k])
        if elsewhere:
            own[1] = _plus(own[1], elsewhere[k])
        if upstream[3] is not None:
            own[1] = _plus(own[1], -upstream[3] * _entropy_elsewhere(z, m, rest, h, plan.row))
        mass.add(z, m, rest, upstream, plan.row, classes=slice(i, j))
        if any(needs[:4]) and j > i:
            # a row that is ignored or invalid stays so
            local = target[:, i:j] if soft else torch.where(target < 0, target, _local(target, i, j)[1])
            rows.cross_entropy_bwd(z, local, w, m, rest, *own, **plan.row, out=z)
            if dx is not None:
                head.part(i, j).add_input_gradient(dx, z)
            shared.part(i, j).add(z, x)
    if dx is not None and ignored is not None:
        dx.masked_fill_(ignored.unsqueeze(1), 0.0)
    return [None if dx is None else scaled(dx, None, dtype), *shared.rounded(), *mass.done()]


def _own_upstream(upstream: list[Any], target: Tensor, i: int, j: int, elsewhere: Tensor | None) -> list[Any]:
    """The upstream gradients for a row function that sees one slice, and m and rest of the whole row.

    It forms A p_j - a_j with A summed over its slice only, and H = log1p(rest) - sum p d over its slice only. What the
    other slices add to A (here: of class indices and smoothing), and what they take from -d_entropy H, multiplies p_j:
    it belongs to d_lse.
    """
    own = [*upstream]
    d_nll, _, d_smooth, _ = upstream
    if d_nll is not None and not target.is_floating_point():
        other = (target >= 0) & ~_local(target, i, j)[0]
        own[0] = d_nll.masked_fill(other, 0.0)
        moved = torch.where(other, d_nll, 0.0)
        own[1] = _plus(own[1], moved if moved.dim() == 1 else moved.sum(1))
    if d_smooth is not None:
        own[1] = _plus(own[1], d_smooth * elsewhere)
    return own


class Slices:
    """(begin, end, logits) of each slice of the vocabulary, the logits in one reused buffer."""

    def __init__(self, x: Tensor, head: Linear, target: Tensor, chunk_size: int | None) -> None:
        kind = formed_in(x, target)
        # In half precision dX is summed in float32, beside products of its size or beside x itself in float32.
        beside = 0 if x.dtype in (torch.float32, torch.float64) else x.numel() * (4 + kind.itemsize)
        if kind != x.dtype:
            beside += 2 * PIECE_OF_WEIGHT * kind.itemsize
        self.x, self.head = x.to(kind), head
        self.spans = spans(head.classes, that_fit(chunk_size, x.shape[0], kind.itemsize, beside))
        self.data = x.new_empty(x.shape[0] * max(j - i for i, j in self.spans), dtype=kind)

    def __iter__(self) -> Any:
        n = self.x.shape[0]
        for i, j in self.spans:
            yield i, j, self.head.part(i, j).logits(self.x, self.data[: n * (j - i)].view(n, j - i))


class _Merged:
    """The row numbers of the slices seen so far."""

    def __init__(self, n: int, like: Tensor, *, soft: bool, smooth: bool, entropy: bool) -> None:
        self.m, self.rest = like.new_full((n,), -math.inf), like.new_full((n,), -1.0)  # 1 + rest = 0: nothing yet
        self.smooth, self.entropy = smooth, entropy
        # name: [value, its mass so far]
        self.sums = {name: [like.new_zeros(n), like.new_zeros(n)] for name in ["nll"] * soft + ["smooth"] * smooth}
        self.h = like.new_zeros(n)

    def add(self, values: Any, dead: Tensor, of_target: Tensor | None, of_row: Tensor) -> None:
        """The values of cross_entropy_fwd on one more slice; `dead` rows of it are all -inf."""
        *named, mk, rk = values
        names = ["nll", "lse", *["smooth"] * self.smooth, *["entropy"] * self.entropy]
        now = dict(zip(names, named, strict=True))
        first = self.rest == -1.0  # not m == -inf: that may be a slice of NaN
        higher = first | (mk > self.m)
        m = torch.where(higher, mk, self.m)
        other = torch.where(higher, torch.exp(self.m - mk) * (1.0 + self.rest), torch.exp(mk - self.m) * (1.0 + rk))
        rest = torch.where(higher, rk, self.rest) + torch.where(first, 0.0, other)
        total = torch.log1p(rest)
        up_k = (m - mk) + (total - torch.log1p(rk))  # lse' - lse_k
        up = torch.where(first, 0.0, (m - self.m) + (total - torch.log1p(self.rest)))  # lse' - lse
        for name, of_slice in (("nll", of_target), ("smooth", of_row)):
            if name in self.sums and of_slice is not None:
                value, weight = self.sums[name]
                moved = _times(weight, up) + value + now[name] + _times(of_slice, up_k)
                # mass on a slice of -inf: an infinite loss
                lost = value + torch.where(of_slice == 0, 0.0, math.inf)
                self.sums[name] = [torch.where(dead, lost, moved), weight + of_slice]
        if self.entropy:
            h = torch.where(first, 0.0, torch.exp(-up) * (self.h + up)) + torch.exp(-up_k) * (now["entropy"] + up_k)
            self.h = torch.where(dead, self.h, h)
        self.m, self.rest = torch.where(dead, self.m, m), torch.where(dead, self.rest, rest)

    def done(self, target: Tensor, at_target: Tensor) -> list[Tensor]:
        """[nll, lse, [smooth], [entropy], m, rest]."""
        rest = torch.where(self.m.isfinite(), self.rest, math.nan)
        total = torch.log1p(rest)
        poison = total * 0.0  # NaN in a row without a distribution
        if "nll" in self.sums:
            nll = self.sums["nll"][0] + poison
        elif at_target.dim() == 1:
            nll = total - (at_target - self.m)
        else:
            # m comes from a kernel: what rounds otherwise here must not make an nll below 0, which would say MASKED
            nll = total.unsqueeze(1) - (at_target - self.m.unsqueeze(1)).clamp(max=0.0)
            nll = nll.masked_fill((nll == math.inf), rows.MASKED)
        out = [nll, self.m + total]
        if self.smooth:
            out.append(self.sums["smooth"][0] + poison)
        if self.entropy:
            out.append(self.h + poison)
        if not target.is_floating_point():
            ignored = rows.of_rows(target, 2, 1) == rows.IGNORED
            out = [v.masked_fill(target == rows.IGNORED if v is nll else ignored, 0.0) for v in out]
        return [*out, self.m, rest]


def _as_maximum(z: Tensor, plan: Plan) -> Tensor:
    """Scaled and capped logits, as the rows' m is: another tanh would leave a difference where both are the same."""
    if plan.scale == 1.0 and plan.softcap is None:
        return rows.capped(z, 1.0, None)
    alone = z.reshape(-1, 1)  # m of a row of one class
    m = rows.cross_entropy_fwd(
        alone, torch.zeros_like(alone[:, 0], dtype=torch.int64), None, **plan.row, smooth=False, entropy=False
    )[-2]
    return torch.where(z.isnan(), z, m.view_as(z))


def _local(target: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """(whether the target is in the slice, its place there or some other)."""
    return (target >= i) & (target < j), (target - i).clamp(0, max(j - i - 1, 0))


def _dead(z: Tensor, m: Tensor) -> Tensor:
    """Rows whose logits are all -inf, told from rows that also hold NaN."""
    dead = m == -math.inf
    # The native kernels' maximum passes over NaN. A look costs nothing here; elsewhere the plain maximum is NaN.
    if z.device.type == "cpu" and dead.any():
        dead[dead.clone()] = ~z[dead].isnan().any(1)
    return dead


def _mass(target: Tensor, weight: Tensor | None, kind: torch.dtype) -> Tensor:
    """sum_j w_j y_j of each row."""
    if weight is None:
        return target.sum(1, dtype=kind)
    return torch.mv(target.to(kind), weight)


def _of_others(masses: list[Tensor]) -> list[Tensor]:
    """What all slices but each hold: a difference would leave the roundings of one that holds nearly all."""
    none = torch.zeros_like(masses[0])
    before, after = accumulate(masses[:-1], initial=none), [*accumulate(masses[:0:-1], initial=none)][::-1]
    return [a + b for a, b in zip(before, after, strict=True)]


def _total(weight: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """sum_j w_j."""
    return like.new_full((), classes) if weight is None else weight.sum()


def _times(mass: Tensor, up: Tensor) -> Tensor:
    """mass * up, 0 where there is no mass."""
    return torch.where(mass == 0, 0.0, mass * up)


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _entropy_elsewhere(z: Tensor, m: Tensor, rest: Tensor, h: Any, row: dict[str, Any]) -> Tensor:
    """What of a row's H - log1p(rest) is not in this slice's own: H is `h`."""
    t = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    log_total = torch.log1p(rest)
    lse = m + log_total
    _, lse_k, h_k, m_k, _ = rows.cross_entropy_fwd(z, t, None, **row, smooth=False, entropy=True)
    dead = m_k == -math.inf
    p = torch.exp(lse_k - lse)  # the slice's
    own = (p * (h_k + (lse - lse_k))).masked_fill(dead, 0.0)  # sum_j p_j (-log p_j)
    return (h - own) - (1.0 - p.masked_fill(dead, 0.0)) * log_total
