"""A head's scale, statistics and samples where a class is masked by its bias, rows are few, types narrow or none."""

from __future__ import annotations

import numpy as np
import pytest

N, V, D = 8, 7, 4
R = np.random.default_rng(0)
X, W, B = (R.standard_normal(s).astype("f") for s in ((N, D), (V, D), (V,)))
T = np.array([1, 1, 2, 2, 6, 0, 1, 5])
MASKED = np.where(np.arange(V) == 3, -np.inf, B).astype("f")


def test_scale_beside_a_masked_class() -> None:
    """0 * -inf reaches no gradient of the scale: that of the logits' own loss."""
    jax, ops = pytest.importorskip("jax"), pytest.importorskip("jax_ops")
    s = np.full(N, 1.3, "f")
    found = jax.grad(lambda s: ops.linear_cross_entropy(X, W, T, linear_bias=MASKED, logit_scale=s))(s)
    due = jax.grad(lambda s: ops.cross_entropy(X @ W.T + MASKED, T, logit_scale=s))(s)
    np.testing.assert_allclose(found, due, rtol=1e-5, atol=1e-6)


def test_scale_beside_a_masked_class_in_torch() -> None:
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torch_ops")
    x, w, b, t = map(torch.from_numpy, (X, W, MASKED, T))
    s = torch.full((N,), 1.3, requires_grad=True)
    (found,) = torch.autograd.grad(ops.linear_cross_entropy(x, w, t, linear_bias=b, logit_scale=s), s)
    (due,) = torch.autograd.grad(ops.cross_entropy(x @ w.T + b, t, logit_scale=s), s)
    torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-6)
    heads = {"linear_bias": b, "teacher_bias": b}
    (found,) = torch.autograd.grad(ops.linear_divergence(x, w, x / 2, w, **heads, logit_scale=s), s)
    (due,) = torch.autograd.grad(ops.divergence(x @ w.T + b, x @ w.T / 2 + b, logit_scale=s), s)
    torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-6)


def test_samples_of_the_entropy_where_a_target_is_masked() -> None:
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torch_ops")
    x, w, b, t = map(torch.from_numpy, (X, W, MASKED, np.where(T == 6, 3, T)))
    w = w.clone().requires_grad_()
    how = {"linear_bias": b, "reduction": "none", "stats": ("entropy",), "grad_samples": 3}
    (dw,) = torch.autograd.grad(ops.linear_cross_entropy(x, w, t, **how)[1]["entropy"].sum(), w)
    assert torch.isfinite(dw).all()


def test_samples_of_the_entropy_where_a_target_is_masked_in_jax() -> None:
    jax, ops = pytest.importorskip("jax"), pytest.importorskip("jax_ops")
    how = {"linear_bias": MASKED, "reduction": "none", "stats": ("entropy",), "grad_samples": 3}

    def entropy(w):
        out = ops.linear_cross_entropy(X, w, np.where(T == 6, 3, T), **how, key=jax.random.key(0))
        return out[1]["entropy"].sum()

    assert np.isfinite(jax.grad(entropy)(W)).all()


@pytest.mark.parametrize("sd", [1.0, 0.1, 0.01, 0.001])
def test_scale_of_rows_of_nearly_equal_logits(sd: float) -> None:
    """dL/ds is a sum about the row's maximum: nll less the entropy would be nothing but rounding."""
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torch_ops")
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(8, 1000, generator=g) * sd, torch.randint(1000, (8,), generator=g)
    s, wide = torch.ones(8, requires_grad=True), torch.ones(8, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(ops.cross_entropy(x, t, logit_scale=s, reduction="sum"), s)
    z = x.double() * wide[:, None]
    (due,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, t, reduction="sum"), wide)
    torch.testing.assert_close(found.double(), due, rtol=3e-5, atol=0)


def test_a_divergence_takes_its_scale_from_the_rows_judged() -> None:
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torch_ops")
    g = torch.Generator().manual_seed(0)
    x, w, s = torch.randn(2, 3, 3, generator=g), torch.randn(5, 3, generator=g), torch.ones(2, 3, requires_grad=True)
    x[:, -1] = torch.nan
    (ds,) = torch.autograd.grad(ops.linear_divergence(x, w, x.nan_to_num() / 2, w, logit_scale=s, shift=1), s)
    assert torch.isfinite(ds).all()
    assert (ds[:, -1] == 0).all()
    keep = torch.ones(2, 3, dtype=torch.bool)
    none = ops.linear_divergence(x, w, x, w, keep=keep, logit_scale=s, shift=4, reduction="none")
    assert none.shape == (2, 0)


def test_rank_is_of_the_losss_own_logits() -> None:
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torch_ops")
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2000, 64, generator=g).half(), (torch.randn(500, 64, generator=g) * 0.3).half()
    second = (x.float() @ w.float().T).topk(2, 1)[1][:, 1]
    stats = ops.linear_cross_entropy(x, w, second, stats=("argmax", "rank"))[1]
    assert torch.equal(stats["rank"] == 0, stats["argmax"] == second)


def test_ranks_of_pairs_by_chunks_and_no_rows() -> None:
    jax, ops = pytest.importorskip("jax"), pytest.importorskip("jax_ops")
    ids, mass = R.integers(0, V, (N, 3)), R.random((N, 3)).astype("f")
    by_chunks, whole = (
        ops.linear_cross_entropy(X, W, (ids, mass), stats=("rank",), chunk_size=c)[1]["rank"] for c in (3, N)
    )
    np.testing.assert_array_equal(by_chunks, whole)
    assert whole.shape == (N, 3)
    none = (np.zeros((0, D), "f"), W, np.zeros(0, int))
    assert ops.linear_cross_entropy(*none, reduction="sum", logit_scale=np.zeros(0, "f")) == 0
    assert ops.linear_cross_entropy(*none, reduction="sum", grad_samples=2, key=jax.random.key(0)) == 0


@pytest.mark.parametrize("name", ["mean_logit", "log_sum_sq"])
def test_statistics_sum_a_narrow_weights_gradient_in_float32(name: str) -> None:
    jax, ops = pytest.importorskip("jax"), pytest.importorskip("jax_ops")
    jnp, t = jax.numpy, R.integers(0, 6, 1024)
    x, w = (jnp.asarray(R.standard_normal(s), jnp.bfloat16) for s in ((1024, 3), (6, 3)))

    def f(w, x):
        return ops.linear_cross_entropy(x, w, t, stats=(name,), chunk_size=16)[1][name].sum()

    found, due = jax.grad(f)(w, x), jax.grad(f)(w.astype("float32"), x.astype("float32"))
    assert float(abs(found - due).max()) < 4e-3 * float(abs(due).max())


def test_samples_of_examples_sum_a_shared_weights_gradient_in_float32() -> None:
    jax, ops = pytest.importorskip("jax"), pytest.importorskip("jax_ops")
    jnp, t = jax.numpy, np.zeros((512, 1), int)
    x, w = (jnp.asarray(R.standard_normal(s), jnp.bfloat16) for s in ((512, 1, 4), (6, 4)))

    def f(w, x):
        one = lambda x, t: ops.linear_cross_entropy(x, w, t, grad_samples=8, key=jax.random.key(1))  # noqa: E731
        return jax.vmap(one)(x, t).sum()

    found, due = jax.grad(f)(w, x), jax.grad(f)(w.astype("float32"), x.astype("float32"))
    assert float(abs(found - due).max()) < 8e-3 * float(abs(due).max())
