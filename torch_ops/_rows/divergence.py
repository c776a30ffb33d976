"""A student's rows of logits against a teacher's: native or Triton kernels where they serve, plain ops everywhere else.

legend:  s, t logits after scale and cap; p, q their softmaxes (p the student's)
         d_j = log p_j - log q_j = (s_j - t_j) - shift,  shift = lse_s - lse_t
value:   sum_j q_j f(p_j / q_j) with f(1) = f'(1) = 0: no term is negative and none cancels.
           forward_kl  q (expm1(d) - d)          reverse_kl  p (expm1(-d) + d)          tv  |p - q| / 2
           jsd         beta q h((1 - beta) expm1(d)) + (1 - beta) p h(beta expm1(-d)),  h(w) = w - log1p(w)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softmax_ext.contract import KINDS
from torch_ops._modes import is_none
from torch_ops._rows import native, triton
from torch_ops._rows.arithmetic import capped, compute, exponentials, shifted, slope

# Where |x| is at most this, expm1(x) - x and x - log1p(x) are summed as series.
_NEAR = 0.35


class Pair(NamedTuple):
    """The static part of a divergence's rows."""

    dim: int
    kind: str
    beta: float
    scale: float
    softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None

    @property
    def alike(self) -> bool:
        """Whether both sides' logits are only multiplied by one scale: it then comes after their difference."""
        return self.softcap is None and self.teacher_softcap is None and self.scale == self.teacher_scale

    def of_native(self) -> tuple[Any, ...]:
        """The same as the kernels' ops take it."""
        return (self.dim, KINDS.index(self.kind), *self[2:])


def divergence_fwd(student: Tensor, teacher: Tensor, keep: Tensor | None, *, pair: Pair) -> tuple[Tensor, Tensor]:
    """(the divergences in nats, row-shaped; the state of each row, one dimension more)."""
    if (ops := serving(student, pair.dim)) is not None:
        return ops.divergence_fwd(student, teacher, keep, *pair.of_native())
    s, t = logits(student, teacher, pair)
    rows = s.shape[: pair.dim] + s.shape[pair.dim + 1 :]
    if is_none(s.shape[pair.dim]):
        nothing = torch.full(rows, math.nan, dtype=s.dtype, device=s.device)
        value = nothing if keep is None else nothing.masked_fill(~keep, 0.0)
        return value, nothing.unsqueeze(-1).expand(*rows, native.STATE).clone()
    d, p, q, shift = _met(student, teacher, s, t, pair)
    value = terms(d, p, q, pair).sum(pair.dim)
    mean = weighed(d, p, q, pair).sum(pair.dim)
    if pair.kind == "reverse_kl":  # the same without the terms that cancel
        mean = value
    state = torch.stack([*(x.squeeze(pair.dim) for x in shift), mean], -1)
    if keep is not None:
        value, state = value.masked_fill(~keep, 0.0), state.masked_fill(~keep.unsqueeze(-1), 0.0)
    return value, state


def divergence_bwd(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    state: Tensor,
    d_value: Tensor,
    *,
    pair: Pair,
    out: Tensor | None = None,
) -> Tensor:
    """dL/d(student) from the rows' upstream gradients; `out` may be the student's logits themselves."""
    ops = serving(student, pair.dim)
    if out is not None:
        if out is student and ops is not None and student.is_contiguous():
            ops.divergence_bwd_(student, teacher, keep, state, d_value, *pair.of_native())
            torch.autograd.graph.increment_version(student)  # a later use of the logits is autograd's error
            return student
        return out.copy_(divergence_bwd(student, teacher, keep, state, d_value, pair=pair))
    if ops is not None:
        return ops.divergence_bwd(student, teacher, keep, state, d_value, *pair.of_native())
    s, t = logits(student, teacher, pair)
    if is_none(s.shape[pair.dim]):
        return torch.zeros_like(student)
    m_s, rest_s, m_t, rest_t, hi, lo, mean = (x.unsqueeze(pair.dim) for x in state.unbind(-1))
    p, q = probabilities(s, m_s, rest_s), probabilities(t, m_t, rest_t)
    d = difference(student, teacher, s, t, hi, lo, pair)
    # formula: ds_j = p_j (u_j - sum_k p_k u_k), u = f'(p / q); the sum is 0 for forward_kl
    g = weighed(d, p, q, pair)
    if pair.kind != "forward_kl":
        g = g - torch.where(p > 0, p * mean, 0.0)
    g = torch.where((mean + hi).isfinite(), g, math.nan)
    dx = d_value.unsqueeze(pair.dim) * g * slope(student, pair.scale, pair.softcap)
    return (dx if keep is None else dx.masked_fill(~keep.unsqueeze(pair.dim), 0.0)).to(student.dtype)


def divergence_fwd_bwd(student: Tensor, teacher: Tensor, keep: Tensor | None, d_value: Tensor, *, pair: Pair) -> Tensor:
    """divergence_fwd's values, and divergence_bwd's gradient over the student's logits."""
    if (ops := serving(student, pair.dim)) is not None and student.is_contiguous():
        value = ops.divergence_fwd_bwd_(student, teacher, keep, d_value, *pair.of_native())
        torch.autograd.graph.increment_version(student)  # a later use of the logits is autograd's error
        return value
    value, state = divergence_fwd(student, teacher, keep, pair=pair)
    student.copy_(divergence_bwd(student, teacher, keep, state, d_value, pair=pair))
    return value


def serving(student: Tensor, dim: int) -> Any:
    """The ops whose kernels take the student's logits, or None."""
    if native.serves(student, dim):
        return native.ops
    return triton.ops if triton.serves(student, dim) else None


def log_ratio(student: Tensor, teacher: Tensor, *, pair: Pair) -> Tensor:
    """log p - log q, NaN where neither side has the class."""
    s, t = logits(student, teacher, pair)
    return _met(student, teacher, s, t, pair)[0]


def logits(student: Tensor, teacher: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    return capped(student, pair.scale, pair.softcap), capped(teacher, pair.teacher_scale, pair.teacher_softcap)


def _met(student: Tensor, teacher: Tensor, s: Tensor, t: Tensor, pair: Pair) -> tuple[Any, ...]:
    """(d, p, q, (m_s, rest_s, m_t, rest_t, hi, lo)): the shift is the sum of the last two."""
    # The maxima and sums of both rows give the shift to a few ulp of lse, too coarse for two rows that are next to each
    # other. But sum_j (p_j - q_j) is 0: what it comes out as is the shift's error, to the last digits of the terms.
    _, e_s, m_s, rest_s = exponentials(s, pair.dim)
    _, e_t, m_t, rest_t = exponentials(t, pair.dim)
    p, q = e_s / (1.0 + rest_s), e_t / (1.0 + rest_t)
    unit = pair.scale if pair.alike else 1.0
    hi = ((m_s - m_t) + (torch.log1p(rest_s) - torch.log1p(rest_t))) / unit
    lo = torch.zeros_like(hi)
    for _ in range(2):
        d = difference(student, teacher, s, t, hi, lo, pair)
        off = torch.log1p(less(d, p, q).sum(pair.dim, keepdim=True).clamp(min=-0.5)) / unit
        total = hi + (lo + off)
        hi, lo = total, (hi - total) + (lo + off)
    d = difference(student, teacher, s, t, hi, lo, pair)
    return d, p, q, (m_s, rest_s, m_t, rest_t, hi, lo)


def probabilities(z: Tensor, m: Tensor, rest: Tensor) -> Tensor:
    return shifted(z, m)[1] / (1.0 + rest)


def difference(student: Tensor, teacher: Tensor, s: Tensor, t: Tensor, hi: Tensor, lo: Tensor, pair: Pair) -> Tensor:
    """(s - t) - shift, with the rounding error of s - t; logits that are only scaled are subtracted before."""
    if pair.alike:
        s, t = compute(student), compute(teacher)
    apart = s - t
    back = apart - s
    error = torch.nan_to_num((s - (apart - back)) - (t + back), 0.0, 0.0, 0.0)
    d = (apart - hi) + (error - lo)
    return d * pair.scale if pair.alike and pair.scale != 1.0 else d


def less(d: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """p - q: q expm1(d) where that is the smaller of the two or close to it."""
    return torch.where(d.abs() < 0.7, q * torch.expm1(d), p - q)


def terms(d: Tensor, p: Tensor, q: Tensor, pair: Pair) -> Tensor:
    """q f(p / q)."""
    if pair.kind == "tv":
        return 0.5 * less(d, p, q).abs()
    if pair.kind == "forward_kl":
        return torch.where(d.abs() < 0.7, q * _curve(d), less(d, p, q) - torch.where(q == 0, 0.0, q * d))
    if pair.kind == "reverse_kl":
        return torch.where(d.abs() < 0.7, p * _curve(-d), torch.where(p == 0, 0.0, p * d) - less(d, p, q))
    b, c = pair.beta, 1.0 - pair.beta
    near = b * q * _less_log1p(c * torch.expm1(d)) + c * p * _less_log1p(b * torch.expm1(-d))
    of_q, of_p = _to_mixture(d, p, q, pair)
    return torch.where(d.abs() < 0.7, near, -b * of_q - c * of_p)


def weighed(d: Tensor, p: Tensor, q: Tensor, pair: Pair) -> Tensor:
    """p f'(p / q), 0 where p is 0; p - q for forward_kl."""
    if pair.kind == "forward_kl":
        return less(d, p, q)
    if pair.kind == "reverse_kl":
        return torch.where(p == 0, 0.0, p * d)
    if pair.kind == "tv":
        return torch.where(d > 0, 0.5 * p, torch.where(d < 0, -0.5 * p, 0.0))
    return (pair.beta - 1.0) * _to_mixture(d, p, q, pair)[1]


def _to_mixture(d: Tensor, p: Tensor, q: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """(q log(m / q), p log(m / p)) for m = beta q + (1 - beta) p, 0 where q or p is."""
    # log of the smaller ratio by log1p, of the larger by adding d: neither exponential overflows
    b, ahead = pair.beta, d >= 0
    shrunk = torch.expm1(-d.abs())
    log = torch.log1p(torch.where(ahead, b * shrunk, (1.0 - b) * shrunk))
    of_q, of_p = torch.where(ahead, log + d, log), torch.where(ahead, log, log - d)
    return torch.where(q == 0, 0.0, q * of_q), torch.where(p == 0, 0.0, p * of_p)


def _curve(x: Tensor) -> Tensor:
    """expm1(x) - x, |x| < 1: by its series where the difference would cancel."""
    half = 0.5 * x
    bend = torch.full_like(x, 1.0 / math.factorial(16))
    for k in range(15, 1, -1):
        bend = bend * half + 1.0 / math.factorial(k)
    bend = bend * half.square()  # expm1(x / 2) - x / 2
    return (half + bend).square() + 2.0 * bend


def _less_log1p(w: Tensor) -> Tensor:
    """w - log1p(w): by its series in w / (2 + w) where the difference would cancel."""
    v = torch.where(w.abs() < _NEAR, w, 0.0)
    r = v / (2.0 + v)
    z = r.square()
    odd = torch.full_like(z, 1.0 / 31.0)
    for k in range(29, 1, -2):
        odd = odd * z + 1.0 / k
    return torch.where(w.abs() < _NEAR, v * r - 2.0 * r * z * odd, w - torch.log1p(w))
