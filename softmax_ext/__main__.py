"""`python -m softmax_ext`: what is active here, and a self-check against the reference.

Exit code 0 only if every door that opens gives the reference's numbers and at least one opens.
"""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from softmax_ext import __version__, machine, reference

DOORS = {"torch": "torch_ops", "jax": "jax_ops"}
LOGITS = np.array([[1.1, 2.2, 0.2, -1.7], [60.0, 0.0, 0.0, 0.0], [1e4, 1e4 - 1, -np.inf, 9e3]], dtype=np.float32)
TARGET = np.array([1, 0, 1])
BOUND = 4.0  # units of roundoff of the true value


def main() -> int:
    """Print the report; 0 if the check holds."""
    print(f"softmax-ext {__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(machine.name())
    print(f"transparent huge pages: {_huge_pages()}")
    doors = {name: _open(name) for name in DOORS}
    found = {name: door for name, door in doors.items() if door is not None}
    print("\nself-check on float32 against the float64 reference, worst error in ulp (bound 4)")
    print(f"  {'':22}" + "".join(f"{name:>10}" for name in found))
    results = {name: door.self_check(LOGITS, TARGET) for name, door in found.items()}
    held = bool(found)
    for quantity, truth in _truth().items():
        errors = {name: _ulp(result[quantity], truth) for name, result in results.items()}
        held = held and all(error <= BOUND for error in errors.values())
        print(f"  {quantity:22}" + "".join(f"{error:10.2f}" for error in errors.values()))
    print("check holds" if held else "CHECK FAILED" if found else "no framework found: nothing to check")
    return 0 if held else 1


def _huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> str:
    """The mode in force and what it means for fresh results of 4 MiB and more, which the kernels ask huge pages for."""
    if sys.platform != "linux":
        return "not Linux"
    try:
        mode = setting.read_text().partition("[")[2].partition("]")[0]
    except OSError as error:
        return f"unknown ({error.strerror})"
    meaning = {"always": "large results use them", "madvise": "large results use them", "never": "page faults dominate"}
    return f"{mode} ({meaning[mode]})" if mode in meaning else mode or "unknown"


def _open(name: str) -> Any:
    """Print one door's kernels; its report module, or None with the reason it is missing."""
    try:
        report = importlib.import_module(f"{DOORS[name]}._report")
    except ImportError as error:
        print(f"{name}: not available ({error})")
        return None
    print(f"{name} {report.version()}, {report.threads()}")
    for device, kernel, why in report.kernels():
        print(f"  {device:6} {kernel:8} {why}")
    return report


def _truth() -> dict[str, np.ndarray]:
    return {
        "softmax": reference.softmax(LOGITS),
        "log_softmax": reference.log_softmax(LOGITS),
        "loss": np.asarray(reference.cross_entropy(LOGITS, TARGET, reduction="none")),
        "gradient": reference.cross_entropy_grad(LOGITS, TARGET, reduction="none"),
        "entropy": reference.cross_entropy(LOGITS, TARGET, stats=("entropy",))[1]["entropy"],
    }


def _ulp(ours: np.ndarray, truth: np.ndarray) -> float:
    """Worst |ours - truth| in units of roundoff of the truth; infinite where only one is finite."""
    ours = np.asarray(ours, np.float64)
    if not np.array_equal(np.isfinite(ours), np.isfinite(truth)):
        return float("inf")
    with np.errstate(invalid="ignore"):
        error = np.where(ours == truth, 0.0, np.abs(ours - truth))
    scale = 2.0**-24 * np.maximum(np.abs(truth), np.finfo(np.float32).tiny)
    return float(np.max(error / scale)) / 2


if __name__ == "__main__":
    sys.exit(main())
