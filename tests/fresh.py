"""The wheel in a fresh environment: `python -m tests.fresh WHEEL [torch] [jax] [--whole]` installs and tests it there.

The environment holds what the named frameworks and pytest need and nothing else, linked from this one rather than
downloaded again. The tests run from a copy, so that the only softmax_ext in reach is the wheel's.
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

TOOLS = ["numpy", "pytest", "pytest-xdist", "hypothesis", "mpmath", "packaging", "pygments"]
FRAMEWORKS = {"torch": ["torch"], "jax": ["jax", "jaxlib", "optax"]}
ROOT = Path(__file__).parents[1]
OF_THE_CHECKOUT = [
    "house/test_house.py",
    "house/test_ladder.py",
    "house/test_loading.py",
    "demo/test_demo.py",
]  # what they test is not in a wheel


def check(wheel: Path) -> None:
    """One wheel for every Python: the tag says so, both doors are in it, and neither is linked to Python."""
    assert re.search(r"-py3-none-(?!any)", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as files:
        doors = {name: files.read(name) for name in files.namelist() if name.endswith(".so")}
    assert {Path(name).name for name in doors} == {"libsoftmax_ext_torch.so", "libsoftmax_ext_xla.so"}, doors.keys()
    for name, code in doors.items():
        assert not re.search(rb"libpython|\0_?Py[A-Z]\w+\0", code), name


def needed(names: list[str]) -> set[str]:
    """The distributions of this environment that these need, themselves included."""
    found: set[str] = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name not in found:
            found.add(name)
            wants = map(Requirement, metadata.requires(name) or [])
            names += [r.name for r in wants if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def link(name: str, site: Path) -> None:
    """Every top-level entry of an installed distribution."""
    here = metadata.distribution(name)
    for top in {file.parts[0] for file in here.files or [] if file.parts[0] not in ("..", "__pycache__", "bin")}:
        target, place = Path(str(here.locate_file(top))), site / top
        if place.is_symlink():
            place.unlink()  # of a checkout that is gone, it may be
        if target.exists() and not place.exists():
            place.symlink_to(target)


def install(wheel: Path, python: Path, frameworks: Sequence[str] = ()) -> None:
    """The wheel in another interpreter's environment, and what the named frameworks and the tests need, linked."""
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    for name in sorted(needed(TOOLS + [p for f in frameworks for p in FRAMEWORKS[f]])) if frameworks else []:
        link(name, site)
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--force-reinstall", str(wheel)], check=True)


def copy_tests(home: Path) -> None:
    """What the tests need of the checkout, where no softmax_ext of the checkout is in reach."""
    for name in ("tests", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", home)


def tests_of(python: Path, frameworks: Sequence[str], *, whole: bool) -> list[str]:
    """The command that tests an environment."""
    # What an environment can change: whether the doors open, and what the ops do where a framework is absent. With
    # both there is nothing new but the two libraries in one process.
    both = len(frameworks) == len(FRAMEWORKS)
    of_one = [
        f"rows/native/test_{frameworks[0]}",
        "ops/test_ops",
        "ops/test_own",
        "rows/test_rows",
        "contract/test_facts",
    ]
    names = ["rows/native/test_threads", *([] if both else of_one)]
    chosen = [] if whole else [f"tests/{name}.py" for name in names]
    ignored = [f"--ignore=tests/{name}" for name in OF_THE_CHECKOUT]
    marked = "not slow" if whole else "not slow and not long"
    # Two environments at a time: one process each.
    tests = [str(python), "-m", "pytest", "-n", "0", "-m", marked, f"--doors={','.join(frameworks)}"]
    return [*tests, *chosen, *ignored]


def main(wheel: Path, frameworks: list[str], whole: bool) -> int:
    """The exit code of the tests."""
    check(wheel)
    with tempfile.TemporaryDirectory(prefix="softmax-ext-") as folder:
        home = Path(folder)
        venv.create(home / "env", symlinks=True)
        python = home / "env" / "bin" / "python"
        install(wheel, python, frameworks)
        copy_tests(home)
        return subprocess.run(tests_of(python, frameworks, whole=whole), cwd=home, check=False).returncode


if __name__ == "__main__":
    given = sys.argv[2:]
    sys.exit(main(Path(sys.argv[1]).resolve(), [f for f in FRAMEWORKS if f in given], "--whole" in given))
