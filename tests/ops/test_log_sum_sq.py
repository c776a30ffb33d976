"""log sum p^2 where digits go: rows of nearly equal logits, logits beyond half the type's range, ties under a cap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest

from softmax_ext import reference
from tests.judging.cases import rounded
from tests.judging.checks import close
from tests.judging.frameworks import each

Array = Any
WIDE = np.longdouble
SPREADS = (1.0, 1e-2, 1e-4, 1e-6)


def rows(dtype: str, spread: float) -> Array:
    r = np.random.default_rng(5)
    x = rounded(spread * r.standard_normal((3, 257)), dtype)
    x[1] = rounded(x[1] + 1.0, dtype)  # their offset is in every digit of them, and in none of the differences
    x[2, 7] = x[2, 100] = x[2].max()
    return x


def truth(z: Array) -> tuple[Array, Array]:
    """dL/dz of each row, and what its digits are counted in: 2 p_j (|v_j| + sum_k p_k |v_k|), v = p / sum p^2 - 1."""
    z = z.astype(WIDE)
    d = z - z.max(-1, keepdims=True)
    e, f = np.exp(d), np.expm1(d)
    s, s2 = e.sum(-1, keepdims=True), (e * e).sum(-1, keepdims=True)
    g = 2 * e * (f * s - (e * f).sum(-1, keepdims=True)) / (s * s2)
    away = np.abs(g) * s / (2 * e)
    size = 2 * e / s * (away + (e * away).sum(-1, keepdims=True) / s)
    return g.astype(np.float64), size.astype(np.float64)


def answer(fw: Any, dtype: str, x: Array, **options: Any) -> tuple[Array, Array]:
    """(values, gradients) for upstreams of 1."""
    arrays = {"input": x, "target": np.zeros(len(x), int)}
    how: Any = {"reduction": "none", "stats": ("log_sum_sq",), **options}
    values, grads = fw("cross_entropy", dtype, arrays, {"log_sum_sq": np.ones(len(x))}, **how)
    return values["log_sum_sq"], grads["input"]


@each(("dtype", "spread"), torch=[(d, s) for d in ("float32", "float64") for s in SPREADS], jax=[("float32", 1e-4)])
def test_digits_where_logits_nearly_agree(fw, dtype, spread):
    x = rows(dtype, spread)
    right, size = truth(x)
    _, found = answer(fw, dtype, x)
    close(found, right, size, dtype=dtype, c=8.0, what="log_sum_sq gradient")
    assert np.abs(right).max() > 1e-3 * spread


def two_rows_rounded_apart(z: Array) -> Array:
    """2 (r - p), each by itself in float32."""
    e, e2 = (np.exp(k * (z - z.max(-1, keepdims=True)), dtype=np.float32) for k in (1, 2))
    return 2 * (e2 / e2.sum(-1, keepdims=True) - e / e.sum(-1, keepdims=True))


def about_the_maximum(z: Array) -> Array:
    """The right formula about m and not c: most of F is what all have in common."""
    z = z.astype(np.float32)
    d = z - z.max(-1, keepdims=True)
    e, f = np.exp(d), np.expm1(d)
    s, s2, over = (np.cumsum(x, -1, dtype=np.float32)[..., -1:] for x in (e, e * e, e * f))
    return 2 * e * (f * s - over) / (s * s2)


def one_above_many() -> Array:
    """One class at 0, all others at the same lower number: their gradient is what one class does to them."""
    return np.where(np.arange(20000) == 3, 0.0, np.float32(-0.7)).astype(np.float32)[None]


@pytest.mark.parametrize(
    ("wrong", "at"), [(two_rows_rounded_apart, lambda: rows("float32", 1e-4)), (about_the_maximum, one_above_many)]
)
def test_forms_that_lose_digits_are_seen(wrong: Callable[[Array], Array], at: Callable[[], Array]) -> None:
    x = at()
    right, size = truth(x)
    close(right.astype(np.float32), right, size, dtype="float32", c=8.0, what="the truth, rounded")
    with pytest.raises(AssertionError):
        close(wrong(x.astype(np.float32)), right, size, dtype="float32", c=8.0, what="log_sum_sq gradient")


@each(("dtype",), torch=[("float32",), ("float64",)], jax=[("float32",)])
def test_one_above_many(fw, dtype):
    x = one_above_many().astype(np.float64)
    right, size = truth(x)
    c = 8.0 if fw.name == "torch" else 8.0 * (1 + x.shape[1] / 256)  # XLA sums a row in order
    close(answer(fw, dtype, x)[1], right, size, dtype=dtype, c=c, what="log_sum_sq gradient")
    with pytest.raises(AssertionError):
        close(about_the_maximum(x), right, size, dtype="float32", c=8.0 * (1 + x.shape[1] / 256))


@each(("dtype",), torch=[("float32",), ("float64",)], jax=[("float32",)])
def test_logits_beyond_half_the_range(fw, dtype):
    top = float(np.finfo(dtype).max)
    x = np.array([[top, 1.0, -top], [0.75 * top, 0.75 * top, 0.0], [-top, -top, -top], [-0.9 * top, 0.0, 0.0]])
    value, gradient = answer(fw, dtype, x)
    np.testing.assert_allclose(value, [0.0, -np.log(2.0), -np.log(3.0), -np.log(2.0)], rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.zeros_like(x))


@each(("cap",), torch=[(None,), (3.0,)], jax=[(3.0,)])
def test_tied_maxima(fw, cap):
    """Equal, and equal only where a cap has flattened them: all of them have the maximum's digits."""
    x = np.array([[2.0, 2.0, 2.0, -1.0, 0.5], [60.0, 80.0, 1.0, -60.0, 0.5]])
    x = x[:1] if cap is None else x
    z = x if cap is None else cap * np.tanh(x.astype(WIDE) / cap)
    slope = 1.0 if cap is None else 1.0 / np.cosh(np.minimum(np.abs(x.astype(WIDE) / cap), 5000)) ** 2
    g, size = truth(z)
    options = {} if cap is None else {"softcap": cap}
    _, found = answer(fw, "float64", x, **options)
    close(found, g * slope, 4 * size * slope + 4 * np.abs(g * slope), dtype="float64", c=8.0, what="tied")
    assert (found[:, :2] != 0).all()


def in_fifty_digits(x: Array, up: Array) -> tuple[Array, Array]:
    """(the gradient, the Hessian along `up`) of one row."""
    mp = mpmath.mp.clone()
    mp.dps = 50
    e = [mp.exp(mp.mpf(float(v))) for v in x]
    p = [v / sum(e) for v in e]
    r = [v * v / sum(u * u for u in p) for v in p]
    v = [mp.mpf(float(u)) for u in up]

    def turned(y: Any) -> Any:
        mean = sum(a * b for a, b in zip(y, v, strict=True))
        return [a * (b - mean) for a, b in zip(y, v, strict=True)]

    hessian = [4 * a - 2 * b for a, b in zip(turned(r), turned(p), strict=True)]
    return np.array([float(2 * (a - b)) for a, b in zip(r, p, strict=True)]), np.array([float(h) for h in hessian])


ROWS = {
    "apart": np.array([0.3, -1.2, 2.0, 0.1, -0.4]),
    "nearly equal": 1.0 + 1e-7 * np.array([1.0, -2.0, 3.0, 0.5, 0.0]),
    "confident": np.array([0.0, -20.0, 18.0, 1.0, -3.0]),
    "tied": np.array([2.0, 2.0, -1.0, 0.0, 2.0]),
}
ALONG = np.array([0.3, -0.8, 0.5, 1.1, -0.6])


@pytest.mark.parametrize("row", ROWS)
def test_second_derivatives_in_torch(row: str) -> None:
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torch_ops._rules.log_sum_sq")
    x, v = torch.tensor(ROWS[row][None], requires_grad=True), torch.tensor(ALONG[None])
    g, h = in_fifty_digits(ROWS[row], ALONG)
    (found,) = torch.autograd.grad(ops.log_sum_sq(x, 1), x, create_graph=True)
    (second,) = torch.autograd.grad(found, x, v, create_graph=True)
    size = np.abs(ALONG).max() * (np.abs(g) + np.abs(h))
    np.testing.assert_allclose(found.detach()[0], g, rtol=1e-12 if row != "nearly equal" else 1e-8)
    assert (
        np.abs(second.detach()[0].numpy() - h) <= 1e-13 * size + 1e-14 * np.abs(h).max() * (row != "confident")
    ).all()
    assert torch.autograd.gradcheck(lambda x: ops.log_sum_sq(x, 1), x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.log_sum_sq(x, 1), x, check_fwd_over_rev=True)
    third = torch.autograd.grad(second, x, v)[0].numpy()
    step = 1e-4
    ahead, back = (in_fifty_digits(ROWS[row] + s * ALONG, ALONG)[1] for s in (step, -step))
    np.testing.assert_allclose(third[0], (ahead - back) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", ["nearly equal", "confident"])
@pytest.mark.long
def test_second_derivatives_in_jax(row: str) -> None:
    jax, ops = pytest.importorskip("jax"), pytest.importorskip("jax_ops._rules.log_sum_sq")
    with jax.enable_x64(True):
        x, v = jax.numpy.asarray(ROWS[row]), jax.numpy.asarray(ALONG)
        g, h = in_fifty_digits(ROWS[row], ALONG)
        gradient = jax.grad(lambda x: ops.log_sum_sq(x, 0))
        np.testing.assert_allclose(gradient(x), g, rtol=1e-12 if row != "nearly equal" else 1e-8)
        pulled = jax.vjp(gradient, x)[1](v)[0]
        for second in (jax.jvp(gradient, (x,), (v,))[1], pulled):
            size = np.abs(ALONG).max() * (np.abs(g) + np.abs(h))
            assert (np.abs(second - h) <= 1e-13 * size + 1e-14 * np.abs(h).max() * (row != "confident")).all()
        check_grads = pytest.importorskip("jax.test_util").check_grads
        check_grads(lambda x: ops.log_sum_sq(x, 0), (x,), order=3, modes=("fwd", "rev"), atol=1e-4)


def test_many_pieces_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torch_ops._rules.log_sum_sq")
    x = torch.tensor(rows("float64", 1.0), requires_grad=True)
    up = torch.tensor([1.0, -2.0, 3.0])

    def both() -> Any:
        value = ops.log_sum_sq(x, 1)
        return value.detach(), torch.autograd.grad(value, x, up.double())[0]

    whole = both()
    monkeypatch.setattr(ops, "_PIECE", 300)
    for a, b in zip(both(), whole, strict=True):
        assert torch.equal(a, b)


def test_the_reference_agrees() -> None:
    x = rows("float64", 1.0)
    g = reference.cross_entropy_grad(
        x, np.zeros(3, int), dloss=0.0, dstats={"log_sum_sq": np.ones(3)}, stats=("log_sum_sq",), reduction="none"
    )
    np.testing.assert_allclose(truth(x)[0], g, rtol=1e-9, atol=1e-15)


# A scale, where all logits of a row have a large number in common: what it rounds is the difference to the largest

FAR = 1e4


def scaled_rows(dtype: str) -> tuple[Array, Array]:
    """(x, s): logits about 1e4 apart by little, and each row's scale."""
    x = rounded(FAR + np.random.default_rng(9).standard_normal((3, 33)), dtype)
    return x, rounded(np.array([0.7, 1.3, 0.11]), dtype)


def scaled_truth(x: Array, s: Array) -> tuple[Array, Array, Array]:
    """(L, dL/dx, what its digits are counted in)."""
    z = s[:, None].astype(WIDE) * (x.astype(WIDE) - x.max(-1, keepdims=True))
    e = np.exp(z)
    value = np.log((e * e).sum(-1)) - 2 * np.log(e.sum(-1))
    g, size = truth(z)
    return value.astype(np.float64), g * s[:, None], size * s[:, None]


@each(("kind",), torch=[("number",), ("rows",)], jax=[("number",), ("rows",)])
def test_a_scale_of_logits_far_from_0(fw, kind):
    x, s = scaled_rows("float32")
    if kind == "number":
        s = np.full_like(s, 0.7)
    value, right, size = scaled_truth(x, rounded(s, "float32"))
    options = {"logit_scale": 0.7} if kind == "number" else {}
    arrays = {"input": x, "target": np.zeros(len(x), int)} | ({"logit_scale": s} if kind == "rows" else {})
    how: Any = {"reduction": "none", "stats": ("log_sum_sq",), **options}
    values, grads = fw("cross_entropy", "float32", arrays, {"log_sum_sq": np.ones(len(x))}, **how)
    np.testing.assert_allclose(values["log_sum_sq"], value, rtol=2e-6)
    close(grads["input"], right, size, dtype="float32", c=16.0, what="log_sum_sq gradient, scaled")


def test_logits_scaled_before_they_are_taken_apart_are_seen() -> None:
    x, s = scaled_rows("float32")
    value, right, size = scaled_truth(x, s)
    z = s[:, None].astype(np.float32) * x.astype(np.float32)
    g, _ = truth(z)
    with pytest.raises(AssertionError):
        close(g * s[:, None], right, size, dtype="float32", c=16.0, what="log_sum_sq gradient, scaled")
    d = (z - z.max(-1, keepdims=True)).astype(np.float64)
    off = np.log(np.exp(2 * d).sum(-1)) - 2 * np.log(np.exp(d).sum(-1)) - value
    assert np.abs(off / value).max() > 2e-5
