"""The static part of a loss's rows: what is asked of their logits, and which numbers of a row are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softmax_ext.contract import LossOptions


class Plan(NamedTuple):
    """As the ops of a graph take it: flat, in this order."""

    scale: float
    softcap: float | None
    smooth: bool
    entropy: bool
    argmax: bool = False
    lean: bool = False
    chunk_size: int | None = None

    @classmethod
    def of(cls, options: LossOptions, kind: torch.dtype, lean: bool = False, chunk_size: int | None = None) -> Plan:
        """The plan of checked options, computed in the type `kind`."""
        scale, cap = options.fitted(torch.finfo(kind).tiny, torch.finfo(kind).max)
        stats = options.stats
        return cls(scale, cap, options.label_smoothing > 0.0, "entropy" in stats, "argmax" in stats, lean, chunk_size)

    @property
    def names(self) -> list[str]:
        """A row's differentiable results."""
        return ["nll", "lse", *["smooth"] * self.smooth, *["entropy"] * self.entropy]

    @property
    def values(self) -> int:
        """How many they are."""
        return 2 + self.smooth + self.entropy

    @property
    def row(self) -> dict[str, Any]:
        """The options of a row of logits (N, V) that its gradient has too."""
        return {"dim": 1, "scale": self.scale, "softcap": self.softcap}

    @property
    def wanted(self) -> dict[str, Any]:
        """The options of a row of logits (N, V) that is asked for its values."""
        return {**self.row, "smooth": self.smooth, "entropy": self.entropy}

    def class_weight(self, weight: Tensor | None, kind: torch.dtype, *, soft: bool) -> Tensor | None:
        """The class weights a row takes: of class indices only smoothing does, their own multiply from outside."""
        return weight.to(kind) if weight is not None and (soft or self.smooth) else None

    def upstream(self, grads: Sequence[Any]) -> list[Any]:
        """[d_nll, d_lse, d_smooth, d_entropy] from the gradients of the results that exist."""
        found = iter(grads)
        return [next(found), next(found), *(next(found) if on else None for on in (self.smooth, self.entropy))]
