"""x . W[id] as autograd.Functions: one trilinear form sum_ik c_ik x_i . W[id_ik], each product a derivative of it.

The form is linear in c, x and W, so each Function's derivatives are the other two, and so is every higher one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_ops._rows import picked as rows
from torch_ops._rules.function import Rule, batch_first, forward_rule, in_graph


@in_graph
def picked(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """z_ik = x_i . W[id_ik] in the compute type, with every derivative; ids int64 or int32."""
    return Picked.apply(x, w, ids)  # pyright: ignore[reportReturnType]


class Picked(Rule):
    """z_ik = x_i . W[id_ik]. Saves its arguments."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return rows.picked_fwd(x, w, ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, ids = ctx.saved_tensors
        d_x = PickedInput.apply(g, w, ids) if ctx.needs_input_grad[0] else None
        d_w = PickedWeight.apply(g, x, ids, w.shape[0]) if ctx.needs_input_grad[1] else None
        return d_x, d_w, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor | None, dw: Tensor | None, _: None) -> Any:
        x, w, ids = saved
        return _sum(dx is not None and Picked.apply(dx, w, ids), dw is not None and Picked.apply(x, dw, ids))

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor, ids: Tensor) -> Any:
        (x, ids), w = batch_first(info, (in_dims[0], in_dims[2]), x, ids), _classes(w, in_dims[1])
        ids = _apart(ids, w.shape[0] // info.batch_size if in_dims[1] is not None else 0)
        return Picked.apply(x.flatten(0, 1), w, ids.flatten(0, 1)).unflatten(0, x.shape[:2]), 0


class PickedInput(Rule):
    """dX_i = sum_k c_ik W[id_ik], in W's type. Saves its arguments."""

    @staticmethod
    def forward(c: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return rows.picked_input_bwd(c, w, ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        c, w, ids = ctx.saved_tensors
        d_c = Picked.apply(v, w, ids) if ctx.needs_input_grad[0] else None
        d_w = PickedWeight.apply(c, v, ids, w.shape[0]) if ctx.needs_input_grad[1] else None
        return d_c, d_w, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dc: Tensor | None, dw: Tensor | None, _: None) -> Any:
        c, w, ids = saved
        return _sum(dc is not None and PickedInput.apply(dc, w, ids), dw is not None and PickedInput.apply(c, dw, ids))

    @staticmethod
    def vmap(info: Any, in_dims: Any, c: Tensor, w: Tensor, ids: Tensor) -> Any:
        (c, ids), w = batch_first(info, (in_dims[0], in_dims[2]), c, ids), _classes(w, in_dims[1])
        ids = _apart(ids, w.shape[0] // info.batch_size if in_dims[1] is not None else 0)
        return PickedInput.apply(c.flatten(0, 1), w, ids.flatten(0, 1)).unflatten(0, c.shape[:2]), 0


class PickedWeight(Rule):
    """dW[v] = sum of c_ik x_i over id_ik = v, in the type of x. Saves its arguments."""

    @staticmethod
    def forward(c: Tensor, x: Tensor, ids: Tensor, classes: int) -> Tensor:
        return rows.picked_weight_bwd(c, x, ids, classes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.classes = inputs[3]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        c, x, ids = ctx.saved_tensors
        d_c = Picked.apply(x, v, ids) if ctx.needs_input_grad[0] else None
        d_x = PickedInput.apply(c, v, ids) if ctx.needs_input_grad[1] else None
        return d_c, d_x, None, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dc: Tensor | None, dx: Tensor | None, *_: None) -> Any:
        c, x, ids = saved
        return _sum(
            dc is not None and PickedWeight.apply(dc, x, ids, ctx.classes),
            dx is not None and PickedWeight.apply(c, dx, ids, ctx.classes),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, c: Tensor, x: Tensor, ids: Tensor, classes: int) -> Any:
        c, x, ids = batch_first(info, in_dims, c, x, ids)
        ids, count = _apart(ids, classes), info.batch_size * classes
        out = PickedWeight.apply(c.flatten(0, 1), x.flatten(0, 1), ids.flatten(0, 1), count)
        return out.unflatten(0, (info.batch_size, classes)), 0


def _sum(a: Any, b: Any) -> Any:
    """The sum of those tangents that there are."""
    return b if a is False else a if b is False else a + b


def _classes(w: Tensor, at: int | None) -> Tensor:
    """The examples' classes one below the other."""
    return w if at is None else w.movedim(at, 0).flatten(0, 1)


def _apart(ids: Tensor, classes: int) -> Tensor:
    """The ids of each example among all examples' classes; markers as they are."""
    begin = torch.arange(ids.shape[0], device=ids.device, dtype=torch.int64) * classes
    ids = ids.to(torch.int64)
    return torch.where(ids < 0, ids, ids + begin.reshape(-1, 1, 1))
