"""The two frameworks' public functions, fed NumPy, for tests of sentences; those that are installed."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np

SENTENCE = re.compile(r"^(?P<op>\w+): (?P<argument>\w+) must (?P<rule>.+); got (?P<value>.+)\.$", re.DOTALL)


def _door(framework: str, of_arrays: str, make: str, axis: str) -> Any:
    if find_spec(framework) is None:
        return None
    maker = getattr(importlib.import_module(of_arrays), make)
    return SimpleNamespace(
        ops=importlib.import_module(f"{framework}_ops"),
        axis=axis,
        array=lambda x: (
            tuple(maker(v) if isinstance(v, np.ndarray) else v for v in x)
            if isinstance(x, tuple)
            else maker(x)
            if isinstance(x, np.ndarray)
            else x
        ),
    )


Torch = _door("torch", "torch", "from_numpy", "dim")
Jax = _door("jax", "jax.numpy", "asarray", "axis")  # its class axis is the last, so inputs here are 2-d
DOORS = [door for door in (Torch, Jax) if door is not None]


def call(door: Any, op: str, *args: Any, **options: Any) -> Any:
    """One function of a door."""
    options = {door.axis if k == "axis" else k: door.array(v) for k, v in options.items()}
    return getattr(door.ops, op)(*map(door.array, args), **options)
