"""`python -m tests.rows.gpu.compiled sm_90`: what each kernel becomes on a chip not at hand, one JSON object a line.

The launches are those of the PyTorch door, caught on their way: same constants, same widths. A process of its own,
because Triton decides when it is imported whether it compiles or interprets.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_ops._rows import triton_classes as classes
from torch_ops._rows import triton_divergence as divergences
from torch_ops._rows import triton_ops as ops

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
ALL = (0.7, 20.0)


def softmax(dtype: torch.dtype, v: int) -> None:
    """Forward and backward, twice two kernels."""
    x, rows = torch.empty(64, v, dtype=dtype, device="meta"), torch.empty(64, dtype=compute(dtype), device="meta")
    ops.softmax_fwd(x, 1)
    ops.softmax_bwd(x, x, 1)
    ops.log_softmax_fwd(x, 1)
    ops.log_softmax_bwd(x, x, rows, rows, 1)


def loss(dtype: torch.dtype, shape: tuple[int, ...], options: tuple[float, float | None], everything: bool) -> None:
    """Forward, backward, and both; `everything`: soft targets, weights, smoothing and entropy."""
    kind, (scale, cap) = compute(dtype), options
    x = torch.empty(shape, dtype=dtype, device="meta")
    rows = torch.empty([shape[0], *shape[2:]], dtype=kind, device="meta")
    target = x if everything else torch.empty(rows.shape, dtype=torch.int64, device="meta")
    weight = torch.empty(shape[1], dtype=kind, device="meta") if everything else None
    a, b, c, d = (rows, rows, rows, rows) if everything else (rows, rows, None, None)
    ops.cross_entropy_fwd(x, target, weight, 1, scale, cap, everything, everything)
    ops.cross_entropy_bwd(x, target, weight, rows, rows, a, b, c, d, 1, scale, cap)
    ops.cross_entropy_fwd_bwd_(x, target, weight, a, b, c, d, 1, scale, cap, everything, everything)


def indices() -> None:
    """Class indices to the canonical form, and the mean of those kept."""
    target = ops.canonical(torch.empty(3000, dtype=torch.int64, device="meta"), 128256, -100)
    ops.kept_mean(torch.empty(3000, dtype=F32, device="meta"), target)


def scaled() -> None:
    """float32 sums to a bfloat16 gradient."""
    x = torch.empty(16, 4096, dtype=F32, device="meta")
    ops.scaled(x, torch.empty((), dtype=F32, device="meta"), torch.empty_like(x, dtype=BF16))


def points(dtype: torch.dtype, v: int, excepted: int, options: tuple[float, float | None], spanned: bool) -> None:
    """K points a row."""
    x, rows = torch.empty(64, v, dtype=dtype, device="meta"), torch.empty(64, dtype=compute(dtype), device="meta")
    left_out, u = torch.empty(64, excepted, dtype=torch.int64, device="meta"), torch.empty(64, 64, device="meta")
    span = torch.empty(64, 3, 2, dtype=compute(dtype), device="meta") if spanned else None
    classes.points(x, rows, rows, left_out, u, span, *options)


def picked(dtype: torch.dtype, k: int, d: int, v: int, outer: bool) -> None:
    """K classes a row and the two products' gradients; `outer`: begun with an outer product."""
    x, w = (torch.empty(n, d, dtype=dtype, device="meta") for n in (512, v))
    ids = torch.empty(512, k, dtype=torch.int32, device="meta")
    c = torch.empty(512, k, dtype=compute(dtype), device="meta")
    by, by_class, of_all = (torch.empty(n, dtype=c.dtype, device="meta") if outer else None for n in (512, v, d))
    classes.picked_fwd(x, w, ids)
    classes.picked_input_bwd(c, w, ids, by, of_all, False)
    classes.picked_weight_bwd(c, x, ids, v, by_class, of_all, not outer)


def sparse(dtype: torch.dtype, k: int) -> None:
    """Sums over the equal of K ids a row, and entries written at them."""
    ids = torch.empty(64, k, dtype=torch.int64, device="meta")
    classes.by_class(ids, torch.empty(64, k, dtype=compute(dtype), device="meta"))
    x = torch.empty(64, 4096, dtype=dtype, device="meta")
    classes.place_(x, ids, torch.empty(64, k, dtype=dtype, device="meta"), 1)


def divergence(dtype: torch.dtype, shape: tuple[int, ...], kind: int, everything: bool) -> None:
    """Forward, sums of a part, backward, and both; `everything`: caps of both sides, rows that are not kept."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    rows = torch.empty([shape[0], *shape[2:]], dtype=compute(dtype), device="meta")
    state, keep = rows.new_empty([*rows.shape, 7]), rows.bool() if everything else None
    options = (1, kind, 0.3, *(ALL if everything else (1.0, None)), *((0.9, 9.0) if everything else (1.0, None)))
    divergences.divergence_fwd(x, x, keep, *options)
    divergences.divergence_sums(x, x, keep, state, *options)
    divergences.divergence_bwd(x, x, keep, state, rows, *options)
    divergences.divergence_fwd_bwd_(x, x, keep, rows, *options)


def compute(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


# The widest row held in one block, the loop beyond it, a middle axis, float64.
FEW: dict[str, Callable[[], None]] = {
    "class indices": indices,
    "a gradient by a number": scaled,
    "softmax bfloat16 32768": lambda: softmax(BF16, 32768),
    "loss bfloat16 32768": lambda: loss(BF16, (64, 32768), (1.0, None), False),
    "loss of everything float32 4096": lambda: loss(F32, (64, 4096), ALL, True),
    "points of everything float32 4096": lambda: points(F32, 4096, 5, ALL, True),
    "picked bfloat16 4096": lambda: picked(BF16, 65, 4096, 128256, True),
    "sparse bfloat16 64": lambda: sparse(BF16, 64),
    "jsd of everything float32 4096": lambda: divergence(F32, (64, 4096), 2, True),
}
MANY: dict[str, Callable[[], None]] = {
    **FEW,
    "points bfloat16 128256": lambda: points(BF16, 128256, 1, (1.0, None), False),
    "softmax float32 32768": lambda: softmax(F32, 32768),
    "loss bfloat16 128256": lambda: loss(BF16, (64, 128256), (1.0, None), False),
    "loss float32 128256": lambda: loss(F32, (64, 128256), (1.0, None), False),
    "softmax float32 128256": lambda: softmax(F32, 128256),
    "loss of everything bfloat16 128256": lambda: loss(BF16, (64, 128256), ALL, True),
    "loss of everything bfloat16 21, middle axis": lambda: loss(BF16, (2, 21, 64, 64), ALL, True),
    "softmax float64 2048": lambda: softmax(F64, 2048),
    "loss of everything float64 2048": lambda: loss(F64, (64, 2048), ALL, True),
    "points of everything float64 4096": lambda: points(F64, 4096, 5, ALL, True),
    "picked float32 576": lambda: picked(F32, 64, 576, 49152, False),
    "picked float64 4096": lambda: picked(F64, 5, 4096, 1000, True),
    "divergence bfloat16 128256": lambda: divergence(BF16, (64, 128256), 0, False),
    "divergence float32 32000": lambda: divergence(F32, (64, 32000), 1, False),
    "jsd bfloat16 128256": lambda: divergence(BF16, (64, 128256), 2, False),
    "tv of everything bfloat16 21, middle axis": lambda: divergence(BF16, (2, 21, 64, 64), 3, True),
    "jsd of everything float64 2048": lambda: divergence(F64, (64, 2048), 2, True),
    "picked bfloat16 1": lambda: picked(BF16, 64, 1, 128256, True),
}


def compiled(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], target: GPUTarget) -> Any:
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion") if name in constants}
    given = dict(zip([n for n in kernel.arg_names if n not in constants], args, strict=True))
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = given.get(name)
        if name in constants or value is None:
            signature[name], values[(i,)] = "constexpr", constants.get(name)
        elif name in ("inner", "D", "E", "K", "C") and value == 1:  # the launcher makes a 1 a constant
            signature[name], values[(i,)] = "constexpr", 1
        elif isinstance(value, torch.Tensor):
            kind = {BF16: "bf16", F32: "fp32", F64: "fp64", torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}[
                value.dtype
            ]
            signature[name], aligned[(i,)] = f"*{kind}", [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i64" if value >= 2**31 else "i32"
            if name in ("V", "D", "inner", "count") and value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, values, aligned), target=target, options=options)


def resources(binary: Any) -> dict[str, Any]:
    """Registers, bytes of stack (what spills go to) and of shared memory; of NVIDIA's the loops too."""
    if "cubin" not in binary.asm:
        text = binary.asm["amdgcn"]
        found = {k: int(re.findall(rf"\.{k}:\s*(\d+)", text)[0]) for k in ("vgpr_count", "private_segment_fixed_size")}
        spills = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text))
        stack = found["private_segment_fixed_size"] + spills
        return {"registers": found["vgpr_count"], "stack": stack, "shared": binary.metadata.shared}
    usage = _asked(binary, "-res-usage")
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found)
    shared = binary.metadata.shared
    return {"registers": registers, "stack": stack + local, "shared": shared, "loops": loops(_asked(binary, "-sass"))}


def _asked(binary: Any, question: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([tool, question, file.name], capture_output=True, text=True, check=True).stdout


def loops(assembler: str) -> list[tuple[int, int]]:
    """(instructions, those by which threads tell or await each other) of each loop: from a branch back to its end."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);", assembler)
    at = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    found = []
    for i, (_, op, rest) in enumerate(lines):
        to = re.search(r"0x([0-9a-f]+)", rest) if op == "BRA" else None
        begin = at.get(int(to[1], 16), i) if to else i
        if i - begin > 20:  # the last branch of a program goes to itself
            body = [name.split(".")[0] for _, name, _ in lines[begin : i + 1]]
            found.append((len(body), sum(name in ("BAR", "SHFL", "LDS", "STS") for name in body)))
    return found


def main() -> None:
    """Compile and report."""
    name = sys.argv[1]
    amd = name.startswith("gfx")
    target = GPUTarget("hip", name, 64) if amd else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    ops._current = lambda device: contextlib.nullcontext()
    ops._lanes = lambda x: target.warp_size
    case = ""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        warps = constants.get("num_warps", 4)
        binary = compiled(kernel, args, constants, target)
        each = constants.get("ROWS", 1) * constants.get("COLS", 1) // (target.warp_size * warps)  # numbers of a thread
        print(json.dumps({"case": case, "kernel": kernel.fn.__name__, "each": each, **resources(binary)}), flush=True)

    triton.JITFunction.run = run  # pyright: ignore[reportAttributeAccessIssue]
    for case, launch in (MANY if name == "sm_90" else FEW).items():  # noqa: B007
        launch()


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    main()
