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

import jax
import jax.numpy as jnp
from jax import Array, lax

IGNORED = -1  # canonical target of a row that reaches no result
INVALID = -2  # canonical target of a row whose class index names no class

_LOWEST = -1000.0  # exp of this and of everything below is 0, in float64 too

_LAYOUT = ("axis", "scale", "softcap")


@partial(jax.jit, static_argnames="axis")
def softmax_fwd(x: Array, *, axis: int) -> Array:
    """y_i = exp(x_i) / sum_j exp(x_j), in the type of x."""
    _, e, _, rest = _exponentials(compute(x), axis)
    return (e / (1.0 + rest)).astype(x.dtype)


@partial(jax.jit, static_argnames="axis")
def softmax_bwd(dy: Array, y: Array, *, axis: int) -> Array:
    """dx = J dy for J = diag(y) - y yT, from the output alone."""
    # legend:  y softmax output, dy = dL/dy, dx = dL/dx
    # formula: dx_i = sum_j dy_j y_j (delta_ij - y_i) = y_i (dy_i - sum_j y_j dy_j)
    # source:  Kronecker form of Purcell 2021, eq. (5), contracted with dy; docs/derivation.md
    a, g = compute(y), compute(dy)
    return (a * (g - (a * g).sum(axis, keepdims=True))).astype(y.dtype)


@partial(jax.jit, static_argnames="axis")
def log_softmax_fwd(x: Array, *, axis: int) -> tuple[Array, Array, Array]:
    """(log p, m, rest), log p in the type of x."""
    d, _, m, rest = _exponentials(compute(x), axis)
    y = d - jnp.log1p(rest)
    return y.astype(x.dtype), m.squeeze(axis), rest.squeeze(axis)


@partial(jax.jit, static_argnames="axis")
def log_softmax_bwd(dy: Array, x: Array, m: Array, rest: Array, *, axis: int) -> Array:
    """dx = dy - p sum(dy)."""
    # formula: d log p_i / dx_j = delta_ij - p_j (Kurbiel's logarithmic derivative), contracted with dy
    # p comes from the input: from a half-precision log p it would be off by |log p| units of roundoff.
    _, e = _shifted(compute(x), jnp.expand_dims(m, axis))
    g = compute(dy)
    p = e / (1.0 + jnp.expand_dims(rest, axis))
    return (g - p * g.sum(axis, keepdims=True)).astype(x.dtype)


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
    logits = _kept(logits, target, axis)
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
    logits = _kept(logits, target, axis)
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

    dz = jnp.zeros_like(p)
    if d_lse is not None:
        dz = dz + p * _up(d_lse, target, axis)
    if d_smooth is not None:
        ones = jnp.ones_like(d) if w is None else jnp.broadcast_to(w, d.shape)
        dz = dz + _up(d_smooth, target, axis) * _centred(ones, p, q, confident, axis)
    if d_entropy is not None:
        log_p = jnp.maximum(d, _LOWEST) - jnp.log1p(rest)
        dz = dz - _up(d_entropy, target, axis) * p * (log_p + _entropy(d, e, rest, axis))
    if d_nll is not None:
        if is_soft(target):
            mass = target.astype(d.dtype) if w is None else target.astype(d.dtype) * w
            dp = _centred(mass, p, q, confident, axis)
        else:
            classes = lax.broadcasted_iota(target.dtype, d.shape, axis)
            dp = jnp.where(classes == jnp.expand_dims(target, axis), -q, p)
        dz = dz + _up(d_nll, target, axis) * dp
    if weight is not None and not is_soft(target):  # a class weight may be NaN, which 0 does not silence
        dz = jnp.where(jnp.expand_dims(target == IGNORED, axis), 0.0, dz)
    return (dz * slope(logits, scale, softcap)).astype(logits.dtype)


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


def _centred(mass: Array, p: Array, q: Array, confident: Array, axis: int) -> Array:
    """S p - mass for S = sum(mass), in the form that does not cancel."""
    s = mass.sum(axis, keepdims=True)
    return jnp.where(confident, (s - mass) - s * q, s * p - mass)


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


def _kept(logits: Array, target: Array, axis: int) -> Array:
    """The logits with ignored rows at 0: not even through 0 * NaN do they reach a derivative."""
    if is_soft(target):
        return logits
    return jnp.where(jnp.expand_dims(target == IGNORED, axis), jnp.zeros((), logits.dtype), logits)


def _up(upstream: Array, target: Array, axis: int) -> Array:
    """A row's upstream gradient, 0 for an ignored row and NaN for an invalid one (keeping `axis`)."""
    if not is_soft(target):
        upstream = jnp.where(target == IGNORED, 0.0, upstream)
        upstream = upstream * jnp.where(target <= INVALID, jnp.nan, 1.0)
    return jnp.expand_dims(upstream, axis)
