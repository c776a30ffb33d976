"""Losses of plain tensors over a group: every option against the unsharded loss."""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.utils.flop_counter import FlopCounterMode

import torch_ops
from tests.judging import cases
from tests.parallel.shards import (
    EVERY,
    F64,
    SIZES,
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
    outputs,
    plainly,
    raises,
    same,
    targets,
)
from torch_ops._parallel.collectives import summed

# What each combination has that the others lack; each runs with every size.
COMBINATIONS: list[tuple[str, bool, str, tuple[str, ...], dict[str, Any]]] = [
    ("plain", False, "mean", (), {}),
    ("everything", False, "mean", ("lse", "entropy", "argmax"), EVERY),
    ("everything", True, "none", ("entropy", "argmax", "lse"), EVERY),
    ("logprob", False, "none", ("logprob",), {"softcap": 5.0}),
    ("uniform", True, "sum", (), {"label_smoothing": 1.0, "z_loss": 0.1}),
]


@check
def logits_equal_the_unsharded_loss() -> None:
    each: Any = itertools.product(SIZES[dist.get_world_size()], COMBINATIONS)
    for sizes, (name, soft, reduction, stats, options) in each:
        for weighted in (False, True):
            full = arrays(sum(sizes))
            names = ["z", *["y"] * soft, *["w", "tw"] * weighted]
            given = {**options, "reduction": reduction, "stats": stats}
            t = None if soft else targets(sum(sizes))
            what = f"logits {sizes} {name} soft={soft} weighted={weighted}"
            compare(
                logits_loss(t, given, None),
                logits_loss(t, given, group()),
                {n: full[n] for n in names},
                Part(sizes),
                what,
            )


@check
def head_equals_the_unsharded_loss() -> None:
    each = SIZES[dist.get_world_size()]
    pairs: Any = itertools.product(each, COMBINATIONS)
    for sizes, (name, soft, reduction, stats, options) in pairs:
        for memory, weighted in (("fast", True), ("lean", True), ("fast", False)):
            full = arrays(sum(sizes))
            names = ["x", "lw", *["y"] * soft, *["lb", "w", "tw"] * weighted]
            given = {**options, "reduction": reduction, "stats": stats, "memory": memory, "chunk_size": 3}
            t = None if soft else targets(sum(sizes))
            what = f"head {sizes} {name} soft={soft} {memory} weighted={weighted}"
            # Second derivatives take seconds: of everything on two ranks, on three where one has no class.
            second = sizes == each[0] and name == "everything" if len(sizes) == 2 else sizes == each[-1]
            orders = 1 + (len(sizes) > 1 and second and weighted)
            whole, mine = head_loss(t, given, None), head_loss(t, given, group())
            compare(whole, mine, {n: full[n] for n in names}, Part(sizes), what, orders=orders)


@check
def scales_and_low_ranks_equal_the_unsharded_loss() -> None:
    """Arrays that are the same on every rank have the whole gradient on every rank; every statistic is the row's."""
    for sizes in SIZES[dist.get_world_size()]:
        full, t, part = arrays(sum(sizes)), targets(sum(sizes)), Part(sizes)
        for scale in ("s", "one"):
            given: Any = {"softcap": 9.0, "z_loss": 0.05, "stats": ("lse", "log_sum_sq", "mean_logit", "rank")}
            of_logits = {n: full[n] for n in ("z", "w", scale)}
            whole, mine = logits_loss(t, given, None), logits_loss(t, given, group())
            compare(whole, mine, of_logits, part, f"logits {sizes} {scale}", orders=1)
            for memory, options in (("fast", {}), ("lean", given)):
                more = {**options, "memory": memory, "chunk_size": 3}
                of_head = {n: full[n] for n in ("x", "lw", "lb", "down", "up", scale)}
                whole, mine = head_loss(t, more, None), head_loss(t, more, group())
                compare(whole, mine, of_head, part, f"head {sizes} {scale} {memory}", orders=1 + (sizes == (5, 3)))


def facts_rows(classes: int) -> dict[str, Tensor]:
    """Logits with -inf, +inf and NaN where shards begin and end; rows 4 and 5 of shards all -inf."""
    z = arrays(classes)["z"]
    z[0, 0], z[1, classes - 1], z[2] = torch.nan, torch.inf, -torch.inf
    z[4, : classes // 2], z[5, classes // 2 :] = -torch.inf, -torch.inf
    z[6] = torch.nan  # ignored
    return {"z": z}


@check
def strange_data_is_what_it_is_unsharded() -> None:
    for sizes in SIZES[dist.get_world_size()]:
        classes, part = sum(sizes), Part(sizes)
        t = torch.tensor([0, 0, 0, classes - 1, classes - 1, classes - 1, -100])
        full = facts_rows(classes)
        for options in (
            {},
            {**EVERY, "stats": ("lse", "entropy", "argmax")},
            {"label_smoothing": 0.1, "stats": ("lse",)},
        ):
            given = {"reduction": "none", **options}
            what = f"facts {sizes} {[*options]}"
            compare(logits_loss(t, given, None), logits_loss(t, given, group()), full, part, what, orders=1)
            soft = {**full, "y": arrays(classes)["y"].masked_fill(full["z"] == -torch.inf, 0.0)}
            compare(logits_loss(None, given, None), logits_loss(None, given, group()), soft, part, what, orders=1)


@check
def a_nan_is_the_first_maximum_wherever_infinity_is() -> None:
    for sizes in SIZES[dist.get_world_size()]:
        part, z = Part(sizes), torch.zeros(5, sum(sizes))
        # Beside each other in different shards, or in the last one; the last row is a maximum of -inf and NaN.
        z[0, 0], z[1, -1], z[2, 0], z[3], z[4] = torch.inf, torch.inf, torch.inf, torch.inf, -torch.inf
        z[0, -1], z[1, 0], z[2, -1], z[3, -1], z[4, -1] = torch.nan, torch.nan, torch.inf, torch.nan, torch.nan
        given: Any = {"group": group(), "reduction": "none", "stats": ("argmax",)}
        t = torch.zeros(5, dtype=torch.int64)
        _, found = torch_ops.cross_entropy(part.of("z", z), t, **given)
        assert torch.equal(found["argmax"], z.argmax(1)), f"{sizes}: {found}"
        nothing = torch.zeros(1, 1), part.of("lw", torch.zeros(sum(sizes), 1)), t[:1]  # the bias is all
        for row, memory in itertools.product(z, ("fast", "lean")):
            bias = {"linear_bias": part.of("lb", row), "memory": memory, "chunk_size": 2}
            _, found = torch_ops.linear_cross_entropy(*nothing, **bias, **given)
            assert torch.equal(found["argmax"], row.argmax(0, keepdim=True)), f"{sizes} {memory} {row}: {found}"


@check
def a_shard_of_minus_infinities_takes_no_part() -> None:
    for sizes in SIZES[dist.get_world_size()][:2]:
        if len(sizes) == 1:  # no other shard
            continue
        classes, part = sum(sizes), Part(sizes)
        orders = 2 if len(set(sizes)) > 1 else 1  # second derivatives take seconds
        dead = slice(0, sizes[0])  # rank 0: as the padding of a vocabulary is masked
        full = arrays(classes)
        full["z"][:, dead], full["lb"][dead], full["y"][:, dead] = -torch.inf, -torch.inf, 0.0
        t = targets(classes).clamp(min=sizes[0])
        t[4] = -100
        for soft, memory in ((False, "fast"), (True, "fast"), (False, "lean"), (True, "lean")):
            given = {**EVERY, "label_smoothing": 0.0, "reduction": "none", "stats": ("entropy", "lse", "argmax")}
            whole, mine = (full["y"], part.of("y", full["y"])) if soft else (t, t)
            what = f"dead {sizes} soft={soft}"
            if memory == "fast":
                rows = {"z": full["z"]}
                compare(
                    logits_loss(whole, given, None), logits_loss(mine, given, group()), rows, part, what, orders=orders
                )
            given |= {"memory": memory, "chunk_size": 2}
            head, what = {n: full[n].clone() for n in ("x", "lw", "lb")}, f"{what} {memory}"
            compare(head_loss(whole, given, None), head_loss(mine, given, group()), head, part, what, orders=orders)
            head["x"][1] = head["x"][4] = torch.nan  # with class indices the second is ignored
            compare(head_loss(whole, given, None), head_loss(mine, given, group()), head, part, what, orders=1)
            # All of a shard's logits NaN: it takes part, and no row has a distribution.
            head = {n: full[n].clone() for n in ("x", "lw")}
            head["lw"][dead] = torch.nan
            compare(head_loss(whole, given, None), head_loss(mine, given, group()), head, part, what, orders=1)


@check
def every_shape_of_the_unsharded_losses() -> None:
    sizes = SIZES[dist.get_world_size()][0]
    classes, part, full = sum(sizes), Part(sizes), arrays(sum(sizes))
    z = torch.stack([full["z"], -full["z"], full["z"] + 1.0], 2)
    t = torch.stack([targets(classes), targets(classes).flip(0), targets(classes).roll(1)], 1)
    lw = torch.stack([full["lw"], -full["lw"]], 1)
    x = torch.stack([full["x"], full["x"].flip(0)])
    one: Any = torch_ops.linear_cross_entropy
    calls: list[tuple[Any, dict[str, Tensor]]] = [
        (lambda over: lambda z: outputs(torch_ops.cross_entropy(z, t, group=over, **EVERY)), {"z": z}),
        (lambda over: lambda row: outputs(torch_ops.cross_entropy(row, t[0, 0], group=over)), {"row": full["z"][0]}),
        (lambda over: lambda row: outputs(torch_ops.cross_entropy(row, t[0, :1], group=over)), {"row": full["z"][0]}),
    ]
    for memory, reduction in (("fast", "mean"), ("lean", "none")):
        call: Any = functools.partial(one, memory=memory, reduction=reduction, chunk_size=3)
        calls += [
            (
                lambda over, f=call: lambda x, lw: outputs(f(x, lw, t.T[:2], shift=1, group=over)),
                {"x": x, "lw": full["lw"]},
            ),
            (lambda over, f=call: lambda x, lw: outputs(f(x, lw, t[:, :2], group=over)), {"x": full["x"], "lw": lw}),
            (
                lambda over, f=call: lambda x, lw: outputs(f(x, lw, t[0, :1], group=over)),
                {"x": full["x"][0], "lw": full["lw"]},
            ),
        ]
    for i, (call, given) in enumerate(calls):
        compare(call(None), call(group()), given, part, f"shape {i}", orders=1 + (i < 4))


@check
def mistakes_are_told_on_every_rank() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    z, t = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    call: Any = torch_ops.cross_entropy
    raises(TypeError, "cross_entropy: group must be a torch.distributed.ProcessGroup", lambda: call(z, t, group="tp"))
    raises(
        IndexError,
        f"in [0, {3 * world}) or ignore_index (-100); got {3 * world} at row 2.",
        lambda: call(z, t.index_fill(0, torch.tensor(2), 3 * world), group=group()),
    )
    assert call(z, t + 3 * world - 1, group=group()).isfinite()
    if world > 1:
        raises(
            ValueError,
            "input must have as many rows on every rank of group; got 4, 3",
            lambda: call(z[: 4 - rank], t[: 4 - rank], group=group()),
        )
        raises(ValueError, "target must be the same on every rank", lambda: call(z, t + rank, group=group()))
        other = t if rank else torch.zeros(4, 3)  # class 0 in all rows, beside probabilities
        raises(ValueError, "target must be the same on every rank", lambda: call(z, other, group=group()))
    raises(
        ValueError,
        "group must not be inside torch.func",
        lambda: torch.func.grad(lambda z: call(z, t, group=group()))(z),
    )
    head: Any = torch_ops.linear_cross_entropy
    with torch.autograd.forward_ad.dual_level():
        raises(ValueError, "group must not be inside torch.func", lambda: head(z, z, t, group=group()))


@check
def gradient_is_written_over_the_logits() -> None:
    part = Part(SIZES[dist.get_world_size()][0])
    full, t = arrays(part.end if dist.get_world_size() == 1 else 8), targets(8)
    leaf = part.of("z", full["z"]).clone().requires_grad_()
    z = leaf * 1.0
    for inplace in (True, False):
        loss = torch_ops.cross_entropy(z, t % 5, group=group(), inplace_backward=inplace, reduction="sum")
        (dz,) = torch.autograd.grad(loss, leaf, retain_graph=not inplace)
        written = (z.detach() == dz).all() and bool(dz.any())
        assert written == inplace or not part.end - part.begin
        z = leaf * 1.0
    # A batch of gradients cannot be written over one array of logits.
    (each,) = torch.autograd.grad(
        torch_ops.cross_entropy(z, t % 5, group=group(), inplace_backward=True, reduction="none"),
        z,
        torch.eye(N, dtype=F64),
        is_grads_batched=True,
    )
    same(each.sum(0), dz, "a batch of gradients")
    on_mesh: Any = cut(full["z"], meshes()[0][0], Shard(1)) * 1.0
    torch.autograd.grad(torch_ops.cross_entropy(on_mesh, t % 5, inplace_backward=True), on_mesh)
    assert torch.equal(on_mesh.full_tensor(), full["z"])


# Loud rows of test_ops' kind, for test_parallel.py to judge against the reference: (type, options, soft targets).
LOUD: list[tuple[str, str, bool]] = [
    ("float32", "plain", False),
    ("float32", "smooth", False),
    ("float32", "all", True),
    ("float64", "all", False),
    ("bfloat16", "plain", True),
]
LOUD_SIZES = {1: (257,), 2: (200, 57), 3: (100, 1, 156)}


def loud(dtype: str, soft: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """({input, target}, upstream gradients by name)."""
    rows = cases.rows(257, dtype)
    number = len(rows.names)
    ups = {"value": rows.dloss, "lse": rows.dloss[::-1].copy(), "entropy": np.linspace(-2.0, 2.0, number)}
    return {"input": rows.x, "target": cases.soft(257, dtype, number) if soft else rows.target}, ups


@check
def loud_rows_for_the_reference() -> None:
    part, kept = Part(LOUD_SIZES[dist.get_world_size()]), {}
    for dtype, name, soft in LOUD:
        given, ups = loud(dtype, soft)
        kind: Any = getattr(torch, dtype)
        z = part.of("z", torch.from_numpy(given["input"])).to(kind).requires_grad_()
        t = torch.from_numpy(given["target"])
        t = part.of("y", t).to(kind) if soft else t
        stats: Any = ("lse", "entropy", "argmax")
        options: Any = cases.OPTIONS[name]
        loss, found = torch_ops.cross_entropy(z, t, reduction="none", stats=stats, group=group(), **options)
        values = {"value": loss, **found}
        along = [torch.from_numpy(u).to(values[n].dtype) for n, u in ups.items()]
        (dz,) = torch.autograd.grad([values[n] for n in ups], z, along)
        for n, v in (*values.items(), ("gradient", dz)):
            kept[f"{dtype} {name} {soft} {n}"] = v.detach().to(F64 if v.is_floating_point() else v.dtype).numpy()
    np.savez(f"{sys.argv[3]}.{dist.get_rank()}.npz", **kept)


# The flop counter lacks it.
ADDED: Any = {torch.ops.aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1]}


@check
def messages_matmuls_and_memory_are_those_of_the_documentation() -> None:
    rows, each, features, chunk = 64, 96, 4, 8
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    part = Part((each,) * dist.get_world_size())
    t = torch.randint(each * dist.get_world_size(), (rows,), generator=g)
    x, lw = make(rows, features), part.of("lw", make(each * dist.get_world_size(), features))
    z, w = make(rows, each), part.of("w", make(each * dist.get_world_size()).abs())
    leaf = z.clone().requires_grad_()
    soft, smooth = torch.rand(rows, each, generator=g), {"label_smoothing": 0.1}
    steps: Any = [(t, {}, [3]), (t, {"z_loss": 0.1, **smooth}, [5]), (t, {"weight": w}, [3, 1])]
    steps += [(soft, {}, [5]), (soft, {"weight": w, "stats": ("entropy",)}, [6]), (soft, {"weight": w, **smooth}, [8])]
    for target, given, forward in steps:
        with Messages() as sent:
            loss: Any = torch_ops.cross_entropy(leaf, target, group=group(), **given)
            loss = loss[0] if "stats" in given else loss
        assert sent.sizes() == sorted([rows * n for n in (1, *forward)]), sent.found
        with Messages() as sent:
            torch.autograd.grad(loss, leaf)
        assert not sent.found, sent.found
    for memory, reduction, matmuls, pieces in (("fast", "mean", 6, 8), ("fast", "none", 8, 1), ("lean", "mean", 8, 1)):
        leaves = x.clone().requires_grad_(), lw.clone().requires_grad_()
        with Messages() as sent, FlopCounterMode(display=False, custom_mapping=ADDED) as flops:
            options: Any = {"memory": memory, "chunk_size": chunk, "reduction": reduction, "group": group()}
            torch.autograd.grad(torch_ops.linear_cross_entropy(*leaves, t, **options).sum(), leaves)
        forward = [rows // pieces * n for n in (1, 3) for _ in range(pieces)]
        what = f"{memory}, {reduction}"
        assert sent.sizes() == sorted([n for n in forward if n > 8] + [rows * features]), f"{what}: {sent.found}"
        assert flops.get_total_flops() == matmuls * rows * each * features, f"{what}: {flops.get_total_flops()}"
        assert sent.largest <= max(chunk * each, chunk * rows), f"{what}: {sent.largest}"


@check
def sums_of_half_precision_are_rounded_once() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    own = torch.full((2 * world,), 2.0**-8, dtype=torch.bfloat16)
    own[rank::world] = 1.0
    expected = torch.full((2 * world,), 1.0 + (world - 1) * 2.0**-8).bfloat16()
    assert torch.equal(summed(own, group()), expected)


@check
def half_precision_heads_are_as_exact_as_their_type() -> None:
    sizes = SIZES[dist.get_world_size()][0]
    part, t, full = Part(sizes), targets(sum(sizes)), arrays(sum(sizes))
    for kind, memory in itertools.product((torch.bfloat16, torch.float16), ("fast", "lean")):
        rounded = {n: full[n].to(kind) for n in ("x", "lw", "lb")}
        given = {**EVERY, "memory": memory, "chunk_size": 3}
        theirs = plainly(lambda *head: head_loss(t, given, None)(*head)[0], *(v.double() for v in rounded.values()))  # noqa: B023
        leaves = {n: part.of(n, v).clone().requires_grad_() for n, v in rounded.items()}
        (loss,) = head_loss(t, given, group())(**leaves)
        assert loss.dtype == torch.float32
        found = torch.autograd.grad(loss, [*leaves.values()])
        what = f"{kind} {memory}"
        same(loss.double(), theirs[0], what, torch.finfo(kind).eps * 8)
        for (n, leaf), a, b in zip(leaves.items(), found, theirs[1], strict=True):
            assert a.dtype == leaf.dtype
            error = (a.double() - part.of(n, b)).norm() / b.norm()
            assert error <= 4 * torch.finfo(kind).eps, f"{what} {n}: {error}"
            assert not part.of(n, b).any() or a.any(), f"{what} {n}: zeros"


@check
def float16_gradients_of_a_shard_are_levelled_by_whole_rows() -> None:
    """No target is in the last shard, and its rows sum to more than float16 holds."""
    n, classes = 70000, 2 * dist.get_world_size()
    part, half = Part((2,) * dist.get_world_size()), torch.float16
    x, lw, y = torch.ones(n, 2, dtype=half), torch.zeros(classes, 2, dtype=half), torch.zeros(n, classes, dtype=half)
    lw[-1], y[:, 0] = 10.0, 1.0
    each: Any = ({}, {"label_smoothing": 0.1})
    for options in each:
        loss = lambda lw, y, over: torch_ops.linear_cross_entropy(x, lw, y, group=over, **options)  # noqa: E731, B023
        leaf = part.of("lw", lw).clone().requires_grad_()
        (found,) = torch.autograd.grad(loss(leaf, part.of("y", y), group()), leaf)
        _, (wanted,) = plainly(lambda lw: loss(lw, y, None), lw)  # noqa: B023
        assert wanted.isfinite().all()
        assert wanted.any()
        same(found, part.of("lw", wanted), f"levelled {options}", 2 * torch.finfo(half).eps)
