"""The row functions: native kernels where XLA compiles for one CPU, plain jax.numpy everywhere else.

`plain.py` holds the mathematics, `softmax_ext/csrc` the same functions in C++. Same names, same arguments, same
results to rounding; all act along one axis `axis` (non-negative).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_ops._rows import plain
from jax_ops._rows.alive import alive
from jax_ops._rows.arithmetic import capped, class_row, compute, slope
from jax_ops._rows.classes import IGNORED, INVALID, MASKED, finite, is_soft, mass_sum, of_rows
from jax_ops._rows.plain import cross_entropy_mass_bwd
from jax_ops._rows.primitive import Row, transposable

__all__ = [
    "IGNORED",
    "INVALID",
    "MASKED",
    "alive",
    "capped",
    "class_row",
    "compute",
    "cross_entropy_mass_bwd",
    "finite",
    "is_soft",
    "mass_sum",
    "of_rows",
    "slope",
]


def softmax_fwd(x: Array, *, axis: int) -> Array:
    """y_i = exp(x_i) / sum_j exp(x_j), in the type of x."""
    (y,) = _softmax_fwd(x, axis=axis)
    return y


def softmax_bwd(dy: Array, y: Array, *, axis: int) -> Array:
    """dx = y (dy - sum(y dy)), from the output alone."""
    (dx,) = _softmax_bwd(dy.astype(y.dtype), y, axis=axis)
    return dx


def log_softmax_fwd(x: Array, *, axis: int) -> tuple[Array, Array, Array]:
    """(log p, m, rest), log p in the type of x."""
    y, m, rest = _log_softmax_fwd(x, axis=axis)
    return y, m, rest


def log_softmax_bwd(dy: Array, x: Array, m: Array, rest: Array, *, axis: int) -> Array:
    """dx = dy - p sum(dy)."""
    (dx,) = _log_softmax_bwd(dy.astype(x.dtype), x, m, rest, axis=axis)
    return dx


def cross_entropy_fwd(
    logits: Array,
    target: Array,
    weight: Array | None,
    *,
    axis: int,
    scale: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
) -> tuple[Array, ...]:
    """(nll, lse, [smooth], [entropy], m, rest), row-shaped, in nats."""
    arrays, options = (logits, _taken(target, logits), weight), {"smooth": smooth, "entropy": entropy}
    return tuple(_cross_entropy_fwd(*arrays, axis=axis, scale=scale, softcap=softcap, **options))


def cross_entropy_bwd(
    logits: Array,
    target: Array,
    weight: Array | None,
    m: Array,
    rest: Array,
    d_nll: Array | None,
    d_lse: Array | None,
    d_smooth: Array | None,
    d_entropy: Array | None,
    *,
    axis: int,
    scale: float,
    softcap: float | None,
) -> Array:
    """dL/dlogits from the rows' upstream gradients d_*, in which it is linear."""
    arrays = (logits, _taken(target, logits), weight, m, rest, d_nll, d_lse, d_smooth, d_entropy)
    (dlogits,) = _cross_entropy_bwd(*arrays, axis=axis, scale=scale, softcap=softcap)
    return dlogits


def cross_entropy_bwd_over(
    logits: Array,
    target: Array,
    weight: Array | None,
    m: Array,
    rest: Array,
    d_nll: Array | None,
    d_lse: Array | None,
    d_smooth: Array | None,
    d_entropy: Array | None,
    *,
    axis: int,
    scale: float,
    softcap: float | None,
) -> Array:
    """`cross_entropy_bwd`, the kernel writing over logits that nothing else needs."""
    arrays = (logits, _taken(target, logits), weight, m, rest, d_nll, d_lse, d_smooth, d_entropy)
    (dlogits,) = _cross_entropy_bwd_over(*arrays, axis=axis, scale=scale, softcap=softcap)
    return dlogits


def cross_entropy_fwd_bwd(
    logits: Array,
    target: Array,
    weight: Array | None,
    d_nll: Array | None,
    d_lse: Array | None,
    d_smooth: Array | None,
    d_entropy: Array | None,
    *,
    axis: int,
    scale: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
) -> tuple[Array, ...]:
    """(dL/dlogits, nll, lse, [smooth], [entropy], m, rest) in one visit, the kernel writing over the logits."""
    arrays = (logits, _taken(target, logits), weight, d_nll, d_lse, d_smooth, d_entropy)
    layout = {"axis": axis, "scale": scale, "softcap": softcap}
    return tuple(_cross_entropy_fwd_bwd(*arrays, **layout, smooth=smooth, entropy=entropy))


def _in_two_visits(
    logits: Array,
    target: Array,
    weight: Array | None,
    *upstream: Array | None,
    smooth: bool,
    entropy: bool,
    **layout: Any,
) -> list[Array]:
    """What `cross_entropy_fwd_bwd` is: its derivatives are those of the two."""
    values = _cross_entropy_fwd(logits, target, weight, **layout, smooth=smooth, entropy=entropy)
    return [*_cross_entropy_bwd(logits, target, weight, *values[-2:], *upstream, **layout), *values]


def _taken(target: Array, logits: Array) -> Array:
    """Soft targets of a type the kernels read: the logits' own or the compute type."""
    if is_soft(target) and target.dtype != logits.dtype:
        return target.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return target


def _loss_bwd_transpose(*args: Array, wanted: Sequence[int], **layout: Any) -> tuple[Array, ...]:
    names = tuple(("nll", "lse", "smooth", "entropy")[i - 5] for i in wanted)
    return plain.cross_entropy_bwd_transpose(args[5], *args[:5], names=names, **layout)


def _nothing(present: Sequence[bool], options: dict[str, Any]) -> dict[str, Any]:
    return {}


def _loss(present: Sequence[bool], options: dict[str, Any]) -> dict[str, Any]:
    """Numbers in the type the kernel expects, whatever JAX makes of 64 bits; 0 is no soft cap."""
    numbers = {"scale": np.float64(options["scale"]), "softcap": np.float64(options["softcap"] or 0.0)}
    return {"weight": present[2], **numbers}


def _loss_fwd(present: Sequence[bool], options: dict[str, Any]) -> dict[str, Any]:
    return {**_loss(present, options), "smooth": options["smooth"], "entropy": options["entropy"]}


def _loss_bwd(present: Sequence[bool], options: dict[str, Any]) -> dict[str, Any]:
    upstream = dict(zip(("d_nll", "d_lse", "d_smooth", "d_entropy"), present[-4:], strict=True))
    return {**_loss(present, options), **upstream}


def _loss_fwd_bwd(present: Sequence[bool], options: dict[str, Any]) -> dict[str, Any]:
    return {**_loss_fwd(present, options), **_loss_bwd(present, options)}


# name, the plain function, and the kernel: its name and what it is told beside the axis
_softmax_fwd = Row("softmax_fwd", plain.softmax_fwd, kernel=("softmax_fwd", _nothing))
_softmax_bwd = transposable(
    Row("softmax_bwd", plain.softmax_bwd, linear=[0], kernel=("softmax_bwd", _nothing)),
    like=0,
    symmetric=True,  # the softmax's Jacobian diag(y) - y yT
)
_log_softmax_fwd = Row("log_softmax_fwd", plain.log_softmax_fwd, kernel=("log_softmax_fwd", _nothing))
_log_softmax_bwd = transposable(
    Row("log_softmax_bwd", plain.log_softmax_bwd, linear=[0], kernel=("log_softmax_bwd", _nothing)),
    like=0,
    back=lambda dx, *row, axis, wanted: [plain.log_softmax_bwd_transpose(dx, *row, axis=axis)],
)
_cross_entropy_fwd = Row(
    "cross_entropy_fwd", plain.cross_entropy_fwd, weight=2, kernel=("cross_entropy_fwd", _loss_fwd)
)
_cross_entropy_bwd, _cross_entropy_bwd_over = (
    transposable(
        Row(
            name,
            plain.cross_entropy_bwd,
            linear=[5, 6, 7, 8],
            weight=2,
            kernel=("cross_entropy_bwd", _loss_bwd),
            inplace=inplace,
        ),
        like=3,
        back=_loss_bwd_transpose,
    )
    for name, inplace in (("cross_entropy_bwd", False), ("cross_entropy_bwd_over", True))
)
_cross_entropy_fwd_bwd = Row(
    "cross_entropy_fwd_bwd",
    _in_two_visits,
    weight=2,
    kernel=("cross_entropy_fwd_bwd", _loss_fwd_bwd),
    inplace=True,
)
