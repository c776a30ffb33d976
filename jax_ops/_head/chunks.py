"""Cutting rows or classes into chunks, of which one at a time exists: a scan that keeps nothing of its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_ops._lowering import loops_are_to_come

Part = Array | int  # which chunk

# Bytes of logits that exist at a time, where chunk_size is None; where memory="fast" goes by rows beside a GPU or TPU
# each chunk reads and writes the float32 dW once, and longer ones do so less often.
WORKSPACE, WORKSPACE_ON_DEVICE = 2**28, 2**30


@dataclass(frozen=True)
class Cut:
    """`size` positions as `count` chunks of `each`.

    Where that is more than all, the last chunk begins earlier, and what it shares with the one before is stale: `put`
    leaves it alone, `fresh` tells it from the rest. (A shorter chunk after the loop would have buffers of its own, and
    padding copies the array.)
    """

    size: int
    each: int
    count: int
    strided: bool = False

    def start(self, part: Part) -> Part:
        """Where the chunk begins (which is not asked of strided ones)."""
        return jnp.minimum(part * self.each, self.size - self.each) if self._overlaps else part * self.each

    def fresh(self, part: Part) -> Array | None:
        """Which positions of the chunk no other has; None for all."""
        return self.start(part) + jnp.arange(self.each) >= part * self.each if self._overlaps else None

    def take(self, x: Array | None, part: Part, axis: int = 0) -> Any:
        """The chunk of x, cut along `axis`."""
        if x is None or self.count == 1:
            return x
        if self.strided:
            return lax.dynamic_index_in_dim(self._split(x), part, 1, keepdims=False)
        cut_out = _half if x.dtype.itemsize == 2 else lax.dynamic_slice_in_dim
        return cut_out(x, self.start(part), self.each, axis)

    def take_fresh(self, x: Array | None, part: Part, axis: int = 0) -> Any:
        """The chunk of x with 0 where it is stale: what is summed over the chunks counts each position once."""
        chunk, fresh = self.take(x, part, axis), self.fresh(part)
        if x is None or fresh is None:
            return chunk
        return jnp.where(_along(fresh, chunk, axis), chunk, jnp.zeros((), x.dtype))

    def put(self, whole: Array, chunk: Array, part: Part, axis: int = 0) -> Array:
        """`whole` with the chunk replaced."""
        chunk, fresh = chunk.astype(whole.dtype), self.fresh(part)
        if self.count == 1:
            return chunk
        if self.strided:
            return lax.dynamic_update_index_in_dim(self._split(whole), chunk, part, 1).reshape(whole.shape)
        if fresh is not None:
            chunk = jnp.where(_along(fresh, chunk, axis), chunk, self.take(whole, part, axis))
        return lax.dynamic_update_slice_in_dim(whole, chunk, self.start(part), axis)

    def loop(self, step: Callable[[Any, Part], Any], carry: Any) -> Any:
        """carry after step(carry, part) for every chunk.

        Checkpointed: differentiated, a step is run again, else the loop would keep every chunk's logits.
        """
        if self.count == 1:
            return step(carry, 0)
        if loops_are_to_come():
            for part in range(self.count):
                carry = step(carry, part)
            return carry
        again = jax.checkpoint(step, prevent_cse=False)
        return lax.scan(lambda c, i: (again(c, i), None), carry, jnp.arange(self.count))[0]

    @property
    def _overlaps(self) -> bool:
        return self.each * self.count != self.size

    def _split(self, x: Array) -> Array:
        return x.reshape(self.each, self.count, *x.shape[1:])


def cut(size: int, largest: int, *, strided: bool = False, blocks: int = 1) -> Cut:
    """`size` in chunks of at most `largest`, equal ones where a few more of them come out even.

    Strided, chunk i of n is positions i::n: then each device that holds a block of the rows of a batch has its part
    of every chunk. In contiguous chunks a scan would gather the batch. Where `blocks` of equal size are known to be
    on as many devices, each has as many positions of every chunk, at least one.
    """
    if not isinstance(size, int):  # exported for any number of rows: all of them at once
        return Cut(size, size, 1)
    if size == 0:
        return Cut(0, 0, 0)
    if blocks > 1:
        own = cut(size // blocks, largest // blocks, strided=strided)
        return Cut(size, own.each * blocks, own.count, own.strided)
    fewest = max(-(-size // max(largest, 1)), 1)
    for count in range(fewest, 2 * fewest):
        if size % count == 0:
            return Cut(size, size // count, count, strided)
    each = -(-size // fewest)
    return Cut(size, each, -(-size // each))


def that_fit(chunk_size: int | None, other: Any, itemsize: int, *, by_rows: bool) -> int:
    """The chunk size asked for, or the most lines of `other` entries that fit the workspace."""
    if chunk_size is not None:
        return int(chunk_size)
    room = WORKSPACE_ON_DEVICE if by_rows and jax.default_backend() != "cpu" else WORKSPACE
    # of a number that an export leaves open: some
    return room // max(itemsize * other, 1) if isinstance(other, int) else 4096


def _along(fresh: Array, chunk: Array, axis: int) -> Array:
    return jnp.expand_dims(fresh, [i for i in range(chunk.ndim) if i != axis])


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _half(x: Array, start: Array, size: int, axis: int) -> Array:
    """lax.dynamic_slice_in_dim of half-precision numbers.

    XLA's CPU backend (jaxlib 0.10.2) slices bfloat16 by way of float32, and of all of x once before a loop: a copy
    twice as large. What stands in a conditional, here of a condition that always holds, it leaves there. Elsewhere it
    is a slice: on a GPU a conditional waits for the host.
    """
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])

    def sliced(x: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, size, axis)

    def hidden(x: Array, start: Array) -> Array:
        return lax.cond(start >= 0, lambda: sliced(x, start), lambda: jnp.zeros_like(x, shape=shape))

    return lax.platform_dependent(x, start, cpu=hidden, default=sliced)


@_half.defjvp
def _half_jvp(size: int, axis: int, primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    return _half(*primals, size, axis), lax.dynamic_slice_in_dim(tangents[0], primals[1], size, axis)
