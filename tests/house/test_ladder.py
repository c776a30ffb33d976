"""The law of the ladder: in each package an import goes down, lazy or not, and no files hang in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The floors from the ground up: an import goes down, or stays in its room. Rooms of one floor do not know each other.
LADDERS = {
    "softmax_ext": [["contract", "gpu", "machine", "memory", "built"], ["reference"], ["__init__"], ["__main__"]],
    "torch_ops": [
        ["_modes"],
        ["_rows"],
        ["_rules"],
        ["_reduction"],
        ["_head"],
        ["_parallel"],
        ["_compiler"],
        ["_arguments"],
        ["softmax", "cross_entropy", "divergence", "linear_at", "linear_cross_entropy"],
        ["nn"],
        ["integrations"],
        ["__init__"],
        ["_report"],
    ],
    # One twin stands elsewhere: a loop of JAX may speak to other devices, so there a head knows shards.
    "jax_ops": [
        ["_lowering", "_arguments"],
        ["_axes"],
        ["_rows"],
        ["_rules"],
        ["_parallel"],
        ["_reduction"],
        ["_head"],
        ["softmax", "cross_entropy", "divergence", "linear_at", "linear_cross_entropy"],
        ["optax_names"],
        ["__init__"],
        ["_report"],
    ],
}


def _sources(package: str) -> dict[str, str]:
    """The text of each module by its dotted name; a folder's own is `<folder>.__init__`."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def _named(text: str) -> set[str]:
    """Every dotted name that a module imports, wherever it does: in a function, for type checkers, by a string."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: two rooms have files of one name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def _arrows(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which modules of the package each of them imports."""
    arrows: dict[str, set[str]] = {}
    for module, text in sources.items():
        arrows[module] = set()
        for name in _named(text):
            while name:  # the longest part of the name that is a file: the rest is what is taken from it
                if (at := name) in sources or (at := f"{name}.__init__") in sources:
                    arrows[module].add(at)
                    break
                name = name.rpartition(".")[0]
    return arrows


def _broken(package: str, sources: dict[str, str]) -> list[str]:
    """What in a package breaks the law."""
    floors = {room: height for height, rooms in enumerate(LADDERS[package]) for room in rooms}
    room = {module: module.split(".")[1] for module in sources}
    if lost := sorted({r for r in room.values() if r not in floors}):
        return [f"{r} stands on no floor of LADDERS" for r in lost]
    arrows = _arrows(sources)
    upward = [
        f"{module} imports {other}, which is not below it"
        for module, others in arrows.items()
        for other in sorted(others)
        if room[module] != room[other] and floors[room[other]] >= floors[room[module]]
    ]
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        upward.append(f"a circle: {' <- '.join(error.args[1])}")
    return upward


@pytest.mark.parametrize("package", LADDERS)
def test_imports_go_down(package: str) -> None:
    assert _broken(package, _sources(package)) == []


def test_no_benchmarks_hang_in_a_circle() -> None:
    TopologicalSorter(_arrows(_sources("benchmarks"))).prepare()


LAZY = "\n\ndef late():\n    {}\n"
UNDER_TYPE_CHECKING = "\n\nif TYPE_CHECKING:\n    {}\n"
SABOTEURS = {
    "up, lazily": ("torch_ops._modes", LAZY, "from torch_ops._parallel import losses"),
    "up, for type checkers": ("torch_ops._rows.plain", UNDER_TYPE_CHECKING, "from torch_ops._rules.plan import Plan"),
    "up, by a string": ("torch_ops._head.fast", LAZY, 'importlib.import_module("torch_ops.nn")'),
    "up to the package itself": ("torch_ops._arguments", LAZY, "import torch_ops"),
    "to a door beside it": ("torch_ops.softmax", "\n{}\n", "from torch_ops.cross_entropy import cross_entropy"),
    "in a circle within a room": ("torch_ops._rows.plain", LAZY, "from torch_ops._rows import dispatch"),
    "from the contract to the reference": ("softmax_ext.contract.losses", LAZY, "from softmax_ext import reference"),
}


@pytest.mark.parametrize("saboteur", SABOTEURS)
def test_an_import_that_goes_up_is_caught(saboteur: str) -> None:
    module, how, line = SABOTEURS[saboteur]
    package = module.split(".")[0]
    sources = _sources(package)
    sources[module] += how.format(line)
    assert any(module in line for line in _broken(package, sources))


def test_a_file_without_a_floor_is_caught() -> None:
    assert _broken("torch_ops", {**_sources("torch_ops"), "torch_ops.helpers": ""}) == [
        "helpers stands on no floor of LADDERS"
    ]


def _lengths(path: Path, text: str) -> dict[str, int]:
    """The lines of a file and of each function in it, signatures and docstrings apart."""
    found = {"the file": len(text.splitlines())}
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                found[node.name] = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
    else:  # a function of C++ stands at the margin, and so does its last brace
        begin, name = 0, ""
        for at, line in enumerate(text.splitlines()):
            if line[:1].isalpha() and "(" in line:
                begin, name = at, line.split("(")[0].split()[-1]
            elif line.startswith("}") and name:
                found[name], name = at - begin, ""
    return found


def _too_long(path: Path, text: str) -> list[str]:
    of = _lengths(path, text)
    return [f"{name}: {n} lines" for name, n in of.items() if n > (300 if name == "the file" else 60)]


CODE = sorted(p for package in LADDERS for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".h", ".cpp"))


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert _too_long(path, path.read_text()) == []


def test_long_ones_are_caught() -> None:
    python = "def f(x):\n    '''A docstring.'''\n" + "    x += 1\n" * 61
    cpp = "void f(int x) {\n" + "  ++x;\n" * 61 + "}\n"
    assert _too_long(Path("a.py"), python) == ["f: 61 lines"]
    assert _too_long(Path("a.cpp"), cpp) == ["f: 62 lines"]
    assert _too_long(Path("a.py"), "x = 1\n" * 301) == ["the file: 301 lines"]


def test_test_files_are_short() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in (ROOT / "tests").rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long
