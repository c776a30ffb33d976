"""What a call on several devices asks before its rows: where everything is, whether the ranks mean the same call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from softmax_ext import contract
from torch_ops import _modes as modes
from torch_ops._parallel.collectives import maximum
from torch_ops._parallel.mesh import Place
from torch_ops._parallel.shard import Shard, shard_of

_T = TypeVar("_T")


def place_of(op: str, arrays: dict[str, Any], group: Any) -> Place | None:
    """The place of plain tensors of a group; None for DTensor arguments, who know their own."""
    if group is not None and (not isinstance(group, getattr(dist, "ProcessGroup", ())) or dist.get_rank(group) < 0):
        rule = "be a torch.distributed.ProcessGroup that this process belongs to, or None"
        got = repr(group) if isinstance(group, int | str) else f"{type(group).__name__} object"
        contract.fail_type(op, "group", rule, got)
    on_mesh = modes.is_on_mesh(*arrays.values())
    if group is not None and on_mesh:
        contract.fail_value(op, "group", "be None with DTensor arguments, which have their own", "a ProcessGroup")
    if modes.is_transforming():
        rule = "not be inside torch.func or forward-mode transforms, which messages between ranks cannot pass"
        contract.fail_value(op, "input" if on_mesh else "group", rule, "such a call")
    return None if on_mesh else Place(group, dist.get_rank(group), ())


def shard_here(
    op: str, place: Place, count: int, number: int, target: Tensor, classes: int, name: str = "target"
) -> Shard | None:
    """This rank's shard of `count` classes and `number` rows; the ranks compare `target`, whose name is `name`."""
    if place.group is None:
        return None
    widest = None if place.mesh is None else -(-classes // dist.get_world_size(place.group))
    find = partial(shard_of, op, place.group, place.position, count, number, target, widest, name)
    return together(place, target, find, partial(contract.rows_differ_elsewhere, op))


def together(place: Place, target: Tensor, step: Callable[[], _T], elsewhere: Callable[[], Exception]) -> _T:
    """step(); where it raises for the rows of another rank, this rank raises with it: it would wait in vain."""
    if not place.row_groups or not modes.can_look(target):
        return step()
    error, found = None, None
    try:
        found = step()
    except ValueError as mistake:  # an index error of the contract is one too
        error = mistake
    wrong = torch.tensor(float(error is not None))
    for group in place.row_groups:
        wrong = maximum(wrong, group)
    if error is not None or wrong:
        raise error or elsewhere()
    return found  # pyright: ignore[reportReturnType]
