"""Losses of DTensors, and of models under DDP and FSDP."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import torch_ops
from softmax_ext import contract
from tests.parallel.shards import (
    EVERY,
    F64,
    SIZES,
    D,
    Messages,
    N,
    Part,
    arrays,
    check,
    compare,
    cut,
    group,
    head_loss,
    logits_loss,
    meshes,
    plainly,
    raises,
    same,
    targets,
)
from torch_ops import _modes
from torch_ops._parallel import call as asked


def agree(theirs: tuple[Tensor, list[Tensor]], loss: Any, leaves: list[Any], what: str) -> None:
    """A DTensor loss and its gradients, each placed as its leaf, against the plain loss and gradients."""
    same(loss.full_tensor(), theirs[0], f"{what}, loss")
    for i, (leaf, g) in enumerate(zip(leaves, theirs[1], strict=True)):
        assert leaf.grad.placements == leaf.placements, f"{what}: {leaf.grad.placements}"
        same(leaf.grad.full_tensor(), g, f"{what}, gradient {i}")


def both(rows: Any, classes: Any) -> list[Any]:
    return [c if isinstance(c, Shard) else r for r, c in zip(rows, classes, strict=True)]


@check
def dtensor_logits_stay_where_they_are() -> None:
    full, t = arrays(8), targets(8)
    for i, (mesh, rows, classes) in enumerate(meshes()):
        for reduction in ("mean", "none"):
            options = {**EVERY, "reduction": reduction}
            f = lambda z, w, tw: torch_ops.cross_entropy(z, t, w, token_weight=tw, **options)  # noqa: E731, B023
            theirs = plainly(f, full["z"], full["w"], full["tw"])
            z = cut(full["z"], mesh, *both(rows(0), classes(1)))
            w, tw = cut(full["w"], mesh, *classes(0)), cut(full["tw"], mesh, *rows(0))
            with Messages() as sent:
                loss: Any = torch_ops.cross_entropy(z, t, w, token_weight=tw, **options)
                loss.sum().backward()
            assert all(n <= 6 * N for n in sent.sizes()), f"mesh {i}: {sent.found}"
            agree(theirs, loss, [z, w, tw], f"logits on mesh {i}, {reduction}")
            where = [Replicate()] * mesh.ndim if reduction == "mean" else [*rows(0)]
            assert [*loss.placements] == where, loss.placements


@check
def dtensor_heads_stay_where_they_are() -> None:
    full, t, (x0, lw0, lb0, w0) = arrays(8), targets(8), (arrays(8)[n] for n in ("x", "lw", "lb", "w"))
    for (i, (mesh, rows, classes)), memory in itertools.product(enumerate(meshes()), ("fast", "lean")):
        call: Any = functools.partial(torch_ops.linear_cross_entropy, memory=memory, **EVERY)
        theirs = plainly(lambda x, lw, lb, w: call(x, lw, t, linear_bias=lb, weight=w), x0, lw0, lb0, w0)  # noqa: B023
        x = cut(x0, mesh, *rows(0))
        lw, lb, w = (cut(v, mesh, *classes(0)) for v in (lw0, lb0, w0))
        target = t if i % 2 else cut(t, mesh, *rows(0))
        with Messages() as sent:
            loss = call(x, lw, target, linear_bias=lb, weight=w)
            loss.backward()
        head = 0 if lw.placements == (Replicate(),) else 1  # dW of a head that every rank has is summed over rows
        assert not head or all(n <= 6 * N for n in sent.sizes()) or i == 2, f"mesh {i}: {sent.found}"
        agree(theirs, loss, [x, lw, lb, w], f"head on mesh {i}, {memory}")
    # Rows and classes on one mesh dimension, as FSDP leaves them between forward passes: rows are gathered.
    mesh = meshes()[0][0]
    theirs = plainly(lambda x, lw: torch_ops.linear_cross_entropy(x, lw, t), x0, lw0)
    x, lw = cut(x0, mesh, Shard(0)), cut(lw0, mesh, Shard(0))
    loss = torch_ops.linear_cross_entropy(x, lw, cut(t, mesh, Shard(0)))
    loss.backward()
    agree(theirs, loss, [x, lw], "rows and classes on one dimension")
    # Tensor parallel: plain activations, the same on every rank
    plain, lw = x0.clone().requires_grad_(), cut(lw0, mesh, Shard(0))
    loss = torch_ops.linear_cross_entropy(plain, lw, t)
    loss.backward()
    same(plain.grad, theirs[1][0], "gradient of plain activations")
    module = torch_ops.nn.LinearCrossEntropyLoss(D, 8, dtype=F64)
    module.linear.weight = torch.nn.Parameter(cut(lw0, mesh, Shard(0)))
    same(module(x0, t).full_tensor(), theirs[0], "a module whose weight is sharded")
    # A batch of this rank's own is no replicated tensor.
    if dist.get_world_size() > 1:
        other = (t + dist.get_rank()).clamp(max=7)
        raises(ValueError, "target must be the same", lambda: torch_ops.linear_cross_entropy(x0, lw, other))
    raises(
        IndexError,
        "got ",
        lambda: torch_ops.cross_entropy(cut(full["z"], mesh, Shard(0)), t.index_fill(0, torch.tensor(0), 9)),
    )


@check
def rows_that_differ_in_one_group_of_classes_are_told_in_all() -> None:
    """On a mesh the other groups would wait for that one in the sums over rows."""
    rank, find = dist.get_rank(), asked.shard_of
    mesh, full = init_device_mesh("cpu", (dist.get_world_size(), 1)), arrays(8)

    def found(op: str, *given: Any) -> Any:
        if not rank:
            contract.fail_value(op, "target", "be the same on every rank of group", "different ones")
        return find(op, *given)

    x, lw = cut(full["x"], mesh, Shard(0), Replicate()), cut(full["lw"], mesh, Replicate(), Shard(0))
    words = "got different ones on other ranks." if rank else "got different ones."
    asked.shard_of = found
    try:
        raises(ValueError, words, lambda: torch_ops.linear_cross_entropy(x, lw, targets(8)))
    finally:
        asked.shard_of = find


@check
def placements_without_sense_are_refused() -> None:
    world = dist.get_world_size()
    mesh, flat = (init_device_mesh("cpu", shape) for shape in ((world, 1), (world,)))
    full, t = arrays(8), targets(8)
    two = [Shard(1), Shard(1)]
    z = DTensor.from_local(full["z"], flat, [Partial()])
    head: Any = functools.partial(torch_ops.linear_cross_entropy, target=t)
    x = cut(torch.stack([full["x"]] * 2), flat, Shard(1))
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("input must be replicated or sharded, its classes on", lambda: torch_ops.cross_entropy(z, t)),
        ("input must be replicated or sharded", lambda: torch_ops.cross_entropy(cut(full["z"], mesh, *two), t)),
        ("linear_weight must be replicated or sharded by", lambda: head(full["x"], cut(full["lw"], flat, Shard(1)))),
        ("shift must be 0 with rows sharded", lambda: head(x, full["lw"], target=torch.stack([t] * 2), shift=1)),
        (
            "linear_weight must be on one device mesh",
            lambda: head(cut(full["x"], mesh, Replicate(), Replicate()), cut(full["lw"], flat, Shard(0))),
        ),
        (
            "group must be None with DTensor",
            lambda: torch_ops.cross_entropy(cut(full["z"], flat, Shard(1)), t, group=group()),
        ),
    ]
    for words, call in refused:
        raises(ValueError, words, call)


@check
def nothing_is_looked_at_where_that_is_a_sync() -> None:
    """What a CUDA device is given: the shards' places and the mistakes stay tensors."""
    look = _modes.can_look
    try:
        _modes.can_look = lambda target: False
        for sizes in SIZES[dist.get_world_size()]:
            classes, part, full = sum(sizes), Part(sizes), arrays(sum(sizes))
            given = {**EVERY, "stats": ("lse", "entropy", "argmax")}
            few = {n: full[n] for n in ("z", "w", "tw")}
            t = targets(classes)
            compare(
                logits_loss(t, given, None), logits_loss(t, given, group()), few, part, f"no look {sizes}", orders=1
            )
            head = {n: full[n] for n in ("x", "lw", "lb", "w")}
            for options in ({"memory": "fast"}, {"memory": "fast", "chunk_size": 3}, {"memory": "lean"}):
                options |= {"reduction": "mean", **EVERY}
                whole, mine = head_loss(t, options, None), head_loss(t, options, group())
                compare(whole, mine, head, part, f"no look {sizes} {options}", orders=1)
            bad = t.index_fill(0, torch.tensor(3), classes)
            loss = torch_ops.cross_entropy(part.of("z", full["z"]), bad, group=group(), reduction="none")
            assert loss.isnan().tolist() == [i == 3 for i in range(N)], loss
            other = (t + dist.get_rank()).clamp(max=classes - 1)
            loss = torch_ops.cross_entropy(part.of("z", full["z"]), other, group=group())
            assert loss.isnan() or dist.get_world_size() == 1 or classes < 3
    finally:
        _modes.can_look = look


class Model(torch.nn.Module):
    def __init__(self, memory: str = "fast") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(D, D, dtype=F64)
        self.head = torch_ops.nn.LinearCrossEntropyLoss(D, 8, bias=True, dtype=F64, label_smoothing=0.1, memory=memory)
        self.loss = torch_ops.nn.CrossEntropyLoss(z_loss=0.1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head(hidden, t) + self.loss(hidden, t % D)


def batches() -> list[tuple[Tensor, Tensor]]:
    """As many rows on every rank, none ignored: the mean of their means is the mean of all."""
    g = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6, D, dtype=F64, generator=g), torch.randint(8, (6,), generator=g))
        for _ in range(dist.get_world_size())
    ]


@check
def ddp_and_fsdp_train_as_one_process() -> None:
    given = batches()
    for memory in ("fast", "lean"):
        alone = Model(memory)
        alone(torch.cat([x for x, _ in given]), torch.cat([t for _, t in given])).backward()
        wanted = {n: p.grad for n, p in alone.named_parameters()}
        for wrap in (torch.nn.parallel.DistributedDataParallel, fully_shard):
            model: Any = wrap(Model(memory))
            model(*given[dist.get_rank()]).backward()
            for n, p in (model.module if hasattr(model, "module") else model).named_parameters():
                g = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                same(g, wanted[n], f"{wrap.__name__} {memory} {n}")


@check
def fsdp_with_its_own_unit_for_the_head() -> None:
    """The head is unsharded by FSDP's hooks around its own forward, nowhere else."""
    given, alone, model = batches(), Model(), Model()
    alone(torch.cat([x for x, _ in given]), torch.cat([t for _, t in given])).backward()
    fully_shard(model.head)
    fully_shard(model)
    assert isinstance(model.head.linear.weight, DTensor)
    model(*given[dist.get_rank()]).backward()
    for (n, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        grad: Any = p.grad
        same(grad.full_tensor(), q.grad, f"fsdp {n}")
    # Outside: rows of every rank as a DTensor, and no whole head.
    flat = model.head.linear.weight.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    rows, t = (DTensor.from_local(v, flat, [Shard(0)]) for v in given[dist.get_rank()])
    with Messages() as sent:
        loss: Any = torch_ops.linear_cross_entropy(rows, model.head.linear.weight, t)
    assert max(sent.sizes()) <= 6 * dist.get_world_size() * D, sent.found
    whole = torch_ops.linear_cross_entropy(
        torch.cat([x for x, _ in given]), alone.head.linear.weight, torch.cat([t for _, t in given])
    )
    same(loss.full_tensor().detach(), whole.detach(), "a head outside its module")
