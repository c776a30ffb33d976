"""How many rows or classes a head works on at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORKSPACE = 1 << 28  # bytes of logits that may exist at a time
# The same where memory="fast" goes by rows on a GPU: each chunk reads and writes the float32 dW once. On an H100 chunks
# of 128256 classes take, in the bare matmuls' time: 1024 rows 1.28, 2048 1.15, the 4096 of 1 GiB 1.13.
WORKSPACE_ON_DEVICE = 1 << 30
# Rows or classes that a piece's size is a multiple of: matmuls over rows of bfloat16 that do not begin at 16 bytes take
# three times as long on an H100 (lean, 8192 x 4096 @ 128256: slices of 2036 or 2035 classes take 3.9 of the bare
# matmuls' time, those of 4008 1.2).
TILE = 64
# Entries of a temporary that stands beside the logits: 2 MiB of bfloat16, and on a device, where a piece is a launch or
# several of some microseconds each, 32.
PIECE = 1 << 20
PIECE_ON_DEVICE = 1 << 24


def spans(n: int, size: int) -> list[tuple[int, int]]:
    """(begin, end) of the fewest nearly equal pieces of n with at most `size` each; one empty piece of nothing.

    Pieces of TILE or more begin at a multiple of it and so are a little shorter than `size`, those of 127 by half.
    """
    if n <= size:  # asked first: an exported program's number of rows is a symbol, and this is all it need know
        return [(0, n)]
    count = int(-(-n // size))
    if size < TILE:
        return [(k * n // count, (k + 1) * n // count) for k in range(count)]
    each = int(min(-(-n // (count * TILE)), size // TILE)) * TILE
    return [(k, min(k + each, n)) for k in range(0, int(n), each)]


def that_fit(
    chunk_size: int | None, other: int, itemsize: int, beside: int = 0, device: torch.device | None = None
) -> int:
    """The chunk size asked for, or the most lines of `other` entries that fit the workspace with `beside` bytes."""
    if chunk_size is not None:
        return chunk_size
    room = WORKSPACE if device is None or device.type == "cpu" else WORKSPACE_ON_DEVICE
    return max(1, max(room - beside, room // 4) // max(1, other * itemsize))


def lines(x: Tensor) -> int:
    """How many of x's rows a temporary beside it may have."""
    return max(1, (PIECE if x.device.type == "cpu" else PIECE_ON_DEVICE) * x.shape[0] // max(1, x.numel()))


def join(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The results by the row of all chunks."""
    return list(parts[0]) if len(parts) == 1 else [torch.cat(p) for p in zip(*parts, strict=True)]
