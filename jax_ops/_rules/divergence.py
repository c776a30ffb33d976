"""A student's row against a teacher's with its analytic derivative in both modes; the teacher is a constant."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
from jax import Array

from jax_ops._rows.divergence import Pair, divergence_bwd, divergence_fwd
from jax_ops._rules.autodiff import selective
from jax_ops._rules.varying import alike
from softmax_ext.contract import teacher_has_no_gradient


def divergence_row(student: Array, teacher: Array, keep: Array | None, pair: Pair) -> Array:
    """The divergence of each row, with every derivative by the student's logits."""
    return _divergence_row(pair)(*alike(student, teacher, keep))


@cache
def _divergence_row(pair: Pair) -> Any:
    """The divergences. Saves both arrays of logits, keep and the state."""

    def fwd(student: Any, teacher: Any, keep: Any) -> Any:
        value, state = divergence_fwd(student, teacher, keep, pair=pair)
        return value, (student, teacher, keep, state)

    def bwd(saved: tuple[Any, Any, Any, Any], ct: Any) -> Any:
        return divergence_bwd(*saved, ct, pair=pair), None, None

    return selective(lambda wanted: (fwd, bwd))


@cache
def constant(op: str, name: str) -> Any:
    """The function that returns an array whose derivative is refused."""

    @jax.custom_jvp
    def same(x: Array) -> Array:
        return x

    def refuse(primals: Any, tangents: Any) -> Any:
        if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
            raise teacher_has_no_gradient(op, name)
        return primals[0], tangents[0]

    same.defjvp(refuse, symbolic_zeros=True)
    return same
