"""What PyTorch is doing around a call: who differentiates, maps, traces, exports or converts what is computed now."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_c: Any = torch._C
# Bound once: these are asked before every small call, and a look-up by name is a part of its time.
_interpreter, _autocasts = _c._functorch.peek_interpreter_stack, _c._is_any_autocast_enabled
_dispatch_modes = _c._len_torch_dispatch_stack
_mode, _keys = _c._get_dispatch_mode, _c._TorchDispatchModeKey


def has_autocast(device: str) -> bool:
    """torch.amp.is_autocast_available, which PyTorch 2.11's compiler cannot trace: a constant to it (_compiler.py)."""
    return torch.amp.is_autocast_available(device)


def is_transformed(x: Tensor) -> bool:
    """Whether torch.func is at work on x: its values cannot be looked at, its memory not be written."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def is_transforming() -> bool:
    """Whether a transform of torch.func or forward mode is under way, of whatever arguments."""
    return _interpreter() is not None or forward_ad._current_level >= 0


def is_constant(*args: Any) -> bool:
    """Whether nobody differentiates or maps what is computed from the arguments now."""
    if _interpreter() is not None or forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled():
        for x in args:  # any() over a generator would double the time
            if isinstance(x, Tensor) and x.requires_grad:
                return False
    return True


def is_wanted(x: Tensor) -> bool:
    """Whether autograd records what a direct call (is_direct) makes of x."""
    return x.requires_grad and torch.is_grad_enabled()


def is_untracked(*arrays: Tensor | None) -> bool:
    """Whether nobody differentiates or batches what is computed from the arrays now."""
    return not torch.is_grad_enabled() and not any(
        x is not None
        and (
            is_transformed(x)
            or torch._C._functorch.is_legacy_batchedtensor(x)  # pyright: ignore[reportAttributeAccessIssue]
            or forward_ad.unpack_dual(x).tangent is not None
        )
        for x in arrays
    )


def is_direct(x: Tensor) -> bool:
    """Whether a call on x is eager, and nothing converts, maps, intercepts or traces it."""
    return (
        not is_compiling()  # first: a compiler may not know the sizes
        and x.numel() > 0
        and _interpreter() is None
        and forward_ad._current_level < 0
        and not _autocasts()
        and _dispatch_modes() == 0
        and x.layout is torch.strided
        and not x.is_nested
    )


def is_plain(x: Tensor) -> bool:
    """Whether x takes ops of ours: subclasses, but for the compiler's own, may know the framework's only."""
    return type(x) in (Tensor, torch.nn.Parameter) or is_fake(x)


def dispatches(x: Tensor) -> bool:
    """Whether x is of a subclass with a say in what is done to its values."""
    return type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]


def is_fake(x: Any) -> bool:
    """Whether x is one of the compiler's tensors, which have no values."""
    return type(x).__module__.startswith("torch._subclasses")


def is_on_mesh(*arrays: Any) -> bool:
    """Whether one of the arguments is a DTensor; asked by name, because few have imported that module."""
    return any(type(a).__name__ == "DTensor" for a in arrays)


def is_none(count: Any) -> bool:
    """Whether a size is 0; no, where it depends on data that a compiler does not know."""
    if isinstance(count, Tensor) or (type(count) is int and not is_compiling()):
        return bool(count == 0)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # loaded by whoever made such a size

    return guard_or_false(count == 0)


def can_look(target: Tensor) -> bool:
    """Whether a look at values is free: elsewhere it is a device sync, a graph break, or impossible (vmap, fake)."""
    return target.device.type == "cpu" and is_eager(target)


def is_eager(target: Tensor) -> bool:
    """Whether a call on a plain tensor is run here and now."""
    return not (is_compiling() or dispatches(target) or is_transformed(target) or is_traced())


def is_observed(*arrays: Any) -> bool:
    """Whether somebody is shown each op on the arrays: who traces, counts, or keeps some for a recompute."""
    return is_traced() or _dispatch_modes() > 0 or any(map(is_fake, arrays))


def is_watched() -> bool:
    """Whether hooks are told what autograd saves (checkpoints, offloading, profilers): it then checks no version."""
    return _c._autograd._top_saved_tensors_default_hooks(True) is not None


def packing_hook() -> Any:
    """What is told of a tensor that autograd saves now, or None."""
    hooks = _c._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def is_traced() -> bool:
    """Whether what is done now is written into a graph."""
    # no any() over the three: it takes four times as long, and a small call asks twice
    return _mode(_keys.PROXY) is not None or _mode(_keys.FAKE) is not None or _mode(_keys.FUNCTIONAL) is not None


def may_write(*arrays: Tensor | None) -> bool:
    """Whether loops may write into buffers: not where someone dispatches on what is done to the arrays."""
    return not torch.compiler.is_exporting() and not any(
        v is not None
        and (
            not is_plain(v) or torch._C._functorch.is_legacy_batchedtensor(v)  # pyright: ignore[reportAttributeAccessIssue]
        )
        for v in arrays
    )


def is_sole(x: Tensor) -> bool:
    """Whether x, the tensor it is a view of and the views between are all that lies on its memory.

    What else does (what a hook keeps, an output that its own derivative needs, a metric's view) may be read without a
    look at the version of x.
    """
    known, base, node = 1, x._base, x.grad_fn
    while base is not None and node is not None and node is not base.grad_fn:
        known += 1
        node = node.next_functions[0][0] if node.next_functions else None
    # What hooks were handed of an output is the output itself, which counts no owner more.
    if any(told_hooks(maker) for maker in (x.grad_fn, None if x._base is None else x._base.grad_fn)):
        return False
    memory = x.untyped_storage()  # one owner more while it is held
    return _c._storage_Use_Count(memory._cdata) <= known + 1


def told_hooks(node: Any) -> bool:
    """Whether saved-tensor hooks were told what an autograd node saved, its output perhaps."""
    for name in _saved_names(type(node)):
        try:
            saved = getattr(node, name)
        except RuntimeError:  # freed: its derivative is done
            continue
        for one in saved if isinstance(saved, tuple) else (saved,):
            if getattr(one, "unpack_hook", None) is not None:
                return True
    return False


@lru_cache(maxsize=256)  # `dir` takes longer than a small loss and its gradient
def _saved_names(node: type) -> list[str]:
    return [name for name in dir(node) if name.startswith("_raw_saved_")]


def may_overwrite(x: Tensor) -> bool:
    """Whether a gradient may be written over x: not over a parameter, not where elements share memory.

    Nor over a part of a larger tensor: its other parts share the version counter, and would be refused theirs. Nor
    where hooks are told what autograd saves: nobody checks versions there.
    """
    if is_compiling() or is_transformed(x) or is_watched():
        return False
    owner = x if x._base is None else x._base
    dense = torch.ops.aten.is_non_overlapping_and_dense.default(x)
    return x.requires_grad and not x.is_leaf and not owner.is_leaf and dense and owner.numel() == x.numel()
