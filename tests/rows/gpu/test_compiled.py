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

# Instructions an element in the loops over a wide row. An H100 has about 3.3e13 issue slots a second: where memory
# gives 4e12 bytes, a bfloat16 that is only read may cost 16, a float32, or a bfloat16 read and written, 32.
INSTRUCTIONS = {
    ("loss bfloat16 128256", "cross_entropy_fwd_kernel"): 13,
    ("loss float32 128256", "cross_entropy_fwd_kernel"): 30,
    ("loss bfloat16 128256", "cross_entropy_bwd_kernel"): 18,
    ("loss float32 128256", "cross_entropy_bwd_kernel"): 32,
    ("softmax float32 128256", "softmax_fwd_kernel"): 30,
    ("softmax float32 128256", "softmax_bwd_kernel"): 11,  # the largest y and its dy are kept beside the sums
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit(target: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.rows.gpu.compiled", target],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kernels = {one["kernel"] for one in found}
    assert kernels == {
        "canonical_kernel",
        "kept_mean_kernel",
        "scaled_kernel",
        *(f"{op}_{way}_kernel" for op in ("softmax", "log_softmax", "cross_entropy") for way in ("fwd", "bwd")),
        "by_class_kernel",
        "place_kernel",
        *(f"points{part}_kernel" for part in ("_mass", "_except", "_sums", "")),
        *(f"divergence_{part}_kernel" for part in ("fwd", "sums", "bwd")),
        *(f"picked_{part}_kernel" for part in ("fwd", "input_bwd", "parts", "weight_bwd")),
    }
    for (name, kernel), bound in INSTRUCTIONS.items() if target == "sm_90" else ():
        mine = [one for one in found if (one["case"], one["kernel"]) == (name, kernel)]
        assert mine
        for one in mine:
            for count, waits in one["loops"]:
                assert waits == 0, one
                assert count <= bound * one["each"], one
    for one in found:
        print(one)
        assert one["stack"] <= STACK, one
        assert one["shared"] <= TARGETS[target], one
        assert one["registers"] <= 255 or target.startswith("gfx"), one
