"""Row functions in plain jax.numpy: any device, any layout, one axis `axis` (non-negative).

The algorithm keeps `rest`, the sum of exp(z - m) over every position but one of the row's maximum m, so that
lse = m + log1p(rest) and 1 - p at the maximum is rest / (1 + rest): neither subtracts nearly equal numbers.
Row-shaped results (the input's shape without `axis`) and all arithmetic are in the compute type: float32
for half precision and float32, float64 for float64.

Every function can itself be differentiated. The shift m is held constant, which changes no derivative of
anything that does not depend on the shift, and each place where the value of e = exp(z - m) at the maximum
is known to be 1 still names e, so that its derivative is there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

IGNORED = -1  # canonical target of a row that reaches no result
INVALID = -2  # canonical target of a row whose class index names no class

_LOWEST = -1000.0  # exp of this and of everything below is 0, in float64 too

_LAYOUT = ("axis", "scale", "softcap")


@partial(jax.jit, static_argnames="axis")
def softmax_fwd(x: Array, *, axis: int) -> Array:
    """y_i = exp(x_i) / sum_j exp(x_j), in the type of x."""
    return _softmax(axis, compute(x)).astype(x.dtype)


@partial(jax.jit, static_argnames="axis")
def softmax_bwd(dy: Array, y: Array, *, axis: int) -> Array:
    """dx = J dy for J = diag(y) - y yT, from the output alone."""
    # legend:  y softmax output, dy = dL/dy, dx = dL/dx, c any number, g = dy - c, S = sum_j y_j, 1 but for rounding
    # formula: dx_i = sum_j dy_j y_j (delta_ij - y_i) = y_i (dy_i - sum_j y_j dy_j) = y_i (g_i - sum_j y_j g_j / S)
    # source:  Kronecker form of Purcell 2021, eq. (5), contracted with dy; docs/derivation.md
    # c chooses what is rounded (`_pivot`). Where one class holds more than half it is that class's dy_m: its own term
    # of the sum is 0, and dx_m = -y_m sum_j y_j g_j is one over the others, where dy_m - sum_j y_j dy_j would leave 0.
    a, g = compute(y), compute(dy)
    total = a.sum(axis, keepdims=True)
    total = jnp.where(total == 0, 1.0, total)  # a row of zeros has no distribution and no gradient
    g = g - _pivot(g, a / total, a > 0.5, axis)
    return (a * (g - (a * g).sum(axis, keepdims=True) / total)).astype(y.dtype)


@partial(jax.jit, static_argnames="axis")
def log_softmax_fwd(x: Array, *, axis: int) -> tuple[Array, Array, Array]:
    """(log p, m, rest), log p in the type of x."""
    y, m, rest = _log_softmax(axis, compute(x))
    return y.astype(x.dtype), m, rest


@partial(jax.jit, static_argnames="axis")
def log_softmax_bwd(dy: Array, x: Array, m: Array, rest: Array, *, axis: int) -> Array:
    """dx = dy - p sum(dy)."""
    # formula: d log p_i / dx_j = delta_ij - p_j (Kurbiel's logarithmic derivative), contracted with dy
    # p comes from the input: from a half-precision log p it would be off by |log p| units of roundoff.
    p, q, confident = _distribution(axis, compute(x), m, rest)
    return -_centred(compute(dy), p, q, confident, axis).astype(x.dtype)


@partial(jax.jit, static_argnames="axis")
def log_softmax_bwd_transpose(dx: Array, x: Array, m: Array, rest: Array, *, axis: int) -> Array:
    """dy = dx - sum(p dx): what a tangent of x makes of log p."""
    # Each is a difference to the mean: of g = dx - c for any c (`_pivot`) it is the same.
    p, _, confident = _distribution(axis, compute(x), m, rest)
    g = compute(dx)
    g = g - _pivot(g, p, confident, axis)
    return (g - (p * g).sum(axis, keepdims=True)).astype(x.dtype)


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
    smooth = -sum_j w_j log p_j; entropy = -sum_j p_j log p_j.
    """
    if not is_soft(target):
        logits = alive(axis, logits, target == IGNORED, weight)
    d, e, m, rest = _exponentials(capped(logits, scale, softcap), axis)
    log_total = jnp.log1p(rest)
    w = class_row(weight, d, axis)
    if is_soft(target):
        mass = target.astype(d.dtype) if w is None else target.astype(d.dtype) * w
        # an empty sum would forget that nothing has no distribution
        empty = d.shape[axis] == 0
        nll = jnp.full_like(rest.squeeze(axis), jnp.nan) if empty else _dot(mass, log_total - d, axis)
    else:
        nll = (log_total - _pick(logits, target, m, axis, scale, softcap)).squeeze(axis)
    rows = [nll, (m + log_total).squeeze(axis)]
    if smooth:
        rows.append((log_total - d).sum(axis) if w is None else _dot(w, log_total - d, axis))
    if entropy:
        rows.append(_entropy(d, e, rest, axis).squeeze(axis))
    if not is_soft(target):
        rows = [jnp.where(target == IGNORED, 0.0, row) for row in rows]
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
    logits, m, rest = _alive_rows(axis, target, logits, m, rest, weight, *ups.values())
    factors = _factors(logits, target, weight, m, rest, tuple(ups), axis=axis, scale=scale, softcap=softcap)
    dz = jnp.zeros_like(factors["p"])
    for name, up in ups.items():
        if name in factors:
            dz = dz + _up(up, target, axis) * factors[name]
    if d_nll is not None and not is_soft(target):
        classes = lax.broadcasted_iota(target.dtype, dz.shape, axis)
        dp = jnp.where(classes == jnp.expand_dims(target, axis), -factors["q"], factors["p"])
        dz = dz + _up(d_nll, target, axis) * dp
    dz = dz * slope(logits, scale, softcap)
    if not is_soft(target):  # an ignored row, or a class weight, may be NaN, which 0 does not silence
        dz = jnp.where(jnp.expand_dims(target == IGNORED, axis), 0.0, dz)
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
    logits, m, rest = _alive_rows(axis, target, logits, m, rest, weight, dx)
    f = _factors(logits, target, weight, m, rest, names, axis=axis, scale=scale, softcap=softcap)
    dz = compute(dx) * slope(logits, scale, softcap)
    found = []
    for name in names:
        if name in f:
            found.append((f[name] * dz).sum(axis))
            continue
        own = jnp.where(f["confident"], dz, 0.0).sum(axis, keepdims=True)
        g, others = dz - own, jnp.where(f["confident"], 0.0, f["p"]).sum(axis)
        q = jnp.where(f["confident"], f["q"], 0.0).sum(axis) + 1.0 - f["confident"].any(axis)
        index = jnp.expand_dims(target.clip(0), axis)
        at = jnp.take_along_axis(g, index, axis, mode="clip").squeeze(axis)
        found.append((f["p"] * g).sum(axis) - at + own.squeeze(axis) * (others - q))
    return tuple(_up(row, target, None).astype(rest.dtype) for row in found)


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
    d, e = _shifted(capped(logits, scale, softcap), jnp.expand_dims(m, axis))
    rest = jnp.expand_dims(rest, axis)
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
        out["smooth"] = _centred(ones, p, q, confident, axis)
    if "entropy" in names:
        log_p = jnp.maximum(d, _LOWEST) - jnp.log1p(rest)
        out["entropy"] = -p * (log_p + _entropy(d, e, rest, axis))
    if "nll" in names and is_soft(target):
        mass = target.astype(d.dtype) if w is None else target.astype(d.dtype) * w
        out["nll"] = _centred(mass, p, q, confident, axis)
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
    logits = _kept(logits, target, axis)
    d, _ = _shifted(capped(logits, scale, softcap), jnp.expand_dims(m, axis))
    minus_log_p = jnp.log1p(jnp.expand_dims(rest, axis)) - d
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
        mass = mass + _up(d_smooth, target, axis)
    if weight is not None:
        others = [i for i in range(d.ndim) if i != axis]
        d_weight = (mass * minus_log_p).sum(others)
    return d_target, d_weight


def is_soft(target: Array) -> bool:
    """Whether targets are probabilities rather than class indices."""
    return jnp.issubdtype(target.dtype, jnp.floating)


def compute(x: Array) -> Array:
    """x in the type the arithmetic is done in."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def capped(logits: Array, scale: float, softcap: float | None) -> Array:
    """z = softcap tanh(scale logits / softcap), or scale logits; a -inf logit stays -inf."""
    z = compute(logits)
    if scale != 1.0:
        z = z * scale
    if softcap is None:
        return z
    masked = logits == -jnp.inf
    return jnp.where(masked, z, softcap * jnp.tanh(jnp.where(masked, 0.0, z) / softcap))


def slope(logits: Array, scale: float, softcap: float | None) -> Array | float:
    """dz/dlogits = scale (1 - tanh^2), written 4q / (1 + q)^2 with q = exp(-2|.|): no cancellation."""
    if softcap is None:
        return scale
    # JAX takes 1, not 0, for the derivative of abs at 0: so the second derivative of this is right there too.
    q = jnp.exp(-2.0 * jnp.abs(compute(logits) * scale / softcap))
    return scale * (4.0 * q / jnp.square(1.0 + q))


def class_row(weight: Array | None, like: Array, axis: int) -> Array | None:
    """Class weights (V,) shaped to broadcast along `axis`."""
    if weight is None:
        return None
    return weight.reshape([-1 if i == axis else 1 for i in range(like.ndim)])


def _exponentials(z: Array, axis: int) -> tuple[Array, Array, Array, Array]:
    """(z - m, exp(z - m), m, rest); rest is NaN where m is not finite, and so is then the whole row."""
    if z.shape[axis] == 0:
        m = jnp.full_like(z.sum(axis, keepdims=True), jnp.nan)
        return z, z, m, m
    m = lax.stop_gradient(z.max(axis, keepdims=True))
    d, e = _shifted(z, m)
    # 1 at the maximum (e is 1 there, exactly), 0 elsewhere, be it the smallest number below.
    kind = jnp.finfo(d.dtype)
    top = lax.stop_gradient(1.0 - jnp.minimum(jnp.minimum(-d / kind.tiny, 1.0) / kind.eps, 1.0))
    rest = (e - top).sum(axis, keepdims=True) + (top.sum(axis, keepdims=True) - 1.0)
    return d, e, m, jnp.where(jnp.isfinite(m), rest, jnp.nan)


def _shifted(z: Array, m: Array) -> tuple[Array, Array]:
    """(z - m, exp(z - m)), the exponential with the rounding error of the difference put back."""
    # Arithmetic alone, no comparison: XLA's CPU backend fuses that into the sums, where a select would have it
    # write out (N, V) numbers first (jax 0.10.2: 1.3 times the time, and as much memory as the logits).
    z = _at_most(z, m)
    d = z - m
    # Below the floor exp(d) is 0 and the error counts for nothing; -inf - -inf is not formed.
    floor = jnp.maximum(m - 0.5 * jnp.abs(m) + _LOWEST, jnp.finfo(z.dtype).min)
    near = jnp.maximum(z, floor)
    rounded = near - m
    back = rounded - near
    error = (near - (rounded - back)) - (m + back)  # exact (Knuth's TwoSum)
    e = jnp.exp(d)
    return d, e + e * lax.stop_gradient(error)


@jax.custom_jvp
def _at_most(z: Array, m: Array) -> Array:
    """z, which is nowhere above its row's maximum m.

    Saying so keeps a compiler from contracting a product that z comes from and the subtraction of m into one
    fma: x/0.7 - m at x = 3e10 came out as 1640, and softmax as NaN (XLA on x86-64, where optimization_barrier
    and reduce_precision do not prevent it).
    """
    return jnp.minimum(z, m)


@_at_most.defjvp
def _at_most_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _at_most(*primals), tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(axis: int, x: Array) -> Array:
    _, e, _, rest = _exponentials(x, axis)
    return e / (1.0 + rest)


@_softmax.defjvp
def _softmax_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The sum's tangent holds the maximum's own, which its quotient would take away again.
    y = _softmax(axis, *primals)
    return y, softmax_bwd(*tangents, y, axis=axis)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_softmax(axis: int, x: Array) -> tuple[Array, Array, Array]:
    d, _, m, rest = _exponentials(x, axis)
    return d - jnp.log1p(rest), m.squeeze(axis), rest.squeeze(axis)


@_log_softmax.defjvp
def _log_softmax_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    ((x,), (dx,)) = primals, tangents
    y, m, rest = _log_softmax(axis, x)
    p, _, _ = _distribution(axis, x, m, rest)
    dy = log_softmax_bwd_transpose(dx, x, m, rest, axis=axis)
    return (y, m, rest), (dy, jnp.zeros_like(m), (1.0 + rest) * (p * dx).sum(axis))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _distribution(axis: int, x: Array, m: Array, rest: Array) -> tuple[Array, Array, Array]:
    """(p, 1 - p, whether a class holds more than half) of rows of which m and rest are the numbers."""
    d, e = _shifted(x, jnp.expand_dims(m, axis))
    rest = jnp.expand_dims(rest, axis)
    total = 1.0 + rest
    return e / total, jnp.where(d == 0, rest, total - e) / total, (d == 0) & (rest < 1)


@_distribution.defjvp
def _distribution_jvp(axis: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
    p, q, confident = _distribution(axis, *primals)
    dp = softmax_bwd(tangents[0], p, axis=axis)  # m and rest are those of x: so are their tangents
    return (p, q, confident), (dp, -dp, np.zeros(confident.shape, jax.dtypes.float0))


def _pivot(g: Array, p: Array, confident: Array, axis: int) -> Array:
    """A number that a row's g may lose before sums round: that of the class with more than half, else their mean.

    Rows of one sum weigh it out again, so that p is held constant. (A class with less than half would not do: of g
    one-hot there the mean is all that the others have.)
    """
    mean = (lax.stop_gradient(p) * g).sum(axis, keepdims=True)
    own = jnp.where(confident, g, 0.0).sum(axis, keepdims=True)
    return jnp.where(confident.any(axis, keepdims=True), own, mean)


def _centred(mass: Array, p: Array, q: Array, confident: Array, axis: int) -> Array:
    """S p - mass for S = sum(mass), in the form that does not cancel: S - mass at a confident maximum by the others."""
    others = jnp.where(confident, 0.0, mass).sum(axis, keepdims=True)
    s = others + jnp.where(confident, mass, 0.0).sum(axis, keepdims=True)
    return jnp.where(confident, others - s * q, s * p - mass)


def _entropy(d: Array, e: Array, rest: Array, axis: int) -> Array:
    """log(total) - sum p (z - m), keeping `axis`: both terms are >= 0."""
    weighted = (e * jnp.maximum(d, _LOWEST)).sum(axis, keepdims=True)
    return jnp.log1p(rest) - weighted / (1.0 + rest)


def _dot(mass: Array, minus_log_p: Array, axis: int) -> Array:
    """sum_j mass_j (-log p_j), where a mass of 0 on a -log p of +inf counts 0."""
    free = (mass == 0) & (minus_log_p == jnp.inf)
    return (mass * jnp.where(free, 0.0, minus_log_p)).sum(axis)


def _pick(logits: Array, target: Array, m: Array, axis: int, scale: float, softcap: float | None) -> Array:
    """z - m at the target, NaN where the target names no class (keeping `axis`)."""
    t = jnp.expand_dims(target, axis)
    classes = logits.shape[axis]
    if classes == 0:
        return jnp.full_like(m, jnp.nan)
    # From the logits, not from z - m: that would have to be written out to be indexed.
    picked = jnp.take_along_axis(logits, t.clip(0, classes - 1), axis, mode="clip")
    d, _ = _shifted(capped(picked, scale, softcap), m)
    return jnp.where((t < 0) | (t >= classes), jnp.nan, d)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def alive(axis: int, z: Array, dead: Array, *others: Array | None) -> Array:
    """z. Where it or `others` are differentiated, 0 in dead rows: of -inf or NaN there comes NaN, even times 0.

    Values of dead rows are left out at the end: here all logits would become as many as the targets (a row of them for
    many targets, under vmap).
    """
    return z


@alive.defjvp
def _alive_jvp(axis: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    z, dead, *_ = primals
    gone, zero = dead if z.ndim == dead.ndim else jnp.expand_dims(dead, axis), jnp.zeros((), z.dtype)
    return jnp.where(gone, zero, z), jnp.where(gone, zero, tangents[0])


def _kept(logits: Array, target: Array, axis: int) -> Array:
    """The logits with ignored rows at 0: not even through 0 * NaN do they reach a derivative."""
    if is_soft(target):
        return logits
    return jnp.where(jnp.expand_dims(target == IGNORED, axis), jnp.zeros((), logits.dtype), logits)


def _alive_rows(axis: int, target: Array, *arrays: Array | None) -> tuple[Any, Any, Any]:
    """The first three arrays, of logits or rows, `alive` but for ignored rows whichever of all is differentiated."""
    if is_soft(target):
        return arrays[:3]  # pyright: ignore[reportReturnType]
    ignored = target == IGNORED
    return tuple(alive(axis, a, ignored, *arrays) for a in arrays[:3])  # pyright: ignore[reportReturnType]


def _up(upstream: Array, target: Array, axis: int | None) -> Array:
    """A row's upstream gradient, 0 for an ignored row and NaN for an invalid one (with `axis`, if one is given)."""
    if not is_soft(target):
        upstream = jnp.where(target == IGNORED, 0.0, upstream)
        upstream = upstream * jnp.where(target <= INVALID, jnp.nan, 1.0)
    return upstream if axis is None else jnp.expand_dims(upstream, axis)
