"""How a mistake is told: its class and its one sentence, `<op>: <argument> must <rule>; got <value>.`"""

from __future__ import annotations

import numbers
from typing import Any, NoReturn


# Each class also derives from what the frameworks' own ops raise for the same mistake, so that
# `except` clauses written for them keep working (NotImplementedError is a RuntimeError).
class ArgumentValueError(ValueError, RuntimeError):
    """A value or shape outside its rule."""


class ArgumentIndexError(ValueError, IndexError, RuntimeError):
    """A dimension or class index out of range."""


class ArgumentNameError(ValueError, NameError):
    """A name that nothing around the call binds: JAX calls an unknown mesh axis a NameError."""


class ArgumentTypeError(TypeError, NotImplementedError):
    """An argument of the wrong type."""


class MaskedArrayError(TypeError, ValueError):
    """An array with a mask, which nothing here would regard: JAX calls that a ValueError."""


class ReductionTypeError(TypeError, ValueError):
    """A reduction that is no string: the built-ins call that a ValueError."""


def words(value: Any) -> str:
    """A value as a sentence shows it."""
    # Tracers, tensors and NumPy arrays print differently: one word for all keeps one sentence.
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, numbers.Number):
        return "an array"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    plain = value is None or isinstance(value, str | int | float | complex | tuple | list)
    return repr(value) if plain else f"{type(value).__name__} object"


def shape_words(shape: tuple[int, ...]) -> str:
    """A shape as a sentence shows it."""
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def sentence(op: str, name: str, rule: str, got: str) -> str:
    """The one form of every mistake."""
    return f"{op}: {name} must {rule}; got {got}."


def fail_type(op: str, name: str, rule: str, got: str) -> NoReturn:
    """Raise a type mistake whose value has already been put in words."""
    raise ArgumentTypeError(sentence(op, name, rule, got))


def fail_value(op: str, name: str, rule: str, got: str) -> NoReturn:
    """Raise a value mistake whose value has already been put in words."""
    raise ArgumentValueError(sentence(op, name, rule, got))


def wrong_type(op: str, name: str, rule: str, value: Any) -> NoReturn:
    """Raise a type mistake that shows the value."""
    fail_type(op, name, rule, words(value))


def wrong_value(op: str, name: str, rule: str, value: Any) -> NoReturn:
    """Raise a value mistake that shows the value."""
    fail_value(op, name, rule, words(value))


def target_out_of_range(op: str, classes: int, ignored: int, value: int, row: int, name: str = "target") -> IndexError:
    """The error for a class index that names no class, told with its row and value."""
    rule = f"be in [0, {classes}) or ignore_index ({ignored})"
    return ArgumentIndexError(sentence(op, name, rule, f"{value} at row {row}"))


def second_derivative_of_samples(op: str) -> NotImplementedError:
    """The error for a derivative of a sampled gradient, whose points have none."""
    rule = "be None where a gradient is differentiated again"
    return NotImplementedError(sentence(op, "grad_samples", rule, "a second derivative"))


def target_out_of_range_elsewhere(op: str, classes: int, ignored: int) -> IndexError:
    """The error for a class index that names no class, in rows that another rank has."""
    rule = f"be in [0, {classes}) or ignore_index ({ignored})"
    return ArgumentIndexError(sentence(op, "target", rule, "another value on another rank"))


def rows_differ_elsewhere(op: str) -> ValueError:
    """The error for ranks that were given different rows, where this rank and those of its group were not."""
    rule = "have the same rows and class indices on every rank of group"
    return ArgumentValueError(sentence(op, "input", rule, "different ones on other ranks"))


def axis_unbound(op: str, axis_name: Any) -> NameError:
    """The error for a mesh axis that no shard_map around the call maps over."""
    return ArgumentNameError(
        sentence(op, "axis_name", "name mesh axes of a jax.shard_map around the call", words(axis_name))
    )
