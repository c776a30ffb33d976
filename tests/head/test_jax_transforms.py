"""jax_ops.linear_cross_entropy under every transform, to every order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import jax_ops  # noqa: E402
from tests.head.jax_arrays import IN, MODES, TARGET, TRANSFORMS, D, N, V, _both, _head, _same, _total  # noqa: E402
from tests.judging.quick import QUICK, run  # noqa: E402

OPTIONS: dict[str, Any] = {"label_smoothing": 0.2, "logit_scale": 0.7, "softcap": 3.0, "z_loss": 0.1}


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


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
from tests.head import test_jax_transforms as here
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
