"""Values that are computed when first asked for, from memory as it was when they were noted down."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TORCH: Any = torch  # private names

_CLONING = threading.Lock()


class Held:
    """A tensor as it is now: its values, and its place in autograd's graph.

    The values are a copy on write (`torch._lazy_clone`): nothing is copied unless somebody writes into the tensor while
    this lives. Versions would not do: `.data` goes round them, and an old value they cannot give back.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.node, self.tracked = tensor, tensor.grad_fn, tensor.requires_grad
        plain = tensor.detach()
        self.version = None if tensor.is_inference() else tensor._version
        try:
            with _CLONING:  # of the same memory by two threads at once it is not safe
                self.copy, self.is_copy = _TORCH._lazy_clone(plain), True
        except RuntimeError:
            # Memory that is not PyTorch's own (a mapped file, NumPy's, shared): a write is noticed, not undone.
            self.copy, self.is_copy = plain, False
        self.bits = None if self.is_copy else _bits(plain)

    def is_unwritten(self) -> bool:
        """Whether the tensor still has these values."""
        there = _TORCH._C._data_address
        here = (self.tensor.shape, self.tensor.stride(), there(self.tensor))
        if here != (self.copy.shape, self.copy.stride(), there(self.copy)):
            return False
        return self.is_copy or (self.version in (None, self.tensor._version) and self.bits == _bits(self.copy))

    def is_same(self) -> bool:
        """Whether the tensor still has these values, and its gradient still goes where it went."""
        place = self.tensor.grad_fn is self.node and self.tensor.requires_grad == self.tracked
        return place and self.is_unwritten()

    def values(self) -> Tensor:
        """Without a gradient."""
        if not self.is_copy and not self.is_unwritten():
            raise RuntimeError(
                "fuse_loss: model must not write into its head or hidden states between head and loss where their "
                f"memory is not PyTorch's own; got a write into {tuple(self.copy.shape)}."
            )
        return self.copy


def _bits(plain: Tensor) -> int:
    """A sum over the memory, which a write changes: one read of it."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.itemsize]
    return int(plain.contiguous().view(kind).sum(dtype=torch.int64)) if plain.numel() else 0


class Later:
    """One value, shared by the tensors that stand for it; `family` are all that are computed from the same."""

    __slots__ = ("__weakref__", "_compute", "_value", "family")

    def __init__(self, compute: Callable[[], Tensor], *parents: Later) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._value: Tensor | None = None
        self.family: weakref.WeakSet[Later] = parents[0].family if parents else weakref.WeakSet()
        for parent in parents[1:]:
            if parent.family is not self.family:
                self._join(parent.family)
        self.family.add(self)

    def _join(self, others: weakref.WeakSet[Later]) -> None:
        for later in list(others):
            self.family.add(later)
            later.family = self.family

    @property
    def is_computed(self) -> bool:
        """Whether it was asked for."""
        return self._value is not None

    def value(self) -> Tensor:
        """The value, computed once; below autograd, autocast and torch function modes."""
        if self._compute is not None:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._value, self._compute = self._compute(), None
        assert self._value is not None
        return self._value

    def settle(self) -> None:
        """Before a write: what was noted down of the old values is computed from them."""
        for later in list(self.family):
            later.value()

    def is_alone(self) -> bool:
        """Whether nobody else was told of this value, so that a write can be noted down too."""
        return len(self.family) == 1 and self in self.family

    def leave(self) -> None:
        """Known to its successor only."""
        self.family.discard(self)
