"""The laws of the house: who imports whom, twins, docstrings that run, one place for every default and version."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import jax_ops
import jax_ops._rows.dispatch
import torch_ops
import torch_ops._rows.dispatch
from softmax_ext import __main__ as report
from softmax_ext import contract, reference

ROOT = Path(__file__).parents[2]
PACKAGES = ("softmax_ext", "torch_ops", "jax_ops")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PUBLIC = [(door, name) for door in (torch_ops, jax_ops) for name in door.__all__ if callable(getattr(door, name))]


def _imports(path: Path) -> set[str]:
    """Full dotted names imported anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FORBIDDEN = {
    "softmax_ext": ("torch", "jax", "jaxlib", "torch_ops", "jax_ops"),
    "torch_ops": ("jax", "jaxlib", "jax_ops"),
    "jax_ops": ("torch", "torch_ops"),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_laws(path: Path) -> None:
    names = _imports(path)
    tops = {name.split(".")[0] for name in names}
    assert not tops & set(FORBIDDEN[path.relative_to(ROOT).parts[0]])
    assert "transformers" not in tops or path.name == "transformers.py"
    if path.name != "__main__.py" and path.parent.name != "reference":
        assert not any(name.startswith("softmax_ext.reference") for name in names)


def test_contract_needs_the_standard_library_only() -> None:
    found = set().union(*map(_imports, (ROOT / "softmax_ext" / "contract").glob("*.py")))
    others = {name.split(".")[0] for name in found if not name.startswith("softmax_ext.contract.")}
    assert others <= set(sys.stdlib_module_names)


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "absent", "unloaded"),
    [
        ("softmax_ext.contract", ("torch", "jax", "numpy"), ("torch", "jax")),
        # The compiler costs more to import than torch itself: eager users do not pay for it.
        (
            "torch_ops",
            ("jax", "jax_ops"),
            ("jax", "torch._dynamo", "triton", "torch.distributed.tensor", "transformers", "torch_ops.integrations"),
        ),
        ("jax_ops", ("torch", "torch_ops"), ("torch",)),
    ],
)
def test_either_framework_may_be_absent(module: str, absent: tuple[str, ...], unloaded: tuple[str, ...]) -> None:
    code = f"import sys\nfor m in {absent}: sys.modules[m] = None\nimport {module}\n"
    code += f"print([m for m in {unloaded} if sys.modules.get(m)])"
    assert _python(code) == "[]"


def test_no_rooms_without_a_name() -> None:
    vague = {"utils", "helpers", "common", "base", "misc", "registry"}
    assert not [path for path in SOURCES if path.stem.strip("_") in vague]


def _functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


TWINS = [
    "softmax",
    "cross_entropy",
    "linear_at",
    "linear_cross_entropy",
    "_reduction",
    "_report",
    "_rows/plain",
    "_rows/arithmetic",
    "_rows/dispatch",
    "_rows/targets",
    "_rules/softmax",
    "_rules/cross_entropy",
    "_head/layout",
    "_head/fast",
    "_head/lean",
    "_head/sum",
]
# What JAX has no need of: a short way for small calls, buffers, and choices that a compiler makes.
ONE_ONLY = {"mean", "visit", "rows_that_fit", "weighted", "one_pass", "canonical_parts"}


@pytest.mark.parametrize("file", TWINS)
def test_twins_have_the_same_functions_in_the_same_order(file: str) -> None:
    ours = {door: list(dict.fromkeys(_functions(ROOT / door / f"{file}.py"))) for door in ("torch_ops", "jax_ops")}
    shared = [f for f in ours["torch_ops"] if f in ours["jax_ops"]]
    assert shared == [f for f in ours["torch_ops"] if f not in ONE_ONLY], "torch_ops has functions its twin lacks"
    assert [f for f in ours["jax_ops"] if f in shared] == shared


ROWS = [f"{op}_{way}" for op in ("softmax", "log_softmax", "cross_entropy") for way in ("fwd", "bwd")]
ROWS.append("cross_entropy_fwd_bwd")


@pytest.mark.parametrize("row", ROWS)
def test_one_table_of_row_functions(row: str) -> None:
    """Same name and argument order on both sides; `dim` is `axis`, `out` is PyTorch's."""
    names = [
        [p.replace("axis", "dim") for p in inspect.signature(getattr(rows, row)).parameters if p != "out"]
        for rows in (torch_ops._rows.dispatch, jax_ops._rows.dispatch)
    ]
    assert names[0] == names[1]


LOSSES: list[Callable[..., Any]] = [
    torch_ops.cross_entropy,
    torch_ops.nn.CrossEntropyLoss,
    jax_ops.cross_entropy,
    torch_ops.linear_cross_entropy,
    torch_ops.nn.LinearCrossEntropyLoss,
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_option_defaults_stand_in_one_place(loss: Callable[..., Any]) -> None:
    parameters = inspect.signature(loss).parameters
    for field in fields(contract.LossOptions):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY


def _section(doc: str, name: str) -> str:
    match = re.search(rf"^{name}:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    assert match, f"no {name} section"
    return inspect.cleandoc(match[1])


@pytest.mark.parametrize(("door", "name"), PUBLIC, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_docstring_names_every_argument_and_its_example_runs(door: Any, name: str) -> None:
    function = getattr(door, name)
    doc = inspect.getdoc(function)
    assert doc
    documented = re.findall(r"^(\w+):", _section(doc, "Args"), re.MULTILINE)
    assert documented == list(inspect.signature(function).parameters)
    for section in ("Returns", "Raises", "Memory", "Source", "Example"):
        assert _section(doc, section)
    assert re.search(r"nats|no unit", doc.splitlines()[0]), "the first line says the unit"
    assert _examples(function) > 0


def _examples(thing: Any) -> int:
    """Run a docstring's examples; how many there were."""
    count = 0
    for test in doctest.DocTestFinder(recurse=False).find(thing, globs={}):
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
        assert result.failed == 0, f"{result.failed} example lines of {thing} fail"
        count += result.attempted
    return count


@pytest.mark.parametrize("module", ["Softmax", "LogSoftmax", "CrossEntropyLoss", "LinearCrossEntropyLoss"])
def test_module_examples_run(module: str) -> None:
    assert _examples(getattr(torch_ops.nn, module)) > 0


X = np.array([1.1, 2.2, 0.2, -1.7])
UP = np.array([0.5, -1.0, 2.0, 0.25])
SOFT = np.array([0.5, 0.0, 1.0, 0.25])
HEAD = np.linspace(-1.0, 1.0, 16).reshape(4, 4) ** 3
WORLD = {"exp": np.exp, "log": np.log, "sum": np.sum, "x": X, "dy": UP}
TRUTH: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "softmax": (
        {"y": reference.softmax(X)},
        reference.softmax(X),
        reference.softmax_vjp(reference.softmax(X), UP),
    ),
    "log_softmax": (
        {"y": reference.log_softmax(X)},
        reference.log_softmax(X),
        reference.log_softmax_vjp(X, UP),
    ),
    "cross_entropy": ({"y": SOFT}, reference.cross_entropy(X, SOFT), reference.cross_entropy_grad(X, SOFT)),
    "divergence": (
        {"p": reference.softmax(X), "q": reference.softmax(UP)},
        reference.divergence(X, UP),
        reference.divergence_grad(X, UP),
    ),
    "linear_cross_entropy": (
        {"x": UP, "w": HEAD, "y": SOFT},
        reference.linear_cross_entropy(UP, HEAD, SOFT),
        reference.linear_cross_entropy_grad(UP, HEAD, SOFT)[0],
    ),
}


FORMULAS = [(door, name) for door in (torch_ops, jax_ops) for name in TRUTH if name in door.__all__]


@pytest.mark.parametrize(("door", "name"), FORMULAS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_docstring_formulas_are_true(door: Any, name: str) -> None:
    doc = inspect.getdoc(getattr(door, name)) or ""
    names, value, gradient = TRUTH[name]
    for line, truth in (("Formula", value), ("Gradient", gradient)):
        match = re.search(rf"^{line}: `([^`]+)`", doc, re.MULTILINE)
        assert match, f"no {line} line"
        np.testing.assert_allclose(eval(match[1], {**WORLD, **names}), truth, rtol=1e-14)


def test_every_module_says_what_it_is() -> None:
    for path in SOURCES:
        if (path.parent.name == "gpu" or path.stem == "triton_ops") and importlib.util.find_spec("triton") is None:
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name) if path.stem != "__main__" else report
        assert module.__doc__, path


def test_versions_are_stated_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = dict(pin.split("==") for pin in project["dependency-groups"]["frameworks"])
    assert torch.__version__.split("+")[0] == pins["torch"]
    assert jax.__version__ == pins["jax"]
    for name in ("Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert not [pin for pin in pins.values() if pin in text]


@pytest.mark.long
def test_readme_commands_and_files_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert {"demo", "test"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})


def test_derivation_names_code_that_exists() -> None:
    text = (ROOT / "docs" / "derivation.md").read_text()
    sources = {path.name for path in SOURCES}
    named = re.findall(r"`([\w/]+\.py): ([^`]+)`", text)
    assert len(named) > 15
    for file, things in named:
        name = Path(file).name
        assert name in sources, file
        code = "".join(path.read_text() for path in SOURCES if path.name == name and file in str(path))
        for thing in re.split(r",\s*", things):
            assert thing.split(".")[-1].strip() in code, f"{file}: {thing}"


class TestReport:
    """`python -m softmax_ext`."""

    def test_prints_doors_and_check(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert report.main() == 0
        out = capsys.readouterr().out
        assert f"torch {torch.__version__}" in out
        assert f"jax {jax.__version__}" in out
        assert "check holds" in out
        assert f"{torch.get_num_threads()} threads of PyTorch's pool" in out
        assert re.search(r"\d+ threads of XLA's pool", out)
        for name in ("torch_ops._rows.native", "jax_ops._rows.native"):
            native = importlib.import_module(name)
            assert native.missing or f"{native.instruction_set()} kernels" in out

    @pytest.mark.parametrize(
        ("platform", "text", "said"),
        [
            ("linux", "always [madvise] never\n", "madvise (large results use them)"),
            ("linux", "always madvise [never]\n", "never (page faults dominate)"),
            ("linux", None, "unknown (No such file or directory)"),
            ("darwin", None, "not Linux"),
        ],
    )
    def test_huge_page_mode(
        self, platform: str, text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "platform", platform)
        setting = tmp_path / "enabled"
        if text is not None:
            setting.write_text(text)
        assert report._huge_pages(setting) == said

    @pytest.mark.parametrize("door", [torch_ops, jax_ops], ids=lambda d: d.__name__)
    @pytest.mark.parametrize("op", ["softmax", "log_softmax"])
    def test_a_wrong_kernel_fails_the_check(
        self, door: Any, op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = getattr(door, op)
        monkeypatch.setattr(door, op, lambda x: right(x) * (1 + 2e-6))
        assert report.main() == 1
        assert "CHECK FAILED" in capsys.readouterr().out

    def test_a_missing_framework_is_said_with_its_reason(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "jax_ops._report", None)
        assert report.main() == 0
        assert "jax: not available (" in capsys.readouterr().out
        monkeypatch.setitem(sys.modules, "torch_ops._report", None)
        assert report.main() == 1
