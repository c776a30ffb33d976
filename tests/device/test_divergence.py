"""`make gpu`: divergences on a GPU. Without one these tests are skipped, aloud, but for a rehearsal on the CPU.

Digits at every distance, data facts and heads beside the reference, derivatives beside the CPU's, no host sync, CUDA
graphs, memory.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from softmax_ext.contract import KINDS
from tests.device.test_device import FW, on_cuda, torch
from tests.device.test_head import MIB, rehearsed
from tests.judging.divergences import Torch
from tests.ops import test_divergence as checks

ops: Any = FW and FW.ops
heads: Any = importlib.import_module("tests.head.test_divergence") if FW else None


@rehearsed(slow=False)
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_digits_at_every_distance(device: str, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (1, 5, 129, 1000) if device == "cpu" else (1, 2, 5, 17, 129, 1000, 4097, 40000)
    monkeypatch.setattr(checks, "SIZES", {"Torch": sizes})
    checks.test_digits_at_every_distance(kind, dtype, Torch(device))
    checks.test_equal_rows_are_nothing_apart(kind, dtype, Torch(device))


@rehearsed(slow=False)
def test_data_facts(device: str) -> None:
    for dtype in ("float32", "float64"):
        checks.test_data_facts(dtype, Torch(device))
    for memory in ("fast", "lean"):
        checks.test_rows_not_kept_reach_nothing(memory, Torch(device))
    for kind in KINDS:
        checks.test_a_class_axis_anywhere(kind, Torch(device))


@rehearsed()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_heads(device: str, kind: str, memory: str) -> None:
    heads.test_head_against_the_reference(kind, memory, Torch(device))
    for dtype in ("bfloat16", "float16"):
        heads.test_half_precision_heads(dtype, memory, Torch(device))


def _head(device: str, n: int = 48, v: int = 640, dtype: Any = None) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=g, dtype=torch.float64) / 2 for s in ((n, 8), (v, 8), (n, 6), (v, 6))]
    made = [a.to(device=device, dtype=dtype or torch.float64) for a in made]
    return [a.requires_grad_() for a in made[:2]] + made[2:]


@on_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_the_cpu_s(kind: str) -> None:
    found = []
    for device in ("cuda", "cpu"):
        x, w, y, u = _head(device)
        loss = ops.linear_divergence(x, w, y, u, kind=kind, chunk_size=20) + ops.divergence(x @ w.T, y @ u.T, kind=kind)
        first = torch.autograd.grad(loss, (x, w), create_graph=True)
        found.append([v.cpu() for v in torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@on_cuda
def test_no_host_sync_and_graphs() -> None:
    given = _head("cuda", dtype=torch.float32)

    def call() -> Any:
        return ops.linear_divergence(*given, kind="jsd", keep=keep)

    keep = torch.arange(48, device="cuda") % 5 != 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            due = torch.autograd.grad(call(), given[:2])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(call(), given[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(call(), given[:2])
    graph.replay()
    torch.testing.assert_close(found, due)


@on_cuda
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_memory(memory: Any) -> None:
    """Logits of neither head are whole: (8192, 65536) bfloat16 are a GiB each."""
    given = _head("cuda", 8192, 65536, torch.bfloat16)
    ops.linear_divergence(*_head("cuda", dtype=torch.bfloat16)).backward()  # compiled before it is counted
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_divergence(*given, memory=memory, chunk_size=512).backward()
    assert torch.cuda.max_memory_allocated() - before < 512 * MIB
