"""Divergences between two linear heads: the reference's values and gradients, by chunks, in half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from softmax_ext.contract import KINDS
from tests.judging.cases import rounded
from tests.judging.divergences import BETA, DOORS, door  # noqa: F401

CAPPED: dict[str, Any] = {"logit_scale": 1.2, "softcap": 3.0, "teacher_scale": 0.9, "teacher_softcap": 2.0}
S = np.sin(np.linspace(-2.0, 2.0, 18)).reshape(3, 6) * 3.0
T = np.cos(np.linspace(1.0, 4.0, 18)).reshape(3, 6) * 2.0
HEAD: dict[str, Any] = {
    "input": np.stack([S[:, :3], 0.5 * S[:, :3]]),
    "linear_weight": 0.5 * S.reshape(6, 3),
    "linear_bias": np.linspace(-1, 1, 6),
    "teacher_input": np.stack([T[:, :4], -0.5 * T[:, :4]]),
    "teacher_weight": np.cos(np.linspace(-1, 2, 24)).reshape(6, 4),
    "teacher_bias": np.linspace(1, 2, 6),
}
ROWS: dict[str, Any] = {
    "token_weight": np.linspace(0.5, 2.0, 6).reshape(2, 3),
    "keep": np.array([[True, False, True], [True, True, False]]),
}
STUDENT = ("input", "linear_weight", "linear_bias")
# (chunk_size, shift); in JAX every new option costs a compilation
CHUNKS = {"Torch": [(None, 0), (None, 1), (2, 0), (2, 1), (4, 0)], "Jax": [(4, 1)]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_head_against_the_reference(kind: str, memory: Any, door: Any) -> None:  # noqa: F811
    """Every kind in both memories; the reductions in turn, so that each meets both memories and most kinds."""
    arrays, turn = {**HEAD, **ROWS}, KINDS.index(kind) + (memory == "lean")
    for i, (chunk_size, shift) in enumerate(CHUNKS[type(door).__name__]):
        reduction = ("mean", "sum", "none")[(turn + i) % 3]
        options: dict[str, Any] = {"kind": kind, "beta": BETA, "shift": shift, "reduction": reduction, **CAPPED}
        truth = reference.linear_divergence(**arrays, **options)
        up = np.linspace(1.0, 3.0, np.size(truth)).reshape(np.shape(truth))
        how: Any = {"memory": memory, "chunk_size": chunk_size, **options}
        value, *grads = door("linear_divergence", arrays, STUDENT, "float64", up, **how)
        np.testing.assert_allclose(value, truth, rtol=1e-12)
        for mine, right in zip(grads, reference.linear_divergence_grad(**arrays, dloss=up, **options), strict=True):
            np.testing.assert_allclose(mine, right, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("dtype", "memory"), [("bfloat16", "fast"), ("float16", "fast"), ("float16", "lean")])
def test_half_precision_heads(dtype: str, memory: Any, door: Any) -> None:  # noqa: F811
    """Gradients of a mean over 512 rows neither flush to 0 nor are rounded chunk by chunk."""
    r = np.random.default_rng(1)
    shapes = {"input": (512, 8), "linear_weight": (65, 8), "teacher_input": (512, 4), "teacher_weight": (65, 4)}
    arrays: dict[str, Any] = {name: rounded(r.standard_normal(shape), dtype) for name, shape in shapes.items()}
    value, *grads = door("linear_divergence", arrays, STUDENT[:2], dtype, memory=memory, chunk_size=64)
    np.testing.assert_allclose(value, reference.linear_divergence(**arrays), rtol=4e-3)
    for mine, right in zip(grads, reference.linear_divergence_grad(**arrays), strict=False):
        assert np.linalg.norm(mine - right) < 8e-3 * np.linalg.norm(right)


@pytest.mark.parametrize("framework", DOORS)
def test_heads_must_have_the_same_classes(framework: str) -> None:
    given = {k: v for k, v in HEAD.items() if k != "teacher_bias"}
    given["teacher_weight"] = given["teacher_weight"][:5]
    said = r"^linear_divergence: teacher_weight must have linear_weight's 6 classes; got \(5, 4\)\."
    with pytest.raises(ValueError, match=said):
        DOORS[framework]()("linear_divergence", given, STUDENT, "float64")
