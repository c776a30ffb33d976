"""What a forge and a newcomer look for is there, and says what is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import softmax_ext

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install --group docs")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "README.md")


def test_pre_commit_has_the_ruff_of_make_check() -> None:
    (pin,) = (pin for pin in PROJECT["dependency-groups"]["test"] if pin.startswith("ruff=="))
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == "v" + pin.removeprefix("ruff==")
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_forge_runs_make_test_and_keeps_pages_and_wheel() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    steps = _steps(workflow)
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)
    assert "make test" in [step.get("run") for step in steps]
    kept = {step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")}
    makefile = (ROOT / "Makefile").read_text()
    assert "build/docs" in kept
    assert yaml.safe_load(re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text()))["site_dir"] == "build/docs"
    assert "dist/*.whl" in kept
    assert "--wheel-dir dist" in makefile
    (python,) = (step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", ""))
    assert PROJECT["project"]["requires-python"] == f">={python}"


def test_wheels_are_built_for_three_platforms_and_tested_as_here() -> None:
    """What cannot be run here: the file is whole, its versions are those of `make test`, its paths exist."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    steps = _steps(workflow)
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)
    assert any(re.fullmatch(r"python -m pip install cibuildwheel==[\d.]+", step.get("run", "")) for step in steps)
    wheels = PROJECT["tool"]["cibuildwheel"]
    assert len(wheels["build"].split()) == len(workflow["jobs"]["build"]["strategy"]["matrix"]["runner"]) == 3
    pins = set(PROJECT["dependency-groups"]["test"])
    assert {pin for pin in wheels["test-requires"] if "==" in pin} <= pins
    assert set(wheels["test-groups"]) <= set(PROJECT["dependency-groups"])
    named = [word for word in wheels["test-command"].split() if word.startswith("tests/")]
    assert named
    for path in [*named, *wheels["test-sources"]]:
        assert (ROOT / path).exists(), path


def _steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_changelog_ends_at_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert versions[1][0] == softmax_ext.__version__
    assert all(date for _, date in versions[1:])
    kinds = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / link).exists(), link
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text, re.MULTILINE):
        assert "".join(command) in rules, command
    for file in re.findall(r"`((?:tests|docs|softmax_ext|examples|benchmarks)/[\w/.]+)`", text):
        assert (ROOT / file).exists(), file
    for line in text.splitlines():
        assert len(line) <= 120 or line.startswith("|") or "](" in line, line
