"""The loss of a linear layer: named shapes, its matmuls' flops, and one case's data with the truth about it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.cases import DTYPES, ITEMSIZE, Array, Op, prime_below, rounded
from softmax_ext import reference

# N rows x D features @ V classes.
HEADS: dict[str, tuple[int, int, int]] = {
    "smollm-head": (2048, 576, 49152),
    "small-head": (256, 64, 1000),
}

HEAD_PLAN = [(shape, dtype) for dtype in ("float32", "bfloat16") for shape in HEADS]

PAIR = "linear_divergence"  # of two heads
HEAD_OPS = {
    "linear_cross_entropy": Op(("loss", "d_input", "d_linear_weight")),
    PAIR: Op(("divergence", "d_student", "d_student_weight")),
}

# Roundoffs an entry may be off, by itemsize: in half precision the logits are rounded, and the gradient again.
OURS, RIVALS = {2: 2, 4: 32}, {2: 16, 4: 2048}

BLOCK = 4096  # classes in float64 at a time


@dataclass(frozen=True)
class HeadCase:
    """Inputs, a linear weight and targets of one shape and type, and the truth about mean loss and gradients.

    Of a teacher's head, with as many features, the same about the forward KL.

    The rows repeat after `period` of them, a prime, so the truth about a few is that about every row; of
    dL/dlinear_weight the truth is known for a sample of the classes: all targets, both ends, others at random.
    """

    shape: tuple[int, int, int]
    dtype: str = "float32"

    ROOM = "heads"

    def __str__(self) -> str:
        return "{}x{}@{}".format(*self.shape)

    @property
    def rows(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def classes(self) -> int:
        """V."""
        return self.shape[2]

    @property
    def logits_bytes(self) -> int:
        """What is not to be held."""
        return self.rows * self.classes * ITEMSIZE[self.dtype]

    def flops(self, matmuls: int = 3) -> int:
        """2NDV each: logits, dL/dinput and dL/dlinear_weight; the logits once more where they are recomputed."""
        return 2 * matmuls * math.prod(self.shape)

    @cached_property
    def period(self) -> int:
        """How many rows there are before they repeat."""
        return prime_below(min(self.rows, max(7, 2**20 // self.classes)))

    @cached_property
    def _distinct(self) -> tuple[Array, Array, Array]:
        """(inputs, linear_weight, targets)"""
        rng = np.random.default_rng(0)
        _, d, v = self.shape
        x = rng.standard_normal((self.period, d), np.float32)
        w = rng.standard_normal((v, d), np.float32) / np.float32(math.sqrt(d))
        target = rng.integers(0, v, self.period)
        if d > 1 and v > 1:
            # One class in every other row has half of the probability, the row's target: a term left out is seen.
            # The others' logits lie as far below 0 as this one's above: the smaller, the less is rounded off.
            x[:, 0], w[:, 0] = 1, -math.log(v) / 2
            x = rounded(x, self.dtype)
            for i in range(0, self.period, 2):
                z = x[i] @ w.T
                z[target[i]] = -np.inf
                w[target[i]] = x[i] * (np.log(np.sum(np.exp(z))) / (x[i] @ x[i]))
        return rounded(x, self.dtype), rounded(w, self.dtype), target

    @cached_property
    def _teacher(self) -> tuple[Array, Array]:
        """(inputs, linear_weight) of a teacher."""
        rng = np.random.default_rng(2)
        _, d, v = self.shape
        y = rng.standard_normal((self.period, d), np.float32)
        u = rng.standard_normal((v, d), np.float32) / np.float32(math.sqrt(d))
        return rounded(y, self.dtype), rounded(u, self.dtype)

    def prepare(self) -> None:
        """Make data and truth now: of a large head some ten seconds."""
        _ = self._truths

    def forget(self) -> None:
        """Let them go: gigabytes."""
        for name in ("_distinct", "_truths", "_teacher", "_truths_of_pair"):
            vars(self).pop(name, None)

    def input(self) -> Array:
        """The inputs; float32 whatever the type, whose values they are."""
        return np.resize(self._distinct[0], self.shape[:2])

    def linear_weight(self) -> Array:
        """One row a class."""
        return self._distinct[1]

    def teacher(self) -> tuple[Array, Array]:
        """A teacher's inputs and weight."""
        y, u = self._teacher
        return np.resize(y, self.shape[:2]), u

    def target(self) -> Array:
        """Class indices."""
        return np.resize(self._distinct[2], self.rows)

    @cached_property
    def judged(self) -> Array:
        """The classes of which dL/dlinear_weight is judged."""
        if self.classes <= BLOCK:
            return np.arange(self.classes)
        some = np.random.default_rng(1).integers(0, self.classes, BLOCK // 2)
        return np.unique([*some, *self._distinct[2], 0, self.classes - 1])

    def truth(self, name: str) -> tuple[Array, Array]:
        """One quantity of the distinct rows or judged classes, and the scale its errors are measured by."""
        return (self._truths if name in HEAD_OPS["linear_cross_entropy"].answers else self._truths_of_pair)[name]

    @cached_property
    def _truths(self) -> dict[str, tuple[Array, Array]]:
        x, w, target = self._distinct
        x = x.astype(np.float64)
        counts = np.bincount(np.arange(self.rows) % self.period, minlength=self.period)[:, None]
        z = np.concatenate([x @ w[block].T.astype(np.float64) for block in self._blocks()], 1)
        g = np.asarray(reference.cross_entropy_grad(z, target, reduction="sum"), np.float64) / self.rows
        p = g.copy()
        p[np.arange(self.period), target] += 1 / self.rows
        # To first order a logit off by e_j, the others by e_k, moves p_j by p_j (e_j - sum_k p_k e_k); e is u |z|.
        off, p_one = np.abs(z), p * self.rows
        off = p * (off * (1 - 2 * p_one) + np.sum(p_one * off, -1, keepdims=True)) + 2 * np.abs(g)
        dx, dx_scale = np.zeros_like(x), np.zeros_like(x)
        for block in self._blocks():
            some = w[block].astype(np.float64)
            dx += g[:, block] @ some
            dx_scale += off[:, block] @ np.abs(some)
        loss = np.asarray(reference.cross_entropy(z, target, reduction="none"), np.float64)
        loss = np.resize(loss, self.rows).mean()
        dw, dw_scale = g[:, self.judged].T @ (counts * x), off[:, self.judged].T @ (counts * np.abs(x))
        return {"loss": (loss, np.abs(loss)), "d_input": (dx, dx_scale), "d_linear_weight": (dw, dw_scale)}

    @cached_property
    def _truths_of_pair(self) -> dict[str, tuple[Array, Array]]:
        (x, w, _), (y, u) = self._distinct, self._teacher
        x, y = x.astype(np.float64), y.astype(np.float64)
        counts = np.bincount(np.arange(self.rows) % self.period, minlength=self.period)[:, None]
        s = np.concatenate([x @ w[block].T.astype(np.float64) for block in self._blocks()], 1)
        t = np.concatenate([y @ u[block].T.astype(np.float64) for block in self._blocks()], 1)
        p, q = (np.asarray(reference.softmax(z), np.float64) / self.rows for z in (s, t))
        g = p - q
        # of rounded logits, as above, on either side
        off = 2 * (p + q)
        for mass, z in ((p, s), (q, t)):
            one = mass * self.rows
            off += mass * (np.abs(z) * (1 - 2 * one) + np.sum(one * np.abs(z), -1, keepdims=True))
        dx, dx_scale = np.zeros_like(x), np.zeros_like(x)
        for block in self._blocks():
            some = w[block].astype(np.float64)
            dx += g[:, block] @ some
            dx_scale += off[:, block] @ np.abs(some)
        value = np.resize(np.asarray(reference.divergence(s, t, reduction="none"), np.float64), self.rows).mean()
        dw, dw_scale = g[:, self.judged].T @ (counts * x), off[:, self.judged].T @ (counts * np.abs(x))
        return {"divergence": (value, np.abs(value)), "d_student": (dx, dx_scale), "d_student_weight": (dw, dw_scale)}

    def _blocks(self) -> Iterator[slice]:
        return (slice(i, min(i + BLOCK, self.classes)) for i in range(0, self.classes, BLOCK))

    def due(self, name: str) -> tuple[int, ...]:
        """The shape an answer has."""
        n, d, v = self.shape
        return (v, d) if name.endswith("weight") else (n, d) if name.startswith("d_") else ()

    def lines(self, name: str, found: Array) -> Array:
        """What of an answer stands beside the truth."""
        return found[self.judged] if name.endswith("weight") else found.reshape(-1, *found.shape[1:])

    def place(self, name: str, line: int) -> int:
        """Where in the answer a line is."""
        return int(self.judged[line]) if name.endswith("weight") else line

    def allowed(self, scale: Array, *, ours: bool) -> Array:
        """How far from the truth an entry may be."""
        roundoff, floor = DTYPES[self.dtype]
        return (OURS if ours else RIVALS)[ITEMSIZE[self.dtype]] * roundoff * scale + floor


def head_of(text: str) -> tuple[int, int, int] | None:
    """A head's shape from its name or from its sizes, as in 2048x576@49152; None if it is none."""
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)@([1-9]\d*)", text)
    n, d, v = HEADS.get(text) or (map(int, sizes.groups()) if sizes else (0, 0, 0))
    return (n, d, v) if n else None
