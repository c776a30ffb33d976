"""Section 7 of the contract for jax_ops.linear_cross_entropy: every transform, and what only JAX has."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from jax import export, lax  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops import _chunks  # noqa: E402
from jax_ops import _native as native  # noqa: E402
from softmax_ext import reference  # noqa: E402
from tests.judging.quick import FLAGS, QUICK, run  # noqa: E402

N, D, V = 5, 3, 7
TARGET = np.array([1, -100, 4, 6, 0])
R = np.random.default_rng(11)
IN = {
    "x": R.uniform(-1, 1, (N, D)),
    "w": R.uniform(-1, 1, (V, D)),
    "b": R.uniform(-1, 1, V),
    "y": R.uniform(0.1, 1.1, (N, V)),
    "cw": R.uniform(0.5, 1.5, V),
    "tw": R.uniform(0.5, 1.5, N),
}
OPTIONS: dict[str, Any] = {"label_smoothing": 0.2, "logit_scale": 0.7, "softcap": 3.0, "z_loss": 0.1}
STATS = ("lse", "entropy")
UP = np.linspace(-1.0, 2.0, N * D).reshape(N, D)
# Chunks of 3 overlap in 5 rows and in 7 classes.
MODES: dict[str, dict[str, Any]] = {
    "fast": {"memory": "fast", "chunk_size": 3},
    "fast, rows": {"memory": "fast", "chunk_size": 3, "stats": STATS},
    "lean": {"memory": "lean", "chunk_size": 3, "stats": STATS},
}


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _total(out: Any) -> Any:
    """One number that every result enters."""
    loss, stats = out if isinstance(out, tuple) else (out, {})
    return loss.sum() + sum((0.3 + 0.2 * i) * v.sum() for i, v in enumerate(stats.values()))


def _head(
    mode: str, x: Any, w: Any, b: Any = None, t: Any = TARGET, cw: Any = None, tw: Any = None, **options: Any
) -> Any:
    given = {"linear_bias": b, "weight": cw, "token_weight": tw}
    return _total(jax_ops.linear_cross_entropy(x, w, t, **given, **MODES[mode], **options))


def _composed(
    mode: str, x: Any, w: Any, b: Any = None, t: Any = TARGET, cw: Any = None, tw: Any = None, **options: Any
) -> Any:
    """The same, with all of the logits and JAX's own derivatives."""
    z = x @ w.T + (0 if b is None else b)
    o = {"label_smoothing": 0.0, "logit_scale": 1.0, "softcap": None, "z_loss": 0.0} | options
    z = z * o["logit_scale"]
    z = z if o["softcap"] is None else o["softcap"] * jnp.tanh(z / o["softcap"])
    logp, lse = jax.nn.log_softmax(z), jax.nn.logsumexp(z, -1)
    soft = t.ndim == 2
    kept = np.ones(N, bool) if soft else t >= 0
    cw, tw = jnp.ones(V) if cw is None else cw, jnp.ones(N) if tw is None else tw
    y = t * cw if soft else jax.nn.one_hot(t, V, dtype=z.dtype) * cw
    s = o["label_smoothing"]
    rows = -(((1 - s) * y + s / V * cw) * logp).sum(-1) + o["z_loss"] * lse**2
    share = tw if soft else cw[t.clip(0)] * tw
    loss = jnp.where(kept, rows * tw, 0.0).sum() / jnp.where(kept, share, 0.0).sum()
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    stats = {"lse": jnp.where(kept, lse, 0.0), "entropy": jnp.where(kept, entropy, 0.0)}
    return _total((loss, stats) if "stats" in MODES[mode] else loss)


def _full(fn: Any, mode: str, soft: bool) -> Callable[..., Any]:
    t = IN["y"] if soft else TARGET
    return lambda x, w: fn(mode, x, w, IN["b"], t, IN["cw"], IN["tw"], **OPTIONS)


def _along(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w: jax.jvp(f, (x, w), (jnp.cos(x), jnp.sin(w)))[1]


def _scanned(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w: lax.scan(lambda c, s: (c + f(s * x, w), None), jnp.zeros(()), jnp.arange(1.0, 3.0))[0]


def _linearized(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, w: Any) -> Any:
        out, push = jax.linearize(f, x, w)
        return out + push(jnp.cos(x), jnp.sin(w))

    return run


def _both(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(f, (0, 1))


def _two(x: Any) -> Any:
    return jnp.stack([x, 2 * x])


Transform = Callable[[Callable[..., Any]], Callable[..., Any]]
TRANSFORMS: dict[str, Transform] = {
    "value": lambda f: f,
    "grad": _both,
    "jvp": _along,
    "linearize": _linearized,
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1)),
    "hessian": lambda f: jax.hessian(f, (0, 1)),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f, (0, 1)), (0, 1)),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f, (0, 1)), (0, 1)),
    "hvp": lambda f: _along(_both(f)),
    "vmap": lambda f: lambda x, w: jax.vmap(f, (0, None))(_two(x), w),
    "vmap(grad)": lambda f: lambda x, w: jax.vmap(_both(f), (0, None))(_two(x), w),
    "vmap(grad) of heads": lambda f: lambda x, w: jax.vmap(_both(f), (None, 0))(x, _two(w)),
    "vmap(jvp)": lambda f: lambda x, w: jax.vmap(lambda v: jax.jvp(f, (x, w), (v, w))[1])(_two(x)),
    "grad(vmap)": lambda f: _both(lambda x, w: jax.vmap(f, (0, None))(_two(x), w).sum()),
    "grad(checkpoint)": lambda f: _both(jax.checkpoint(f)),
    "hvp(checkpoint)": lambda f: _along(_both(jax.checkpoint(f))),
    "scan": _scanned,
    "grad(scan)": lambda f: _both(_scanned(f)),
    "jvp(scan)": lambda f: _along(_scanned(f)),
    "grad(jit)": lambda f: _both(jax.jit(f)),
    "forward 3": lambda f: _along(_along(_along(f))),
    "reverse 3": lambda f: _both(
        lambda x, w: (jax.grad(lambda x: (jax.grad(f)(x, w) * UP).sum())(x) * UP).sum(),
    ),
}


def _same(ours: Any, theirs: Any, tol: float = 1e-10) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.isfinite(b).all()
        assert np.abs(b).max() > 1e-3, "the truth is too small for the comparison to see anything"
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@functools.cache
def _answers(mode: str, soft: bool) -> list[dict[str, Any]]:
    """Every transform of ours and of the composition, each in one program."""
    fns = [_full(fn, mode, soft) for fn in (_head, _composed)]
    names = [t for m, s, t in CASES if (m, s) == (mode, soft)]
    run = [jax.jit(lambda x, w, f=f: {k: TRANSFORMS[k](f)(x, w) for k in names}, **QUICK) for f in fns]
    return [f(jnp.asarray(IN["x"]), jnp.asarray(IN["w"])) for f in run]


# Every transform on the default way; on the others those that their own rules answer, the rest being `analytic`'s.
SOME = ("value", "grad", "jvp", "jacrev of jacrev", "hvp", "vmap(grad)", "grad(vmap)", "grad(scan)", "reverse 3")
FEW = ("grad", "jacrev of jacrev", "jvp")
LABELS = {"fast": tuple(TRANSFORMS), "fast, rows": SOME, "lean": SOME}
CASES = [(mode, soft, t) for mode in MODES for soft in (False, True) for t in (FEW if soft else LABELS[mode])]


@pytest.mark.parametrize(("mode", "soft", "transform"), CASES)
@pytest.mark.long
def test_transform_agrees_with_the_composition(mode: str, soft: bool, transform: str) -> None:
    ours, theirs = _answers(mode, soft)
    _same(ours[transform], theirs[transform])


CHECKED: dict[str, list[str]] = {"labels": ["x", "w", "b", "cw", "tw"], "soft": ["x", "w", "b", "y", "cw", "tw"]}


def check(mode: str, kind: str, order: int) -> None:
    names = CHECKED[kind]

    def f(*arrays: Any) -> Any:
        given = dict(zip(names, arrays, strict=True))
        return _head(mode, **{"t": TARGET, **{("t" if k == "y" else k): v for k, v in given.items()}}, **OPTIONS)

    check_grads(jax.jit(f), [IN[name] for name in names], order, ("fwd", "rev"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", CHECKED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.long
def test_check_grads(mode: str, kind: str) -> None:
    check(mode, kind, 1)


# The composition above judges the other second derivatives.
SECOND = """
from tests.head import test_jax as here
for case in (("fast", "labels"), ("lean", "soft")):
    print(case, flush=True)
    here.check(*case, 2)
print("all checked")
"""


@pytest.mark.slow
def test_check_grads_of_order_2() -> None:
    run(SECOND)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.long
def test_transform_without_jit(mode: str) -> None:
    f, g = _full(_head, mode, False), _full(_composed, mode, False)
    _same(_both(f)(IN["x"], IN["w"]), _both(g)(IN["x"], IN["w"]))
    _same(jax.grad(f)(IN["x"], IN["w"]), jax.grad(g)(IN["x"], IN["w"]))


# --- what is computed, and what is kept


def _primitives(f: Any, *args: Any) -> list[tuple[str, int, Any]]:
    """(name, times it runs, equation) of everything in the program, loops counted."""
    found = []

    def walk(jaxpr: Any, times: int) -> None:
        for eqn in jaxpr.eqns:
            found.append((eqn.primitive.name, times, eqn))
            inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
            for sub in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
            ):
                if hasattr(sub, "jaxpr"):
                    walk(sub.jaxpr, inner)
                elif hasattr(sub, "eqns"):
                    walk(sub, inner)
            if eqn.primitive.name == "softmax_ext_either":
                walk(jax.make_jaxpr(eqn.params["whole"])(*[v.aval for v in eqn.invars]).jaxpr, inner)

    walk(jax.make_jaxpr(f)(*args).jaxpr, 1)
    return found


def _compiled(f: Any, *args: Any) -> Any:
    return jax.jit(f, **QUICK).lower(*args).compile()  # its temporary memory is to the byte that of a real compilation


MIB = 2**20


def _shapes(dtype: str, rows: int = 1024, features: int = 64, classes: int = 16384) -> list[Any]:
    """Of 64 MiB of float32 logits, and a weight of 4."""
    kinds = (((rows, features), dtype), ((classes, features), dtype), ((classes,), dtype), ((rows,), "int32"))
    return [jax.ShapeDtypeStruct(s, k) for s, k in kinds]


# Half of the logits at a time; in primes of rows and classes the halves overlap.
HALVES: dict[str, dict[str, Any]] = {
    "fast": {"chunk_size": 512},
    "fast, z-loss": {"chunk_size": 512, "z_loss": 1e-4},
    "fast, none": {"chunk_size": 512, "reduction": "none"},
    "lean": {"memory": "lean", "chunk_size": 8192},
    "lean, entropy": {"memory": "lean", "chunk_size": 8192, "stats": ("entropy",)},
}


def _halved(name: str, wrt: tuple[int, ...]) -> Callable[..., Any]:
    def f(x: Any, w: Any, b: Any, t: Any) -> Any:
        return _total(jax_ops.linear_cross_entropy(x, w, t, linear_bias=b, **HALVES[name]))

    return jax.value_and_grad(f, wrt)


def _temporary(f: Any, *args: Any) -> float:
    return _compiled(f, *args).memory_analysis().temp_size_in_bytes / MIB


@pytest.mark.skipif(bool(native.missing), reason=native.missing)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", HALVES)
@pytest.mark.long
def test_temporary_memory_is_a_chunk_and_one_weight(name: str, uneven: bool, dtype: str) -> None:
    """A second chunk or a second weight would be seen: each is larger than the 16 MiB left over."""
    with jax.enable_x64(False):
        args = _shapes(dtype, 1021 if uneven else 1024, 320, 16381 if uneven else 16384)
        chunk, weight = 32, 20
        slices = weight / 2 if "lean" in name else 0  # of the weight itself, beside those of the logits
        assert _temporary(_halved(name, (0, 1, 2)), *args) <= chunk + weight + 16
        assert _temporary(_halved(name, (0,)), *args) <= chunk + slices + 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporary_memory_with_a_frozen_weight(dtype: str) -> None:
    def ours(x: Any, w: Any, b: Any, t: Any) -> Any:
        return jax_ops.linear_cross_entropy(x, w, t, linear_bias=b, chunk_size=64)

    def built_in(x: Any, w: Any, b: Any, t: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(x @ w.T + b, t).mean()

    with jax.enable_x64(False):
        args = _shapes(dtype)
        used, theirs = (_temporary(jax.value_and_grad(f), *args) for f in (ours, built_in))
        assert used <= theirs / 10


ORDER_2: dict[str, Callable[[Any], Any]] = {
    "jvp(grad)": lambda g: lambda x, w: jax.jvp(jax.grad(g, (0, 1)), (x, w), (x, w))[1],
    "grad(grad)": lambda g: jax.grad(lambda x, w: sum((v**2).sum() for v in jax.grad(g, (0, 1))(x, w)), (0, 1)),
}


@pytest.mark.parametrize("order", ORDER_2)
@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_keep_no_logits(mode: str, order: str) -> None:
    given: dict[str, Any] = MODES[mode] | {"chunk_size": 512 if "lean" in mode else 32}

    def run(x: Any, w: Any, t: Any) -> Any:
        return ORDER_2[order](lambda x, w: _total(jax_ops.linear_cross_entropy(x, w, t, **given)))(x, w)

    with jax.enable_x64(False):
        x, w, _, t = _shapes("float32")
        assert _temporary(run, x, w, t) <= 48  # the logits alone are 64, a chunk of them 2 and the weight 4


def test_frozen_arguments_cost_no_matmul() -> None:
    """Outside of jit too: two matmuls for the input's gradient, one for none."""
    x, w = jnp.asarray(IN["x"]), jnp.asarray(IN["w"])
    f = lambda x, w: jax_ops.linear_cross_entropy(x, w, TARGET)  # noqa: E731

    def matmuls(g: Any) -> int:
        return sum(times for name, times, _ in _primitives(g, x, w) if name == "dot_general")

    assert matmuls(f) == 1
    assert matmuls(jax.grad(f)) == 2
    assert matmuls(jax.grad(f, 1)) == 2
    assert matmuls(jax.grad(f, (0, 1))) == 3
    none = lambda x, w: jax_ops.linear_cross_entropy(x, w, TARGET, reduction="none").sum()  # noqa: E731
    assert matmuls(jax.grad(none)) == 3
    assert matmuls(jax.grad(none, (0, 1))) == 4
    lean = lambda x, w: jax_ops.linear_cross_entropy(x, w, TARGET, memory="lean")  # noqa: E731
    assert matmuls(jax.grad(lean, (0, 1))) == 4


@pytest.mark.parametrize("mode", MODES)
def test_examples_under_vmap_share_the_weight(mode: str) -> None:
    """No array of the examples times the weight but the per-example gradients of it."""
    xs, t = jnp.ones((6, N, D)), TARGET
    f = jax.vmap(jax.grad(lambda x, w: _head(mode, x, w, t=t)), (0, None))
    for _, _, eqn in _primitives(f, xs, jnp.asarray(IN["w"])):
        assert not [v for v in eqn.outvars if getattr(v.aval, "shape", ())[-3:] == (6, V, D)]


@pytest.mark.skipif(bool(native.missing), reason=native.missing)
def test_the_kernels_run() -> None:
    with jax.enable_x64(False):
        args = _shapes("float32")
        texts = {name: _compiled(_halved(name, (0, 1)), *args).as_text() for name in ("fast", "fast, z-loss", "lean")}
        assert 'custom_call_target="softmax_ext_cross_entropy_fwd_bwd"' in texts["fast"]
        for name in ("fast, z-loss", "lean"):
            assert 'custom_call_target="softmax_ext_cross_entropy_fwd"' in texts[name]
            assert 'custom_call_target="softmax_ext_cross_entropy_bwd"' in texts[name]


# --- numbers


def _random(n: int, d: int, v: int, dtype: str, scale: float = 1.0) -> tuple[Any, Any, Any]:
    r = np.random.default_rng(n)
    x, w = jnp.asarray(r.normal(size=(n, d)), dtype), jnp.asarray(r.normal(size=(v, d)) * scale, dtype)
    return x, w, jnp.asarray(r.integers(v, size=n))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weight_gradient_is_as_exact_in_many_chunks(dtype: str) -> None:
    """Accumulated in float32 (bug 6): 128 chunks err as one."""
    with jax.enable_x64(False):
        x, w, t = _random(256, 16, 33, dtype)
    wide = [np.asarray(a, np.float64) for a in (x, w)]
    _, truth, _ = reference.linear_cross_entropy_grad(wide[0], wide[1], np.asarray(t))
    errors = []
    with jax.enable_x64(False):
        for size in (256, 2):
            f = jax.jit(jax.grad(lambda w, size=size: jax_ops.linear_cross_entropy(x, w, t, chunk_size=size)))
            errors.append(np.abs(np.asarray(f(w), np.float64) - truth).max() / np.abs(truth).max())
    assert errors[1] <= 1.2 * errors[0] + 2.0**-22
    assert errors[0] < {"float32": 1e-6, "bfloat16": 4e-3, "float16": 6e-4}[dtype]


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_float16_gradients_are_scaled_after_the_matmul(memory: str) -> None:
    """1/N folded into float16 dlogits would flush most of them to zero."""
    with jax.enable_x64(False):
        x, w, t = _random(2048, 4, 600, "float16", 0.1)
        f = lambda x, w: jax_ops.linear_cross_entropy(x, w, t, memory=memory) * 4096.0  # noqa: E731
        dx, dw = jax.jit(jax.grad(f, (0, 1)), **QUICK)(x, w)
    tx, tw, _ = reference.linear_cross_entropy_grad(
        np.asarray(x, float), np.asarray(w, float), np.asarray(t), dloss=4096.0
    )
    np.testing.assert_allclose(np.asarray(dx, float), tx, atol=4e-3 * np.abs(tx).max())
    np.testing.assert_allclose(np.asarray(dw, float), tw, atol=2e-3 * np.abs(tw).max())


@pytest.mark.parametrize(("memory", "stats"), [("fast", ()), ("fast", STATS), ("lean", STATS)])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_chunk_sizes_change_nothing(size: int, memory: str, stats: tuple[Any, ...]) -> None:
    f = lambda size: jax.jit(  # noqa: E731
        jax.value_and_grad(
            lambda x, w: _total(
                jax_ops.linear_cross_entropy(x, w, TARGET, memory=memory, chunk_size=size, stats=stats)
            ),
            (0, 1),
        ),
        **QUICK,
    )(IN["x"], IN["w"])
    _same(f(size), f(None), 1e-13)


def test_lean_is_bitwise_reproducible() -> None:
    with jax.enable_x64(False):
        x, w, t = _random(64, 16, 300, "float32")
        f = jax.jit(jax.grad(lambda x, w: jax_ops.linear_cross_entropy(x, w, t, memory="lean", chunk_size=70), (0, 1)))
        first = f(x, w)
        for _ in range(3):
            for a, b in zip(f(x, w), first, strict=True):
                np.testing.assert_array_equal(a, b)


def _masked(classes: list[int]) -> Any:
    return np.where(np.isin(np.arange(V), classes), -np.inf, IN["b"])


@functools.cache
def _capped(mode: str) -> Any:
    """Derivatives of the loss over some of the classes, in one program for all biases and targets."""

    def run(x: Any, w: Any, classes: Any, b: Any, t: Any) -> Any:
        f = lambda x, w: _head(mode, x, w[classes], b, t, softcap=3.0)  # noqa: E731
        return {k: TRANSFORMS[k](f)(x, w) for k in ("grad", "hvp", "jacrev of jacrev")}

    return jax.jit(run, **QUICK)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gone", [[2, 3], [5, 6], [0, 1]], ids=str)
@pytest.mark.long
def test_masked_classes_are_as_absent(gone: list[int], mode: str) -> None:
    """A whole slice of them too, the first, a middle or the last one (bug 3)."""
    few = np.setdiff1d(np.arange(V), gone)
    target = np.array([few[0], -100, few[1], few[-1], few[2]])
    fewer = np.array([0, -100, 1, len(few) - 1, 2])
    ours = _capped(mode)(IN["x"], IN["w"], np.arange(V), _masked(gone), target)
    theirs = _capped(mode)(IN["x"], IN["w"], few, IN["b"][few], fewer)
    for transform, truth in theirs.items():
        _same(ours[transform], truth)


def test_a_masked_slice_and_what_holds_the_value() -> None:
    """Derivatives of the value by soft targets and class weights: a slice of -inf makes none of them NaN."""
    b, y = _masked([0, 1, 2, 4]), np.where(np.isin(np.arange(V), [0, 1, 2, 4]), 0.0, IN["y"])

    def second(mode: str) -> Any:
        def of_both(y: Any, cw: Any) -> Any:
            f = lambda y, cw: _head(mode, IN["x"], IN["w"], b, y, cw)  # noqa: E731
            value, gradient = jax.value_and_grad(f, (0, 1))(y, cw)
            return value + sum(jnp.square(g).sum() for g in gradient)

        return jax.jit(jax.grad(of_both, (0, 1)), **QUICK)(y, IN["cw"])

    _same(second("lean"), second("fast, rows"))


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_bad_rows_stay_alone(memory: str) -> None:
    x = IN["x"].copy()
    x[2] = np.nan
    x[3] = np.inf  # its logits are +-inf
    target = np.array([1, 0, 4, 6, 99])
    run = lambda x: jax_ops.linear_cross_entropy(  # noqa: E731
        x, IN["w"], target, reduction="none", stats=("lse", "entropy", "argmax"), memory=memory, chunk_size=2
    )
    loss, stats = jax.jit(run)(x)
    assert np.isnan(loss).tolist() == [False, False, True, True, True]
    assert np.isnan(stats["lse"]).tolist() == [False, False, True, True, False]
    assert np.isnan(stats["entropy"]).tolist() == [False, False, True, True, False]
    dx = jax.jit(jax.grad(lambda x: run(x)[0].sum()))(x)
    assert np.isnan(dx).any(1).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_confident_rows_keep_loss_and_gradient(memory: str) -> None:
    """exp(-60), not 0, wherever the slices of the classes lie; under an offset of 1e4 as well (bug 7)."""
    with jax.enable_x64(False):
        for offset in (0.0, 1e4):
            w = np.zeros((V, D), np.float32)
            w[3, 0] = 60.0
            b = np.full(V, offset, np.float32)
            x = np.ones((1, D), np.float32)
            f = jax.value_and_grad(
                lambda b, x=x, w=w: jax_ops.linear_cross_entropy(
                    x, w, np.array([3]), linear_bias=b, memory=memory, chunk_size=2
                )
            )
            loss, db = jax.jit(f)(b)
            want = 6 * np.exp(-60.0)
            np.testing.assert_allclose(loss, want, rtol=1e-5)
            np.testing.assert_allclose(db[3], -want, rtol=1e-5)


def test_argmax_of_ties_is_the_first() -> None:
    w = np.zeros((V, D))
    w[[2, 5]] = 1.0
    modes: list[dict[str, Any]] = [{"memory": m, "chunk_size": c} for m, c in (("fast", 2), ("lean", 2), ("lean", 3))]
    for mode in modes:
        _, stats = jax_ops.linear_cross_entropy(np.ones((N, D)), w, TARGET, stats=("argmax",), **mode)
        np.testing.assert_array_equal(stats["argmax"], [2, -1, 2, 2, 2])


@pytest.mark.long
def test_chunks_cover_everything_once() -> None:
    for size in range(9):
        for largest in range(1, 10):
            for strided in (False, True):
                cut = _chunks.cut(size, largest, strided=strided)
                x = jnp.arange(size)
                out = cut.loop(lambda c, p, cut=cut, x=x: cut.put(c, cut.take(c, p) + 1 + cut.take(x, p), p), x * 0)
                np.testing.assert_array_equal(out, np.arange(size) + 1)
                assert cut.each <= largest
    # On 4 devices each has as many rows of every chunk, be they fewer than asked for, or one where those were too few.
    sizes = {(7, 30): (28, 1), (6, 14): (12, 2), (6, 3): (4, 6), (7, 12): (12, 3)}
    for (own, largest), (each, count) in sizes.items():
        strided = each * count == 4 * own
        assert _chunks.cut(4 * own, largest, strided=True, blocks=4) == _chunks.Cut(4 * own, each, count, strided)
    assert _chunks.cut(2048, 1000).each == 512
    assert _chunks.cut(7, 3) == _chunks.Cut(7, 3, 3)


# --- export and several devices


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.long
def test_export(memory: str) -> None:
    def run(x: Any, w: Any, t: Any) -> Any:
        f = lambda x, w: jax_ops.linear_cross_entropy(x, w, t, memory=memory, chunk_size=2, softcap=3.0)  # noqa: E731
        return f(x, w), *jax.grad(f, (0, 1))(x, w)

    (n,) = export.symbolic_shape("n")
    for rows in (N, n):
        shapes = [jax.ShapeDtypeStruct(s, np.float64) for s in ((rows, D), (V, D))]
        program = export.export(jax.jit(run))(*shapes, jax.ShapeDtypeStruct((rows,), np.int64))
        assert "softmax_ext" not in program.mlir_module()
        _same(program.call(IN["x"], IN["w"], TARGET), jax.jit(run)(IN["x"], IN["w"], TARGET))


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax import shard_map
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_ops

assert jax.device_count() == 8
jax_ops._linear._TILE = 2000  # of rows and classes several pieces, as at real sizes
r = np.random.default_rng(0)
n, d, v = 64, 8, 24
x, w, b = (jnp.asarray(r.normal(size=s), jnp.float32) for s in ((n, d), (v, d), (v,)))
t = jnp.asarray(r.integers(v, size=n)).at[3].set(-100)
CASES = {
    "fast": {"chunk_size": 16},
    "fast, all": {"chunk_size": 32, "label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.1, "stats": ("entropy", "lse")},
    "none": {"chunk_size": 16, "reduction": "none"},
    "lean": {"memory": "lean", "chunk_size": 10, "stats": ("entropy",), "label_smoothing": 0.1},
}

def loss(k, x, w, b, t, **more):
    out = jax_ops.linear_cross_entropy(x, w, t, linear_bias=b, **{**CASES[k], **more})
    value, stats = out if isinstance(out, tuple) else (out, {})
    return value.sum() + 0.1 * sum(s.sum() for s in stats.values())

def same(a, c):
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(c), strict=True):
        assert np.abs(q).max() > 1e-3
        np.testing.assert_allclose(p, q, rtol=3e-5, atol=3e-5)

def gathers_nothing(f, *args):
    compiled = jax.jit(f).lower(*args).compile()
    text = compiled.as_text()
    used = set(re.findall(r"(all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)", text))
    assert used <= {"all-reduce"}, (k, used)
    return compiled(*args), text

mesh = jax.make_mesh((8,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
explicit = jax.make_mesh((8,), ("b",))
xs, ts = (jax.device_put(a, NamedSharding(mesh, P("b"))) for a in (x, t))
on = lambda a, spec: jax.device_put(a, NamedSharding(explicit, spec))
xe, te, we, be = on(x, P("b")), on(t, P("b")), on(w, P()), on(b, P())
for k in CASES:
    f = jax.value_and_grad(lambda x, w, b, t: loss(k, x, w, b, t), (0, 1, 2))
    truth = jax.jit(f)(x, w, b, t)
    out, text = gathers_nothing(f, xs, w, b, ts)
    shapes = re.findall(r"= f32\\[([\\d,]*)\\]\\S* all-reduce\\(", text)
    sizes = {int(np.prod([int(i) for i in s.split(",") if i])) for s in shapes}
    assert k != "fast" or sizes <= {1, v, v * d, d}, (k, sizes)  # the loss, dW (by pieces or columns) and db
    same(out, truth)
    assert out[1][0].sharding.is_equivalent_to(xs.sharding, 2), k
    if k in ("fast", "none"):
        out, _ = gathers_nothing(f, xe, we, be, te)
        same(out, truth)
        assert [jax.typeof(g).sharding.spec for g in out[1]] == [P("b", None), P(None, None), P(None)], k
    total = jax.value_and_grad(lambda x, w, b, t: loss(k, x, w, b, t, reduction="sum"), (0, 1, 2))
    truth = jax.jit(total)(x, w, b, t)
    for vma in (True, False):
        specs = dict(mesh=mesh, in_specs=(P("b"), P(), P(), P("b")), check_vma=vma)
        outer = shard_map(lambda *a: jax.lax.psum(loss(k, *a, reduction="sum"), "b"), out_specs=P(), **specs)
        same(jax.jit(jax.value_and_grad(outer, (0, 1, 2)))(xs, w, b, ts), truth)

# Explicit axes: fewer rows in a chunk than devices, smoothed weights, soft targets, second derivatives.
k, cw, y = "more", *(jnp.asarray(r.uniform(0.5, 1.5, s), jnp.float32) for s in (v, (n, v)))
def hard(x, w, cw, t):
    return jax_ops.linear_cross_entropy(x, w, t, weight=cw, label_smoothing=0.1, chunk_size=3)
def soft(x, w, cw, y):
    return jax_ops.linear_cross_entropy(x, w, y, weight=cw, memory="lean", chunk_size=10)
def more(x, w, cw, t, y):
    hessian_vector = jax.jvp(lambda w: jax.grad(hard, (0, 1))(x, w, cw, t), (w,), (w,))
    return hessian_vector, jax.grad(soft, (0, 1, 2, 3))(x, w, cw, y)
same(gathers_nothing(more, xe, we, on(cw, P()), te, on(y, P("b")))[0], jax.jit(more)(x, w, cw, t, y))
none = lambda x, w, t: jax_ops.linear_cross_entropy(x, w, t, reduction="none", stats=["lse"])
rows = jax.eval_shape(none, xe, we, te)
assert [a.sharding.spec for a in jax.tree.leaves(rows)] == [P("b"), P("b")], rows
print("all sharded checks ran")
"""


@pytest.mark.long
def test_batch_sharding_gathers_nothing() -> None:
    flags = f"--xla_force_host_platform_device_count=8 {FLAGS}"
    env = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command, root = [sys.executable, "-c", SHARDED], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "all sharded checks ran"
