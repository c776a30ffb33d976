"""DTensor arguments: which mesh dimension holds classes and which rows, and the local tensors to compute on.

Plain tensors among them count as replicated. Small arrays are moved to where the logits or the head are; the head and
the logits themselves never are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from softmax_ext import contract
from torch_ops._modes import is_on_mesh
from torch_ops._parallel.collectives import shared


class Place(NamedTuple):
    """Where the classes and the rows of a call are."""

    group: Any  # over which the classes are sharded; None: all are here
    position: int  # of this rank's shard
    row_groups: tuple[Any, ...]  # over which rows are sharded
    mesh: Any = None
    rows: tuple[Any, ...] = ()  # placements of row-shaped results

    def result(self, value: Tensor, shape: Sequence[int], along: int | None = None) -> Tensor:
        """A row-shaped result, or a scalar (shape ()), as the arguments are: DTensor or plain.

        `along`: the dimension that holds K numbers a row.
        """
        if self.mesh is None:
            return value
        from torch.distributed.tensor import DTensor, Replicate, Shard

        where: Any = self.rows if shape else [Replicate()] * self.mesh.ndim
        if along is not None:
            where = [Shard(p.dim + (p.dim >= along)) if type(p) is Shard else p for p in where]
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(value, self.mesh, where, run_check=False, shape=tuple(shape), stride=stride)  # pyright: ignore


def logits_place(op: str, arrays: dict[str, Any], *, axis: int, soft: bool = False) -> tuple[Place, list[Any]]:
    """The place of a loss of logits with class dimension `axis`, and its local arrays."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, rule = _mesh(op, arrays), "be replicated or sharded, its classes on one mesh dimension at most"
    found = _placements(arrays["input"], mesh)
    for p in found:
        if type(p) not in (Replicate, Shard):
            contract.fail_value(op, "input", rule, f"placements {found}")
    classes = [i for i, p in enumerate(found) if type(p) is Shard and p.dim % arrays["input"].dim() == axis]
    if len(classes) > 1:
        contract.fail_value(op, "input", rule, f"placements {found}")
    many = [p if i not in classes else Replicate() for i, p in enumerate(found)]
    rows = [Shard(p.dim - (p.dim > axis)) if type(p) is Shard else p for p in many]
    by_class = [Shard(0) if i in classes else Replicate() for i in range(mesh.ndim)]
    place = _place(mesh, classes, rows)
    pair, s = arrays.get("probabilities") is not None, arrays["logit_scale"]
    wanted = {
        "input": found,
        "teacher": found,
        "target": found if soft else many if pair else rows,
        "weight": by_class,
        "token_weight": rows,
        "keep": rows,
        "logit_scale": rows if s is not None and s.dim() else [Replicate()] * mesh.ndim,
        "probabilities": many,
    }
    return place, [_local(n, a, wanted[n], place) for n, a in arrays.items()]


def head_place(
    op: str, arrays: dict[str, Any], *, axis: int, shift: int, soft: bool = False
) -> tuple[Place, list[Any]]:
    """The place of a loss of a linear head whose logits have class dimension `axis`, and its local arrays."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, x = _mesh(op, arrays), arrays["input"]
    found = _placements(arrays["linear_weight"], mesh)
    classes = [i for i, p in enumerate(found) if type(p) is Shard and p.dim == 0]
    if len(classes) > 1 or any(type(p) is not Replicate for i, p in enumerate(found) if i not in classes):
        rule = "be replicated or sharded by its classes on one mesh dimension"
        contract.fail_value(op, "linear_weight", rule, f"placements {found}")
    # Rows that lie on the head's own mesh dimension are gathered: N D numbers for V D that stay where they are.
    rows: list[Any] = [
        p if i not in classes and type(p) is Shard and p.dim < x.dim() - 1 else Replicate()
        for i, p in enumerate(_placements(x, mesh))
    ]
    if shift and any(type(p) is Shard and p.dim == x.dim() - 2 for p in rows):
        contract.fail_value(op, "shift", "be 0 with rows sharded along the shifted dimension", repr(shift))
    by_class = [Shard(0) if i in classes else Replicate() for i in range(mesh.ndim)]
    full = [Shard(axis) if i in classes else p for i, p in enumerate(rows)]
    nowhere: list[Any] = [Replicate()] * mesh.ndim
    place = _place(mesh, classes, rows)
    wanted = {
        "input": rows,
        "linear_weight": by_class,
        "target": full if soft else rows,
        "linear_bias": by_class,
        "teacher_input": rows,
        "teacher_weight": by_class,
        "teacher_bias": by_class,
        "weight": by_class,
        "token_weight": rows,
        "keep": rows,
        "logit_scale": rows if arrays["logit_scale"] is not None and arrays["logit_scale"].dim() else nowhere,
        "A": nowhere,
        "B": by_class,
        "probabilities": rows,
    }
    return place, [_local(n, a, wanted[n], place) for n, a in arrays.items()]


def _mesh(op: str, arrays: dict[str, Any]) -> Any:
    first = next(a for a in arrays.values() if is_on_mesh(a))
    for name, a in arrays.items():
        if is_on_mesh(a) and a.device_mesh != first.device_mesh:
            contract.fail_value(op, name, f"be on one device mesh ({first.device_mesh})", str(a.device_mesh))
    return first.device_mesh


def _placements(x: Any, mesh: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate

    return list(x.placements) if is_on_mesh(x) else [Replicate()] * mesh.ndim


def _place(mesh: Any, classes: list[int], rows: list[Any]) -> Place:
    groups = tuple(mesh.get_group(i) for i, p in enumerate(rows) if p.is_shard())
    if not classes:
        return Place(None, 0, groups, mesh, tuple(rows))
    (at,) = classes
    return Place(mesh.get_group(at), mesh.get_local_rank(at), groups, mesh, tuple(rows))


def _local(name: str, x: Any, wanted: list[Any], place: Place) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    if x is None:
        return None
    mesh = place.mesh
    if not is_on_mesh(x) and any(type(p) is not Replicate for p in wanted):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if is_on_mesh(x):
        x = (x if list(x.placements) == wanted else x.redistribute(mesh, wanted)).to_local()
    of_all_rows = name in ("weight", "linear_weight", "linear_bias", "A", "B") or not x.dim()
    return shared(x, *place.row_groups) if of_all_rows and x.requires_grad else x
