"""`python -m tests.parallel.torch_ranks RANK WORLD STORE`: one rank's share of the checks of losses on many devices.

The checks stand in groups.py, confident.py, curved.py, meshes.py, pairs.py and divergences.py; each process has its
part of every result. test_torch.py starts the ranks.
"""

from __future__ import annotations

import datetime
import sys
import traceback

import torch
import torch.distributed as dist

from tests.parallel import confident, curved, divergences, groups, meshes, pairs  # noqa: F401  # whose checks CHECKS then lists
from tests.parallel.shards import CHECKS


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
