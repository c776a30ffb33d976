"""JAX wherever JAX goes: parts of programs, policies, platforms, other processes, meshes, shared operands.

Each kind has a saboteur: the fault is put back, and what the test asserts must no longer hold.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
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
from jax.ad_checkpoint import print_saved_residuals  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._rows import native, plain, primitive  # noqa: E402
from jax_ops._rules import autodiff  # noqa: E402
from tests.judging import quick  # noqa: E402

R = np.random.default_rng(0)
N, V, D = 4, 7, 5
X, H, W, B = (R.normal(size=s).astype("f") for s in ((N, V), (N, D), (V, D), (V,)))
CW, T = R.uniform(0.5, 1.5, V).astype("f"), np.array([0, 6, -100, 3])
SOFT = R.uniform(0.1, 1.0, (N, V)).astype("f")


def _head(x: Any, w: Any = W, **options: Any) -> Any:
    return jax_ops.linear_cross_entropy(x, jnp.asarray(w, x.dtype), T, **options)


def _bias(x: Any, memory: Any) -> Any:
    bias, cw = jnp.asarray(B, x.dtype), CW
    return _head(x, linear_bias=bias, weight=cw, label_smoothing=0.1, softcap=4.0, memory=memory, chunk_size=3)


def _stats(x: Any) -> Any:
    names = ("lse", "entropy", "logprob")
    loss, stats = jax_ops.cross_entropy(x, T, CW, label_smoothing=0.1, z_loss=0.1, softcap=3.0, stats=names)
    return loss + sum(s.sum() for s in stats.values())


ZOO: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "softmax": (lambda x: (jax_ops.softmax(x, where=X < 1.5) ** 2).sum(), X),
    "log_softmax": (lambda x: (jax_ops.log_softmax(x, (0, 1)) ** 2).sum(), X),
    "cross_entropy": (lambda x: jax_ops.cross_entropy(x, jnp.asarray(T)), X),
    "every option": (_stats, X),
    "soft targets": (lambda x: jax_ops.cross_entropy(x, SOFT, CW, token_weight=CW[:N]), X),
    "optax, labels": (lambda x: jax_ops.softmax_cross_entropy_with_integer_labels(x, T % V, where=X < 2).sum(), X),
    "optax, dense": (lambda x: jax_ops.softmax_cross_entropy(x, SOFT, where=X < 2).sum(), X),
    "head": (_head, H),
    "head, bias": (lambda x: _bias(x, "fast"), H),
    "lean head, bias": (lambda x: _bias(x, "lean"), H),
}
USES: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "value": lambda f: f,
    "grad": jax.grad,
    "hvp": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1],
    "vmap": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x + x])),
}


def _agree(a: Any, b: Any, tol: float = 2e-4) -> None:
    assert np.abs(np.asarray(b, float)).max() > 1e-3
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=tol, atol=tol)


# Strictness


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ZOO)
def test_strictest_settings_change_nothing(op: str, kind: str) -> None:
    f, x = ZOO[op]
    x = jnp.asarray(x, kind)
    often = USES if op in ("softmax", "every option", "head, bias") else ("value", "grad")
    uses = often if kind == "float32" else ("grad",)
    run = lambda: [jax.jit(USES[use](f), **quick.QUICK)(x) for use in uses]  # noqa: E731
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        ours = run()
    for a, b in zip(ours, run(), strict=True):
        _agree(a, b, 2e-2 if kind == "bfloat16" else 2e-4)


COMING = ("custom_vjp3", "remat3", "scan3")
TOLD = {**USES, "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1]}


@functools.cache
def _due(op: str) -> dict[str, Any]:
    """As JAX is today."""
    f, x = ZOO[op]
    return {use: jax.jit(make(f), **quick.QUICK)(jnp.asarray(x)) for use, make in TOLD.items()}


@pytest.mark.long
@pytest.mark.parametrize("name", COMING)
@pytest.mark.parametrize("op", [op for op in ZOO if "head" in op])
def test_what_jax_will_do_one_day_changes_nothing(op: str, name: str) -> None:
    """The rules under the transforms that JAX (0.10.2) is to have; a user's own scan has no derivative there yet."""
    if not hasattr(jax.config, f"jax_{name}"):
        pytest.skip(f"JAX {jax.__version__} has no jax_{name}")
    (f, x), due = ZOO[op], _due(op)
    before = getattr(jax.config, f"jax_{name}")
    try:
        jax.config.update(f"jax_{name}", True)
        for use, make in TOLD.items():
            _agree(jax.jit(make(f), **quick.QUICK)(jnp.asarray(x)), due[use])
    finally:
        jax.config.update(f"jax_{name}", before)


def test_saboteur_of_strictness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and biases of our own are of fewer dimensions than what they are added to."""
    from jax_ops._head import linear

    x, b = jnp.ones((2, 3)), jnp.ones(3)
    with jax.numpy_rank_promotion("raise"):
        jax.block_until_ready(linear._biased(x, b, None))
        with pytest.raises(ValueError, match="could not be broadcast"):
            linear._biased_whole(x, b)


# x64 for a part of a program


@pytest.mark.parametrize("op", ["softmax", "log_softmax", "cross_entropy", "head, bias", "lean head, bias"])
def test_x64_of_a_part_of_a_program(op: str) -> None:
    f, x = ZOO[op]
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64)
        truth = jax.grad(f)(wide)
        _, pull = jax.vjp(f, wide)
        push, v = jax.linearize(f, wide)[1], jnp.cos(wide)
        along = (truth * v).sum()
        lowered = jax.jit(jax.grad(f)).trace(wide)
        one = jnp.ones((), jnp.float64)
    _agree(pull(one)[0], truth, 1e-12)
    assert pull(one)[0].dtype == np.float64
    _agree(push(v), along, 1e-12)
    _agree(lowered.lower().compile()(wide), truth, 1e-12)

    def part(x: Any) -> Any:
        with jax.enable_x64(True):
            return f(x.astype(jnp.float64)).astype(jnp.float32)

    _agree(jax.jit(jax.grad(part))(x), truth, 1e-6)


def test_saboteur_of_x64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row function that is traced anew under whatever settings there are comes out in 32 bits."""
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
    flat = primitive.Row._flat.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    row = primitive.Row("softmax_fwd_again", plain.softmax_fwd)
    how: dict[str, Any] = {"present": (True,), "axis": 1, "options": ()}
    types = [jax.make_jaxpr(lambda x, f=f: f(row, x, **how))(x).out_avals[0].dtype for f in (flat, primitive.Row._flat)]
    assert types == [np.float32, np.float64]


# Policies of jax.checkpoint

P = jax.checkpoint_policies
POLICIES = {
    "dots_saveable": P.dots_saveable,
    "dots_with_no_batch_dims_saveable": P.dots_with_no_batch_dims_saveable,
    "everything_saveable": P.everything_saveable,
    "save_anything_except": P.save_anything_except_these_names("nothing"),
    "save_only": P.save_only_these_names("nothing"),
    "offload": P.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "by hand": lambda prim, *_, **__: prim.name not in ("tanh", "exp"),
}
BIG = (64, 8, 512)  # rows, features, classes
HEADS: dict[str, dict[str, Any]] = {
    "fast": {},
    "fast, chunks": {"chunk_size": 16},
    "rows": {"reduction": "none"},
    "lean": {"memory": "lean", "chunk_size": 128},
}


def _largest_kept(policy: Any, options: dict[str, Any]) -> int:
    n, d, v = BIG
    h, w, t = jnp.ones((n, d)) * jnp.linspace(-1, 1, d), jnp.cos(jnp.arange(v * d * 1.0)).reshape(v, d), jnp.arange(n)

    def loss(h: Any, w: Any) -> Any:
        return jax_ops.linear_cross_entropy(jnp.tanh(h), w, t, **options).sum()

    kept = io.StringIO()
    with contextlib.redirect_stdout(kept):
        print_saved_residuals(jax.checkpoint(loss, policy=policy), h, w)
    shapes = [m[1] for line in kept.getvalue().splitlines() if (m := re.match(r"\w+\[([\d,]*)\]", line))]
    assert shapes
    return max(math.prod(int(i) for i in shape.split(",") if i) for shape in shapes)


@pytest.mark.parametrize("mode", HEADS)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_keeps_logits(policy: str, mode: str) -> None:
    assert _largest_kept(POLICIES[policy], HEADS[mode]) < BIG[0] * BIG[2]


def test_saboteur_of_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules in plain sight: a policy keeps the matmul's result."""
    monkeypatch.setattr(autodiff, "apart", lambda fn, *arrays: fn(*arrays))
    options = {"memory": "lean", "chunk_size": 127}  # of its own, so that no trace of another test serves
    assert _largest_kept(POLICIES["dots_saveable"], options) >= BIG[0] * 127


# Platforms, open dimensions, other processes


@pytest.mark.parametrize("op", ZOO)
def test_several_platforms_at_once(op: str) -> None:
    f, x = ZOO[op]
    exported = export.export(jax.jit(jax.value_and_grad(f)), platforms=("cpu", "cuda", "tpu"))(jnp.asarray(x))
    for a, b in zip(exported.call(x), jax.value_and_grad(f)(x), strict=True):
        _agree(a, b)
    assert "custom_call @softmax_ext" not in exported.mlir_module()


@pytest.mark.skipif(bool(native.missing), reason=f"no kernels to tell apart: {native.missing}")
def test_saboteur_of_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that serves whatever the platform puts the CPU's kernels into a program for others."""
    lowered = lambda: jax.jit(lambda x: jax_ops.softmax(x)).trace(X).lower(lowering_platforms=("cpu", "tpu")).as_text()  # noqa: E731
    assert "softmax_ext_softmax_fwd" not in lowered()
    monkeypatch.setattr(primitive, "serves", lambda ctx: True)
    assert "softmax_ext_softmax_fwd" in lowered()


def test_the_number_of_classes_may_be_open() -> None:
    b, v = export.symbolic_shape("b, v")
    S = jax.ShapeDtypeStruct
    f4, i4, u1 = jnp.float32, jnp.int32, jnp.uint8
    ce = lambda **o: lambda x, t: jax_ops.cross_entropy(x, t, **o)  # noqa: E731
    head = lambda **o: lambda h, w, t: jax_ops.linear_cross_entropy(h, w, t, **o)  # noqa: E731
    names = ("entropy", "argmax")
    logits, rows = (S((b, v), f4), S((b,), i4)), (S((b, D), f4), S((v, D), f4), S((b,), i4))
    cases: list[tuple[Any, Any, Any]] = [
        (ce(), logits, (X, T)),
        (ce(label_smoothing=0.1, stats=names), logits, (X, T)),
        (ce(), (logits[0], S((b,), u1)), (X, (T % V).astype("u1"))),
        (ce(), logits, (X, np.array([0, 99, -1, 3]))),
        (jax_ops.softmax_cross_entropy_with_integer_labels, logits, (X, T % V)),
        (head(), rows, (H, W, T)),
        (head(memory="lean", stats=names, label_smoothing=0.1), rows, (H, W, T)),
        (jax.grad(head()), rows, (H, W, T)),
    ]
    for f, specs, arrays in cases:
        arrays = [a.astype(s.dtype) for a, s in zip(arrays, specs, strict=True)]
        ours, theirs = export.export(jax.jit(f))(*specs).call(*arrays), f(*arrays)
        for p, q in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-6)


SAVE = """
import pickle, sys, jax, jax.numpy as jnp, jax_ops
from jax.experimental import serialize_executable
f = jax.jit(jax.grad(lambda x: jax_ops.cross_entropy(x, jnp.array([3, 1, -100, 9]))))
x = jnp.linspace(-1, 1, 40).reshape(4, 10)
pickle.dump(serialize_executable.serialize(f.lower(x).compile()), open(sys.argv[1], "wb"))
"""
LOAD = """
import pickle, sys, jax, jax.numpy as jnp
from jax._src import xla_bridge
if sys.argv[2] == "jax_ops":
    import jax_ops
assert not xla_bridge.backends_are_initialized()
from jax.experimental import serialize_executable
f = serialize_executable.deserialize_and_load(*pickle.load(open(sys.argv[1], "rb")))
assert f(jnp.linspace(-1, 1, 40).reshape(4, 10)).shape == (4, 10)
"""


@pytest.mark.long
@pytest.mark.skipif(bool(native.missing), reason=f"no kernels to find: {native.missing}")
def test_a_saved_executable_finds_the_kernels_of_a_fresh_process(tmp_path: Path) -> None:
    """And not those of a process that has not imported jax_ops, which is this test's saboteur."""
    path, root = str(tmp_path / "step"), Path(__file__).parents[2]
    call = lambda *args: subprocess.run([sys.executable, "-c", *args], cwd=root, capture_output=True, text=True)  # noqa: E731
    assert (done := call(SAVE, path)).returncode == 0, done.stderr
    assert (done := call(LOAD, path, "jax_ops")).returncode == 0, done.stderr
    assert "No FFI handler registered" in call(LOAD, path, "jax").stderr


# Operands that all examples share


def _temporary(f: Any, *arrays: Any) -> int:
    return jax.jit(f).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_one_row_of_logits_for_many_targets_is_not_copied() -> None:
    many, classes = 500, 1024
    x, ts = jnp.sin(jnp.arange(classes * 1.0)), jnp.arange(many) % classes
    rows = jax.vmap(lambda x, t: jax_ops.cross_entropy(x, t), (None, 0))
    labels = jax.vmap(jax_ops.softmax_cross_entropy_with_integer_labels, (None, 0))
    for f in (rows, labels, jax.grad(lambda x, ts: rows(x, ts).sum())):
        assert _temporary(f, x, ts) < many * classes
        got, each = f(x, ts), -jax.nn.log_softmax(x)[ts]
        want = each if got.shape == (many,) else jax.grad(lambda x: -jax.nn.log_softmax(x)[ts].sum())(x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_saboteur_of_shared_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results said to differ by example that do not: all that is computed from them is as large as the targets."""
    from jax_ops import _lowering as lowering

    every = lambda fn, axis, dims, args: [0] * len(lowering.outputs_mapped(fn, axis, dims, args))  # noqa: E731
    monkeypatch.setattr(autodiff, "outputs_mapped", every)
    monkeypatch.setattr(primitive, "outputs_mapped", every)
    many, classes = 500, 1023
    x, ts = jnp.sin(jnp.arange(classes * 1.0)), jnp.arange(many) % classes
    f = jax.grad(lambda x, ts: jax.vmap(lambda t: jax_ops.cross_entropy(x, t))(ts).sum())
    assert _temporary(f, x, ts) >= many * classes


# Masked arrays


@pytest.mark.parametrize("place", ["target", "input", "weight", "soft", "labels", "where", "softmax", "head"])
def test_masked_arrays_are_refused(place: str) -> None:
    hidden = lambda a: np.ma.MaskedArray(a, mask=np.zeros(np.shape(a), bool))  # noqa: E731
    calls: dict[str, Callable[[], Any]] = {
        "target": lambda: jax_ops.cross_entropy(X, hidden(T)),
        "input": lambda: jax_ops.cross_entropy(hidden(X), T),
        "weight": lambda: jax_ops.cross_entropy(X, T, hidden(CW)),
        "soft": lambda: jax_ops.cross_entropy(X, hidden(SOFT)),
        "labels": lambda: jax_ops.softmax_cross_entropy_with_integer_labels(X, hidden(T % V)),
        "where": lambda: jax_ops.softmax(X, where=hidden(X > 0)),
        "softmax": lambda: jax_ops.softmax(hidden(X)),
        "head": lambda: jax_ops.linear_cross_entropy(H, W, hidden(T)),
    }
    with pytest.raises((TypeError, ValueError), match=r"must .*; got a NumPy masked array\."):
        calls[place]()


# Nothing cancels


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


@pytest.mark.slow
def test_on_several_devices() -> None:
    command, root = [sys.executable, "-m", "tests.parallel.jax_meshes"], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all checks on meshes ran")
