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
    launch, cast, serves, cpu = ops._launch, builder.cast_impl, triton.serves, native.serves
    directly = native.serves_directly
    ran: list[str] = []

    def counted(kernel: Any, *args: Any, **constants: Any) -> None:
        ran.append(kernel.__name__ if hasattr(kernel, "__name__") else kernel.fn.__name__)
        with np.errstate(all="ignore"):
            launch(kernel, *args, **constants)

    ops._launch = counted
    builder.cast_impl = _rounded(cast)
    triton.serves = lambda x, dim: cpu(x, dim)
    native.serves = native.serves_directly = lambda *_: False
    checks.FAST_HALVES = checks.FAST
    try:
        yield ran
    finally:
        ops._launch, builder.cast_impl, triton.serves, native.serves = launch, cast, serves, cpu
        native.serves_directly = directly
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
