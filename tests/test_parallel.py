"""Losses on more than one device: ranks of gloo in processes of their own, each worker running every check it has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, checks, parallel_worker

ROOT = Path(__file__).parents[1]
LIMIT = 300.0  # seconds: ranks that wait for each other in vain are ended


def _ranks(world: int, store: Path) -> None:
    """Run the workers; a rank that fails takes the others along."""
    command = [sys.executable, "-m", "tests.parallel_worker"]
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


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_with_one_device(world: int, tmp_path: Path) -> None:
    store = tmp_path / "store"
    _ranks(world, store)
    parts = [np.load(f"{store}.{rank}.npz") for rank in range(world)]
    for dtype, name, soft in parallel_worker.LOUD:
        given, ups = parallel_worker.loud(dtype, soft)
        options = {**cases.OPTIONS[name], "reduction": "none", "stats": ("lse", "entropy", "argmax")}
        truth = checks.oracle("cross_entropy", given, ups, **options)
        scale = checks.scales("cross_entropy", given, ups, dtype=dtype, **options)
        for n in ("value", "lse", "entropy", "argmax"):
            replicas = [part[f"{dtype} {name} {soft} {n}"] for part in parts]
            assert all(np.array_equal(replicas[0], r, equal_nan=True) for r in replicas)
        found = {n: parts[0][f"{dtype} {name} {soft} {n}"] for n in ("value", "lse", "entropy", "argmax")}
        gradient = np.concatenate([part[f"{dtype} {name} {soft} gradient"] for part in parts], 1)
        checks.judge("cross_entropy", dtype, (found, {"input": gradient}), truth, scale)
