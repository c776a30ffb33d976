"""Class indices of any integer type in one canonical form: a class, IGNORED or INVALID, as int64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softmax_ext import contract
from torch_ops._arguments import is_transformed
from torch_ops._rows import triton
from torch_ops._rows.dispatch import IGNORED, INVALID

_MODES: Any = torch._C._TorchDispatchModeKey  # pyright: ignore[reportAttributeAccessIssue]
_TRACING = (_MODES.PROXY, _MODES.FAKE, _MODES.FUNCTIONAL)


def canonical(op: str, target: Tensor, classes: int, ignored: int) -> Tensor:
    """int64 targets in [0, classes), IGNORED or INVALID; IndexError where eager CPU code can afford to look.

    The comparison with `ignored` is made in a wide signed type: uint8 156 is not -100.
    """
    if isinstance(classes, int) and _is_eager(target) and triton.serves_indices(target):  # a group's V is a tensor
        return triton.ops.canonical(target, classes, ignored)
    t = target.to(torch.int64)
    if _can_look(target) and t.numel():
        low, high = (int(v) for v in t.aminmax())
        if low >= 0 and high < classes and not low <= ignored <= high:
            return t  # the usual case, in one pass
    kept = t != ignored
    if target.dtype == torch.uint64:  # values from 2**63 on turn negative: they name no class and no marker
        kept = kept | (t < 0)
    valid = (t >= 0) & (t < classes)
    if _can_look(target):
        bad = (kept & ~valid).flatten().nonzero()
        if bad.numel():
            row = int(bad[0])
            value = int(target.flatten()[row].item())  # not int(tensor): that refuses uint64 from 2**63 on
            raise contract.target_out_of_range(op, classes, ignored, value, row)
    return t.where(valid, INVALID).where(kept, IGNORED)


def _can_look(target: Tensor) -> bool:
    # Elsewhere a look is a device sync (CUDA), a graph break (compile) or impossible (vmap, fake, meta).
    return target.device.type == "cpu" and _is_eager(target)


def _is_eager(target: Tensor) -> bool:
    return (
        type(target) is Tensor
        and not torch.compiler.is_compiling()
        and not is_transformed(target)
        and not any(torch._C._get_dispatch_mode(mode) for mode in _TRACING)
    )
