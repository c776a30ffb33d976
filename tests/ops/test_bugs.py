"""Bugs found in other libraries, by their number in the list: 1 to 13."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.judging import cases, checks
from tests.judging.cases import INF
from tests.judging.frameworks import HALF, both, only
from tests.ops.calls import ce


@both
def test_02_softcap_keeps_masked_classes_out(fw):
    x = np.random.default_rng(0).standard_normal((3, 300))
    masked = np.concatenate([x, np.full((3, 212), -INF)], 1)
    target, up = [0, 5, 299], np.ones(3)
    options = {"softcap": 2.0, "reduction": "none", "stats": ("lse", "entropy")}
    loss, dx, stats = ce(fw, masked, target, up=up, **options)
    alone, dx0, stats0 = ce(fw, x, target, up=up, **options)
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    for name, value in stats0.items():
        np.testing.assert_allclose(stats[name], value, rtol=1e-6)
    np.testing.assert_array_equal(dx[:, 300:], 0)
    np.testing.assert_allclose(dx[:, :300], dx0, rtol=1e-5, atol=1e-9)


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_03_tiles_that_are_all_masked(fw, dtype, where):
    r = np.random.default_rng(0)
    x = np.full((2, 8200), -INF)
    at = slice(8192, None) if where == "first" else slice(0, 8)
    x[:, at] = cases.rounded(r.standard_normal((2, 8)), dtype)
    dy = cases.rounded(r.standard_normal(x.shape), dtype)
    for op in ("softmax", "log_softmax"):
        y, dx = fw(op, dtype, {"input": x}, {"value": dy})
        y0, dx0 = checks.oracle(op, {"input": x}, {"value": dy})
        np.testing.assert_allclose(y["value"], y0["value"], rtol=1e-2)
        np.testing.assert_allclose(dx["input"], dx0["input"], rtol=2e-2, atol=2e-2)
    target = [at.start, at.start + 7]
    loss, dx, _ = ce(fw, x, target, dtype=dtype, up=np.ones(2), reduction="none")
    np.testing.assert_allclose(loss, reference.cross_entropy(x, np.array(target), reduction="none"), rtol=1e-6)
    assert (dx[x == -INF] == 0).all()
    assert (dx[x != -INF] != 0).all()


@both
def test_04_zero_times_minus_infinity(fw):
    # In the entropy.
    x = [[0.0, -INF, 1.0]]
    up = {"value": np.ones(1), "entropy": np.ones(1)}
    loss, dx, stats = ce(fw, x, [2], up=up, stats=("entropy",), reduction="none")
    p = 1 / (1 + np.e)
    np.testing.assert_allclose(stats["entropy"], [-(p * np.log(p) + (1 - p) * np.log(1 - p))], rtol=1e-6)
    assert np.isfinite([*loss, *dx[0]]).all()
    assert dx[0, 1] == 0
    # In the target that stands for an ignored row's, whichever it is.
    x = [[-INF, 1.0, -INF], [1.0, 2.0, 3.0]]
    choices: list[dict[str, Any]] = [{}, {"weight": [0.0, 1.0, 2.0]}, {"label_smoothing": 0.1, "z_loss": 0.1}]
    for options in choices:
        loss, dx, _ = ce(fw, x, [-100, 1], **options)
        alone, dx0, _ = ce(fw, x[1:], [1], **options)
        assert loss == alone
        np.testing.assert_array_equal(dx, [[0, 0, 0], dx0[0]])


@both
@pytest.mark.parametrize("dtype", HALF)
def test_05_gradient_at_the_target_is_rounded_once(fw, dtype):
    x = np.array([[9.0, 0.0, 1.0, 2.0], [5.0, -3.0, 0.0, 0.5]])  # p about 0.999, which is 1 in bfloat16
    _, dx, _ = ce(fw, x, [0, 0], dtype=dtype, up=np.ones(2), reduction="none")
    want = reference.cross_entropy_grad(x, np.array([0, 0]), reduction="none", dloss=np.ones(2))
    np.testing.assert_array_equal(dx, cases.rounded(want, dtype))
    early = cases.rounded(reference.softmax(x), dtype)[:, 0] - 1
    assert (early != dx[:, 0]).all(), "the input would not show the bug"


@both
@pytest.mark.parametrize("shift", [1e4, -1e4, 1e6])
def test_07_common_offset_changes_nothing(fw, shift):
    x = np.round(np.random.default_rng(0).standard_normal((4, 50)) * 8) / 8  # exact in float32, shifted or not
    target, up = [0, 49, 7, 20], np.array([1.0, 2.0, 3.0, 4.0])
    loss, dx, _ = ce(fw, x + shift, target, up=up, reduction="none")
    loss0, dx0, _ = ce(fw, x, target, up=up, reduction="none")
    np.testing.assert_array_equal(loss, loss0)
    np.testing.assert_array_equal(dx, dx0)


@both
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_08_every_row_has_its_own_upstream_gradient(fw, soft):
    r = cases.rows(33, "float32")
    target = cases.soft(33, "float32", len(r.x)) if soft else r.target
    options = {"reduction": "none", **cases.OPTIONS["smooth"]}
    x = np.maximum(r.x, -30.0)
    _, together, _ = ce(fw, x, target, up=r.dloss, **options)
    _, ones, _ = ce(fw, x, target, up=np.ones(len(x)), **options)
    np.testing.assert_allclose(together, ones * r.dloss[:, None], rtol=1e-5, atol=1e-7)
    one = np.where(np.arange(len(x)) == 2, 1.0, 0.0)
    _, alone, _ = ce(fw, x, target, up=one, **options)
    np.testing.assert_array_equal(alone, ones * one[:, None])


@only("torch")
def test_09_gradient_never_lands_on_what_is_still_needed(fw):
    torch = fw.torch
    x = torch.randn(4, 9, requires_grad=True)
    logits = x * 1.0
    before = logits.detach().clone()
    square = logits.square().sum()
    fw.ops.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward(retain_graph=True)
    assert torch.equal(logits.detach(), before)  # not without being asked
    square.backward()
    logits = x * 1.0
    square = logits.square().sum()
    fw.ops.cross_entropy(logits, torch.tensor([0, 1, 2, 3]), inplace_backward=True).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@only("torch")
@pytest.mark.parametrize("op", ["softmax", "log_softmax", "cross_entropy"])
def test_10_upstream_gradient_of_any_stride(fw, op):
    torch = fw.torch
    x = torch.randn(6, 8, requires_grad=True)
    args, shape = ((), (6, 8)) if op != "cross_entropy" else ((torch.arange(6),), (6,))
    options = {} if op != "cross_entropy" else {"reduction": "none"}
    y = getattr(fw.ops, op)(x, *args, **options)
    dense = torch.randn(2, *shape)
    ups = {
        "stride 0": torch.tensor(2.5).expand(shape),
        "stride 0 over rows": dense[0][:1].expand(shape),
        "every other": torch.stack([dense[0], dense[1]], -1)[..., 0],
        "reversed strides": dense[0].permute(*range(len(shape))[::-1]).contiguous().permute(*range(len(shape))[::-1]),
        "offset": dense.flatten()[3 : 3 + dense[0].numel()].view(shape),
    }
    for name, up in ups.items():
        (dx,) = torch.autograd.grad(y, x, up, retain_graph=True)
        (want,) = torch.autograd.grad(y, x, up.clone(memory_format=torch.contiguous_format), retain_graph=True)
        torch.testing.assert_close(dx, want, msg=name)
    assert ups["stride 0"].stride() == (0,) * len(shape)


@both
@pytest.mark.parametrize("cap", [1.0, 5.0, 30.0])
def test_11_slope_of_the_softcap(fw, cap):
    x = np.array([[0.5, 4.0, -9.0, 1.0, 20.0]])
    _, dx, _ = ce(fw, x, [1], dtype="float64", softcap=cap)
    z = cap * np.tanh(x / cap)
    p = np.exp(z) / np.exp(z).sum()
    want = (p - np.eye(5)[1]) / np.cosh(x / cap) ** 2
    np.testing.assert_allclose(dx, want, rtol=1e-9)
    h = 1e-6
    for j in range(5):  # and against a difference of losses
        step = h * np.eye(5)[j]
        up, down = (ce(fw, x + s, [1], dtype="float64", softcap=cap)[0] for s in (step, -step))
        np.testing.assert_allclose(dx[0, j], (up - down) / (2 * h), rtol=1e-6, atol=1e-9)


@both
@pytest.mark.parametrize("total", [0.0, 0.3, 1.0, 7.0])
def test_12_soft_targets_of_any_sum(fw, total):
    x, y = np.array([[1.0, 2.0, 0.5]]), np.array([[0.2, 0.5, 0.3]]) * total
    loss, dx, _ = ce(fw, x, y, dtype="float64")
    p = np.exp(x) / np.exp(x).sum()
    np.testing.assert_allclose(loss, -(y * np.log(p)).sum(), rtol=1e-14)
    np.testing.assert_allclose(dx, p * y.sum() - y, rtol=1e-13, atol=1e-16)


@both
def test_13_no_gradient_is_dropped(fw):
    """z-loss and entropy, through the option or through the statistic, in one loss."""
    x = np.random.default_rng(3).standard_normal((3, 6)) * 2
    target = np.array([0, 5, 2])
    with_option = ce(fw, x, target, dtype="float64", up=np.ones(3), reduction="none", z_loss=0.25)
    plain = ce(fw, x, target, dtype="float64", up=np.ones(3), reduction="none", stats=("lse",))
    lse = plain[2]["lse"]
    np.testing.assert_allclose(with_option[0], plain[0] + 0.25 * lse**2, rtol=1e-14)
    ups = {"value": np.ones(3), "lse": 0.5 * lse}
    by_hand = ce(fw, x, target, dtype="float64", up=ups, reduction="none", stats=("lse",))
    np.testing.assert_allclose(with_option[1], by_hand[1], rtol=1e-12, atol=1e-15)
    assert np.abs(with_option[1] - plain[1]).max(1).min() > 0.1
    _, dx, stats = ce(fw, x, target, dtype="float64", up={"entropy": np.ones(3)}, reduction="none", stats=("entropy",))
    p = reference.softmax(x)
    np.testing.assert_allclose(dx, -p * (np.log(p) + stats["entropy"][:, None]), rtol=1e-11, atol=1e-14)
    for name in ("lse", "logprob"):
        _, dx, _ = ce(fw, x, target, dtype="float64", up={name: np.ones(3)}, reduction="none", stats=(name,))
        want = p if name == "lse" else np.eye(6)[target] - p
        np.testing.assert_allclose(dx, want, rtol=1e-12, atol=1e-15)


@only("torch")
def test_13_coefficient_of_the_z_loss_statistic_is_differentiable(fw):
    """A learnable coefficient multiplies the statistic and gets its gradient."""
    torch = fw.torch
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss, stats = fw.ops.cross_entropy(x, torch.tensor([0, 1, 2]), stats=("lse", "entropy"))
    (loss + c * stats["lse"].square().mean() - c * stats["entropy"].mean()).backward()
    lse = x.detach().logsumexp(1)
    entropy = torch.distributions.Categorical(logits=x.detach()).entropy()
    torch.testing.assert_close(c.grad, lse.square().mean() - entropy.mean())
