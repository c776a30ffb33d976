"""What a divergence may be asked: its options, and the shapes and types of a student's and a teacher's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softmax_ext.contract.arrays import (
    Array,
    an_array,
    at_least_1d,
    floating,
    same_device,
    same_type,
    scale_of_rows,
)
from softmax_ext.contract.options import (
    REDUCTIONS,
    fitted,
    head_options,
    number,
    one_of,
    positive,
)
from softmax_ext.contract.sentences import (
    ArgumentTypeError,
    ReductionTypeError,
    fail_type,
    fail_value,
    sentence,
    shape_words,
    wrong_value,
)

KINDS = ("forward_kl", "reverse_kl", "jsd", "tv")


@dataclass(frozen=True)
class DivergenceOptions:
    """The options shared by both divergences in both frameworks; the public docstrings explain each."""

    kind: str = "forward_kl"
    beta: float = 0.5
    logit_scale: float = 1.0
    teacher_scale: float = 1.0
    softcap: float | None = None
    teacher_softcap: float | None = None
    reduction: str = "mean"

    def fitted(self, tiny: float, largest: float) -> tuple[float, float | None, float, float | None]:
        """(scale, softcap) of the student and of the teacher as a type with this range holds them."""
        of_student = fitted(self.logit_scale, self.softcap, tiny, largest)
        return *of_student, *fitted(self.teacher_scale, self.teacher_softcap, tiny, largest)

    def check(self, op: str) -> None:
        """Raise for the first option outside its rule."""
        one_of(op, "kind", self.kind, KINDS, ArgumentTypeError)
        b = number(op, "beta", self.beta, "in (0, 1)")
        if not 0.0 < b < 1.0:
            wrong_value(op, "beta", "be a Python number in (0, 1)", self.beta)
        for name in ("logit_scale", "teacher_scale"):
            positive(op, name, getattr(self, name))
        for name in ("softcap", "teacher_softcap"):
            if getattr(self, name) is not None:
                positive(op, name, getattr(self, name))
        one_of(op, "reduction", self.reduction, REDUCTIONS, ReductionTypeError)
        object.__setattr__(self, "beta", b)


def divergence(
    op: str,
    input: Array,
    teacher: Array | None,
    token_weight: Array | None,
    keep: Array | None,
    *,
    options: DivergenceOptions,
    axis: int,
    logit_scale: Array | None = None,
) -> None:
    """Check a divergence between two arrays of logits of class dimension `axis` (non-negative)."""
    options.check(op)
    floating(op, "input", input)
    teacher = an_array(op, "teacher", teacher)
    floating(op, "teacher", teacher)
    if teacher.shape != input.shape:
        fail_value(op, "teacher", f"have the input's shape {shape_words(input.shape)}", shape_words(teacher.shape))
    same_device(op, "teacher", teacher, input)
    rows = input.shape[:axis] + input.shape[axis + 1 :]
    scale_of_rows(op, input, rows, logit_scale)
    _of_rows(op, input, rows, token_weight, keep)


def linear_divergence(
    op: str,
    input: Array | None,
    linear_weight: Array | None,
    teacher_input: Array | None,
    teacher_weight: Array | None,
    linear_bias: Array | None,
    teacher_bias: Array | None,
    token_weight: Array | None,
    keep: Array | None,
    *,
    options: DivergenceOptions,
    shift: Any,
    memory: Any,
    chunk_size: Any,
    logit_scale: Array | None = None,
) -> None:
    """Check a divergence between the logits of two linear layers: input (..., D), linear_weight (V, D)."""
    options.check(op)
    head_options(op, shift, memory, chunk_size)
    input = at_least_1d(op, "input", input)
    _head(op, input, linear_weight, linear_bias, "input", "linear_weight", "linear_bias")
    teacher_input = at_least_1d(op, "teacher_input", teacher_input)
    _head(op, teacher_input, teacher_weight, teacher_bias, "teacher_input", "teacher_weight", "teacher_bias")
    lead, classes = input.shape[:-1], an_array(op, "linear_weight", linear_weight).shape[0]
    if teacher_input.shape[:-1] != lead:
        rule = f"have the input's shape {shape_words(lead)} but for the last dimension"
        fail_value(op, "teacher_input", rule, shape_words(teacher_input.shape))
    shape = an_array(op, "teacher_weight", teacher_weight).shape
    if shape[0] != classes:
        fail_value(op, "teacher_weight", f"have linear_weight's {classes} classes", shape_words(shape))
    same_device(op, "teacher_input", teacher_input, input)
    if shift and not lead:
        wrong_value(op, "shift", "be 0 with an input of 1 dimension", shift)
    scale_of_rows(op, input, lead, logit_scale)
    _of_rows(op, input, lead, token_weight, keep)


def teacher_has_no_gradient(op: str, name: str) -> TypeError:
    """The error for a derivative asked for at the teacher."""
    rule = "be a constant, such as a detached array: a divergence has no derivative by its teacher"
    return ArgumentTypeError(sentence(op, name, rule, "an array that is differentiated"))


def _head(op: str, x: Array, weight: Array | None, bias: Array | None, of: str, of_weight: str, of_bias: str) -> None:
    floating(op, of, x)
    weight = an_array(op, of_weight, weight)
    floating(op, of_weight, weight)
    if weight.dtype != x.dtype:
        fail_type(op, of_weight, f"have the type of {of}, {x.dtype}", weight.dtype)
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        rule = f"have 2 dimensions, the last {x.shape[-1]} ({of}'s)"
        fail_value(op, of_weight, rule, shape_words(weight.shape))
    same_device(op, of_weight, weight, x)
    if bias is not None:
        same_type(op, of_bias, bias, x)
        if bias.shape != weight.shape[:1]:
            fail_value(op, of_bias, f"have shape {shape_words(weight.shape[:1])}", shape_words(bias.shape))
        same_device(op, of_bias, bias, x)


def _of_rows(op: str, input: Array, rows: tuple[int, ...], token_weight: Array | None, keep: Array | None) -> None:
    for name, array in (("token_weight", token_weight), ("keep", keep)):
        if array is None:
            continue
        if name == "keep":
            if an_array(op, name, array).kind != "bool":
                fail_type(op, name, "have type bool", array.dtype)
        else:
            floating(op, name, array)
        if array.shape != rows:
            fail_value(op, name, f"have shape {shape_words(rows)}", shape_words(array.shape))
        same_device(op, name, array, input)
