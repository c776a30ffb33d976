"""XLA told to optimise little: a program compiles in a quarter to a half of the time.

For tests of what is computed, and of temporary memory, which is the same to the byte. Those of roundings and of what
the compiler may contract leave XLA as users have it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def _known(wanted: dict[str, Any]) -> dict[str, Any]:
    """Those options that this XLA has: 0.12 has dropped one, and an unknown one ends a process."""
    if find_spec("jax") is None:
        return {}
    jax = importlib.import_module("jax")
    program = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), "float32"))

    def has(name: str, value: Any) -> bool:
        try:
            program.compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    return {name: value for name, value in wanted.items() if has(name, value)}


@cache
def _options() -> dict[str, Any]:
    return _known({"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})


QUICK: dict[str, Any]  # of jax.jit
FLAGS: str  # of a process, in XLA_FLAGS


def __getattr__(name: str) -> Any:
    """QUICK and FLAGS, asked for when they are used: to ask XLA is to start it, after which no process may fork."""
    if name == "QUICK":
        return {"compiler_options": _options()}
    if name == "FLAGS":
        return " ".join(f"--{option}={str(value).lower()}" for option, value in _options().items())
    raise AttributeError(name)


def run(program: str) -> None:
    """A program in a process of its own: for what hands programs to XLA by itself, and takes no options for them."""
    env = {**os.environ, "XLA_FLAGS": __getattr__("FLAGS"), "JAX_ENABLE_X64": "1"}
    command, root = [sys.executable, "-c", program], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.endswith("all checked\n")
