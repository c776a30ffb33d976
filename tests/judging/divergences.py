"""Pairs of rows at every distance, what is known of odd ones, and how an answer about them is judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from softmax_ext import reference
from tests.judging.cases import INF, NAN, Array, rounded
from tests.judging.checks import close

BETA = 0.3


def pairs(classes: int, dtype: str) -> dict[str, tuple[Array, Array]]:
    """(student, teacher) of every distance that the type can tell."""
    r = np.random.default_rng(classes)
    t = rounded(2.0 * r.standard_normal((3, classes)), dtype)
    n = r.standard_normal((3, classes))
    one = t.copy()
    one[:, -1] *= 1 + {"float64": 2.0**-51, "float32": 2.0**-22, "bfloat16": 2.0**-6, "float16": 2.0**-9}[dtype]
    found = {
        "elsewhere": (3.0 * n, t),
        "a tenth": (t + 0.1 * n, t),
        "a thousandth": (t + 1e-3 * n, t),
        "a millionth": (t + 1e-6 * n, t),
        "shifted": (t + 5.0 + 1e-3 * n, t),
        "one logit": (one, t),
        "confident": (t + 30.0 * (np.arange(classes) == 0), t),
    }
    return {name: (rounded(s, dtype), t) for name, (s, t) in found.items()}


def judged(value: Array, gradient: Array, s: Array, t: Array, dtype: str, c: float = 8.0, **options: Any) -> None:
    """Values to a few units of their own size, gradients to those of p (|u| + sum p |u|), however small they are."""
    truth = reference.divergence(s, t, reduction="none", **options)
    upstream = np.ones(len(s))
    right = reference.divergence_grad(s, t, reduction="none", dloss=upstream, **options)
    p = reference.softmax(s * options.get("logit_scale", 1.0))
    pu = np.abs(reference.divergence_parts(s, t, **options)[1])
    size = pu + p * pu.sum(-1, keepdims=True)
    wide = "float64" if dtype == "float64" else "float32"
    close(value, truth, np.abs(truth), dtype=wide, c=c, what="divergence")
    close(gradient, right, options.get("logit_scale", 1.0) * size, dtype=dtype, c=c, what="gradient")


# (student, teacher): forward KL, reverse KL, jsd, tv; inf where a side has no class that the other needs
FACTS: dict[str, tuple[list[float], list[float], tuple[float, ...]]] = {
    "neither has the class": ([0.0, 1.0, -INF], [1.0, 0.0, -INF], (-1, -1, -1, -1)),
    "the teacher lacks it": ([0.0, 1.0, 0.5], [1.0, 0.0, -INF], (-1, INF, -1, -1)),
    "the student lacks it": ([0.0, 1.0, -INF], [1.0, 0.0, 0.5], (INF, -1, -1, -1)),
    "no class at all": ([-INF] * 3, [0.0, 1.0, 2.0], (NAN,) * 4),
    "a teacher of nothing": ([0.0, 1.0, 2.0], [-INF] * 3, (NAN,) * 4),
    "not a number": ([0.0, NAN, 2.0], [0.0, 1.0, 2.0], (NAN,) * 4),
    "the teacher's not a number": ([0.0, 1.0, 2.0], [0.0, NAN, 2.0], (NAN,) * 4),
    "too large": ([0.0, INF, 2.0], [0.0, 1.0, 2.0], (NAN,) * 4),
}
