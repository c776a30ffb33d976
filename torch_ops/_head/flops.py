"""What the head's ops cost, for torch.utils.flop_counter: their matmuls, 2 N D V each."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

_ops = torch.ops.softmax_ext


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


def tell() -> None:
    """A counter made before this file was loaded has a table of its own."""
    ours = {op: flop_registry[op] for op in (_ops.head_fwd, _ops.head_bwd, _ops.head_fwd_bwd)}
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, FlopCounterMode):
            counter.flop_registry = {**ours, **counter.flop_registry}
