"""A linear layer over the classes as one value, and the chunks of its logits: what a head's loops are made of.

Anything with the same three operations is a head: logits of some rows, what their gradient adds to the input's, and a
gradient of its own parameters that grows chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ops._head.chunks import lines, spans
from torch_ops._head.rounding import scaled
from torch_ops._head.unrounded import add_product
from torch_ops._rows import dispatch as rows

# Entries of a piece of dW on its way into a wider sum, or of W on its way to a wider matmul: 8 MiB of bfloat16.
# Matmuls of fewer classes are slower (at D = 2304 and 512 rows: 455 classes at a time take 1.7 times as long as 2048).
PIECE_OF_WEIGHT = 1 << 22


class Linear(NamedTuple):
    """z = x WT + b, or of low rank beside W: rows (x, u) of D + r numbers give x WT + u upT + b, nothing joined."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    up: Tensor | None = None  # (V, r)

    @property
    def classes(self) -> int:
        """V."""
        return self.weight.shape[0]

    def part(self, i: int, j: int) -> Linear:
        """The layer of the classes i to j."""
        return Linear(self.weight[i:j], *(v if v is None else v[i:j] for v in (self.bias, self.up)))

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        """X WT + b, formed in the type of `out` and written there."""
        x, u = self._parts(x.to(out.dtype))
        for i, j, w in self._pieces(out.dtype):
            if self.bias is None:
                torch.mm(x, w.t(), out=out[:, i:j])
            else:
                torch.addmm(self.bias[i:j].to(out.dtype), x, w.t(), out=out[:, i:j])
        if self.up is not None:
            out.addmm_(u, self.up.t().to(out.dtype))
        return out

    def set_input_gradient(self, dx: Tensor, dz: Tensor) -> None:
        """dX = dz W, in the type of dz; of low rank [dz W, dz up]."""
        if self.weight.dtype != dz.dtype:
            self.add_input_gradient(dx.zero_(), dz)
            return
        dx, du = self._parts(dx)
        torch.mm(dz, self.weight, out=dx)
        if self.up is not None:
            torch.mm(dz, self.up, out=du)

    def add_input_gradient(self, dx: Tensor, dz: Tensor) -> None:
        """dX += dz W, where dX has the type of dz, or is summed in float32."""
        dx, du = self._parts(dx)
        if self.up is not None:
            du.add_(torch.mm(dz, self.up.to(dz.dtype)))
        if dx.dtype == dz.dtype:
            for i, j, w in self._pieces(dz.dtype):
                dx.addmm_(dz[:, i:j], w)
        elif self.up is not None or not add_product(dx, dz, self.weight, first=False):
            dx.add_(torch.mm(dz, self.weight))

    def gradient(self, weight: bool, bias: bool, up: bool, *, summed: bool) -> LinearGradient:
        """An empty gradient of the parameters wanted; `summed` over several chunks, and so in the compute type."""
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        dtype = kind if summed else self.weight.dtype
        dw = self.weight.new_empty(self.weight.shape, dtype=dtype) if weight else None
        db = torch.zeros_like(self.bias, dtype=kind) if bias and self.bias is not None else None
        du = self.up.new_zeros(self.up.shape, dtype=kind) if up and self.up is not None else None
        return LinearGradient(dw, db, du, self.weight.dtype)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, u) of rows of both."""
        if self.up is None:
            return x, x
        return x[:, : self.weight.shape[1]], x[:, self.weight.shape[1] :]

    def _pieces(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """(begin, end, W of these classes) in the type given: all of them, or pieces in one reused buffer."""
        w = self.weight
        if w.dtype == dtype:
            yield 0, self.classes, w
            return
        pieces = spans(self.classes, max(1, PIECE_OF_WEIGHT // max(1, w.shape[1])))
        room = w.new_empty(max(j - i for i, j in pieces), w.shape[1], dtype=dtype)
        for i, j in pieces:
            yield i, j, room[: j - i].copy_(w[i:j])


class LinearGradient:
    """dW = sum over chunks of dzT x, db = sum of dz and d_up = sum of dzT u, in the compute type.

    A half-precision product is rounded before it is added, but on CUDA (`add_product`). Where nothing is summed there
    is one chunk, and dW takes its product in its own type.
    """

    def __init__(self, dw: Tensor | None, db: Tensor | None, du: Tensor | None, dtype: torch.dtype) -> None:
        self.dw, self.db, self.du, self.dtype, self.first = dw, db, du, dtype, True

    def part(self, i: int, j: int) -> LinearGradient:
        """The gradient of the classes i to j, which writes into this one."""
        dw, db, du = (g if g is None else g[i:j] for g in (self.dw, self.db, self.du))
        return LinearGradient(dw, db, du, self.dtype)

    def add(self, dz: Tensor, x: Tensor) -> None:
        """One chunk more."""
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.db.dtype)
        if self.du is not None:
            self.du += torch.mm(dz.t(), x[:, x.shape[1] - self.du.shape[1] :])
        if self.dw is None:
            return
        x = x[:, : self.dw.shape[1]]
        if self.dw.dtype == dz.dtype:
            torch.mm(dz.t(), x, out=self.dw) if self.first else self.dw.addmm_(dz.t(), x)
        else:
            _add_by_pieces(self.dw, dz, x, first=self.first)
        self.first = False

    def unrounded(self) -> list[Tensor | None]:
        """[dW, db, d_up] as they were summed."""
        return [self.dw, self.db, self.du]

    def rounded(self) -> list[Tensor | None]:
        """[dW, db, d_up] in the parameters' type."""
        return [g if g is None else scaled(g, None, self.dtype) for g in (self.dw, self.db, self.du)]


def _add_by_pieces(dw: Tensor, dz: Tensor, x: Tensor, *, first: bool) -> None:
    """dW += dzT x, or dW = dzT x, where dW has another type than dz: by pieces of the classes, or unrounded."""
    if add_product(dw, dz.t(), x, first=first):
        return
    pieces = spans(dz.shape[1], max(1, PIECE_OF_WEIGHT // max(1, x.shape[1])))
    room = dz.new_empty(max(j - i for i, j in pieces), x.shape[1])
    for i, j in pieces:
        product = torch.mm(dz[:, i:j].t(), x, out=room[: j - i])
        dw[i:j].copy_(product) if first else dw[i:j].add_(product)


class Gradients:
    """[dX, dW, db, d_up] of a head by chunks of rows. dX is given, of the rows' number, or None."""

    def __init__(self, head: Linear, dx: Tensor | None, shared: LinearGradient, ignored: Tensor | None) -> None:
        self.head, self.dx, self.shared, self.ignored = head, dx, shared, ignored

    def add(self, dz: Tensor, x: Tensor, i: int, j: int, at: Tensor | None = None) -> None:
        """Rows i to j, which are those of dX that `at` names (None: the same)."""
        self.shared.add(dz, x)
        dx = self.dx
        if dx is None:
            return
        out = dx[i:j] if at is None and dx.dtype == dz.dtype else dz.new_empty(dz.shape[0], dx.shape[1])
        self.head.set_input_gradient(out, dz)
        if self.ignored is not None:
            out.masked_fill_(self.ignored[i:j].unsqueeze(1), 0.0)
        if at is not None:
            dx.index_copy_(0, at, out)
        elif dx.dtype != dz.dtype:
            dx[i:j] = out

    def unrounded(self) -> list[Tensor | None]:
        """As they were summed."""
        return [self.dx, *self.shared.unrounded()]

    def rounded(self) -> list[Tensor | None]:
        """In the arguments' types."""
        return [self.dx, *self.shared.rounded()]


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


def ignored_rows(target: Tensor) -> Tensor | None:
    """A mask of the ignored rows; None where a look that costs nothing finds none."""
    if target.is_floating_point():
        return None
    mask = rows.of_rows(target, 2, 1) == rows.IGNORED
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


class MassGradient:
    """[dL/dy, dL/dw] of chunks of logits."""

    def __init__(self, target: Tensor, weight: Tensor | None, by_target: bool, by_weight: bool) -> None:
        self.target, self.weight = target, weight
        self.d_target = torch.zeros_like(target, memory_format=torch.contiguous_format) if by_target else None
        self.d_weight = torch.zeros_like(weight) if by_weight and weight is not None else None

    def add(
        self,
        z: Tensor,
        m: Tensor,
        rest: Tensor,
        upstream: list[Tensor | None],
        row: dict[str, Any],
        these: slice = slice(None),
        classes: slice = slice(None),
    ) -> None:
        """The logits of some rows and classes more."""
        if self.d_target is None and self.d_weight is None:
            return
        target = self.target[these, classes] if self.target.is_floating_point() else self.target[these]
        w = None if self.weight is None else self.weight[classes]
        for i, j in spans(z.shape[0], lines(z)):
            of_rows: list[Any] = [v if v is None else v[i:j] for v in (m, rest, upstream[0], upstream[2])]
            dy, dw = rows.cross_entropy_mass_bwd(z[i:j], target[i:j], w, *of_rows, **row)
            if self.d_target is not None and dy is not None:
                self.d_target[these, classes][i:j] = dy
            if self.d_weight is not None and dw is not None:
                self.d_weight[classes] += dw

    def done(self) -> list[Tensor | None]:
        """[d_target, d_weight]."""
        return [self.d_target, self.d_weight]
