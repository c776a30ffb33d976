"""log sum_j p_j^2 of a row with its analytic derivatives.

legend:  z a row's logits, scaled and capped, p = softmax(z), r = p^2 / sum p^2, m the maximum, e = exp(z - m)
         S = sum e, S' = sum e^2, c = m + log(S' / S), a = exp(z - c), f = expm1(z - c)
         A = sum a, A' = sum a^2, F = sum a f = A' - A
value:   L = log S' - 2 log S, both logarithms log1p of what all but one maximum add
first:   dL/dz_j = 2 (r_j - p_j) = 2 a_j (f_j A - F) / (A A'), for any c: 1 / A' - 1 / A = -F / (A A')
second:  Hess v = 4 J(r) v - 2 J(p) v, J(y) v = y (v - sum y v)
numbers: where all logits nearly agree r and p do, and of two numbers rounded apart few digits are left: f has them.
         The choice of c makes F nearly 0, so that what others than j round is no more than their own part of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_ops import _modes as modes
from torch_ops._rows import dispatch as rows
from torch_ops._rows.arithmetic import shifted
from torch_ops._rules.function import Rule, batch_first, forward_rule, in_graph
from torch_ops._rules.softmax import SoftmaxBwd, softmax

# Elements of logits at a time: of 1 MiB of float32 a CPU's cache holds what is made of them on the way.
_PIECE, _PIECE_ON_DEVICE = 1 << 18, 1 << 26


@in_graph
def log_sum_sq(z: Tensor, dim: int) -> Tensor:
    """log sum_j p_j^2 of each row of logits in the compute type, with every derivative."""
    return LogSumSq.apply(z, dim)[0]  # pyright: ignore[reportOptionalSubscript]


class LogSumSq(Rule):
    """(L, c) of each row. Saves z and c."""

    @staticmethod
    def forward(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        value, c = _by_rows(z, dim) or _by_pieces(_values, dim, z)
        return value, c

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, ctx.dim = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, output[1])
        ctx.save_for_forward(z, output[1])

    @staticmethod
    def backward(ctx: Any, d_value: Tensor | None, _: None) -> Any:
        z, c = ctx.saved_tensors
        return (None if d_value is None else LogSumSqBwd.apply(z, c, d_value, ctx.dim)), None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dz: Tensor, _: None) -> Any:
        z, c = saved
        return _along(z, c, dz, ctx.dim), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor, dim: int) -> Any:
        (z,) = batch_first(info, in_dims, z)
        return LogSumSq.apply(z, dim + 1), (0, 0)


class LogSumSqBwd(Rule):
    """dL/dz times the row's upstream gradient, in which it is linear."""

    @staticmethod
    def forward(z: Tensor, c: Tensor, up: Tensor, dim: int) -> Tensor:
        return _by_pieces(_gradient, dim, z, c, up)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *arrays, ctx.dim = inputs
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        z, c, up = ctx.saved_tensors
        d_z = _hessian_vector(z, v, up, ctx.dim) if ctx.needs_input_grad[0] else None
        return d_z, None, _along(z, c, v, ctx.dim) if ctx.needs_input_grad[2] else None, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dz: Tensor | None, _c: None, d_up: Tensor | None, _: None) -> Any:
        z, c, up = saved
        out = torch.zeros_like(z) if dz is None else _hessian_vector(z, dz, up, ctx.dim)
        return out if d_up is None else out + LogSumSqBwd.apply(z, c, d_up, ctx.dim)

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor, c: Tensor, up: Tensor, dim: int) -> Any:
        z, c, up = batch_first(info, in_dims, z, c, up)
        return LogSumSqBwd.apply(z, c, up, dim + 1), 0


def _by_rows(z: Tensor, dim: int) -> tuple[Tensor, ...] | None:
    """(L, c) from the row functions of z and of 2 z, where no look costs anything and no doubled logit overflows."""
    if not modes.can_look(z):
        return None
    any_class = torch.zeros(z.shape[:dim] + z.shape[dim + 1 :], dtype=torch.int64)
    how: dict[str, Any] = {"dim": dim, "softcap": None, "smooth": False, "entropy": False}
    m, rest = rows.cross_entropy_fwd(z, any_class, None, scale=1.0, **how)[-2:]
    rest_sq = rows.cross_entropy_fwd(z, any_class, None, scale=2.0, **how)[-1]
    if not bool(rest_sq.isfinite().all()):
        return None
    log, log_sq = torch.log1p(rest), torch.log1p(rest_sq)
    return log_sq - 2.0 * log, m + (log_sq - log)


def _values(dim: int, z: Tensor) -> tuple[Tensor, ...]:
    """(L, c)."""
    m, top = z.max(dim, keepdim=True)
    others = shifted(z, m)[1].scatter(dim, top, 0.0)
    log, log_sq = (torch.log1p(x.sum(dim, keepdim=True)) for x in (others, others.square()))
    value = (log_sq - 2.0 * log).masked_fill(~m.isfinite(), math.nan)
    return value.squeeze(dim), (m + (log_sq - log)).squeeze(dim)


def _gradient(dim: int, z: Tensor, c: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    a, f = about(z, c.unsqueeze(dim))
    total, over = a.sum(dim, keepdim=True), (a * f).sum(dim, keepdim=True)
    by = 2.0 * up.unsqueeze(dim) / (total * (total + over))  # of a batch of upstreams: nothing is written into by it
    return (f.mul_(total).sub_(over).mul_(a) * by,)


def about(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(a, f) = (exp(z - c), expm1(z - c)), without a derivative."""
    f = z - c
    back = f - z
    error = (z - (f - back)).sub_(back.add_(c))  # of the difference (Knuth's TwoSum)
    a = torch.exp(f)
    error = error.nan_to_num_(0.0, 0.0, 0.0).mul_(a)
    return a.add_(error), f.expm1_().add_(error)


def _along(z: Tensor, c: Tensor, v: Tensor, dim: int) -> Tensor:
    """dL along a direction of the logits."""
    return (LogSumSqBwd.apply(z, c, torch.ones_like(c), dim) * v).sum(dim)


def _hessian_vector(z: Tensor, v: Tensor, up: Tensor, dim: int) -> Tensor:
    p = softmax(z, dim)
    sq = p * p
    r = sq / sq.sum(dim, keepdim=True)
    return (4.0 * SoftmaxBwd.apply(v, r, dim) - 2.0 * SoftmaxBwd.apply(v, p, dim)) * up.unsqueeze(dim)


def _by_pieces(call: Callable[..., tuple[Tensor, ...]], dim: int, z: Tensor, *of_rows: Tensor) -> tuple[Tensor, ...]:
    """call(dim, z, *of_rows), of rows in memory by some of them at a time."""
    room = _PIECE if z.device.type == "cpu" else _PIECE_ON_DEVICE
    if dim != 1 or z.dim() != 2 or not modes.is_eager(z) or z.numel() <= room:
        return call(dim, z, *of_rows)
    count = max(1, room // z.shape[1])
    parts = [call(dim, *part) for part in zip(*(x.split(count) for x in (z, *of_rows)), strict=True)]
    return tuple(map(torch.cat, zip(*parts, strict=True)))
