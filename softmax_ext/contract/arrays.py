"""What the rules know of an array, and those about one array alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softmax_ext.contract.options import is_integer
from softmax_ext.contract.sentences import (
    ArgumentIndexError,
    MaskedArrayError,
    fail_type,
    fail_value,
    sentence,
    shape_words,
    wrong_type,
)

FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Array:
    """What the rules need to know of an array: `kind` is float, int, bool, or what else it is."""

    shape: tuple[int, ...]
    dtype: str
    kind: str
    device: str | None = None


def dimension(op: str, name: str, dim: Any, ndim: int) -> int:
    """The non-negative form of one dimension index; a scalar counts as one dimension."""
    if not is_integer(dim):
        wrong_type(op, name, "be a Python integer", dim)
    n = max(ndim, 1)
    if not -n <= dim < n:
        rule = f"be in [{-n}, {n - 1}] for an input of {ndim} dimensions"
        raise ArgumentIndexError(sentence(op, name, rule, repr(int(dim))))
    return int(dim) % n


def floating(op: str, name: str, array: Array, *, converted: bool = False) -> None:
    """Raise unless the array has one of the four floating types, or any real type that will be `converted`."""
    an_array(op, name, array)
    if array.dtype not in FLOATS and not (converted and array.kind in ("float", "int", "bool")):
        fail_type(op, name, f"have type {', '.join(FLOATS[:-1])} or {FLOATS[-1]}", array.dtype)


def at_least_1d(op: str, name: str, array: Array | None) -> Array:
    """The array's facts; raises for a scalar where a class dimension is needed."""
    array = an_array(op, name, array)
    if not array.shape:
        raise ArgumentIndexError(sentence(op, name, "have at least 1 dimension", "()"))
    return array


def an_array(op: str, name: str, array: Array | None) -> Array:
    """The array's facts; raises where it is none that the ops take."""
    if array is None:
        wrong_type(op, name, "be an array", None)
    if array.kind == "sparse":
        fail_type(op, name, "be dense (strided)", array.dtype)
    if array.kind == "masked":
        raise MaskedArrayError(sentence(op, name, "be an array without a mask (or its filled copy)", array.dtype))
    if array.kind == "other":
        fail_type(op, name, "be an array", array.dtype)
    return array


def same_type(op: str, name: str, array: Array, input: Array) -> None:
    """Raise unless the array has the input's type."""
    floating(op, name, array)
    if array.dtype != input.dtype:
        fail_type(op, name, f"have the input's type {input.dtype}", array.dtype)


def same_device(op: str, name: str, array: Array, input: Array) -> None:
    """Raise unless the array is where the input is."""
    if array.device != input.device:
        fail_value(op, name, f"be on the input's device ({input.device})", str(array.device))


def scale_of_rows(op: str, input: Array, rows: tuple[int, ...], logit_scale: Array | None) -> None:
    """Raise unless a scale that is an array is one number, or one a row."""
    if logit_scale is None:
        return
    floating(op, "logit_scale", logit_scale)
    if logit_scale.shape not in ((), rows):
        either = f"() or {shape_words(rows)}" if rows else "()"
        fail_value(op, "logit_scale", f"be a Python number or have shape {either}", shape_words(logit_scale.shape))
    same_device(op, "logit_scale", logit_scale, input)
