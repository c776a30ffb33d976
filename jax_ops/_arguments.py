"""What the ops share about arrays: their facts for the contract, and one set of varying mesh axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray

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


def same_axes(*arrays: Any, but: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """The arrays, varying over the same mesh axes: inside shard_map a derivative has its argument's type.

    Of the axes `but` each keeps what it has.
    """
    axes = [frozenset() if x is None else varying(x) for x in arrays]
    joint = frozenset().union(*axes) - set(but)
    return tuple(
        x if x is None or joint <= has else jax.lax.pcast(x, tuple(joint - has), to="varying")
        for x, has in zip(arrays, axes, strict=True)
    )


def varying(x: Any) -> frozenset[Any]:
    """The mesh axes x, or a type, varies over, as far as a shard_map checks it."""
    kind: Any = x if isinstance(x, ShapedArray) else jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma  # renamed between releases


def varying_as(x: jax.Array, kind: Any) -> jax.Array:
    """x, varying over more mesh axes, or over those of a type: examples of a batch may share what others do not."""
    missing = tuple((kind if isinstance(kind, frozenset) else varying(kind)) - varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
