"""What is measured: shapes by name, ops with their bytes, and one case's data with the truth about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from softmax_ext import reference

Array = np.ndarray

# Rows (or a batch) first, classes second, as F.cross_entropy has them: tokens x vocabulary, images x classes.
SHAPES: dict[str, tuple[int, ...]] = {
    "llama2": (1024, 32000),
    "llama3-8b": (512, 128256),
    "gpt2": (1024, 50257),
    "gemma2-2b": (256, 256000),
    "qwen3": (512, 151936),
    "resnet-imagenet": (8192, 1000),
    "mnist": (65536, 10),
    "segmentation": (8, 21, 256, 256),
    "small": (32, 10),
    "one-row": (1, 50),
}

# What `make bench` measures when it is asked for nothing in particular.
PLAN = [
    *((shape, "float32") for shape in ("llama2", "llama3-8b", "resnet-imagenet", "mnist", "segmentation")),
    *((shape, "float32") for shape in ("small", "one-row")),
    *((shape, "bfloat16") for shape in ("llama2", "resnet-imagenet")),
]

# The unit roundoff, and below what an entry counts as 0: kernels flush float32 subnormals, float16 rounds to its own.
DTYPES = {
    "float32": (2.0**-24, 2.0**-124),
    "float64": (2.0**-53, 2.0**-1000),
    "bfloat16": (2.0**-8, 2.0**-124),
    "float16": (2.0**-11, 2.0**-24),
}
# Roundoffs an entry may be off. Ours are held to more by the tests; here a wrong kernel must not pass for a fast one.
# A rival has to answer the same question, with the digits its formula leaves it (in half precision: few).
OURS, RIVALS = {2: 4, 4: 32, 8: 32}, {2: 64, 4: 2048, 8: 2048}
ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Op:
    """What a call answers, and how often it must touch memory at least."""

    answers: tuple[str, ...]  # names of `Case.truth`
    passes: int = 0  # over arrays of the logits' size, read or written
    looks: int = 0  # over the targets


KEPT = 64  # classes a row of targets (ids, probabilities), where there are as many

# Row-shaped results are not counted: at most 16 bytes a row.
OPS = {
    "softmax": Op(("softmax",), passes=2),
    "softmax_bwd": Op(("softmax_bwd",), passes=3),  # reads dy and y, writes dx
    "log_softmax": Op(("log_softmax",), passes=2),
    "log_softmax_bwd": Op(("log_softmax_bwd",), passes=3),
    "cross_entropy": Op(("loss",), passes=1, looks=1),
    # The forward reads; the backward, which cannot begin before the forward has ended, reads and writes.
    "cross_entropy_grad": Op(("loss", "gradient"), passes=3, looks=2),
    "cross_entropy_grad_inplace": Op(("loss", "gradient"), passes=3, looks=2),
    # Where one program holds both, a row may stay in the cache between its two reads.
    "cross_entropy_value_and_grad": Op(("loss", "gradient"), passes=2, looks=1),
    "cross_entropy_one_visit": Op(("loss_rows", "gradient"), passes=2, looks=1),
    # Of a teacher's logits too: the forward reads both, the backward reads both and writes one.
    "divergence": Op(("divergence",), passes=2),
    "divergence_grad": Op(("divergence", "divergence_gradient"), passes=5),
    "divergence_value_and_grad": Op(("divergence", "divergence_gradient"), passes=3),
    # Ids and probabilities of half their size.
    "sparse_grad": Op(("loss_sparse", "gradient_sparse"), passes=3, looks=3 * KEPT),
    "sparse_value_and_grad": Op(("loss_sparse", "gradient_sparse"), passes=2, looks=2 * KEPT),
}


@dataclass(frozen=True)
class Case:
    """Loud logits of one shape and type, targets, upstream gradients, and the truth about them.

    The rows repeat after `period` rows, so the float64 reference, at half a microsecond an entry too slow for
    every row, judges every entry of an answer. The period is a prime: no tile, chunk or vector of rows is a
    multiple of it, so an answer of the wrong row is seen.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    ROOM = "calls"

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def classes(self) -> int:
        """V."""
        return self.shape[1]

    @property
    def rows(self) -> int:
        """N, or N d1 d2 ..."""
        return math.prod(self.shape) // self.classes

    @property
    def logits_bytes(self) -> int:
        """One array of the logits' size."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def least_bytes(self, op: Op, index_bytes: int) -> int:
        """The bytes an op must read and write."""
        return op.passes * self.logits_bytes + op.looks * self.rows * index_bytes

    @cached_property
    def period(self) -> int:
        """How many rows there are before they repeat."""
        return prime_below(min(self.rows, max(7, 2**19 // self.classes)))

    @cached_property
    def _distinct(self) -> tuple[Array, Array, Array]:
        """(x, target, dy), class axis last."""
        rng = np.random.default_rng(0)
        size = (self.period, self.classes)
        x = rng.standard_normal(size, np.float32) * 3
        target, dy = rng.integers(0, self.classes, self.period), rng.standard_normal(size, np.float32)
        # One peak of p = 1/2 in each row, the target of every other row: wrong answers are far off somewhere, and no
        # row is so confident that a rival's log p has no digits left.
        peak = np.arange(self.period), rng.integers(0, self.classes, self.period)
        if self.classes > 1:
            x[peak] = -np.inf
            x[peak] = np.log(np.sum(np.exp(x), -1))
        target[::2] = peak[1][::2]
        return rounded(x, self.dtype), target, rounded(dy, self.dtype)

    @cached_property
    def _teacher(self) -> Array:
        """Logits of a teacher, class axis last."""
        x = np.random.default_rng(1).standard_normal((self.period, self.classes), np.float32) * 2
        return rounded(x, self.dtype)

    def _whole(self, distinct: Array) -> Array:
        rows = np.resize(distinct, (self.rows, distinct.shape[1]))
        if len(self.shape) == 2:
            return rows
        inner = (self.shape[0], *self.shape[2:], distinct.shape[1])
        return np.ascontiguousarray(np.moveaxis(rows.reshape(inner), -1, 1))

    def logits(self) -> Array:
        """The logits; float32 whatever the type, whose values they are."""
        return self._whole(self._distinct[0])

    def upstream(self) -> Array:
        """A gradient of the logits' shape."""
        return self._whole(self._distinct[2])

    def teacher(self) -> Array:
        """A teacher's logits."""
        return self._whole(self._teacher)

    def target(self) -> Array:
        """Class indices."""
        return np.resize(self._distinct[1], self.rows).reshape(self.shape[0], *self.shape[2:])

    @cached_property
    def _pair(self) -> tuple[Array, Array]:
        return pair(self._distinct[1], self.classes, KEPT)

    def sparse(self) -> tuple[Array, Array]:
        """K class indices a row, the target first, and float32 probabilities: of logits' shape with K for V."""
        return self._whole(self._pair[0]), self._whole(self._pair[1])

    @cached_property
    def _known(self) -> dict[str, tuple[Array, Array]]:
        return {}

    def truth(self, name: str) -> tuple[Array, Array]:
        """One quantity of the distinct rows (or the mean loss), and the scale its errors are measured by."""
        if name not in self._known:
            self._known[name] = self._truth(name)
        return self._known[name]

    def _truth(self, name: str) -> tuple[Array, Array]:
        x, target, dy = self._distinct
        if name == "softmax_bwd":
            p = self.truth("softmax")[0]
            return reference.softmax_vjp(p, dy), p * (np.abs(dy) + np.sum(p * np.abs(dy), -1, keepdims=True))
        if name == "log_softmax_bwd":
            p = self.truth("softmax")[0]
            return reference.log_softmax_vjp(x, dy), np.abs(dy) + p * np.sum(np.abs(dy), -1, keepdims=True)
        if name == "divergence_gradient":  # p - q: a call that subtracts them has their digits
            p, q = self.truth("softmax")[0], reference.softmax(self._teacher)
            return (p - q) / self.rows, (p + q) / self.rows
        if name == "divergence":
            value = np.resize(reference.divergence(x, self._teacher, reduction="none"), self.rows).mean()
        elif name in ("loss", "loss_sparse"):
            value = np.resize(self.truth(name.replace("loss", "loss_rows"))[0], self.rows).mean()
        elif name == "loss_rows_sparse":
            value = np.asarray(reference.cross_entropy(x, self._pair, reduction="none"))
        elif name == "gradient_sparse":
            value = reference.cross_entropy_grad(x, self._pair, reduction="sum") / self.rows
            mass = np.zeros_like(value)
            np.add.at(mass, (np.arange(self.period)[:, None], self._pair[0]), self._pair[1] / self.rows)
            p = self.truth("softmax")[0]
            return value, p * mass.sum(-1, keepdims=True) + mass  # the terms of S p - y
        elif name == "loss_rows":
            value = np.asarray(reference.cross_entropy(x, target, reduction="none"))
        elif name == "gradient":
            value = reference.cross_entropy_grad(x, target, reduction="sum") / self.rows
        else:
            value = getattr(reference, name)(x)
        return value, np.abs(value)

    def due(self, name: str) -> tuple[int, ...]:
        """The shape an answer has."""
        return (self.shape, (self.shape[0], *self.shape[2:]), ())[2 - self.truth(name)[0].ndim]

    def lines(self, name: str, found: Array) -> Array:
        """Class axis last, rows in one axis, as the truth has them."""
        matrix = self.truth(name)[0].ndim == 2
        return np.moveaxis(found, 1, -1).reshape(-1, self.classes) if matrix else found.reshape(-1)

    def place(self, name: str, line: int) -> int:
        """Where in the answer a line is."""
        return line

    def allowed(self, scale: Array, *, ours: bool) -> Array:
        """How far from the truth an entry may be."""
        roundoff, floor = DTYPES[self.dtype]
        return (OURS if ours else RIVALS)[ITEMSIZE[self.dtype]] * roundoff * scale + floor


def pair(target: Array, classes: int, kept: int) -> tuple[Array, Array]:
    """(ids, probabilities) of rows: the target and others, each once, nine tenths of the mass."""
    rng, count = np.random.default_rng(2), min(kept, classes)
    ids = np.stack([np.r_[t, rng.permutation(np.delete(np.arange(classes), t))[: count - 1]] for t in target])
    mass = np.exp(2 * rng.standard_normal(ids.shape))
    return ids, (0.9 * mass / mass.sum(-1, keepdims=True)).astype(np.float32)


def prime_below(most: int) -> int:
    """The largest prime that is not above, or 1."""
    return next((n for n in range(most, 1, -1) if all(n % d for d in range(2, math.isqrt(n) + 1))), 1)


def rounded(x: Array, dtype: str) -> Array:
    """Float32 numbers rounded to values of a type, ties to even."""
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return x.astype(np.float16).astype(np.float32) if dtype == "float16" else x


def shape_of(text: str) -> tuple[int, ...]:
    """A shape from its name or from its sizes: llama2, 1024x32000, 8x21x256x256."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        shape = tuple(map(int, text.split("x")))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"{text!r} is neither a shape (NxV, NxVxHxW) nor one of {', '.join(SHAPES)}")
    return shape
