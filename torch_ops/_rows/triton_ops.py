"""The Triton kernels as PyTorch ops: checked, launched, described to the compiler. Imported only where they serve.

Ops with a fake kernel, not `triton_op`: what the compiler could do with a look inside (fusing a neighbour into a
row kernel) it does not do, and an op looks the same to every PyTorch and every Triton. Same names and schemas as
the native CPU ops, but for `canonical` and `kept_mean`, which a CPU need not have.
"""

from __future__ import annotations

import contextlib
import math
import struct
from typing import Any

import torch
from torch import Tensor

from softmax_ext.gpu import cross_entropy as ce
from softmax_ext.gpu import rows as gpu
from softmax_ext.gpu import scaled as gpu_scaled
from softmax_ext.gpu import softmax as gpu_softmax
from softmax_ext.gpu import targets as gpu_targets
from torch_ops._rows.arithmetic import weight_sums
from torch_ops._rows.classes import IGNORED
from torch_ops._rows.native import FAKES, describe, rows_like

tl: Any = gpu.tl  # as they are, Triton's types are not Python's


def canonical(target: Tensor, classes: int, ignored: int) -> Tensor:
    """Class indices as int64: in [0, classes), IGNORED or INVALID."""
    target = target.contiguous()
    out = torch.empty_like(target, dtype=torch.int64)
    if target.numel():
        count, block = target.numel(), gpu_targets.BLOCK
        args = (target, out, count, classes, ignored)
        launch(gpu_targets.canonical_kernel, -(-count // block), args, BLOCK=block)
    return out


def kept_mean(nll: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(the mean of the rows that are not ignored, 0 / 0 of none; how many there are), of canonical class indices."""
    if nll.numel() > gpu_targets.FEW_ROWS:
        kept = (target != IGNORED).sum()
        return nll.sum() / kept, kept
    loss, kept = nll.new_empty(()), nll.new_empty((), dtype=torch.int64)
    kind = tl.float64 if nll.dtype == torch.float64 else tl.float32
    with _current(nll.device):
        launch: Any = gpu_targets.kept_mean_kernel[(1,)]
        launch(nll, target, loss, kept, nll.numel(), F=kind, BLOCK=gpu_targets.BLOCK, num_warps=8)
    return loss, kept


def scaled(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out = x * factor, of contiguous arrays and one number: no op, for calls that nothing looks into."""
    if x.numel():
        kind = tl.float64 if x.dtype == torch.float64 else tl.float32
        with _current(x.device):
            launch: Any = gpu_scaled.scaled_kernel[(-(-x.numel() // gpu_scaled.BLOCK),)]
            launch(x, factor, out, x.numel(), F=kind, BLOCK=gpu_scaled.BLOCK, num_warps=gpu_scaled.WARPS)
    return out


def softmax_fwd(x: Tensor, dim: int) -> Tensor:
    """y = softmax(x)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    launch_rows(gpu_softmax.softmax_fwd_kernel, (x, y), x, dim, gpu.HOLDS_ONE, FAST=_fast(x))
    return y


def softmax_bwd(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    """dx = y (dy - sum(y dy))."""
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    launch_rows(gpu_softmax.softmax_bwd_kernel, (dy, y, dx), y, dim, gpu.HOLDS_TWO, ROUNDED=_fast(y) > 0)
    return dx


def log_softmax_fwd(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, m, rest)."""
    x = x.contiguous()
    y, m, rest = torch.empty_like(x), *rows_like(x, dim, 2)
    launch_rows(gpu_softmax.log_softmax_fwd_kernel, (x, y, m, rest), x, dim, gpu.HOLDS_ONE, FAST=_fast(x))
    return y, m, rest


def log_softmax_bwd(dy: Tensor, x: Tensor, m: Tensor, rest: Tensor, dim: int) -> Tensor:
    """dx = dy - p sum(dy)."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    launch_rows(
        gpu_softmax.log_softmax_bwd_kernel,
        (dy, x, m.contiguous(), rest.contiguous(), dx),
        x,
        dim,
        gpu.HOLDS_TWO,
        FAST=_fast(x),
    )
    return dx


def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    scale: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
) -> list[Tensor]:
    """(nll, lse, [smooth], [entropy], m, rest)."""
    x, target, weight = logits.contiguous(), target.contiguous(), _dense(weight)
    out = rows_like(x, dim, 4 + smooth + entropy)
    options, constants = _options(x, target, scale, softcap)
    many = target.is_floating_point() or smooth or entropy
    arrays = (x, target, weight, *_optional(out, smooth, entropy))
    widest = ce.widest(_fast(x) > 0, "fwd", bool(softcap), many)
    launch_rows(ce.cross_entropy_fwd_kernel, arrays, x, dim, widest, *options, once=not many, **constants)
    return out


def cross_entropy_bwd(logits: Tensor, *args: Any) -> Tensor:
    """dL/dlogits; the arguments are those of _SCHEMAS."""
    logits = logits.contiguous()
    dx = torch.empty_like(logits)
    target, weight, m, rest, *more = args
    _backward(dx, logits, target, weight, (None, None, None, None, m, rest), *more)
    return dx


def cross_entropy_bwd_(logits: Tensor, *args: Any) -> None:
    """dL/dlogits over the logits."""
    _in_place(logits, "cross_entropy_bwd_")
    target, weight, m, rest, *more = args
    _backward(logits, logits, target, weight, (None, None, None, None, m, rest), *more)


def cross_entropy_fwd_bwd_(logits: Tensor, *args: Any) -> list[Tensor]:
    """cross_entropy_fwd's results, and dL/dlogits over the logits, in one visit of each row."""
    _in_place(logits, "cross_entropy_fwd_bwd_")
    target, weight, *more, smooth, entropy = args
    out = rows_like(logits, more[4], 4 + smooth + entropy)
    _backward(logits, logits, target, weight, _optional(out, smooth, entropy), *more, both=True)
    return out


def _backward(
    dx: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    results: tuple[Tensor | None, ...],
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_smooth: Tensor | None,
    d_entropy: Tensor | None,
    dim: int,
    scale: float,
    softcap: float | None,
    *,
    both: bool = False,
) -> None:
    target, weight = target.contiguous(), _dense(weight)
    results, upstream = tuple(map(_dense, results)), tuple(map(_dense, (d_nll, d_lse, d_smooth, d_entropy)))
    smoothed = d_smooth is not None
    sums = torch.stack(weight_sums(weight)) if weight is not None and smoothed and logits.numel() else None
    options, constants = _options(logits, target, scale, softcap)
    many = target.is_floating_point() or smoothed or d_entropy is not None or any(r is not None for r in results[2:4])
    arrays = (logits, target, weight, sums, *results, *upstream, dx)
    widest = ce.widest(_fast(logits) > 0, "both" if both else "bwd", bool(softcap), many)
    launch_rows(ce.cross_entropy_bwd_kernel, arrays, logits, dim, widest, *options, BOTH=both, **constants)


def launch_rows(
    kernel: Any,
    arrays: tuple[Tensor | None, ...],
    x: Tensor,
    dim: int,
    widest: int,
    *options: Any,
    once: bool = False,
    most: int | None = None,
    **constants: Any,
) -> None:
    """Launch a kernel on the rows of x: its arrays, the layout, its options."""
    if x.numel() == 0:
        return
    outer, classes, inner = math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])
    programs, layout = gpu.plan(outer, classes, inner, widest, x.element_size(), _lanes(x), once, most)
    if "LANES" not in kernel.arg_names:
        del layout["LANES"], layout["VECTOR"]
    kind = tl.float64 if x.dtype == torch.float64 else tl.float32
    launch(kernel, programs, (*arrays, outer, classes, inner, *options), F=kind, **constants, **layout)


def launch(kernel: Any, grid: int | tuple[int, ...], args: tuple[Any, ...], **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor."""
    with _current(args[0].device):
        # fusion would undo what arithmetic.py does about rounding: see rows.plan
        kernel[grid if isinstance(grid, tuple) else (grid,)](*args, **{"enable_fp_fusion": False, **constants})


def _lanes(x: Tensor) -> int:
    """Threads of a warp: 64 on AMD's data-centre chips."""
    return torch.cuda.get_device_properties(x.device).warp_size if torch.version.hip else 32


def _current(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    if device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def _options(x: Tensor, target: Tensor, scale: float, softcap: float | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    values, constants = transform(x, scale, softcap)
    return values, {"SOFT": target.is_floating_point(), **constants}


def transform(x: Tensor, scale: float, softcap: float | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a kernel is told of scale and soft cap: values, and constants of its compilation."""
    constants = {"FAST": _fast(x, scale == 1.0 and not softcap), "SCALED": scale != 1.0, "CAPPED": bool(softcap)}
    return (*number(scale), *number(softcap or 1.0)), constants


def number(x: float) -> tuple[float, int]:
    """A Python number and its bits: Triton hands over every float as float32."""
    return float(x), struct.unpack("<q", struct.pack("<d", x))[0]


def _fast(x: Tensor, as_stored: bool = True) -> int:
    """Which exp of gpu/arithmetic.py: 0 accurate; for half precision 1, or 2 if the logits are the numbers stored."""
    return 0 if x.dtype not in (torch.float16, torch.bfloat16) else 2 if as_stored else 1


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _optional(out: list[Tensor], smooth: bool, entropy: bool) -> tuple[Tensor | None, ...]:
    """(nll, lse, smooth or None, entropy or None, m, rest)."""
    return (*out[:2], out[2] if smooth else None, out[2 + smooth] if entropy else None, *out[-2:])


def _in_place(logits: Tensor, op: str) -> None:
    if not logits.is_contiguous():
        raise RuntimeError(f"{op}: logits must be contiguous to be overwritten.")


_OPTIONS = "int dim, float scale, float? softcap"
_UPSTREAM = "Tensor? d_nll, Tensor? d_lse, Tensor? d_smooth, Tensor? d_entropy"
_INPUTS = "logits, Tensor target, Tensor? weight"
_SCHEMAS: dict[Any, str] = {
    canonical: "(Tensor target, int classes, int ignored) -> Tensor",
    kept_mean: "(Tensor nll, Tensor target) -> (Tensor, Tensor)",
    softmax_fwd: "(Tensor x, int dim) -> Tensor",
    softmax_bwd: "(Tensor dy, Tensor y, int dim) -> Tensor",
    log_softmax_fwd: "(Tensor x, int dim) -> (Tensor, Tensor, Tensor)",
    log_softmax_bwd: "(Tensor dy, Tensor x, Tensor m, Tensor rest, int dim) -> Tensor",
    cross_entropy_fwd: f"(Tensor {_INPUTS}, {_OPTIONS}, bool smooth, bool entropy) -> Tensor[]",
    cross_entropy_bwd: f"(Tensor {_INPUTS}, Tensor m, Tensor rest, {_UPSTREAM}, {_OPTIONS}) -> Tensor",
    cross_entropy_bwd_: f"(Tensor(a!) {_INPUTS}, Tensor m, Tensor rest, {_UPSTREAM}, {_OPTIONS}) -> ()",
    cross_entropy_fwd_bwd_: f"(Tensor(a!) {_INPUTS}, {_UPSTREAM}, {_OPTIONS}, bool smooth, bool entropy) -> Tensor[]",
}


def _canonical_fake(target: Tensor, classes: int, ignored: int) -> Tensor:
    return torch.empty_like(target, dtype=torch.int64).contiguous()


def _kept_mean_fake(nll: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return nll.new_empty(()), nll.new_empty((), dtype=torch.int64)


_library = torch.library.Library("softmax_ext_triton", "DEF")
for _op, _schema in _SCHEMAS.items():
    _library.define(_op.__name__ + _schema)
    _library.impl(_op.__name__, _op, "CompositeExplicitAutograd")


describe("softmax_ext_triton", {**FAKES, "canonical": _canonical_fake, "kept_mean": _kept_mean_fake}, _library)
