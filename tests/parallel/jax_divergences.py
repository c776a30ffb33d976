"""Checks of divergences between sharded classes on 8 forced host devices, run as a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.parallel.eight import ARRAYS, R, X, along, compiled, derivatives, main, same  # first: it asks for devices

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ops
from jax_ops._parallel import shard as shards
from jax_ops._rows import divergence_slices, native
from softmax_ext import reference
from softmax_ext.contract import KINDS

N, V = 6, 16
CAPPED: dict[str, Any] = {"logit_scale": 1.2, "softcap": 9.0, "teacher_scale": 0.9, "teacher_softcap": 5.0}
ALL: dict[str, Any] = {
    "x": X,
    "w": ARRAYS["w"],
    "b": ARRAYS["b"],
    "y": R.normal(size=(N, 3)),
    "u": R.normal(size=(V, 3)),
    "c": R.normal(size=V),
    "tw": ARRAYS["tw"],
    "scale": ARRAYS["s"],
}
ALL |= {"s": X @ ALL["w"].T, "t": 2.0 * R.normal(size=(N, V))}
KEEP = np.array([True, True, False, True, True, True])
STUDENT = ("s", "x", "w", "b", "tw", "scale")  # what has a gradient


class Case:
    """One call: which arrays it gets, and options."""

    def __init__(self, names: str, kind: str, **options: Any) -> None:
        self.names, self.options = names.split(), {"kind": kind, "beta": 0.3, **options}

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the student's and its weights, the teacher's)."""
        given = {name: jnp.asarray(ALL[name]) for name in self.names}
        return {k: given[k] for k in given if k in STUDENT}, {k: given[k] for k in given if k not in STUDENT}

    def specs(self, axis: Any, rows: Any = None) -> tuple[dict[str, P], dict[str, P]]:
        by = {"x": P(rows), "w": P(axis), "b": P(axis), "y": P(rows), "u": P(axis), "c": P(axis), "tw": P(rows)}
        by |= {"s": P(rows, axis), "t": P(rows, axis), "scale": P(rows)}
        return {k: by[k] for k in self.names if k in STUDENT}, {k: by[k] for k in self.names if k not in STUDENT}

    def call(self, a: dict[str, Any], fixed: dict[str, Any], axis_name: Any = None, keep: Any = KEEP) -> Any:
        given: dict[str, Any] = {"token_weight": a.get("tw"), "keep": keep, **self.options}
        given |= {"logit_scale": a["scale"]} if "scale" in a else {}
        given |= {} if axis_name is None else {"axis_name": axis_name}
        if "s" in a:
            return jax_ops.divergence(a["s"], fixed["t"], **given)
        biases = {"linear_bias": a.get("b"), "teacher_bias": fixed.get("c")}
        return jax_ops.linear_divergence(a["x"], a["w"], fixed["y"], fixed["u"], **biases, **given)

    def truth(self, a: dict[str, Any], fixed: dict[str, Any], keep: Any = KEEP) -> Any:
        """The same of all the logits at once, on one device."""
        if "s" not in a:
            s = a["x"] @ a["w"].T + a.get("b", 0.0)
            a, fixed = a | {"s": s}, {"t": fixed["y"] @ fixed["u"].T + fixed.get("c", 0.0)}
        options = {k: v for k, v in self.options.items() if k not in ("chunk_size", "memory")}
        return Case("", **options).call(a, fixed, keep=keep)

    def over(self, mesh: Any, axis: Any, **how: Any) -> Callable[..., Any]:
        specs = self.specs(axis)
        given: dict[str, Any] = {"mesh": mesh, "in_specs": specs, "out_specs": P(), **how}
        return jax.shard_map(lambda a, fixed: self.call(a, fixed, axis), **given)


HEADS = "x w b y u c tw"
WAYS: dict[str, dict[str, Any]] = {
    "fast": {"chunk_size": 4},
    "rows": {"chunk_size": 4, "reduction": "none"},
    "lean": {"memory": "lean"},
    "lean, by slices": {"memory": "lean", "chunk_size": 1, "reduction": "sum"},
}
# Kind, call, whether a shard_map checks what varies, and second derivatives too.
RUNS: list[tuple[str, str, bool, bool]] = [
    ("forward_kl", "logits", True, True),
    ("reverse_kl", "logits", False, True),
    ("jsd", "logits", True, True),
    ("tv", "logits", True, False),
    ("forward_kl", "fast", True, False),
    ("jsd", "fast", False, True),
    ("tv", "fast", True, False),
    ("reverse_kl", "rows", True, True),
    ("jsd", "rows", False, False),
    ("jsd", "lean", True, False),
    ("jsd", "logits, scales", True, True),
    ("reverse_kl", "rows, scales", False, False),
    ("forward_kl", "lean, by slices, scales", True, False),
    ("forward_kl", "lean, by slices", False, True),
    ("reverse_kl", "lean, by slices", True, False),
    ("jsd", "lean, by slices", True, True),
]


def _case(kind: str, way: str) -> Case:
    way, more = way.removesuffix(", scales"), " scale" if "scales" in way else ""
    return Case("s t tw" + more, kind, **CAPPED) if way == "logits" else Case(HEADS + more, kind, **CAPPED, **WAYS[way])


def unsharded_is_sharded(mesh: Any) -> None:
    for kind, way, check, second in RUNS:
        case = _case(kind, way)
        a, fixed = case.arrays()
        f = case.over(mesh, "v", check_vma=check)
        truth = jax.jit(derivatives(lambda a: case.truth(a, fixed), second))(a)  # noqa: B023
        ours, messages = compiled(derivatives(lambda a: f(a, fixed), second), a)  # noqa: B023
        same(ours, truth, f"{kind}, {way}, check_vma={check}: ", 1e-10)
        assert {name for name, _ in messages} == {"all-reduce"}, messages


def messages_of_a_step(mesh: Any) -> None:
    """As docs/parallel.md counts them."""
    for kind, more in (("forward_kl", [(1, N)]), ("jsd", [(3, N)])):
        for names in ("s t", "x w y u"):
            case = Case(names, kind)
            a, fixed = case.arrays()
            f = case.over(mesh, "v")
            _, messages = compiled(jax.value_and_grad(lambda a: f(a, fixed)), a)  # noqa: B023
            sizes = sorted(int(np.prod(shape)) for _, shapes in messages for shape in shapes)
            due = [2 * N, 4 * N, N, N, *(int(np.prod(s)) for s in more)] + [X.size] * ("x" in names)
            assert sizes == sorted(due), messages


def kernels_serve_the_shards(mesh: Any) -> None:
    """Forward, sums and backward; of a library that was built of an earlier checkout those that it has."""
    due = [row for row in ("divergence_fwd", "divergence_sums", "divergence_bwd") if row in native.served]
    for names, more in (("s t", {}), ("x w y u", {}), ("x w y u", {"memory": "lean"})):
        case = Case(names, "jsd", **more)
        a, fixed = case.arrays()
        f = case.over(mesh, "v")
        text = jax.jit(jax.grad(lambda a: f(a, fixed))).lower(a).as_text()  # noqa: B023
        assert all(f"@softmax_ext_{row}(" in text for row in due), names


def gradient_inside(grid: Any) -> None:
    """Rows over one axis, those of its first half not kept; classes over the other."""
    keep = np.arange(N) >= N // 2
    for kind, way in (("jsd", "fast"), ("reverse_kl", "lean")):
        case = Case(HEADS, kind, **CAPPED, **WAYS[way] | {"reduction": "sum", "chunk_size": 2})
        (a, fixed), specs = case.arrays(), case.specs("v", "b")
        loss = lambda a: case.truth(a, fixed, keep)  # noqa: B023, E731
        truth = jax.jit(lambda a: jax.jvp(jax.grad(loss), (a,), (along(a),)))(a)  # noqa: B023
        for check in (True, False):

            def inside(a: Any, v: Any, fixed: Any, keep: Any, check: bool = check, case: Any = case) -> Any:
                def gradient(a: Any) -> Any:
                    share = 1.0 if check else 1.0 / jax.lax.axis_size("v")
                    g = jax.grad(lambda a: share * case.call(a, fixed, "v", keep))(a)
                    alike = {k: tuple({"b", "v"} - {*case.specs("v", "b")[0][k]}) for k in g}
                    return g if check else {k: jax.lax.psum(g[k], alike[k]) if alike[k] else g[k] for k in g}

                return jax.jvp(gradient, (a,), (v,))

            of_student, of_teacher = specs
            given: dict[str, Any] = {"mesh": grid, "in_specs": (of_student, of_student, of_teacher, P("b"))}
            given |= {"out_specs": (of_student, of_student), "check_vma": check}
            ours = jax.jit(jax.shard_map(inside, **given))(a, along(a), fixed, jnp.asarray(keep))
            same(ours, truth, f"inside, {kind}, {way}, check_vma={check}: ", 1e-10)


def _steps(f: Any) -> Callable[[Any], Any]:
    one = jax.checkpoint(lambda a: jax.tree.map(lambda p, g: p - 0.1 * g, a, jax.grad(f)(a)))
    return lambda a: jax.lax.scan(lambda c, _: (one(c), f(c)), a, None, length=2)


def _third(f: Any) -> Callable[[Any], Any]:
    def moved(g: Any) -> Callable[[Any], Any]:
        return lambda a: jax.jvp(g, (a,), (along(a),))[1]

    return moved(moved(jax.grad(f)))


def _mapped(f: Any) -> Callable[[Any], Any]:
    return lambda a: jax.vmap(jax.grad(f))(jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), a))


def every_transform(grid: Any) -> None:
    """Classes over two axes; scanned, checkpointed and mapped gradients, third derivatives."""
    sliced: dict[str, Any] = {"memory": "lean", "chunk_size": 1}
    for names, kind, more in (("s t", "reverse_kl", {}), ("s t", "jsd", {}), ("x w y u", "jsd", sliced)):
        case = Case(names, kind, **more)
        a, fixed = case.arrays()
        sharded = case.over(grid, ("v", "b"))
        ours, theirs = (lambda a: sharded(a, fixed)), (lambda a: case.truth(a, fixed))  # noqa: B023
        for use in (_steps, _mapped, *([] if more else [_third])):
            found = (jax.jit(use(f))(a) for f in (ours, theirs))
            same(next(found), next(found), f"{use.__name__}, {kind}, {names}: ", 1e-9)


def odd_rows(mesh: Any) -> None:
    """float32 against float64, a class a device or two: shards all -inf on either side, bad rows, close ones."""
    inf = np.inf
    for classes in (8, 16):
        half = np.arange(classes) < classes // 2
        s, t = (np.asarray(R.normal(size=(11, classes)), np.float32) for _ in range(2))
        s[0], t[0] = np.where(half, -inf, s[0]), np.where(half, -inf, t[0])  # four devices have no part in it
        s[1], t[2] = np.where(half, -inf, s[1]), np.where(half, -inf, t[2])  # on one side only
        s[3], t[4], s[5, 2], t[6, 5], s[7, 1] = -inf, -inf, np.nan, np.nan, inf
        s[8] = t[8] + np.float32(1e-3) * s[8]
        s[9] = t[9] * (1 + np.where(np.arange(classes) == 7, np.float32(2.0**-22), np.float32(0.0)))
        s[8:10] += 64  # next to each other but for a common offset
        s[10, 5], t[10, 2] = 60, 40
        for kind in KINDS:
            _one_kind_of_odd_rows(mesh, kind, s, t)


def _one_kind_of_odd_rows(mesh: Any, kind: str, s: Any, t: Any) -> None:
    case, up = Case("s t", kind, reduction="none"), np.linspace(0.5, 1.5, len(s))
    call = lambda a, fixed: case.call(a, fixed, "v", None)  # noqa: E731
    f = jax.shard_map(call, mesh=mesh, in_specs=case.specs("v"), out_specs=P())

    def run(s: Any, t: Any) -> Any:
        value, pull = jax.vjp(lambda s: f({"s": s}, {"t": t}), s)
        return value, *pull(jnp.asarray(up, value.dtype))

    value, gradient = (np.asarray(v) for v in jax.jit(run)(jnp.asarray(s), jnp.asarray(t)))
    exact, options = (s.astype(float), t.astype(float)), {"kind": kind, "beta": 0.3, "reduction": "none"}
    with np.errstate(all="ignore"):
        right = reference.divergence(*exact, **options), reference.divergence_grad(*exact, dloss=up, **options)
        pu = np.abs(reference.divergence_parts(*exact, **options)[1])
        size = pu + reference.softmax(exact[0]) * pu.sum(-1, keepdims=True)  # of the terms of each entry
    np.testing.assert_allclose(value, right[0], rtol=3e-6, err_msg=kind)
    known = np.isfinite(right[1])
    np.testing.assert_array_equal(np.isfinite(gradient), known)
    assert (np.abs(gradient - right[1]) <= 16 * 2.0**-24 * up[:, None] * size + 1e-37)[known].all(), kind
    assert np.isnan(value[3:8]).all(), kind


def half_precision(mesh: Any) -> None:
    """bfloat16: the input's gradient is summed over the devices in float32, and rounded once after."""
    shapes = {"input": (16, 8), "linear_weight": (64, 8), "teacher_input": (16, 4), "teacher_weight": (64, 4)}
    given = {name: jnp.asarray(R.normal(size=shape), "bfloat16") for name, shape in shapes.items()}
    exact: dict[str, Any] = {name: np.asarray(v, float) for name, v in given.items()}
    x, w, y, u = given.values()
    for k in ({"reduction": "none"}, {"reduction": "sum"}, {"reduction": "sum", "memory": "lean", "chunk_size": 3}):

        def head(x: Any, w: Any, y: Any, u: Any, k: Any = k) -> Any:
            return jax_ops.linear_divergence(x, w, y, u, axis_name="v", kind="jsd", **k).sum()

        f = jax.shard_map(head, mesh=mesh, in_specs=(P(), P("v"), P(), P("v")), out_specs=P())
        ours, messages = compiled(lambda x, w, f=f: jax.grad(f, (0, 1))(x, w, y, u), x, w)
        truth = reference.linear_divergence_grad(**exact, kind="jsd", reduction="sum")
        for name, p, q in zip("xw", ours, truth, strict=False):
            assert p.dtype == "bfloat16"
            np.testing.assert_allclose(np.asarray(p, float), q, rtol=2.0**-8, atol=1e-5, err_msg=f"d{name}, {k}")
        assert [(16, 8)] in [shapes for _, shapes in messages], messages


def plain_jit(mesh: Any) -> None:
    """No axis_name, no shard_map: the arrays alone are sharded, and XLA does the rest."""
    n, v = 64, 48
    of = lambda *shape: jnp.asarray(R.normal(size=shape), jnp.float32)  # noqa: E731
    x, w, y, u, s, t = of(n, 16), of(v, 16), of(n, 8), of(v, 8), 3.0 * of(n, v), of(n, v)
    by = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
    rows = {(), (n,), (n, 1), (16,), (16, 1)}
    kind: Any
    for kind in KINDS:
        logits = lambda s, t, kind=kind: jax_ops.divergence(s, t, kind=kind)  # noqa: E731
        head = lambda x, w, y, u, k=kind: jax_ops.linear_divergence(x, w, y, u, kind=k, chunk_size=16)  # noqa: E731
        calls: list[tuple[Any, Any, Any, Any]] = [
            (logits, (s, t), (by(s, None, "v"), by(t, None, "v")), rows),
            (logits, (s, t), (by(s, "v"), by(t, "v")), {()}),
            (head, (x, w, y, u), (x, by(w, "v"), y, by(u, "v")), rows | {(n, 16), (16, 16), (2, 16), (n, 16)}),
        ]
        for f, args, sharded, allowed in calls:
            ours, messages = compiled(jax.value_and_grad(f), *sharded)
            same(ours, jax.jit(jax.value_and_grad(f))(*args), f"plain jit, {kind}: ", 1e-4)
            assert {name for name, _ in messages} == {"all-reduce"}, messages
            assert {shape for _, shapes in messages for shape in shapes} <= allowed, messages


@contextmanager
def _instead(where: Any, name: str, wrong: Any) -> Iterator[None]:
    right = getattr(where, name)
    setattr(where, name, wrong)
    jax.clear_caches()
    yield
    setattr(where, name, right)


def faults_are_seen(mesh: Any) -> None:
    """A device's own lse in place of the merged one, and its own part of a sum in place of all."""
    over, finished = divergence_slices.over, divergence_slices.finished
    own: Any = lambda state, *how: {**over(state, *how), **{k: state[k] for k in ("m_s", "rest_s")}}  # noqa: E731
    faults: list[tuple[Any, str, Any, str]] = [
        (divergence_slices, "over", own, "forward_kl"),
        (divergence_slices, "over", lambda state, *how: {**over(state, *how), "hi": state["hi"]}, "jsd"),
        (divergence_slices, "finished", lambda known, total, pair: finished(known, total / 8.0, pair), "tv"),
        (shards.Shard, "cotangents", lambda self, *cts, like: cts, "forward_kl"),
    ]
    for where, name, wrong, kind in faults:
        case = _case(kind, "logits")
        a, fixed = case.arrays()
        truth = jax.jit(derivatives(lambda a: case.truth(a, fixed)))(a)  # noqa: B023
        with _instead(where, name, wrong):
            from jax_ops._parallel import divergence as rule

            rule._sharded_divergence.cache_clear()
            f = case.over(mesh, "v", check_vma=False)
            ours = jax.jit(derivatives(lambda a: f(a, fixed)))(a)  # noqa: B023
            rule._sharded_divergence.cache_clear()
        try:
            same(ours, truth, "a fault: ", 1e-10)
        except AssertionError:
            continue
        raise AssertionError(f"{name} of {kind} was wrong, and nobody saw it")
    jax.clear_caches()


if __name__ == "__main__":
    main(
        (unsharded_is_sharded, 1),
        (messages_of_a_step, 1),
        (kernels_serve_the_shards, 1),
        (gradient_inside, 2),
        (every_transform, 2),
        (odd_rows, 1),
        (half_precision, 1),
        (plain_jit, 1),
        (faults_are_seen, 1),
    )
