"""Arrays and options of PyTorch's linear head."""

from __future__ import annotations

import torch
from torch import Tensor

N, D, V = 3, 2, 5
MEMORY = ("fast", "lean")


func = torch.func


def _inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    make = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    head = {"x": 4.0 * make(N, D) - 2.0, "lw": 2.0 * make(V, D) - 1.0, "lb": make(V)}
    return {**head, "y": make(N, V) + 0.1, "w": make(V) + 0.5, "tw": make(N) + 0.5}


IN = _inputs()
