"""The linear layer as one value: its logits, and what a chunk's dlogits add to the gradients.

Matmuls of half-precision operands accumulate, and come out, in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_ops._head.chunks import Cut, Part, cut
from jax_ops._lowering import when_alone
from jax_ops._rows.dispatch import IGNORED, is_soft, of_rows
from jax_ops._rules.autodiff import analytic
from softmax_ext import machine

Sums = dict[str, Array]

_TILE = 2**22  # bytes of a piece of the weight's gradient, and of its dlogits: less is slower, more is temp memory


def wide(dtype: Any) -> Any:
    """The type a chunk's logits have and gradients accumulate in."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(NamedTuple):
    """z = x wT + b, or of low rank beside w: rows (x, u) of D + r numbers give x wT + u upT + b, nothing joined.

    Anything with the same operations is a head: a part of its classes, logits of some rows, what their gradient makes
    of the input's, and gradients of its own parameters that grow chunk by chunk.
    """

    weight: Array  # (V, D)
    bias: Array | None  # (V,)
    up: Array | None = None  # (V, r)

    def part(self, cut: Cut, part: Part) -> Linear:
        """The layer of a slice of the classes."""
        return Linear(*(cut.take(a, part) for a in self))

    def logits(self, x: Array, fresh: Array | None = None) -> Array:
        """x wT + b; -inf for classes that are not `fresh`."""
        w, b, up = self
        if b is None and fresh is not None:
            b = jnp.zeros_like(w, shape=w.shape[:1])
        x, u = self._parts(x)
        z = _half_logits(x, w) if _is_half(x) else _dot(x, w, 1, 1)
        z = z if up is None else z + _dot(u, up, 1, 1)
        return z if b is None else _biased(z, b.astype(z.dtype), fresh)

    def input_bwd(self, dz: Array) -> Array:
        """dX = dz W; of low rank [dz W, dz up]."""
        dx = _input_bwd(dz, self.weight)
        return dx if self.up is None else jnp.concatenate([dx, _input_bwd(dz, self.up)], 1)

    def gradient(self, weight: bool, bias: bool, up: bool) -> Sums:
        """Zeros in the place of the gradients wanted of the parameters."""
        sums = {"w": jnp.zeros_like(self.weight, dtype=wide(self.weight.dtype))} if weight else {}
        if bias and self.bias is not None:
            sums["b"] = jnp.zeros_like(self.bias, dtype=wide(self.bias.dtype))
        if up and self.up is not None:
            sums["up"] = jnp.zeros_like(self.up, dtype=wide(self.up.dtype))
        return sums

    def add(self, sums: Sums, dz: Array, x: Array, start: Part = 0) -> Sums:
        """dW += dzT X, db += sum_i dz_i, d_up += dzT U, of the classes from `start` on."""
        x, u = self._parts(x)
        if "up" in sums:
            sums = sums | {"up": weight_bwd(sums["up"], dz, u, start)}
        if "w" in sums:
            sums = sums | {"w": weight_bwd(sums["w"], dz, x, start)}
        if "b" in sums:
            db = dz.sum(0)
            sums = sums | {"b": sums["b"] + db if db.shape == sums["b"].shape else _plus(sums["b"], db, start)}
        return sums

    def _parts(self, x: Array) -> tuple[Array, Array]:
        """(x, u) of rows of both."""
        return (x, x) if self.up is None else (x[:, : self.weight.shape[1]], x[:, self.weight.shape[1] :])


def add_rows(sums: Sums, cut: Cut, part: Part, head: Linear, dz: Array, x: Array, ignored: Array | None) -> Sums:
    """The gradients with those of a chunk of the rows, whose inputs are x, added."""
    if "x" in sums:  # rows that are ignored hold zeros in x and dz, but W may not be finite
        sums = sums | {"x": cut.put(sums["x"], without(head.input_bwd(dz), ignored), part)}
    return head.add(sums, dz, x)


def ignored_rows(target: Array) -> Array | None:
    """Which rows reach no result; None where all do."""
    return None if is_soft(target) else of_rows(target, 2, 1) == IGNORED


def without(x: Array, ignored: Array | None) -> Array:
    """x with 0 in ignored rows: a NaN there would reach the others' gradients, by 0 * NaN."""
    return x if ignored is None else jnp.where(ignored[:, None], jnp.zeros((), x.dtype), x)


def weight_bwd(total: Array, dz: Array, x: Array, start: Part) -> Array:
    """`total` of all classes plus dzT x of those from `start` on."""
    # With a rule of its own: that of its loop would add up dz's cotangent with zeros around each piece.
    return _weight(total, dz, x, jnp.asarray(start))


def _input_bwd(dz: Array, w: Array) -> Array:
    return _half_input_bwd(dz, w) if _is_half(w) else _dot(dz, w, 1, 0)


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
    return lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=wide(a.dtype))


def _is_half(x: Array) -> bool:
    return x.dtype.itemsize == 2


def _slow_halves(dtype: Any) -> bool:
    """Whether XLA's CPU backend (jaxlib 0.10.2) is faster over operands turned into float32.

    It is over bfloat16 on a Xeon without a dot product for it (1024 rows, V=49152, D=576: 600 ms of processor time
    against 825), and over float16 everywhere measured. On an EPYC with avx512_bf16 bfloat16 logits take 0.6 of the time
    of float32 ones, and lose nothing: products of such operands are exact. dW takes as long in either type; dX would
    take 0.3 to 0.7, of dlogits rounded to bfloat16. Both are formed in float32.
    """
    return dtype != jnp.bfloat16 or not machine.instruction_sets() & {"avx512_bf16", "amx_bf16"}


# Half-precision operands on the CPU (`when_alone`): in float32, by pieces of the classes, but logits where it is fast.
def _half_logits_pieces(x: Array, w: Array) -> Array:
    if not _slow_halves(x.dtype):
        return _half_logits_whole(x, w)

    classes, x = _pieces(w, x), x.astype(jnp.float32)
    z = jnp.zeros_like(x, shape=(x.shape[0], w.shape[0]))

    def step(z: Array, part: Part) -> Array:
        return classes.put(z, _dot(x, classes.take(w, part).astype(x.dtype), 1, 1), part, 1)

    return classes.loop(step, z)


def _half_logits_whole(x: Array, w: Array) -> Array:
    return _dot(x, w, 1, 1)


def _half_logits_fwd(x: Array, w: Array) -> Any:
    return when_alone(_half_logits_pieces, _half_logits_whole, x, w), (x, w)


def _half_logits_bwd(saved: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    x, w = saved
    d_w = weight_bwd(jnp.zeros_like(w, dtype=ct.dtype), ct, x, 0)
    return _input_bwd(ct, w).astype(x.dtype), d_w.astype(w.dtype)


def _half_input_bwd_pieces(dz: Array, w: Array) -> Array:
    classes = _pieces(w, dz)

    def step(dx: Array, part: Part) -> Array:
        return dx + _dot(classes.take(dz, part, 1), classes.take_fresh(w, part).astype(dz.dtype), 1, 0)

    return classes.loop(step, jnp.zeros_like(dz, shape=(dz.shape[0], w.shape[1])))


def _half_input_bwd_whole(dz: Array, w: Array) -> Array:
    return _dot(*_alike(dz, w), 1, 0)


def _half_input_bwd_fwd(dz: Array, w: Array) -> Any:
    return when_alone(_half_input_bwd_pieces, _half_input_bwd_whole, dz, w), (dz, w)


def _half_input_bwd_bwd(saved: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    dz, w = saved
    return _dot(ct, w.astype(ct.dtype), 1, 1), _dot(dz, ct, 0, 0).astype(w.dtype)


_half_logits = analytic(_half_logits_fwd, _half_logits_bwd)
_half_input_bwd = analytic(_half_input_bwd_fwd, _half_input_bwd_bwd)


def _product(dz: Array, x: Array) -> Array:
    """dzT x."""
    if not _is_half(x):
        return _dot(dz, x, 0, 0)
    return lax.platform_dependent(
        dz,
        x,
        cpu=lambda dz, x: _dot(dz, x.astype(dz.dtype), 0, 0),
        default=lambda dz, x: _dot(*_alike(dz, x), 0, 0),
    )


def _alike(dz: Array, other: Array) -> tuple[Array, Array]:
    """Operands of one type: bfloat16 has the range of dlogits, in float16 those of a mean would flush to 0."""
    return (dz, other.astype(dz.dtype)) if other.dtype == jnp.float16 else (dz.astype(other.dtype), other)


def _pieces(w: Any, rows: Array) -> Cut:
    """The classes of w (V, D) cut so that a piece's logits of all rows, and of the weight, stay in the cache."""
    number = rows.shape[0] if isinstance(rows.shape[0], int) else 1024
    return cut(w.shape[0], _TILE // ((number + w.shape[1] or 1) * 4))


def _biased_pieces(z: Array, *row: Array) -> Array:
    # In pieces of few rows, each written over the one it came from: XLA's CPU backend (jaxlib 0.10.2) otherwise
    # copies the sum before a kernel writes over it.
    pieces = cut(z.shape[0], _TILE // max(z.shape[1] * 4, 1))
    return pieces.loop(lambda z, part: pieces.put(z, _biased_whole(pieces.take(z, part), *row), part), z)


def _biased_whole(z: Array, b: Array, fresh: Array | None = None) -> Array:
    # Not by a bias of -inf: a product that overflowed to +inf would make that NaN.
    return z + b if fresh is None else jnp.where(fresh, z + b, -jnp.inf)


def _biased_fwd(z: Array, b: Array, fresh: Array | None) -> Any:
    return when_alone(_biased_pieces, _biased_whole, z, b, *(() if fresh is None else (fresh,))), fresh


def _biased_bwd(fresh: Array | None, ct: Array) -> tuple[Array, Array, None]:
    ct = ct if fresh is None else jnp.where(fresh, ct, 0.0)
    return ct, ct.sum(0), None


_biased = analytic(_biased_fwd, _biased_bwd)


def _weight_pieces(total: Array, dz: Array, x: Array, start: Array) -> Array:
    # In pieces of few classes: their product and their dlogits in the operands' type stay in the cache, where one
    # product of all classes is as large as the weight itself (1024 rows, V=49152, D=576 float32, 2 cores: 0.8 of
    # the time, and 6 MiB where the other takes 108).
    classes = _pieces(jax.ShapeDtypeStruct((dz.shape[1], x.shape[1]), x.dtype), dz)

    def step(total: Array, part: Part) -> Array:
        product = _product(classes.take(dz, part, 1), x)
        if (fresh := classes.fresh(part)) is not None:
            product = jnp.where(fresh[:, None], product, 0.0)
        return _plus(total, product, start + classes.start(part))

    return classes.loop(step, total)


def _weight_whole(total: Array, dz: Array, x: Array, start: Array) -> Array:
    product = _product(dz, x)
    return total + product if product.shape == total.shape else _plus(total, product, start)


def _plus(total: Array, product: Array, at: Part) -> Array:
    product = product + lax.dynamic_slice_in_dim(total, at, product.shape[0])
    return lax.dynamic_update_slice_in_dim(total, product, at, 0)


def _weight_fwd(total: Array, dz: Array, x: Array, start: Array) -> Any:
    return when_alone(_weight_pieces, _weight_whole, total, dz, x, start), (dz, x, start)


def _weight_bwd(saved: tuple[Array, Array, Array], ct: Array) -> Any:
    dz, x, start = saved
    part = lax.dynamic_slice_in_dim(ct, start, dz.shape[1])
    return ct, _dot(x.astype(ct.dtype), part, 1, 1), _dot(dz.astype(ct.dtype), part, 1, 0).astype(x.dtype), None


_weight = analytic(_weight_fwd, _weight_bwd)
