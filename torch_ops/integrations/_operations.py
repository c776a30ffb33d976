"""What PyTorch's functions ask of a tensor, for those that autograd's dispatch does not tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def _methods(names: str) -> set[Any]:
    return {getattr(Tensor, name) for name in names.split()}


def _read(names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names.split()}


def _set(names: str) -> set[Any]:
    return {getattr(Tensor, name).__set__ for name in names.split()}


# Sizes, type, place: true without values.
FACTS: set[Any] = {
    *_read("shape dtype device ndim layout is_leaf requires_grad is_cuda is_cpu is_meta is_sparse itemsize nbytes"),
    *_methods("dim size stride numel nelement ndimension storage_offset is_contiguous is_floating_point is_complex"),
    *_methods("untyped_storage element_size get_device type __len__ is_inference is_signed is_pinned is_same_size"),
    *_methods("_is_view __hash__"),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}

# Memory, read past autograd.
MEMORY: set[Any] = {
    *_methods("numpy tolist data_ptr storage _typed_storage __array__ __dlpack__ __deepcopy__ __reduce_ex__ __repr__"),
    *_methods("detach share_memory_ is_shared apply_ map_"),
    *_read("data"),
}

# Their gradient, or their place in autograd's graph.
WATCHES: set[Any] = {
    *_methods("register_hook retain_grad requires_grad_ detach_ backward"),
    *_read("grad_fn grad _backward_hooks"),
    *_set("requires_grad data"),
    *(torch.autograd.grad, torch.autograd.backward),
}

# The steps that write.
WRITES = (Tensor.mul_, Tensor.div_, Tensor.add_)

# What the steps of a recipe are below autograd: one operation, or some of the last row's.
_ONE = {
    "mul": "mul",
    "multiply": "mul",
    "div": "div",
    "divide": "div",
    "true_divide": "div",
    "tanh": "tanh",
    "add": "add",
}
_LAYOUT = {"view", "_unsafe_view", "clone", "_to_copy", "slice", "select", "index", "unsqueeze", "alias"}


def is_expected(func: Any, reached: list[str]) -> bool:
    """Whether these operations are what a step is made of, and nothing else."""
    name = func.__name__.rstrip("_")
    if name in _ONE:
        return [one.rstrip("_") for one in reached] == [_ONE[name]]
    return set(reached) <= _LAYOUT


_NAMES = {"__getitem__": "indexing", "__setitem__": "assignment", "mul": "multiplication", "div": "division"}
_NAMES |= {"add": "addition", "sub": "subtraction", "mul_": "multiplication in place", "add_": "addition in place"}


def name_of(func: Any) -> str:
    """As the model's code has it."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        name = getattr(func.__self__, "__name__", name)
    return _NAMES.get(name, name)


def without_masks(index: list[Tensor | None]) -> list[Tensor | None]:
    """An index whose result's sizes do not depend on values."""
    masks = (torch.bool, torch.uint8)
    parts = [[i] if i is None or i.dtype not in masks else i.nonzero(as_tuple=True) for i in index]
    return [i for part in parts for i in part]
