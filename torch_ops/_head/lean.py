"""The linear head's rows by slices of the vocabulary, all rows at once: nothing but row numbers outlives a slice.

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
from typing import Any

import torch
from torch import Tensor

from torch_ops._head.chunks import spans, that_fit
from torch_ops._head.linear import (
    PIECE_OF_WEIGHT,
    MassGradient,
    add_input_gradient,
    add_weight_gradient,
    first_maximum,
    formed_in,
    ignored_rows,
    logits,
    without,
)
from torch_ops._head.rounding import scaled
from torch_ops._rows import dispatch as rows


def head_fwd(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
    argmax: bool,
    chunk_size: int | None,
) -> list[Tensor]:
    """[nll, lse, [smooth], [entropy], m, rest, [argmax]] of each row."""
    slices = Slices(x, linear_weight, linear_bias, target, chunk_size)
    soft, layout = target.is_floating_point(), {"dim": 1, "scale": scale, "softcap": softcap}
    kind = torch.promote_types(x.dtype, torch.float32)
    state = _Merged(x.shape[0], x.new_empty(0, dtype=kind), soft=soft, smooth=smooth, entropy=entropy)
    at_target = torch.full_like(state.m, math.nan)
    best, where = torch.full_like(state.m, -math.inf), torch.zeros_like(state.m, dtype=torch.int64)
    for i, j, z in slices:
        inside, local = (None, target[:, i:j]) if soft else _local(target, i, j)
        w = None if weight is None else weight[i:j]
        values = rows.cross_entropy_fwd(z, local, w, **layout, smooth=smooth, entropy=entropy)
        dead = _dead(z, values[-2])
        state.add(values, dead, _mass(local, w, kind) if soft else None, _total(w, j - i, state.m))
        if inside is not None and j > i:
            picked = rows.capped(z.gather(1, local.unsqueeze(1)), scale, softcap).squeeze(1)
            at_target = torch.where(inside, picked, at_target)
        if argmax:
            value, position = first_maximum(z, scale, softcap)
            more = (value > best) | (value.isnan() & ~best.isnan())
            best, where = torch.where(more, value, best), torch.where(more, position + i, where)
    if argmax and not linear_weight.shape[0]:
        where.fill_(-1)
    return state.done(target, at_target) + [where] * argmax


def head_bwd(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    m: Tensor,
    rest: Tensor,
    h: Tensor | None,
    upstream: list[Tensor | None],
    *,
    scale: float,
    softcap: float | None,
    needs: tuple[bool, ...],
    chunk_size: int | None,
) -> list[Tensor | None]:
    """[dX, dW, db, d_target, d_weight], those needed, from the rows' upstream gradients."""
    # A row function that sees one slice, m and rest of the whole row forms A p_j - a_j with A summed over its
    # slice only, and H = log1p(rest) - sum p d over its slice only. What the other slices add to A, and what
    # they take from -d_entropy H, multiplies p_j: it belongs to d_lse.
    ignored, soft = ignored_rows(target), target.is_floating_point()
    x = without(x, ignored, 0, x.shape[0])
    slices = Slices(x, linear_weight, linear_bias, target, chunk_size)
    kind, layout = m.dtype, {"dim": 1, "scale": scale, "softcap": softcap}
    dtype, x = x.dtype, slices.arrays[0]
    dx = torch.zeros_like(x, dtype=kind) if needs[0] else None
    dw = torch.empty_like(linear_weight, memory_format=torch.contiguous_format) if needs[1] else None
    db = torch.empty_like(linear_bias) if needs[2] and linear_bias is not None else None
    mass = MassGradient(target, weight, *needs[3:5])
    d_nll, d_lse, d_smooth, d_entropy = upstream
    lse, log_total = m + torch.log1p(rest), torch.log1p(rest)
    of_row = _total(weight, linear_weight.shape[0], m)
    of_target = _mass(target, weight, kind) if soft and d_nll is not None else None
    for i, j, z in slices:
        w = None if weight is None else weight[i:j]
        part: list[Any] = [d_nll, d_lse, d_smooth, d_entropy]
        if d_nll is None:
            local = target[:, i:j] if soft else _local(target, i, j)[1]
        elif of_target is not None:
            local = target[:, i:j]
            part[1] = _plus(part[1], d_nll * (of_target - _mass(local, w, kind)))
        else:
            inside, local = _local(target, i, j)
            elsewhere = (target >= 0) & ~inside
            part[0] = d_nll.masked_fill(elsewhere, 0.0)
            part[1] = _plus(part[1], torch.where(elsewhere, d_nll, 0.0))
        if not soft:  # a row that is ignored or invalid stays so
            local = torch.where(target < 0, target, local)
        if d_smooth is not None:
            part[1] = _plus(part[1], d_smooth * (of_row - _total(w, j - i, m)))
        if d_entropy is not None and h is not None:
            p, own = _entropy_part(z, layout, lse)
            part[1] = _plus(part[1], -d_entropy * ((h - own) - (1.0 - p) * log_total))
        mass.add(z, m, rest, upstream, scale, softcap, slice(None), slice(i, j))
        if any(needs[:3]) and j > i:
            rows.cross_entropy_bwd(z, local, w, m, rest, *part, **layout, out=z)
            if dx is not None:
                add_input_gradient(dx, z, linear_weight[i:j])
            if dw is not None and dw.dtype == z.dtype:
                torch.mm(z.t(), x, out=dw[i:j])
            elif dw is not None:
                add_weight_gradient(dw[i:j], z, x, first=True)
            if db is not None:
                db[i:j] = z.sum(0, dtype=kind)
    if dx is not None and ignored is not None:
        dx.masked_fill_(ignored.unsqueeze(1), 0.0)
    return [None if dx is None else scaled(dx, None, dtype), dw, db, *mass.done()]


class Slices:
    """(begin, end, logits) of each slice of the vocabulary, the logits in one reused buffer."""

    def __init__(
        self,
        x: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        chunk_size: int | None,
    ) -> None:
        kind = formed_in(x, target)
        # In half precision dX is summed in float32, beside products of its size or beside x itself in float32.
        beside = 0 if x.dtype in (torch.float32, torch.float64) else x.numel() * (4 + kind.itemsize)
        if kind != x.dtype:
            beside += 2 * PIECE_OF_WEIGHT * kind.itemsize
        self.arrays = x.to(kind), linear_weight, linear_bias
        self.spans = spans(linear_weight.shape[0], that_fit(chunk_size, x.shape[0], kind.itemsize, beside))
        self.data = x.new_empty(x.shape[0] * max(j - i for i, j in self.spans), dtype=kind)

    def __iter__(self) -> Any:
        x, weight, bias = self.arrays
        for i, j in self.spans:
            out = self.data[: x.shape[0] * (j - i)].view(x.shape[0], j - i)
            yield i, j, logits(x, weight[i:j], None if bias is None else bias[i:j], out)


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
        nll = self.sums["nll"][0] + poison if "nll" in self.sums else total - (at_target - self.m)
        out = [nll, self.m + total]
        if self.smooth:
            out.append(self.sums["smooth"][0] + poison)
        if self.entropy:
            out.append(self.h + poison)
        if not target.is_floating_point():
            out = [v.masked_fill(target == rows.IGNORED, 0.0) for v in out]
        return [*out, self.m, rest]


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


def _total(weight: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """sum_j w_j."""
    return like.new_full((), classes) if weight is None else weight.sum()


def _times(mass: Tensor, up: Tensor) -> Tensor:
    """mass * up, 0 where there is no mass."""
    return torch.where(mass == 0, 0.0, mass * up)


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _entropy_part(z: Tensor, layout: dict[str, Any], lse: Tensor) -> tuple[Tensor, Tensor]:
    """(P_k, sum_j p_j (-log p_j)) of the slice."""
    t = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    _, lse_k, h, m, _ = rows.cross_entropy_fwd(z, t, None, **layout, smooth=False, entropy=True)
    dead = m == -math.inf
    p = torch.exp(lse_k - lse)
    return p.masked_fill(dead, 0.0), (p * (h + (lse - lse_k))).masked_fill(dead, 0.0)
