"""`python -m tests.device.group DEVICE RANK WORLD STORE`: one rank of a head whose classes lie on a group's ranks.

Every rank makes the same arrays, runs the whole loss and the sharded one on its part, and compares its part of the
gradients. test_device_head.py starts the ranks.
"""

from __future__ import annotations

import datetime
import sys
from typing import Any

import torch
import torch.distributed as dist

import torch_ops
from tests.judging import cases

N, D, V = 40, 12, 30


def run(device: str, dtype: torch.dtype, near: float, options: dict[str, Any], *, soft: bool) -> None:
    """The sharded loss and gradients beside the whole ones, first order and in float64 second."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=g).to(device, dtype) for shape in ((N, D), (V, D), (V,)))
    target = torch.rand(N, V, generator=g) if soft else torch.randint(V, (N,), generator=g)
    if not soft:
        target[3] = -100
    target = target.to(device)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(V * rank // world, V * (rank + 1) // world)
    found = []
    for part, group in ((slice(None), None), (mine, dist.group.WORLD)):
        leaves = [a.clone().requires_grad_() for a in (x, w[part], b[part])]
        t = target[:, part] if soft else target
        head: Any = torch_ops.linear_cross_entropy
        out = head(leaves[0], leaves[1], t, linear_bias=leaves[2], group=group, **options)
        loss, stats = out if isinstance(out, tuple) else (out, {})
        total = loss.sum() + sum(s.sum() for s in stats.values() if s.is_floating_point())
        twice = dtype == torch.float64
        grads = torch.autograd.grad(total, leaves, create_graph=twice)
        if twice:
            grads += torch.autograd.grad(grads[0].square().sum(), leaves)
        found.append((loss, stats, [g.detach() for g in grads]))
    (loss, stats, whole), (ours, our_stats, sharded) = found
    torch.testing.assert_close(ours, loss, rtol=near, atol=near)
    for name, value in stats.items():
        torch.testing.assert_close(our_stats[name], value, rtol=near, atol=near)
    for k, (got, full) in enumerate(zip(sharded, whole, strict=True)):
        due = full if k % 3 == 0 else full[mine]
        assert float((got - due).norm()) <= near * float(full.norm()), f"gradient {k} of {options}, {dtype}"


def main(device: str, rank: int, world: int, store: str) -> None:
    """Join the group, compare, leave."""
    limit = datetime.timedelta(seconds=120)
    where = {"init_method": f"file://{store}", "rank": rank, "world_size": world, "timeout": limit}
    if device == "cuda":
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank), **where)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", **where)
    every = cases.OPTIONS["all"]
    for dtype, near in ((torch.float64, 1e-10), (torch.bfloat16, 2e-2)):
        run(device, dtype, near, {"chunk_size": 16}, soft=False)  # gradients on the way forward
        run(device, dtype, near, {**every, "reduction": "none", "stats": ("lse", "entropy", "argmax")}, soft=False)
        run(device, dtype, near, {**every, "memory": "lean", "chunk_size": 4}, soft=False)
        run(device, dtype, near, every, soft=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
