"""JAX's plain rows lose no digits by cancellation: against sums of pairs, which have no common terms."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from jax_ops._rows import plain  # noqa: E402


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_confident_row_keeps_its_gradient(offset: float) -> None:
    """In float64 programs of float32's forms: against differences of pairs, which have no common terms."""
    x = np.array([[25.0, 0.0, 1.0], [60.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.3, 0.1, -0.2]])
    dy = np.array([[1.0, 0.5, -2.0]] * 4) + offset
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    pairs = dy[:, :, None] - dy[:, None, :]
    truth = p * (p[:, None, :] * pairs).sum(-1)
    size = p * (p[:, None, :] * np.abs(pairs)).sum(-1)
    y = plain.softmax_fwd(x.astype("f"), axis=1)
    ours = plain.softmax_bwd(dy.astype("f"), y, axis=1)
    assert (np.abs(ours - truth) <= 40 * 2.0**-24 * size).all()
    pushed = jax.jvp(lambda x: plain.softmax_fwd(x, axis=1), (x.astype("f"),), (dy.astype("f"),))[1]
    assert (np.abs(pushed - truth) <= 40 * 2.0**-24 * size).all()
    y, m, rest = plain.log_softmax_fwd(x.astype("f"), axis=1)
    back = plain.log_softmax_bwd(dy.astype("f"), x.astype("f"), m, rest, axis=1)
    others = dy.sum(1, keepdims=True) - dy
    q = 1 - p
    q[:2, 0] = [np.exp(-25.0) + np.exp(-24.0), 2 * np.exp(-60.0)]
    want = dy * q - p * others
    assert (np.abs(back - want) <= 20 * 2.0**-24 * (np.abs(dy) * q + p * np.abs(others))).all()
    along = plain.log_softmax_bwd_transpose(dy.astype("f"), x.astype("f"), m, rest, axis=1)
    want, size = ((p[:, None, :] * a).sum(-1) for a in (pairs, np.abs(pairs)))
    assert (np.abs(along - want) <= 40 * 2.0**-24 * size).all()
    # What it was: dy_i - sum(y dy), in the same type, loses all of the maximum's digits.
    a, g = np.asarray(plain.softmax_fwd(x.astype("f"), axis=1)), dy.astype("f")
    before = a * (g - (a * g).sum(1, keepdims=True))
    assert not (np.abs(before - truth) <= 40 * 2.0**-24 * p * np.abs(pairs).max()).all() or offset == 0.0


def test_half_precision_rows_of_equals() -> None:
    x, dy = jnp.zeros((1, 3), jnp.bfloat16), jnp.array([[100.0, 101.0, 102.0]], jnp.bfloat16)
    dx = plain.softmax_bwd(dy, plain.softmax_fwd(x, axis=1), axis=1)
    np.testing.assert_allclose(np.asarray(dx, float), [[-1 / 3, 0, 1 / 3]], rtol=2.0**-8, atol=1e-6)
