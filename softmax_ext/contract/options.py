"""The options: Python values, their defaults and rules."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softmax_ext.contract.sentences import (
    ArgumentTypeError,
    ReductionTypeError,
    fail_value,
    sentence,
    words,
    wrong_type,
    wrong_value,
)

REDUCTIONS = ("mean", "sum", "none")
ON_ALL_IGNORED = ("nan", "zero")
STATS = ("lse", "logprob", "entropy", "argmax", "log_sum_sq", "mean_logit", "rank")
MEMORY = ("fast", "lean")


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
        """(logit_scale, softcap) as a type with this range holds them."""
        return fitted(self.logit_scale, self.softcap, tiny, largest)

    def check(self, op: str) -> None:
        """Raise for the first option outside its rule."""
        if self.ignore_index is not None and not is_integer(self.ignore_index):
            wrong_type(op, "ignore_index", "be a Python integer of 64 bits or None", self.ignore_index)
        if not -(2**63) <= self.ignored < 2**63:
            wrong_value(op, "ignore_index", "be a Python integer of 64 bits or None", self.ignore_index)
        one_of(op, "reduction", self.reduction, REDUCTIONS, ReductionTypeError)
        s = number(op, "label_smoothing", self.label_smoothing, "in [0, 1]")
        if not 0.0 <= s <= 1.0:
            wrong_value(op, "label_smoothing", "be a Python number in [0, 1]", self.label_smoothing)
        positive(op, "logit_scale", self.logit_scale)
        if self.softcap is not None:
            positive(op, "softcap", self.softcap)
        z = number(op, "z_loss", self.z_loss, ">= 0, finite")
        if not 0.0 <= z < math.inf:
            wrong_value(op, "z_loss", "be a Python number >= 0, finite", self.z_loss)
        one_of(op, "on_all_ignored", self.on_all_ignored, ON_ALL_IGNORED, ArgumentTypeError)
        rule = f"be a tuple of names from {', '.join(map(repr, STATS))}"
        if not isinstance(self.stats, tuple | list):
            wrong_type(op, "stats", rule, self.stats)
        for name in self.stats:
            if not isinstance(name, str):
                wrong_type(op, "stats", rule, name)
            if name not in STATS:
                wrong_value(op, "stats", rule, name)
        # NumPy scalars and fractions count as the Python numbers they stand for.
        object.__setattr__(self, "label_smoothing", s)
        object.__setattr__(self, "z_loss", z)


def fitted(logit_scale: float, softcap: float | None, tiny: float, largest: float) -> tuple[float, float | None]:
    """A scale and a cap as a type with this range holds them: not 0, not infinite.

    A cap near or beyond the range is none: z / cap would be subnormal, and flushed to 0.
    """
    scale = min(max(float(logit_scale), tiny), largest)
    far = softcap is None or softcap > largest * 2.0**-24
    return scale, None if far else max(float(softcap or 0.0), tiny)


def head_options(op: str, shift: Any, memory: Any, chunk_size: Any) -> None:
    """Raise for the first option of a linear loss outside its rule."""
    if not is_integer(shift):
        wrong_type(op, "shift", "be a Python integer >= 0", shift)
    if shift < 0:
        wrong_value(op, "shift", "be a Python integer >= 0", shift)
    one_of(op, "memory", memory, MEMORY, ArgumentTypeError)
    if chunk_size is not None and not is_integer(chunk_size):
        wrong_type(op, "chunk_size", "be a Python integer >= 1 or None", chunk_size)
    if chunk_size is not None and chunk_size < 1:
        wrong_value(op, "chunk_size", "be a Python integer >= 1 or None", chunk_size)


def sampling(op: str, grad_samples: Any, memory: Any = "fast") -> None:
    """Raise unless the number of points a row's gradient is sampled at is within its rule."""
    if grad_samples is None:
        return
    if not is_integer(grad_samples):
        wrong_type(op, "grad_samples", "be a Python integer >= 1 or None", grad_samples)
    if grad_samples < 1:
        wrong_value(op, "grad_samples", "be a Python integer >= 1 or None", grad_samples)
    if memory == "lean":
        wrong_value(op, "grad_samples", "be None with memory='lean'", grad_samples)


def key_of_samples(op: str, grad_samples: Any, has_key: bool) -> None:
    """Raise unless a key is given exactly where gradients are sampled."""
    if grad_samples is not None and not has_key:
        wrong_type(op, "key", "be a jax.random key with grad_samples", None)
    if grad_samples is None and has_key:
        fail_value(op, "key", "be None without grad_samples", "a key")


def axis_names(op: str, axis_name: Any) -> tuple[str, ...]:
    """The mesh axes that classes are sharded over; none for None."""
    names = (axis_name,) if isinstance(axis_name, str) else () if axis_name is None else axis_name
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        wrong_type(op, "axis_name", "be the name of a mesh axis, a tuple of them or None", axis_name)
    if len(set(names)) != len(names):
        wrong_value(op, "axis_name", "name each mesh axis once", axis_name)
    return tuple(names)


def flag(op: str, name: str, value: Any) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, bool):
        wrong_type(op, name, "be True or False", value)


def is_integer(value: Any) -> bool:
    """A Python or NumPy integer scalar, not a bool; arrays and tracers are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def number(op: str, name: str, value: Any, rule: str) -> float:
    """The value as a float; raises unless it is a Python number, of which `rule` says more."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        wrong_type(op, name, f"be a Python number {rule}", value)
    try:
        return float(value)
    except OverflowError:  # an integer beyond every float
        return math.inf if value >= 1 else -math.inf  # pyright: ignore[reportOperatorIssue]


def positive(op: str, name: str, value: Any) -> None:
    """Raise unless the value is a finite Python number above 0."""
    if not 0.0 < number(op, name, value, "> 0, finite") < math.inf:
        wrong_value(op, name, "be a Python number > 0, finite", value)


def one_of(op: str, name: str, value: Any, names: tuple[str, ...], error: type[TypeError]) -> None:
    """Raise unless the value is one of the names; `error` where it is no string."""
    rule = f"be one of {', '.join(map(repr, names))}"
    if not isinstance(value, str):
        raise error(sentence(op, name, rule, words(value)))
    if value not in names:
        wrong_value(op, name, rule, value)
