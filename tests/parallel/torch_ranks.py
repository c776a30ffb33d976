"""`python -m tests.parallel.torch_ranks RANK WORLD STORE`: one rank's share of the checks of losses on many devices.

Every rank makes the same arrays, runs the unsharded loss on all of them and the sharded one on its part, and compares
its part of every result. test_parallel.py starts the ranks.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import torch_ops
from softmax_ext import contract
from tests.judging import cases
from torch_ops import _modes
from torch_ops._parallel import losses
from torch_ops._parallel.collectives import summed

F64 = torch.float64
N, D = 7, 3
CHECKS: list[Callable[[], None]] = []
EVERY: dict[str, Any] = {"label_smoothing": 0.2, "logit_scale": 1.3, "softcap": 9.0, "z_loss": 0.05}
# Classes of each rank: unequal, one each, none somewhere.
SIZES = {1: [(5,)], 2: [(5, 3), (1, 1), (4, 0), (0, 1)], 3: [(4, 1, 3), (1, 1, 1), (2, 0, 5)]}
# Where each array is cut by class.
CUT = {"z": 1, "row": 0, "lw": 0, "lb": 0, "y": 1, "w": 0}


def check(fn: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(fn)
    return fn


class Part:
    """The classes of this rank."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        rank = dist.get_rank()
        self.begin, self.end = sum(sizes[:rank]), sum(sizes[: rank + 1])

    def of(self, name: str, full: Tensor) -> Tensor:
        return full.narrow(CUT[name], self.begin, self.end - self.begin) if name in CUT else full


def arrays(classes: int, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(classes)
    make = lambda *shape: torch.randn(*shape, dtype=F64, generator=g)  # noqa: E731
    z = 3.0 * make(N, classes)
    z[1, classes // 2] += 30.0  # confident
    found = {"z": z, "x": make(N, D), "lw": 2.0 * make(classes, D), "lb": make(classes)}
    found |= {"y": make(N, classes).abs(), "w": make(classes).abs() + 0.2, "tw": make(N).abs() + 0.1}
    return {name: v.to(dtype) for name, v in found.items()}


def targets(classes: int) -> Tensor:
    """Each rank's first and last class, an ignored row."""
    t = torch.arange(N) * 3 % classes
    t[0], t[1], t[2], t[4] = 0, classes // 2, classes - 1, -100
    return t


def same(ours: Any, theirs: Any, what: str, tol: float = 1e-11) -> None:
    assert ours is not None, f"{what}: no gradient"
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol, equal_nan=True, msg=lambda m: f"{what}: {m}")


Fn = Callable[..., tuple[Tensor, ...]]


def compare(whole: Fn, sharded: Fn, full: dict[str, Tensor], part: Part, what: str, *, orders: int = 2) -> None:
    """Values, gradients by hand, the same through autograd, and a product with second derivatives."""
    g = torch.Generator().manual_seed(3)
    random = lambda v: torch.randn(v.shape, dtype=v.dtype, generator=g)  # noqa: E731
    leaves = {n: v.clone().requires_grad_() for n, v in full.items()}
    mine = {n: part.of(n, v).clone().requires_grad_() for n, v in full.items()}
    theirs, ours = whole(**leaves), sharded(**mine)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        same(a, b, f"{what}, value {i}")
    real = [i for i, v in enumerate(theirs) if v.is_floating_point()]
    along = [random(theirs[i]).requires_grad_() for i in real]
    first: list[Any] = []
    for values, by in ((theirs, leaves), (ours, mine)):
        for again in (False, True):
            given = along if again else [c.detach() for c in along]
            grads = torch.autograd.grad(
                [values[i] for i in real],
                [*by.values()],
                given,
                create_graph=again,
                retain_graph=True,
                allow_unused=True,
            )
            first.append(grads)
    for order, at in (("by hand", 2), ("by autograd", 3)):
        for name, a, b in zip(full, first[at], first[1], strict=True):
            full_b = torch.zeros_like(full[name]) if b is None else b
            if a is not None or full_b.any():
                same(a, part.of(name, full_b), f"{what}, gradient {order} of {name}")
    if orders < 2:
        return
    directions = {n: random(v) for n, v in full.items()}
    second = []
    for grads, by, cut in ((first[1], leaves, False), (first[3], mine, True)):
        v = [part.of(n, d) if cut else d for (n, d), g in zip(directions.items(), grads, strict=True) if g is not None]
        grads = [g for g in grads if g is not None]
        second.append(torch.autograd.grad(grads, [*by.values(), *along], v, allow_unused=True))
    for name, a, b in zip([*full, *(f"upstream {i}" for i in real)], second[1], second[0], strict=True):
        if b is not None:
            same(a, part.of(name, b), f"{what}, second derivative by {name}")


def group() -> Any:
    return dist.group.WORLD


def outputs(found: Any) -> tuple[Tensor, ...]:
    return (found[0], *found[1].values()) if isinstance(found, tuple) else (found,)


def logits_loss(target: Tensor | None, options: dict[str, Any], over: Any) -> Fn:
    def fn(z: Tensor, y: Any = None, w: Any = None, tw: Any = None) -> tuple[Tensor, ...]:
        t = target if y is None else y
        return outputs(torch_ops.cross_entropy(z, t, w, token_weight=tw, group=over, **options))  # pyright: ignore

    return fn


def head_loss(target: Tensor | None, options: dict[str, Any], over: Any) -> Fn:
    def fn(x: Tensor, lw: Tensor, lb: Any = None, y: Any = None, w: Any = None, tw: Any = None) -> tuple[Tensor, ...]:
        t: Any = target if y is None else y
        given = {"linear_bias": lb, "weight": w, "token_weight": tw, "group": over}
        return outputs(torch_ops.linear_cross_entropy(x, lw, t, **given, **options))

    return fn


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


def raises(error: type[Exception], words: str, fn: Callable[[], Any]) -> None:
    told = ""
    try:
        fn()
    except error as e:
        told = str(e)
    assert words in told, f"{error.__name__} '{words}', not '{told}'"


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


class Messages(TorchDispatchMode):
    """(name, elements) of every message between ranks, and the elements of the largest tensor any op made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "c10d" in name and "wait_tensor" not in name:
            self.found.append((name.split(".")[1], max(v.numel() for v in tree_leaves(args) if isinstance(v, Tensor))))
        out = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(v.numel() for v in tree_leaves(out) if isinstance(v, Tensor)), 0)
        return out

    def sizes(self) -> list[int]:
        """Elements of each message, without the one that tells the ranks apart."""
        return sorted(n for _, n in self.found if n > 8)


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
    for given, forward in (({}, [3]), ({"z_loss": 0.1, "label_smoothing": 0.1}, [5]), ({"weight": w}, [3, 1])):
        with Messages() as sent:
            loss: Any = torch_ops.cross_entropy(leaf, t, group=group(), **given)  # pyright: ignore
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


def cut(full: Tensor, mesh: DeviceMesh, *where: Any) -> DTensor:
    found: Any = distribute_tensor(full.clone(), mesh, [*where], src_data_rank=None)
    return found.requires_grad_(full.is_floating_point())


def agree(theirs: tuple[Tensor, list[Tensor]], loss: Any, leaves: list[Any], what: str) -> None:
    """A DTensor loss and its gradients, each placed as its leaf, against the plain loss and gradients."""
    same(loss.full_tensor(), theirs[0], f"{what}, loss")
    for i, (leaf, g) in enumerate(zip(leaves, theirs[1], strict=True)):
        assert leaf.grad.placements == leaf.placements, f"{what}: {leaf.grad.placements}"
        same(leaf.grad.full_tensor(), g, f"{what}, gradient {i}")


def plainly(fn: Callable[..., Any], *full: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [v.clone().requires_grad_() for v in full]
    loss = outputs(fn(*leaves))[0]
    return loss.detach(), list(torch.autograd.grad(loss.sum(), leaves))


def meshes() -> list[tuple[DeviceMesh, Any, Any]]:
    """(mesh, placements of rows, of classes): one dimension, and two of which one has one rank."""
    world = dist.get_world_size()
    return [
        (init_device_mesh("cpu", (world,)), (lambda d: (Replicate(),)), (lambda d: (Shard(d),))),
        (init_device_mesh("cpu", (world,)), (lambda d: (Shard(d),)), (lambda d: (Replicate(),))),
        (init_device_mesh("cpu", (world, 1)), (lambda d: (Shard(d), Replicate())), (lambda d: (Replicate(), Shard(d)))),
        (init_device_mesh("cpu", (1, world)), (lambda d: (Shard(d), Replicate())), (lambda d: (Replicate(), Shard(d)))),
    ]


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
            assert all(n <= 5 * N for n in sent.sizes()), f"mesh {i}: {sent.found}"
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
        assert not head or all(n <= 5 * N for n in sent.sizes()) or i == 2, f"mesh {i}: {sent.found}"
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
    rank, find = dist.get_rank(), losses.shard_of
    mesh, full = init_device_mesh("cpu", (dist.get_world_size(), 1)), arrays(8)

    def found(op: str, *given: Any) -> Any:
        if not rank:
            contract.fail_value(op, "target", "be the same on every rank of group", "different ones")
        return find(op, *given)

    x, lw = cut(full["x"], mesh, Shard(0), Replicate()), cut(full["lw"], mesh, Replicate(), Shard(0))
    words = "got different ones on other ranks." if rank else "got different ones."
    losses.shard_of = found
    try:
        raises(ValueError, words, lambda: torch_ops.linear_cross_entropy(x, lw, targets(8)))
    finally:
        losses.shard_of = find


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


def main() -> int:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    chosen = sys.argv[4:]
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=wait)
    failed = 0
    for fn in CHECKS:
        if chosen and fn.__name__ not in chosen:
            continue
        try:
            fn()
        except Exception:
            failed += 1
            print(f"rank {rank} of {world}, {fn.__name__}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            break  # the other ranks wait in a message that will not come
    if not failed:
        dist.barrier()
        dist.destroy_process_group()
    return failed


if __name__ == "__main__":
    sys.exit(main())
