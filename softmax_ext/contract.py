"""What may be asked: option values, shapes and types, and the sentence each mistake is told in.

Knows shapes and type names only, never arrays, so both frameworks share every rule and every word:
`<op>: <argument> must <rule>; got <value>.`
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

FLOATS = ("float16", "bfloat16", "float32", "float64")
REDUCTIONS = ("mean", "sum", "none")
ON_ALL_IGNORED = ("nan", "zero")
STATS = ("lse", "logprob", "entropy", "argmax")
MEMORY = ("fast", "lean")


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


class ReductionTypeError(TypeError, ValueError):
    """A reduction that is no string: the built-ins call that a ValueError."""


@dataclass(frozen=True)
class Array:
    """What the rules need to know of an array: `kind` is float, int, bool, or what else it is."""

    shape: tuple[int, ...]
    dtype: str
    kind: str
    device: str | None = None


@dataclass(frozen=True)
class LossOptions:
    """The loss options shared by every loss in both frameworks; the public docstrings explain each."""

    ignore_index: int | None = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    on_all_ignored: str = "nan"
    stats: Sequence[str] = ()

    @property
    def ignored(self) -> int:
        """The class index that marks an ignored row."""
        return -100 if self.ignore_index is None else int(self.ignore_index)

    def fitted(self, tiny: float, largest: float) -> tuple[float, float | None]:
        """(logit_scale, softcap) as a type with this range holds them: not 0, not infinite.

        A cap near or beyond the range is none: z / cap would be subnormal, and flushed to 0.
        """
        scale = min(max(float(self.logit_scale), tiny), largest)
        far = self.softcap is None or self.softcap > largest * 2.0**-24
        return scale, None if far else max(float(self.softcap or 0.0), tiny)

    def check(self, op: str) -> None:
        """Raise for the first option outside its rule."""
        if self.ignore_index is not None and not is_integer(self.ignore_index):
            _type(op, "ignore_index", "be a Python integer of 64 bits or None", self.ignore_index)
        if not -(2**63) <= self.ignored < 2**63:
            _value(op, "ignore_index", "be a Python integer of 64 bits or None", self.ignore_index)
        _one_of(op, "reduction", self.reduction, REDUCTIONS, ReductionTypeError)
        s = _number(op, "label_smoothing", self.label_smoothing, "in [0, 1]")
        if not 0.0 <= s <= 1.0:
            _value(op, "label_smoothing", "be a Python number in [0, 1]", self.label_smoothing)
        _positive(op, "logit_scale", self.logit_scale)
        if self.softcap is not None:
            _positive(op, "softcap", self.softcap)
        z = _number(op, "z_loss", self.z_loss, ">= 0, finite")
        if not 0.0 <= z < math.inf:
            _value(op, "z_loss", "be a Python number >= 0, finite", self.z_loss)
        _one_of(op, "on_all_ignored", self.on_all_ignored, ON_ALL_IGNORED, ArgumentTypeError)
        rule = f"be a tuple of names from {', '.join(map(repr, STATS))}"
        if not isinstance(self.stats, tuple | list):
            _type(op, "stats", rule, self.stats)
        for name in self.stats:
            if not isinstance(name, str):
                _type(op, "stats", rule, name)
            if name not in STATS:
                _value(op, "stats", rule, name)
        # NumPy scalars and fractions count as the Python numbers they stand for.
        object.__setattr__(self, "label_smoothing", s)
        object.__setattr__(self, "z_loss", z)


def loss(
    op: str,
    input: Array,
    target: Array | None,
    weight: Array | None,
    token_weight: Array | None,
    *,
    options: LossOptions,
    axis: int,
) -> bool:
    """Check a loss on logits of class dimension `axis` (non-negative); True when targets are soft."""
    options.check(op)
    floating(op, "input", input)
    rows = input.shape[:axis] + input.shape[axis + 1 :]
    return _targets_and_weights(op, input, input.shape, rows, axis, target, weight, token_weight, options, "input's")


def linear_loss(
    op: str,
    input: Array | None,
    linear_weight: Array | None,
    target: Array | None,
    linear_bias: Array | None,
    weight: Array | None,
    token_weight: Array | None,
    *,
    options: LossOptions,
    shift: Any,
    memory: Any,
    chunk_size: Any,
) -> bool:
    """Check the loss of a linear layer's logits; True when targets are soft.

    Shapes: input (..., D), linear_weight (V, D), target (...) or (..., V); or input (N, D),
    linear_weight (V, d1, .., dK, D), target (N, d1, .., dK) or (N, V, d1, .., dK).
    """
    options.check(op)
    head_options(op, shift, memory, chunk_size)
    input = at_least_1d(op, "input", input)
    floating(op, "input", input)
    linear_weight = _array(op, "linear_weight", linear_weight)
    _same_type(op, "linear_weight", linear_weight, input)
    features, lead = input.shape[-1], input.shape[:-1]
    if len(linear_weight.shape) < 2 or linear_weight.shape[-1] != features:
        rule = f"have 2 dimensions or more, the last {features} (the input's)"
        _value(op, "linear_weight", rule, _shape(linear_weight.shape), raw=True)
    classes, inner = linear_weight.shape[0], linear_weight.shape[1:-1]
    if inner and len(lead) != 1:
        rule = f"have 2 dimensions (N, D) with a linear_weight of {len(linear_weight.shape)}"
        _value(op, "input", rule, _shape(input.shape), raw=True)
    if linear_bias is not None:
        _same_type(op, "linear_bias", linear_bias, input)
        if linear_bias.shape != linear_weight.shape[:-1]:
            rule = f"have shape {_shape(linear_weight.shape[:-1])}"
            _value(op, "linear_bias", rule, _shape(linear_bias.shape), raw=True)
    if shift and (inner or not lead):
        form = "a linear_weight of more than 2 dimensions" if inner else "an input of 1 dimension"
        _value(op, "shift", f"be 0 with {form}", shift)
    for name, array in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if array is not None:
            _same_device(op, name, array, input)
    # K-dimensional logits have their classes at dimension 1, as torch's losses; others at the last.
    axis = 1 if inner else len(lead)
    full = (*lead, classes, *inner)
    return _targets_and_weights(op, input, full, lead + inner, axis, target, weight, token_weight, options, "logits'")


def head_options(op: str, shift: Any, memory: Any, chunk_size: Any) -> None:
    """Raise for the first option of a linear loss outside its rule."""
    if not is_integer(shift):
        _type(op, "shift", "be a Python integer >= 0", shift)
    if shift < 0:
        _value(op, "shift", "be a Python integer >= 0", shift)
    _one_of(op, "memory", memory, MEMORY, ArgumentTypeError)
    if chunk_size is not None and not is_integer(chunk_size):
        _type(op, "chunk_size", "be a Python integer >= 1 or None", chunk_size)
    if chunk_size is not None and chunk_size < 1:
        _value(op, "chunk_size", "be a Python integer >= 1 or None", chunk_size)


def axis_names(op: str, axis_name: Any) -> tuple[str, ...]:
    """The mesh axes that classes are sharded over; none for None."""
    names = (axis_name,) if isinstance(axis_name, str) else () if axis_name is None else axis_name
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        _type(op, "axis_name", "be the name of a mesh axis, a tuple of them or None", axis_name)
    if len(set(names)) != len(names):
        _value(op, "axis_name", "name each mesh axis once", axis_name)
    return tuple(names)


def axis_unbound(op: str, axis_name: Any) -> NameError:
    """The error for a mesh axis that no shard_map around the call maps over."""
    return ArgumentNameError(
        _sentence(op, "axis_name", "name mesh axes of a jax.shard_map around the call", _words(axis_name))
    )


def _targets_and_weights(
    op: str,
    input: Array,
    full: tuple[int, ...],
    rows: tuple[int, ...],
    axis: int,
    target: Array | None,
    weight: Array | None,
    token_weight: Array | None,
    options: LossOptions,
    of: str,
) -> bool:
    """The rules every loss shares, for logits of shape `full`: whether targets are soft."""
    target = _array(op, "target", target)
    soft = _is_soft(op, full, rows, target, of)
    if soft and options.ignored >= 0:
        rule = "be negative with class probabilities as targets"
        _value(op, "ignore_index", rule, options.ignore_index)
    if soft and "logprob" in options.stats:
        _value(op, "stats", "not name 'logprob' with class probabilities as targets", "logprob")
    for name, array, shape in (
        ("weight", weight, (full[axis],)),
        ("token_weight", token_weight, rows),
    ):
        if array is not None:
            floating(op, name, array)
            if array.shape != shape:
                _value(op, name, f"have shape {_shape(shape)}", _shape(array.shape), raw=True)
            _same_device(op, name, array, input)
    _same_device(op, "target", target, input)
    return soft


def _is_soft(op: str, full: tuple[int, ...], rows: tuple[int, ...], target: Array, of: str) -> bool:
    if target.kind == "float":
        if target.shape == full:
            return True
        if target.shape == rows:
            _type(op, "target", "have an integer type for class indices", target.dtype, raw=True)
        rule = f"have the {of} shape {_shape(full)} for class probabilities"
        _value(op, "target", rule, _shape(target.shape), raw=True)
    if target.kind != "int":
        rule = "have an integer type (class indices) or a floating type (class probabilities)"
        _type(op, "target", rule, target.dtype, raw=True)
    if target.shape == full:
        rule = f"have a floating type for class probabilities (the {of} shape)"
        _type(op, "target", rule, target.dtype, raw=True)
    if target.shape != rows:
        rule = f"have shape {_shape(rows)} for class indices"
        _value(op, "target", rule, _shape(target.shape), raw=True)
    return False


def dimension(op: str, name: str, dim: Any, ndim: int) -> int:
    """The non-negative form of one dimension index; a scalar counts as one dimension."""
    if not is_integer(dim):
        _type(op, name, "be a Python integer", dim)
    n = max(ndim, 1)
    if not -n <= dim < n:
        rule = f"be in [{-n}, {n - 1}] for an input of {ndim} dimensions"
        raise ArgumentIndexError(_sentence(op, name, rule, repr(int(dim))))
    return int(dim) % n


def floating(op: str, name: str, array: Array, *, converted: bool = False) -> None:
    """Raise unless the array has one of the four floating types, or any real type that will be `converted`."""
    _array(op, name, array)
    if array.dtype not in FLOATS and not (converted and array.kind in ("float", "int", "bool")):
        _type(op, name, f"have type {', '.join(FLOATS[:-1])} or {FLOATS[-1]}", array.dtype, raw=True)


def at_least_1d(op: str, name: str, array: Array | None) -> Array:
    """The array's facts; raises for a scalar where a class dimension is needed."""
    array = _array(op, name, array)
    if not array.shape:
        raise ArgumentIndexError(_sentence(op, name, "have at least 1 dimension", "()"))
    return array


def flag(op: str, name: str, value: Any) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, bool):
        _type(op, name, "be True or False", value)


def fail_type(op: str, name: str, rule: str, got: str) -> NoReturn:
    """Raise a type mistake whose value has already been put in words."""
    _type(op, name, rule, got, raw=True)


def fail_value(op: str, name: str, rule: str, got: str) -> NoReturn:
    """Raise a value mistake whose value has already been put in words."""
    _value(op, name, rule, got, raw=True)


def target_out_of_range(op: str, classes: int, ignored: int, value: int, row: int) -> IndexError:
    """The error for a class index that names no class, told with its row and value."""
    rule = f"be in [0, {classes}) or ignore_index ({ignored})"
    return ArgumentIndexError(_sentence(op, "target", rule, f"{value} at row {row}"))


def target_out_of_range_elsewhere(op: str, classes: int, ignored: int) -> IndexError:
    """The error for a class index that names no class, in rows that another rank has."""
    rule = f"be in [0, {classes}) or ignore_index ({ignored})"
    return ArgumentIndexError(_sentence(op, "target", rule, "another value on another rank"))


def rows_differ_elsewhere(op: str) -> ValueError:
    """The error for ranks that were given different rows, where this rank and those of its group were not."""
    rule = "have the same rows and class indices on every rank of group"
    return ArgumentValueError(_sentence(op, "input", rule, "different ones on other ranks"))


def is_integer(value: Any) -> bool:
    """A Python or NumPy integer scalar, not a bool; arrays and tracers are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(op: str, name: str, value: Any, rule: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        _type(op, name, f"be a Python number {rule}", value)
    try:
        return float(value)
    except OverflowError:  # an integer beyond every float
        return math.inf if value >= 1 else -math.inf  # pyright: ignore[reportOperatorIssue]


def _positive(op: str, name: str, value: Any) -> None:
    if not 0.0 < _number(op, name, value, "> 0, finite") < math.inf:
        _value(op, name, "be a Python number > 0, finite", value)


def _one_of(op: str, name: str, value: Any, names: tuple[str, ...], error: type[TypeError]) -> None:
    rule = f"be one of {', '.join(map(repr, names))}"
    if not isinstance(value, str):
        raise error(_sentence(op, name, rule, _words(value)))
    if value not in names:
        _value(op, name, rule, value)


def _array(op: str, name: str, array: Array | None) -> Array:
    if array is None:
        _type(op, name, "be an array", None)
    if array.kind == "sparse":
        _type(op, name, "be dense (strided)", array.dtype, raw=True)
    if array.kind == "other":
        _type(op, name, "be an array", array.dtype, raw=True)
    return array


def _same_type(op: str, name: str, array: Array, input: Array) -> None:
    floating(op, name, array)
    if array.dtype != input.dtype:
        _type(op, name, f"have the input's type {input.dtype}", array.dtype, raw=True)


def _same_device(op: str, name: str, array: Array, input: Array) -> None:
    if array.device != input.device:
        _value(op, name, f"be on the input's device ({input.device})", str(array.device), raw=True)


def _words(value: Any) -> str:
    # Tracers, tensors and NumPy arrays print differently: one word for all keeps one sentence.
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, numbers.Number):
        return "an array"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    plain = value is None or isinstance(value, str | int | float | complex | tuple | list)
    return repr(value) if plain else f"{type(value).__name__} object"


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def _sentence(op: str, name: str, rule: str, got: str) -> str:
    return f"{op}: {name} must {rule}; got {got}."


def _value(op: str, name: str, rule: str, got: Any, *, raw: bool = False) -> NoReturn:
    raise ArgumentValueError(_sentence(op, name, rule, got if raw else _words(got)))


def _type(op: str, name: str, rule: str, got: Any, *, raw: bool = False) -> NoReturn:
    raise ArgumentTypeError(_sentence(op, name, rule, got if raw else _words(got)))
