"""Divergences of a student from a teacher: against the reference where they are large, small and next to nothing."""

from __future__ import annotations

import warnings
from typing import Any

import mpmath
import numpy as np
import pytest

from softmax_ext import reference
from softmax_ext.contract import KINDS
from tests.judging.cases import NAN, Array
from tests.judging.divergences import BETA, DOORS, FACTS, Torch, door, judged, of_logits, pairs  # noqa: F401

DTYPES = ("float64", "float32", "bfloat16", "float16")
# In JAX every new shape and option costs a compilation.
SIZES = {"Torch": (1, 2, 5, 17, 129, 1000), "Jax": (129,)}
# Scaled logits are rounded, which costs a probability |z| units: more than the bounds where it is small.
SCALED = {"Torch": ("a tenth", "a thousandth", "a millionth", "shifted", "one logit"), "Jax": ("a thousandth",)}
OFTEN = ("float32", "bfloat16")  # all options in both doors


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_digits_at_every_distance(kind: str, dtype: str, door: Any) -> None:  # noqa: F811
    for classes in SIZES[type(door).__name__]:
        if classes == 1000 and dtype not in OFTEN:
            continue
        for name, (s, t) in pairs(classes, dtype).items():
            if classes == 1 or (kind == "tv" and name == "one logit"):  # all but one d is the rounding of 0: no sign
                continue
            scaled = {"logit_scale": 0.75, "teacher_scale": 0.75}
            more = name in SCALED[type(door).__name__] and (isinstance(door, Torch) or dtype in OFTEN)
            for options in ({}, scaled) if more else ({},):
                got = of_logits(door, s, t, dtype, kind=kind, beta=BETA, **options)
                judged(*got, s, t, dtype, kind=kind, beta=BETA, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_are_nothing_apart(kind: str, dtype: str, door: Any) -> None:  # noqa: F811
    for classes in SIZES[type(door).__name__]:
        _, t = pairs(classes, dtype)["elsewhere"]
        capped = {"logit_scale": 0.7, "teacher_scale": 0.7, "softcap": 9.0, "teacher_softcap": 9.0}
        for options in ({}, capped) if isinstance(door, Torch) or dtype in OFTEN else ({},):
            value, gradient = of_logits(door, t, t, dtype, kind=kind, beta=BETA, **options)
            assert not value.any()
            assert not gradient.any()


def as_it_stands(s: Array, t: Array, kind: str) -> tuple[Array, Array]:
    """Each row's divergence as its formula stands, and its gradient by the chain rule, in float32."""
    lp, lq = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (s.astype(np.float32), t.astype(np.float32)))
    p, q = np.exp(lp), np.exp(lq)
    m = BETA * q + (1 - BETA) * p
    value = {
        "forward_kl": q * (lq - lp),
        "reverse_kl": p * (lp - lq),
        "tv": 0.5 * np.abs(p - q),
        "jsd": BETA * q * (lq - np.log(m)) + (1 - BETA) * p * (lp - np.log(m)),
    }[kind]
    u = {
        "forward_kl": -q / p,
        "reverse_kl": lp - lq + 1,
        "tv": 0.5 * np.sign(p - q),
        "jsd": (1 - BETA) * (lp - np.log(m)),
    }[kind]
    return value.sum(-1).astype(np.float64), (p * (u - (p * u).sum(-1, keepdims=True))).astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_saboteurs_are_seen(kind: str, door: Any) -> None:  # noqa: F811
    """The formula as it stands, float64 rounded to float32 apart, and wrong parts are all out of bounds."""
    s, t = pairs(129, "float32")["a thousandth"]
    options: dict[str, Any] = {"kind": kind, "beta": BETA}
    value, gradient = of_logits(door, s, t, "float32", **options)
    judged(value, gradient, s, t, "float32", **options)

    plain, plain_gradient = as_it_stands(s, t, kind)
    wrong_values = {"as the formula stands": plain, "zeros": 0.0 * value, "negative": -value}
    if kind in ("forward_kl", "reverse_kl"):
        far, near = pairs(129, "float32")["elsewhere"]
        other = "reverse_kl" if kind == "forward_kl" else "forward_kl"
        right = of_logits(door, far, near, "float32", **options)[1]
        with pytest.raises(AssertionError):  # the sides exchanged
            judged(of_logits(door, far, near, "float32", kind=other)[0], right, far, near, "float32", **options)
    wrong_gradients = {
        "as autograd has it": plain_gradient,
        "zeros": 0.0 * gradient,
        "negative": -gradient,
        "rows shifted": np.roll(gradient, 1, 0),
        "last class unwritten": np.where(np.arange(129) == 128, 0.0, gradient),
    }
    for name, wrong in wrong_values.items():
        if (kind, name) != ("tv", "as the formula stands"):  # it loses the 1e-7 / 1e-3 of its digits there, no more
            with pytest.raises(AssertionError):
                judged(wrong, gradient, s, t, "float32", **options)
    for name, wrong in wrong_gradients.items():
        if (kind, name) != ("tv", "as autograd has it"):  # signs have all their digits
            with pytest.raises(AssertionError):
                judged(value, wrong, s, t, "float32", **options)
    if kind != "forward_kl":  # the mean of u is of the second order where rows are close
        s, t = pairs(129, "float32")["elsewhere"]
        value, gradient = of_logits(door, s, t, "float32", **options)
        mean = reference.divergence_parts(s, t, **options)[1].sum(-1, keepdims=True)
        with pytest.raises(AssertionError):
            judged(value, gradient + reference.softmax(s) * mean, s, t, "float32", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_in_fifty_digits(kind: str) -> None:
    mp = mpmath.mp.clone()
    mp.dps = 50
    for name, (s, t) in pairs(5, "float64").items():
        got = reference.divergence(s, t, kind=kind, beta=BETA, reduction="none")
        for row, other, value in zip(s, t, got, strict=True):
            a, b = ([mp.exp(mp.mpf(float(v))) for v in z] for z in (row, other))
            p, q = [v / sum(a) for v in a], [v / sum(b) for v in b]
            m = [BETA * y + (1 - mp.mpf(BETA)) * x for x, y in zip(p, q, strict=True)]
            truth = {
                "forward_kl": lambda p=p, q=q: sum(y * mp.log(y / x) for x, y in zip(p, q, strict=True)),
                "reverse_kl": lambda p=p, q=q: sum(x * mp.log(x / y) for x, y in zip(p, q, strict=True)),
                "tv": lambda p=p, q=q: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
                "jsd": lambda p=p, q=q, m=m: sum(
                    BETA * y * mp.log(y / z) + (1 - mp.mpf(BETA)) * x * mp.log(x / z)
                    for x, y, z in zip(p, q, m, strict=True)
                ),
            }[kind]()
            assert abs(value - float(truth)) <= 4e-15 * float(truth), name


S = np.sin(np.linspace(-2.0, 2.0, 18)).reshape(3, 6) * 3.0
T = np.cos(np.linspace(1.0, 4.0, 18)).reshape(3, 6) * 2.0
KEEP = np.array([True, False, True])


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_axis_anywhere(kind: str, door: Any) -> None:  # noqa: F811
    r = np.random.default_rng(3)
    s, t = r.standard_normal((2, 2, 5, 4))
    keep, up = np.array([[True] * 3 + [False], [True] * 4]), r.random((2, 4))
    arrays = {"input": s, "teacher": t, "keep": keep}
    value, gradient = door("divergence", arrays, ("input",), "float64", up, kind=kind, axis=1, reduction="none")
    given: Any = (np.moveaxis(s, 1, -1), np.moveaxis(t, 1, -1))
    truth = reference.divergence(*given, kind=kind, reduction="none") * keep
    np.testing.assert_allclose(value, truth, rtol=1e-12)
    right = reference.divergence_grad(*given, kind=kind, reduction="none", dloss=up * keep)
    np.testing.assert_allclose(np.moveaxis(gradient, 1, -1), right, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_data_facts(dtype: str, door: Any) -> None:  # noqa: F811
    """docs/data.md has the table; -1 here stands for a finite value, the reference's. Between the facts a plain row."""
    s, t = (np.array([[row, plain] for row in rows]).reshape(-1, 3)
            for rows, plain in ((_column(0), [0.0, 1.0, 2.0]), (_column(1), [0.5, 1.0, 2.0])))  # fmt: skip
    for kind, expected in zip(KINDS, zip(*_column(2), strict=True), strict=True):
        got, gradient = of_logits(door, s, t, dtype, kind=kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            truth = reference.divergence(s, t, kind=kind, reduction="none")
            right = reference.divergence_grad(s, t, kind=kind, reduction="none", dloss=np.ones(len(s)))
        for fact, value, found in zip(FACTS, expected, got[::2], strict=True):
            assert np.isfinite(found) if value == -1 else np.array_equal(found, value, equal_nan=True), (fact, kind)
        np.testing.assert_allclose(got, truth, rtol=1e-6, err_msg=kind)
        np.testing.assert_allclose(gradient, right, rtol=1e-5, atol=1e-7, err_msg=kind)


def _column(i: int) -> list[Any]:
    return [fact[i] for fact in FACTS.values()]


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_rows_not_kept_reach_nothing(memory: Any, door: Any) -> None:  # noqa: F811
    s, t = S.copy(), T.copy()
    s[1], t[1] = NAN, NAN
    arrays = {"input": s, "teacher": t, "keep": KEEP}
    value, gradient = door("divergence", arrays, ("input",), "float64")
    assert np.isfinite(value)
    assert not gradient[1].any()
    assert gradient[[0, 2]].all()
    assert np.isnan(door("divergence", {**arrays, "keep": np.zeros(3, bool)}, ("input",), "float64")[0])
    w = np.linspace(-1, 1, 24).reshape(4, 6)
    head = {"input": s, "linear_weight": w, "teacher_input": t, "teacher_weight": w[::-1], "keep": KEEP}
    _, *grads = door("linear_divergence", head, ("input", "linear_weight"), "float64", memory=memory)
    for g in grads:
        assert np.isfinite(g).all()
        assert g.any()


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_mean_of_no_row_moves_nothing(memory: Any, weighed: bool, door: Any) -> None:  # noqa: F811
    """It is NaN; what is no row's is 0 all the same, that of linear_weight included."""
    w, none = np.linspace(-1, 1, 24).reshape(4, 6), np.zeros((0, 6))
    head = {"input": none, "linear_weight": w, "teacher_input": none, "teacher_weight": w[::-1]}
    more = {"token_weight": np.zeros(0)} if weighed else {}
    given = {**head, **more}
    value, *grads = door("linear_divergence", given, ("input", "linear_weight"), "float64", memory=memory)
    assert np.isnan(value)
    assert not grads[1].any()
    value, gradient = door("divergence", {"input": none, "teacher": none, **more}, ("input",), "float64")
    assert np.isnan(value)
    assert gradient.shape == (0, 6)


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "kind": ({"kind": "kl"}, ValueError, "kind must be one of 'forward_kl', 'reverse_kl', 'jsd', 'tv'; got 'kl'."),
    "beta": ({"beta": 1.0}, ValueError, "beta must be a Python number in (0, 1); got 1.0."),
    "scale": ({"teacher_scale": 0}, ValueError, "teacher_scale must be a Python number > 0, finite; got 0."),
    "cap": ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap must be a Python number > 0, finite; got -1.0."),
    "keep": ({"keep": np.ones(3)}, TypeError, "keep must have type bool; got float64."),
    "rows": ({"keep": KEEP[:2]}, ValueError, "keep must have shape (3,); got (2,)."),
    "weights": ({"token_weight": S}, ValueError, "token_weight must have shape (3,); got (3, 6)."),
    "shape": ({"teacher": T[:2]}, ValueError, "teacher must have the input's shape (3, 6); got (2, 6)."),
    "axis": ({"axis": 2}, IndexError, "dim must be in [-2, 1] for an input of 2 dimensions; got 2."),
    "reduction": (
        {"reduction": "batchmean"},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none'; got 'batchmean'.",
    ),
}


@pytest.mark.parametrize("framework", DOORS)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_sentence(name: str, framework: str) -> None:
    given, error, sentence = MISTAKES[name]
    if name == "axis" and framework == "jax":
        sentence = sentence.replace("dim must", "axis must")
    arrays = {"input": S, "teacher": T, **given}
    options = {k: v for k, v in arrays.items() if not isinstance(v, np.ndarray)}
    arrays = {k: v for k, v in arrays.items() if isinstance(v, np.ndarray)}
    with pytest.raises(error) as caught:
        DOORS[framework]()("divergence", arrays, ("input",), "float64", **options)
    assert str(caught.value) == f"divergence: {sentence}"
