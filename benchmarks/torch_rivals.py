"""PyTorch's further rivals: the built-in compiled, the built-in in huge pages, and other libraries' heads."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from typing import Any

import torch

from benchmarks import huge_pages, torch_calls, torch_heads
from benchmarks.cases import Case
from benchmarks.heads import HeadCase
from benchmarks.timing import Call

COMPILED, HUGE_PAGES, CUT = "torch.compile", "torch, huge pages", "cut-cross-entropy"
PARTS: dict[str, Any] = {**torch_calls.PARTS, **torch_heads.PARTS}


def more(op: str, on: Any) -> dict[str, Call]:
    """Calls by name, beside those of `CALLS`."""
    if op not in PARTS:
        return {}
    make, _, built_in = PARTS[op]
    found: dict[str, Call] = {}
    if _no_compiler() is None:
        found[COMPILED] = make(_compiled(built_in), on)
    if huge_pages.why_not(on.case) is None:
        found[HUGE_PAGES] = _elsewhere(on).call(op, make(built_in, on))
    if isinstance(on.case, HeadCase) and _no_cut() is None:
        found[CUT] = make(_cut, on)
    return found


def skipped(case: Case | HeadCase) -> list[str]:
    """Which are missing, and why."""
    reasons = {COMPILED: _no_compiler(), HUGE_PAGES: huge_pages.why_not(case)}
    if isinstance(case, HeadCase):
        reasons["F.linear_cross_entropy"] = torch_heads.skipped()
        reasons[CUT] = _no_cut()
        reasons["Liger-Kernel"] = "its kernels need a GPU, as do cut-cross-entropy's own: see benchmarks/gpu.py"
    return [f"{name} is not timed: {reason}" for name, reason in reasons.items() if reason]


def _compiled(built_in: Any) -> Any:
    torch.compiler.reset()  # it keeps eight programs of a function, and would leave the ninth uncompiled
    return torch.compile(built_in, dynamic=False)


def _no_compiler() -> str | None:
    names = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    return None if any(map(shutil.which, names)) else "there is no C++ compiler"


def _elsewhere(on: Any) -> huge_pages.Process:
    """One process for all ops of a case."""
    if "elsewhere" not in vars(on):
        on.elsewhere = huge_pages.Process(type(on).__module__, on.case)
    return on.elsewhere


def _cut(x: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Its way on a CPU: the compiler's."""
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy(
        x, linear_weight, target, impl="torch_compile"
    )


@functools.cache
def _no_cut() -> str | None:
    try:
        importlib.import_module("cut_cross_entropy")
    except ImportError as error:
        return str(error)
    return _no_compiler()
