"""Pieces of the linear head's loops: logits of a chunk, sums over chunks, what ignored rows may not reach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from torch_ops._head.chunks import lines, spans
from torch_ops._head.rounding import scaled
from torch_ops._head.unrounded import add_product
from torch_ops._rows import dispatch as rows

# Entries of a piece of dW on its way into a wider sum, or of W on its way to a wider matmul: 8 MiB of bfloat16.
# Matmuls of fewer classes are slower (at D = 2304 and 512 rows: 455 classes at a time take 1.7 times as long as 2048).
PIECE_OF_WEIGHT = 1 << 22


def formed_in(x: Tensor, target: Tensor) -> torch.dtype:
    """The type of a chunk's logits and its matmuls: the input's, or float32 where its own matmuls are slow.

    Soft targets stay beside logits of their own type.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    slow = half and x.device.type == "cpu" and not target.is_floating_point() and _slow_halves(x.dtype)
    return torch.float32 if slow else x.dtype


# PyTorch multiplies halves fast where the CPU has a dot product for them. bfloat16 beside float32, matmuls of the head
# (N = 2048, D = 576, V = 49152): 1.9 times as long on a Xeon without one, 0.26 on an EPYC with avx512_bf16, a quarter
# with AMX. float16 on that EPYC, which has none for it: 2 to 70 times as long.
_DOT_PRODUCTS: dict[Any, tuple[str, ...]] = {
    ("x86_64", torch.bfloat16): ("avx512_bf16", "amx_bf16"),
    ("x86_64", torch.float16): ("avx512_fp16", "amx_fp16"),
    ("arm64", torch.bfloat16): ("bf16",),
    ("arm64", torch.float16): ("fp16_arith",),
}


@cache
def _slow_halves(dtype: torch.dtype) -> bool:
    found = torch.cpu.get_capabilities()
    names = _DOT_PRODUCTS.get((found.get("architecture"), dtype), ())
    return bool(names) and not any(found.get(name, False) for name in names)


def logits(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, out: Tensor) -> Tensor:
    """X WT + b, formed in the type of `out` and written there."""
    x = x.to(out.dtype)
    for i, j, w in class_pieces(linear_weight, out.dtype):
        if linear_bias is None:
            torch.mm(x, w.t(), out=out[:, i:j])
        else:
            torch.addmm(linear_bias[i:j].to(out.dtype), x, w.t(), out=out[:, i:j])
    return out


def class_pieces(linear_weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(begin, end, W of these classes) in the type given: all of them, or pieces in one reused buffer."""
    if linear_weight.dtype == dtype:
        yield 0, linear_weight.shape[0], linear_weight
        return
    pieces = spans(linear_weight.shape[0], max(1, PIECE_OF_WEIGHT // max(1, linear_weight.shape[1])))
    room = linear_weight.new_empty(max(j - i for i, j in pieces), linear_weight.shape[1], dtype=dtype)
    for i, j in pieces:
        yield i, j, room[: j - i].copy_(linear_weight[i:j])


def add_input_gradient(dx: Tensor, dz: Tensor, linear_weight: Tensor) -> None:
    """dX += dz W, where dX has the type of dz, or is summed in float32."""
    if dx.dtype == dz.dtype:
        for i, j, w in class_pieces(linear_weight, dz.dtype):
            dx.addmm_(dz[:, i:j], w)
    elif not add_product(dx, dz, linear_weight, first=False):
        dx.add_(torch.mm(dz, linear_weight))


def ignored_rows(target: Tensor) -> Tensor | None:
    """A mask of the ignored rows; None where a look that costs nothing finds none."""
    if target.is_floating_point():
        return None
    mask = target == rows.IGNORED
    return None if mask.device.type == "cpu" and not mask.any() else mask


def without(x: Tensor, ignored: Tensor | None, i: int, j: int) -> Tensor:
    """x with zeros in its ignored rows: their gradients are 0, but 0 * NaN would reach dW."""
    return x if ignored is None else x.masked_fill(ignored[i:j].unsqueeze(1), 0.0)


def first_maximum(z: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(value, position) of the first maximum of the scaled and capped logits, which may tie where z do not."""
    top, at = [], []
    for i, j in spans(z.shape[0], lines(z)):
        part = rows.capped(z[i:j], scale, softcap)
        if part.shape[1]:
            value, index = part.max(1)[0], part.argmax(1)
        else:
            value = part.new_full((j - i,), -math.inf)
            index = torch.full_like(value, -1, dtype=torch.int64)
        top.append(value)
        at.append(index)
    return torch.cat(top), torch.cat(at)


class ClassGradient:
    """dW = sum over chunks of dzT x and db = sum of dz, in the compute type.

    A half-precision product is rounded before it is added, but on CUDA (`add_product`). Not `summed`: there is one
    chunk, and dW takes its product in its own type.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, need_weight: bool, need_bias: bool, summed: bool) -> None:
        self.kind = torch.promote_types(weight.dtype, torch.float32)
        self.dtype, self.first = weight.dtype, True
        dtype = self.kind if summed else weight.dtype
        self.dw = weight.new_empty(weight.shape, dtype=dtype) if need_weight else None
        self.db = torch.zeros_like(bias, dtype=self.kind) if need_bias and bias is not None else None

    def add(self, dz: Tensor, x: Tensor) -> None:
        """One chunk more."""
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.kind)
        if self.dw is None:
            return
        if self.dw.dtype == dz.dtype:
            torch.mm(dz.t(), x, out=self.dw) if self.first else self.dw.addmm_(dz.t(), x)
        else:
            add_weight_gradient(self.dw, dz, x, first=self.first)
        self.first = False

    def unrounded(self) -> list[Tensor | None]:
        """[dW, db] as they were summed."""
        return [self.dw, self.db]

    def rounded(self) -> list[Tensor | None]:
        """[dW, db] in the parameters' type."""
        return [g if g is None else scaled(g, None, self.dtype) for g in (self.dw, self.db)]


def add_weight_gradient(dw: Tensor, dz: Tensor, x: Tensor, *, first: bool) -> None:
    """dW += dzT x, or dW = dzT x, where dW has another type than dz: by pieces of the classes, or unrounded."""
    if add_product(dw, dz.t(), x, first=first):
        return
    pieces = spans(dz.shape[1], max(1, PIECE_OF_WEIGHT // max(1, x.shape[1])))
    room = dz.new_empty(max(j - i for i, j in pieces), x.shape[1])
    for i, j in pieces:
        product = torch.mm(dz[:, i:j].t(), x, out=room[: j - i])
        dw[i:j].copy_(product) if first else dw[i:j].add_(product)


def products(
    dz: Tensor,
    x: Tensor,
    linear_weight: Tensor,
    dx: Tensor | None,
    shared: ClassGradient,
    ignored: Tensor | None,
    i: int,
    j: int,
    at: Tensor | None = None,
) -> None:
    """dX_i = dz W, dW += dzT x, db += sum_i dz."""
    if dx is not None:
        out = dx[i:j] if at is None and dx.dtype == dz.dtype else dz.new_empty(dz.shape[0], dx.shape[1])
        if linear_weight.dtype == dz.dtype:
            torch.mm(dz, linear_weight, out=out)
        else:
            add_input_gradient(out.zero_(), dz, linear_weight)
        if ignored is not None:
            out.masked_fill_(ignored[i:j].unsqueeze(1), 0.0)
        if at is not None:
            dx.index_copy_(0, at, out)
        elif dx.dtype != dz.dtype:
            dx[i:j] = out
    shared.add(dz, x)


class MassGradient:
    """dL/dy and dL/dw: -log p times what multiplies y_j and w_j in the loss."""

    def __init__(self, target: Tensor, weight: Tensor | None, by_target: bool, by_weight: bool) -> None:
        self.target, self.weight = target, weight
        self.soft = target.is_floating_point()
        self.d_target = torch.zeros_like(target, memory_format=torch.contiguous_format) if by_target else None
        self.d_weight = torch.zeros_like(weight) if by_weight and weight is not None else None

    def add(
        self,
        z: Tensor,
        m: Tensor,
        rest: Tensor,
        upstream: list[Tensor | None],
        scale: float,
        softcap: float | None,
        these: slice,
        classes: slice,
    ) -> None:
        """The logits of some rows and classes more."""
        if self.d_target is None and self.d_weight is None:
            return
        d_nll, _, d_smooth, _ = (u if u is None else u.unsqueeze(1) for u in upstream)
        target = self.target[these, classes] if self.soft else self.target[these]
        w = None if self.weight is None else self.weight[classes]
        log_total, m = torch.log1p(rest).unsqueeze(1), m.unsqueeze(1)
        for i, j in spans(z.shape[0], lines(z)):
            minus_log_p = log_total[i:j] - (rows.capped(z[i:j], scale, softcap) - m[i:j])
            minus_log_p.masked_fill_(minus_log_p == math.inf, 0.0)  # as in the derivative in plain ops
            if self.d_target is not None and d_nll is not None:
                part = d_nll[i:j] * minus_log_p
                self.d_target[these, classes][i:j] = part if w is None else part * w
            if self.d_weight is not None:
                factor = 0.0 if d_smooth is None else d_smooth[i:j]
                if self.soft and d_nll is not None:
                    factor = factor + d_nll[i:j] * target[i:j]
                terms = factor * minus_log_p
                if not self.soft:
                    terms = terms.masked_fill((target[i:j] == rows.IGNORED).unsqueeze(1), 0.0)
                self.d_weight[classes] += terms.sum(0)

    def done(self) -> list[Tensor | None]:
        """[d_target, d_weight]."""
        return [self.d_target, self.d_weight]
