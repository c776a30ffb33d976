"""Sampled gradients of sharded classes on 8 forced host devices: run as `python -m tests.parallel.jax_sampled`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ops
from jax_ops._head import sampled
from jax_ops._parallel import points
from jax_ops._rows import native
from tests.parallel.eight import ARRAYS, IDS, TARGET, D, N, V, compiled, main, same, total  # which asks for devices
from tests.parallel.jax_heavy import heavy_weights_keep_their_digits

OPS: Any = jax_ops
KEY, K = jax.random.key(5), 6
PAIR = "pair"
Arrays = dict[str, Any]

# The names of its arrays beside x, w, b and tw; those that are differentiated; options.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mean": ("", "x w b tw", {}),
    "weights": ("cw", "x w b tw cw", {"z_loss": 0.1, "logit_scale": 0.7}),
    "rows": ("", "x w b tw", {"reduction": "none", "z_loss": 0.1, "stats": ("lse", "argmax"), "chunk_size": 2}),
    "cap": ("", "x w b tw", {"softcap": 4.0, "stats": ("entropy", "logprob"), "reduction": "sum", "chunk_size": 4}),
    "smooth": ("cw", "x w b tw", {"label_smoothing": 0.2, "stats": ("entropy",)}),
}


class Problem:
    """One call of a case, on one device or of a shard."""

    def __init__(self, case: str, target: Any = TARGET, classes: int = V, samples: int = K) -> None:
        more, wrt, self.options = CASES[case]
        self.pair, self.target, self.samples = target is PAIR, target, samples
        names = ["x", "w", "b", "tw", *more.split(), *["v"] * self.pair]
        self.wrt = [*wrt.split(), *["v"] * self.pair]
        self.arrays = {n: jnp.asarray(ARRAYS[n][:classes] if n in ("w", "b", "cw") else ARRAYS[n]) for n in names}
        self.ids = np.where(IDS < 0, IDS, IDS % classes)
        self._due: tuple[Any, Any] = None, None

    def call(self, a: Arrays, key: Any, axis_name: Any = None) -> Any:
        given = {"linear_bias": a["b"], "token_weight": a["tw"], "weight": a.get("cw"), "axis_name": axis_name}
        target = (self.ids, a["v"]) if self.pair else self.target
        return OPS.linear_cross_entropy(
            a["x"], a["w"], target, **given, **self.options, grad_samples=self.samples, key=key
        )

    def shards(self, mesh: Any, check: bool = True, own_keys: bool = False) -> Callable[..., Any]:
        names = mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]
        specs = {n: P(names) if n in ("w", "b", "cw") else P() for n in self.arrays}
        call = lambda a, key: self.call(a, key.reshape(-1)[0], names)  # noqa: E731
        return jax.shard_map(
            call, mesh=mesh, in_specs=(specs, P("v") if own_keys else P()), out_specs=P(), check_vma=check
        )

    def derivatives(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The gradients, and the results."""

        def run(key: Any, a: Arrays = self.arrays) -> Any:
            def loss(some: Arrays) -> Any:
                out = call(a | some, key)
                return total(out), out

            return jax.grad(loss, has_aux=True)({n: a[n] for n in self.wrt})

        return jax.jit(run)

    def due(self, key: Any) -> Any:
        """The gradients and results of one device, computed once a key."""
        if self._due[0] is not key:
            self._due = key, self.derivatives(self.call)(key)
        return self._due[1]


def agrees(
    problem: Problem, call: Callable[..., Any], what: str, key: Any = KEY, whole: Any = KEY, **given: Any
) -> None:
    """Gradients and results of shards, of whatever key, are those of one device."""
    ours, truth = problem.derivatives(call)(key, **given), problem.due(whole)
    same(ours[0], truth[0], f"{what}: ")
    for p, q in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(truth[1]), strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-11, atol=1e-11, err_msg=what)


def points_of_shards_are_those_of_one_device(mesh: Any) -> None:
    runs = [(case, target) for case in CASES for target in (TARGET, PAIR) if case != "weights" or target is TARGET]
    for i, (case, target) in enumerate(runs):
        problem, checks = Problem(case, target), (True, False) if case in ("rows", "cap") else (i % 2 == 0,)
        for check in checks:
            agrees(problem, problem.shards(mesh, check), f"{case}, {target is PAIR}, check_vma={check}")


def any_number_of_shards_and_kinds_of_meshes(mesh: Any) -> None:
    """Fewer devices, a class each, classes over two axes, Explicit ones; ranks of one mesh in another order."""
    auto, devices = AxisType.Auto, jax.devices()
    problem = Problem("rows")
    for count in (1, 2, 4):
        few = jax.make_mesh((count,), ("v",), axis_types=(auto,), devices=devices[:count])
        agrees(problem, problem.shards(few), f"{count} devices")
    turned = jax.make_mesh((8,), ("v",), axis_types=(auto,), devices=devices[::-1])
    agrees(problem, problem.shards(turned), "devices in another order")
    for kind in (auto, AxisType.Explicit):
        grid = jax.make_mesh((2, 4), ("b", "v"), axis_types=(kind, kind))
        given = dict(problem.arrays)
        if kind is not auto:  # arrays lie where the specs say
            for n in ("w", "b"):
                given[n] = jax.device_put(given[n], NamedSharding(grid, P(("b", "v"))))
        agrees(problem, problem.shards(grid), f"two axes, {kind}", a=given)
    for case, target in (("rows", PAIR), ("cap", TARGET)):
        few = Problem(case, target if target is PAIR else np.array([1, 7, -100, 3, 0, 5]), 8)
        agrees(few, few.shards(mesh), f"a class each, {case}")


def with_plain_rows(mesh: Any) -> None:
    with replaced(native, "missing", "taken away"):
        points_of = Problem("cap", PAIR)
        agrees(points_of, points_of.shards(mesh), "plain")


def shards_without_mass(mesh: Any) -> None:
    """Rows with a part in few of the devices, or in none but the target's; a NaN row is NaN, and no other."""
    for target in (TARGET, PAIR):
        problem = Problem("rows", target)
        # Classes 2 to 5 and 12 to 15 have no part in any row; a confident row has next to none but in one.
        b = problem.arrays["b"].at[jnp.array([2, 3, 4, 5, 12, 13, 14, 15])].set(-jnp.inf)
        problem.arrays |= {"b": b.at[7].set(80.0)}
        problem.ids, problem.target = np.where(problem.ids > 11, 7, problem.ids), np.array([1, 0, -100, 10, 0, 7])
        if target is PAIR:
            problem.ids = np.where(np.isin(problem.ids, (2, 3, 4, 5)), 8, problem.ids)
        agrees(problem, problem.shards(mesh), f"shards without mass, {target is PAIR}")
    problem = Problem("rows", np.array([1, 14, -100, 99, 0, 7]))
    problem.arrays |= {"x": problem.arrays["x"].at[4].set(jnp.nan)}
    (ours, out), (truth, _) = (problem.derivatives(f)(KEY) for f in (problem.shards(mesh), problem.call))
    for name in ours:
        np.testing.assert_array_equal(np.isnan(ours[name]), np.isnan(truth[name]), err_msg=name)
    assert np.isnan(out[0]).tolist() == [False, False, False, True, True, False]
    assert np.isnan(ours["x"]).any(1).tolist() == [False, False, False, True, True, False]


def unbiased(mesh: Any, steps: int = 1000) -> None:
    """The mean over every u, one for all points: a gradient is a sum of functions of one u each."""
    grid, drawn = (jnp.arange(steps) + 0.5) / steps, jax.random.uniform
    for case in ("rows", "cap", "smooth"):
        problem = Problem(case, samples=2)
        problem.arrays |= {"x": problem.arrays["x"].at[1].divide(20.0)}  # a loud row would hide the others
        exact = Problem(case)
        exact.arrays = problem.arrays
        exact.call = lambda a, key, axis_name=None, p=problem: OPS.linear_cross_entropy(  # pyright: ignore
            a["x"], a["w"], p.target, linear_bias=a["b"], token_weight=a["tw"], weight=a.get("cw"), **p.options
        )
        due = exact.derivatives(exact.call)(KEY)[0]
        specs = {n: P("v") if n in ("w", "b", "cw") else P() for n in problem.arrays}

        def at(a: Any, u: Any, problem: Problem = problem) -> Any:
            jax.random.uniform = lambda key, shape, dtype: jnp.full(shape, u, dtype)
            return problem.call(a, KEY, "v")

        f = jax.shard_map(at, mesh=mesh, in_specs=(specs, P()), out_specs=P())
        try:
            found = jax.vmap(lambda u, f=f, p=problem: p.derivatives(f)(u)[0])(grid)
        finally:
            jax.random.uniform = drawn
        for name in ("x", "w", "b"):
            scale = float(np.abs(due[name]).max())
            # an edge lies within a step
            np.testing.assert_allclose(found[name].mean(0), due[name], rtol=0, atol=12 * scale / steps, err_msg=name)
            off = float(np.abs(found[name] - due[name]).max()) / scale
            assert off > 48 / steps, f"{case}, {name}: one gradient alone is off by {off}, and nothing would be seen"


def under_transforms(mesh: Any) -> None:
    problem = Problem("rows", PAIR)
    f, keys = problem.shards(mesh), jax.random.split(KEY, 3)
    each = [problem.derivatives(problem.call)(key)[0] for key in keys]
    many = jax.vmap(lambda key: problem.derivatives(f)(key)[0])(keys)
    same(many, jax.tree.map(lambda *a: jnp.stack(a), *each), "vmap over keys: ")
    agrees(problem, jax.checkpoint(f), "checkpoint")
    summed = jax.tree.map(lambda *a: sum(a), *each)

    def looped(a: Arrays, key: Any) -> Any:
        return lax.scan(lambda c, key: (c + total(f(a, key)), None), jnp.zeros(()), keys)[0]

    def inside(a: Arrays, keys: Any) -> Any:
        step = jax.checkpoint(lambda c, key: (c + total(problem.call(a, key, "v")), None))
        return lax.scan(step, jnp.zeros(()), keys)[0]

    specs = {n: P("v") if n in ("w", "b") else P() for n in problem.arrays}
    scanned = jax.shard_map(inside, mesh=mesh, in_specs=(specs, P()), out_specs=P())
    for name, call in (("scan", looped), ("scan inside", lambda a, key: scanned(a, keys))):
        found = jax.jit(jax.grad(lambda a, call=call: call(problem.arrays | a, KEY)))(
            {n: problem.arrays[n] for n in problem.wrt}
        )
        same(found, summed, f"{name}: ")
    a = {n: problem.arrays[n] for n in problem.wrt}

    def exact(a: Arrays) -> Any:
        target, given = (problem.ids, a["v"]), {"linear_bias": a["b"], "token_weight": a["tw"]}
        return total(OPS.linear_cross_entropy(a["x"], a["w"], target, **given, **problem.options))

    ours = lambda a: total(f(problem.arrays | a, KEY))  # noqa: E731
    pushed = [jax.jit(lambda a, call=call: jax.jvp(call, (a,), (a,)))(a) for call in (ours, exact)]
    same(pushed[0], pushed[1], "forward mode is exact: ")
    second = jax.grad(lambda a: sum(v.sum() for v in problem.derivatives(f)(KEY, problem.arrays | a)[0].values()))
    with pytest.raises(NotImplementedError, match=r"^linear_cross_entropy: grad_samples must "):
        second(a)


def rows_on_the_other_axis(grid: Any) -> None:
    """Rows over one axis with keys of their own, classes over the other; the gradient taken inside as well."""
    problem = Problem("weights")
    problem.options = {**problem.options, "reduction": "sum"}
    a, keys = problem.arrays, jax.random.split(KEY, 2)
    half, every = N // 2, {"x": P("b"), "w": P("v"), "b": P("v"), "tw": P("b"), "cw": P("v")}

    def whole(a: Arrays) -> Any:
        parts = [{n: v[i * half : (i + 1) * half] if n in ("x", "tw") else v for n, v in a.items()} for i in (0, 1)]
        problems = [Problem("weights", TARGET[i * half : (i + 1) * half]) for i in (0, 1)]
        for p in problems:
            p.options = problem.options
        return sum(p.call(part, keys[i]) for i, (p, part) in enumerate(zip(problems, parts, strict=True)))

    truth = jax.jit(jax.grad(whole))(a)

    def own(a: Arrays, t: Any, keys: Any) -> Any:
        mine = Problem("weights", t)
        mine.options = problem.options
        return mine.call(a, keys[0], "v")

    for check in (True, False):
        given: dict[str, Any] = {"mesh": grid, "in_specs": (every, P("b"), P("b")), "check_vma": check}
        summed = jax.shard_map(lambda *args: lax.psum(own(*args), "b"), **given, out_specs=P())
        same(jax.jit(jax.grad(summed))(a, jnp.asarray(TARGET), keys), truth, f"outside, check_vma={check}: ")

        def inside(a: Arrays, t: Any, keys: Any, check: bool = check) -> Any:
            # as in jax_devices.gradient_inside
            share = 1.0 if check else 1.0 / lax.axis_size("v")
            g = jax.grad(lambda a: share * own(a, t, keys))(a)
            alike = {k: tuple({"b", "v"} - {*every[k]}) for k in g}
            return g if check else {k: lax.psum(g[k], alike[k]) if alike[k] else g[k] for k in g}

        within = jax.shard_map(inside, **given, out_specs=every)
        same(jax.jit(within)(a, jnp.asarray(TARGET), keys), truth, f"inside, check_vma={check}: ")


def messages(mesh: Any) -> None:
    """What is told for a chunk: a maximum, the sums, the masses; then dX. Of a key nothing, where it is known."""
    problem = Problem("mean")
    problem.wrt = ["x", "w"]
    for check in (True, False):
        _, found = compiled(problem.derivatives(problem.shards(mesh, check)), KEY)
        kinds = sorted((kind, shape) for kind, shapes in found for shape in shapes)
        expected = [("all-gather", (8, N, 2)), *(("all-reduce", shape) for shape in ((4, N), (N,), (N, D)))]
        if check:
            assert kinds == sorted(expected), kinds
        else:  # and what is upstream of the rows
            assert {*kinds} == {*expected, ("all-reduce", (2,))}, kinds


def half_precision(mesh: Any) -> None:
    """bfloat16: the input's gradient is summed over the devices in float32, and rounded once after."""
    x, w = (jnp.asarray(ARRAYS[n], "bfloat16") for n in ("x", "w"))

    def head(x: Any, w: Any, axis_name: Any = None) -> Any:
        return OPS.linear_cross_entropy(x, w, TARGET, grad_samples=K, key=KEY, axis_name=axis_name)

    f = jax.shard_map(lambda x, w: head(x, w, "v"), mesh=mesh, in_specs=(P(), P("v")), out_specs=P())
    ours, found = compiled(jax.grad(f, (0, 1)), x, w)
    truth = jax.jit(jax.grad(head, (0, 1)))(*(a.astype(jnp.float32) for a in (x, w)))
    for p, q in zip(ours, truth, strict=True):
        assert p.dtype == "bfloat16"
        np.testing.assert_allclose(np.asarray(p, float), q, rtol=2.0**-8, atol=1e-5)
    assert [(N, D)] in [shapes for _, shapes in found], found


@contextmanager
def replaced(where: Any, name: str, by: Any) -> Iterator[None]:
    """Another value for an attribute, and no program of the other one."""
    before = getattr(where, name)
    setattr(where, name, by)
    sampled._sampled.cache_clear()
    jax.clear_caches()
    try:
        yield
    finally:
        setattr(where, name, before)
        sampled._sampled.cache_clear()
        jax.clear_caches()


def keys_of_their_own(mesh: Any) -> None:
    """Devices that were given different keys draw the first one's points."""
    problem, keys = Problem("rows"), jax.random.split(KEY, 8)
    first = keys[0]
    for check in (True, False):
        agrees(problem, problem.shards(mesh, check, True), f"keys, check_vma={check}", keys, first)
    raw = jax.random.split(jax.random.PRNGKey(1), 8)
    spread = lambda a, key: problem.call(a, key[0], "v")  # noqa: E731
    specs = {n: P("v") if n in ("w", "b") else P() for n in problem.arrays}
    f = jax.shard_map(spread, mesh=mesh, in_specs=(specs, P("v")), out_specs=P())
    agrees(problem, f, "raw keys", raw, raw[0])


SPANS = points._spans
SABOTEURS: dict[str, tuple[Any, str, Any]] = {
    "ranks that draw different u": (points, "first_key", lambda key, shard: key),
    "each device takes its own distribution": (
        points, "_spans", lambda own, shard: jnp.stack([own * 0, own, own], 1)),
    "devices in the wrong order": (points, "_spans", lambda own, shard: SPANS(own, shard)[:, jnp.array([1, 0, 2])]),
    "a target of another device left in": (
        points, "here", lambda ids, shard, elsewhere=-1: jnp.where(ids < 0, ids, elsewhere)),
    "q of the device alone": (
        points, "_spans", lambda own, shard: SPANS(own, shard).at[:, 2].set(own * 8)),
}  # fmt: skip


def saboteurs_are_seen(mesh: Any) -> None:
    problem, keys = Problem("rows"), jax.random.split(KEY, 8)
    first = keys[0]
    problem.due(first)
    for name, (where, attribute, by) in SABOTEURS.items():
        with replaced(where, attribute, by):
            try:
                agrees(problem, problem.shards(mesh, False, True), name, keys, first)
            except AssertionError:
                continue
        raise AssertionError(f"nobody saw it: {name}")


def loops_to_come(mesh: Any) -> None:
    """Under the scan that JAX (0.10.2) is to have."""
    if hasattr(jax.config, "jax_scan3"):
        try:
            jax.config.update("jax_scan3", True)
            problem = Problem("rows", PAIR)
            agrees(problem, problem.shards(mesh), "scan3")
        finally:
            jax.config.update("jax_scan3", False)


if __name__ == "__main__":
    main(
        (points_of_shards_are_those_of_one_device, 1),
        (any_number_of_shards_and_kinds_of_meshes, 1),
        (with_plain_rows, 1),
        (shards_without_mass, 1),
        (unbiased, 1),
        (under_transforms, 1),
        (rows_on_the_other_axis, 2),
        (messages, 1),
        (half_precision, 1),
        (keys_of_their_own, 1),
        (saboteurs_are_seen, 1),
        (loops_to_come, 1),
        (heavy_weights_keep_their_digits, 1),
    )
