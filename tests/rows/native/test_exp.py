"""The exponential of exp.h over every float32 argument: within one ulp, its polynomial as good as the comment says."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "softmax_ext" / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++") or ""
FLAGS = ["-std=gnu++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-pthread"]
SETS = {"AVX-512": ("avx512f", "v4"), "AVX2": ("avx2", "v3"), "baseline": ("", "")}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def _sweep(folder: Path, name: str) -> dict[str, float]:
    """The worst errors, by name, of the exponential built for an instruction set."""
    flag, march = SETS[name]
    if not COMPILER or not CSRC.exists():
        pytest.skip("no compiler" if CSRC.exists() else "no sources here: an installed wheel")
    if march and (flag not in _cpu() or platform.machine() != "x86_64"):
        pytest.skip(f"this CPU lacks {name}")
    program = folder / "sweep"
    build = [COMPILER, *FLAGS, "-DSX_ISA=swept", f"-I{CSRC}", str(ROOT / "tests" / "rows" / "native" / "sweep_exp.cpp")]
    subprocess.run([*build, *([f"-march=x86-64-{march}"] if march else []), "-o", str(program)], check=True)
    out = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {line.rpartition(" ")[0]: float.fromhex(line.rpartition(" ")[2]) for line in out.splitlines()}


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return _sweep(tmp_path_factory.mktemp("exp"), request.param)


@pytest.mark.slow
@pytest.mark.parametrize("errors", SETS, indirect=True)
def test_exp_is_within_one_ulp(errors: dict[str, float]) -> None:
    assert 0.5 < errors["shifted by 0"] < 1.0  # 0.89 at most; half an ulp is what rounding alone costs
    assert 0.5 < errors["shifted by others"] < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("errors", ["baseline"], indirect=True)
def test_the_bounds_in_the_comment_are_true(errors: dict[str, float]) -> None:
    said = [
        2.0 ** float(x) for x in re.findall(r"relative error (?:of exp )?2\^(-[\d.]+)", (CSRC / "exp.h").read_text())
    ]
    found = [errors["polynomial float"], errors["polynomial double"]]
    assert len(said) == 2
    for bound, error in zip(said, found, strict=True):
        assert 0.9 * bound < error <= bound
