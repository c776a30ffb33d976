"""The row functions: native or Triton kernels where they serve the tensor, plain PyTorch ops everywhere else.

`plain.py` holds the mathematics, `softmax_ext/csrc` the same functions in C++ and `softmax_ext/gpu` in Triton. Same
names, same arguments, same results to rounding; all act along one axis `dim` (non-negative).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_ops._rows import native, plain, triton
from torch_ops._rows.arithmetic import capped, class_row, compute, slope
from torch_ops._rows.classes import IGNORED, INVALID, MASKED, of_rows
from torch_ops._rows.mean import centred
from torch_ops._rows.plain import cross_entropy_mass_bwd

__all__ = [
    "IGNORED",
    "INVALID",
    "MASKED",
    "capped",
    "centred",
    "class_row",
    "compute",
    "cross_entropy_mass_bwd",
    "of_rows",
    "slope",
]


def softmax_fwd(x: Tensor, *, dim: int) -> Tensor:
    """y_i = exp(x_i) / sum_j exp(x_j), in the type of x."""
    if (ops := _serving(x, dim)) is not None:
        return ops.softmax_fwd(x, dim)
    return plain.softmax_fwd(x, dim=dim)


def softmax_bwd(dy: Tensor, y: Tensor, *, dim: int) -> Tensor:
    """dx = y (dy - sum(y dy)), from the output alone."""
    if (ops := _serving(y, dim)) is not None:
        return ops.softmax_bwd(dy if dy.dtype is y.dtype else dy.to(y.dtype), y, dim)
    return plain.softmax_bwd(dy, y, dim=dim)


def log_softmax_fwd(x: Tensor, *, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, m, rest), log p in the type of x."""
    if (ops := _serving(x, dim)) is not None:
        return ops.log_softmax_fwd(x, dim)
    return plain.log_softmax_fwd(x, dim=dim)


def log_softmax_bwd(dy: Tensor, x: Tensor, m: Tensor, rest: Tensor, *, dim: int) -> Tensor:
    """dx = dy - p sum(dy)."""
    if (ops := _serving(x, dim)) is not None:
        return ops.log_softmax_bwd(dy if dy.dtype is x.dtype else dy.to(x.dtype), x, m, rest, dim)
    return plain.log_softmax_bwd(dy, x, m, rest, dim=dim)


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
    """(nll, lse, [smooth], [entropy], m, rest), row-shaped, in nats."""
    if (one := _as_one(logits, target, dim, scale, softcap)) is not None:
        return one.fwd(weight, smooth, entropy)
    if (ops := _serving(logits, dim)) is not None:
        target = _taken(target, logits)
        return tuple(ops.cross_entropy_fwd(logits, target, weight, dim, scale, softcap, smooth, entropy))
    return plain.cross_entropy_fwd(
        logits, target, weight, dim=dim, scale=scale, softcap=softcap, smooth=smooth, entropy=entropy
    )


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
    upstream = (d_nll, d_lse, d_smooth, d_entropy)
    # a lazily negated tensor (the imaginary part of a conjugate) has no memory of its own values to write to
    here = out is None or (out.is_contiguous() and not out.is_neg() and out.data_ptr() == logits.data_ptr())
    if here and (one := _as_one(logits, target, dim, scale, softcap)) is not None:
        dx = one.bwd(weight, m, rest, *upstream, out)
        return dx if out is None else _written(dx)
    ops = _serving(logits, dim)
    if ops is not None and here:
        args = (_taken(target, logits), weight, m, rest, *upstream, dim, scale, softcap)
        if out is None:
            return ops.cross_entropy_bwd(logits, *args)
        ops.cross_entropy_bwd_(out, *args)
        return _written(out)
    return plain.cross_entropy_bwd(
        logits, target, weight, m, rest, *upstream, dim=dim, scale=scale, softcap=softcap, out=out
    )


def cross_entropy_fwd_bwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_smooth: Tensor | None,
    d_entropy: Tensor | None,
    *,
    dim: int,
    scale: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
) -> tuple[Tensor, ...]:
    """cross_entropy_fwd's values, and cross_entropy_bwd's gradient over the logits, in one visit of each row."""
    upstream = (d_nll, d_lse, d_smooth, d_entropy)
    if logits.is_contiguous() and (one := _as_one(logits, target, dim, scale, softcap)) is not None:
        values = one.fwd_bwd(weight, *upstream, smooth, entropy)
        _written(logits)
        return values
    ops = _serving(logits, dim)
    if ops is not None and logits.is_contiguous():
        args = (weight, *upstream, dim, scale, softcap, smooth, entropy)
        values = ops.cross_entropy_fwd_bwd_(logits, _taken(target, logits), *args)
        _written(logits)
        return tuple(values)
    layout: dict[str, Any] = {"dim": dim, "scale": scale, "softcap": softcap}
    values = plain.cross_entropy_fwd(logits, target, weight, **layout, smooth=smooth, entropy=entropy)
    m, rest = values[-2:]
    plain.cross_entropy_bwd(logits, target, weight, m, rest, *upstream, **layout, out=logits)
    return values


def _serving(x: Tensor, dim: int) -> Any:
    """The ops whose kernels take x, or None."""
    if native.serves(x, dim):
        return native.ops
    return triton.ops if triton.serves(x, dim) else None


def _as_one(x: Tensor, target: Tensor, dim: int, scale: float, softcap: float | None) -> Any:
    """The rows of K class indices each as the kernels that know one take them; None if they are no such."""
    if target.dim() != x.dim() or target.is_floating_point() or not triton.serves(x, dim):
        return None
    from torch_ops._rows.sparse import Rows

    return Rows(triton.ops, x, target, dim, scale, softcap)


def _written(x: Tensor) -> Tensor:
    """x, which an op of ours has written.

    Neither door says so for an op that declares it writes: without it a later use of overwritten logits would be a
    wrong number instead of autograd's error.
    """
    torch.autograd.graph.increment_version(x)
    return x


def _taken(target: Tensor, logits: Tensor) -> Tensor:
    """Soft targets of a type the kernels read: the logits' own or the compute type."""
    if target.is_floating_point() and target.dtype != logits.dtype:
        return target.to(torch.promote_types(logits.dtype, torch.float32))
    return target
