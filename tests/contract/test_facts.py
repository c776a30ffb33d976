"""Facts about values that no shape check can see (masked, infinite and NaN logits, odd targets, no rows), by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.judging import cases
from tests.judging.cases import INF, NAN, OPTIONS, STATS
from tests.judging.frameworks import both, each, only

SOFTMAXES = ("softmax", "log_softmax")
TYPES = each(("dtype",), torch=[("float32",), ("bfloat16",)], jax=[("float32",)])
P = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
RTOL = {"float32": 1e-6, "bfloat16": 8e-3}


def ce(fw: Any, x: Any, target: Any, *, dtype: str = "float32", up: Any = 1.0, **options: Any) -> Any:
    """(loss, gradient at the logits, statistics, other gradients)."""
    given = {k: options.pop(k) for k in ("weight", "token_weight") if k in options}
    arrays = {"input": np.array(x, float), "target": np.array(target), **given}
    values, grads = fw("cross_entropy", dtype, arrays, {"value": up}, **options)
    return values.pop("value"), grads.pop("input"), values, grads


@TYPES
def test_masked_logit_in_softmax(fw, dtype):
    x, dy = np.array([[0.0, -INF, 1.0, 2.0]]), np.array([[1.0, 2.0, 3.0, 4.0]])
    y, dx = fw("softmax", dtype, {"input": x}, {"value": dy})
    assert y["value"][0, 1] == 0
    assert dx["input"][0, 1] == 0
    np.testing.assert_allclose(y["value"][0, [0, 2, 3]], P, rtol=RTOL[dtype])
    y, dx = fw("log_softmax", dtype, {"input": x}, {"value": dy})
    assert y["value"][0, 1] == -INF
    assert dx["input"][0, 1] == 2.0  # dy - p sum(dy) at p = 0
    np.testing.assert_allclose(y["value"][0, [0, 2, 3]], np.log(P), rtol=RTOL[dtype])


@TYPES
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_masked_logit_without_mass(fw, dtype, softcap):
    x = [[0.0, -INF, 1.0, 2.0]]
    z = np.array([0.0, 1.0, 2.0])
    z = z if softcap is None else softcap * np.tanh(z / softcap)
    p = np.exp(z) / np.exp(z).sum()
    options = {"softcap": softcap, "z_loss": 0.5, "stats": ("lse", "entropy"), "reduction": "none"}
    for target in ([3], [[0.0, 0.0, 0.0, 1.0]]):
        loss, dx, stats, _ = ce(fw, x, target, dtype=dtype, up=[1.0], **options)
        lse = np.log(np.exp(z).sum())
        np.testing.assert_allclose(loss, [-np.log(p[2]) + 0.5 * lse**2], rtol=1e-5)
        np.testing.assert_allclose(stats["lse"], [lse], rtol=1e-5)
        np.testing.assert_allclose(stats["entropy"], [-(p * np.log(p)).sum()], rtol=1e-5)
        assert dx[0, 1] == 0
        assert np.isfinite(dx).all()


@TYPES
def test_mass_on_a_masked_logit(fw, dtype):
    x = [[0.0, -INF, 1.0, 2.0]]
    loss, dx, _, _ = ce(fw, x, [1], dtype=dtype)
    assert loss == INF
    np.testing.assert_allclose(dx, [[P[0], -1, P[1], P[2]]], rtol=RTOL[dtype])
    y = np.array([[0.0, 0.25, 0.0, 0.5]])
    loss, dx, _, _ = ce(fw, x, y, dtype=dtype)
    assert loss == INF
    np.testing.assert_allclose(dx, 0.75 * np.array([[P[0], 0, P[1], P[2]]]) - y, rtol=RTOL[dtype], atol=1e-7)
    loss, dx, _, _ = ce(fw, x, [3], dtype=dtype, label_smoothing=0.5)
    assert loss == INF
    np.testing.assert_allclose(
        dx, [[P[0] - 0.125, -0.125, P[1] - 0.125, P[2] - 0.625]], rtol=RTOL[dtype], atol=1e-3 * (dtype != "float32")
    )


@TYPES
@pytest.mark.parametrize("bad", ["all -inf", "inf", "NaN", "two inf"])
def test_bad_row_is_nan_and_alone(fw, dtype, bad):
    r = cases.rows(17, dtype)
    x, target = r.x.copy(), np.maximum(r.target, 0)
    x[2] = {"all -inf": -INF, "inf": x[2], "NaN": x[2], "two inf": x[2]}[bad]
    x[2, 5] = {"all -inf": -INF, "inf": INF, "NaN": NAN, "two inf": INF}[bad]
    x[2, 6] = INF if bad == "two inf" else x[2, 6]
    others = np.arange(len(x)) != 2
    for op in SOFTMAXES:
        y, dx = fw(op, dtype, {"input": x}, {"value": r.dy})
        y0, dx0 = fw(op, dtype, {"input": r.x}, {"value": r.dy})
        for got, clean in ((y["value"], y0["value"]), (dx["input"], dx0["input"])):
            assert np.isnan(got[2]).all()
            np.testing.assert_array_equal(got[others], clean[others])
    for t in (target, cases.soft(17, dtype, len(x))):
        stats = STATS[:3] if t.ndim == 1 else ("lse", "entropy")
        options: dict[str, Any] = {"reduction": "none", "stats": stats, **OPTIONS["all"], "softcap": None}
        got, clean = (ce(fw, a, t, dtype=dtype, up=r.dloss, **options) for a in (x, r.x))
        for ours, theirs in zip([*got[:2], *got[2].values()], [*clean[:2], *clean[2].values()], strict=True):
            assert np.isnan(ours[2]).all()
            np.testing.assert_array_equal(ours[others], theirs[others])


@both
def test_infinite_logit_under_a_cap_is_the_cap(fw):
    """The facts are about logits after scale and cap: 20 tanh(inf) is a number."""
    loss, dx, stats, _ = ce(fw, [[0.0, INF, -INF]], [0], softcap=20.0, stats=("lse",))
    np.testing.assert_allclose([loss, stats["lse"][0]], 20, rtol=1e-6)
    np.testing.assert_allclose(dx, [[-1, 0, 0]], rtol=1e-6)


@each(
    ("dtype", "content", "reduction"),
    torch=product(["float32", "bfloat16"], [NAN, INF, -INF, 3.0], ["none", "sum", "mean"]),
    jax=product(["float32"], [NAN, INF, -INF, 3.0], ["none", "mean"]),
)
def test_ignored_row_reaches_no_result(fw, dtype, content, reduction):
    r = cases.rows(9, dtype)
    x, target = np.maximum(r.x, -30.0), np.maximum(r.target, 0)
    x[[3, 5]], target[[3, 5]] = content, -100
    kept = target != -100
    up: Any = r.dloss if reduction == "none" else 1.5
    w, tw = cases.class_weight(9, dtype), cases.token_weight(len(x), dtype)
    options = {"reduction": reduction, "weight": w, "stats": STATS, **OPTIONS["all"]}
    loss, dx, stats, others = ce(fw, x, target, dtype=dtype, up=up, token_weight=tw, **options)
    up = up[kept] if reduction == "none" else up
    loss0, dx0, stats0, others0 = ce(fw, x[kept], target[kept], dtype=dtype, up=up, token_weight=tw[kept], **options)
    np.testing.assert_array_equal(dx[~kept], 0)
    np.testing.assert_allclose(dx[kept], dx0, rtol=RTOL[dtype])
    np.testing.assert_array_equal(others["token_weight"][~kept], 0)
    np.testing.assert_allclose(others["token_weight"][kept], others0["token_weight"], rtol=RTOL[dtype], atol=1e-5)
    np.testing.assert_allclose(others["weight"], others0["weight"], rtol=RTOL[dtype], atol=1e-4)
    for name, value in stats.items():
        np.testing.assert_array_equal(value[~kept], -1 if name == "argmax" else 0)
        np.testing.assert_allclose(value[kept], stats0[name], rtol=1e-6)
    if reduction == "none":
        np.testing.assert_array_equal(loss[~kept], 0)
        loss = loss[kept]
    np.testing.assert_allclose(loss, loss0, rtol=1e-6)


@both
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, None, 2, -1, 7], ids=str)
def test_which_index_is_ignored(fw, ignore_index, reduction):
    mark = -100 if ignore_index is None else ignore_index
    x = np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 6.0]])
    up = [1.0, 1.0] if reduction == "none" else 1.0
    loss, dx, _, _ = ce(fw, x, [mark, 0], up=up, ignore_index=ignore_index, reduction=reduction)
    want = np.log(np.exp(x[1]).sum()) - 4
    np.testing.assert_allclose(loss, [0, want] if reduction == "none" else want, rtol=1e-6)
    np.testing.assert_array_equal(dx[0], 0)
    assert (dx[1] != 0).all()


@only("jax")
def test_row_masked_by_where(fw):
    jax, jnp = fw.jax, fw.jax.numpy
    x = jnp.array([[1.0, 2.0, 4.0], [3.0, NAN, INF]])
    mask = jnp.array([[True, False, True], [False, False, False]])
    p = np.exp([1.0, 4.0]) / np.exp([1.0, 4.0]).sum()
    y = fw.ops.softmax(x, where=mask)
    np.testing.assert_allclose(y, [[p[0], 0, p[1]], [0, 0, 0]], rtol=1e-6)
    y = fw.ops.log_softmax(x, where=mask)
    np.testing.assert_allclose(y, [[np.log(p[0]), -INF, np.log(p[1])], [-INF] * 3], rtol=1e-6)
    for op in SOFTMAXES:
        ours, theirs = getattr(fw.ops, op), getattr(jax.nn, op)
        np.testing.assert_allclose(ours(x, where=mask), theirs(x, where=mask), rtol=1e-6)
        dx = jax.grad(lambda x, ours=ours: jnp.where(mask, ours(x, where=mask), 0.0)[:, 2].sum())(x)
        np.testing.assert_array_equal(dx[~np.array(mask)], 0)
        assert (dx[0, ::2] != 0).all()
    loss = fw.ops.softmax_cross_entropy(x, jnp.array([[1.0, 5.0, 0.0], [0.5, 0.5, 0.5]]), where=mask)
    np.testing.assert_allclose(loss, [-np.log(p[0]), 0.0], rtol=1e-6)


@only("torch")
@pytest.mark.parametrize(("value", "shown"), [(3, 3), (-1, -1), (2**40, 2**40), (-(2**62), -(2**62))])
def test_index_out_of_range_raises_in_eager_torch(fw, value, shown):
    torch = fw.torch
    x = torch.zeros(2, 3, 3, requires_grad=True)  # (N, V, d)
    target = torch.tensor([[0, -100, 1], [2, value, value]])
    with pytest.raises(IndexError, match=rf"target must be in \[0, 3\).*got {shown} at row 4\."):
        fw.ops.cross_entropy(x, target)
    assert x.grad is None


@only("torch")
@pytest.mark.parametrize("how", ["vmap", "compiled"])
def test_index_out_of_range_is_nan_where_torch_cannot_look(fw, how):
    torch = fw.torch
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0, 5, 1, -100], [2, -7, 2**40, 4], [-1, 0, 0, 0]])

    def both(x, t):
        def loss(x):
            rows = fw.ops.cross_entropy(x, t, reduction="none")
            return rows.sum(), rows

        dx, rows = torch.func.grad(loss, has_aux=True)(x)
        return rows, dx

    if how == "vmap":
        rows, dx = torch.func.vmap(both)(x, target)
    else:
        run = torch.compile(both, backend="eager", fullgraph=True)
        rows, dx = (torch.stack(t) for t in zip(*map(run, x, target), strict=True))
    bad = (target != -100) & ((target < 0) | (target >= 5))
    assert torch.equal(rows.isnan(), bad)
    assert torch.equal(dx.isnan(), bad.unsqueeze(-1).expand(dx.shape))
    assert (dx[target == -100] == 0).all()
    safe = target.where(~bad, -100)
    want = torch.nn.functional.cross_entropy(x.flatten(0, 1), safe.flatten(), reduction="none").view(3, 4)
    torch.testing.assert_close(rows[~bad], want[~bad])


@only("jax")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("value", [3, -1, -7, 2**40, -(2**40), 2**32, 2**32 - 100], ids=str)
def test_index_out_of_range_is_a_nan_row_in_jax(fw, options, value):
    """A NumPy int64 target too, with x64 off, where JAX would cut 2**40 to 0 and 2**32 - 100 to -100."""
    target = np.array([1, value, -100, 2])
    x = fw.jax.numpy.array(np.random.default_rng(0).standard_normal((4, 3)), "float32")

    def rows(x: Any) -> Any:
        return fw.ops.cross_entropy(x, target, reduction="none", **options)

    loss, pull = fw.jax.vjp(rows, x)
    dx = pull(fw.jax.numpy.ones(4))[0]
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False, False])
    np.testing.assert_array_equal(np.isnan(dx).all(1), [False, True, False, False])
    np.testing.assert_array_equal(np.isnan(dx).any(1), [False, True, False, False])
    assert loss[2] == 0
    assert (dx[2] == 0).all()


@only("jax")
def test_optax_names_take_minus_one_for_no_class(fw):
    jnp = fw.jax.numpy
    x = jnp.array([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]])
    loss = fw.ops.softmax_cross_entropy_with_integer_labels(x, jnp.array([-1, 2]))
    assert np.isnan(loss[0])
    np.testing.assert_allclose(loss[1], -5 + np.log(np.exp([1.0, 2.0, 5.0]).sum()), rtol=1e-6)
    loss = fw.ops.softmax_cross_entropy_with_integer_labels(x, jnp.array([-100, 3]))
    assert np.isnan(loss).all()  # no ignore_index under this name


INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@each(("kind",), torch=[(k,) for k in INTEGERS], jax=[("int8",), ("uint8",), ("uint16",), ("uint64",)])
def test_any_integer_type(fw, kind):
    classes = 200 if kind != "int8" else 120
    r = cases.rows(classes, "float32")
    x = r.x[:4]
    top = classes - 1
    target = np.array([0, top, 130 if kind != "int8" else 100, 1])
    up = {"value": np.ones(4)}
    want = fw("cross_entropy", "float32", {"input": x, "target": target}, up, reduction="none")
    got = fw("cross_entropy", "float32", {"input": x, "target": target.astype(kind)}, up, reduction="none")
    np.testing.assert_array_equal(got[0]["value"], want[0]["value"])
    np.testing.assert_array_equal(got[1]["input"], want[1]["input"])
    assert (want[1]["input"] != 0).any(1).all()


@both
@pytest.mark.parametrize(
    ("kind", "value", "outcome"),
    [
        ("uint8", 156, "class"),  # 156 = -100 in 8 bits
        ("uint8", 255, "class"),
        ("uint16", 2**16 - 100, "bad"),
        ("uint32", 2**32 - 100, "bad"),
        ("uint64", 2**64 - 100, "bad"),
        ("uint64", 2**64 - 1, "bad"),
        ("uint64", 2**63, "bad"),
        ("int8", -100, "ignored"),
        ("int16", -100, "ignored"),
        ("int64", -100, "ignored"),
        ("int8", -1, "bad"),
    ],
)
def test_unsigned_values_wrap_into_no_marker(fw, kind, value, outcome):
    x = np.random.default_rng(1).standard_normal((2, 300))
    target = np.array([value, 7], kind)
    given, numbers = fw.array(x, "float32"), target if fw.name == "jax" else fw.array(target, "float32")
    if outcome == "bad" and fw.name == "torch":
        with pytest.raises(IndexError, match=f"got {value} at row 0"):
            fw.raw("cross_entropy", input=given, target=numbers, reduction="none")
        return
    loss = fw.numpy(fw.raw("cross_entropy", input=given, target=numbers, reduction="none"))
    nll = np.log(np.exp(x).sum(1)) - x[np.arange(2), [value if outcome == "class" else 0, 7]]
    want = {"class": nll[0], "bad": NAN, "ignored": 0.0}[outcome]
    np.testing.assert_allclose(loss, [want, nll[1]], rtol=1e-5)


@both
def test_uint8_marker_can_be_chosen(fw):
    x = np.random.default_rng(1).standard_normal((2, 300))
    target = np.array([156, 7], "uint8")
    loss, dx, _, _ = ce(fw, x, target, up=[1.0, 1.0], reduction="none", ignore_index=156)
    assert loss[0] == 0
    assert (dx[0] == 0).all()
    assert loss[1] > 0


@both
@pytest.mark.parametrize("soft", [False, True])
def test_no_rows(fw, soft):
    x = np.zeros((0, 5))
    target = np.zeros((0, 5)) if soft else np.zeros(0, int)
    for op in SOFTMAXES:
        y, dx = fw(op, "float32", {"input": x}, {"value": x})
        assert y["value"].shape == dx["input"].shape == (0, 5)
    arrays = {"input": x, "target": target}
    for reduction, all_ignored, want in (
        ("none", "nan", np.zeros(0)),
        ("sum", "nan", 0.0),
        ("mean", "nan", NAN),
        ("mean", "zero", 0.0),
    ):
        options = {"reduction": reduction, "on_all_ignored": all_ignored}
        up = np.zeros(0) if reduction == "none" else 1.0
        values, grads = fw("cross_entropy", "float32", arrays, {"value": up}, **options)
        np.testing.assert_array_equal(values["value"], want)
        assert grads["input"].shape == (0, 5)


NOTHING = ("ignored", "token weights", "class weights")


@each(("name", "reason"), torch=product(["plain", "all"], NOTHING), jax=product(["all"], NOTHING))
def test_mean_over_nothing(fw, name, reason):
    options = OPTIONS[name]
    x = np.array([[1.0, 2.0, 3.0], [NAN, 0.0, INF]]) if reason == "ignored" else np.array([[1.0, 2, 3], [3, 2, 1]])
    target = [-100, -100] if reason == "ignored" else [1, 1]
    extra = {
        "ignored": {},
        "token weights": {"token_weight": np.zeros(2)},
        "class weights": {"weight": np.array([1.0, 0.0, 1.0])},
    }[reason]
    loss, dx, _, others = ce(fw, x, target, on_all_ignored="zero", **extra, **options)
    assert loss == 0
    assert (dx == 0).all()
    assert all((g == 0).all() for g in others.values())
    loss, dx, _, _ = ce(fw, x, target, on_all_ignored="nan", **extra, **options)
    quotient = options and reason == "class weights"  # smoothing and z-loss are not weighted by the target's class
    assert loss == INF if quotient else np.isnan(loss)
    if reason == "ignored":
        assert (dx == 0).all()
    assert ce(fw, x, target, reduction="sum", **extra)[0] == 0


@both
def test_one_class(fw):
    x = np.array([[3.0], [-7.0], [1e4]])
    assert (fw("softmax", "float32", {"input": x})[0]["value"] == 1).all()
    loss, dx, stats, _ = ce(fw, x, [0, 0, 0], up=np.ones(3), reduction="none", stats=STATS)
    assert (loss == 0).all()
    assert (dx == 0).all()
    assert (stats["entropy"] == 0).all()
    np.testing.assert_array_equal(stats["lse"], x[:, 0])


@both
def test_ties_give_the_first_maximum(fw):
    x = np.array([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0], [-INF, -INF, 0.0], [0.0, 9.0, -INF]])
    _, _, stats, _ = ce(fw, x, [0, 0, 2, 0], up=1.0, stats=("argmax",))
    np.testing.assert_array_equal(stats["argmax"], [1, 0, 2, 1])
