"""The native rows under JAX: they run where they should and nowhere else, and are the plain rows in every respect."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._rows import dispatch as rows  # noqa: E402
from jax_ops._rows import native, plain  # noqa: E402
from softmax_ext import reference  # noqa: E402
from tests.judging import cases, checks  # noqa: E402
from tests.judging.quick import QUICK  # noqa: E402

pytestmark = pytest.mark.skipif(bool(native.missing), reason=native.missing)

LAYOUTS = {"last": (1, (6, 37)), "first": (0, (37, 6)), "middle": (1, (2, 37, 3)), "one row": (0, (130,))}
# More roundings than the checks' bounds allow for: both sides err.
CLOSE = {"float64": 2.0**-48, "float32": 2.0**-19, "bfloat16": 2.0**-7, "float16": 2.0**-10}
FLOOR = 2.0**-110  # the kernels flush subnormals


def _compiled(f: Callable[..., Any], *args: Any) -> tuple[Any, list[str]]:
    """The program, and the custom calls of ours in it."""
    program = jax.jit(f, **QUICK).lower(*args).compile()
    return program, sorted(re.findall(r'custom_call_target="softmax_ext_(\w+)"', program.as_text() or ""))


def _calls(f: Callable[..., Any], *args: Any) -> list[str]:
    return _compiled(f, *args)[1]


def _same(ours: Any, theirs: Any, dtype: str, *, size: Any = None) -> None:
    """Equal to a few roundings of an entry, or of `size`, the magnitude of what it is the sum of."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert (np.isnan(a) == np.isnan(b)).all()
    special = ~np.isfinite(b)
    np.testing.assert_array_equal(a[special], b[special])
    a, b = np.where(special, 0, a), np.where(special, 0, b)
    size = np.abs(b) if size is None else np.maximum(np.nan_to_num(size), np.abs(b))
    # A half type's own smallest step on top.
    bound = CLOSE[dtype] * size + (2.0**-23 if dtype == "float16" else FLOOR)
    assert (np.abs(a - b) <= bound).all(), f"{np.max(np.abs(a - b) / bound)} times the bound"


def _known(results: Any, target: Any = None) -> list[Any]:
    """The results, the last two m and rest, which mean nothing where the row is ignored or, m, where rest is NaN."""
    *values, m, rest = map(np.asarray, results)
    if target is not None and not rows.is_soft(target):
        rest = np.where(np.asarray(target) == rows.IGNORED, np.nan, rest)
    return [*values, np.where(np.isnan(rest), rest, m), rest]


def _both(name: str, *arrays: Any, **on: Any) -> list[Any]:
    """A function of the rows and of the plain rows, in one program."""
    return jax.jit(lambda *arrays: [getattr(table, name)(*arrays, **on) for table in (rows, plain)], **QUICK)(*arrays)


def _inputs(dtype: str, layout: str) -> tuple[int, dict[str, Any]]:
    """Loud rows: a confident one, ties, -inf, NaN, +inf, an ignored and an invalid target."""
    axis, shape = LAYOUTS[layout]
    r = np.random.default_rng(len(shape))
    x = np.moveaxis(3 * r.standard_normal(shape), axis, -1).copy()
    flat, (*lead, classes) = x.reshape(-1, x.shape[-1]), x.shape
    target = r.integers(classes, size=len(flat))
    if len(flat) > 5:
        flat[0, target[0]] = 40.0
        flat[1, ::2] = flat[1].max() + 1
        flat[2, 1:20] = -np.inf
        flat[3, 5] = np.nan
        flat[5, 7] = np.nan
        target[2], target[4], target[5] = 0, rows.INVALID, rows.IGNORED
    wide = "float64" if dtype == "float64" else "float32"
    soft = r.random(x.shape) * (r.random(x.shape) < 0.6) * np.isfinite(x)
    back = functools.partial(np.moveaxis, source=-1, destination=axis)
    arrays = {
        "x": jnp.asarray(back(x), dtype),
        "dy": jnp.asarray(back(r.standard_normal(x.shape)), dtype),
        "target": jnp.asarray(target.reshape(lead), jnp.int32),
        "soft": jnp.asarray(back(soft), dtype),
        "weight": jnp.asarray(r.random(classes) + 0.1, wide),
        "up": [jnp.asarray(r.standard_normal(lead), wide) for _ in range(4)],
    }
    return axis, arrays


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_softmax_rows_are_the_plain_rows(dtype: str, layout: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        axis, a = _inputs(dtype, layout)
        x, dy, on = a["x"], a["dy"], {"axis": axis}
        assert _calls(functools.partial(rows.softmax_fwd, **on), x) == ["softmax_fwd"]
        (ours, y), wide = _both("softmax_fwd", x, **on), "float64" if dtype == "float64" else "float32"
        _same(ours, y, dtype)
        p, d = (np.asarray(v, float) for v in (y, dy))
        size = p * (np.abs(d) + np.abs(p * d).sum(axis, keepdims=True))
        back = _both("softmax_bwd", dy, y, **on)
        _same(back[0], back[1], dtype, size=size)
        ours, (*value, m, rest) = _both("log_softmax_fwd", x, **on)
        for one, other, kind in zip(_known(ours), _known((*value, m, rest)), (dtype, wide, wide), strict=True):
            _same(one, other, kind)
        size = np.abs(d) + p * np.abs(d).sum(axis, keepdims=True)
        back = _both("log_softmax_bwd", dy, x, m, rest, **on)
        _same(back[0], back[1], dtype, size=size)


OPTIONS: dict[str, dict[str, Any]] = {
    "labels": {},
    "scale": {"scale": 0.7},
    "cap": {"softcap": 5.0, "scale": 1.3},
    "weight": {"weight": True, "smooth": True},
    "soft": {"soft": True},
    "all": {"softcap": 5.0, "weight": True, "smooth": True, "entropy": True},
    "soft, all": {"soft": True, "softcap": 5.0, "weight": True, "smooth": True, "entropy": True},
}


# Every option in one layout, then a few in the other types and layouts: each is a compilation.
CASES = [(d, "last", o) for d in ("float64", "float32") for o in OPTIONS]
CASES += [(d, "last", o) for d in ("bfloat16", "float16") for o in ("labels", "all", "soft, all")]
CASES += [("float32", layout, o) for layout in LAYOUTS if layout != "last" for o in ("cap", "weight", "soft, all")]


@pytest.mark.parametrize(("dtype", "layout", "option"), CASES)
def test_cross_entropy_rows_are_the_plain_rows(dtype: str, layout: str, option: str) -> None:
    o = OPTIONS[option]
    smooth, entropy = o.get("smooth", False), o.get("entropy", False)
    on: dict[str, Any] = {"scale": o.get("scale", 1.0), "softcap": o.get("softcap")}
    with jax.enable_x64(dtype == "float64"):
        axis, a = _inputs(dtype, layout)
        on["axis"], wide = axis, "float64" if dtype == "float64" else "float32"
        arrays = a["x"], a["soft"] if o.get("soft") else a["target"], a["weight"] if o.get("weight") else None

        @functools.partial(jax.jit, **QUICK)
        def about(x: Any, weight: Any) -> Any:
            z = plain.capped(x, on["scale"], on["softcap"])
            return z, jax.nn.softmax(z, axis), plain.class_row(weight, z, axis)

        # A scaled or capped logit carries a rounding, which enters log p whole.
        z, p, w = (np.asarray(v, float) for v in about(a["x"], a["weight"]))
        top = np.max(np.where(np.isfinite(z), np.abs(z), 0.0), axis)
        mass = np.abs(np.asarray(arrays[1], float)).sum(axis) if o.get("soft") else 1.0
        mass = mass + (np.asarray(a["weight"], float).sum() if o.get("weight") else 0.0)
        size = None if option in ("labels", "soft", "weight") else top * mass
        ours, theirs = _both("cross_entropy_fwd", *arrays, **on, smooth=smooth, entropy=entropy)
        for one, other in zip(_known(ours, arrays[1]), _known(theirs, arrays[1]), strict=True):
            _same(one, other, wide, size=size)
        *_, m, rest = theirs
        up = [a["up"][0], a["up"][1], a["up"][2] if smooth else None, a["up"][3] if entropy else None]
        back = _both("cross_entropy_bwd", *arrays, m, rest, *up, **on)
        total = sum(np.abs(np.asarray(u, float)) for u in up if u is not None) * (1 + top) * (mass + 1)
        w = w if o.get("weight") else 0.0
        y = a["soft"] if o.get("soft") else np.expand_dims(np.asarray(a["target"]), axis) == np.indices(z.shape)[axis]
        size = np.expand_dims(total, axis) * (p + np.asarray(y, float) * (1 + w) + w)
        _same(back[0], back[1], dtype, size=size)
        if layout == "last":
            ignored, invalid = np.asarray(back[0], float)[5], np.asarray(back[0], float)[4]
            assert o.get("soft") or ((ignored == 0).all() and np.isnan(invalid).all())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("op", ["softmax", "log_softmax", "cross_entropy"])
def test_public_ops_on_kernels_are_the_reference(op: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        r = cases.rows(300, dtype)
        given: dict[str, Any] = {"input": r.x}
        up = r.dy
        options: dict[str, Any] = {}
        if op == "cross_entropy":
            given["target"], up, options = r.target, r.dloss, {"reduction": "none"}
        x, t = jnp.asarray(r.x, dtype), jnp.asarray(r.target)

        def run(x: Any, ct: Any) -> Any:
            f = getattr(jax_ops, op)
            y, pull = jax.vjp(lambda x: f(x, t, **options) if op == "cross_entropy" else f(x), x)
            return y, pull(ct.astype(y.dtype))[0]

        ct = jnp.asarray(up, "float32" if op == "cross_entropy" and dtype != "float64" else dtype)
        assert _calls(run, x, ct) == [f"{op}_bwd", f"{op}_fwd"]
        y, dx = jax.jit(run)(x, ct)
        upstream = {"value": up}
        truth = checks.oracle(op, given, upstream, **options)
        size = checks.scales(op, given, upstream, dtype=dtype, **options)
        checks.judge(op, dtype, ({"value": np.asarray(y, float)}, {"input": np.asarray(dx, float)}), truth, size)


X = np.random.default_rng(3).standard_normal((4, 9))
TARGET = np.array([1, -100, 8, 3])
WEIGHT = np.linspace(0.5, 1.5, 9)
STATS = ("entropy", "lse")


def _every(x: Any, w: Any = None) -> Any:
    # a copy: with one NumPy array a constant in both widths, JAX 0.10.2 once gave a float64 program the float32 buffer
    w = WEIGHT.copy() if w is None else w
    loss, stats = jax_ops.cross_entropy(x, TARGET, w, label_smoothing=0.1, softcap=3.0, z_loss=0.1, stats=STATS)
    return loss + 0.1 * sum(v.sum() for v in stats.values())


SCALARS: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda x: (jax_ops.softmax(x) * jnp.asarray(X, x.dtype)).sum(),
    "log_softmax": lambda x: (jax_ops.log_softmax(x) * jnp.asarray(X, x.dtype)).sum(),
    "cross_entropy": _every,
}


@pytest.mark.parametrize("op", SCALARS)
def test_where_the_kernels_run(op: str) -> None:
    f, x = SCALARS[op], jnp.asarray(X, jnp.float32)
    both = [f"{op}_bwd", f"{op}_fwd"]
    assert _calls(f, x) == both[1:]
    assert _calls(jax.value_and_grad(f), x) == both
    assert _calls(lambda x: jax.vmap(jax.value_and_grad(f))(jnp.stack([x, x])), x) == both
    assert set(_calls(jax.grad(jax.checkpoint(lambda x: f(2 * x))), x)) >= {f"{op}_bwd"}
    many = lambda x: jax.lax.scan(lambda c, s: (c + jax.grad(f)(s * x), None), x, jnp.arange(3.0))[0]  # noqa: E731
    assert f"{op}_bwd" in _calls(many, x)
    if op != "log_softmax":  # the tangent of softmax is its gradient's kernel, the loss's is plain
        assert _calls(lambda x: jax.jvp(f, (x,), (x,)), x) == (both if op == "softmax" else both[1:])


@pytest.mark.parametrize("op", SCALARS)
def test_exports_hold_no_call_of_ours(op: str) -> None:
    program = export.export(jax.jit(jax.value_and_grad(SCALARS[op])))(jax.ShapeDtypeStruct(X.shape, jnp.float32))
    assert "softmax_ext" not in program.mlir_module()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_nothing_to_do_is_not_for_a_kernel(shape: tuple[int, ...]) -> None:
    assert not _calls(jax_ops.softmax, jnp.ones(shape))


@pytest.fixture
def plain_only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A switch to the plain rows, as on a machine where the library is missing."""

    def switch() -> None:
        jax.clear_caches()
        monkeypatch.setattr(native, "missing", "for this test")

    yield switch
    jax.clear_caches()


ORDERS: dict[str, Callable[[Callable[[Any], Any]], Callable[[Any], Any]]] = {
    "grad": jax.grad,
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1],
    "hessian": jax.hessian,
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "vmap(grad)": lambda f: lambda x: jax.vmap(jax.grad(f), 1, 1)(jnp.stack([x, 2 * x], 1)),
}


@pytest.mark.long
def test_derivatives_on_kernels_are_the_plain_ones(plain_only: Callable[[], None]) -> None:
    with jax.enable_x64(True):

        def answers() -> list[Any]:
            def every(x: Any) -> Any:
                return [make(f)(x) for make in ORDERS.values() for f in SCALARS.values()]

            program, calls = _compiled(every, X)
            assert bool(calls) is not bool(native.missing)
            return program(X)

        ours = answers()
        plain_only()
        for one, other in zip(ours, answers(), strict=True):
            assert np.abs(other).max() > 1e-3
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)


def test_one_weight_for_each_example_under_vmap() -> None:
    with jax.enable_x64(True):
        x, weight = np.stack([X, -X, X[::-1]]), WEIGHT.copy()
        w = np.stack([weight, weight[::-1], weight])
        f = jax.value_and_grad(_every, (0, 1))
        shared, each = jax.vmap(f, (0, None)), jax.vmap(f)
        assert _calls(shared, x, weight) == ["cross_entropy_bwd", "cross_entropy_fwd"]
        assert not _calls(each, x, w)
        f = jax.jit(f)
        for batched, weights in ((jax.jit(shared)(x, weight), [weight] * 3), (jax.jit(each)(x, w), w)):
            single = [f(a, b) for a, b in zip(x, weights, strict=True)]
            for one, *others in zip(jax.tree.leaves(batched), *map(jax.tree.leaves, single), strict=True):
                np.testing.assert_allclose(one, np.stack(others), rtol=1e-12, atol=1e-14)


def test_soft_targets_of_another_type() -> None:
    y = np.random.default_rng(4).random(X.shape)
    for dtype, other in (("float32", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "float32")):
        x, t = jnp.asarray(X, dtype), jnp.asarray(y, other)
        f = lambda x, t: jax_ops.cross_entropy(x, t)  # noqa: E731
        assert _calls(f, x, t) == ["cross_entropy_fwd"]
        truth = reference.cross_entropy(np.asarray(x, float), np.asarray(t, float))
        np.testing.assert_allclose(f(x, t), truth, rtol=1e-6)


SEVERAL = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_ops

mesh = jax.make_mesh((2,), ("b",))
x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32)), jnp.float32)
xs, t = jax.device_put(x, NamedSharding(mesh, P("b"))), jnp.arange(8)
f = jax.value_and_grad(lambda x: jax_ops.cross_entropy(x, t, reduction="sum"))

def calls(g, x):
    return len(re.findall("softmax_ext_", jax.jit(g).lower(x).as_text()))

assert calls(f, x) > 0
assert calls(f, xs) == 0  # XLA partitions this one itself
def local(x):
    return jax.grad(lambda x: (jax_ops.softmax(x) ** 2).sum())(x)
for check in (True, False):  # here every device runs its own program
    each = jax.shard_map(local, mesh=mesh, in_specs=P("b"), out_specs=P("b"), check_vma=check)
    assert calls(each, xs) > 0
    np.testing.assert_allclose(jax.jit(each)(xs), local(x), rtol=1e-6, atol=1e-8)
np.testing.assert_allclose(jax.jit(f)(xs)[1], f(x)[1], rtol=1e-5, atol=1e-7)
mapped = jax.jit(jax.vmap(lambda x: jax_ops.softmax(x)))
np.testing.assert_allclose(mapped(xs), jax_ops.softmax(x), rtol=1e-6)
print("several devices checked")
"""


def test_several_devices() -> None:
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command, root = [sys.executable, "-c", SEVERAL], Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, check=False)
    assert done.stdout.strip() == "several devices checked", done.stderr[-3000:]


def test_a_library_newer_than_the_runtime_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_interface", lambda: (0, -1))
    library, why = native._find()
    assert library is None
    assert "FFI version" in why
