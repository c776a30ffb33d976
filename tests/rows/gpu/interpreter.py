"""The Triton kernels on CPU tensors, in Triton's interpreter: the same launches, the same checks as the C++ rows."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.judging import checks

# Triton decides when it is imported whether it compiles or interprets: so before anything imports it.
if importlib.util.find_spec("torch") and not importlib.import_module("torch").cuda.is_available():
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "import tests.rows.gpu.interpreter earlier"
    )
    os.environ["TRITON_INTERPRET"] = "1"


def why_not() -> str:
    """Why the interpreter cannot be had here, or ""."""
    for needed in ("torch", "triton"):
        if importlib.util.find_spec(needed) is None:
            return f"{needed} is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "there is a GPU, on which `make gpu` runs the kernels"
    return ""


@contextlib.contextmanager
def interpreted() -> Iterator[list[str]]:
    """CPU tensors are served by the Triton ops; the names of the kernels launched."""
    native: Any = importlib.import_module("torch_ops._rows.native")
    triton: Any = importlib.import_module("torch_ops._rows.triton")
    ops: Any = importlib.import_module("torch_ops._rows.triton_ops")
    builder: Any = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    for more in ("classes", "divergence"):
        importlib.import_module(f"torch_ops._rows.triton_{more}")
    launch, cast, fma = ops.launch, builder.cast_impl, builder.create_fma
    directly, cpu, serves = native.serves_directly, native.serves_matrix, triton.serves_matrix
    ran: list[str] = []

    def counted(kernel: Any, grid: Any, args: Any, **constants: Any) -> None:
        ran.append(kernel.__name__ if hasattr(kernel, "__name__") else kernel.fn.__name__)
        with np.errstate(all="ignore"):
            launch(kernel, grid, args, **constants)

    ops.launch = counted
    builder.cast_impl = _rounded(cast)
    if not _rounds_once(fma):
        builder.create_fma = _fused
    triton.serves_matrix = cpu
    native.serves_matrix = native.serves_directly = lambda *_: False
    checks.FAST_HALVES = checks.FAST
    try:
        yield ran
    finally:
        ops.launch, builder.cast_impl, triton.serves_matrix = launch, cast, serves
        native.serves_matrix, native.serves_directly, builder.create_fma = cpu, directly, fma
        checks.FAST_HALVES = 0.0


def _rounded(cast: Any) -> Any:
    """The interpreter's cast, but float32 to bfloat16 rounds to even as every device does; it truncates."""
    tl: Any = importlib.import_module("triton.language")

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        if src.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            even = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            return cast(self, type(src)(np.where(np.isnan(src.data), bits, even).view(np.float32), src.dtype), to)
        return cast(self, src, to)

    return cast_impl


_SPLIT = 2.0**27 + 1


def _rounds_once(fma: Any) -> bool:
    """Whether a version's fma is one, as every device's is: before Triton 3.9 a product, rounded, and a sum."""
    handle: Any = importlib.import_module("triton.runtime.interpreter").TensorHandle
    tl: Any = importlib.import_module("triton.language")
    x, z = np.array([1 + 2.0**-12], np.float32), np.array([-1 - 2.0**-11], np.float32)
    found = fma(None, *(handle(a, tl.float32) for a in (x, x, z)))
    return float(found.data[0]) == 2.0**-24


def _fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once."""
    dtype = z.data.dtype
    a, b, c = (v.data.astype(np.float64) for v in (x, y, z))
    with np.errstate(all="ignore"):
        product = a * b
        total = product + c
        back = total - product
        lost = (product - (total - back)) + (c - back)
        if dtype == np.float64:  # what the product lost, by halves of the operands
            a1, b1 = (v * _SPLIT - (v * _SPLIT - v) for v in (a, b))
            a2, b2 = a - a1, b - b1
            more = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2
            total = np.where(np.isfinite(total + more), total + (lost + more), total)
        else:  # a float32 product is exact; the sum is rounded to odd, so that the type's own rounding is the only one
            even = (total.view(np.int64) & 1) == 0
            odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
            total = np.where(np.isfinite(lost) & (lost != 0) & even, odd, total)
        return type(z)(total.astype(dtype), z.dtype.scalar)
