"""Divergences whose classes lie on many devices, the student's and the teacher's alike: as tests/parallel/groups.py."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

import torch_ops
from softmax_ext.contract import KINDS
from tests.parallel.meshes import agree, both
from tests.parallel.shards import (
    SIZES,
    Fn,
    Messages,
    N,
    Part,
    arrays,
    check,
    compare,
    cut,
    group,
    meshes,
    plainly,
    raises,
    same,
)
from torch_ops._parallel import divergences
from torch_ops._parallel.call import shard_here
from torch_ops._rows import divergence_parts as parts

CAPPED: dict[str, Any] = {"logit_scale": 1.3, "softcap": 9.0, "teacher_scale": 0.8, "teacher_softcap": 7.0, "beta": 0.3}
KEEP = torch.tensor([True, True, False, True, True, False, True])


def teachers(classes: int) -> dict[str, Tensor]:
    """A teacher's logits t, one row the student's own; its head: ty, u and c."""
    g = torch.Generator().manual_seed(classes + 1)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    t = 2.0 * make(N, classes)
    t[3] = arrays(classes)["z"][3]
    return {"t": t, "ty": make(N, 2), "u": make(classes, 2), "c": make(classes)}


def of_logits(teacher: Tensor, options: dict[str, Any], over: Any) -> Fn:
    def fn(z: Tensor, tw: Any = None, s: Any = None) -> tuple[Tensor, ...]:
        more = options if s is None else {**options, "logit_scale": s}
        return (torch_ops.divergence(z, teacher, token_weight=tw, group=over, **more),)

    return fn


def of_heads(teacher: dict[str, Tensor], options: dict[str, Any], over: Any) -> Fn:
    def fn(x: Tensor, lw: Tensor, lb: Any = None, tw: Any = None, s: Any = None) -> tuple[Tensor, ...]:
        given = {**options, "linear_bias": lb, "token_weight": tw, "group": over, "teacher_bias": teacher["c"]}
        given |= {} if s is None else {"logit_scale": s}
        return (torch_ops.linear_divergence(x, lw, teacher["ty"], teacher["u"], **given),)

    return fn


@check
def divergences_equal_the_unsharded_ones() -> None:
    pairs: Any = itertools.product(SIZES[dist.get_world_size()], KINDS)
    for sizes, kind in pairs:
        full, teacher, part = arrays(sum(sizes)), teachers(sum(sizes)), Part(sizes)
        mine = {n: part.of(n, v) for n, v in teacher.items()}
        for options, names in (
            ({"reduction": "none", "keep": KEEP, **CAPPED}, ("z", "tw")),
            ({"reduction": "mean", "logit_scale": 1.2, "teacher_scale": 1.2}, ("z",)),
            ({"reduction": "sum", "keep": KEEP}, ("z", "s")),
        ):
            given, what = {"kind": kind, **options}, f"divergence {sizes} {kind} {names}"
            whole, sharded = of_logits(teacher["t"], given, None), of_logits(mine["t"], given, group())
            compare(whole, sharded, {n: full[n] for n in names}, part, what)


@check
def divergences_of_heads_equal_the_unsharded_ones() -> None:
    each = SIZES[dist.get_world_size()]
    triples: Any = itertools.product(each, KINDS, ("fast", "lean"))
    for sizes, kind, memory in triples:
        full, teacher, part = arrays(sum(sizes)), teachers(sum(sizes)), Part(sizes)
        mine = {n: part.of(n, v) for n, v in teacher.items()}
        for options, names in (
            ({"reduction": "mean", "keep": KEEP, **CAPPED}, ("x", "lw", "lb", "tw")),
            ({"reduction": "none"}, ("x", "lw")),
            ({"reduction": "sum"}, ("x", "lw", "lb", "s")),
        ):
            given = {"kind": kind, "memory": memory, "chunk_size": 3, **options}
            what = f"heads {sizes} {kind} {memory} {names}"
            # Second derivatives take seconds: where one rank has no class, or they are of unequal shards.
            orders = 1 + (len(sizes) > 1 and sizes in (each[0], each[-1]) and "tw" in names)
            whole, sharded = of_heads(teacher, given, None), of_heads(mine, given, group())
            compare(whole, sharded, {n: full[n] for n in names}, part, what, orders=orders)


@check
def masked_shards_and_odd_rows_are_what_they_are_unsharded() -> None:
    pairs: Any = itertools.product(SIZES[dist.get_world_size()], KINDS)
    for sizes, kind in pairs:
        classes, part = sum(sizes), Part(sizes)
        z, t = arrays(classes)["z"], teachers(classes)["t"]
        dead = slice(0, sizes[0])  # rank 0's
        if len(sizes) > 1 and 0 < sizes[0] < classes:
            z[0, dead], t[0, dead] = -torch.inf, -torch.inf
            z[1, dead], t[4, dead] = -torch.inf, -torch.inf
        z[2, 0], t[3, -1], z[5], t[6] = torch.nan, torch.nan, -torch.inf, -torch.inf
        z[6, -1] = torch.inf
        lone = torch.full((1, classes), -torch.inf, dtype=z.dtype)
        lone[0, -1] = torch.nan  # beside shards all -inf
        z, t = torch.cat([z, lone]), torch.cat([t, t[:1]])
        for keep in (None, torch.tensor([*KEEP, True])):
            given, what = {"kind": kind, "reduction": "none", "keep": keep}, f"odd {sizes} {kind}"
            whole, sharded = of_logits(t, given, None), of_logits(part.of("t", t), given, group())
            compare(whole, sharded, {"z": z}, part, what, orders=1)
        good = torch.tensor([0, 1] if kind in ("jsd", "tv", "forward_kl") else [0, 4])
        given = {"kind": kind, "reduction": "none"}
        z, t = z[good], t[good]
        if kind == "reverse_kl" and len(sizes) > 1:
            continue  # infinite
        whole, sharded = of_logits(t, given, None), of_logits(part.of("t", t), given, group())
        compare(whole, sharded, {"z": z}, part, f"masked {sizes} {kind}")


@check
def a_student_next_to_its_teacher_loses_no_digits_over_ranks() -> None:
    """In float32 the shift of whole rows is put right as it is in one row: a merged lse alone would be too coarse."""
    world = dist.get_world_size()
    part = Part(tuple(range(40, 40 + world)))
    g = torch.Generator().manual_seed(5)
    n = sum(range(40, 40 + world))
    t = 2.0 * torch.randn(N, n, generator=g)
    z = t + 1e-4 * torch.randn(N, n, generator=g)
    for kind in KINDS:
        given: Any = {"kind": kind, "reduction": "none"}
        due = torch_ops.divergence(z.double(), t.double(), **given)
        leaf = part.of("z", z).clone().requires_grad_()
        found = torch_ops.divergence(leaf, part.of("t", t), group=group(), **given)
        same(found.double() / due, torch.ones_like(due), f"next to each other {kind}", 4e-5 if kind == "tv" else 4e-4)
        (dz,) = torch.autograd.grad(found.sum(), leaf)
        wide = z.double().requires_grad_()
        (wanted,) = torch.autograd.grad(torch_ops.divergence(wide, t.double(), **given).sum(), wide)
        assert (dz.double() - part.of("z", wanted)).norm() <= 1e-4 * wanted.norm(), f"gradient {kind}"
        equal = part.of("t", t).clone().requires_grad_()
        value = torch_ops.divergence(equal, part.of("t", t), group=group(), **given)
        assert not value.any(), f"a student that is its teacher {kind}: {value}"
        assert torch.autograd.grad(value.sum(), equal)[0].abs().max() <= 2.0**-24, kind


@check
def a_local_lse_in_the_place_of_the_merged_is_seen() -> None:
    """The checks above would not pass with a shard's own numbers taken for the row's."""
    if dist.get_world_size() == 1:
        return
    sizes, rank, merged = SIZES[dist.get_world_size()][0], dist.get_rank(), parts.merged
    full, teacher, part = arrays(sum(sizes)), teachers(sum(sizes)), Part(sizes)
    given: Any = {"reduction": "none"}
    parts.merged = lambda values, states, *, pair: (values[rank], states[rank])
    try:
        for kind, by in itertools.product(KINDS, ("logits", "heads")):
            if by == "logits":
                due = torch_ops.divergence(full["z"], teacher["t"], kind=kind, **given)
                own = part.of("z", full["z"]), part.of("t", teacher["t"])
                found = torch_ops.divergence(*own, kind=kind, group=group(), **given)
            else:
                due = of_heads(teacher, {"kind": kind, **given}, None)(full["x"], full["lw"])[0]
                mine = {n: part.of(n, v) for n, v in teacher.items()}
                (found,) = of_heads(mine, {"kind": kind, **given}, group())(full["x"], part.of("lw", full["lw"]))
            assert not torch.allclose(found, due, rtol=1e-3), f"{kind} of {by}: {found}"
    finally:
        parts.merged = merged


@check
def divergences_of_dtensors_stay_where_they_are() -> None:
    full, teacher = arrays(8), teachers(8)
    keep = KEEP
    for i, (mesh, rows, classes) in enumerate(meshes()):
        kind = KINDS[i % 4]
        for reduction in ("mean", "none"):
            given: Any = {"kind": kind, "reduction": reduction, "keep": keep, **CAPPED}
            theirs = plainly(lambda z, tw: of_logits(teacher["t"], given, None)(z, tw)[0], full["z"], full["tw"])  # noqa: B023
            z, t = (cut(v, mesh, *both(rows(0), classes(1))) for v in (full["z"], teacher["t"]))
            tw, more = cut(full["tw"], mesh, *rows(0)), {**given, "keep": cut(keep, mesh, *rows(0))}
            with Messages() as sent:
                loss: Any = torch_ops.divergence(z, t.detach(), token_weight=tw, **more)
                loss.sum().backward()
            assert all(n <= 8 * N for n in sent.sizes()), f"mesh {i}: {sent.found}"
            agree(theirs, loss, [z, tw], f"divergence on mesh {i}, {reduction}")
            for memory in ("fast", "lean"):
                more = {**given, "memory": memory}
                theirs = plainly(of_heads_of(teacher, more), *(full[n] for n in ("x", "lw", "lb")))
                x, y = (cut(v, mesh, *rows(0)) for v in (full["x"], teacher["ty"]))
                lw, lb, u, c = (cut(v, mesh, *classes(0)) for v in (full["lw"], full["lb"], teacher["u"], teacher["c"]))
                of_teacher = {"ty": y.detach(), "u": u.detach(), "c": c.detach()}
                (loss,) = of_heads(of_teacher, more, None)(x, lw, lb)
                loss.sum().backward()
                agree(theirs, loss, [x, lw, lb], f"heads on mesh {i}, {memory} {reduction}")
    # Tensor parallel: plain activations, the same on every rank
    mesh = meshes()[0][0]
    theirs = plainly(of_heads_of(teacher, {}), full["x"], full["lw"])
    plain, lw = full["x"].clone().requires_grad_(), cut(full["lw"], mesh, Shard(0))
    u, c = (cut(teacher[n], mesh, Shard(0)).detach() for n in ("u", "c"))
    (loss,) = of_heads({"ty": teacher["ty"], "u": u, "c": c}, {}, None)(plain, lw)
    loss.backward()
    same(plain.grad, theirs[1][0], "gradient of plain activations")
    everywhere: Any = [Replicate()]
    value: Any = torch_ops.divergence(cut(full["z"], mesh, *everywhere), teacher["t"])
    same(value.full_tensor(), torch_ops.divergence(full["z"], teacher["t"]), "everything everywhere")


def of_heads_of(teacher: dict[str, Tensor], options: dict[str, Any]) -> Any:
    return lambda *head: of_heads(teacher, options, None)(*head)[0]


@check
def half_precision_divergences_are_as_exact_as_their_type() -> None:
    sizes = SIZES[dist.get_world_size()][0]
    part, full, teacher = Part(sizes), arrays(sum(sizes)), teachers(sum(sizes))
    for dtype, memory in itertools.product((torch.bfloat16, torch.float16), ("fast", "lean")):
        student = {n: full[n].to(dtype) for n in ("x", "lw", "lb")}
        of_teacher = {n: teacher[n].to(dtype) for n in ("ty", "u", "c")}
        given = {"kind": "jsd", "memory": memory, "chunk_size": 3}
        wide = {n: v.double() for n, v in of_teacher.items()}
        theirs = plainly(of_heads_of(wide, given), *(v.double() for v in student.values()))
        leaves = {n: part.of(n, v).clone().requires_grad_() for n, v in student.items()}
        mine = {n: part.of(n, v) for n, v in of_teacher.items()}
        (loss,) = of_heads(mine, given, group())(**leaves)
        assert loss.dtype == torch.float32
        found, eps = torch.autograd.grad(loss, [*leaves.values()]), torch.finfo(dtype).eps
        same(loss.double(), theirs[0], f"{dtype} {memory}", 16 * eps)
        for (n, leaf), a, b in zip(leaves.items(), found, theirs[1], strict=True):
            assert a.dtype == leaf.dtype
            error = (a.double() - part.of(n, b)).norm() / b.norm()
            assert error <= 8 * eps, f"{dtype} {memory} {n}: {error}"
            assert not part.of(n, b).any() or a.any(), f"{dtype} {memory} {n}: zeros"


@check
def what_a_divergence_over_ranks_refuses() -> None:
    z, t = torch.zeros(4, 3), torch.ones(4, 3)
    call: Any = torch_ops.divergence
    raises(TypeError, "divergence: group must be a torch.distributed.ProcessGroup", lambda: call(z, t, group="tp"))
    raises(TypeError, "teacher must be a constant", lambda: call(z, t.requires_grad_(), group=group()))
    t = t.detach()
    raises(
        ValueError,
        "group must not be inside torch.func",
        lambda: torch.func.grad(lambda z: call(z, t, group=group()))(z),
    )
    if dist.get_world_size() > 1:
        rank = dist.get_rank()
        keep = torch.arange(4) != rank
        raises(ValueError, "keep must be the same on every rank", lambda: call(z, t, keep=keep, group=group()))
        keep = torch.tensor([True, False, False, True]) ^ (rank > 0)  # as many rows, whose numbers add up alike
        raises(ValueError, "keep must be the same on every rank", lambda: call(z, t, keep=keep, group=group()))
        no_mask_is_told_from_a_mask()
        fewer = z[: 4 - rank], t[: 4 - rank]
        raises(ValueError, "input must have as many rows on every rank", lambda: call(*fewer, group=group()))


@check
def messages_and_memory_of_divergences_are_those_of_the_documentation() -> None:
    rows, each, chunk = 64, 96, 8
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    z, t, x, y, lw, u = make(rows, each), make(rows, each), make(rows, 4), make(rows, 2), make(each, 4), make(each, 2)
    for kind in KINDS:
        leaf, more = z.clone().requires_grad_(), [2 * rows] * (kind in ("jsd", "tv"))
        with Messages() as sent:
            loss: Any = torch_ops.divergence(leaf, t, kind=kind, group=group())  # pyright: ignore
        assert sent.sizes() == sorted([8 * rows, *more]), f"{kind}: {sent.found}"
        with Messages() as sent:
            torch.autograd.grad(loss, leaf)
        assert not sent.found, sent.found
        for memory, pieces in (("fast", 8), ("lean", 1)):
            leaves = x.clone().requires_grad_(), lw.clone().requires_grad_()
            with Messages() as sent:
                given: Any = {"kind": kind, "memory": memory, "chunk_size": chunk, "group": group()}
                torch.autograd.grad(torch_ops.linear_divergence(*leaves, y, u, **given), leaves)
            due = [n // pieces for n in (8 * rows, *more) for _ in range(pieces)]
            assert sent.sizes() == sorted([*due, rows * 4]), f"{kind} {memory}: {sent.found}"


def no_mask_is_told_from_a_mask() -> None:
    """Of a rank without one, beside ranks that keep no row, is refused; beside ranks that keep all it is the same."""
    z = torch.linspace(-1.0, 1.0, 12).reshape(4, 3) * (1 + dist.get_rank())
    mask = lambda kept: None if dist.get_rank() else torch.full((4,), kept)  # noqa: E731
    call: Any = lambda kept: torch_ops.divergence(z, z.flip(1), keep=mask(kept), group=group())  # noqa: E731
    head: Any = lambda kept: torch_ops.linear_divergence(  # noqa: E731
        torch.eye(4), z.T, torch.eye(4), z.flip(1).T, keep=mask(kept), group=group()
    )
    for of in (call, head):
        raises(ValueError, "keep must be the same on every rank", lambda: of(False))  # noqa: B023
        assert of(True) > 0


@check
def no_mask_taken_for_one_of_nothing_is_seen() -> None:
    """The saboteur: a rank without a mask says what a mask of no row says."""
    if dist.get_world_size() == 1:
        return
    seen = False
    with mock.patch.object(divergences, "_shard", _as_numbers):
        try:
            no_mask_is_told_from_a_mask()
        except AssertionError:
            seen = True
    assert seen


def _as_numbers(op: str, place: Any, count: int, rows: int, keep: Any, x: Tensor, classes: int) -> Any:
    given = torch.zeros(rows, dtype=torch.int64) if keep is None else keep
    return shard_here(op, place, count, rows, given, classes, "keep")
