"""Random shapes, layouts, types, axes and values through both doors, held to the reference by the common bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.judging import cases, checks
from tests.judging.cases import DTYPES, INF, NAN, OPTIONS
from tests.judging.frameworks import Named, both

# Two of these may meet in a row: their difference must be a number of the type.
HUGE = {"float64": 1e300, "float32": 1e38, "bfloat16": 1e38, "float16": 3e4}
SUBNORMAL = {"float64": 1e-310, "float32": 1e-42, "bfloat16": 1e-39, "float16": 1e-6}
# Around every vector length, the shortest row walked along itself (128) and the block of 4096.
CLASSES = st.integers(1, 70) | st.integers(120, 170) | st.sampled_from([255, 256, 257, 4095, 4096, 4097, 8200])
JAX = [("float32", (3, 37)), ("bfloat16", (2, 150)), ("float64", (2, 5, 17)), ("float16", (1, 9, 3))]
LAYOUTS = ("dense", "transposed", "every other", "backwards axes", "expanded")


def laid_out(x: cases.Array, layout: str) -> cases.Array:
    """The same numbers in other memory; expanded: the first of each axis 0, strides 0."""
    if layout == "transposed":
        return np.swapaxes(np.swapaxes(x, 0, 1).copy(), 0, 1)
    if layout == "every other":
        wide = np.zeros([2 * n for n in x.shape])
        wide[tuple(slice(1, None, 2) for _ in x.shape)] = x
        return wide[tuple(slice(1, None, 2) for _ in x.shape)]
    if layout == "backwards axes":
        return x.T.copy().T
    return np.broadcast_to(x[:1], x.shape) if layout == "expanded" else x


def loud(draw: Any, shape: tuple[int, ...], dtype: str, special: list[float]) -> cases.Array:
    """Normal rows of a random size with a few special values anywhere."""
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = draw(st.sampled_from([0.0, 1.0, 5.0, 20.0])) * r.standard_normal(shape)
    for value in draw(st.lists(st.sampled_from(special), max_size=6)):
        x.flat[r.integers(x.size)] = value
    return cases.rounded(x, dtype)


@st.composite
def problems(draw: Any, name: str) -> Named:
    if name == "jax":  # every shape and type is a compilation
        dtype, shape = draw(st.sampled_from(JAX))
    else:
        dtype, classes = draw(st.sampled_from(DTYPES)), draw(CLASSES)
        few = classes > 200
        shape = (draw(st.integers(1, 3) if few else st.sampled_from([1, 2, 3, 15, 16, 17, 65])), classes)
        shape += draw(st.sampled_from([(), (1,), (2,)] if few else [(), (), (3,), (16,), (17,), (2, 33)]))
    option = draw(st.sampled_from(["plain", "all"] if name == "jax" else ["plain", "smooth", "scale", "cap", "all"]))
    special = [0.0, -0.0, SUBNORMAL[dtype], -SUBNORMAL[dtype], 60.0, -60.0, -INF, -INF, INF, NAN]
    if not OPTIONS[option].get("label_smoothing"):  # where a sum over classes of huge numbers overflows
        special += [HUGE[dtype], -HUGE[dtype]]
    rows = (shape[0], *shape[2:])
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return {
        "dtype": dtype,
        "axis": draw(st.integers(0, len(shape) - 1)) if name == "torch" else 1,
        "x": laid_out(loud(draw, shape, dtype, special), draw(st.sampled_from(LAYOUTS))),
        "dy": laid_out(loud(draw, shape, dtype, [0.0, -0.0, 100.0, 1e-6]), draw(st.sampled_from(LAYOUTS))),
        "target": np.where(r.random(rows) < 0.2, -7, r.integers(shape[1], size=rows)),
        "dloss": laid_out(
            cases.rounded(r.standard_normal(rows), "float32"), draw(st.sampled_from(["dense", "expanded"]))
        ),
        "options": {**OPTIONS[option], "reduction": "none", "ignore_index": -7},
    }


def judge(fw: Any, op: str, dtype: str, arrays: Named, upstream: Named, **options: Any) -> None:
    truth = checks.oracle(op, arrays, upstream, **options)
    scale = checks.scales(op, arrays, upstream, dtype=dtype, **options)
    checks.judge(op, dtype, fw(op, dtype, arrays, upstream, **options), truth, scale)


@both
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_anything_on_the_kernels(fw: Any, data: Any) -> None:
    p = data.draw(problems(fw.name))
    for op in ("softmax", "log_softmax"):
        judge(fw, op, p["dtype"], {"input": p["x"]}, {"value": p["dy"]}, axis=p["axis"])
    arrays = {"input": p["x"], "target": p["target"]}
    judge(fw, "cross_entropy", p["dtype"], arrays, {"value": p["dloss"]}, **p["options"])
