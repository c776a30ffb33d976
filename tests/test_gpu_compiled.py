"""The Triton kernels compiled ahead of time, no GPU needed: they fit their chips without spilling."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for _needed in ("torch", "triton"):
    if importlib.util.find_spec(_needed) is None:
        pytest.skip(f"{_needed} is not installed", allow_module_level=True)

# Bytes of shared memory a block may have.
TARGETS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# Bytes of stack that are let pass: two registers of a thread. 3.9's assembler for sm_100 puts one aside in a kernel
# or two whatever the pressure (128 of 255 registers used).
STACK = 16


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit(target: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled", target],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kernels = {one["kernel"] for one in found}
    assert kernels == {
        "canonical_kernel",
        *(f"{op}_{way}_kernel" for op in ("softmax", "log_softmax", "cross_entropy") for way in ("fwd", "bwd")),
    }
    for one in found:
        print(one)
        assert one["stack"] <= STACK, one
        assert one["shared"] <= TARGETS[target], one
        assert one["registers"] <= 255 or target.startswith("gfx"), one
