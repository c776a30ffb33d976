"""The static part of a loss's rows: what is asked of their logits, and which numbers of a row are wanted."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """The static part of a head's rows."""

    scale: float
    softcap: float | None
    smooth: bool
    entropy: bool
    argmax: bool
    lean: bool
    chunk_size: int | None

    @property
    def values(self) -> int:
        """How many differentiable results a row has."""
        return 2 + self.smooth + self.entropy

    @property
    def names(self) -> list[str]:
        """Those results' names."""
        return ["nll", "lse", *["smooth"] * self.smooth, *["entropy"] * self.entropy]
