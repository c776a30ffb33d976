"""XLA told to optimise little: a program compiles in a quarter to a half of the time.

For tests of what is computed, and of temporary memory, which is the same to the byte. Those of roundings and of what
the compiler may contract leave XLA as users have it.
"""

from __future__ import annotations

from typing import Any

_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
QUICK: dict[str, Any] = {"compiler_options": _OPTIONS}  # of jax.jit
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _OPTIONS.items())  # of a process, in XLA_FLAGS
