"""Divergences between two rows of logits, or the logits of two linear layers, and their gradients at the first."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from softmax_ext.contract import DivergenceOptions
from softmax_ext.reference.arithmetic import WIDE, Array, back, last, parts, quiet, wide


class _Pair(NamedTuple):
    """A student's and a teacher's rows, class axis last."""

    p: Array  # of the student
    slope: Array  # dz/dx of the student's logits
    term: Array  # q f(p/q): sums to the divergence
    pu: Array  # p f'(p/q), 0 where p is 0
    weight: Array  # of the rows, 0 where not kept
    keep: Array


def _capped(x: Array, scale: float, softcap: float | None) -> tuple[Array, Array]:
    u = scale * x
    if softcap is None:
        return u, np.full_like(u, scale)
    z = np.where(np.isneginf(u), u, softcap * np.tanh(u / softcap))
    return z, scale / np.cosh(u / softcap) ** 2


def _curve(x: Array) -> Array:
    """exp(x) - 1 - x, by its series where it is small."""
    small = np.abs(x) < 0.5
    near = np.where(small, x, 0)
    return np.where(small, sum(near**k / WIDE(math.factorial(k)) for k in range(2, 26)), np.expm1(x) - x)


def _less_log1p(w: Array) -> Array:
    """w - log(1 + w), by its series where it is small."""
    small = np.abs(w) < 0.1
    near = np.where(small, w, 0)
    return np.where(small, sum((-1) ** k * near**k / WIDE(k) for k in range(2, 26)), w - np.log1p(w))


def _rows(s: Array, t: Array, token_weight: ArrayLike | None, keep: ArrayLike | None, o: DivergenceOptions) -> _Pair:
    rows = s.shape[:-1]
    kept = np.ones(rows, bool) if keep is None else np.asarray(keep, bool)
    weight = np.ones(rows, WIDE) if token_weight is None else wide(token_weight)
    s, t = (np.where(kept[..., None], x, 0) for x in (s, t))
    apart = o.logit_scale * (s - t)
    s, slope = _capped(s, o.logit_scale, o.softcap)
    t, _ = _capped(t, o.teacher_scale, o.teacher_softcap)
    if o.softcap is not None or o.teacher_softcap is not None or o.logit_scale != o.teacher_scale:
        apart = s - t
    p, _, _, lse_s = parts(s)
    q, _, _, lse_t = parts(t)
    # d = log p - log q. sum_j p_j - q_j = sum_j q_j expm1(d_j) is 0: what it comes out as is the error of lse - lse.
    d = apart - (lse_s - lse_t)[..., None]
    d = d - np.log1p(np.sum(np.where((q > 0) & (p > 0), q * np.expm1(d), p - q), -1))[..., None]
    far = ~np.isfinite(d)  # one side, or both, has no such class
    b, c = WIDE(o.beta), 1 - WIDE(o.beta)
    less = np.where(far, p - q, q * np.expm1(d))  # p - q
    if o.kind == "forward_kl":
        term, pu = np.where(far, np.where(q > 0, np.inf, p), q * _curve(d)), less
    elif o.kind == "reverse_kl":
        term, pu = np.where(far, np.where(p > 0, np.inf, q), p * _curve(-d)), np.where(p > 0, p * d, 0)
    elif o.kind == "tv":
        term, pu = np.abs(less) / 2, p * np.sign(less) / 2
    else:
        of_q = np.where(q > 0, -b * q * np.log(c * p / np.where(q > 0, q, 1) + b), 0)
        of_p = np.where(p > 0, -c * p * np.log(b * q / np.where(p > 0, p, 1) + c), 0)
        near = b * q * _less_log1p(c * np.expm1(d)) + c * p * _less_log1p(b * np.expm1(-d))
        term = np.where(np.abs(d) < 1, near, of_q + of_p)
        pu = np.where(p > 0, -c * p * np.log1p(b * np.expm1(-d)), 0)
    broken = np.isnan(lse_s + lse_t)[..., None]
    return _Pair(p, slope, np.where(broken, np.nan, term), pu, np.where(kept, weight, 0), kept)


def _value(r: _Pair, o: DivergenceOptions) -> Any:
    each = np.where(r.keep, np.sum(r.term, -1) if r.term.shape[-1] else np.nan, 0)
    each = np.where(r.keep, r.weight * each, 0)
    return each if o.reduction == "none" else np.sum(each) * _share(r, o)


def _share(r: _Pair, o: DivergenceOptions) -> Any:
    return 1 / np.sum(r.weight) if o.reduction == "mean" else 1


def _gradient(r: _Pair, o: DivergenceOptions, dloss: ArrayLike) -> Array:
    # dz_j = p_j (u_j - sum_k p_k u_k): the softmax's Jacobian, contracted with u = f'(p/q)
    mean = np.sum(r.pu, -1, keepdims=True)
    if o.kind == "forward_kl":
        mean = 0 * mean  # sum_j p_j - q_j
    d = np.where(np.isfinite(mean) & ~np.isnan(np.sum(r.term, -1, keepdims=True)), r.pu - r.p * mean, np.nan)
    share = _share(r, o) if np.any(r.keep) else 0
    g = (wide(dloss) * share * r.weight)[..., None] * d * r.slope
    return np.where(r.keep[..., None], g, 0)


@quiet
def divergence(
    input: ArrayLike,
    teacher: ArrayLike,
    *,
    axis: int = -1,
    token_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    **options: Any,
) -> Any:
    """Divergence of the softmax p of a student's logits from the softmax q of a teacher's, in nats.

    forward_kl = sum_j q_j (log q_j - log p_j);  reverse_kl = sum_j p_j (log p_j - log q_j);  tv = sum_j |p_j - q_j| / 2
    jsd = beta KL(q, m) + (1 - beta) KL(p, m),  m = beta q + (1 - beta) p

    Args:
        input: the student's logits; rows of V classes along `axis`.
        teacher: logits of input's shape.
        axis: the class axis.
        token_weight: per row, the row shape.
        keep: booleans of the row shape; other rows reach no result.
        **options: the fields of contract.DivergenceOptions.

    Returns:
        The divergence, a scalar or (reduction "none") row-shaped.

    Source: Csiszar 1963, f-divergences sum_j q_j f(p_j / q_j); the options are ours.
    """
    o = DivergenceOptions(**options)
    return np.asarray(_value(_rows(last(input, axis), last(teacher, axis), token_weight, keep, o), o), np.float64)


@quiet
def divergence_grad(
    input: ArrayLike,
    teacher: ArrayLike,
    *,
    axis: int = -1,
    token_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    dloss: ArrayLike = 1.0,
    **options: Any,
) -> Array:
    """Gradient of divergence at the student's logits.

    dz_j = p_j (u_j - sum_k p_k u_k), u = f'(p / q);  dx = C' scale dz

    Args:
        input: as in divergence, and so what is not named here.
        dloss: dL/dloss, of the result's shape.

    Returns:
        dL/dinput, the shape of input.

    Source: the chain rule through documents 1 and 2's Jacobian of the softmax.
    """
    o = DivergenceOptions(**options)
    r = _rows(last(input, axis), last(teacher, axis), token_weight, keep, o)
    return back(_gradient(r, o, dloss), axis, np.shape(input))


@quiet
def divergence_parts(input: ArrayLike, teacher: ArrayLike, **options: Any) -> tuple[Array, Array]:
    """(q f(p / q), p f'(p / q)) of every class, the class axis last: what divergence and its gradient sum.

    Args:
        input: the student's logits.
        teacher: logits of input's shape.
        **options: the fields of contract.DivergenceOptions.

    Returns:
        Two arrays of input's shape.

    Source: as divergence.
    """
    r = _rows(last(input, -1), last(teacher, -1), None, None, DivergenceOptions(**options))
    return r.term.astype(np.float64), r.pu.astype(np.float64)


class _Heads(NamedTuple):
    """Both heads' rows, flattened."""

    x: Array  # (R, D)
    w: Array  # (V, D)
    pair: _Pair
    shape: tuple[int, ...]  # of the divergences


def _heads(
    student: tuple[ArrayLike, ArrayLike, ArrayLike | None],
    teacher: tuple[ArrayLike, ArrayLike, ArrayLike | None],
    token_weight: ArrayLike | None,
    keep: ArrayLike | None,
    shift: int,
    o: DivergenceOptions,
) -> _Heads:
    logits, given = [], []
    for input, weight, bias in (student, teacher):
        x, w = wide(input), wide(weight)
        if shift:
            x = x[..., : max(x.shape[-2] - shift, 0), :]
        shape, x = x.shape[:-1], x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        logits.append(x @ w.T + (0 if bias is None else wide(bias)))
        given.append((x, w, shape))
    of_rows = (
        None if a is None else np.asarray(a)[..., shift:] if shift else np.asarray(a) for a in (token_weight, keep)
    )
    tokens, kept = (None if a is None else a.reshape(-1) for a in of_rows)
    x, w, shape = given[0]
    return _Heads(x, w, _rows(logits[0], logits[1], tokens, kept, o), shape)


@quiet
def linear_divergence(
    input: ArrayLike,
    linear_weight: ArrayLike,
    teacher_input: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    shift: int = 0,
    **options: Any,
) -> Any:
    """Divergence between the logits of two linear layers, in nats.

    divergence(input linear_weightT + linear_bias, teacher_input teacher_weightT + teacher_bias)

    Args:
        input: (..., D).
        linear_weight: (V, D).
        teacher_input: (..., E).
        teacher_weight: (V, E).
        linear_bias: (V,).
        teacher_bias: (V,).
        token_weight: per row, (...).
        keep: booleans (...).
        shift: k compares positions [..., :-k, :], with token_weight and keep of [..., k:].
        **options: the fields of contract.DivergenceOptions.

    Returns:
        As divergence.

    Source: document 3's z = x w + b, then divergence.
    """
    o = DivergenceOptions(**options)
    h = _heads(
        (input, linear_weight, linear_bias), (teacher_input, teacher_weight, teacher_bias), token_weight, keep, shift, o
    )
    value = np.asarray(_value(h.pair, o), np.float64)
    return value.reshape(h.shape) if o.reduction == "none" else value


@quiet
def linear_divergence_grad(
    input: ArrayLike,
    linear_weight: ArrayLike,
    teacher_input: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    shift: int = 0,
    dloss: ArrayLike = 1.0,
    **options: Any,
) -> tuple[Array, Array, Array]:
    """Gradients of linear_divergence at input, linear_weight and linear_bias.

    dX = G W,  dW = GT X,  db = sum_i G_i,  G = dL/dlogits

    Args:
        input: as in linear_divergence, and so what is not named here.
        dloss: dL/dloss, of the result's shape.

    Returns:
        (dX, dW, db).

    Source: the chain rule in document 3, dE/dw = dE/da da/dz dz/dw.
    """
    o = DivergenceOptions(**options)
    h = _heads(
        (input, linear_weight, linear_bias), (teacher_input, teacher_weight, teacher_bias), token_weight, keep, shift, o
    )
    g = _gradient(h.pair, o, np.reshape(dloss, -1) if np.ndim(dloss) else dloss)
    kept = h.pair.keep
    full: Array = np.zeros(np.shape(input))
    dx = np.zeros_like(h.x)
    dx[kept] = g[kept] @ h.w  # a row that is not kept reaches no result: 0 * NaN would
    at = full[..., : max(full.shape[-2] - shift, 0), :] if shift else full
    at[...] = dx.reshape(at.shape)
    return full, (g[kept].T @ h.x[kept]).astype(np.float64), g.sum(0).astype(np.float64)
