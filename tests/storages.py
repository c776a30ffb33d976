"""Storages that operations of PyTorch make: the largest, and those alive at a time.

A loop of a head is one operation to who looks on; `torch_ops._head.ops.is_observed` that says no shows what it makes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """`bytes` of the largest storage that an operation under it returned, those of `given` apart."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self._known = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self._known:
                self.bytes = max(self.bytes, storage.nbytes())
        return out


class Alive(TorchDispatchMode):
    """Counts the storages that operations make under it, forward and backward, until they are freed.

    `peak` is in bytes. Views share a storage, which counts once; those of `given` do not count.
    """

    def __init__(self, *given: Tensor):
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
