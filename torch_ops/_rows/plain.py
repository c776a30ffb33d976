"""Row functions in plain PyTorch ops: any device, any layout, one axis `dim` (non-negative).

The algorithm keeps `rest`, the sum of exp(z - m) over every position but one of the row's maximum m, so that
lse = m + log1p(rest) and 1 - p at the maximum is rest / (1 + rest): neither subtracts nearly equal numbers.
Row-shaped results (the input's shape without `dim`) and all arithmetic are in the compute type: float32
for half precision and float32, float64 for float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_ops._modes import is_none
from torch_ops._rows.arithmetic import (
    capped,
    class_row,
    compute,
    dot,
    each_nll,
    entropy_of,
    exponentials,
    nll_gradient,
    pick,
    shifted,
    slope,
)
from torch_ops._rows.classes import IGNORED, INVALID, of_rows
from torch_ops._rows.mean import centred

# In-place gradients are formed in slices of this many elements: the only workspace they need.
_SLICE = 1 << 20


def softmax_fwd(x: Tensor, *, dim: int) -> Tensor:
    """y_i = exp(x_i) / sum_j exp(x_j), in the type of x."""
    _, e, _, rest = exponentials(compute(x), dim)
    return (e / (1.0 + rest)).to(x.dtype)


def softmax_bwd(dy: Tensor, y: Tensor, *, dim: int) -> Tensor:
    """dx = J dy for J = diag(y) - y yT, from the output alone."""
    # legend:  y softmax output, dy = dL/dy, dx = dL/dx, c any number, g = dy - c, S = sum_j y_j
    # formula: dx_i = sum_j dy_j y_j (delta_ij - y_i) = y_i (dy_i - sum_j y_j dy_j) = y_i (g_i - sum_j y_j g_j / S)
    # source:  Kronecker form of Purcell 2021, eq. (5), contracted with dy; docs/derivation.md
    a = compute(y)
    return (a * centred(compute(dy), a, dim)).to(y.dtype)


def log_softmax_fwd(x: Tensor, *, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, m, rest), log p in the type of x."""
    d, _, m, rest = exponentials(compute(x), dim)
    y = d - torch.log1p(rest)
    return y.to(x.dtype), m.squeeze(dim), rest.squeeze(dim)


def log_softmax_bwd(dy: Tensor, x: Tensor, m: Tensor, rest: Tensor, *, dim: int) -> Tensor:
    """dx = dy - p sum(dy)."""
    # formula: d log p_i / dx_j = delta_ij - p_j (Kurbiel's logarithmic derivative), contracted with dy
    # p comes from the input: from a half-precision log p it would be off by |log p| units of roundoff.
    # At a confident row's maximum dy_m - p_m sum(dy) would leave 0: there dy_m (1 - p_m) - p_m (the others' sum).
    d, e = shifted(compute(x), m.unsqueeze(dim))
    rest = rest.unsqueeze(dim)
    total, g = 1.0 + rest, compute(dy)
    top = (d == 0) & (rest < 1)
    others = g.masked_fill(top, 0.0).sum(dim, keepdim=True)
    dx = torch.where(top, (g * rest - others) / total, g - e / total * g.sum(dim, keepdim=True))
    return dx.to(x.dtype)


def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    dim: int,
    scale: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
) -> tuple[Tensor, ...]:
    """(nll, lse, [smooth], [entropy], m, rest), row-shaped, in nats.

    nll = -log p_target for class indices (not weighted), -sum_j w_j y_j log p_j for soft targets y;
    smooth = -sum_j w_j log p_j; entropy = -sum_j p_j log p_j. With K class indices a row, along `dim`, nll has their
    shape: 0 at IGNORED, MASKED where it is infinite.
    """
    d, e, m, rest = exponentials(capped(logits, scale, softcap), dim)
    log_total = torch.log1p(rest)
    w = class_row(weight, d, dim)
    if target.is_floating_point():
        mass = target.to(d.dtype) if w is None else target.to(d.dtype) * w
        nll = dot(mass, log_total - d, dim) if not is_none(d.shape[dim]) else rest.squeeze(dim)
    elif target.dim() == d.dim():
        nll = each_nll(d, log_total, target, dim)
    else:
        nll = (log_total - pick(d, target, dim)).squeeze(dim)
    rows = [nll, (m + log_total).squeeze(dim)]
    if smooth:
        rows.append((log_total - d).sum(dim) if w is None else dot(w, log_total - d, dim))
    if entropy:
        rows.append(entropy_of(d, e, rest, dim).squeeze(dim))
    if not target.is_floating_point():
        nothing = of_rows(target, d.dim(), dim) == IGNORED
        rows = [row.masked_fill(target == IGNORED if row is nll else nothing, 0.0) for row in rows]
    return (*rows, m.squeeze(dim), rest.squeeze(dim))


def cross_entropy_bwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    m: Tensor,
    rest: Tensor,
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_smooth: Tensor | None,
    d_entropy: Tensor | None,
    *,
    dim: int,
    scale: float,
    softcap: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """dL/dlogits from the rows' upstream gradients d_*; `out` may be the logits themselves."""
    if out is not None:
        per_row = (m, rest, d_nll, d_lse, d_smooth, d_entropy)
        return _in_slices(out, logits, target, weight, per_row, dim=dim, scale=scale, softcap=softcap)
    # legend:  p softmax(z), z = softcap tanh(scale logits / softcap), t target class, Y one-hot of t or
    #          w * soft target, w class weights, H entropy, S = sum_j Y_j, W = sum_j w_j
    # formula: dL/dz_j = d_nll (S p_j - Y_j) + d_lse p_j + d_smooth (W p_j - w_j)
    #                    - d_entropy p_j (log p_j + H)
    # source:  Kurbiel's s * sum(y) - y, with S not assumed to be 1; docs/derivation.md
    d, e = shifted(capped(logits, scale, softcap), m.unsqueeze(dim))
    rest = rest.unsqueeze(dim)
    total = 1.0 + rest
    p = e / total
    # 1 - p: at the maximum rest / total, elsewhere at least 1/2, so never 1 subtracted from p.
    q = torch.where(d == 0, rest, total - e) / total
    confident = (d == 0) & (rest < 1)  # one class holds more than half
    w = class_row(weight, d, dim)
    soft = target.is_floating_point()

    dz = torch.zeros_like(p)
    if d_lse is not None:
        dz = dz + p * d_lse.unsqueeze(dim)
    if d_smooth is not None:
        ones = torch.ones_like(d) if w is None else w.expand_as(d)
        dz = dz + d_smooth.unsqueeze(dim) * nll_gradient(ones, p, q, confident, dim)
    if d_entropy is not None:
        log_p = (d - torch.log1p(rest)).masked_fill(~(e > 0), 0.0)
        dz = dz - d_entropy.unsqueeze(dim) * p * (log_p + entropy_of(d, e, rest, dim))
    marks = target if soft else of_rows(target, d.dim(), dim)
    if d_nll is not None and not soft and target.dim() == d.dim():
        index = target.clamp(min=0)
        each = d_nll.masked_fill(target < 0, 0.0)
        mass = torch.zeros_like(p).scatter_add(dim, index, each) if not is_none(d.shape[dim]) else p
        dz = dz + nll_gradient(mass, p, q, confident, dim)
    elif d_nll is not None:
        c = d_nll.unsqueeze(dim)
        if soft:
            mass = target.to(d.dtype) if w is None else target.to(d.dtype) * w
            dz = dz + c * nll_gradient(mass, p, q, confident, dim)
        elif not is_none(d.shape[dim]):
            index = target.clamp(0, d.shape[dim] - 1).unsqueeze(dim)
            at_target = dz.gather(dim, index) - c * q.gather(dim, index)  # p_t - 1 = -q_t
            dz = (dz + c * p).scatter(dim, index, at_target)
    dz = dz * slope(logits, scale, softcap)
    if not soft:
        dz = dz.masked_fill((marks <= INVALID).unsqueeze(dim), math.nan)
        dz = dz.masked_fill((marks == IGNORED).unsqueeze(dim), 0.0)
    return dz.to(logits.dtype)


def cross_entropy_mass_bwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    m: Tensor,
    rest: Tensor,
    d_nll: Tensor | None,
    d_smooth: Tensor | None,
    *,
    dim: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dL/dtarget of a soft target, dL/dweight): -log p times the factor of y_j and of w_j, 0 where p is 0."""
    soft = target.is_floating_point()
    minus_log_p = torch.log1p(rest).unsqueeze(dim) - (capped(logits, scale, softcap) - m.unsqueeze(dim))
    minus_log_p = minus_log_p.masked_fill(minus_log_p == math.inf, 0.0)
    d_target = d_weight = None
    by: Tensor | float = 0.0 if d_smooth is None else d_smooth.unsqueeze(dim)  # what multiplies w_j (-log p_j)
    if d_nll is not None and soft:
        c, w = d_nll.unsqueeze(dim), class_row(weight, logits, dim)
        d_target = ((c if w is None else c * w) * minus_log_p).to(target.dtype)
        by = by + c * target.to(minus_log_p.dtype)
    if weight is not None:
        terms = by * minus_log_p
        if not soft:
            terms = terms.masked_fill((of_rows(target, logits.dim(), dim) == IGNORED).unsqueeze(dim), 0.0)
        others = [i for i in range(terms.dim()) if i != dim]
        d_weight = terms.sum(others) if others else terms
    return d_target, d_weight


def _in_slices(
    out: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: tuple[Tensor | None, ...],
    **layout: Any,
) -> Tensor:
    """The gradient written slice by slice along the longest dimension that is not the classes'."""
    dim = layout["dim"]
    others = [i for i in range(logits.dim()) if i != dim]
    if not others:  # one row cannot be cut: its sums need all of it
        return out.copy_(cross_entropy_bwd(logits, target, weight, *rows, **layout))  # pyright: ignore
    cut = max(others, key=lambda i: logits.shape[i])
    per_step = max(1, _SLICE * logits.shape[cut] // max(1, logits.numel()))
    full = target.dim() == logits.dim()
    for start in range(0, logits.shape[cut], per_step):
        count = min(per_step, logits.shape[cut] - start)

        def part(x: Tensor, whole: bool, start: int = start, count: int = count) -> Tensor:
            return x.narrow(cut if whole or cut < dim else cut - 1, start, count)

        few = (None if r is None else part(r, r.dim() == logits.dim()) for r in rows)
        piece = cross_entropy_bwd(part(logits, True), part(target, full), weight, *few, **layout)  # pyright: ignore
        part(out, True).copy_(piece)
    return out
