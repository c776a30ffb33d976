"""The reference's linear head, and all of it against PyTorch."""

from typing import Any

import mpmath
import numpy as np
import pytest

from softmax_ext import reference
from tests.truth.exact import NAN, TOKEN, WEIGHT, close, exact, plain_loss, slopes, soft_targets

pytestmark = pytest.mark.filterwarnings("error")  # no NumPy warning may escape


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(80):
        yield


def head(seed=0):
    rng = np.random.default_rng(seed)
    x, w, b = (2 * rng.standard_normal(s) for s in ((4, 3), (5, 3), (5,)))
    return x, w, b, np.array([1, -100, 4, 0])


@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
def test_linear_gradients(soft):
    x, w, b, target = head()
    options: dict[str, Any] = {
        "weight": WEIGHT[:5],
        "token_weight": TOKEN[:4],
        "label_smoothing": 0.1,
    }
    options |= {"softcap": 6.0, "logit_scale": 0.5, "z_loss": 0.01}
    keep = [0, 1, 2, 3] if soft else [0, 2, 3]
    if soft:
        target = soft_targets()[:4, :5]
    clean = x.copy()
    if not soft:
        x[1] = NAN

    def loss(x, w, b):
        return plain_loss(x @ w.T + b, target, **options)

    args: list[Any] = [exact(clean), exact(w), exact(b)]
    ours = reference.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    close(ours, loss(*args))
    grads = reference.linear_cross_entropy_grad(x, w, target, linear_bias=b, **options)
    for i, grad in enumerate(grads):
        assert grad is not None

        def at(flat, i=i):
            moved: list[Any] = [*args[:i], flat.reshape(args[i].shape), *args[i + 1 :]]
            return loss(*moved)

        truth = slopes(at, args[i].ravel()).reshape(grad.shape).astype(np.float64)
        np.testing.assert_allclose(grad, truth, rtol=1e-14, atol=1e-17)
        assert np.abs(grad).max() > 0.02
    assert (grads[0][keep] != 0).all()
    assert soft or (grads[0][1] == 0).all()
    assert reference.linear_cross_entropy_grad(x, w, target)[2] is None


def test_linear_ignored_row_is_exactly_zero_and_a_bad_target_is_nan():
    x, w, _, target = head()
    w[3] = NAN  # every kept row is NaN, the ignored one still reaches nothing
    dx, dw, _ = reference.linear_cross_entropy_grad(x, w, target)
    assert (dx[1] == 0).all()
    assert np.isnan(dx[[0, 2, 3]]).all()
    x, w, b, target = head()
    target[2] = 5
    dx, dw, db = reference.linear_cross_entropy_grad(x, w, target, linear_bias=b)
    assert np.isnan(dx[2]).all()
    assert np.isfinite(dx[[0, 1, 3]]).all()
    assert np.isnan(dw).all()
    assert db is not None
    assert np.isnan(db).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
def test_linear_shift(soft, reduction):
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((2, 6, 3)), rng.standard_normal((5, 3))
    target = rng.exponential(size=(2, 6, 5)) if soft else rng.integers(0, 5, (2, 6))
    tw = rng.exponential(size=(2, 6))
    for k in (1, 2, 6, 8):
        n = max(6 - k, 0)
        dloss = rng.standard_normal((2, n)) if reduction == "none" else 1.5
        same: dict[str, Any] = {"reduction": reduction, "stats": ("lse",), "on_all_ignored": "zero"}
        ours, stats = reference.linear_cross_entropy(x, w, target, token_weight=tw, shift=k, **same)
        cut = x[:, :n], w, target[:, 6 - n :]
        truth, lse = reference.linear_cross_entropy(*cut, token_weight=tw[:, 6 - n :], **same)
        np.testing.assert_array_equal(ours, truth)
        np.testing.assert_array_equal(stats["lse"], lse["lse"])
        same["dloss"] = dloss
        dx, dw, _ = reference.linear_cross_entropy_grad(x, w, target, token_weight=tw, shift=k, **same)
        cut_dx, cut_dw, _ = reference.linear_cross_entropy_grad(*cut, token_weight=tw[:, 6 - n :], **same)
        np.testing.assert_array_equal(dx[:, :n], cut_dx)
        assert (dx[:, n:] == 0).all()
        np.testing.assert_array_equal(dw, cut_dw)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["integer", "ignored", "soft"])
def test_torch_agrees(kind, weighted, smoothing, reduction):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    x = 3 * rng.standard_normal((4, 7, 2, 3))  # classes on axis 1
    w = WEIGHT if weighted else None
    target = rng.integers(0, 7, (4, 2, 3))
    if kind == "ignored":
        target[0, 1] = target[3, 0, 2] = -100
    if kind == "soft":
        target = rng.exponential(size=x.shape)
    tx = torch.tensor(x, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        tx,
        torch.tensor(target),
        None if w is None else torch.tensor(w),
        reduction=reduction,
        label_smoothing=smoothing,
    )
    dloss = rng.standard_normal(theirs.shape)
    theirs.backward(torch.tensor(dloss))
    options: dict[str, Any] = {"axis": 1, "reduction": reduction, "label_smoothing": smoothing}
    ours = reference.cross_entropy(x, target, w, **options)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-13)
    grad = reference.cross_entropy_grad(x, target, w, dloss=dloss, **options)
    assert tx.grad is not None
    np.testing.assert_allclose(grad, tx.grad.numpy(), rtol=1e-12, atol=1e-15)
    assert np.abs(grad).max() > 1e-3


@pytest.mark.parametrize("kind", ["integer", "ignored", "soft"])
def test_torch_agrees_on_the_k_dimensional_head(kind):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    x, w, b = (rng.standard_normal(s) for s in ((4, 3), (5, 2, 2, 3), (5, 2, 2)))
    target = rng.integers(0, 5, (4, 2, 2))
    if kind == "ignored":
        target[0] = target[2, 1] = -100
    if kind == "soft":
        target = rng.exponential(size=(4, 5, 2, 2))
    args = [torch.tensor(a, requires_grad=True) for a in (x, w, b)]
    logits = (args[0] @ args[1].reshape(20, 3).T).reshape(4, 5, 2, 2) + args[2]
    theirs = torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none")
    dloss = rng.standard_normal((4, 2, 2))
    theirs.backward(torch.tensor(dloss))
    if kind == "ignored":
        x[0] = NAN  # all four of its targets are ignored
    ours = reference.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-13)
    grads = reference.linear_cross_entropy_grad(x, w, target, linear_bias=b, reduction="none", dloss=dloss)
    for grad, arg in zip(grads, args, strict=True):
        assert grad is not None
        assert arg.grad is not None
        np.testing.assert_allclose(grad, arg.grad.numpy(), rtol=1e-12, atol=1e-14)
