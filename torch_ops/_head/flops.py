"""What the head's ops cost, for torch.utils.flop_counter: their matmuls, 2 N D V each."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from torch_ops._head.chunks import that_fit

_ops = torch.ops.softmax_ext
_COUNTED = [getattr(_ops, f"{of}_{way}") for of in ("head", "two_heads") for way in ("fwd", "bwd", "fwd_bwd")]
_ITEM = 4  # bytes of a logit: of the type a formula is not told


@register_flop_formula(_ops.head_fwd)
def fwd(x: Any, linear_weight: Any, *_: Any, **__: Any) -> int:
    """The logits, of a low rank's part too, whose numbers are rows of x."""
    return 2 * x[0] * linear_weight[0] * x[1]


@register_flop_formula(_ops.head_bwd)
def bwd(x: Any, linear_weight: Any, *args: Any, **_: Any) -> int:
    """The logits once more, and those needed of dX and dW."""
    needs = args[11]
    return fwd(x, linear_weight) * (1 + needs[0] + needs[1])


@register_flop_formula(_ops.head_fwd_bwd)
def fwd_bwd(x: Any, linear_weight: Any, *args: Any, **_: Any) -> int:
    """The logits of the rows that are judged, and those needed of dX and dW."""
    index, needs = args[7:9]
    return fwd(x if index is None else (*index, x[1]), linear_weight) * (1 + needs[0] + needs[1])


@register_flop_formula(_ops.two_heads_fwd)
def two_fwd(x: Any, linear_weight: Any, _b: Any, _y: Any, teacher_weight: Any, *args: Any, **_: Any) -> int:
    """Both heads' logits, and once more where slices of jsd and tv are summed given whole rows."""
    kind, lean, chunk_size = args[2], args[-2], args[-1]
    again = lean and kind in ("jsd", "tv") and linear_weight[0] > that_fit(chunk_size, 2 * x[0], _ITEM)
    return 2 * x[0] * linear_weight[0] * (x[1] + teacher_weight[1]) * (1 + again)


@register_flop_formula(_ops.two_heads_bwd)
def two_bwd(x: Any, linear_weight: Any, _b: Any, _y: Any, teacher_weight: Any, *args: Any, **_: Any) -> int:
    """Both heads' logits once more, and those needed of dX and dW."""
    return _two(x, linear_weight, teacher_weight, args[4])


@register_flop_formula(_ops.two_heads_fwd_bwd)
def two_fwd_bwd(x: Any, linear_weight: Any, _b: Any, _y: Any, teacher_weight: Any, *args: Any, **_: Any) -> int:
    """Both heads' logits, and those needed of dX and dW."""
    return _two(x, linear_weight, teacher_weight, args[3])


def _two(x: Any, linear_weight: Any, teacher_weight: Any, needs: Any) -> int:
    return 2 * x[0] * linear_weight[0] * (x[1] * (1 + needs[0] + needs[1]) + teacher_weight[1])


def tell() -> None:
    """A counter made before this file was loaded has a table of its own."""
    ours = {op: flop_registry[op] for op in _COUNTED}
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, FlopCounterMode):
            counter.flop_registry = {**ours, **counter.flop_registry}
