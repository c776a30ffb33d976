"""JAX's ops under every transform, to every order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from jax import Array, lax  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import jax_ops  # noqa: E402
from tests.judging.quick import QUICK, run  # noqa: E402
from tests.rules.jax_arrays import CAP, IN, SCALE, TARGET, N, S, V, Z, _same  # noqa: E402

UP = np.linspace(-1.0, 2.0, N * V).reshape(N, V)


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _composed(x: Any, y: Any, w: Any, tw: Any) -> Any:
    """The loss with every option as a composition of JAX's own functions."""
    z = CAP * jnp.tanh(SCALE * x / CAP)
    logp, kept = jax.nn.log_softmax(z), TARGET != -100
    if y is None:
        wt = jnp.asarray(w)[TARGET.clip(0)]
        share = jnp.where(kept, wt, 0.0) * tw
        rows = optax.softmax_cross_entropy_with_integer_labels(z, TARGET.clip(0)) * wt
    else:
        kept, share = np.ones(N, bool), tw
        rows = -(logp * y * w).sum(-1)
    lse = jax.nn.logsumexp(z, -1)
    rows = (1 - S) * rows - S / V * (logp * w).sum(-1) + Z * lse**2
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    return jnp.where(kept, rows * tw, 0.0).sum() / share.sum() + jnp.where(kept, 0.5 * entropy + 0.3 * lse, 0.0).sum()


def _full(x: Any, y: Any, w: Any, tw: Any) -> Any:
    loss, stats = jax_ops.cross_entropy(
        x,
        TARGET if y is None else y,
        w,
        label_smoothing=S,
        logit_scale=SCALE,
        softcap=CAP,
        z_loss=Z,
        token_weight=tw,
        stats=("entropy", "lse"),
    )
    return loss + 0.5 * stats["entropy"].sum() + 0.3 * stats["lse"].sum()


def _mean(x: Any) -> Any:
    rows = optax.softmax_cross_entropy_with_integer_labels(x, TARGET.clip(0))
    return rows[np.flatnonzero(TARGET >= 0)].mean()


# name: (ours, the composition), functions of the logits with a scalar result
SCALAR: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "softmax": (lambda x: (jax_ops.softmax(x) * UP).sum(), lambda x: (jax.nn.softmax(x) * UP).sum()),
    "log_softmax": (lambda x: (jax_ops.log_softmax(x) * UP).sum(), lambda x: (jax.nn.log_softmax(x) * UP).sum()),
    "cross_entropy": (lambda x: jax_ops.cross_entropy(x, TARGET), _mean),
    "every option": (
        lambda x: _full(x, None, IN["w"], IN["tw"]),
        lambda x: _composed(x, None, IN["w"], IN["tw"]),
    ),
    "soft, every option": (
        lambda x: _full(x, IN["y"], IN["w"], IN["tw"]),
        lambda x: _composed(x, IN["y"], IN["w"], IN["tw"]),
    ),
}


def _scanned(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def total(x: Any) -> Any:
        return lax.scan(lambda c, s: (c + f(s * x), None), jnp.zeros(()), jnp.arange(1.0, 3.0))[0]

    return total


def _linearized(f: Callable[[Any], Any], x: Any) -> Any:
    out, push = jax.linearize(f, x)
    return out + push(jnp.cos(x))


def _along_cos(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1]


TRANSFORMS: dict[str, Callable[[Callable[[Any], Any]], Callable[[Any], Any]]] = {
    "value": lambda f: f,
    "grad": jax.grad,
    "vjp": lambda f: lambda x: jax.vjp(f, x)[1](jnp.asarray(1.5, x.dtype))[0],
    "jvp": _along_cos,
    "linearize": lambda f: functools.partial(_linearized, f),
    "jacfwd": jax.jacfwd,
    "hessian": jax.hessian,
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "hvp": lambda f: _along_cos(jax.grad(f)),
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
    "vmap(grad)": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    "grad(vmap)": lambda f: jax.grad(lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])).sum()),
    "vmap(jvp)": lambda f: lambda x: jax.vmap(lambda v: jax.jvp(f, (x,), (v,))[1])(jnp.stack([x, jnp.cos(x)])),
    "grad(checkpoint)": lambda f: jax.grad(jax.checkpoint(f)),
    "hvp(checkpoint)": lambda f: _along_cos(jax.grad(jax.checkpoint(f))),
    "scan": _scanned,
    "grad(scan)": lambda f: jax.grad(_scanned(f)),
    "jvp(scan)": lambda f: _along_cos(_scanned(f)),
    "grad(scan(checkpoint))": lambda f: jax.grad(_scanned(jax.checkpoint(f))),
    "grad(jit)": lambda f: jax.grad(jax.jit(f)),
    "forward 3": lambda f: _along_cos(_along_cos(_along_cos(f))),
    "reverse 3": lambda f: jax.grad(lambda x: (jax.grad(lambda x: (jax.grad(f)(x) * UP).sum())(x) * UP).sum()),
}


# The options change the row, not how it is transformed: these few tell.
FEW = ("value", "grad", "jvp", "linearize", "hessian", "jacrev of jacrev", "jacfwd of jacfwd", "hvp", "vmap(grad)")
CASES = [(op, transform) for op in SCALAR for transform in (FEW if "option" in op else TRANSFORMS)]


@functools.cache
def _answers(op: str) -> list[dict[str, Any]]:
    """Every transform of ours and of the composition, each in one program."""
    x = jnp.asarray(IN["x"])
    names = [transform for case, transform in CASES if case == op]
    return [jax.jit(lambda x, f=f: {k: TRANSFORMS[k](f)(x) for k in names}, **QUICK)(x) for f in SCALAR[op]]


@pytest.mark.parametrize(("op", "transform"), CASES)
@pytest.mark.long
def test_transform_agrees_with_the_compositions(op: str, transform: str) -> None:
    ours, theirs = _answers(op)
    _same(ours[transform], theirs[transform])


@pytest.mark.parametrize("transform", ["value", "grad", "jvp", "hvp"])
@pytest.mark.parametrize("op", ["softmax", "every option"])
def test_transform_without_jit(op: str, transform: str) -> None:
    _same(TRANSFORMS[transform](SCALAR[op][0])(jnp.asarray(IN["x"])), _answers(op)[1][transform])


def _flat(result: tuple[Array, dict[str, Array]]) -> tuple[Array, ...]:
    return (result[0], *result[1].values())


MASK = np.arange(N * V).reshape(N, V) % 3 != 1
# Functions of every differentiable argument: (function, arguments)
CHECKED: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "softmax": (jax_ops.softmax, ["x"]),
    "softmax, all axes": (lambda x: jax_ops.softmax(x, None), ["x"]),
    "softmax, where": (lambda x: jax_ops.softmax(x, 0, MASK), ["x"]),
    "log_softmax": (lambda x: jax_ops.log_softmax(x, 0), ["x"]),
    "log_softmax, where": (lambda x: jnp.where(MASK, jax_ops.log_softmax(x, (0, 1), MASK), 0.0), ["x"]),
    "middle axis": (
        lambda x: jax_ops.cross_entropy(x.T[None], TARGET[None], axis=1, reduction="none"),
        ["x"],
    ),
    "1-d": (lambda x: jax_ops.cross_entropy(x[0], TARGET[0]), ["x"]),
    "weights": (
        lambda x, w, tw: jax_ops.cross_entropy(x, TARGET, w, token_weight=tw, label_smoothing=S),
        ["x", "w", "tw"],
    ),
    "stats": (
        lambda x: _flat(jax_ops.cross_entropy(x, TARGET, reduction="none", stats=("lse", "logprob", "entropy"))),
        ["x"],
    ),
    "soft": (lambda x, y: jax_ops.cross_entropy(x, y), ["x", "y"]),
    "soft, every option": (_full, ["x", "y", "w", "tw"]),
    "every option": (lambda x, w, tw: _full(x, None, w, tw), ["x", "w", "tw"]),
    "optax, dense": (lambda x, y: jax_ops.softmax_cross_entropy(x, y, where=MASK), ["x", "y"]),
    "optax, labels": (
        lambda x: jax_ops.softmax_cross_entropy_with_integer_labels(x, TARGET.clip(0), where=MASK),
        ["x"],
    ),
}


def check(case: str, order: int) -> None:
    fn, names = CHECKED[case]
    check_grads(jax.jit(fn), [IN[name] for name in names], order, ("fwd", "rev"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CHECKED)
def test_check_grads(case: str) -> None:
    check(case, 1)


SECOND = """
from tests.rules import test_jax_transforms as here
for case in here.CHECKED:
    print(case, flush=True)
    here.check(case, 2)
print("all checked")
"""


@pytest.mark.slow
def test_check_grads_of_order_2() -> None:
    run(SECOND)


def test_class_weights_that_differ_by_example_under_vmap() -> None:
    weights, x = np.stack([IN["w"], IN["w"][::-1]]), np.stack([IN["x"], -IN["x"]])
    f = jax.jit(jax.grad(lambda x, w: jax_ops.cross_entropy(x, TARGET, w, label_smoothing=S), (0, 1)), **QUICK)
    single = [f(a, w) for a, w in zip(x, weights, strict=True)]
    for batched, *parts in zip(jax.vmap(f)(x, weights), *single, strict=True):
        _same(batched, np.stack(parts))


# The points where a rule that picks by comparison could lose a derivative.
POINTS = {
    "zeros under the cap": np.zeros((N, V)),
    "ties": np.tile([1.0, 1.0, 0.0, 1.0, -1.0], (N, 1)),
    "one confident": np.tile([30.0, 0.0, 0.5, 1.0, -1.0], (N, 1)),
}


@functools.cache
def _higher(op: str) -> list[Callable[[Any], Any]]:
    names = ("hvp", "forward 3", "reverse 3")
    return [jax.jit(lambda x, f=f: {k: TRANSFORMS[k](f)(x) for k in names}, **QUICK) for f in SCALAR[op]]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("op", ["softmax", "soft, every option", "every option"])
@pytest.mark.long
def test_higher_orders_where_rules_change_form(op: str, point: str) -> None:
    ours, theirs = (f(POINTS[point]) for f in _higher(op))
    for transform, truth in theirs.items():
        np.testing.assert_allclose(ours[transform], truth, rtol=1e-9, atol=1e-12, err_msg=transform)


@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_masked_classes_change_no_derivative_of_the_others(kind: str) -> None:
    few = [0, 1, 3, 4]
    x, target, fewer = IN["x"].copy(), TARGET, np.array([1, -100, 3])
    x[:, 2] = -np.inf
    if kind == "soft":
        target = IN["y"] * (np.arange(V) != 2)
        fewer = target[:, few]
    v = np.cos(np.arange(N * V)).reshape(N, V)

    @functools.partial(jax.jit, **QUICK)
    def orders(x: Any, t: Any, v: Any) -> Any:
        gradient = jax.grad(lambda x: jax_ops.cross_entropy(x, t, softcap=CAP, z_loss=Z, logit_scale=SCALE))
        return gradient(x), jax.jvp(gradient, (x,), (v,))[1], jax.grad(lambda x: (gradient(x) * v).sum())(x)

    for ours, theirs in zip(orders(x, target, v), orders(x[:, few], fewer, v[:, few]), strict=True):
        assert (ours[:, 2] == 0).all()
        _same(ours[:, few], theirs)
    if kind == "soft":  # in forward mode the masked class meets the target's tangent of 0
        _, dloss = jax.jvp(jax_ops.cross_entropy, (x, target), (v, np.zeros_like(target)))
        _same(dloss, jax.jvp(lambda x: jax_ops.cross_entropy(x, fewer), (x[:, few],), (v[:, few],))[1])


def test_ignored_rows_are_reached_by_no_derivative() -> None:
    x = IN["x"].copy()
    x[1] = np.nan
    f = lambda x: jax_ops.cross_entropy(x, TARGET, label_smoothing=S, z_loss=Z, softcap=CAP)  # noqa: E731
    for transform in ("grad", "hvp", "reverse 3"):
        ours = np.asarray(jax.jit(TRANSFORMS[transform](f), **QUICK)(x))
        assert (ours[1] == 0).all()
        assert np.isfinite(ours).all()
        assert np.abs(ours[0]).min() > 0
