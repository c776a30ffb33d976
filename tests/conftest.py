"""No silent door: what is open here stands at the head, and `--doors torch,jax` fails where one of those is not."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

# Before torch starts its threads: those that spin while they wait take the core of the other worker's.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A pool of compilers for each worker would load PyTorch twice more.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import tests.rows.gpu.interpreter  # noqa: F401  # before anything imports Triton

DOORS = {"torch": "torch_ops", "jax": "jax_ops"}
NATIVE = {"torch": "torch_ops._rows.native", "jax": "jax_ops._rows.native"}
ABSENT = [name for name in DOORS if find_spec(name) is None]


def _needs(path: Path) -> set[str]:
    """The frameworks that a test file imports at its head."""
    found = re.findall(r"^(?:import|from) (torch|jax)\b|^(?:import|from) (torch|jax)_ops", path.read_text(), re.M)
    return {name for pair in found for name in pair if name}


# A file that needs an absent framework is not collected; files that take whichever is there skip test by test.
HERE = Path(__file__).parent
LEFT_OUT = {str(path.relative_to(HERE)): _needs(path) & set(ABSENT) for path in sorted(HERE.rglob("test_*.py"))}
collect_ignore = [name for name, absent in LEFT_OUT.items() if absent]


def _closed(name: str) -> str:
    """Why a door's native kernels do not run here; empty if they do."""
    if name in ABSENT or name not in DOORS:
        return f"{name} is not installed"
    return importlib.import_module(NATIVE[name]).missing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--doors", default="", help="doors whose native kernels must run here, such as torch,jax")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_cover: pytest-cov's, which not every environment has")
    for name in filter(None, str(config.getoption("--doors")).split(",")):
        why = _closed(name)
        if why:
            raise pytest.UsageError(f"the {name} door does not open: {why}")


CASES = 4  # of a test's parameters that coverage watches, evenly spread: the others reach the same lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Coverage takes Python two thirds more time: quick tests reach the lines, slow and long ones run without it.

    Those of losses over several devices are the only ones that reach theirs. Demo and benchmarks call the doors as
    others do, and often; Triton's interpreter is Python all through.
    """
    names = [item.nodeid.split("[")[0] for item in items]
    count, before = Counter(names), Counter[str]()
    for item, name in zip(items, names, strict=True):
        room, among = item.path.parent.name, before[name]
        before[name] += 1
        many = among % -(-count[name] // (1 if room == "gpu" else CASES)) > 0
        tedious = room in ("demo", "benchmarks") or any(map(item.get_closest_marker, ("slow", "long")))
        if room != "parallel" and (tedious or many):
            item.add_marker("no_cover")


_compiled = {"for": "native"}


def _programs_for(rows: str) -> None:
    if _compiled["for"] != rows:
        importlib.import_module("jax").clear_caches()
        _compiled["for"] = rows


@pytest.fixture
def programs_for() -> Callable[[str], None]:
    """Called with the way JAX's rows are served: programs compiled for another are forgotten, those of this one not.

    Who patches more than that way forgets them himself, before and after.
    """
    return _programs_for


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What no fixture has taken away serves a test, in programs of its own."""
    if "programs_for" not in getattr(item, "fixturenames", ()):
        _programs_for("native")


def pytest_report_header() -> list[str]:
    lines = []
    for name in DOORS:
        why = _closed(name)
        kernels = "" if why else importlib.import_module(NATIVE[name]).instruction_set()
        lines.append(f"{name} door: {why or kernels + ' kernels'}")
    for name in ABSENT:
        files = [file for file, absent in LEFT_OUT.items() if name in absent]
        lines.append(f"not collected without {name}: {', '.join(files)}")
    return lines
