"""What logits are made of, as a formula: which operations it can hold, and the loss that takes it whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_ext import contract
from torch_ops._arguments import describe, enter_graph, one_row
from torch_ops._head.loss import ARRAYS, OP, loss_of
from torch_ops._modes import is_on_mesh
from torch_ops.linear_cross_entropy import linear_cross_entropy

Term = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Recipe:
    """cap * tanh(scale * sum_k (x_k W_kT + b_k)), or without a cap scale * sum_k (x_k W_kT + b_k)."""

    terms: tuple[Term, ...]
    scale: float = 1.0
    cap: float | None = None

    def rows(self, take: Callable[[Tensor], Tensor]) -> Recipe:
        """Other leading dimensions, which are the input's."""
        return replace(self, terms=tuple([(take(x), w, b) for x, w, b in self.terms]))

    def classes(self, stop: int) -> Recipe:
        """The first classes only."""
        return replace(self, terms=tuple([(x, w[:stop], None if b is None else b[:stop]) for x, w, b in self.terms]))

    def loss(self, target: Tensor, weight: Tensor | None, options: dict[str, Any]) -> Tensor:
        """F.cross_entropy of the logits, in nats."""
        x = self.terms[0][0]
        of_logits: dict[str, Any] = {"logit_scale": self.scale}
        if self.cap is not None:
            of_logits = {"logit_scale": self.scale * self.cap, "softcap": self.cap}
        how: dict[str, Any] = {**options, **of_logits}
        # The arrays are in the types of the head's call already, whatever autocast says by now.
        with torch.autocast(x.device.type, enabled=False):
            many = len(self.terms) > 1 and how["grad_samples"] is None
            if many and not is_on_mesh(*(a for term in self.terms for a in term)):
                return _of_terms(self.terms, target, weight, **how)
            x, linear_weight, linear_bias = _one_layer(self.terms)
            return linear_cross_entropy(x, linear_weight, target, linear_bias=linear_bias, weight=weight, **how)


def loss_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """That of F.cross_entropy of such logits under the autocast that is on."""
    if dtype.itemsize >= 4 and not torch.is_autocast_enabled(device.type):
        return dtype
    target = torch.zeros(1, dtype=torch.int64, device=device)
    return F.cross_entropy(torch.zeros((1, 2), dtype=dtype, device=device), target).dtype


def _of_terms(terms: tuple[Term, ...], target: Tensor, weight: Any, **options: Any) -> Any:
    """linear_cross_entropy of the sum of some layers: nothing of the first one's weight is copied."""
    (x, lw, lb), *others = terms
    target = one_row(x, lw, target, None)
    static: Any = {"shift": 0, "memory": options.pop("memory"), "chunk_size": options.pop("chunk_size")}
    del options["grad_samples"]  # None
    chosen = contract.LossOptions(**options)
    facts = [None if a is None else describe(a) for a in (x, lw, target, lb, weight, None)]
    soft = contract.linear_loss(OP, *facts, options=chosen, **static)
    enter_graph()
    biases = [b.to(lw.dtype) for _, _, b in terms if b is not None]
    beside = [torch.cat([a.to(lw.dtype) for a in side], -1) for side in list(zip(*others, strict=True))[:2]]
    named: dict[str, Any] = dict.fromkeys(ARRAYS) | {
        "input": x,
        "linear_weight": lw,
        "target": target,
        "weight": weight,
    }
    named["linear_bias"] = sum(biases[1:], biases[0]) if biases else None
    return loss_of(named, chosen, soft=soft, **static, beside=beside)


def _one_layer(terms: tuple[Term, ...]) -> Term:
    """sum_k (x_k W_kT + b_k) as one layer: inputs and weights side by side, in the first one's type."""
    if len(terms) == 1:
        return terms[0]
    weight = terms[0][1]
    biases = [b.to(weight.dtype) for _, _, b in terms if b is not None]
    return (
        torch.cat([x.to(weight.dtype) for x, _, _ in terms], -1),
        torch.cat([w.to(weight.dtype) for _, w, _ in terms], -1),
        sum(biases[1:], biases[0]) if biases else None,
    )


def _unscaled(recipe: Recipe) -> tuple[Term, ...]:
    """The terms with the scale multiplied into them."""
    by = recipe.scale
    return (
        recipe.terms if by == 1.0 else tuple([(x * by, w, None if b is None else b * by) for x, w, b in recipe.terms])
    )


# The operations. Each takes the recipe of z, z (for its shape and type) and the operation's further arguments, among
# them the recipe of another tensor of logits in that tensor's place; None where the formula cannot hold the result.


def _is_number(by: Any) -> bool:
    return isinstance(by, int | float) and not isinstance(by, bool) and 0.0 < by < math.inf


def _mul(recipe: Recipe, z: Tensor, by: Any, *more: Any) -> Recipe | None:
    """By a positive number; the outermost factor takes it."""
    if more or not _is_number(by):
        return None
    return replace(recipe, scale=recipe.scale * by) if recipe.cap is None else replace(recipe, cap=recipe.cap * by)


def _div(recipe: Recipe, z: Tensor, by: Any, *more: Any) -> Recipe | None:
    if more or not _is_number(by):
        return None
    return replace(recipe, scale=recipe.scale / by) if recipe.cap is None else replace(recipe, cap=recipe.cap / by)


def _tanh(recipe: Recipe, z: Tensor, *more: Any) -> Recipe | None:
    return replace(recipe, cap=1.0) if recipe.cap is None and not more else None


def _add(recipe: Recipe, z: Tensor, other: Any, *more: Any) -> Recipe | None:
    """Another linear layer (a low-rank adapter beside the head), or a bias of every row."""
    if recipe.cap is not None or more:
        return None
    if isinstance(other, Recipe):
        shapes = [(*x.shape[:-1], w.shape[0]) for x, w, _ in (recipe.terms[0], other.terms[0])]
        if other.cap is not None or shapes[0] != shapes[1]:
            return None
        return Recipe(_unscaled(recipe) + _unscaled(other))
    if not isinstance(other, Tensor) or other.layout != torch.strided or not other.is_floating_point():
        return None
    if other.shape[-1:] != z.shape[-1:] or other.dim() > z.dim() or other.numel() != z.shape[-1] or z.dim() < 2:
        return None
    if other.device != z.device:
        return None
    terms = _unscaled(recipe)
    x, weight, bias = terms[0]
    added = other.reshape(-1).to(weight.dtype)
    return Recipe(((x, weight, added if bias is None else bias + added), *terms[1:]))


def _to(recipe: Recipe, z: Tensor, *args: Any, **kwargs: Any) -> Recipe | None:
    """Another floating type on the device it is on."""
    if kwargs.get("copy") or set(kwargs) - {"dtype", "device", "non_blocking", "copy"}:
        return None
    wanted: list[Any] = [*args, kwargs.get("dtype"), kwargs.get("device")]
    for a in wanted:
        if isinstance(a, torch.dtype):
            if not a.is_floating_point:
                return None
        elif isinstance(a, str | torch.device):
            if torch.device(a) != z.device:
                return None
        elif a is not None and not isinstance(a, bool):
            return None
    return recipe


def _same(recipe: Recipe, z: Tensor, **memory_format: Any) -> Recipe:
    """Another type, or another memory."""
    return recipe


def _view(recipe: Recipe, z: Tensor, *shape: Any) -> Recipe | None:
    """Other leading dimensions over the same classes."""
    asked: tuple[Any, ...] = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    if not asked or not all(isinstance(n, int | torch.SymInt) for n in asked):
        return None
    *lead, last = asked
    if last == -1 and math.prod(lead) == math.prod(z.shape[:-1]):
        last = z.shape[-1]
    if last != z.shape[-1] or z.shape[-1] == 0:
        return None
    return recipe.rows(lambda x: x.reshape(*lead, x.shape[-1]))


def _flatten(recipe: Recipe, z: Tensor, start_dim: int = 0, end_dim: int = -1) -> Recipe | None:
    if not 0 <= start_dim < end_dim % z.dim() < z.dim() - 1:
        return None
    return recipe.rows(lambda x: x.flatten(start_dim, end_dim))


def _index(recipe: Recipe, z: Tensor, index: Any) -> Recipe | None:
    """Some of the rows, by any index; of the classes all, or the first of them."""
    split = _rows_and_classes(index if isinstance(index, tuple) else (index,), z.dim())
    if split is None:
        return None
    rows, classes = split
    if classes is not None and classes < z.shape[-1]:
        recipe = recipe.classes(classes)
    return recipe.rows(lambda x: x[(*rows, slice(None))])


def _rows_and_classes(index: tuple[Any, ...], ndim: int) -> tuple[tuple[Any, ...], int | None] | None:
    """(an index for every leading dimension, how many classes if not all); None where it says more of the classes."""
    if any(isinstance(i, Recipe | bool) for i in index):
        return None
    dots = [i for i, at in enumerate(index) if at is Ellipsis]  # `in` would ask tensors for ==
    left = ndim - sum([_dimensions(at) for at in index])
    if left < 0 or len(dots) > 1:
        return None
    at = dots[0] if dots else len(index)
    *rows, classes = (*index[:at], *[slice(None)] * left, *index[at + 1 :])
    if not isinstance(classes, slice) or classes.step not in (None, 1) or classes.start not in (None, 0):
        return None
    stop = classes.stop
    return None if stop is not None and (not isinstance(stop, int) or stop < 0) else (tuple(rows), stop)


def _dimensions(at: Any) -> int:
    """How many dimensions a part of an index stands for."""
    if at is None or at is Ellipsis:
        return 0
    return at.dim() if isinstance(at, Tensor) and at.dtype in (torch.bool, torch.uint8) else 1


STEPS: dict[Any, Callable[..., Recipe | None]] = {
    **dict.fromkeys((torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.mul_), _mul),
    **dict.fromkeys((torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.div_), _div),
    **dict.fromkeys((Tensor.true_divide, Tensor.__truediv__), _div),
    **dict.fromkeys((torch.tanh, Tensor.tanh, F.tanh), _tanh),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_), _add),
    Tensor.to: _to,
    **dict.fromkeys((Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16), _same),
    **dict.fromkeys((Tensor.contiguous, Tensor.clone, torch.clone), _same),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _view),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    Tensor.__getitem__: _index,
}
