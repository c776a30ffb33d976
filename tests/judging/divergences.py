"""Pairs of rows at every distance, what is known of odd ones, and how an answer about them is judged."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.judging import quick
from tests.judging.cases import INF, NAN, Array, rounded
from tests.judging.checks import close

Named = dict[str, Any]

BETA = 0.3


def pairs(classes: int, dtype: str) -> dict[str, tuple[Array, Array]]:
    """(student, teacher) of every distance that the type can tell."""
    r = np.random.default_rng(classes)
    t = rounded(2.0 * r.standard_normal((3, classes)), dtype)
    n = r.standard_normal((3, classes))
    one = t.copy()
    one[:, -1] *= 1 + {"float64": 2.0**-51, "float32": 2.0**-22, "bfloat16": 2.0**-6, "float16": 2.0**-9}[dtype]
    found = {
        "elsewhere": (3.0 * n, t),
        "a tenth": (t + 0.1 * n, t),
        "a thousandth": (t + 1e-3 * n, t),
        "a millionth": (t + 1e-6 * n, t),
        "shifted": (t + 5.0 + 1e-3 * n, t),
        "one logit": (one, t),
        "confident": (t + 30.0 * (np.arange(classes) == 0), t),
    }
    return {name: (rounded(s, dtype), t) for name, (s, t) in found.items()}


def judged(value: Array, gradient: Array, s: Array, t: Array, dtype: str, c: float = 8.0, **options: Any) -> None:
    """Values to a few units of their own size, gradients to those of p (|u| + sum p |u|), however small they are."""
    truth, right, size = _truth(s.tobytes(), t.tobytes(), s.shape, tuple(options.items()))
    wide = "float64" if dtype == "float64" else "float32"
    close(value, truth, np.abs(truth), dtype=wide, c=c, what="divergence")
    close(gradient, right, options.get("logit_scale", 1.0) * size, dtype=dtype, c=c, what="gradient")


@functools.cache
def _truth(student: bytes, teacher: bytes, shape: tuple[int, ...], given: tuple[tuple[str, Any], ...]) -> Any:
    """(values, gradients, what a gradient's errors are judged by): the same for every door."""
    s, t = (np.frombuffer(x).reshape(shape) for x in (student, teacher))
    options: Named = dict(given)
    right = reference.divergence_grad(s, t, reduction="none", dloss=np.ones(len(s)), **options)
    p = reference.softmax(s * options.get("logit_scale", 1.0))
    pu = np.abs(reference.divergence_parts(s, t, **options)[1])
    return reference.divergence(s, t, reduction="none", **options), right, pu + p * pu.sum(-1, keepdims=True)


# (student, teacher): forward KL, reverse KL, jsd, tv; inf where a side has no class that the other needs
FACTS: dict[str, tuple[list[float], list[float], tuple[float, ...]]] = {
    "neither has the class": ([0.0, 1.0, -INF], [1.0, 0.0, -INF], (-1, -1, -1, -1)),
    "the teacher lacks it": ([0.0, 1.0, 0.5], [1.0, 0.0, -INF], (-1, INF, -1, -1)),
    "the student lacks it": ([0.0, 1.0, -INF], [1.0, 0.0, 0.5], (INF, -1, -1, -1)),
    "no class at all": ([-INF] * 3, [0.0, 1.0, 2.0], (NAN,) * 4),
    "a teacher of nothing": ([0.0, 1.0, 2.0], [-INF] * 3, (NAN,) * 4),
    "not a number": ([0.0, NAN, 2.0], [0.0, 1.0, 2.0], (NAN,) * 4),
    "the teacher's not a number": ([0.0, 1.0, 2.0], [0.0, NAN, 2.0], (NAN,) * 4),
    "too large": ([0.0, INF, 2.0], [0.0, 1.0, 2.0], (NAN,) * 4),
}


class Torch:
    """torch_ops on NumPy arrays: values, and gradients of those named, for upstream gradients of 1 or given ones."""

    def __init__(self, device: str = "cpu") -> None:
        self.ops, self.torch = (importlib.import_module(name) for name in ("torch_ops", "torch"))
        self.device = device

    def __call__(self, op: str, arrays: Named, wrt: tuple[str, ...], dtype: str, up: Any = None, **options: Any) -> Any:
        if "axis" in options:
            options["dim"] = options.pop("axis")
        given = {k: self.torch.from_numpy(np.array(v)).to(self.device) for k, v in arrays.items()}
        given = {k: v.to(getattr(self.torch, dtype)) if v.is_floating_point() else v for k, v in given.items()}
        leaves = [given[k].requires_grad_() for k in wrt]
        value = getattr(self.ops, op)(**given, **options)
        up = self.torch.ones_like(value) if up is None else self.torch.from_numpy(up).to(value)
        grads = self.torch.autograd.grad(value, leaves, up)
        assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, leaves, strict=True))
        return value.detach().double().cpu().numpy(), *(g.double().cpu().numpy() for g in grads)


class Jax:
    """jax_ops likewise, under jit; 64-bit types are on for float64 only."""

    def __init__(self) -> None:
        self.ops, self.jax = (importlib.import_module(name) for name in ("jax_ops", "jax"))

    def __call__(self, op: str, arrays: Named, wrt: tuple[str, ...], dtype: str, up: Any = None, **options: Any) -> Any:
        jax, jnp = self.jax, self.jax.numpy
        with jax.enable_x64(dtype == "float64"):
            given = {k: jnp.asarray(v, dtype if np.asarray(v).dtype.kind == "f" else None) for k, v in arrays.items()}
            # a head's formulas in float64, its roundings and those of rows in what is used
            formulas = dtype == "float64" and op == "linear_divergence"
            answer = self._compiled(op, wrt, tuple(options.items()), formulas)
            value, grads = answer(given, None if up is None else jnp.asarray(up))
            assert all(g.dtype == given[k].dtype for k, g in zip(wrt, grads, strict=True))
            return tuple(np.asarray(a.astype(value.dtype), np.float64) for a in (value, *grads))

    @functools.cache  # noqa: B019
    def _compiled(self, op: str, wrt: tuple[str, ...], options: tuple[tuple[str, Any], ...], formulas: bool) -> Any:
        def answer(arrays: Named, up: Any) -> Any:
            def of(moving: Named) -> Any:
                return getattr(self.ops, op)(**{**arrays, **moving}, **dict(options))

            value, pull = self.jax.vjp(of, {k: arrays[k] for k in wrt})
            (grads,) = pull(self.jax.numpy.ones_like(value) if up is None else up.astype(value.dtype))
            return value, [grads[k] for k in wrt]

        return self.jax.jit(answer, **quick.QUICK if formulas else {})


DOORS = {name: kind for name, kind in (("torch", Torch), ("jax", Jax)) if find_spec(name)}
SERVED = [f"{name} {rows}" for name in DOORS for rows in ("native", "plain")]


@pytest.fixture(params=SERVED, scope="module")
def door(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each framework, by its kernels and without; for all tests of a file that take it, which share JAX's programs."""
    name, rows = request.param.split()
    native = importlib.import_module(f"{name}_ops._rows.native")
    if rows == "native" and native.missing:
        pytest.skip(f"no native kernels: {native.missing}")
    found: Any = DOORS[name]()
    with pytest.MonkeyPatch.context() as patch:
        if rows == "plain" and name == "torch":
            patch.setattr(native, "serves", lambda x, dim: False)
        if rows == "plain" and name == "jax":
            patch.setattr(native, "missing", "asked for by a test")
            found.jax.clear_caches()
        yield found
    if rows == "plain" and name == "jax":
        found.jax.clear_caches()


def of_logits(door: Any, s: Array, t: Array, dtype: str, **options: Any) -> tuple[Array, Array]:
    """(the divergence of each row, its gradient)."""
    return door("divergence", {"input": s, "teacher": t}, ("input",), dtype, reduction="none", **options)
