"""What the ranks share: the checks' list, arrays in parts, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torch_ops

F64 = torch.float64
N, D = 7, 3
CHECKS: list[Callable[[], None]] = []
EVERY: dict[str, Any] = {"label_smoothing": 0.2, "logit_scale": 1.3, "softcap": 9.0, "z_loss": 0.05}
# Classes of each rank: unequal, one each, none somewhere.
SIZES = {1: [(5,)], 2: [(5, 3), (1, 1), (4, 0), (0, 1)], 3: [(4, 1, 3), (1, 1, 1), (2, 0, 5)]}
# Where each array is cut by class.
CUT = {"z": 1, "row": 0, "lw": 0, "lb": 0, "y": 1, "w": 0, "up": 0, "t": 1, "u": 0, "c": 0}


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
    found |= {
        "s": make(N).abs() + 0.3,
        "one": make(1).squeeze(0).abs() + 0.3,
        "down": make(2, D),
        "up": make(classes, 2),
    }
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
    def fn(z: Tensor, y: Any = None, w: Any = None, tw: Any = None, s: Any = None, one: Any = None) -> Any:
        t: Any = target if y is None else y
        more = {
            **options,
            "logit_scale": options.get("logit_scale", 1.0) if s is one is None else one if s is None else s,
        }
        return outputs(torch_ops.cross_entropy(z, t, w, token_weight=tw, group=over, **more))

    return fn


def head_loss(target: Tensor | None, options: dict[str, Any], over: Any) -> Fn:
    def fn(x: Tensor, lw: Tensor, lb: Any = None, y: Any = None, w: Any = None, tw: Any = None, **few: Any) -> Any:
        t: Any = target if y is None else y
        given = {**options, "linear_bias": lb, "weight": w, "token_weight": tw, "group": over}
        given |= {"logit_scale": few["s" if "s" in few else "one"]} if few.keys() & {"s", "one"} else {}
        given |= {"low_rank": (few["down"], few["up"])} if "up" in few else {}
        return outputs(torch_ops.linear_cross_entropy(x, lw, t, **given))

    return fn


def raises(error: type[Exception], words: str, fn: Callable[[], Any]) -> None:
    told = ""
    try:
        fn()
    except error as e:
        told = str(e)
    assert words in told, f"{error.__name__} '{words}', not '{told}'"


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


def cut(full: Tensor, mesh: DeviceMesh, *where: Any) -> DTensor:
    found: Any = distribute_tensor(full.clone(), mesh, [*where], src_data_rank=None)
    return found.requires_grad_(full.is_floating_point())


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
