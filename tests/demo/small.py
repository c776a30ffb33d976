"""What the demo's tests share: sizes, and a corpus made once."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("equinox")
pytest.importorskip("optax")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from examples.recipe import Recipe, Weights

TINY = Recipe(vocab=300, width=16, heads=2, length=16, batch=4, steps=12)
CURVE = list(np.linspace(9.7, 7.0, 20))


WEIGHTS = {"embedding": np.full((3, 2), 0.5, np.float32), "out": np.full(2, 9.7, np.float32)}


def _moved(name: str, by: float) -> Weights:
    moved = WEIGHTS[name].copy()
    moved[-1:] += np.float32(by)
    return WEIGHTS | {name: moved}
