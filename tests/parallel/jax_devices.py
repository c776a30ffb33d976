"""Checks of sharded classes on 8 forced host devices, run as a program: `python -m tests.parallel.jax_devices`."""

from __future__ import annotations

from typing import Any

# first: it asks for devices
from tests.parallel.eight import ARRAYS, IDS, TARGET, D, N, R, V, X, along, compiled, derivatives, main, same

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ops._head.linear
from softmax_ext import reference

FULL: dict[str, Any] = {"label_smoothing": 0.2, "logit_scale": 0.7, "softcap": 9.0, "z_loss": 0.1}
CAPPED: dict[str, Any] = {"softcap": 9.0, "z_loss": 0.1}
STATS = ("lse", "logprob", "entropy", "argmax")


class Case:
    """One call: which arrays it gets, and options."""

    def __init__(self, op: str, names: str, soft: bool = False, **options: Any) -> None:
        self.op, self.names, self.soft, self.options = op, names.split(), soft, options

    def arrays(self) -> dict[str, Any]:
        given = dict(ARRAYS)
        given["z"] = np.asarray(X @ ARRAYS["w"].T)
        return {name: jnp.asarray(given[name]) for name in self.names}

    def specs(self, axis: Any, rows: Any = None) -> dict[str, P]:
        by = {"x": P(rows), "w": P(axis), "b": P(axis), "y": P(rows, axis), "cw": P(axis), "tw": P(rows)}
        by |= {"z": P(rows, axis), "s": P(rows), "down": P(), "up": P(axis), "v": P(rows)}
        return {name: by[name] for name in self.names}

    def call(self, a: dict[str, Any], t: Any, axis_name: Any = None) -> Any:
        given = {"weight": a.get("cw"), "token_weight": a.get("tw"), **self.options}
        given |= {"logit_scale": a["s"]} if "s" in a else {}
        if axis_name is not None:
            given["axis_name"] = axis_name
        target = a["y"] if self.soft else (IDS, a["v"]) if "v" in a else t
        if self.op == "cross_entropy":
            return jax_ops.cross_entropy(a["z"], target, **given)
        low = (a["down"], a["up"]) if "up" in a else None
        return jax_ops.linear_cross_entropy(a["x"], a["w"], target, linear_bias=a.get("b"), low_rank=low, **given)

    def truth(self, a: dict[str, Any], t: Any) -> Any:
        """The same of all the logits at once, on one device."""
        z = a["z"] if "z" in a else a["x"] @ (a["w"] + (a["up"] @ a["down"] if "up" in a else 0.0)).T + a.get("b", 0.0)
        options = {k: v for k, v in self.options.items() if k not in ("chunk_size", "memory")}
        return Case("cross_entropy", "", self.soft, **options).call(a | {"z": z}, t)


CASES = {
    "logits": Case("cross_entropy", "z"),
    "logits, all": Case("cross_entropy", "z cw tw", **FULL, stats=STATS),
    "logits, soft": Case("cross_entropy", "z y cw tw", True, **FULL, stats=("entropy",)),
    "logits, pair": Case("cross_entropy", "z v cw tw", **FULL, stats=STATS),
    "fast, pair": Case("linear_cross_entropy", "x w b v cw", **FULL, chunk_size=4),
    "lean, pair": Case("linear_cross_entropy", "x w v", **CAPPED, chunk_size=1, stats=STATS, memory="lean"),
    "logits, scales": Case("cross_entropy", "z cw s", **CAPPED, stats=("lse", "log_sum_sq", "mean_logit", "rank")),
    "fast": Case("linear_cross_entropy", "x w"),
    "fast, low rank": Case("linear_cross_entropy", "x w b down up s", **CAPPED, chunk_size=4),
    "lean, low rank": Case(
        "linear_cross_entropy", "x w b down up s", **CAPPED, memory="lean", stats=("log_sum_sq", "rank", "mean_logit")
    ),
    "fast, all": Case("linear_cross_entropy", "x w b cw tw", **FULL, chunk_size=4),
    "fast, soft": Case("linear_cross_entropy", "x w b y cw tw", True, **FULL),
    "rows, all": Case("linear_cross_entropy", "x w b cw tw", **FULL, chunk_size=4, stats=STATS, reduction="none"),
    "rows, soft": Case("linear_cross_entropy", "x w y cw", True, **FULL, chunk_size=4, stats=("entropy",)),
    "lean, all": Case("linear_cross_entropy", "x w b cw tw", **FULL, chunk_size=1, stats=STATS, memory="lean"),
    "lean, soft": Case("linear_cross_entropy", "x w y", True, **FULL, memory="lean", stats=("entropy",)),
}


# Case, whether a shard_map checks what varies, and second derivatives too.
RUNS = [
    ("logits", True, False),
    ("logits, all", True, True),
    ("logits, all", False, False),
    ("logits, soft", True, False),
    ("fast", True, False),
    ("fast, all", True, True),
    ("fast, all", False, True),
    ("fast, soft", True, False),
    ("rows, all", False, False),
    ("rows, soft", True, False),
    ("lean, all", True, True),
    ("lean, soft", False, False),
    ("logits, pair", True, True),
    ("fast, pair", False, True),
    ("lean, pair", True, False),
]


def unsharded_is_sharded(mesh: Any) -> None:
    truths: dict[Any, Any] = {}
    for name, check, second in RUNS:
        case = CASES[name]
        a = case.arrays()
        given: dict[str, Any] = {"mesh": mesh, "in_specs": (case.specs("v"),), "out_specs": P(), "check_vma": check}
        f = jax.shard_map(lambda a, case=case: case.call(a, TARGET, "v"), **given)
        if (name, second) not in truths:
            truths[name, second] = jax.jit(derivatives(lambda a, case=case: case.truth(a, TARGET), second))(a)
        ours, messages = compiled(derivatives(f, second), a)
        same(ours, truths[name, second], f"{name}, check_vma={check}: ")
        assert {kind for kind, _ in messages} == {"all-reduce"}, messages
        if len(case.names) <= 2:
            expected = [[(N,)], [(4, N)]] + [[(N, D)]] * ("x" in case.names)
            assert [shapes for _, shapes in messages] == expected, messages


def gradient_inside(grid: Any) -> None:
    """Rows over one axis, those of its first half all ignored; classes over the other."""
    t = np.where(np.arange(N) < N // 2, -100, TARGET)
    case = Case("linear_cross_entropy", "x w b cw tw", **FULL, reduction="sum", chunk_size=2)
    a, specs = case.arrays(), case.specs("v", "b")
    loss = lambda a: case.truth(a, t)  # noqa: E731
    truth = jax.jit(lambda a: jax.jvp(jax.grad(loss), (a,), (along(a),)))(a)
    for check in (True, False):

        def inside(a: Any, v: Any, t: Any, check: bool = check) -> Any:
            def gradient(a: Any) -> Any:
                # JAX's own rule where it does not check: gradients are of the sum of the devices' losses, and the
                # parts of them that devices have of what they hold alike are summed by hand.
                share = 1.0 if check else 1.0 / jax.lax.axis_size("v")
                g = jax.grad(lambda a: share * case.call(a, t, "v"))(a)
                alike = {k: tuple({"b", "v"} - {*specs[k]}) for k in g}
                return g if check else {k: jax.lax.psum(g[k], alike[k]) if alike[k] else g[k] for k in g}

            return jax.jvp(gradient, (a,), (v,))

        given: dict[str, Any] = {"mesh": grid, "in_specs": (specs, specs, P("b")), "out_specs": (specs, specs)}
        ours = jax.jit(jax.shard_map(inside, **given, check_vma=check))(a, along(a), jnp.asarray(t))
        same(ours, truth, f"inside, check_vma={check}: ")


def classes_over_two_axes(grid: Any) -> None:
    case = CASES["logits, all"]
    a = case.arrays()
    f = jax.shard_map(
        lambda a: case.call(a, TARGET, ("v", "b")), mesh=grid, in_specs=(case.specs(("v", "b")),), out_specs=P()
    )
    truth = jax.jit(derivatives(lambda a: case.truth(a, TARGET)))(a)
    same(jax.jit(derivatives(f))(a), truth, "two axes: ")


def one_class_each(mesh: Any) -> None:
    """And a target that names no class: a NaN row, and NaN where it enters gradients."""
    few = 8
    for names, t in (("x w b tw", np.array([1, 7, -100, 3, 5, 7])), ("z cw tw", np.array([1, 7, -100, 3, 99, 7]))):
        head = "x" in names
        options: dict[str, Any] = {**FULL, "stats": STATS, "reduction": "none"} | ({"memory": "lean"} if head else {})
        case = Case("linear_cross_entropy" if head else "cross_entropy", names, **options)
        cut: dict[str, Any] = {"w": (slice(few),), "b": (slice(few),), "cw": (slice(few),), "z": (..., slice(few))}
        a = {k: v[cut.get(k, ...)] for k, v in case.arrays().items()}
        f = jax.shard_map(lambda a: case.call(a, t, "v"), mesh=mesh, in_specs=(case.specs("v"),), out_specs=P())  # noqa: B023
        ours = jax.jit(derivatives(f))(a)
        truth = jax.jit(derivatives(lambda a: case.truth(a, t)))(a)  # noqa: B023
        assert np.isnan(np.asarray(ours[1][0])).tolist() == (t == 99).tolist()
        for p, q in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
            np.testing.assert_allclose(p, q, rtol=1e-11, atol=1e-11)


def invalid_rows_weigh_as_unsharded(mesh: Any) -> None:
    """In a mean over class weights a row whose target names no class has the weight of class 0."""
    few = 8
    cut: dict[str, Any] = {"w": (slice(few),), "cw": (slice(few),), "z": (..., slice(few))}
    for op, names in (("cross_entropy", "z cw"), ("linear_cross_entropy", "x w cw")):
        for t in (np.array([1, 7, 99, 4, -100, 0]), np.array([99] + [-100] * 5)):
            case = Case(op, names, on_all_ignored="zero")
            a = {k: v[cut.get(k, ...)] for k, v in case.arrays().items()}
            f = jax.shard_map(lambda a: case.call(a, t, "v"), mesh=mesh, in_specs=(case.specs("v"),), out_specs=P())  # noqa: B023
            ours = jax.jit(derivatives(f))(a)
            truth = jax.jit(derivatives(lambda a: case.truth(a, t)))(a)  # noqa: B023
            assert np.isnan(ours[1]), f"{op}, {t}"
            for p, q in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
                np.testing.assert_allclose(p, q, rtol=1e-11, err_msg=f"{op}, {t}")


def masked_classes_of_soft_targets(grid: Any) -> None:
    """A device without a part in row 1, and a masked class in row 2: derivatives of what holds the value too."""
    case = Case("cross_entropy", "z y cw", True, reduction="sum")
    few = 8
    a = {k: v[..., :few] for k, v in case.arrays().items()}
    for place in ((1, slice(2)), (2, 3)):
        a["z"], a["y"] = a["z"].at[place].set(-jnp.inf), a["y"].at[place].set(0.0)

    def second(f: Any) -> Any:
        def of_both(a: Any) -> Any:
            value, gradient = jax.value_and_grad(f)(a)
            return value + sum(jnp.square(g).sum() for g in gradient.values())

        return jax.jit(jax.grad(of_both))

    f = jax.shard_map(lambda a: case.call(a, None, "v"), mesh=grid, in_specs=(case.specs("v"),), out_specs=P())
    same(second(f)(a), second(lambda a: case.truth(a, None))(a), "masked: ")


def loud_rows(mesh: Any) -> None:
    """float32 against float64: confident rows, dead shards, bad rows, ties."""
    z = np.zeros((10, V), np.float32)
    z[0, 5] = 60  # a confident row, its target elsewhere in all of the others
    z[1] = -np.inf
    z[2, 3] = np.nan
    z[3, 9] = np.inf
    z[4] = np.where(np.arange(V) < V // 2, -np.inf, -200.0)  # four devices have no part in it
    z[5] = 1e4
    z[5, 7] += 60
    z[6, [2, 9]] = 5  # ties on two devices
    z[7, [2, 11]] = np.inf, np.nan
    z[8, [4, 12]] = 30, 3  # the target's device has a share of exp(-27) of the row
    z[9] = -np.inf, *np.linspace(-3, 3, V - 1)
    t = np.array([5, 1, 1, 1, 9, 7, 2, 0, 12, 0])
    case = Case("cross_entropy", "z", reduction="none", stats=("argmax", "entropy", "lse"))
    f = jax.shard_map(lambda a: case.call(a, t, "v"), mesh=mesh, in_specs=(case.specs("v"),), out_specs=P())
    up = np.linspace(0.5, 1.5, 10)

    def run(f: Any) -> Any:
        def all_of(a: Any) -> Any:
            gradients = (jax.grad(lambda a, i=i: (f(a)[i] * up).sum())(a)["z"] for i in (0, 1))
            return jax.tree.leaves(f(a)), *gradients

        return all_of

    both = lambda a: (case.truth(a, t)[0], case.truth(a, t)[1]["entropy"])  # noqa: E731
    ours = jax.jit(run(lambda a: (lambda o: (o[0], o[1]["entropy"]))(f(a))))({"z": jnp.asarray(z)})
    truth = jax.jit(run(both))({"z": jnp.asarray(z, jnp.float64)})
    for p, q in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        assert p.dtype != np.float64
        np.testing.assert_allclose(p, q, rtol=2e-6)  # of each entry: exp(-60) too
    bad = np.isin(np.arange(10), [1, 2, 3, 7])
    np.testing.assert_array_equal(np.isnan(np.asarray(ours[1])).any(1), bad)
    assert ours[1][0, 5] != 0.0
    np.testing.assert_array_equal(jax.jit(f)({"z": jnp.asarray(z)})[1]["argmax"], [5, 0, 3, 9, 8, 7, 2, 11, 4, 15])


def half_precision(mesh: Any) -> None:
    """bfloat16: the input's gradient is summed over the devices in float32, and rounded once after."""
    n, d, v = 16, 8, 64
    t = R.integers(v, size=n)
    x, w = jnp.asarray(R.normal(size=(n, d)), "bfloat16"), jnp.asarray(R.normal(size=(v, d)), "bfloat16")
    truth = reference.linear_cross_entropy_grad(np.asarray(x, float), np.asarray(w, float), t, reduction="sum")
    for k in ({"reduction": "none"}, {"reduction": "sum"}, {"reduction": "sum", "memory": "lean"}):

        def head(x: Any, w: Any, k: Any = k) -> Any:
            return jax_ops.linear_cross_entropy(x, w, t, axis_name="v", **k)

        f = jax.shard_map(head, mesh=mesh, in_specs=(P(), P("v")), out_specs=P())
        ours, messages = compiled(jax.grad(lambda x, w, f=f: f(x, w).sum(), (0, 1)), x, w)
        for name, p, q in zip("xw", ours, truth[:2], strict=True):
            assert p.dtype == "bfloat16"
            # one rounding of the result, and those of the float32 terms it is the sum of
            np.testing.assert_allclose(np.asarray(p, float), q, rtol=2.0**-8, atol=1e-5, err_msg=f"d{name}, {k}")
        assert [(n, d)] in [shapes for _, shapes in messages], messages


def plain_jit(mesh: Any) -> None:
    """No axis_name, no shard_map: the arrays alone are sharded, and XLA does the rest."""
    jax_ops._head.linear._TILE = 2000  # pyright: ignore  # of rows and classes several pieces, as at real sizes
    n, d, v = 64, 16, 48
    x, w, b = (jnp.asarray(R.normal(size=s), jnp.float32) for s in ((n, d), (v, d), (v,)))
    t = jnp.asarray(R.integers(v, size=n)).at[3].set(-100)
    w_s, b_s = (jax.device_put(a, NamedSharding(mesh, P("v"))) for a in (w, b))
    z = x @ w.T
    z_s = jax.device_put(z, NamedSharding(mesh, P(None, "v")))

    def check(f: Any, args: Any, sharded: Any, *, gathers: bool = False) -> None:
        ours, messages = compiled(f, *sharded)
        same(ours, jax.jit(f)(*args), "plain jit: ", 3e-5)
        assert gathers == any(kind == "all-gather" for kind, _ in messages), messages
        if not gathers:
            assert {kind for kind, _ in messages} == {"all-reduce"}, messages
            shapes = {shape for _, shapes in messages for shape in shapes}
            assert shapes <= {(), (n,), (n, 1), (16,), (16, 1), (16, d), (n, d)}, messages

    def loss(z: Any, t: Any) -> Any:
        value, stats = jax_ops.cross_entropy(z, t, **FULL, stats=("entropy",))
        return value + stats["entropy"].sum()

    check(jax.value_and_grad(loss), (z, t), (z_s, t))
    for k in ({"chunk_size": 16}, {"reduction": "none"}, {"memory": "lean"}, {"memory": "lean", "chunk_size": 12}):

        def head(x: Any, w: Any, b: Any, t: Any, k: Any = k) -> Any:
            return jax_ops.linear_cross_entropy(x, w, t, linear_bias=b, **k).sum()

        # Slices of the classes are cut across the devices: of all modes this one alone gathers the weight.
        check(jax.value_and_grad(head, (0, 1, 2)), (x, w, b, t), (x, w_s, b_s, t), gathers=k.get("chunk_size") == 12)


if __name__ == "__main__":
    main(
        (unsharded_is_sharded, 1),
        (gradient_inside, 2),
        (classes_over_two_axes, 2),
        (one_class_each, 1),
        (invalid_rows_weigh_as_unsharded, 1),
        (masked_classes_of_soft_targets, 2),
        (loud_rows, 1),
        (half_precision, 1),
        (plain_jit, 1),
    )
