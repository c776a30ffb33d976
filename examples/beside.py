"""Two ways to one answer side by side: how far value and gradients are apart, and an error where it is not rounding."""

from typing import Any

import numpy as np

FURTHEST = 64 * 2.0**-24  # 64 units of float32's roundoff, of an array's largest entry


def beside(title: str, ours: tuple[Any, ...], plain: tuple[Any, ...]) -> None:
    """Print and check; each answer is the value and then the gradients, as arrays of any kind."""
    apart = []
    for found, expected in zip(ours, plain, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (found, expected))
        size = np.abs(b).max()
        assert a.shape == b.shape
        assert size > 1e-6, "an answer of nothing says nothing"
        apart.append(float(np.abs(a - b).max() / size))
        assert apart[-1] <= FURTHEST, f"{title}: {apart[-1]:.1e} of the largest entry apart"
    gradients = ", ".join(f"{x:.0e}" for x in apart[1:])
    print(f"{title} {float(ours[0]):.6f}: the plain value to {apart[0]:.0e}, its gradients to {gradients}")
