"""Class indices of any integer type in one canonical form: a class, IGNORED or INVALID."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import min_dim

from jax_ops._rows.dispatch import IGNORED, INVALID


def canonical(target: Any, classes: int, ignored: int | None) -> jax.Array:
    """int32 targets (int64 for more classes than int32 counts) in [0, classes), IGNORED or INVALID.

    Compared in the target's own type, whose range `ignored` may lie outside of: uint8 156 is not -100. A
    NumPy target stays in NumPy till it is small: with x64 off JAX would cut int64 to int32, and class 2**40
    would come out as class 0.
    """
    np_or_jnp: Any = np if isinstance(target, np.ndarray) and isinstance(classes, int) else jnp
    wide = jnp.int64 if isinstance(classes, int) and classes > jnp.iinfo(jnp.int32).max else jnp.int32
    low, high = int(jnp.iinfo(target.dtype).min), int(jnp.iinfo(target.dtype).max)
    if isinstance(classes, int):
        valid = (target >= 0) & (target <= min(classes - 1, high) if classes else target != target)
    else:  # an export leaves their number open
        last = min_dim(classes - 1, min(high, jnp.iinfo(jnp.int32).max))
        valid = (target >= 0) & (target <= jnp.asarray(last).astype(target.dtype))
    t = np_or_jnp.where(valid, np_or_jnp.where(valid, target, 0).astype(wide), INVALID)
    if ignored is not None and low <= ignored <= high:
        t = np_or_jnp.where(target == ignored, IGNORED, t)
    return jnp.asarray(t, wide)
