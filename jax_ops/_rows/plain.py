"""Row functions in plain jax.numpy: any device, any layout, one axis `axis` (non-negative).

The algorithm keeps `rest`, the sum of exp(z - m) over every position but one of the row's maximum m, so that
lse = m + log1p(rest) and 1 - p at the maximum is rest / (1 + rest): neither subtracts nearly equal numbers.
Row-shaped results (the input's shape without `axis`) and all arithmetic are in the compute type: float32
for half precision and float32, float64 for float64.

Every function can itself be differentiated. The shift m moves as `exponentials` says, which changes no derivative of
anything that does not depend on the shift, and each place where the value of e = exp(z - m) at the maximum is known to
be 1 still names e, so that its derivative is there.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_ops._rows.alive import alive, alive_rows
from jax_ops._rows.arithmetic import (
    LOWEST,
    capped,
    class_row,
    compute,
    dot,
    each_nll,
    entropy_of,
    exponentials,
    nll_gradient,
    pick,
    relative,
    slope,
    spread,
)
from jax_ops._rows.classes import IGNORED, is_soft, of_rows, upstream_of, without_ignored
from jax_ops._rows.mean import centred, distribution, log_softmax, softmax

_LAYOUT = ("axis", "scale", "softcap")


@partial(jax.jit, static_argnames="axis")
def softmax_fwd(x: Array, *, axis: int) -> Array:
    """y_i = exp(x_i) / sum_j exp(x_j), in the type of x."""
    return softmax(axis, compute(x)).astype(x.dtype)


@partial(jax.jit, static_argnames="axis")
def softmax_bwd(dy: Array, y: Array, *, axis: int) -> Array:
    """dx = J dy for J = diag(y) - y yT, from the output alone."""
    # legend:  y softmax output, dy = dL/dy, dx = dL/dx, c any number, g = dy - c, S = sum_j y_j, 1 but for rounding
    # formula: dx_i = sum_j dy_j y_j (delta_ij - y_i) = y_i (dy_i - sum_j y_j dy_j) = y_i (g_i - sum_j y_j g_j / S)
    # source:  Kronecker form of Purcell 2021, eq. (5), contracted with dy; docs/derivation.md
    # c chooses what is rounded (`centred`). Where one class holds more than half it is that class's dy_m: its own term
    # of the sum is 0, and dx_m = -y_m sum_j y_j g_j is one over the others, where dy_m - sum_j y_j dy_j would leave 0.
    a = compute(y)
    return (a * centred(compute(dy), a, axis)).astype(y.dtype)


@partial(jax.jit, static_argnames="axis")
def log_softmax_fwd(x: Array, *, axis: int) -> tuple[Array, Array, Array]:
    """(log p, m, rest), log p in the type of x."""
    y, m, rest = log_softmax(axis, compute(x))
    return y.astype(x.dtype), m, rest


@partial(jax.jit, static_argnames="axis")
def log_softmax_bwd(dy: Array, x: Array, m: Array, rest: Array, *, axis: int) -> Array:
    """dx = dy - p sum(dy)."""
    # formula: d log p_i / dx_j = delta_ij - p_j (Kurbiel's logarithmic derivative), contracted with dy
    # p comes from the input: from a half-precision log p it would be off by |log p| units of roundoff.
    p, q, confident = distribution(axis, compute(x), m, rest)
    return -nll_gradient(compute(dy), p, q, confident, axis).astype(x.dtype)


@partial(jax.jit, static_argnames="axis")
def log_softmax_bwd_transpose(dx: Array, x: Array, m: Array, rest: Array, *, axis: int) -> Array:
    """dy = dx - sum(p dx): what a tangent of x makes of log p."""
    p, _, confident = distribution(axis, compute(x), m, rest)
    return centred(compute(dx), p, axis, confident).astype(x.dtype)


@partial(jax.jit, static_argnames=(*_LAYOUT, "smooth", "entropy"))
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
    """(nll, lse, [smooth], [entropy], m, rest), row-shaped, in nats.

    nll = -log p_target for class indices (not weighted), -sum_j w_j y_j log p_j for soft targets y;
    smooth = -sum_j w_j log p_j; entropy = -sum_j p_j log p_j. With K class indices a row, along `axis`, nll has their
    shape: 0 at IGNORED, MASKED where it is infinite.
    """
    nothing = of_rows(target, logits.ndim, axis) == IGNORED
    if not is_soft(target):
        logits = alive(axis, logits, nothing, weight)
    d, e, m, rest = exponentials(capped(logits, scale, softcap), axis)
    log_total = jnp.log1p(rest)
    w = class_row(weight, d, axis)
    if is_soft(target):
        mass = target.astype(d.dtype) if w is None else target.astype(d.dtype) * w
        # an empty sum would forget that nothing has no distribution
        empty = d.shape[axis] == 0
        nll = jnp.full_like(rest.squeeze(axis), jnp.nan) if empty else dot(mass, log_total - d, axis)
    elif target.ndim == d.ndim:
        nll = each_nll(logits, log_total, target, m, axis, scale, softcap)
    else:
        nll = (log_total - pick(logits, target, m, axis, scale, softcap)).squeeze(axis)
    rows = [nll, (m + log_total).squeeze(axis)]
    if smooth:
        rows.append((log_total - d).sum(axis) if w is None else dot(w, log_total - d, axis))
    if entropy:
        rows.append(entropy_of(d, e, rest, axis).squeeze(axis))
    if not is_soft(target):
        rows = [jnp.where(target == IGNORED if row is nll else nothing, 0.0, row) for row in rows]
    return (*rows, m.squeeze(axis), rest.squeeze(axis))


@partial(jax.jit, static_argnames=_LAYOUT)
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
    # legend:  p softmax(z), z = softcap tanh(scale logits / softcap), t target class, Y one-hot of t or
    #          w * soft target, w class weights, H entropy, S = sum_j Y_j, W = sum_j w_j
    # formula: dL/dz_j = d_nll (S p_j - Y_j) + d_lse p_j + d_smooth (W p_j - w_j)
    #                    - d_entropy p_j (log p_j + H)
    # source:  Kurbiel's s * sum(y) - y, with S not assumed to be 1; docs/derivation.md
    ups = {"nll": d_nll, "lse": d_lse, "smooth": d_smooth, "entropy": d_entropy}
    ups = {name: up for name, up in ups.items() if up is not None}
    logits, m, rest = alive_rows(axis, target, weight, logits, m, rest)
    factors = _factors(logits, target, weight, m, rest, tuple(ups), axis=axis, scale=scale, softcap=softcap)
    dz, marks = jnp.zeros_like(factors["p"]), of_rows(target, logits.ndim, axis)
    for name, up in ups.items():
        if name in factors:
            dz = dz + upstream_of(up, marks, axis) * factors[name]
    if d_nll is not None and target.ndim == dz.ndim and not is_soft(target):
        mass = spread(upstream_of(d_nll, target, None), target, dz, axis)
        dz = dz + nll_gradient(mass, factors["p"], factors["q"], factors["confident"], axis)
    elif d_nll is not None and not is_soft(target):
        classes = lax.broadcasted_iota(target.dtype, dz.shape, axis)
        dp = jnp.where(classes == jnp.expand_dims(target, axis), -factors["q"], factors["p"])
        dz = dz + upstream_of(d_nll, target, axis) * dp
    dz = dz * slope(logits, scale, softcap)
    if not is_soft(target):  # an ignored row, or a class weight, may be NaN, which 0 does not silence
        dz = jnp.where(jnp.expand_dims(marks == IGNORED, axis), 0.0, dz)
    return dz.astype(logits.dtype)


@partial(jax.jit, static_argnames=(*_LAYOUT, "names"))
def cross_entropy_bwd_transpose(
    dx: Array,
    logits: Array,
    target: Array,
    weight: Array | None,
    m: Array,
    rest: Array,
    *,
    names: tuple[str, ...],
    axis: int,
    scale: float,
    softcap: float | None,
) -> tuple[Array, ...]:
    """What a tangent of the logits makes of a row's nll, lse, smooth or entropy: the transpose of `cross_entropy_bwd`.

    By indices, not by comparing all classes to them: so rows of one tangent and many targets need no array of both.
    """
    # formula: d nll = sum_j (p_j - Y_j) g_j + c (sum_j p_j - 1) for g = dz - c. Where one class m holds more than half
    #          c is dz_m: then sum_j p_j - 1 is the others' sum less q_m, and nothing of m's own is left to cancel.
    logits, m, rest, dx = alive_rows(axis, target, weight, logits, m, rest, dx)
    f = _factors(logits, target, weight, m, rest, names, axis=axis, scale=scale, softcap=softcap)
    dz = compute(dx) * slope(logits, scale, softcap)
    found, marks = [], of_rows(target, logits.ndim, axis)
    for name in names:
        if name in f:
            found.append(upstream_of((f[name] * dz).sum(axis), marks, None))
            continue
        own = jnp.where(f["confident"], dz, 0.0).sum(axis, keepdims=True)
        g, others = dz - own, jnp.where(f["confident"], 0.0, f["p"]).sum(axis)
        q = jnp.where(f["confident"], f["q"], 0.0).sum(axis) + 1.0 - f["confident"].any(axis)
        of_row, index = (f["p"] * g).sum(axis), target.clip(0)
        moved = own.squeeze(axis) * (others - q)
        if target.ndim == g.ndim:
            at = jnp.take_along_axis(g, index, axis, mode="clip") if g.shape[axis] else 0.0 * index
            row = jnp.expand_dims(of_row, axis) - at + jnp.expand_dims(moved, axis)
        else:
            at = jnp.take_along_axis(g, jnp.expand_dims(index, axis), axis, mode="clip").squeeze(axis)
            row = of_row - at + moved
        found.append(upstream_of(row, target, None))
    return tuple(row.astype(rest.dtype) for row in found)


def _factors(
    logits: Array,
    target: Array,
    weight: Array | None,
    m: Array,
    rest: Array,
    names: tuple[str, ...],
    *,
    axis: int,
    scale: float,
    softcap: float | None,
) -> dict[str, Array]:
    """What each of a row's upstream gradients is multiplied by in dL/dz; of class indices p and q = 1 - p."""
    rest = jnp.expand_dims(rest, axis)
    d, e = relative(capped(logits, scale, softcap), jnp.expand_dims(m, axis), rest)
    total = 1.0 + rest
    p = e / total
    # q = 1 - p, never 1 subtracted from p: at the maximum rest / total, elsewhere at least 1/2.
    q = jnp.where(d == 0, rest - (e - 1.0), total - e) / total
    # Where one class holds more than half, S p - Y = (S - Y) - S q: a confident row keeps its gradient.
    # Among ties for the maximum it is this form that would cancel.
    confident = (d == 0) & (rest < 1)
    w = class_row(weight, d, axis)
    out = {"p": p, "q": q, "confident": confident, "lse": p}
    if "smooth" in names:
        ones = jnp.ones_like(d) if w is None else jnp.broadcast_to(w, d.shape)
        out["smooth"] = nll_gradient(ones, p, q, confident, axis)
    if "entropy" in names:
        log_p = jnp.maximum(d, LOWEST) - jnp.log1p(rest)
        out["entropy"] = -p * (log_p + entropy_of(d, e, rest, axis))
    if "nll" in names and is_soft(target):
        mass = target.astype(d.dtype) if w is None else target.astype(d.dtype) * w
        out["nll"] = nll_gradient(mass, p, q, confident, axis)
    return out


@partial(jax.jit, static_argnames=_LAYOUT)
def cross_entropy_mass_bwd(
    logits: Array,
    target: Array,
    weight: Array | None,
    m: Array,
    rest: Array,
    d_nll: Array | None,
    d_smooth: Array | None,
    *,
    axis: int,
    scale: float,
    softcap: float | None,
) -> tuple[Array | None, Array | None]:
    """(dL/dtarget of a soft target, dL/dweight): -log p times the factor of y_j and of w_j.

    Where p is 0 the factor counts 0, as a soft target of 0 there does: forward mode multiplies this by the
    target's tangent, and a masked class must not turn a tangent of 0 into 0 * inf.
    """
    logits, m, rest = without_ignored(target, axis, logits, m, rest)
    rest = jnp.expand_dims(rest, axis)
    d, _ = relative(capped(logits, scale, softcap), jnp.expand_dims(m, axis), rest)
    minus_log_p = jnp.log1p(rest) - d
    finite = minus_log_p != jnp.inf
    minus_log_p = jnp.where(finite, minus_log_p, 0.0)
    w = class_row(weight, d, axis)
    d_target = d_weight = None
    mass = jnp.zeros_like(d)  # what multiplies w_j (-log p_j)
    if d_nll is not None and is_soft(target):
        c = jnp.expand_dims(d_nll, axis)
        d_target = c * minus_log_p if w is None else c * w * minus_log_p
        d_target = d_target.astype(target.dtype)
        mass = mass + c * target.astype(d.dtype)
    if d_smooth is not None:
        mass = mass + upstream_of(d_smooth, of_rows(target, d.ndim, axis), axis)
    if weight is not None:
        others = [i for i in range(d.ndim) if i != axis]
        d_weight = (mass * minus_log_p).sum(others)
    return d_target, d_weight
