"""XLA's options of quick tests are asked for, not assumed: an option that this XLA lacks would end every process."""

from __future__ import annotations

import pytest

pytest.importorskip("jax")

from tests.judging import quick


def test_only_options_that_xla_has() -> None:
    assert quick._known({"xla_backend_optimization_level": 0, "xla_no_such_option": True}) == {
        "xla_backend_optimization_level": 0
    }
    with pytest.raises(RuntimeError):  # a mistake in a value is none of the option's absence
        quick._known({"xla_backend_optimization_level": "many"})


def test_they_are_a_process_flags_too() -> None:
    assert "--xla_backend_optimization_level=0" in quick.FLAGS.split()
    quick.run("import jax\nassert jax.jit(lambda x: x + 1)(1) == 2\nprint('all checked')")
