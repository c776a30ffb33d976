"""JAX wherever JAX goes: strict settings, parts of programs, policies, shared operands, masked arrays.

Each kind has a saboteur: the fault is put back, and what the test asserts must no longer hold.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.ad_checkpoint import print_saved_residuals  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._rows import plain, primitive  # noqa: E402
from jax_ops._rules import autodiff  # noqa: E402
from tests.judging import quick  # noqa: E402
from tests.rules.jax_zoo import CW, SOFT, ZOO, H, T, V, W, X, agree  # noqa: E402

USES: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "value": lambda f: f,
    "grad": jax.grad,
    "hvp": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1],
    "vmap": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x + x])),
}


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
        agree(a, b, 2e-2 if kind == "bfloat16" else 2e-4)


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
            agree(jax.jit(make(f), **quick.QUICK)(jnp.asarray(x)), due[use])
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
    agree(pull(one)[0], truth, 1e-12)
    assert pull(one)[0].dtype == np.float64
    agree(push(v), along, 1e-12)
    agree(lowered.lower().compile()(wide), truth, 1e-12)

    def part(x: Any) -> Any:
        with jax.enable_x64(True):
            return f(x.astype(jnp.float64)).astype(jnp.float32)

    agree(jax.jit(jax.grad(part))(x), truth, 1e-6)


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
