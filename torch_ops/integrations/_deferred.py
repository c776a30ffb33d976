"""A Tensor without memory: below autograd, where operations reach memory, its values are computed."""

from __future__ import annotations

import contextvars
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from torch_ops.integrations._call import Call
from torch_ops.integrations._later import Held, Later
from torch_ops.integrations._operations import without_masks

_ATEN = torch.ops.aten
# The operations that reached memory since one was noted down above autograd: their results are deferred too.
NOTED: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("noted", default=None)


class Deferred(Tensor):
    """Values to be computed when an operation wants them; autograd sees a tensor like any other."""

    later: Later
    call: Call
    meta: Tensor | None = None

    @classmethod
    def of(cls, later: Later, shape: Any, dtype: torch.dtype, device: torch.device, call: Call) -> Deferred:
        """A layer's output, not computed yet."""
        place = {"dtype": dtype, "device": device, "storage_size": 0}
        z = Tensor._make_wrapper_subclass(cls, shape, **place)  # pyright: ignore[reportAttributeAccessIssue]
        z.later, z.call = later, call
        return z

    def then(self, later: Later, meta: Tensor) -> Deferred:
        """What an operation made of it, not computed yet; `meta` has its sizes and strides."""
        place = {"strides": meta.stride(), "storage_offset": meta.storage_offset(), "storage_size": 0}
        make: Any = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        z = make(type(self), meta.shape, dtype=meta.dtype, device=self.device, **place)
        z.later, z.call, z.meta = later, self.call, meta
        return z

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _below(func, args, kwargs or {})


def _below(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    z = deferred_in((args, kwargs))[0]
    if func is _ATEN.detach.default:  # autograd's own, for what it saves
        return z.then(Later(lambda held=z.later: held.value().detach(), z.later), _meta(z))
    writes = func._schema.is_mutable
    noted_so_far = NOTED.get()
    if noted_so_far is not None:
        noted_so_far.append(func.overloadpacket.__name__)
        if not writes:
            noted = _later(func, args, kwargs, z)
            if noted is not None:
                return noted
        elif args[0] is z and z.later.is_alone() and len(deferred_in((args, kwargs))) == 1:
            return _later_in_place(func, args, kwargs, z)
    if torch.Tag.inplace_view in func.tags or func.overloadpacket in (_ATEN.set_, _ATEN.resize_):
        raise NotImplementedError(
            f"fuse_loss: model must not change the shape of logits in place; got {func}. "
            "restore_loss gives the model's own loss back."
        )
    for one in deferred_in((args, kwargs)):
        one.call.used(func.overloadpacket.__name__)
        if writes:
            one.later.settle()
    whole = {id(v): one for one in deferred_in((args, kwargs)) if (v := one.later.value()) is not None}
    args, kwargs = tree_map(_value, (args, kwargs))
    with torch._C.DisableTorchFunction():
        out = func(*args, **kwargs)
    return tree_map(lambda v: whole.get(id(v), v), out) if writes else out


def _later(func: Any, args: Any, kwargs: Any, z: Deferred) -> Deferred | None:
    """The operation's result, to be computed when asked for from its arguments as they are now."""
    if func is _ATEN.index.Tensor:  # sizes that depend on a mask
        args = (args[0], without_masks(args[1]))
    parents = [one.later for one in deferred_in((args, kwargs))]
    kept = tree_map(_keep, (args, kwargs))
    with torch._C.DisableTorchFunction():
        meta_args, meta_kwargs = tree_map(_meta, (args, kwargs))
        meta = func(*meta_args, **{k: v for k, v in meta_kwargs.items() if k != "device"})
    if not isinstance(meta, Tensor):
        return None

    def compute() -> Tensor:
        now_args, now_kwargs = tree_map(_kept, kept)
        return func(*now_args, **now_kwargs)

    return z.then(Later(compute, *parents), meta)


def _later_in_place(func: Any, args: Any, kwargs: Any, z: Deferred) -> Deferred:
    """A write into values that nobody else was told of."""
    before, kept = z.later, tree_map(_keep, (args[1:], kwargs))

    def compute() -> Tensor:
        now_args, now_kwargs = tree_map(_kept, kept)
        return func(before.value(), *now_args, **now_kwargs)

    z.later = Later(compute, before)
    before.leave()
    return z


def _keep(a: Any) -> Any:
    return a.later if isinstance(a, Deferred) else Held(a) if isinstance(a, Tensor) else a


def _kept(a: Any) -> Any:
    return a.value() if isinstance(a, Later) else a.values() if isinstance(a, Held) else a


def _meta(a: Any) -> Any:
    if not isinstance(a, Deferred):
        return a.to("meta") if isinstance(a, Tensor) else a
    if a.meta is None:  # here, where no mode that counts arrays sees it
        a.meta = torch.empty(a.shape, dtype=a.dtype, device="meta")
    return a.meta


def _value(a: Any) -> Any:
    return a.later.value() if isinstance(a, Deferred) else a


def deferred_in(tree: Any) -> list[Deferred]:
    found: list[Deferred] = []
    tree_map(lambda a: found.append(a) if isinstance(a, Deferred) else None, tree)
    return found
