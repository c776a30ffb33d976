"""The largest storage that operations of PyTorch make; those alive at a time are `examples.torch_memory.Alive`'s."""

from __future__ import annotations

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
