"""Targets of K classes a row, and sampled gradients, on many devices: as tests/parallel/groups.py."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate

import torch_ops
from tests.parallel.groups import EVERY, SIZES
from tests.parallel.meshes import agree, both
from tests.parallel.shards import (
    Fn,
    N,
    Part,
    arrays,
    check,
    compare,
    cut,
    group,
    meshes,
    outputs,
    plainly,
    same,
    targets,
)
from torch_ops._parallel import sampled

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("everything", {**EVERY, "stats": ("lse", "entropy", "argmax")}),
    ("logprob", {"softcap": 5.0, "reduction": "none", "stats": ("logprob",)}),
]
LOSSES: Any = torch_ops


def ids_of(classes: int) -> Tensor:
    """Ids of every shard, equal ones, an ignored slot and an ignored row."""
    ids = torch.arange(N)[:, None] * 3 + torch.tensor([0, 1, classes // 2, classes - 1, 0])
    ids = ids % classes
    ids[1, 2], ids[4] = -100, -100
    return ids


def _probabilities() -> Tensor:
    g = torch.Generator().manual_seed(9)
    return torch.rand(N, 5, generator=g, dtype=torch.float64)


def _logits(ids: Tensor, options: dict[str, Any], over: Any) -> Fn:
    def fn(z: Tensor, v: Tensor, w: Any = None, tw: Any = None) -> tuple[Tensor, ...]:
        return outputs(LOSSES.cross_entropy(z, (ids, v), w, token_weight=tw, group=over, **options))

    return fn


def _head(ids: Tensor, options: dict[str, Any], over: Any) -> Fn:
    def fn(x: Tensor, lw: Tensor, v: Tensor, lb: Any = None, w: Any = None, tw: Any = None) -> tuple[Tensor, ...]:
        given = {"linear_bias": lb, "weight": w, "token_weight": tw, "group": over}
        return outputs(LOSSES.linear_cross_entropy(x, lw, (ids, v), **given, **options))

    return fn


@check
def pairs_equal_the_unsharded_loss() -> None:
    each: Any = itertools.product(SIZES[dist.get_world_size()], OPTIONS)
    for sizes, (name, options) in each:
        ids, full, part = ids_of(sum(sizes)), {**arrays(sum(sizes)), "v": _probabilities()}, Part(sizes)
        orders = 1 + (name == "everything" and len(sizes) == 2)
        for more in ((), ("w", "tw")):
            own = {n: full[n] for n in ("z", "v", *more)}
            what = f"pairs {sizes} {name} {more}"
            compare(_logits(ids, options, None), _logits(ids, options, group()), own, part, what, orders=orders)
        for memory in ("fast", "lean"):
            given = {**options, "memory": memory, "chunk_size": 3}
            own = {n: full[n] for n in ("x", "lw", "v", "lb", "w", "tw")}
            what = f"head of pairs {sizes} {name} {memory}"
            compare(_head(ids, given, None), _head(ids, given, group()), own, part, what, orders=1)


@check
def pairs_on_masked_classes() -> None:
    """Infinite nll where mass stands on a class of -inf, nothing where none does, shards all -inf."""
    for sizes in SIZES[dist.get_world_size()]:
        classes, part = sum(sizes), Part(sizes)
        z = arrays(classes)["z"]
        z[0, 0], z[4, : classes // 2], z[5, classes // 2 :] = -torch.inf, -torch.inf, -torch.inf
        z[2], z[3, -1], z[6, 0] = -torch.inf, torch.nan, torch.inf
        ids = ids_of(classes)
        ids[4:6] = torch.tensor([0, classes - 1, 0, 0, 0])
        v = torch.ones(N, 5, dtype=torch.float64)
        v[5, 1] = v[4, 0] = v[4, 2:] = 0.0
        for options in ({"reduction": "none", "stats": ("logprob",)}, {"reduction": "none", "label_smoothing": 0.1}):
            whole, mine = _logits(ids, options, None), _logits(ids, options, group())
            found, due = mine(part.of("z", z), v), whole(z, v)
            for a, b in zip(found, due, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, equal_nan=True)
        good = {"z": z.index_select(0, torch.tensor([1, 5])), "v": v[[1, 5]]}
        given = {"reduction": "none"}
        compare(_logits(ids[[1, 5]], given, None), _logits(ids[[1, 5]], given, group()), good, part, "masked", orders=1)


@check
def pairs_of_dtensors() -> None:
    full, ids = arrays(8), ids_of(8)
    v0 = _probabilities()
    for i, (mesh, rows, classes) in enumerate(meshes()):
        for reduction in ("mean", "none"):
            given = {**EVERY, "reduction": reduction}
            theirs = plainly(lambda z, w, v: LOSSES.cross_entropy(z, (ids, v), w, **given), full["z"], full["w"], v0)  # noqa: B023
            z, w = cut(full["z"], mesh, *both(rows(0), classes(1))), cut(full["w"], mesh, *classes(0))
            v = cut(v0, mesh, *rows(0))
            loss, stats = LOSSES.cross_entropy(z, (ids, v), w, stats=("logprob",), **given)
            loss.sum().backward()
            agree(theirs, loss, [z, w, v], f"pairs on mesh {i}, {reduction}")
            assert stats["logprob"].shape == ids.shape
            due = LOSSES.cross_entropy(full["z"], (ids, v0), full["w"], stats=("logprob",), **given)[1]["logprob"]
            torch.testing.assert_close(stats["logprob"].full_tensor(), due)
        theirs = plainly(lambda x, lw, v: LOSSES.linear_cross_entropy(x, lw, (ids, v)), full["x"], full["lw"], v0)
        x, lw, v = cut(full["x"], mesh, *rows(0)), cut(full["lw"], mesh, *classes(0)), cut(v0, mesh, *rows(0))
        loss = LOSSES.linear_cross_entropy(x, lw, (cut(ids, mesh, *rows(0)), v))
        loss.backward()
        agree(theirs, loss, [x, lw, v], f"a head of pairs on mesh {i}")
        assert [*loss.placements] == [Replicate()] * mesh.ndim


SAMPLED: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("none", {"reduction": "none", "z_loss": 0.1, "logit_scale": 0.7, "stats": ("lse", "argmax")}),
    ("cap", {"softcap": 4.0, "stats": ("entropy",), "reduction": "sum"}),
    ("smooth", {"label_smoothing": 0.2, "stats": ("entropy",)}),
]


def _sampled(target: Any, options: dict[str, Any], over: Any) -> Fn:
    def fn(x: Tensor, lw: Tensor, lb: Tensor, tw: Tensor) -> tuple[Tensor, ...]:
        # Each rank's own generator is in a state of its own: the points are one rank's.
        seed = 5 + (dist.get_rank() if over is not None else 0)
        g = torch.Generator().manual_seed(seed)
        given = {"linear_bias": lb, "token_weight": tw, "group": over, "grad_samples": 8, "generator": g}
        return outputs(LOSSES.linear_cross_entropy(x, lw, target, chunk_size=3, **given, **options))

    return fn


def _agree_sampled(sizes: tuple[int, ...], name: str, options: dict[str, Any], t: Any) -> None:
    """Compared with the one-device call, gradient by gradient."""
    classes, part, found = sum(sizes), Part(sizes), []
    full = {n: arrays(classes)[n] for n in ("x", "lw", "lb", "tw")}
    for fn, cut_ in ((_sampled(t, options, None), False), (_sampled(t, options, group()), True)):
        leaves = {n: (part.of(n, v) if cut_ else v).clone().requires_grad_() for n, v in full.items()}
        values = fn(**leaves)
        up = [torch.cos(torch.arange(v.numel()).double()).reshape(v.shape) for v in values]
        total = sum((v * c).sum() for v, c in zip(values, up, strict=True) if v.is_floating_point())
        found.append([*values, *torch.autograd.grad(total, [*leaves.values()])])  # pyright: ignore
    names = [*[f"value {i}" for i in range(len(found[0]) - 4)], *full]
    for which, a, b in zip(names, found[1], found[0], strict=True):
        same(a, part.of(which, b), f"sampled {sizes} {name} {which} pair={isinstance(t, tuple)}")


@check
def sampled_gradients_are_those_of_one_device() -> None:
    """The same points whatever rank a class is on."""
    each: Any = itertools.product(SIZES[dist.get_world_size()], SAMPLED)
    for sizes, (name, options) in each:
        for t in (targets(sum(sizes)), (ids_of(sum(sizes)), _probabilities())):
            _agree_sampled(sizes, name, options, t)


@check
def ranks_that_draw_points_of_their_own_are_seen() -> None:
    """A saboteur: each rank takes the points of its own generator."""
    sizes = SIZES[dist.get_world_size()][0]
    shared, seen = sampled.of_first, []
    sampled.of_first = lambda u, group: u
    try:
        _agree_sampled(sizes, *SAMPLED[1], targets(sum(sizes)))
    except AssertionError:
        seen.append(dist.get_rank())
    finally:
        sampled.of_first = shared
    assert seen == ([dist.get_rank()] if dist.get_world_size() > 1 else []), "nobody saw points of many generators"


@check
def sampled_gradients_of_dtensors() -> None:
    full, t = arrays(8), targets(8)
    for i, (mesh, rows, classes) in enumerate(meshes()):
        x, lw = cut(full["x"], mesh, *rows(0)), cut(full["lw"], mesh, *classes(0))
        torch.manual_seed(0)
        loss = LOSSES.linear_cross_entropy(x, lw, cut(t, mesh, *rows(0)), grad_samples=6)
        dx, dw = torch.autograd.grad(loss, [x, lw])
        theirs = plainly(lambda x, lw: LOSSES.linear_cross_entropy(x, lw, t), full["x"], full["lw"])
        same(loss.full_tensor(), theirs[0], f"sampled loss on mesh {i}")
        # The gradient of all classes' logits sums to 0 in every row, and so does its product with a constant.
        dx, dw = dx.full_tensor(), dw.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        same(dw.sum(0), torch.zeros_like(dw[0]), f"sampled dW on mesh {i}", 1e-10)
        assert torch.isfinite(dx).all()
        assert float((dw - theirs[1][1]).norm() / theirs[1][1].norm()) < 1.0, f"mesh {i}"
