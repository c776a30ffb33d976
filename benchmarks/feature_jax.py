"""JAX's peers and what they are asked, as PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jax_ops
import softmax_ext
from benchmarks import feature_cases as cases
from benchmarks.feature_cases import Absent, Question

Array = jax.Array


@dataclass(frozen=True)
class Peer:
    """A library's way to the loss of each row; `stats` gives (log-probability, entropy) of each."""

    version: str
    rows: Callable[..., Array]
    stats: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None


def _arrays(*arrays: Any) -> list[Array]:
    return [jnp.asarray(a, jnp.float32 if a.dtype.kind == "f" else jnp.int32) for a in arrays]


def _row_losses(peer: Peer, target: Any = cases.TARGET, **options: Any) -> dict[str, tuple[Any, Any]]:
    x, head, mine, up = _arrays(cases.X, cases.HEAD, target, cases.UP)
    given = {name: jnp.asarray(o, jnp.float32) if name == "weight" else o for name, o in options.items()}
    value, gradient = cases.truth(target, **options)
    rows = peer.rows(x, head, mine, **given)
    found = jax.grad(lambda x: (peer.rows(x, head, mine, **given) * up).sum())(x)
    return {"loss": (rows, value), "gradient": (found, gradient)}


def _sparse(peer: Peer) -> dict[str, tuple[Any, Any]]:
    x, head, up, ids, shares = _arrays(cases.X, cases.HEAD, cases.UP, cases.IDS, cases.SHARES)
    value, gradient = cases.truth(cases.dense())
    rows = peer.rows(x, head, (ids, shares))
    found = jax.grad(lambda x: (peer.rows(x, head, (ids, shares)) * up).sum())(x)
    return {"loss": (rows, value), "gradient": (found, gradient)}


def _confident(peer: Peer) -> dict[str, tuple[Any, Any]]:
    x, head, target = _arrays(cases.SURE_X, cases.SURE_HEAD, cases.SURE_TARGET)
    loss, gradient = jax.value_and_grad(lambda x: peer.rows(x, head, target).sum())(x)
    tail = 8.75651076269652e-27  # exp(-60)
    return {"loss": (float(loss) / tail, 4.0), "gradient": (float(gradient[0, 0]) / tail, -4.0)}


def _summed(peer: Peer) -> tuple[Callable[[Array], Array], Array, Array]:
    x, head, target, up, direction = _arrays(cases.X, cases.HEAD, cases.TARGET, cases.UP, cases.DIRECTION)
    return lambda x: (peer.rows(x, head, target) * up).sum(), x, direction


def _second(peer: Peer) -> dict[str, tuple[Any, Any]]:
    loss, x, direction = _summed(peer)
    along = jax.grad(lambda x: (jax.grad(loss)(x) * direction).sum())(x)
    return {"second derivative": (along, cases.second())}


def _forward(peer: Peer) -> dict[str, tuple[Any, Any]]:
    loss, x, direction = _summed(peer)
    return {"tangent": (jax.jvp(loss, (x,), (direction,))[1], (cases.truth()[1] * cases.DIRECTION).sum())}


def _mapped(peer: Peer) -> dict[str, tuple[Any, Any]]:
    loss, x, _ = _summed(peer)
    return {"gradients": (jax.vmap(jax.grad(loss))(jnp.stack([x, x])), [cases.truth()[1]] * 2)}


def _weight_gradient(peer: Peer) -> dict[str, tuple[Any, Any]]:
    x, head, target, up, weight = _arrays(cases.X, cases.HEAD, cases.TARGET, cases.UP, cases.WEIGHT)
    found = jax.grad(lambda weight: (peer.rows(x, head, target, weight=weight) * up).sum())(weight)
    return {"gradient": (found, cases.class_weight_gradient())}


def _stats(peer: Peer) -> dict[str, tuple[Any, Any]]:
    if peer.stats is None:
        raise Absent("no statistics of a row")
    x, head, target, up = _arrays(cases.X, cases.HEAD, cases.TARGET, cases.UP)
    (loss_rows, loss_gradient), (rows, gradient) = cases.truth(), cases.entropy()
    stats = peer.stats
    logprob, entropy = stats(x, head, target)
    mine = [jax.grad(lambda x, i=i: (stats(x, head, target)[i] * up).sum())(x) for i in range(2)]
    return {
        "log-probability": (logprob, -loss_rows),
        "its gradient": (mine[0], -loss_gradient),
        "entropy": (entropy, rows),
        "its gradient too": (mine[1], gradient),
    }


QUESTIONS = [
    Question("loss and gradient of each row", _row_losses),
    Question("soft targets", lambda peer: _row_losses(peer, cases.SOFT)),
    Question("K classes a row as target", _sparse),
    Question("class weights", lambda peer: _row_losses(peer, weight=cases.WEIGHT)),
    *(Question(name, lambda peer, o=o: _row_losses(peer, **o)) for name, o in cases.OPTIONS.items()),
    Question("log-probability and entropy", _stats),
    Question("gradient of class weights", _weight_gradient),
    Question("second derivatives", _second),
    Question("forward mode", _forward),
    Question("vmap of the gradient", _mapped),
    Question("a confident row's digits", _confident, floor=0.0),
]


def _only(known: tuple[str, ...], options: dict[str, Any], target: Any) -> None:
    if isinstance(target, tuple):
        raise Absent("no sparse targets")
    for name in options:
        if name not in known:
            raise Absent(f"no {name}")


def _ours() -> Peer:
    def stats(x: Array, head: Array, target: Array) -> tuple[Array, Array]:
        found = jax_ops.linear_cross_entropy(x, head, target, reduction="none", stats=("logprob", "entropy"))[1]
        return found["logprob"], found["entropy"]

    def rows(x: Array, head: Array, target: Array, **options: Any) -> Array:
        return jax_ops.linear_cross_entropy(x, head, target, reduction="none", **options)

    return Peer(softmax_ext.__version__, rows, stats)


def _optax() -> Peer:
    def rows(x: Array, head: Array, target: Array, **options: Any) -> Array:
        _only((), options, target)
        soft = jnp.issubdtype(target.dtype, jnp.floating)
        loss = optax.softmax_cross_entropy if soft else optax.softmax_cross_entropy_with_integer_labels
        return loss(x @ head.T, target)

    return Peer(f"{optax.__version__}, jax {jax.__version__}", rows)


def _tokamax() -> Peer:
    import tokamax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # or it takes this program's options for its own

    def rows(x: Array, head: Array, target: Array, **options: Any) -> Array:
        _only((), options, target)
        if jnp.issubdtype(target.dtype, jnp.floating):
            raise Absent("class indices only")
        # it has sums and means alone: a row at a time
        return jnp.stack(
            [
                tokamax.linear_softmax_cross_entropy_loss(x[i : i + 1], target[i : i + 1], head.T, implementation="xla")
                for i in range(len(x))
            ]
        )

    return Peer(version("tokamax"), rows)


PEERS: dict[str, Callable[[], Peer]] = {"softmax-ext, JAX": _ours, "optax": _optax, "tokamax": _tokamax}
