"""Triton kernels of K classes a row as PyTorch ops: points of a distribution, x . W[id] with its derivatives.

The first four have the names and schemas of csrc/torch_classes.cpp; the others are what sparse.py is made of.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softmax_ext.gpu import classes as gpu_classes
from softmax_ext.gpu import picked as gpu_picked
from softmax_ext.gpu import points as gpu_points
from torch_ops._rows import triton_ops as kernels
from torch_ops._rows.native import CLASSES, describe

tl: Any = kernels.tl
# Bytes of partial sums of classes that many rows name.
_PARTS = 1 << 26


def points(
    logits: Tensor,
    m: Tensor,
    rest: Tensor,
    excepted: Tensor,
    u: Tensor,
    span: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(ids (N, K), mass off the excepted classes (N, 2), in two parts and units of exp(m))."""
    x, m, rest, excepted, u = (a.contiguous() for a in (logits, m, rest, excepted, u))
    (n, classes), k, e = x.shape, u.shape[1], excepted.shape[1]
    ids, q = torch.empty_like(u, dtype=torch.int32), m.new_empty(n, 2)
    if not n:
        return ids, q
    groups = -(-classes // gpu_points.GROUP)
    mass = m.new_empty(n, groups)
    options, constants = kernels.transform(x, scale, softcap)
    constants |= {"F": _compute(x), "GROUP": gpu_points.GROUP}
    few = 4 if x.dtype == torch.float64 else 1
    at_once, together = gpu_points.GROUPS // few, gpu_points.TOGETHER // few
    parts = -(-groups // at_once)
    warps = 8 * 32 // kernels._lanes(x)
    args = (x, m, mass, classes, groups, parts, *options)
    kernels.launch(gpu_points.points_mass_kernel, n * parts, args, GROUPS=at_once, num_warps=warps, **constants)
    constants |= {"TOGETHER": together, "num_warps": max(1, warps // 2)}
    if e:
        parts = -(-e // together)
        args = (x, m, excepted, mass, classes, groups, e, parts, *options)
        kernels.launch(gpu_points.points_except_kernel, n * parts, args, **constants)
    sums = torch.empty_like(mass, dtype=torch.float64)
    fast = {name: constants[name] for name in ("F", "FAST")}
    args = (m, rest, excepted, mass, sums, q, groups, e)
    kernels.launch(gpu_points.points_sums_kernel, n, args, SUMMED=gpu_points.SUMMED, num_warps=warps // 2, **fast)
    parts = -(-k // together)
    args = (x, m, rest, excepted, u, span if span is None else span.contiguous(), sums, ids)
    args = (*args, classes, groups, groups.bit_length(), e, k, parts, *options)
    if parts:
        kernels.launch(gpu_points.points_kernel, n * parts, args, **constants)
    return ids, q


def picked_fwd(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """z (N, K)."""
    x, w, ids = x.contiguous(), w.contiguous(), ids.contiguous()
    (n, k), d = ids.shape, w.shape[1]
    z = x.new_empty(n, k, dtype=torch.promote_types(x.dtype, torch.float32))
    if z.numel():
        count = gpu_picked.IDS
        constants = {"F": _compute(x), "IDS": count, "COLS": min(256, gpu_picked.features(d, x.element_size()))}
        args = (x, w, ids, z, w.shape[0], k, d)
        kernels.launch(gpu_picked.picked_fwd_kernel, (n, -(-k // count)), args, num_warps=4, **constants)
    return z


def picked_input_bwd(c: Tensor, w: Tensor, ids: Tensor, by: Tensor | None, of_all: Tensor | None, wide: bool) -> Tensor:
    """dX (N, D)."""
    c, w, ids = c.contiguous(), w.contiguous(), ids.contiguous()
    (n, k), (classes, d) = ids.shape, w.shape
    dx = w.new_empty(n, d, dtype=c.dtype if wide else w.dtype)
    if dx.numel():
        grid, constants = _by_features(n, w)
        args = (c, w, ids, *_outer(by, of_all), dx, classes, k, c.shape[1], d)
        kernels.launch(gpu_picked.picked_input_bwd_kernel, grid, args, **constants)
    return dx


def picked_weight_bwd(
    c: Tensor, x: Tensor, ids: Tensor, classes: int, by: Tensor | None, of_all: Tensor | None, wide: bool
) -> Tensor:
    """dW (V, D)."""
    x, d = x.contiguous(), x.shape[1]
    dw = x.new_empty(classes, d, dtype=c.dtype if wide else x.dtype)
    if not dw.numel():
        return dw
    by_class, rows, by_pair, start = _sorted(c, ids, classes)
    pairs = by_class.shape[0]
    part = gpu_picked.PART
    while pairs // part * d * c.element_size() > _PARTS:
        part *= 2
    parts = c.new_empty(pairs // part, d)
    grid, constants = _by_features(classes, x)
    constants["PART"] = part
    if parts.numel():
        args = (by_pair, x, rows, by_class, parts, classes, d)
        kernels.launch(gpu_picked.picked_parts_kernel, (parts.shape[0], grid[1]), args, **constants)
    args = (by_pair, x, rows, start, parts, *_outer(by, of_all), dw, d)
    kernels.launch(gpu_picked.picked_weight_bwd_kernel, grid, args, **constants)
    return dw


def by_class(ids: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum over the slots of a slot's own class, over all others, whether it is its class's first), each (N, K)."""
    ids, a = ids.contiguous(), a.contiguous()
    (n, k), new = a.shape, a.new_empty
    own, others, first = (new(a.shape, dtype=t) for t in (torch.float64, torch.float64, torch.bool))
    if a.numel():
        slots = min(gpu_classes.SLOTS, 1 << (k - 1).bit_length())
        args = (ids, a, own, others, first, k)
        grid = (n, -(-k // slots))
        kernels.launch(gpu_classes.by_class_kernel, grid, args, SLOTS=slots, num_warps=max(1, slots // 32))
    return own, others, first


def place_(out: Tensor, ids: Tensor, values: Tensor, dim: int) -> None:
    """out[.., id, ..] = values where an id along `dim` names a class; equal ids of a row have equal values."""
    ids, values = ids.contiguous(), values.contiguous()
    count, inner, block = ids.numel(), math.prod(ids.shape[dim + 1 :]), 256
    if count:
        args = (values, ids, out, out.shape[dim], ids.shape[dim], inner, count)
        kernels.launch(gpu_classes.place_kernel, -(-count // block), args, BLOCK=block)


def _sorted(c: Tensor, ids: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(class, row, coefficient of each pair, sorted by class; where each class begins); what names none is behind.

    The sort is stable: a class's pairs stand in the order of their rows, and so are they summed in any run.
    """
    n, k = ids.shape
    kind = torch.int32 if n * k < 2**31 else torch.int64
    flat = ids.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < classes), flat, classes).to(torch.int32)
    by_class, order = flat.sort(stable=True)
    rows = order // max(k, 1)
    slot = order - rows * k - (k - c.shape[1])  # the first coefficient is that of all leading ids
    by_pair = c.reshape(-1)[rows * c.shape[1] + slot.clamp(min=0)]
    start = torch.searchsorted(by_class, torch.arange(classes + 1, dtype=torch.int32, device=ids.device))
    return by_class, rows.to(kind), by_pair, start


def _by_features(lines: int, x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """(the grid of `lines` times x's features, the launch's constants)."""
    columns = gpu_picked.features(x.shape[1], x.element_size())
    constants = {"F": _compute(x), "COLS": columns, "AHEAD": gpu_picked.AHEAD}
    return (lines, -(-x.shape[1] // columns)), {**constants, "num_warps": 4 if columns >= 512 else 1}


def _outer(by: Tensor | None, of_all: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if by is None or of_all is None else (by.contiguous(), of_all.contiguous())


def _compute(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


_SCHEMAS: dict[Any, str] = {
    points: "(Tensor logits, Tensor m, Tensor rest, Tensor excepted, Tensor u, Tensor? span, float scale, "
    "float? softcap) -> (Tensor, Tensor)",
    picked_fwd: "(Tensor x, Tensor w, Tensor ids) -> Tensor",
    picked_input_bwd: "(Tensor c, Tensor w, Tensor ids, Tensor? by, Tensor? of_all, bool wide) -> Tensor",
    picked_weight_bwd: "(Tensor c, Tensor x, Tensor ids, int classes, Tensor? by, Tensor? of_all, bool wide) -> Tensor",
    by_class: "(Tensor ids, Tensor a) -> (Tensor, Tensor, Tensor)",
    place_: "(Tensor(a!) out, Tensor ids, Tensor values, int dim) -> ()",
}


_library = torch.library.Library("softmax_ext_triton", "FRAGMENT")
for _op, _schema in _SCHEMAS.items():
    _library.define(_op.__name__ + _schema)
    _library.impl(_op.__name__, _op, "CompositeExplicitAutograd")
_FAKES: dict[str, Any] = {
    "by_class": lambda ids, a: tuple(torch.empty_like(a, dtype=t) for t in (torch.float64, torch.float64, torch.bool)),
    "place_": lambda *_: None,
}
describe("softmax_ext_triton", {**CLASSES, **_FAKES}, _library)
