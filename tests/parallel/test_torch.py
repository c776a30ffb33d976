"""Losses on more than one device: ranks of gloo in processes of their own, each worker running every check it has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import torch_ops
from tests.judging import cases, checks
from tests.parallel import groups
from tests.parallel.torch_ranks import CHECKS

ROOT = Path(__file__).parents[2]
LIMIT = 300.0  # seconds: ranks that wait for each other in vain are ended


def _ranks(world: int, store: Path) -> None:
    """Run the workers; a rank that fails takes the others along."""
    command = [sys.executable, "-m", "tests.parallel.torch_ranks"]
    given: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(world), str(store)], **given) for rank in range(world)]
    said = []
    try:
        for rank in ranks:
            _, err = rank.communicate(timeout=LIMIT)
            if rank.returncode:
                said.append(err[-4000:])
    finally:
        for rank in ranks:
            rank.kill()
    assert not said, "\n".join(said)


def test_table_on_paper_follows_from_its_formulas() -> None:
    text = (ROOT / "docs" / "parallel.md").read_text()
    lines = text[text.index("| ranks | classes |") :].split("\n\n")[0].splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in found] == ["1", "2", "4", "8", "16", "64", "256", "1024"]
    n, d, v, e, f = 8192, 4096, 128256, 2, 4

    def mib(size: float) -> str:
        return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.2g}"

    for row in found:
        r = int(row[0])
        ring = 2 * (r - 1) / r
        numbers = [v * d / r * (e + f), min(n * v / r * e, 2**28), ring * 4 * n * f, ring * n * d * f]
        numbers += [ring / 2 * v * d * e, ring * v * d * f]
        sizes = [mib(s) for s in numbers]
        assert row[1:] == [str(-(-v // r)), *sizes[:2], f"{6 * n * d * v / r / 1e12:.3g}", *sizes[2:]]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """This process as the one rank of a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_a_group_of_one(check: Any, alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", "0", "1", str(tmp_path / "rows")])
    check()


@pytest.mark.slow
def test_compiled_functions_leave_their_graph_for_it(alone: None) -> None:
    torch._dynamo.reset()
    x, w, t = torch.randn(4, 3).requires_grad_(), torch.randn(5, 3).requires_grad_(), torch.tensor([0, 1, 2, -100])

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch_ops.linear_cross_entropy(2.0 * x, w, t, group=dist.group.WORLD) * 3.0

    loss, wanted = torch.compile(call, backend="aot_eager")(x, w), call(x, w)
    torch.testing.assert_close(loss, wanted)
    ours, theirs = (torch.autograd.grad(v, (x, w)) for v in (loss, wanted))
    torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="sends messages between ranks outside the graph"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(x, w)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_with_one_device(world: int, tmp_path: Path) -> None:
    store = tmp_path / "store"
    _ranks(world, store)
    parts = [np.load(f"{store}.{rank}.npz") for rank in range(world)]
    for dtype, name, soft in groups.LOUD:
        given, ups = groups.loud(dtype, soft)
        options = {**cases.OPTIONS[name], "reduction": "none", "stats": ("lse", "entropy", "argmax")}
        truth = checks.oracle("cross_entropy", given, ups, **options)
        scale = checks.scales("cross_entropy", given, ups, dtype=dtype, **options)
        for n in ("value", "lse", "entropy", "argmax"):
            replicas = [part[f"{dtype} {name} {soft} {n}"] for part in parts]
            assert all(np.array_equal(replicas[0], r, equal_nan=True) for r in replicas)
        found = {n: parts[0][f"{dtype} {name} {soft} {n}"] for n in ("value", "lse", "entropy", "argmax")}
        gradient = np.concatenate([part[f"{dtype} {name} {soft} gradient"] for part in parts], 1)
        checks.judge("cross_entropy", dtype, (found, {"input": gradient}), truth, scale)
