"""Sparse targets (ids, probabilities) in JAX: the dense soft target that adds the pairs up, in every option."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ops
from jax_ops import _reduction
from jax_ops._rows import native, plain
from softmax_ext import reference
from tests.judging import checks
from tests.judging.quick import QUICK

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 5.0, "logit_scale": 0.7},
    {"label_smoothing": 1.0},
]
OPS: Any = jax_ops
NAMES = ("lse", "logprob", "entropy", "argmax")


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["native", "plain"])
def served(request, monkeypatch, programs_for) -> str:
    """Both ways to serve a row."""
    if request.param == "native":
        assert not native.missing, native.missing
    else:
        monkeypatch.setattr(native, "missing", "taken away")
    programs_for(request.param)
    return request.param


def normal(seed: int, shape: tuple[int, ...]) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def uniform(seed: int, shape: tuple[int, ...]) -> Any:
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape))


def dense(ids: Any, v: Any, V: int, axis: int, ignored: int = -100) -> Any:
    kept = ids != ignored
    at = jax.nn.one_hot(jnp.where(kept, ids, 0), V, dtype=v.dtype, axis=axis % ids.ndim)
    return (at * jnp.expand_dims(jnp.where(kept, v, 0.0), axis % ids.ndim)).sum(axis % ids.ndim + 1)


def pair(shape: tuple[int, ...], axis: int, V: int, K: int) -> Any:
    """ids with repeats and ignored slots (but no ignored row), probabilities with NaN in those."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, tuple(K if i == axis else s for i, s in enumerate(shape)))
    v = rng.uniform(size=ids.shape)
    if K > 1:
        at = tuple(K - 1 if i == axis else 0 for i in range(ids.ndim))
        ids[at], v[at] = -100, np.nan
    return jnp.asarray(ids), jnp.asarray(v)


def numbers(f: Any, leaves: tuple[Any, ...]) -> list[Any]:
    """Value, gradient, tangent and the gradient's derivative along a direction."""
    along = tuple(jnp.where(jnp.isnan(a), 0.0, normal(i, a.shape)) for i, a in enumerate(leaves))
    up = normal(1, jax.eval_shape(f, *leaves).shape)

    def slope(*a: Any) -> Any:
        first = jax.vjp(f, *a)[1](up)
        return sum((g * d).sum() for g, d in zip(first, along, strict=True)), first

    second, first = jax.grad(slope, range(len(leaves)), has_aux=True)(*leaves)
    return [*jax.jvp(f, leaves, along), *first, *second]


def both(call: Any, ids: Any, v: Any, others: list[Any], V: int, axis: int) -> None:
    """The same numbers by the pair and by the dense target."""
    pairs, soft = lambda v, *a: call((ids, v), *a), lambda v, *a: call(dense(ids, v, V, axis), *a)
    sparse, truth = (jax.jit(partial(numbers, f), **QUICK)((v, *others)) for f in (pairs, soft))
    for a, b in zip(sparse, truth, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


# one option set each: every form and every option is met, and a program is compiled for few
LOGITS = [((5, 9), 1, 3, 0), ((3, 8, 2, 2), 1, 4, 1), ((7,), 0, 2, 2), ((2, 3, 20), 2, 12, 1)]


def judge_logits(form: Any) -> None:
    shape, axis, K, which = form
    V, rows = shape[axis], shape[:axis] + shape[axis + 1 :]
    ids, v = pair(shape, axis, V, K)
    given = [normal(5, shape), uniform(6, (V,)), uniform(7, rows)]

    def call(target: Any, x: Any, w: Any, t: Any) -> Any:
        more = {"token_weight": t, "axis": axis, **OPTIONS[which]}
        rows = OPS.cross_entropy(x, target, w, reduction="none", **more)
        return jnp.append(rows, OPS.cross_entropy(x, target, w, **more))

    both(call, ids, v, given, V, axis)


@pytest.mark.parametrize("form", LOGITS, ids=str)
def test_logits(form):
    assert not native.missing, native.missing
    judge_logits(form)


HEADS: dict[str, Any] = {
    "plain": ((5,), (), {"reduction": "mean", "chunk_size": 2}, 0),
    "lead": ((2, 3), (), {"reduction": "none", "memory": "lean", "chunk_size": 4}, 1),
    "shift": ((2, 4), (), {"reduction": "sum", "shift": 1}, 1),
    "kd": ((5,), (2,), {"reduction": "mean"}, 1),
    "one": ((), (), {"reduction": "none"}, 0),
}


@pytest.mark.parametrize("form", HEADS)
def test_heads(form):
    lead, inner, more, which = HEADS[form]
    D, V, K = 4, 9, 3
    axis = 1 if inner else len(lead)
    ids, v = pair((*lead, V, *inner), axis, V, K)
    given = [normal(1, (*lead, D)), normal(2, (V, *inner, D)), normal(3, (V, *inner)), uniform(4, (V,)),
             uniform(5, (*lead, *inner))]  # fmt: skip

    def call(target: Any, x: Any, W: Any, b: Any, w: Any, t: Any) -> Any:
        how = {"weight": w, "token_weight": t, **more, **OPTIONS[which]}
        return OPS.linear_cross_entropy(x, W, target, linear_bias=b, **how)

    both(call, ids, v, given, V, axis)


def wrong(name: str, by: Any) -> Any:
    """A saboteur: a function of the plain rows with its result changed."""
    right = getattr(plain, name)
    return plain, name, lambda *args: by(right(*args), *args)


def not_added(each: Any, t: Any, like: Any, axis: int) -> Any:
    """The mass of a class named twice is that of one slot."""
    slots = jax.nn.one_hot(t, like.shape[axis], dtype=each.dtype, axis=axis) * jnp.expand_dims(each, axis)
    return slots.max(axis + 1)


SABOTEURS = {
    "repeated ids do not add": (plain, "spread", not_added),
    "the ids' own term dropped": wrong("spread", lambda out, *_: 0.0 * out),
    "an ignored slot counts": (_reduction, "IGNORED", -7),
    "every id has the first one's nll": wrong("each_nll", lambda out, *_: out[:1] + 0.0 * out),
    "a sum over slots forgets the mass": (_reduction, "mass_sum", lambda mass, nll, axis: nll.sum(axis)),
}


@pytest.mark.parametrize("name", SABOTEURS)
def test_wrong_rows_are_seen(name, monkeypatch):
    monkeypatch.setattr(native, "missing", "taken away")
    monkeypatch.setattr(*SABOTEURS[name])
    jax.clear_caches()
    with pytest.raises(AssertionError):
        judge_logits(LOGITS[0])
    monkeypatch.undo()
    jax.clear_caches()


def head_or_logits(x: Any, target: Any, **options: Any) -> Iterator[Any]:
    """The loss of logits x, and the same through a head that is the identity, fast and lean."""
    yield lambda x: OPS.cross_entropy(x, target, **options)
    eye = jnp.eye(x.shape[1], dtype=x.dtype)
    for memory in ("fast", "lean"):
        how = {"memory": memory, "chunk_size": 3, **options}
        yield lambda x, how=how: OPS.linear_cross_entropy(x, eye, target, **how)


IDS = np.array([[0, 5, -100], [2, 1, 1], [-100, -100, -100], [3, 3, 0]])


def test_statistics_at_every_id(served):
    x = np.array(normal(0, (4, 6)))
    x[1, 2] = -np.inf
    up, options = np.array(normal(1, (4, 3))), {"axis": 1, "stats": NAMES, "reduction": "sum"}
    grad = reference.cross_entropy_grad(x, (IDS, np.zeros((4, 3))), dloss=0.0, dstats={"logprob": up}, **options)
    _, stats = reference.cross_entropy(x, (IDS, np.zeros((4, 3))), **options)
    ours = lambda x: OPS.cross_entropy(x, (IDS, jnp.zeros((4, 3))), reduction="sum", stats=NAMES)[1]  # noqa: E731
    found, pull = jax.vjp(lambda x: ours(x)["logprob"], jnp.asarray(x))
    for name, value in ours(jnp.asarray(x)).items():
        np.testing.assert_allclose(value, stats[name], rtol=1e-12, atol=1e-12)
    assert np.isneginf(found).tolist() == [[False] * 3, [True, False, False], [False] * 3, [False] * 3]
    np.testing.assert_allclose(pull(jnp.asarray(up))[0], grad, rtol=1e-12, atol=1e-12)
    finite = jnp.maximum(x, -50.0)
    rows = OPS.cross_entropy(finite, (IDS, up), stats=NAMES)[1]
    for memory in ("fast", "lean"):
        head = OPS.linear_cross_entropy(finite, jnp.eye(6), (IDS, up), stats=NAMES, memory=memory, chunk_size=2)[1]
        for name in NAMES:
            np.testing.assert_allclose(head[name], rows[name], rtol=1e-12, atol=1e-12)
    twice = lambda a: jnp.stack([a, a], -1)  # noqa: E731
    weight = twice(jnp.eye(6)).swapaxes(1, 2)
    kd = OPS.linear_cross_entropy(finite, weight, (twice(IDS), twice(up)), stats=("logprob",))[1]["logprob"]
    np.testing.assert_allclose(kd, twice(rows["logprob"]), rtol=1e-12, atol=1e-12)
    moved = OPS.linear_cross_entropy(finite[None], jnp.eye(6), (IDS[None], up[None]), shift=1, stats=("logprob",))
    later = OPS.cross_entropy(finite[:-1], (IDS[1:], up[1:]), stats=("logprob",))
    np.testing.assert_allclose(moved[0], later[0], rtol=1e-12)
    np.testing.assert_allclose(moved[1]["logprob"][0], later[1]["logprob"], rtol=1e-12)


def test_ignored_slots_and_rows():
    x, v = np.array(normal(0, (4, 6))), np.array(uniform(1, (4, 3)))
    v[IDS == -100] = np.nan
    x[2] = np.nan  # an ignored row reaches nothing
    kept, t = np.array([0, 1, 3]), np.array([1.0, 2.0, np.nan, 0.5])
    y = dense(jnp.asarray(IDS[kept]), jnp.asarray(v[kept]), 6, 1)
    truth = OPS.cross_entropy(x[kept], y, token_weight=t[kept])
    for loss in head_or_logits(x, (IDS, v), token_weight=t):
        value, g = jax.value_and_grad(loss)(jnp.asarray(x))
        np.testing.assert_allclose(value, truth, rtol=1e-12)
        assert (g[2] == 0).all()
        assert jnp.isfinite(g).all()
    # an explicit ignore_index may be a class here, and K = 0 or no kept slot is a mean over nothing
    ids5 = np.where(IDS == -100, 5, np.where(IDS == 5, 4, IDS))
    y = dense(jnp.asarray(ids5[kept]), jnp.asarray(v[kept]), 6, 1, ignored=5)
    ours = OPS.cross_entropy(x, (ids5, v), ignore_index=5)
    np.testing.assert_allclose(ours, OPS.cross_entropy(x[kept], y), rtol=1e-12)
    for none in (IDS[:3, :0], np.full((3, 3), -100)):
        target = (none, v[:3, : none.shape[1]])
        for loss in head_or_logits(x, target, on_all_ignored="zero"):
            value, g = jax.value_and_grad(loss)(jnp.asarray(x[kept]))
            assert value == 0
            assert (g == 0).all()
        assert all(jnp.isnan(loss(jnp.asarray(x[kept]))) for loss in head_or_logits(x, target))


def test_mass_on_a_masked_class(served):
    """A probability of 0 there counts nothing, more than 0 is an infinite loss; the gradient is the dense target's."""
    x = normal(0, (3, 6)).at[:, 2].set(-jnp.inf)
    ids, v = jnp.array([[2, 1], [2, 1], [0, 1]]), jnp.array([[0.0, 0.7], [0.3, 0.7], [0.5, 0.5]])
    for w in (None, uniform(1, (6,))):
        results = []
        for sparse in (True, False):

            def loss(x: Any, v: Any, w: Any = w, sparse: bool = sparse) -> Any:
                return OPS.cross_entropy(x, (ids, v) if sparse else dense(ids, v, 6, 1), w, reduction="none")

            out, pull = jax.vjp(loss, x, v)
            results.append([out, *pull(jnp.ones(3))])
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        assert results[0][0][1] == jnp.inf
    truth, low = OPS.cross_entropy(x, (ids, v), reduction="none")[::2], jnp.where(jnp.isinf(x), -1e4, x)
    for of in head_or_logits(x, (ids, v), reduction="none"):
        np.testing.assert_allclose(of(low)[::2], truth, rtol=1e-9)


def test_confident_rows_keep_their_digits(served):
    x = np.zeros((2, 1000), np.float32)
    x[:, 7] = 60.0
    ids, v = np.array([[7, -100, 7], [7, 3, -100]]), np.array([[0.25, 0, 0.75], [1, 0.5, 0]], np.float32)
    for loss in (lambda x: OPS.cross_entropy(x, (ids, v), reduction="sum"),
                 lambda x: OPS.linear_cross_entropy(jnp.eye(2, dtype=jnp.float32), x.T, (ids, v), reduction="sum",
                                                    memory="lean", chunk_size=300)):  # fmt: skip
        g = jax.grad(loss)(jnp.asarray(x))
        truth = reference.cross_entropy_grad(np.float64(x), (ids, np.float64(v)), axis=1, reduction="sum")
        checks.close(np.array(g), truth, np.abs(truth), dtype="float32", c=8)
        assert abs(g[0, 7]) > 1e-30


def test_ids_of_no_class(served):
    x, v = normal(0, (3, 6)), jnp.ones((3, 2))
    ids = np.array([[0, 1], [2, 6], [3, -1]])
    for loss in head_or_logits(x, (ids, v), reduction="none", label_smoothing=0.1):
        value, pull = jax.vjp(loss, x)
        assert jnp.isnan(value).tolist() == [False, True, True]
        g = pull(jnp.ones(3))[0]
        assert jnp.isnan(g).all(1).tolist() == jnp.isnan(g).any(1).tolist() == [False, True, True]


def test_types_of_ids_and_probabilities():
    x, ids, v = jnp.float32(normal(0, (4, 6))), np.array([[0, 5]] * 4), np.float32(uniform(1, (4, 2)))
    truth = OPS.cross_entropy(x, (ids, v))
    for kind in (np.int32, np.int8, np.uint8):
        assert OPS.cross_entropy(x, [ids.astype(kind), v]) == truth
    assert OPS.cross_entropy(x, (jnp.asarray(ids), v)) == truth
    half = jnp.asarray(v, jnp.bfloat16)
    assert OPS.cross_entropy(x, (ids, half)) == OPS.cross_entropy(x, (ids, jnp.float32(half)))
    low, w = x.astype(jnp.bfloat16), normal(2, (6, 6)).astype(jnp.bfloat16)
    assert OPS.cross_entropy(low, (ids, v)).dtype == jnp.float32
    found = jax.grad(lambda x, w: OPS.linear_cross_entropy(x, w, (ids, v), reduction="sum"), (0, 1))
    for a, b in zip(found(low, w), found(jnp.float64(low), jnp.float64(w)), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(a), b, rtol=0.03, atol=0.03)


def test_transforms():
    x, ids, v = (
        normal(0, (3, 5, 6)),
        jnp.asarray(np.random.default_rng(0).integers(0, 6, (3, 5, 2))),
        uniform(1, (3, 5, 2)),
    )
    W = normal(2, (6, 6))
    for one in (
        lambda x, i, v: OPS.cross_entropy(x, (i, v), label_smoothing=0.1),
        lambda x, i, v: OPS.linear_cross_entropy(x, W, (i, v)),
    ):
        many = jax.vmap(jax.grad(one, (0, 2)))(x, ids, v)
        shared = jax.vmap(jax.grad(one, (0, 2)), (None, 0, None))(x[0], ids, v[0])
        again = jax.jit(jax.grad(jax.checkpoint(one), (0, 2)))
        for j in range(3):
            for a, b in zip(many, again(x[j], ids[j], v[j]), strict=True):
                np.testing.assert_allclose(a[j], b, rtol=1e-12, atol=1e-14)
        for a, b in zip(shared, again(x[0], ids[2], v[0]), strict=True):
            np.testing.assert_allclose(a[2], b, rtol=1e-12, atol=1e-14)


def test_mistakes():
    x, ids, v = normal(0, (3, 6)), np.zeros((3, 2), int), np.ones((3, 2))
    for target, words in (
        ((v, v), "target must have ids of an integer type in its pair; got float64."),
        ((ids, ids), "target must have probabilities of a floating type in its pair; got int64."),
        ((ids, v[:2]), "target must have probabilities of shape (3, 2) in its pair; got (2, 2)."),
        ((ids, np.ma.masked_array(v)), "target must be an array without a mask (or its filled copy); "
         "got a NumPy masked array."),
        ((ids, None), "target must be an array; got None."),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as error:
            OPS.cross_entropy(x, target)
        assert str(error.value) == "cross_entropy: " + words
