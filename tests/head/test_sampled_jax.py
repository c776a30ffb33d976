"""grad_samples in JAX: exact loss; a gradient without bias and of bounded variance, by its points' distribution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ops
from jax_ops._head import sampled
from jax_ops._parallel import points as sharded
from jax_ops._rows import native
from jax_ops._rows import points as rows
from softmax_ext import reference

OPS: Any = jax_ops
KEY = jax.random.key(3)
K = 2


@pytest.fixture(params=["native", "plain"])
def served(request, monkeypatch, programs_for):
    """Both ways to serve points and products."""
    if request.param == "native":
        assert not native.missing, native.missing
    else:
        monkeypatch.setattr(native, "missing", "taken away")
    programs_for(request.param)
    return request.param


def head(n: int = 3, D: int = 4, V: int = 7, dtype: Any = "float32") -> Any:
    rng = np.random.default_rng(3)
    x, w, b = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((n, D), (V, D), (V,)))
    return x, w, b, jnp.asarray(rng.integers(0, V, n))


CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none", "z_loss": 0.1, "logit_scale": 0.7},
    "cap": {"softcap": 3.0, "reduction": "sum", "stats": ("entropy", "lse")},
    "smooth": {"label_smoothing": 0.2, "stats": ("entropy",)},
    "weighted": {"weight": np.linspace(0.2, 1.0, 7, dtype="f"), "token_weight": np.array([1, 0.2, 0.5], "f"),
                 "label_smoothing": 0.1, "reduction": "sum"},
}  # fmt: skip
UPS = {"entropy": jnp.array([0.5, -1.0, 2.0]), "lse": jnp.array([0.5, -1.0, 2.0])}
PAIR = (np.array([[1, 4, 1], [0, 0, -100], [6, 2, 3]]), np.array([[0.3, 0.5, 0.4], [1, 0.2, 9], [0.1, 0.2, 0.3]]))


def judge_unbiased(case: str, target: Any, monkeypatch: Any, steps: int = 1000) -> None:
    """The mean of the gradient over every u, one for all points: it is a sum of functions of one u each."""
    (x, w, b, _), options = head(), CASES[case]

    def total(*leaves: Any, **more: Any) -> Any:
        out = OPS.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], **options, **more)
        loss, stats = out if isinstance(out, tuple) else (out, {})
        up = jnp.array([0.6, -1.0, 0.3]) if loss.ndim else 1.0  # each row its own
        return (up * loss).sum() + sum((UPS[name] * v).sum() for name, v in stats.items())

    grid = (jnp.arange(steps) + 0.5) / steps
    drawn = jax.random.uniform
    try:
        every = []

        def at(u: Any) -> Any:
            jax.random.uniform = lambda key, shape, dtype: every.append(shape) or jnp.full(shape, u, dtype)
            return jax.grad(lambda *a: total(*a, grad_samples=K, key=KEY), (0, 1, 2))(x, w, b)

        found = jax.jit(jax.vmap(at))(grid)
    finally:
        jax.random.uniform = drawn
    assert every == [(3, K)]  # one for every row and point
    for a, t in zip(found, jax.grad(total, (0, 1, 2))(x, w, b), strict=True):
        np.testing.assert_allclose(a.mean(0), t, rtol=0, atol=8.0 / steps)  # an edge lies within a step


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pair", [False, True])
def test_unbiased(case, pair, monkeypatch):
    judge_unbiased(case, PAIR if pair else head()[3], monkeypatch)


def test_unbiased_by_plain_points(served, monkeypatch):
    judge_unbiased("none", PAIR, monkeypatch)


POINTS = rows.points


def wrong(by: Any) -> Any:
    """points with its results changed."""
    return lambda *args, **options: by(*POINTS(*args, **options))


SABOTEURS: dict[str, Any] = {
    "target not left out": lambda z, m, rest, t, u, **kw: POINTS(z, m, rest, jnp.full_like(t, -3), u, **kw),
    "weight 1/(K+1)": wrong(lambda ids, q: (ids, q * 2 / 3)),
    "last stratum dropped": wrong(lambda ids, q: (ids.at[:, -1].set(-1), q)),
    "classes out of order": lambda z, *args, **kw: POINTS(jnp.roll(z, 1, 1), *args, **kw),
    "points of a neighbouring row": wrong(lambda ids, q: (jnp.roll(ids, 1, 0), q)),
}


@pytest.mark.parametrize("name", SABOTEURS)
def test_wrong_points_are_seen(name, monkeypatch):
    monkeypatch.setattr(sharded, "points", SABOTEURS[name])
    sampled._sampled.cache_clear()
    jax.clear_caches()
    with pytest.raises(AssertionError):
        judge_unbiased("none", head()[3], monkeypatch)
    monkeypatch.undo()
    sampled._sampled.cache_clear()
    jax.clear_caches()


def test_points_are_those_of_the_definition(served):
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((6, 40)).astype(np.float32) * 3, rng.integers(0, 40, (6, 2))
    z[1, 5:] = -np.inf
    z[2, 3] = 200.0  # holds everything
    t[2], t[3], t[4] = 3, -1, [7, -1]
    u = rng.uniform(size=(6, 50)).astype(np.float32)
    u[:, :3] = [0.0, 1 - 2**-24, 0.5]
    m = z.max(1)
    rest = np.exp(z - m[:, None]).sum(1) - 1
    ids, q = POINTS(*map(jnp.asarray, (z, m, rest, t, u)), scale=1.0, softcap=None)
    truth, mass = reference.points(z, t, u)
    truth[3] = -1  # an ignored row
    same = np.delete(np.array(ids) == truth, 2, 0)  # what is left of row 2 is below the smallest number
    assert same.mean() > 0.99  # a threshold may lie on an edge, to rounding
    assert set(np.array(ids)[1]) <= set(range(5))
    np.testing.assert_allclose(np.delete(np.array(q), 3), np.delete(mass, 3), rtol=1e-5, atol=1e-30)
    assert q[3] == 0


def test_variance_is_bounded_in_every_direction():
    rounds, z = 4000, np.random.default_rng(0).standard_normal((1, 40)).astype(np.float32)
    p = np.float64(jax.nn.softmax(z[0]))
    many = jnp.asarray(np.repeat(z, rounds, 0))
    m = many.max(1)
    rest, t = jnp.exp(many - m[:, None]).sum(1) - 1, jnp.full((rounds, 1), 5)
    for k in (1, 4, 16):
        u = jax.random.uniform(jax.random.key(k), (rounds, k), jnp.float32)
        # a direction that turns with the class is what coupled points see worst
        f = np.stack([np.random.default_rng(1).standard_normal(40), np.cos(np.cumsum(p) * 2 * np.pi * k)])
        bound = ((f**2 * p).sum(1) - (f * p).sum(1) ** 2) / k

        def spread(u: Any, f: Any = f) -> Any:
            ids, q = POINTS(many, m, rest, t, u, scale=1.0, softcap=None)
            return (np.array(q)[:, None] * f[:, np.array(ids)].mean(-1).T).var(0)

        assert (spread(u) <= 1.1 * bound).all()
    assert (spread(jnp.repeat(u[:, :1], k, 1)) > 1.1 * bound).any()  # one u a row


def test_loss_and_statistics_are_exact():
    x, w, b, t = head(n=9)
    t, names = t.at[4].set(-100), ("lse", "logprob", "entropy", "argmax")
    for options in ({"z_loss": 0.1, "logit_scale": 0.7, "label_smoothing": 0.1}, {"softcap": 3.0}):
        how = {"linear_bias": b, "reduction": "none", "stats": names, **options}
        exact = OPS.linear_cross_entropy(x, w, t, **how)
        found = OPS.linear_cross_entropy(x, w, t, **how, grad_samples=4, key=KEY)
        assert (exact[0] == found[0]).all()
        assert all((exact[1][name] == found[1][name]).all() for name in names)


def test_a_confident_row_keeps_its_gradient():
    x, w = jnp.ones((1, 1)), jnp.zeros((1000, 1)).at[7].set(60.0)
    dw = jax.grad(lambda w: OPS.linear_cross_entropy(x, w, jnp.array([7]), grad_samples=8, key=KEY))(w)
    q = 999 * np.exp(-60.0)
    np.testing.assert_allclose(dw[7], -q, rtol=1e-5)
    np.testing.assert_allclose(np.float64(dw).sum(), 0.0, atol=1e-5 * q)
    assert (dw != 0).sum() == 9


def test_any_chunk_and_transform_has_the_same_points():
    x, w, b, t = head(12, 8, 60)
    f = lambda w, key=KEY, **o: OPS.linear_cross_entropy(x, w, t, linear_bias=b, grad_samples=8, key=key, **o)  # noqa: E731
    first = jax.grad(f)(w)
    for other in (jax.grad(lambda w: f(w, chunk_size=5)), jax.jit(jax.grad(f)), jax.grad(jax.checkpoint(f))):
        found = other(w)
        assert ((found != 0) == (first != 0)).all()
        np.testing.assert_allclose(found, first, rtol=1e-5, atol=1e-7)
    assert not ((jax.grad(lambda w: f(w, jax.random.key(4)))(w) != 0) == (first != 0)).all()
    keys = jax.random.split(KEY, 3)
    each = [jax.grad(f)(w, key) for key in keys]
    many = jax.vmap(jax.grad(f), (None, 0))(w, keys)
    looped = jax.grad(lambda w: jax.lax.scan(lambda c, key: (c + f(w, key), None), 0.0, keys)[0])(w)
    summed = jax.grad(lambda w: jax.vmap(f, (None, 0))(w, keys).sum())(w)
    for found, truth in ((many, jnp.stack(each)), (looped, sum(each)), (summed, sum(each))):
        np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    ("served", "name"),
    [("native", "custom_vjp3"), ("native", "remat3"), ("native", "scan3"), ("plain", "scan3")],
    indirect=["served"],
)
def test_what_jax_will_do_one_day_changes_nothing(name, served):
    if not hasattr(jax.config, f"jax_{name}"):
        pytest.skip(f"JAX {jax.__version__} has no jax_{name}")
    x, w, _, _ = head(6, 8, 60)
    keys, pair = jax.random.split(KEY, 2), (np.array([[1, 4, 1]] * 6), jnp.full((6, 3), 0.3))
    f = lambda w, key: OPS.linear_cross_entropy(x, w, pair, grad_samples=8, key=key, chunk_size=3)  # noqa: E731
    uses = (
        lambda w: jax.jit(jax.vmap(jax.grad(f), (None, 0)))(w, keys),
        lambda w: jax.jit(jax.grad(lambda w: jax.vmap(f, (None, 0))(w, keys).sum()))(w),
        lambda w: jax.jit(lambda w: jax.jvp(lambda w: f(w, KEY), (w,), (jnp.cos(w),))[1])(w),
    )
    due, before = [use(w) for use in uses], getattr(jax.config, f"jax_{name}")
    try:
        jax.config.update(f"jax_{name}", True)
        found = [use(w) for use in uses]
    finally:
        jax.config.update(f"jax_{name}", before)
    for a, c in zip(found, due, strict=True):
        assert np.abs(c).max() > 1e-3
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-6)


def test_forward_mode_is_exact_and_second_derivatives_refused():
    x, w, _, t = head()
    f = lambda x, w: OPS.linear_cross_entropy(x, w, t, grad_samples=4, key=KEY)  # noqa: E731
    exact = lambda x, w: OPS.linear_cross_entropy(x, w, t)  # noqa: E731
    for a, b in zip(jax.jvp(f, (x, w), (x, w)), jax.jvp(exact, (x, w), (x, w)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for second in (jax.hessian(f), jax.grad(lambda x, w: jax.grad(f)(x, w).sum())):
        with pytest.raises(NotImplementedError, match=r"^linear_cross_entropy: grad_samples must "):
            second(x, w)


def test_ignored_and_invalid_rows_and_weights():
    x, w, b, t = head(5)
    t, x = t.at[1].set(-100), x.at[1].set(jnp.nan)
    tw, cw = jnp.linspace(0.5, 1.5, 5), jnp.linspace(0.5, 2.0, 7)

    def loss(x: Any, w: Any, b: Any, tw: Any, cw: Any, **more: Any) -> Any:
        return OPS.linear_cross_entropy(x, w, t, linear_bias=b, weight=cw, token_weight=tw, **more)

    exact = jax.grad(loss, range(5))(x, w, b, tw, cw)
    ours = jax.grad(lambda *a: loss(*a, grad_samples=3, key=KEY), range(5))(x, w, b, tw, cw)
    assert (ours[0][1] == 0).all()
    assert all(jnp.isfinite(g).all() for g in ours)
    for a, c in zip(ours[3:], exact[3:], strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[2].sum(), exact[2].sum(), atol=1e-6)  # a row's gradient sums to 0
    t = t.at[0].set(9)
    dx, dw = jax.grad(lambda x, w: loss(x, w, b, tw, cw, grad_samples=3, key=KEY), (0, 1))(x, w)
    assert jnp.isnan(dx).any(1).tolist() == [True, False, False, False, False]
    assert jnp.isnan(dw).all()


def test_half_precision_shift_and_positions():
    x, w, _, t = head(8, 16, 50, "bfloat16")
    dx, dw = jax.grad(lambda x, w: OPS.linear_cross_entropy(x, w, t, grad_samples=4, key=KEY), (0, 1))(x, w)
    assert dx.dtype == dw.dtype == jnp.bfloat16
    assert 0 < (dw != 0).any(1).sum() <= 8 * 5
    x, w, _, t = head(6)
    seq = jax.grad(lambda w: OPS.linear_cross_entropy(x[None], w, t[None], shift=1, grad_samples=4, key=KEY))(w)
    assert jnp.isfinite(seq).all()
    two = jnp.stack([w, 2 * w], 1)
    kd = jax.grad(lambda w: OPS.linear_cross_entropy(x, w, jnp.stack([t, t], 1), grad_samples=4, key=KEY))(two)
    assert kd.shape == two.shape
    assert (kd != 0).any((0, 2)).all()


def test_one_matmul_and_its_memory():
    N, D, V = 64, 32, 5000
    x, w, _, t = head(N, D, V)
    f = jax.grad(lambda x, w, **o: OPS.linear_cross_entropy(x, w, t, **o), (0, 1))
    count: Any = lambda **o: jax.jit(lambda x, w: f(x, w, **o)).lower(x, w).compile().cost_analysis()  # noqa: E731
    assert count(grad_samples=4, key=KEY)["flops"] < 1.5 * 2 * N * D * V
    assert count()["flops"] > 2.5 * 2 * N * D * V


MISTAKES: dict[str, dict[str, Any]] = {
    "grad_samples must be a Python integer >= 1 or None; got 0.": {"grad_samples": 0, "key": KEY},
    "grad_samples must be a Python integer >= 1 or None; got 1.5.": {"grad_samples": 1.5, "key": KEY},
    "grad_samples must be None with memory='lean'; got 4.": {"grad_samples": 4, "memory": "lean", "key": KEY},
    "key must be a jax.random key with grad_samples; got None.": {"grad_samples": 4},
    "key must be None without grad_samples; got a key.": {"key": KEY},
    "grad_samples must be None with label_smoothing and softcap together; got a number.": {
        "grad_samples": 4, "key": KEY, "softcap": 2.0, "label_smoothing": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes(sentence):
    x, w, _, t = head()
    with pytest.raises((TypeError, ValueError)) as error:
        OPS.linear_cross_entropy(x, w, t, **MISTAKES[sentence])
    assert str(error.value) == "linear_cross_entropy: " + sentence
    with pytest.raises(ValueError, match="grad_samples must be None with class probabilities as targets; got 4"):
        OPS.linear_cross_entropy(x, w, jnp.ones((3, 7)), grad_samples=4, key=KEY)
    with pytest.raises(ValueError, match="grad_samples must be None with label_smoothing and a weight"):
        jax.grad(lambda cw: OPS.linear_cross_entropy(x, w, t, weight=cw, label_smoothing=0.1, grad_samples=4, key=KEY))(
            jnp.ones(7)
        )
