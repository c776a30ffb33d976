"""More than 2^32 pairs (row, class): their places are 64-bit numbers. Two megabytes, mapped again and again."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
import torch

from torch_ops._rows import native

ops = native.ops
PIECE = 1 << 21
ADDRESS, FIXED, NO_RESERVE = 1 << 64, 0x10, 0x4000


def repeated(count: int, tail: torch.Tensor) -> torch.Tensor:
    """int32 numbers: -1 `count` times, then the tail's; the address space is that large, the memory is not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    file = os.memfd_create("ids")
    os.write(file, b"\xff" * PIECE)
    pieces, size = 4 * count // PIECE, 4 * count + 4 * len(tail)
    start = libc.mmap(
        None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE, -1, 0
    )
    if start in (None, ADDRESS - 1):
        pytest.skip(f"no {size} bytes of address space: {os.strerror(ctypes.get_errno())}")
    for i in range(pieces):
        at = libc.mmap(start + i * PIECE, PIECE, mmap.PROT_READ, mmap.MAP_SHARED | FIXED, file, 0)
        assert at == start + i * PIECE
    os.close(file)
    ids = torch.frombuffer((ctypes.c_int32 * (size // 4)).from_address(start), dtype=torch.int32)
    ids[pieces * (PIECE // 4) : count] = -1
    ids[count:] = tail
    return ids


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux alone maps one piece of memory at many places")
def test_pairs_beyond_32_bits_reach_their_class():
    N, K, D, V = 1 << 16, (1 << 16) + 1, 3, 5
    tail = torch.tensor([0, 3, -1, 3], dtype=torch.int32)
    ids = repeated(N * K - 4, tail).view(N, K)
    assert ids.numel() > 2**32
    x = torch.zeros(N, D)
    x[-1] = torch.tensor([1.0, 2.0, 4.0])
    x[0] = x[N // 2] = torch.nan  # whom a place cut to 32 bits would find
    c = torch.zeros(N, 4)
    c[-1] = torch.tensor([1.0, 10.0, 1e9, 100.0])
    dw = ops.picked_weight_bwd(c, x, ids, V, None, None, True)
    truth = torch.zeros(V, D)
    truth[0], truth[3] = x[-1], 110 * x[-1]
    torch.testing.assert_close(dw, truth, rtol=0, atol=0)
