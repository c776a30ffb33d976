"""Second derivatives of confident rows, their classes on several ranks: each entry has the digits of its own terms."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import torch_ops
from tests.parallel.shards import F64, SIZES, Part, check, group
from torch_ops._parallel.distribution import Pulled, Whole

LOGIT = 20.0
F32 = 2.0**-24
BOUND = 96.0
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 30.0}, {"label_smoothing": 0.1, "z_loss": 0.1}]


def rows(classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 (z, v, t, y): each class the maximum of a row, where the direction v has least of what all have."""
    z, at = 0.25 * torch.arange(1.0, classes + 1).expand(classes, classes).clone(), torch.arange(classes)
    v = 3.0 + 0.125 * torch.arange(1.0, classes * classes + 1).reshape(classes, classes)
    y = torch.full((classes, classes), 1e-6)
    z[at, at], v[at, at], y[at, at] = LOGIT, 3.0, 1.0
    return z, v, at, y


def product(z: Tensor, v: Tensor, target: Tensor, head: Tensor | None, **options: Any) -> Tensor:
    """The Hessian's product with v of the summed rows, by logits or by a head that they are the weight of."""
    leaf = z.clone().requires_grad_()
    if head is None:
        loss: Any = torch_ops.cross_entropy(leaf, target, reduction="sum", **options)
        along = v
    else:
        loss, along = torch_ops.linear_cross_entropy(head, leaf.T, target, reduction="sum", **options), v
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return torch.autograd.grad(first, leaf, along)[0]


def worst(part: Part, classes: int, memory: str | None, soft: bool, options: dict[str, Any]) -> float:
    """How many roundings an entry of this rank's is off, at most."""
    z, v, t, y = rows(classes)
    target = y if soft else t
    right = part.of("z", product(z.to(F64), v.to(F64), target.to(F64) if soft else t, None, **options))
    head = None if memory is None else torch.eye(classes)
    how = {} if memory is None else {"memory": memory, "chunk_size": 2}
    given = part.of("y", y) if soft else t
    found = product(part.of("z", z), part.of("z", v), given, head, group=group(), **how, **options)
    assert right.all()
    return float(((found.to(F64) - right) / right).abs().max() / F32) if right.numel() else 0.0


@check
def second_derivatives_of_confident_rows_keep_their_digits() -> None:
    for sizes in SIZES[dist.get_world_size()]:
        part, classes = Part(sizes), sum(sizes)
        if classes < 3:  # nothing lies beside the maximum, or one class
            continue
        for memory, soft, options in itertools.product((None, "fast", "lean"), (False, True), OPTIONS):
            off = worst(part, classes, memory, soft, options)
            assert off <= BOUND, f"{sizes} {memory} soft={soft} {options}: {off} roundings"


@check
def a_mass_less_nearly_all_of_it_is_seen() -> None:
    """The saboteur: k - p sum(k) at the maximum too, which a cap's second derivative is multiplied by."""
    world = dist.get_world_size()
    part, classes = Part((3,) * world), 3 * world

    def plain(ctx: Any, k: Tensor, p: Tensor, whole: Whole) -> Tensor:
        ctx.whole = whole
        ctx.save_for_backward(k, p)
        return k - p * whole.sums(k)[0]

    for memory in (None, "lean"):
        with mock.patch.object(Pulled, "forward", staticmethod(plain)):
            off = torch.tensor(worst(part, classes, memory, False, {"softcap": 30.0}))
        dist.all_reduce(off, op=dist.ReduceOp.MAX)
        assert off > 100 * BOUND, f"{memory}: nobody saw it: {off}"


@check
def half_precision_is_as_exact_as_one_device() -> None:
    world = dist.get_world_size()
    part, classes = Part((4,) * world), 4 * world
    z, v, t, _ = (x.bfloat16() if x.is_floating_point() else x for x in rows(classes))
    right = product(z.to(F64), v.to(F64), t, None)
    size = right.abs()
    one = ((product(z, v, t, None).to(F64) - right).abs() / size).max()
    mine = product(part.of("z", z), part.of("z", v), t, None, group=group()).to(F64)
    off = ((mine - part.of("z", right)).abs() / part.of("z", size)).max()
    assert off <= max(1.5 * float(one), 2.0**-8), f"{off}, not {one}"


NEAR, FAR = (
    1.0 + 2.0**-12 * torch.arange(8).reshape(1, 8).float() ** 1.5,
    1e4 + torch.linspace(-1.0, 2.0, 8).reshape(1, 8),
)
SCALE = 0.7


def slanted(z: Tensor, memory: str | None, over: Any) -> Tensor:
    """The gradient of log sum p^2 by the logits, or by a head that they are the weight of."""
    leaf, t = z.clone().requires_grad_(), torch.zeros(len(z), dtype=torch.int64)
    how: Any = {"stats": ("log_sum_sq",), "reduction": "none", "logit_scale": SCALE, "group": over}
    if memory is None:
        _, found = torch_ops.cross_entropy(leaf, t, **how)
    else:
        one, how["memory"] = torch.ones(1, 1, dtype=z.dtype), memory
        _, found = torch_ops.linear_cross_entropy(one, leaf.T, t, **how)
    return torch.autograd.grad(found["log_sum_sq"].sum(), leaf)[0]


def two_rows(z: Tensor, over: Any) -> Tensor:
    """The same as two nll's of the largest class, of z and of 2 z."""
    leaf, top = z.clone().requires_grad_(), torch.full((len(z),), 7)
    nll: Any = lambda scale: torch_ops.cross_entropy(leaf, top, logit_scale=scale, group=over, reduction="sum")  # noqa: E731
    return torch.autograd.grad(nll(2 * SCALE) - 2.0 * nll(SCALE), leaf)[0]


@check
def log_sum_sq_over_ranks_keeps_its_digits() -> None:
    for z in (NEAR, FAR):
        right = slanted(z.to(F64), None, None)
        size, seen = right.abs().max() * F32, torch.zeros(())
        for sizes in SIZES[dist.get_world_size()]:
            part = Part((*sizes[:-1], 8 - sum(sizes[:-1])))
            for memory in (None, "fast", "lean"):
                off = (slanted(part.of("z", z), memory, group()).to(F64) - part.of("z", right)).abs()
                assert (off <= 64 * size).all(), f"{z[0, :2]} {sizes} {memory}: {off / size} roundings"
            lost = (two_rows(part.of("z", z), group()).to(F64) - part.of("z", right)).abs()
            seen = torch.maximum(seen, (lost > 256 * size).any().to(seen.dtype))
        dist.all_reduce(seen)
        assert seen > 0, "the saboteur, rows rounded apart: nobody saw it"
