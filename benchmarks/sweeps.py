"""What `make scaling` measures: one size grows, the others stay."""

from __future__ import annotations

from dataclasses import dataclass

DECADES = 2


@dataclass(frozen=True)
class Sweep:
    """One size grows from `start` over two decades, the others stay."""

    name: str  # N, V, D or K
    start: int
    shape: str  # of format: rows x classes, or rows x features @ classes / classes a row
    points: int = 5

    def shapes(self, start: int | None = None) -> list[str]:
        """The shapes as `make bench` writes them."""
        return [self.shape.format(size) for size in self.sizes(start)]

    def sizes(self, start: int | None = None) -> list[int]:
        """The values of the size that grows."""
        first = start or self.start
        return [round(first * 10 ** (DECADES * i / (self.points - 1))) for i in range(self.points)]
