"""Rows whose class weights are nearly all one class's, smoothed, and what their gradient's digits are counted of.

A row that is sure of that class has W p - w there, what the other classes' weights leave of it: at 1e6 to 1 a
difference formed in float32 has some 1 % of it. Truth is W p - w = p (the others' sum) - w (1 - p).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softmax_ext.reference.arithmetic import WIDE, others, parts

HEAVY = 1e6
TARGETS = ("indices", "soft", "pairs")


class Problem:
    """Rows sure of the heavy class or of another, or of none, whose target is the one or the other."""

    def __init__(self, classes: int, kind: str, target: str, smoothing: float) -> None:
        r = np.random.default_rng(classes)
        self.heavy, self.smoothing, self.unit = classes // 3, smoothing, np.finfo(kind).eps / 2
        other = (self.heavy + 1) % classes
        ways = [
            (margin, top, t) for margin in (0, 3, 12, 60) for top in (self.heavy, other) for t in (self.heavy, other)
        ]
        n = len(ways)
        x = r.normal(size=(n, classes))
        x[range(n), [top for _, top, _ in ways]] += [margin for margin, _, _ in ways]
        self.x = x.astype(kind)
        w = 1 + r.random(classes) / 2
        w[self.heavy] = HEAVY
        self.w, self.v = w.astype(kind), r.normal(size=x.shape).astype(kind)
        t = np.array([t for _, _, t in ways])
        y = np.zeros((n, classes))
        if target == "indices":
            self.target: Any = t
            y[range(n), t] = 1
        elif target == "soft":
            y = (0.9 * np.eye(classes)[t] + 0.1 / classes).astype(kind)
            self.target = y
        else:
            ids, shares = np.stack([t, np.full(n, other), np.arange(n) % classes], 1), np.array([0.5, 0.25, 0.25])
            self.target = ids, np.tile(shares, (n, 1)).astype(kind)
            for k in range(3):
                y[range(n), ids[:, k]] += shares[k]
        s = WIDE(smoothing)
        self.mass = ((1 - s) * y + s / classes) * self.w

    def judge(self, gradient: Any, product: Any = None, only: Any = ...) -> None:
        """The gradient of the summed losses, and its derivative along v, each entry by its own terms."""
        p, q, _, _ = parts(self.x.astype(WIDE))
        gained, lost = p * others(self.mass), self.mass * q
        self._agree(np.asarray(gradient)[only], (gained - lost)[only], (gained + lost)[only], "gradient")
        if product is not None:
            v = self.v.astype(WIDE) - np.take_along_axis(self.v, p.argmax(1)[:, None], 1)  # of the surest class 0
            mean, size = (p * v).sum(1, keepdims=True), (p * np.abs(v)).sum(1, keepdims=True)
            by = self.mass.sum(1, keepdims=True) * p
            self._agree(product, by * (v - mean), by * (np.abs(v) + size), "product")

    def _agree(self, found: Any, due: Any, sizes: Any, what: str) -> None:
        off = np.abs(np.asarray(found).astype(WIDE) - due)
        assert (off <= 32 * self.unit * sizes + 1e-36).all(), f"{what}: {np.nanmax(off / sizes) / self.unit} roundings"
