"""The recipes: each is as the plain computation, sees a wrong value and a wrong gradient, and is shown on its page."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.beside import FURTHEST, beside

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "examples" / "recipes_torch").glob("[a-z]*.py"))
DOORS = [door for door in ("torch", "jax") if find_spec(door) and (door == "torch" or find_spec("optax"))]
MARKS = {"torch": (), "jax": pytest.mark.long}
RECIPES = [pytest.param(door, name, marks=MARKS[door]) for door in DOORS for name in NAMES]
# JAX compiles once more for each, and `beside` sees both alike.
WRONG = [pytest.param("jax", name, "gradient", marks=MARKS["jax"]) for name in NAMES if "jax" in DOORS]
WRONG += [("torch", name, what) for name in NAMES for what in ("value", "gradient") if "torch" in DOORS]
OPS = ("linear_cross_entropy", "linear_divergence", "linear_at")


def run(door: str, name: str) -> None:
    importlib.import_module(f"examples.recipes_{door}.{name}").main()


@pytest.mark.parametrize(("door", "name"), RECIPES)
def test_recipe(door: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(door, name)
    assert "its gradients to" in capsys.readouterr().out


@pytest.mark.parametrize(("door", "name", "what"), WRONG)
def test_a_recipe_fails_where_an_op_is_wrong(door: str, name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = importlib.import_module(f"{door}_ops")

    def still(x: Any) -> Any:
        return x.detach() if door == "torch" else importlib.import_module("jax").lax.stop_gradient(x)

    for op in OPS:
        right = getattr(ops, op)

        def wrong(input: Any, *arrays: Any, right: Any = right, **options: Any) -> Any:
            if what == "value":
                return right(1.001 * input, *arrays, **options)
            return right(still(input) + 1.001 * (input - still(input)), *arrays, **options)

        monkeypatch.setattr(ops, op, wrong)
    with pytest.raises(AssertionError, match="of the largest entry apart"):
        run(door, name)


def test_what_is_further_apart_than_rounding_is_seen() -> None:
    right = (np.float32(2.0), np.array([1.0, -3.0]))
    beside("alike", right, right)
    near, far = (np.array([1.0, -3.0 * (1.0 + k * FURTHEST)]) for k in (0.5, 2.0))
    beside("near", (right[0], near), right)
    for wrong in (
        (right[0], far),
        (2.0 * (1.0 + 2 * FURTHEST), right[1]),
        (np.nan, right[1]),
        (right[0], right[1][:1]),
    ):
        with pytest.raises(AssertionError):
            beside("far", wrong, right)
    with pytest.raises(AssertionError, match="says nothing"):
        beside("nothing", (2.0, np.zeros(2)), (2.0, np.zeros(2)))


def test_twins_and_their_page() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in NAMES:
        found = []
        for door in ("torch", "jax"):
            path = ROOT / "examples" / f"recipes_{door}" / f"{name}.py"
            assert f'"{path.relative_to(ROOT)}"' in page
            assert f"| [{name}](#" in page
            tree = ast.parse(path.read_text())
            found.append([node.name for node in tree.body if isinstance(node, ast.FunctionDef)])
        assert found[0] == found[1], name
    assert len(NAMES) == len(list((ROOT / "examples" / "recipes_jax").glob("[a-z]*.py"))) > 6
