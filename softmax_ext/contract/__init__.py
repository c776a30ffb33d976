"""What may be asked: option values, shapes and types, and the sentence each mistake is told in.

Knows shapes and type names only, never arrays, so both frameworks share every rule and every word.
"""

from softmax_ext.contract.arrays import FLOATS, Array, at_least_1d, dimension, floating
from softmax_ext.contract.divergences import (
    KINDS,
    DivergenceOptions,
    divergence,
    linear_divergence,
    teacher_has_no_gradient,
)
from softmax_ext.contract.losses import linear_at, linear_loss, loss
from softmax_ext.contract.options import (
    MEMORY,
    ON_ALL_IGNORED,
    REDUCTIONS,
    STATS,
    LossOptions,
    axis_names,
    fitted,
    flag,
    head_options,
    is_integer,
    key_of_samples,
    sampling,
)
from softmax_ext.contract.sentences import (
    ArgumentIndexError,
    ArgumentNameError,
    ArgumentTypeError,
    ArgumentValueError,
    ReductionTypeError,
    axis_unbound,
    fail_type,
    fail_value,
    rows_differ_elsewhere,
    second_derivative_of_samples,
    target_out_of_range,
    target_out_of_range_elsewhere,
)

__all__ = [
    "FLOATS",
    "KINDS",
    "MEMORY",
    "ON_ALL_IGNORED",
    "REDUCTIONS",
    "STATS",
    "ArgumentIndexError",
    "ArgumentNameError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "Array",
    "DivergenceOptions",
    "LossOptions",
    "ReductionTypeError",
    "at_least_1d",
    "axis_names",
    "axis_unbound",
    "dimension",
    "divergence",
    "fail_type",
    "fail_value",
    "fitted",
    "flag",
    "floating",
    "head_options",
    "is_integer",
    "key_of_samples",
    "linear_at",
    "linear_divergence",
    "linear_loss",
    "loss",
    "rows_differ_elsewhere",
    "sampling",
    "second_derivative_of_samples",
    "target_out_of_range",
    "target_out_of_range_elsewhere",
    "teacher_has_no_gradient",
]
