"""What a door asks of its arguments first: the arrays they stand for, and their facts for the contract."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softmax_ext.contract import Array

_KINDS = {"b": "bool", "c": "complex"}


def unwrap(x: Any, *, numbers: bool = True) -> Any:
    """x itself, or the array that a wrapper, or a Python or NumPy number, stands for."""
    if not isinstance(x, jax.Array) and hasattr(x, "__jax_array__"):
        return x.__jax_array__()
    return np.asarray(x) if numbers and isinstance(x, bool | int | float | complex | np.generic) else x


def unwrap_all(arrays: tuple[Any, ...]) -> list[Any]:
    """The arrays of a loss; its last two, the weights, have a dimension, which no number has."""
    last = len(arrays) - 2
    return [None if a is None else unwrap(a, numbers=i < last) for i, a in enumerate(arrays)]


def parts_of(target: Any) -> tuple[Any, ...]:
    """The arrays of a target: one, or the two of a sparse pair."""
    pair = isinstance(target, tuple | list) and len(target) == 2
    return tuple(unwrap(a, numbers=False) for a in target) if pair else (target,)


def describe_target(parts: tuple[Any, ...]) -> Any:
    """`describe`, of a pair each."""
    facts = tuple(None if a is None else describe(a) for a in parts)
    return facts if len(parts) > 1 else next(iter(facts))


def scale_of(logit_scale: Any) -> tuple[Any, Any]:
    """(a scale that is an array, or None; the number that the options then have)."""
    s = unwrap(logit_scale, numbers=False)
    return (s, 1.0) if isinstance(s, jax.Array | np.ndarray) else (None, logit_scale)


def describe(x: Any) -> Array:
    """The facts of an array that the contract's rules ask for."""
    if isinstance(x, np.ma.MaskedArray):  # taken for its data, it would lose its mask without a word
        return Array((), "a NumPy masked array", "masked")
    if not isinstance(x, jax.Array | np.ndarray):
        return Array((), f"{type(x).__name__} object", "other")
    dtype = x.dtype
    if jnp.issubdtype(dtype, jnp.integer):  # int4 and its like, whose NumPy kind says nothing
        return Array(tuple(x.shape), str(dtype), "int")
    if isinstance(x, np.ndarray):
        dtype = jax.dtypes.canonicalize_dtype(dtype)  # NumPy's float64 is float32 to JAX unless x64 is on
    kind = "float" if jnp.issubdtype(dtype, jnp.floating) else _KINDS.get(getattr(dtype, "kind", ""), "other")
    return Array(tuple(x.shape), str(dtype), kind)
