"""The memory of head and loss in PyTorch: bytes of storages alive, counted."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples.recipe import Recipe
from examples.torch_lm import LOSSES


class Alive(TorchDispatchMode):
    """Counts the storages that operations make under it, forward and backward, until they are freed.

    `peak` is in bytes. Views share a storage, which counts once; those of `given` do not count. On the demo's three
    losses the count is the CPU allocator's, as torch.profiler records it, but for a few bytes (PyTorch 2.13).
    """

    def __init__(self, *given: Tensor):
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, then counts what is new in its results."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def loss_bytes(recipe: Recipe, loss: str) -> int:
    """The most bytes alive at a time beyond hidden states, weight and targets, from the loss to both gradients."""
    rng = np.random.default_rng(recipe.seed)
    n = recipe.batch * recipe.length
    hidden = torch.from_numpy(rng.standard_normal((n, recipe.width), np.float32)).requires_grad_()
    weight = torch.from_numpy(recipe.initial_weights()["embedding"]).requires_grad_()
    target = torch.from_numpy(rng.integers(0, recipe.vocab, n))
    with Alive(hidden, weight, target) as alive:
        LOSSES[loss](hidden, weight, target).backward()
    return alive.peak
