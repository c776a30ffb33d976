"""Triton kernels of a student's rows against a teacher's as PyTorch ops, with the names and schemas of csrc's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softmax_ext.contract import KINDS
from softmax_ext.gpu import divergence as gpu
from torch_ops._rows import triton_ops as kernels
from torch_ops._rows.native import DIVERGENCES, STATE, SUMS, describe, rows_like


def divergence_fwd(student: Tensor, teacher: Tensor, keep: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """(the divergences, the state of each row)."""
    x, y, keep = _dense(student, teacher, keep)
    (value,) = rows_like(x, options[0], 1)
    state = value.new_empty([*value.shape, STATE])
    _launch(gpu.divergence_fwd_kernel, (x, y, keep, value, state), x, options)
    return value, state


def divergence_sums(student: Tensor, teacher: Tensor, keep: Tensor | None, state: Tensor, *options: Any) -> Tensor:
    """These classes' sums of q f(p / q), p - q and p u, given the state of whole rows."""
    x, y, keep = _dense(student, teacher, keep)
    sums = state.new_empty([*state.shape[:-1], SUMS])
    _launch(gpu.divergence_sums_kernel, (x, y, keep, state.contiguous(), sums), x, options)
    return sums


def divergence_bwd(
    student: Tensor, teacher: Tensor, keep: Tensor | None, state: Tensor, d_value: Tensor, *options: Any
) -> Tensor:
    """dL/d(student)."""
    x, y, keep = _dense(student, teacher, keep)
    dx = torch.empty_like(x)
    _backward(dx, x, y, keep, state, d_value, options)
    return dx


def divergence_bwd_(
    student: Tensor, teacher: Tensor, keep: Tensor | None, state: Tensor, d_value: Tensor, *options: Any
) -> None:
    """dL/d(student) over the student's logits."""
    _in_place(student, "divergence_bwd_")
    _, y, keep = _dense(student, teacher, keep)
    _backward(student, student, y, keep, state, d_value, options)


def divergence_fwd_bwd_(
    student: Tensor, teacher: Tensor, keep: Tensor | None, d_value: Tensor, *options: Any
) -> Tensor:
    """The divergences, and dL/d(student) over the student's logits."""
    _in_place(student, "divergence_fwd_bwd_")
    _, y, keep = _dense(student, teacher, keep)
    (value,) = rows_like(student, options[0], 1)
    arrays = (student, y, keep, None, value, d_value.contiguous(), student)
    _launch(gpu.divergence_bwd_kernel, arrays, student, options, BOTH=True)
    return value


def _backward(dx: Tensor, x: Tensor, y: Tensor, keep: Any, state: Tensor, d_value: Tensor, options: Any) -> None:
    arrays = (x, y, keep, state.contiguous(), None, d_value.contiguous(), dx)
    _launch(gpu.divergence_bwd_kernel, arrays, x, options, BOTH=False)


def _launch(kernel: Any, arrays: tuple[Any, ...], x: Tensor, options: tuple[Any, ...], **constants: Any) -> None:
    dim, kind, beta, scale, softcap, teacher_scale, teacher_softcap = options
    of_x, x_constants = kernels.transform(x, scale, softcap)
    of_y, y_constants = kernels.transform(x, teacher_scale, teacher_softcap)
    constants |= {f"{name}_X": v for name, v in x_constants.items()}
    constants |= {f"{name}_Y": v for name, v in y_constants.items()}
    constants |= {"KIND": kind, "RAW": not softcap and not teacher_softcap and scale == teacher_scale}
    values = (*kernels.number(beta), *of_x, *of_y)
    many = constants["CAPPED_X"] or constants["CAPPED_Y"] or KINDS[kind] == "jsd"
    widest, most = gpu.widest(x.element_size(), many)
    kernels.launch_rows(kernel, arrays, x, dim, widest, *values, most=most, **constants)


def _dense(*arrays: Tensor | None) -> tuple[Any, ...]:
    return tuple(a if a is None else a.contiguous() for a in arrays)


def _in_place(student: Tensor, op: str) -> None:
    if not student.is_contiguous():
        raise RuntimeError(f"{op}: student must be contiguous to be overwritten.")


_PAIR = "Tensor teacher, Tensor? keep"
_OPTIONS = "int dim, int kind, float beta, float scale, float? softcap, float teacher_scale, float? teacher_softcap"
_SCHEMAS: dict[Any, str] = {
    divergence_fwd: f"(Tensor student, {_PAIR}, {_OPTIONS}) -> (Tensor, Tensor)",
    divergence_sums: f"(Tensor student, {_PAIR}, Tensor state, {_OPTIONS}) -> Tensor",
    divergence_bwd: f"(Tensor student, {_PAIR}, Tensor state, Tensor d_value, {_OPTIONS}) -> Tensor",
    divergence_bwd_: f"(Tensor(a!) student, {_PAIR}, Tensor state, Tensor d_value, {_OPTIONS}) -> ()",
    divergence_fwd_bwd_: f"(Tensor(a!) student, {_PAIR}, Tensor d_value, {_OPTIONS}) -> Tensor",
}

_library = torch.library.Library("softmax_ext_triton", "FRAGMENT")
for _op, _schema in _SCHEMAS.items():
    _library.define(_op.__name__ + _schema)
    _library.impl(_op.__name__, _op, "CompositeExplicitAutograd")


describe("softmax_ext_triton", DIVERGENCES, _library)
