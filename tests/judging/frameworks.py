"""The same call in both frameworks: NumPy in, NumPy out, values and gradients together.

An answer is (values, gradients), both by name: values["value"] is the result, next to any statistics;
gradients holds every floating argument's, for the upstream gradients given under the values' names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.judging import quick

Named = dict[str, Any]
Answer = tuple[Named, Named]
HALF = ("bfloat16", "float16")
INTEGERS = ("argmax", "rank")


def loss_dtype(dtype: str) -> str:
    return "float32" if dtype in HALF else dtype


def _named(out: Any) -> Named:
    loss, stats = out if isinstance(out, tuple) else (out, {})
    return {"value": loss, **stats}


def _expected(op: str, dtype: str) -> str:
    return dtype if op in ("softmax", "log_softmax") else loss_dtype(dtype)


class Torch:
    """torch_ops, eagerly; an array's strides (0 included) become the tensor's."""

    name: ClassVar[str] = "torch"

    def __init__(self) -> None:
        self.ops = importlib.import_module("torch_ops")
        self.rows = importlib.import_module("torch_ops._rows.dispatch")
        self.torch = importlib.import_module("torch")

    def bits(self, dtype: str) -> Any:
        """The context in which the type exists."""
        return contextlib.nullcontext()

    def array(self, value: Any, dtype: str) -> Any:
        v = np.asarray(value)
        kind = getattr(self.torch, dtype) if v.dtype.kind == "f" else None
        if 0 in v.shape:
            return self.torch.from_numpy(v.copy()).to(kind)
        small = v[tuple(slice(0, 1) if s == 0 else slice(None) for s in v.strides)]
        flat = self.torch.from_numpy(np.array(small, order="C")).to(kind)
        if any(s % v.itemsize for s in v.strides):
            return flat.expand(v.shape)
        out = self.torch.empty_strided(flat.shape, [s // v.itemsize for s in small.strides], dtype=flat.dtype)
        return out.copy_(flat).expand(v.shape)

    def numpy(self, x: Any) -> Any:
        x = x.detach()
        return (x.double() if x.is_floating_point() else x).numpy()

    def raw(self, op: str, **arguments: Any) -> Any:
        """The public function on the framework's own arrays."""
        return getattr(self.ops, op)(arguments.pop("input"), **arguments)

    def __call__(self, op: str, dtype: str, arrays: Named, upstream: Named | None = None, **options: Any) -> Answer:
        if "axis" in options:
            options["dim"] = options.pop("axis")
        given = {k: self.array(v, dtype) for k, v in arrays.items()}
        leaves = {k: v for k, v in given.items() if v.is_floating_point()}
        if upstream is not None:
            for leaf in leaves.values():
                leaf.requires_grad_()
        values = _named(self.raw(op, **given, **options))
        kind = _expected(op, dtype)
        assert all(str(v.dtype) == f"torch.{kind}" for k, v in values.items() if k not in INTEGERS)
        grads = {}
        if upstream is not None:
            ups = [self.array(u, kind) for u in upstream.values()]
            out = self.torch.autograd.grad(
                [values[k] for k in upstream], list(leaves.values()), ups, materialize_grads=True
            )
            assert all(g.dtype == leaf.dtype for g, leaf in zip(out, leaves.values(), strict=True))
            grads = {k: self.numpy(g) for k, g in zip(leaves, out, strict=True)}
        return {k: self.numpy(v) for k, v in values.items()}, grads


class Jax:
    """jax_ops under jit; 64-bit types are on for float64 only, as most users have it."""

    name: ClassVar[str] = "jax"

    def __init__(self) -> None:
        self.ops = importlib.import_module("jax_ops")
        self.rows = importlib.import_module("jax_ops._rows.dispatch")
        self.jax = importlib.import_module("jax")

    def bits(self, dtype: str) -> Any:
        return self.jax.enable_x64(dtype == "float64")

    def array(self, value: Any, dtype: str) -> Any:
        v = np.asarray(value)
        return self.jax.numpy.asarray(v, dtype if v.dtype.kind == "f" else None)

    def numpy(self, x: Any) -> Any:
        v = np.asarray(x)
        return v if v.dtype.kind in "iu" else v.astype(np.float64)

    def raw(self, op: str, **arguments: Any) -> Any:
        return getattr(self.ops, op)(arguments.pop("input"), **arguments)

    def __call__(self, op: str, dtype: str, arrays: Named, upstream: Named | None = None, **options: Any) -> Answer:
        if op == "cross_entropy":
            options["axis"] = 1 if np.ndim(arrays["input"]) > 1 else 0
        with self.bits(dtype):
            given = {k: self.array(v, dtype) for k, v in arrays.items()}
            kind = _expected(op, dtype)
            ups = None if upstream is None else {k: self.array(u, kind) for k, u in upstream.items()}
            values, grads = self._compiled(op, tuple(sorted(options.items())), dtype == "float64")(given, ups)
            assert all(v.dtype == kind for k, v in values.items() if k not in INTEGERS)
            assert all(g.dtype == given[k].dtype for k, g in grads.items())
            return tuple({k: self.numpy(v) for k, v in d.items()} for d in (values, grads))  # pyright: ignore

    @functools.cache  # noqa: B019
    def _compiled(self, op: str, options: tuple[tuple[str, Any], ...], wide: bool) -> Any:
        def answer(arrays: Named, ups: Named | None) -> Answer:
            floats = {k: v for k, v in arrays.items() if v.dtype.kind not in "iu"}

            def run(floats: Named) -> Named:
                return _named(self.raw(op, **{**arrays, **floats}, **dict(options)))

            if ups is None:
                return run(floats), {}
            values, pull = self.jax.vjp(run, floats)
            zero = np.zeros
            full = {
                k: ups.get(k, zero(v.shape, self.jax.dtypes.float0 if v.dtype.kind in "iu" else v.dtype))
                for k, v in values.items()
            }
            return values, pull(full)[0]

        return self.jax.jit(answer, **quick.QUICK if wide else {})  # formulas in float64, roundings in what is used


def _load(kind: Any) -> tuple[Any, str]:
    try:
        return kind(), ""
    except ImportError as error:
        return None, str(error)


_LOADED = {kind.name: _load(kind) for kind in (Torch, Jax)}
HERE = [fw for fw, _ in _LOADED.values() if fw is not None]
BOTH = [
    pytest.param(fw, id=name, marks=[pytest.mark.skipif(fw is None, reason=f"no {name}_ops here: {why}")])
    for name, (fw, why) in _LOADED.items()
]


def both(test: Any) -> Any:
    """Run a test once for each framework, skipping aloud where it is absent."""
    return pytest.mark.parametrize("fw", BOTH)(test)


def only(name: str) -> Any:
    """Run a test in one framework."""
    return pytest.mark.parametrize("fw", [p for p in BOTH if p.id == name])


def each(names: tuple[str, ...], *, torch: Iterable[tuple[Any, ...]], jax: Iterable[tuple[Any, ...]]) -> Any:
    """Run a test in both, over fewer cases in JAX, where every new shape and option costs a compilation."""
    params = []
    for door, values in zip(BOTH, (torch, jax), strict=True):
        for v in values:
            words = "-".join(str(x).replace(" ", "_") for x in v)
            params.append(pytest.param(*door.values, *v, id=f"{door.id}-{words}", marks=door.marks))
    return pytest.mark.parametrize(("fw", *names), params)
