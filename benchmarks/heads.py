"""The loss of a linear layer: named shapes, its matmuls' flops, and one case's data with the truth about it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.cases import DTYPES, ITEMSIZE, KEPT, Array, Op, pair, prime_below, rounded
from softmax_ext import reference

# N rows x D features @ V classes.
HEADS: dict[str, tuple[int, int, int]] = {
    "smollm-head": (2048, 576, 49152),
    "small-head": (256, 64, 1000),
}

HEAD_PLAN = [(shape, dtype) for dtype in ("float32", "bfloat16") for shape in HEADS]

_NAMES = ("loss", "d_input", "d_linear_weight")
PAIR = "linear_divergence"  # of two heads
HEAD_OPS = {
    "linear_cross_entropy": Op(_NAMES),
    "linear_cross_entropy_sparse": Op(tuple(f"sparse_{name}" for name in _NAMES)),
    "linear_at": Op(("logits_at",)),
    PAIR: Op(("divergence", "d_student", "d_student_weight")),
}
# What a call with a gradient at K points answers: its loss exactly, its gradients in the mean.
SAMPLED = {"linear_cross_entropy, sampled": Op(("loss", "sampled_d_input", "sampled_d_linear_weight"))}

# Roundoffs an entry may be off, by itemsize: in half precision the logits are rounded, and the gradient again.
OURS, RIVALS = {2: 2, 4: 32}, {2: 16, 4: 2048}

BLOCK = 4096  # classes in float64 at a time
# A sampled gradient may be off by so many of the standard deviations that its variance's bound allows, and by so many
# single points: of a class with few points the deviation says little.
DEVIATIONS, POINTS = 8, 20


@dataclass(frozen=True)
class HeadCase:
    """Inputs, a linear weight and targets of one shape and type, and the truth about mean loss and gradients.

    Of a teacher's head, with as many features, the same about the forward KL.

    The rows repeat after `period` of them, a prime, so the truth about a few is that about every row; of
    dL/dlinear_weight the truth is known for a sample of the classes: all targets, both ends, others at random.
    `kept` is K: classes a row of sparse targets, points of a sampled gradient; `linear_at` has four times as many.
    """

    shape: tuple[int, int, int]
    dtype: str = "float32"
    kept: int = KEPT

    ROOM = "heads"

    def __str__(self) -> str:
        return "{}x{}@{}".format(*self.shape) + f"/{self.kept}" * (self.kept != KEPT)

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

    @property
    def sampled_flops(self) -> int:
        """The logits, and both gradients from K points and the target."""
        return self.flops(1) + 4 * self.rows * self.shape[1] * (self.kept + 1)

    @property
    def row_bytes(self) -> int:
        """The rows of linear_weight that `linear_at` reads."""
        return self.at().size * self.shape[1] * ITEMSIZE[self.dtype]

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
        more = ("_pair", "_at", "_logits", "_sparse", "_sampled")
        for name in ("_distinct", "_truths", "_teacher", "_truths_of_pair", *more):
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
    def _pair(self) -> tuple[Array, Array]:
        return pair(self._distinct[2], self.classes, self.kept)

    def sparse(self) -> tuple[Array, Array]:
        """K class indices a row, the target first, and float32 probabilities."""
        ids, probabilities = self._pair
        return tuple(np.resize(v, (self.rows, v.shape[1])) for v in (ids, probabilities))  # pyright: ignore

    @cached_property
    def _at(self) -> Array:
        return np.random.default_rng(3).integers(0, self.classes, (self.rows, 4 * self.kept))

    def at(self) -> Array:
        """Ids of `linear_at`: every row's own, for equal ones would be read from the cache."""
        return self._at

    @cached_property
    def judged(self) -> Array:
        """The classes of which dL/dlinear_weight is judged."""
        if self.classes <= BLOCK:
            return np.arange(self.classes)
        some = np.random.default_rng(1).integers(0, self.classes, BLOCK // 2)
        return np.unique([*some, *self._distinct[2], *self._pair[0].flat, 0, self.classes - 1])

    @cached_property
    def judged_rows(self) -> Array:
        """The rows of which `linear_at` is judged."""
        return np.unique(np.linspace(0, self.rows - 1, min(self.rows, 31)).astype(int))

    @cached_property
    def _off_target(self) -> Array:
        """Those of the judged classes whose gradient is sampled in every row."""
        return np.setdiff1d(self.judged, self._distinct[2])

    def truth(self, name: str) -> tuple[Array, Array]:
        """One quantity of the distinct rows or judged classes, and the scale its errors are measured by."""
        if name == "logits_at":
            x, w, _ = self._distinct
            rows = self.judged_rows
            terms = x[rows % self.period, None].astype(np.float64) * w[self._at[rows]]
            return terms.sum(-1), np.abs(terms).sum(-1)
        kind, _, rest = name.partition("_")
        if kind in ("sparse", "sampled"):
            return (self._sparse if kind == "sparse" else self._sampled)[rest]
        return (self._truths if name in HEAD_OPS["linear_cross_entropy"].answers else self._truths_of_pair)[name]

    @cached_property
    def _counts(self) -> Array:
        return np.bincount(np.arange(self.rows) % self.period, minlength=self.period)[:, None]

    @cached_property
    def _logits(self) -> tuple[Array, Array]:
        """(z, p) of the distinct rows."""
        x, w, _ = self._distinct
        z = np.concatenate([x.astype(np.float64) @ w[block].T.astype(np.float64) for block in self._blocks()], 1)
        return z, np.asarray(reference.softmax(z), np.float64)

    @cached_property
    def _truths(self) -> dict[str, tuple[Array, Array]]:
        return self._of(self._distinct[2], 0.0)

    @cached_property
    def _sparse(self) -> dict[str, tuple[Array, Array]]:
        ids, y = self._pair
        mass = np.zeros((self.period, self.classes))
        np.add.at(mass, (np.arange(self.period)[:, None], ids), y)
        return self._of(self._pair, mass + self._logits[1] * mass.sum(-1, keepdims=True))

    def _of(self, target: Any, terms: Array | float) -> dict[str, tuple[Array, Array]]:
        """Mean loss and gradients, with their scales; `terms` of a logit's gradient that is their difference."""
        x, w, _ = self._distinct
        x, (z, p_one) = x.astype(np.float64), self._logits
        g = np.asarray(reference.cross_entropy_grad(z, target, reduction="sum"), np.float64) / self.rows
        # To first order a logit off by e_j, the others by e_k, moves p_j by p_j (e_j - sum_k p_k e_k); e is u |z|.
        off, p = np.abs(z), p_one / self.rows
        off = p * (off * (1 - 2 * p_one) + np.sum(p_one * off, -1, keepdims=True))
        off = off + 2 * np.maximum(np.abs(g), terms / self.rows)
        dx, dx_scale = np.zeros_like(x), np.zeros_like(x)
        for block in self._blocks():
            some = w[block].astype(np.float64)
            dx += g[:, block] @ some
            dx_scale += off[:, block] @ np.abs(some)
        loss = np.asarray(reference.cross_entropy(z, target, reduction="none"), np.float64)
        loss = np.resize(loss, self.rows).mean()
        dw, dw_scale = g[:, self.judged].T @ (self._counts * x), off[:, self.judged].T @ (self._counts * np.abs(x))
        return {"loss": (loss, np.abs(loss)), "d_input": (dx, dx_scale), "d_linear_weight": (dw, dw_scale)}

    @cached_property
    def _sampled(self) -> dict[str, tuple[Array, Array]]:
        """The mean of a row's copies; of classes, and the sum of those that are no target."""
        x, w, _ = self._distinct
        x, (_, p) = x.astype(np.float64), self._logits
        unit = OURS[ITEMSIZE[self.dtype]] * DTYPES[self.dtype][0]
        mean, square = np.zeros_like(x), np.zeros_like(x)
        for block in self._blocks():
            some = w[block].astype(np.float64)
            mean += p[:, block] @ some
            square += p[:, block] @ some**2
        # A mean loss's upstream is 1 / N: its square times Var_p of what is summed, by K.
        by = self.rows**2 * self.kept
        (dx, dx_scale), (dw, dw_scale) = (self._truths[name] for name in ("d_input", "d_linear_weight"))
        spread = DEVIATIONS * np.sqrt((square - mean**2) / (by * self._counts))
        one = POINTS * np.abs(x).max(0) / (self.rows * self.kept)

        def of(p: Array) -> Array:
            return DEVIATIONS * np.sqrt((p * (1 - p)).T @ (self._counts * x**2) / by) + one

        some = np.searchsorted(self.judged, self._off_target)
        both = [
            np.concatenate([v, v[some].sum(0, keepdims=True)]) for v in (dw, dw_scale + of(p[:, self.judged]) / unit)
        ]
        both[1][-1] = dw_scale[some].sum(0) + of(p[:, self._off_target].sum(1, keepdims=True)) / unit
        return {"d_input": (dx, dx_scale + spread / unit), "d_linear_weight": (both[0], both[1])}

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
        if name == "logits_at":
            return n, 4 * self.kept
        name = name.removeprefix("sparse_").removeprefix("sampled_")
        return (v, d) if name.endswith("weight") else (n, d) if name.startswith("d_") else ()

    def lines(self, name: str, found: Array) -> Array:
        """What of an answer stands beside the truth."""
        if name == "logits_at":
            return found[self.judged_rows]
        if name == "sampled_d_input":
            return np.stack([found[i :: self.period].mean(0) for i in range(self.period)])
        if name == "sampled_d_linear_weight":
            return np.concatenate([found[self.judged], found[self._off_target].sum(0, keepdims=True)])
        return found[self.judged] if name.endswith("weight") else found.reshape(-1, *found.shape[1:])

    def place(self, name: str, line: int) -> Any:
        """Where in the answer a line is."""
        if name == "logits_at":
            return int(self.judged_rows[line])
        if not name.endswith("weight"):
            return line
        return int(self.judged[line]) if line < len(self.judged) else "all that are no target"

    def allowed(self, scale: Array, *, ours: bool) -> Array:
        """How far from the truth an entry may be."""
        roundoff, floor = DTYPES[self.dtype]
        return (OURS if ours else RIVALS)[ITEMSIZE[self.dtype]] * roundoff * scale + floor


_SIZE = r"([1-9]\d*)"


def head_of(text: str) -> tuple[int, int, int] | None:
    """A head's shape from its name or from its sizes, as in 2048x576@49152; None if it is none."""
    sizes = re.fullmatch(rf"{_SIZE}x{_SIZE}@{_SIZE}(?:/{_SIZE})?", text)
    n, d, v = HEADS.get(text) or (map(int, sizes.groups()[:3]) if sizes else (0, 0, 0))
    return (n, d, v) if n else None


def kept_of(text: str) -> int:
    """K of a head's shape, what follows a stroke, as in 2048x576@49152/16."""
    _, stroke, kept = text.partition("/")
    return int(kept) if stroke else KEPT
