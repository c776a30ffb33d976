"""The numbers a sampled gradient's points are taken from: a generator's, the same again where a checkpoint recomputes.

PyTorch's checkpoint puts back the default generators. Of one that is handed over only its holder knows: its state
before each draw is left with the checkpoint, where the recomputation finds it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torch_ops import _modes as modes

_STATES, _COUNT = "_softmax_ext_states", "_softmax_ext_draws"


def uniform(*size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Float32 numbers in [0, 1), drawn at once: on some devices the numbers of two draws are not those of one."""
    if generator is None:  # not handed on as None: the op with a generator takes no sizes that are symbols
        return torch.rand(*size, device=device, dtype=torch.float32)
    with replayed(generator):
        return torch.rand(*size, device=device, dtype=torch.float32, generator=generator)


@contextmanager
def replayed(generator: torch.Generator) -> Iterator[None]:
    """Draws within are those of the forward pass, where this is its recomputation by a checkpoint without reentry."""
    hook = None if torch.compiler.is_compiling() else modes.packing_hook()
    if hook is None:
        yield
        return
    # The hooks of torch.utils.checkpoint: a forward's knows its frame, a recomputation's refers to that. Others' may be
    # anything that can be called.
    plain = inspect.unwrap(hook)
    theirs = inspect.isfunction(plain) and plain.__module__ == "torch.utils.checkpoint"
    known = inspect.getclosurevars(plain).nonlocals if theirs else {}
    if "frame" in known:
        vars(known["frame"]).setdefault(_STATES, []).append(generator.get_state())
        yield
    elif "target_frame_ref" in known:
        count = vars(hook)[_COUNT] = vars(hook).get(_COUNT, 0) + 1
        states = vars(known["target_frame_ref"]()).get(_STATES, [])[count - 1 :]
        now = generator.get_state()
        put_back = bool(states) and not torch.equal(states[0], now)  # the default generator is where it was already
        if put_back:
            generator.set_state(states[0])
        yield
        if put_back:
            generator.set_state(now)
    else:
        yield
