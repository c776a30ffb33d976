"""The native CPU kernels as PyTorch ops: found, loaded, described to the compiler; or the reason they are missing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import softmax_ext
from softmax_ext import built
from torch_ops._modes import is_direct, is_none, is_plain

LIBRARY = "libsoftmax_ext_torch.so"


def _find() -> tuple[Any, str]:
    """(the loaded library, "") or (None, why not)."""
    for folder in softmax_ext.__path__:
        path = Path(folder) / LIBRARY
        if path.exists():
            try:
                torch.ops.load_library(str(path))
            except OSError as error:  # built for another machine or an older torch
                return None, f"{LIBRARY} does not load ({error})"
            return ctypes.CDLL(str(path)), ""
    return None, f"{LIBRARY} is {built.why_not('torch', softmax_ext.__path__)}"


_library, missing = _find()
ops = torch.ops.softmax_ext
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def instruction_set() -> str:
    """What the kernels run on here: AVX-512, AVX2, NEON or the baseline."""
    _library.softmax_ext_instruction_set.restype = ctypes.c_char_p
    return _library.softmax_ext_instruction_set().decode()


def limit_instruction_set(level: int) -> int:
    """For tests: run on at most level 2 (AVX-512), 1 (AVX2), 0 (baseline); -1 is no limit. The level in force."""
    return _library.softmax_ext_limit_instruction_set(level)


def judge_huge_pages(size: int, nanoseconds: int) -> int:
    """For tests: as if a result of so many bytes had taken so long; how many go without huge pages now."""
    return _library.softmax_ext_judge_huge_pages(ctypes.c_int64(size), ctypes.c_int64(nanoseconds))


def serves(x: Tensor, dim: int) -> bool:
    """Whether the native kernels take x; exported programs hold no op of ours, so that they run anywhere."""
    return serves_matrix(x) and not is_none(x.shape[dim])


def serves_matrix(x: Tensor) -> bool:
    """The same where no dimension need have a class."""
    return _library is not None and x.is_cpu and x.dtype in FLOATS and is_plain(x) and not torch.compiler.is_exporting()


def serves_directly(x: Any) -> bool:
    """Whether x may go to a native op as it is.

    Asked before any rule of the contract, so true only of tensors that no rule refuses. The order of the questions
    is their price: this is what a call on a small array costs beside the op.
    """
    return type(x) is Tensor and x.is_cpu and x.dtype in FLOATS and is_direct(x) and _library is not None


if _library is not None:
    # Bound once: finding an op by name costs more than a softmax of ten numbers.
    softmax_fwd = ops.softmax_fwd.default
    softmax_bwd = ops.softmax_bwd.default
    log_softmax_bwd = ops.log_softmax_bwd.default
    log_softmax_alone = ops.log_softmax_alone.default
    cross_entropy_mean = ops.cross_entropy_mean.default
    cross_entropy_mean_bwd = ops.cross_entropy_mean_bwd.default


def dense_like(x: Tensor) -> Tensor:
    """An array of x's shape and type, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_like(x: Tensor, dim: int, count: int) -> list[Tensor]:
    """Some arrays of a number a row, in the compute type."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [x.new_empty([*x.shape[:dim], *x.shape[dim + 1 :]], dtype=dtype) for _ in range(count)]


def _losses_like(x: Tensor, target: Tensor, dim: int, count: int) -> list[Tensor]:
    """A row's numbers, the first of them one for each of its K classes, where it has K."""
    nll, *more = rows_like(x, dim, count)
    return [nll if target.is_floating_point() or target.dim() < x.dim() else nll.new_empty(target.shape), *more]


def _matrix(like: Tensor, rows: Any, columns: Any, dtype: torch.dtype) -> Tensor:
    return like.new_empty(rows, columns, dtype=dtype)


# What each op returns, to whoever traces it; the Triton ops are the same.
FAKES: dict[str, Callable[..., Any]] = {
    "softmax_fwd": lambda x, dim: dense_like(x),
    "softmax_bwd": lambda dy, y, dim: dense_like(y),
    "log_softmax_fwd": lambda x, dim: (dense_like(x), *rows_like(x, dim, 2)),
    "log_softmax_bwd": lambda dy, x, m, rest, dim: dense_like(x),
    "cross_entropy_fwd": lambda x, t, w, dim, scale, softcap, *more: _losses_like(x, t, dim, 4 + sum(more)),
    "cross_entropy_bwd": lambda x, *_: dense_like(x),
    "cross_entropy_bwd_": lambda *_: None,
    "cross_entropy_fwd_bwd_": lambda x, *args: _losses_like(x, args[0], args[6], 4 + args[9] + args[10]),
}


def describe(namespace: str, fakes: dict[str, Callable[..., Any]], library: Any) -> None:
    """Tell the compiler what the ops of a namespace return."""
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)


STATE = 7  # numbers of a row that a divergence's forward leaves for its backward
SUMS = 3  # those of some classes: of q f(p / q), p - q and p u


def _divergence_like(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    (value,) = rows_like(x, dim, 1)
    return value, value.new_empty([*value.shape, STATE])


# The native ops alone.
DIVERGENCES: dict[str, Callable[..., Any]] = {
    "divergence_fwd": lambda student, teacher, keep, dim, *_: _divergence_like(student, dim),
    "divergence_sums": lambda student, teacher, keep, state, *_: state.new_empty([*state.shape[:-1], SUMS]),
    "divergence_bwd": lambda student, *_: dense_like(student),
    "divergence_bwd_": lambda *_: None,
}
# Those of K classes a row.
CLASSES: dict[str, Callable[..., Any]] = {
    "points": lambda z, m, rest, excepted, u, *_: (u.new_empty(u.shape, dtype=torch.int32), m.new_empty(m.shape[0], 2)),
    "picked_fwd": lambda x, w, ids: _matrix(x, ids.shape[0], ids.shape[1], torch.promote_types(x.dtype, torch.float32)),
    "picked_input_bwd": lambda c, w, ids, by, of_all, wide: _matrix(
        w, ids.shape[0], w.shape[1], c.dtype if wide else w.dtype
    ),
    "picked_weight_bwd": lambda c, x, ids, classes, by, of_all, wide: _matrix(
        x, classes, x.shape[1], c.dtype if wide else x.dtype
    ),
}


if _library is not None:
    _described = torch.library.Library("softmax_ext", "FRAGMENT")
    describe("softmax_ext", {**FAKES, **CLASSES, **DIVERGENCES}, _described)
