"""The sum `rest` of a row as it is kept for the backward where hooks are told: a number that no type overflows.

rest lies in [0, V - 1]. Hooks that keep saved tensors in float16 (activation compression) make it inf from V = 65521
on, and the row's gradient 0. -1 / rest above 1 lies in [-1, 0): nothing overflows, and it costs one rounding. Only
where hooks are told, for it is two more passes over the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_ops._modes import is_watched


def kept(ctx: Any, rest: Tensor) -> Tensor:
    """What is to be saved of rest."""
    ctx.inverted = is_watched()
    return torch.where(rest > 1.0, -1.0 / rest, rest) if ctx.inverted else rest


def given_back(ctx: Any, rest: Tensor) -> Tensor:
    """rest, of what was saved."""
    return torch.where(rest < 0.0, -1.0 / rest, rest) if ctx.inverted else rest
