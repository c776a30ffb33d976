"""What a loss may be asked: the shapes, types and options of its arguments together."""

from __future__ import annotations

from typing import Any

from softmax_ext.contract.arrays import (
    FLOATS,
    Array,
    an_array,
    at_least_1d,
    floating,
    same_device,
    same_type,
    scale_of_rows,
)
from softmax_ext.contract.options import LossOptions, head_options, sampling
from softmax_ext.contract.sentences import fail_type, fail_value, shape_words, words, wrong_value

# Class indices or probabilities; or a pair of both, ids and the probabilities of K classes a row.
Target = Array | None | tuple[Array | None, ...] | list[Array | None]


def loss(
    op: str,
    input: Array,
    target: Target,
    weight: Array | None,
    token_weight: Array | None,
    *,
    options: LossOptions,
    axis: int,
    logit_scale: Array | None = None,
) -> bool:
    """Check a loss on logits of class dimension `axis` (non-negative); True when targets are soft (a pair is not).

    `logit_scale`: where it is an array.
    """
    options.check(op)
    floating(op, "input", input)
    rows = input.shape[:axis] + input.shape[axis + 1 :]
    scale_of_rows(op, input, rows, logit_scale)
    return _targets_and_weights(op, input, input.shape, rows, axis, target, weight, token_weight, options, "input's")


def linear_loss(
    op: str,
    input: Array | None,
    linear_weight: Array | None,
    target: Target,
    linear_bias: Array | None,
    weight: Array | None,
    token_weight: Array | None,
    *,
    options: LossOptions,
    shift: Any,
    memory: Any,
    chunk_size: Any,
    grad_samples: Any = None,
    logit_scale: Array | None = None,
    low_rank: Any = None,
) -> bool:
    """Check the loss of a linear layer's logits; True when targets are soft (a pair is not).

    Shapes: input (..., D), linear_weight (V, D), target (...) or (..., V); or input (N, D),
    linear_weight (V, d1, .., dK, D), target (N, d1, .., dK) or (N, V, d1, .., dK).
    A pair (ids, probabilities) has K where soft targets have V. `logit_scale`: where it is an array. `low_rank`: None
    or a pair of (r, D) and linear_weight's shape with r in the place of D.
    """
    options.check(op)
    head_options(op, shift, memory, chunk_size)
    sampling(op, grad_samples, memory)
    input = at_least_1d(op, "input", input)
    floating(op, "input", input)
    linear_weight = an_array(op, "linear_weight", linear_weight)
    same_type(op, "linear_weight", linear_weight, input)
    features, lead = input.shape[-1], input.shape[:-1]
    if len(linear_weight.shape) < 2 or linear_weight.shape[-1] != features:
        rule = f"have 2 dimensions or more, the last {features} (the input's)"
        fail_value(op, "linear_weight", rule, shape_words(linear_weight.shape))
    classes, inner = linear_weight.shape[0], linear_weight.shape[1:-1]
    if inner and len(lead) != 1:
        rule = f"have 2 dimensions (N, D) with a linear_weight of {len(linear_weight.shape)}"
        fail_value(op, "input", rule, shape_words(input.shape))
    if linear_bias is not None:
        same_type(op, "linear_bias", linear_bias, input)
        if linear_bias.shape != linear_weight.shape[:-1]:
            rule = f"have shape {shape_words(linear_weight.shape[:-1])}"
            fail_value(op, "linear_bias", rule, shape_words(linear_bias.shape))
    if shift and (inner or not lead):
        form = "a linear_weight of more than 2 dimensions" if inner else "an input of 1 dimension"
        wrong_value(op, "shift", f"be 0 with {form}", shift)
    for name, array in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if array is not None:
            same_device(op, name, array, input)
    _low_rank(op, input, linear_weight, low_rank)
    scale_of_rows(op, input, lead + inner, logit_scale)
    if grad_samples is not None and low_rank is not None:
        fail_value(op, "grad_samples", "be None with low_rank", "a number")
    if grad_samples is not None and logit_scale is not None and linear_bias is not None:
        fail_value(op, "grad_samples", "be None with linear_bias and a logit_scale that is an array", "a number")
    # K-dimensional logits have their classes at dimension 1, as torch's losses; others at the last.
    axis = 1 if inner else len(lead)
    full = (*lead, classes, *inner)
    soft = _targets_and_weights(op, input, full, lead + inner, axis, target, weight, token_weight, options, "logits'")
    if soft and grad_samples is not None:
        wrong_value(op, "grad_samples", "be None with class probabilities as targets", grad_samples)
    return soft


def _low_rank(op: str, input: Array, linear_weight: Array, low_rank: Any) -> None:
    if low_rank is None:
        return
    if not isinstance(low_rank, tuple | list) or len(low_rank) != 2:
        many = isinstance(low_rank, tuple | list)
        got = f"{len(low_rank)} arrays" if many else words(low_rank)
        fail_type(op, "low_rank", "be a pair of arrays (A, B) or None", got)
    down, up = (an_array(op, "low_rank", array) for array in low_rank)
    for array in (down, up):
        same_type(op, "low_rank", array, input)
    features = input.shape[-1]
    if len(down.shape) != 2 or down.shape[1] != features:
        fail_value(op, "low_rank", f"have A of shape (r, {features})", shape_words(down.shape))
    wanted = (*linear_weight.shape[:-1], down.shape[0])
    if up.shape != wanted:
        fail_value(op, "low_rank", f"have B of shape {shape_words(wanted)}", shape_words(up.shape))
    for array in (down, up):
        same_device(op, "low_rank", array, input)


def linear_at(
    op: str,
    input: Array | None,
    linear_weight: Array | None,
    ids: Array | None,
    linear_bias: Array | None,
    ignored: Any,
) -> None:
    """Check the logits of K classes a row: input (..., D), linear_weight (V, D), ids (..., K), linear_bias (V,)."""
    LossOptions(ignore_index=ignored).check(op)
    input = at_least_1d(op, "input", input)
    floating(op, "input", input)
    linear_weight = an_array(op, "linear_weight", linear_weight)
    same_type(op, "linear_weight", linear_weight, input)
    if len(linear_weight.shape) != 2 or linear_weight.shape[1] != input.shape[-1]:
        rule = f"have 2 dimensions, the last {input.shape[-1]} (the input's)"
        fail_value(op, "linear_weight", rule, shape_words(linear_weight.shape))
    ids = an_array(op, "ids", ids)
    if ids.kind != "int":
        fail_type(op, "ids", "have an integer type", ids.dtype)
    if ids.shape[:-1] != input.shape[:-1] or len(ids.shape) != len(input.shape):
        lead = ", ".join(map(str, (*input.shape[:-1], "K"))) + ("," if len(input.shape) == 1 else "")
        fail_value(op, "ids", f"have shape ({lead})", shape_words(ids.shape))
    if linear_bias is not None:
        same_type(op, "linear_bias", linear_bias, input)
        if linear_bias.shape != linear_weight.shape[:1]:
            fail_value(
                op, "linear_bias", f"have shape {shape_words(linear_weight.shape[:1])}", shape_words(linear_bias.shape)
            )
    for name, array in (("linear_weight", linear_weight), ("ids", ids), ("linear_bias", linear_bias)):
        if array is not None:
            same_device(op, name, array, input)


def _targets_and_weights(
    op: str,
    input: Array,
    full: tuple[int, ...],
    rows: tuple[int, ...],
    axis: int,
    target: Target,
    weight: Array | None,
    token_weight: Array | None,
    options: LossOptions,
    of: str,
) -> bool:
    """The rules every loss shares, for logits of shape `full`: whether targets are soft."""
    if isinstance(target, tuple | list):
        of_target, soft = _pair(op, full, axis, target), False
    else:
        of_target = [an_array(op, "target", target)]
        soft = _is_soft(op, full, rows, of_target[0], of)
    if soft and options.ignored >= 0:
        rule = "be negative with class probabilities as targets"
        wrong_value(op, "ignore_index", rule, options.ignore_index)
    for name in ("logprob", "rank"):
        if soft and name in options.stats:
            wrong_value(op, "stats", f"not name {name!r} with class probabilities as targets", name)
    for name, array, shape in (
        ("weight", weight, (full[axis],)),
        ("token_weight", token_weight, rows),
    ):
        if array is not None:
            floating(op, name, array)
            if array.shape != shape:
                fail_value(op, name, f"have shape {shape_words(shape)}", shape_words(array.shape))
            same_device(op, name, array, input)
    for array in of_target:
        same_device(op, "target", array, input)
    return soft


def _pair(
    op: str, full: tuple[int, ...], axis: int, target: tuple[Array | None, ...] | list[Array | None]
) -> list[Array]:
    """The facts of a sparse target's ids and probabilities."""
    ids, probabilities = (an_array(op, "target", array) for array in target)
    if ids.kind != "int":
        fail_type(op, "target", "have ids of an integer type in its pair", ids.dtype)
    if probabilities.dtype not in FLOATS:
        fail_type(op, "target", "have probabilities of a floating type in its pair", probabilities.dtype)
    k = ids.shape[axis] if len(ids.shape) == len(full) else "K"
    wanted = (*full[:axis], k, *full[axis + 1 :])
    for name, array in (("ids", ids), ("probabilities", probabilities)):
        if array.shape != wanted:
            words = "(" + ", ".join(map(str, wanted)) + ("," if len(wanted) == 1 else "") + ")"
            fail_value(op, "target", f"have {name} of shape {words} in its pair", shape_words(array.shape))
    return [ids, probabilities]


def _is_soft(op: str, full: tuple[int, ...], rows: tuple[int, ...], target: Array, of: str) -> bool:
    if target.kind == "float":
        if target.shape == full:
            return True
        if target.shape == rows:
            fail_type(op, "target", "have an integer type for class indices", target.dtype)
        rule = f"have the {of} shape {shape_words(full)} for class probabilities"
        fail_value(op, "target", rule, shape_words(target.shape))
    if target.kind != "int":
        rule = "have an integer type (class indices) or a floating type (class probabilities)"
        fail_type(op, "target", rule, target.dtype)
    if target.shape == full:
        rule = f"have a floating type for class probabilities (the {of} shape)"
        fail_type(op, "target", rule, target.dtype)
    if target.shape != rows:
        rule = f"have shape {shape_words(rows)} for class indices"
        fail_value(op, "target", rule, shape_words(target.shape))
    return False
