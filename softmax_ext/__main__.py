"""`python -m softmax_ext [--json]`: what is active here, and a self-check against the reference.

Exit code 0 only if every door that opens gives the reference's numbers and at least one opens.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softmax_ext import __path__, __version__, built, machine, reference

DOORS = {"torch": "torch_ops", "jax": "jax_ops"}
LOGITS = np.array([[1.1, 2.2, 0.2, -1.7], [60.0, 0.0, 0.0, 0.0], [1e4, 1e4 - 1, -np.inf, 9e3]], dtype=np.float32)
TARGET = np.array([1, 0, 1])
BOUND = 4.0  # units of roundoff of the true value


def main(given: Sequence[str] = ()) -> int:
    """Print the report; 0 if the check holds."""
    if unknown := [word for word in given if word != "--json"]:
        print(f"usage: python -m softmax_ext [--json]; got {' '.join(unknown)}", file=sys.stderr)
        return 2
    about = report()
    print(json.dumps(about, indent=2) if given else "\n".join(_lines(about)))
    return 0 if about["holds"] else 1


def report() -> dict[str, Any]:
    """All that is said, in words and numbers of JSON."""
    opened = {name: _open(name) for name in DOORS}
    found = {name: door for name, door in opened.items() if not isinstance(door, str)}
    check = _check(found)
    holds = bool(found) and all(
        error is not None and error <= BOUND for row in check.values() for error in row.values()
    )
    return {
        "version": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": machine.name(),
        "huge_pages": _huge_pages(),
        "built": built.doors(__path__),
        "doors": {name: _door(door) for name, door in opened.items()},
        "check": {"type": "float32", "unit": "ulp", "bound": BOUND, "worst": check},
        "holds": holds,
    }


def _door(door: Any) -> dict[str, Any]:
    """A door's kernels, or the reason that it is closed."""
    if isinstance(door, str):
        return {"open": False, "why": door}
    kernels = [dict(zip(("device", "kernel", "why"), row, strict=True)) for row in door.kernels()]
    return {"open": True, "version": door.version(), "threads": door.threads(), "kernels": kernels}


def _check(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Worst error of each quantity and door; None where only one of answer and truth is finite."""
    results = {name: door.self_check(LOGITS, TARGET) for name, door in found.items()}
    return {
        quantity: {name: _ulp(result[quantity], truth) for name, result in results.items()}
        for quantity, truth in _truth().items()
    }


def _lines(about: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [f"softmax-ext {about['version']}, Python {about['python']}, {about['machine']}", about["cpu"]]
    lines.append(f"transparent huge pages: {about['huge_pages']}")
    lines += [f"{door} kernels: {what}" for door, what in about["built"].items()]
    for name, door in about["doors"].items():
        if not door["open"]:
            lines.append(f"{name}: not available ({door['why']})")
            continue
        lines.append(f"{name} {door['version']}, {door['threads']}")
        lines += [f"  {row['device']:6} {row['kernel']:8} {row['why']}" for row in door["kernels"]]
    names = [name for name, door in about["doors"].items() if door["open"]]
    lines += ["", "self-check on float32 against the float64 reference, worst error in ulp (bound 4)"]
    lines.append(f"  {'':22}" + "".join(f"{name:>10}" for name in names))
    for quantity, errors in about["check"]["worst"].items():
        shown = ("wrong" if errors[name] is None else f"{errors[name]:.2f}" for name in names)
        lines.append(f"  {quantity:22}" + "".join(f"{error:>10}" for error in shown))
    lines.append(
        "check holds" if about["holds"] else "CHECK FAILED" if names else "no framework found: nothing to check"
    )
    return lines


def _huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> str:
    """The mode in force and what it means for fresh results of 32 MiB and more, which ask for huge pages."""
    if sys.platform != "linux":
        return "not Linux"
    try:
        mode = setting.read_text().partition("[")[2].partition("]")[0]
    except OSError as error:
        return f"unknown ({error.strerror})"
    meaning = {"always": "large results use them", "madvise": "large results use them", "never": "page faults dominate"}
    return f"{mode} ({meaning[mode]})" if mode in meaning else mode or "unknown"


def _open(name: str) -> Any:
    """One door's report module, or why it is missing."""
    try:
        return importlib.import_module(f"{DOORS[name]}._report")
    except ImportError as error:
        return str(error)


def _truth() -> dict[str, np.ndarray]:
    return {
        "softmax": reference.softmax(LOGITS),
        "log_softmax": reference.log_softmax(LOGITS),
        "loss": np.asarray(reference.cross_entropy(LOGITS, TARGET, reduction="none")),
        "gradient": reference.cross_entropy_grad(LOGITS, TARGET, reduction="none"),
        "entropy": reference.cross_entropy(LOGITS, TARGET, stats=("entropy",))[1]["entropy"],
    }


def _ulp(ours: np.ndarray, truth: np.ndarray) -> float | None:
    """Worst |ours - truth| in units of roundoff of the truth; None where one is finite alone, or a number alone."""
    ours = np.asarray(ours, np.float64)
    if not np.array_equal(np.isfinite(ours), np.isfinite(truth)) or np.isnan(ours).any():
        return None  # JSON has no infinity
    with np.errstate(invalid="ignore"):
        error = np.where(ours == truth, 0.0, np.abs(ours - truth))
    scale = 2.0**-24 * np.maximum(np.abs(truth), np.finfo(np.float32).tiny)
    return float(np.max(error / scale)) / 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
