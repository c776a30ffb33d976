"""Confident rows whose soft target agrees with the maximum, their classes on several ranks: no digits are lost."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import torch_ops
from tests.parallel.shards import F64, SIZES, Part, check, cut, group, meshes
from torch_ops._parallel import merge

LOGIT, OTHER = 40.0, 1e-6
F32 = 2.0**-24
BOUND = 16 * F32


def rows(classes: int) -> tuple[Tensor, Tensor]:
    """float32 (z, y): each class the maximum of a row, then none, then a tie of the outermost."""
    z, y = torch.zeros(classes + 2, classes), torch.full((classes + 2, classes), OTHER / max(classes - 1, 1))
    at = torch.arange(classes)
    z[at, at], y[at, at] = LOGIT, 1.0 - OTHER
    z[-2] = 0.1 * at
    z[-1, [0, -1]], y[-1, 0], y[-2, -1] = 5.0, 1.0 - OTHER, 1.0 - OTHER
    return z, y


def options_of(classes: int) -> list[dict[str, Any]]:
    """What changes the masses and the maximum; of the last class weights one is nearly all."""
    w = 0.5 + torch.arange(classes) / classes
    heavy = torch.full((classes,), OTHER).index_fill(0, torch.tensor(0), 1.0)
    smooth: Any = {"weight": w, "label_smoothing": OTHER}
    return [{}, {"weight": w}, {"softcap": 20.0}, smooth, {"weight": heavy, "label_smoothing": 1.0}]


def truth(z: Tensor, y: Tensor, w: Tensor | None, cap: float | None, smooth: float) -> tuple[Tensor, Tensor]:
    """The gradient of the summed rows, and what its digits are counted of: the sums that it is the difference of."""
    z, y = z.to(F64), y.to(F64)
    y = (1.0 - smooth) * y + smooth / z.shape[1]
    mass = y if w is None else y * w.to(F64)
    u = z if cap is None else cap * (z / cap).tanh()
    slope = 1.0 if cap is None else 1.0 - (u / cap).square()
    e = (u - u.amax(1, keepdim=True)).exp()
    aside = lambda v: torch.stack([v.index_fill(1, j, 0.0).sum(1) for j in torch.arange(v.shape[1])], 1)  # noqa: E731
    gained = mass.sum(1, keepdim=True) * aside(e) / e.sum(1, keepdim=True)
    lost, p = aside(mass), e / e.sum(1, keepdim=True)
    # S p - mass = aside(mass) - S (1 - p)
    sizes = (lost + gained).where(p > 0.6, mass + mass.sum(1, keepdim=True) * p)
    return (lost - gained) * slope, sizes * slope


def judge(found: Tensor, part: Part | None, options: dict[str, Any], what: str, full: tuple[Tensor, Tensor]) -> None:
    """The gradient of a rank's part, or of all classes."""
    due = truth(*full, options.get("weight"), options.get("softcap"), options.get("label_smoothing", 0.0))
    wanted, sizes = due if part is None else (part.of("z", v) for v in due)
    off = (found.to(F64) - wanted).abs()
    assert (off <= BOUND * sizes).all(), f"{what}: {(off / sizes).max() / F32} roundings"


def of_logits(part: Part, full: tuple[Tensor, Tensor], options: dict[str, Any], again: bool) -> Tensor:
    """The gradient of the rank's logits, `again` where it is to have derivatives."""
    leaf = part.of("z", full[0]).clone().requires_grad_()
    loss = torch_ops.cross_entropy(leaf, part.of("y", full[1]), reduction="sum", group=group(), **_own(part, options))
    return torch.autograd.grad(loss, leaf, create_graph=again)[0].detach()


def of_heads(part: Part, full: tuple[Tensor, Tensor], options: dict[str, Any], again: bool) -> Tensor:
    """The same of heads of one row, which is their bias."""
    found = []
    for row, y in zip(full[0], part.of("y", full[1]), strict=True):
        leaf = part.of("lb", row).clone().requires_grad_()
        given: Any = {"linear_bias": leaf, "reduction": "sum", "group": group(), **_own(part, options)}
        head = torch.zeros(1, 1), torch.zeros(len(leaf), 1)
        loss = torch_ops.linear_cross_entropy(*head, y.unsqueeze(0), **given)
        found.append(torch.autograd.grad(loss, leaf, create_graph=again)[0].detach())
    return torch.stack(found)


def _own(part: Part, options: dict[str, Any]) -> dict[str, Any]:
    return {n: part.of("w", v) if n == "weight" else v for n, v in options.items()}


@check
def what_lies_on_other_ranks_keeps_its_digits() -> None:
    for sizes in SIZES[dist.get_world_size()]:
        part, full = Part(sizes), rows(sum(sizes))
        for options, again in itertools.product(options_of(sum(sizes)), (False, True)):
            what = f"{sizes} {options} again={again}"
            judge(of_logits(part, full, options, again), part, options, what, full)
            for memory in ("fast", "lean"):
                how: Any = {**options, "memory": memory, "chunk_size": 2}
                judge(of_heads(part, full, how, again), part, options, f"{what} {memory}", full)


@check
def what_lies_on_other_ranks_of_a_mesh_keeps_its_digits() -> None:
    full = rows(6)
    for i, (mesh, _, classes) in enumerate(meshes()):
        for options in options_of(6):
            z, y = (cut(v, mesh, *classes(1)) for v in full)
            more: Any = {n: cut(v, mesh, *classes(0)) if n == "weight" else v for n, v in options.items()}
            loss: Any = torch_ops.cross_entropy(z, y, reduction="sum", **more)
            (found,) = torch.autograd.grad(loss, z)
            judge(found.full_tensor(), None, options, f"mesh {i} {options}", full)  # pyright: ignore


@check
def all_less_a_ranks_own_is_seen() -> None:
    """The saboteur: on every rank, the one that holds the maximum too, the others' part is a difference."""
    world = dist.get_world_size()
    part, full = Part((3,) * world), rows(3 * world)
    difference: Any = lambda name, total, own, _: total[name] - own[name]  # noqa: E731
    for options in (options_of(3 * world)[0], options_of(3 * world)[-1]):
        with mock.patch.object(merge, "_of_others", difference):
            found = of_logits(part, full, options, False)
        told = ""
        try:
            judge(found, part, options, "a difference", full)
        except AssertionError as e:
            told = str(e)
        told = torch.tensor(float("roundings" in told))
        dist.all_reduce(told)
        assert told > 0 or world == 1, f"{[*options]}: nobody saw a difference"
