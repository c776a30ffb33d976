"""Bugs found in other libraries, by their number in the list: 14 to 20, and those found since."""

from __future__ import annotations

import re
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.judging import cases
from tests.judging.cases import INF, NAN
from tests.judging.frameworks import HALF, both, each, only
from tests.ops.calls import ce


@both
@pytest.mark.parametrize("target", [5, 10**6, -1, -2])
def test_14_target_out_of_range(fw, target):
    """NaN in loss and gradient together, or an exception: never a number, never a stray write."""
    x = np.random.default_rng(0).standard_normal((3, 5))
    targets = np.array([0, target, 1])
    if fw.name == "torch":
        with pytest.raises(IndexError, match=f"got {target} at row 1"):
            ce(fw, x, targets, up=np.ones(3), reduction="none")
        return
    loss, dx, _ = ce(fw, x, targets, up=np.ones(3), reduction="none")
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])
    np.testing.assert_array_equal(np.isnan(dx), np.array([[False], [True], [False]]) & np.ones(5, bool))


@both
def test_14_rows_beside_a_bad_one_are_right(fw):
    """At the level of rows, where both frameworks give NaN (-2 is the canonical bad target)."""
    x = np.random.default_rng(0).standard_normal((3, 5))
    at = {"dim" if fw.name == "torch" else "axis": 1, "scale": 1.0, "softcap": None}
    logits, target = fw.array(x, "float32"), fw.array(np.array([0, -2, 1]), "float32")
    nll, lse, m, rest = fw.rows.cross_entropy_fwd(logits, target, None, **at, smooth=False, entropy=False)
    up = fw.array(np.ones(3), "float32")
    dx = fw.numpy(fw.rows.cross_entropy_bwd(logits, target, None, m, rest, up, None, None, None, **at))
    nll = fw.numpy(nll)
    assert np.isnan(nll[1])
    assert np.isnan(dx[1]).all()
    assert np.isfinite(fw.numpy(lse)).all()
    good = [0, 2]
    want = reference.cross_entropy(x[good], np.array([0, 1]), reduction="none")
    np.testing.assert_allclose(nll[good], want, rtol=1e-6)
    assert np.isfinite(dx[good]).all()


@both
def test_15_minus_one_is_not_the_last_class(fw):
    x = np.array([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]])
    if fw.name == "torch":
        with pytest.raises(IndexError, match="got -1 at row 0"):
            ce(fw, x, [-1, 2])
    else:
        loss, _, _ = ce(fw, x, [-1, 2], up=np.ones(2), reduction="none")
        assert np.isnan(loss[0])
        assert loss[1] < 1e-3
        labels = fw.jax.numpy.array([-1, 2])
        loss = fw.ops.softmax_cross_entropy_with_integer_labels(fw.array(x, "float32"), labels)
        assert np.isnan(loss[0])
        assert loss[1] < 1e-3
    loss, dx, _ = ce(fw, x, [-1, 2], up=np.ones(2), ignore_index=-1, reduction="none")
    assert loss[0] == 0
    assert (dx[0] == 0).all()


@both
def test_16_float16_log_softmax_gradient_of_2_to_the_17_classes(fw):
    """sum(dy) = 2^17 is above float16's largest number."""
    x = cases.rounded(np.random.default_rng(0).standard_normal((1, 1 << 17)), "float16")
    ones = np.ones_like(x)
    _, dx = fw("log_softmax", "float16", {"input": x}, {"value": ones})
    want = reference.log_softmax_vjp(x, ones)
    np.testing.assert_allclose(dx["input"], want, rtol=1e-3, atol=1e-6)


@both
@pytest.mark.parametrize("scale", [1 / 0.7, 0.7, 3.3])
def test_17_scaled_logits_of_3e10(fw, scale):
    """Scaled once, then the maximum is subtracted: fused into one operation exp overflows."""
    r = np.random.default_rng(0)
    x = cases.rounded(3e10 * (1 + 1e-3 * r.random((64, 37))), "float32")
    target = x.argmax(1)
    loss, dx, stats = ce(
        fw, x, target, up=np.ones(64), logit_scale=scale, reduction="none", stats=("lse", "entropy", "logprob")
    )
    for value in (loss, dx, *stats.values()):
        assert np.isfinite(value).all()
    assert (loss >= 0).all()
    assert (loss <= np.log(37)).all()


@only("jax")
def test_17_softmax_of_a_product_under_jit(fw):
    jax, jnp = fw.jax, fw.jax.numpy
    r = np.random.default_rng(0)
    x = jnp.asarray(3e10 * (1 + 1e-3 * r.random((64, 37))), "float32")
    for op in ("softmax", "log_softmax"):
        y = jax.jit(lambda x, op=op: getattr(fw.ops, op)(x / 0.7))(x)
        assert np.isfinite(y).all(), op
        dx = jax.jit(jax.grad(lambda x, op=op: getattr(fw.ops, op)(x / 0.7)[:, 3].sum()))(x)
        assert np.isfinite(dx).all(), op
    np.testing.assert_allclose(jax.jit(lambda x: fw.ops.softmax(x / 0.7))(x).sum(1), 1, rtol=1e-6)


@each(
    ("dtype", "reduction"),
    torch=product(HALF, ["none", "mean", "sum"]),
    jax=[("bfloat16", "none"), ("float16", "mean")],
)
def test_18_loss_of_half_precision_is_float32(fw, dtype, reduction):
    """The adapter asserts the type; here, that the digits are there as well."""
    r = cases.rows(257, dtype)
    x = np.maximum(r.x, -30.0)
    up = np.ones(len(x)) if reduction == "none" else 1.0
    loss, _, stats = ce(fw, x, r.target, dtype=dtype, up=up, reduction=reduction, stats=("lse", "entropy"))
    want, wants = reference.cross_entropy(x, r.target, reduction=reduction, stats=("lse", "entropy"))
    for got, right in ((loss, want), (stats["lse"], wants["lse"]), (stats["entropy"], wants["entropy"])):
        np.testing.assert_allclose(got, right, rtol=1e-6, atol=1e-12)
        assert np.abs(cases.rounded(right, dtype) / np.where(right == 0, 1, right) - 1).max() > 1e-5
    weighted, _, _ = ce(fw, x, r.target, dtype=dtype, up=up, reduction=reduction, weight=np.ones(257))
    np.testing.assert_allclose(weighted, want, rtol=1e-6, atol=1e-12)


def _free_gib() -> float:
    """Memory that can be had without swapping; where no system tells, none."""
    found = (
        re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()) if sys.platform == "linux" else None
    )
    return int(found[1]) / 2**20 if found else 0.0


@pytest.fixture
def beyond(request):
    """Makes bfloat16 arrays of a shape holding anything: what nobody writes takes no memory."""
    fw = request.getfixturevalue("fw")
    need = 200 if fw.rows.native.missing else 7  # plain rows make a dozen temporaries; the kernels write 4 GiB, once
    if _free_gib() < need:
        pytest.skip(f"2^31 logits need {need} GiB of memory; {_free_gib():.1f} GiB are available")
    return lambda shape: fw.torch.empty(shape, dtype=fw.torch.bfloat16)


@pytest.mark.slow
@only("torch")
def test_19_more_than_2_to_the_31_logits(fw, beyond):
    rows, classes = (1 << 20) + 2, 1 << 11  # element 2^31 opens row 2^20
    x = beyond((rows, classes))
    loud = fw.torch.linspace(-3, 3, classes).bfloat16()
    near = slice((1 << 20) - 2, rows)
    x[near] = loud
    x[0] = 0
    target = fw.torch.arange(rows) % classes
    loss = fw.ops.cross_entropy(x.requires_grad_(), target, reduction="none")
    (dx,) = fw.torch.autograd.grad(loss[near].sum(), x)
    truth = x[near].detach().double().numpy(), target[near].numpy()
    want = reference.cross_entropy(*truth, reduction="none")
    np.testing.assert_allclose(loss[near].detach().numpy(), want, rtol=1e-6)
    want = reference.cross_entropy_grad(*truth, reduction="none")
    np.testing.assert_allclose(dx[near].double().numpy(), want, rtol=2.0**-8)
    assert not dx[0].any()


@pytest.mark.slow
@only("torch")
@pytest.mark.parametrize("shape", [(8, (1 << 28) + 1), ((1 << 28) + 1, 8)], ids=["first axis", "short rows"])
def test_19_in_the_other_layouts(fw, beyond, shape):
    axis = shape.index(8)
    x = beyond(shape)
    x.movedim(axis, 0)[:, 0] = 0
    end = x.movedim(axis, 0)[:, -3:]  # where the classes are strided, those of a row lie on both sides
    end.copy_(fw.torch.linspace(-3, 3, 8)[:, None] * fw.torch.tensor([1.0, 2.0, 3.0]))
    y = fw.ops.softmax(x, axis).movedim(axis, 0)
    want = reference.softmax(end.double().numpy(), axis=0)
    np.testing.assert_allclose(y[:, -3:].double().numpy(), want, rtol=2.0**-8)
    assert (y[:, 0] == 0.125).all()


@only("torch")
@pytest.mark.parametrize("op", ["softmax", "log_softmax", "cross_entropy"])
def test_20_second_backward_with_retain_graph(fw, op):
    torch = fw.torch
    x = torch.randn(4, 7, requires_grad=True)
    args = (torch.tensor([0, 6, -100, 3]),) if op == "cross_entropy" else ()
    y = getattr(fw.ops, op)(x, *args)
    up = torch.randn_like(y)
    (first,) = torch.autograd.grad(y, x, up, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, up, retain_graph=True)
    (double,) = torch.autograd.grad(y, x, 2 * up)
    assert torch.equal(first, second)
    torch.testing.assert_close(double, 2 * first)
    assert first.abs().max() > 0
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, up)


@both
def test_no_row_is_touched_by_another(fw):
    """NaN, inf and bad rows between good ones: the sum over rows is what spreads them, nothing else (bugs 4, 14)."""
    x = np.random.default_rng(0).standard_normal((5, 6))
    dirty = x.copy()
    dirty[1], dirty[3] = NAN, INF
    for op in ("softmax", "log_softmax"):
        y, dx = fw(op, "float32", {"input": dirty}, {"value": np.ones_like(x) * np.arange(6)})
        y0, dx0 = fw(op, "float32", {"input": x}, {"value": np.ones_like(x) * np.arange(6)})
        for got, clean in ((y["value"], y0["value"]), (dx["input"], dx0["input"])):
            np.testing.assert_array_equal(got[::2], clean[::2])
            assert np.isnan(got[1::2]).all()


@both
@pytest.mark.parametrize("cap", [1e30, 1e37, 3e38])
def test_large_soft_caps_are_no_caps(fw, cap):
    loss, dx, _ = ce(fw, [[1.0, 2.0, 3.0]], [0], softcap=cap)
    plain, dx0, _ = ce(fw, [[1.0, 2.0, 3.0]], [0])
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    np.testing.assert_allclose(dx, dx0, rtol=1e-6)


@both
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numpy_scalars_count_as_python_numbers(fw, kind):
    options: dict[str, Any] = {"label_smoothing": 0.25, "z_loss": 0.5}
    scalars: dict[str, Any] = {k: kind(v) for k, v in options.items()}
    loss, dx, _ = ce(fw, [[1.0, 2.0, 3.0]], [0], **scalars)
    plain, dx0, _ = ce(fw, [[1.0, 2.0, 3.0]], [0], **options)
    np.testing.assert_array_equal(loss, plain)
    np.testing.assert_array_equal(dx, dx0)


@both
@pytest.mark.parametrize("classes", [10, 200, 9000])
def test_finite_masks_are_masks(fw, classes):
    lowest = float(np.finfo(np.float32).min)
    x = np.random.default_rng(0).standard_normal((2, classes))
    x[:, 3:8] = lowest
    loss, dx, _ = ce(fw, x, [0, 1], label_smoothing=0.1, up=1.0)
    assert loss == INF
    assert np.isfinite(dx).all()
    x[:, 3:8] = -3e38
    x[:, 0] = 3e38
    one_hot = np.zeros_like(x)
    one_hot[:, 0] = 1.0
    loss, dx, _ = ce(fw, x, one_hot)
    assert loss == 0
    np.testing.assert_array_equal(dx, 0)


@both
def test_float64_rows_whose_maximum_rises_by_more_than_the_type_holds(fw):
    x = np.full((1, 8192), -1e308)
    x[0, 5000] = 1e308
    loss, dx, _ = ce(fw, x, [5000], dtype="float64")
    assert loss == 0
    np.testing.assert_array_equal(dx, 0)


@both
def test_logits_that_the_scale_overflows_are_capped_not_masked(fw):
    loss, _, _ = ce(fw, [[1e30, -1e30, 0.0]], [1], logit_scale=1e30, softcap=2.0)
    np.testing.assert_allclose(loss, np.log(1 + np.exp(-2) + np.exp(-4)) + 4, rtol=1e-6)


@both
def test_ignored_rows_keep_gradient_zero_beside_a_nan_class_weight(fw):
    loss, dx, _ = ce(fw, [[1.0, 2.0, 3.0]], [-100], weight=[NAN, 1.0, 1.0], label_smoothing=0.1, reduction="sum")
    assert loss == 0
    np.testing.assert_array_equal(dx, 0)
