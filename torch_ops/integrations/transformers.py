"""Hugging Face transformers: a language model's training loss through `linear_cross_entropy`, in one call."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from softmax_ext import contract
from torch_ops.integrations import _head
from torch_ops.integrations._call import CALL, TRACED, WATCHED, Call, is_watched, surroundings
from torch_ops.integrations._logits import LinearLogits, Logits, computed
from torch_ops.integrations._wrappers import leads_to

_M = TypeVar("_M", bound=nn.Module)


def fuse_loss(
    model: _M,
    *,
    memory: Literal["fast", "lean"] = "fast",
    chunk_size: int | None = None,
    grad_samples: int | None = None,
    return_logits: bool | None = None,
) -> _M:
    """Make a causal language model of transformers compute its loss without its (N, V) logits, in nats.

    The model's own forward runs unchanged. While it is called with labels, the linear layer it ends in gives
    `LinearLogits` in place of a tensor; what the model does with them (scale, soft cap, cast, shift, reshape) is noted
    down, and its own call of `F.cross_entropy` becomes `torch_ops.linear_cross_entropy`. Labels, ignored positions,
    `num_items_in_batch` and the shift are thus the model's. Where it uses the logits in another way, they are
    computed as before and a warning names the operation: the loss is never wrong, only not fused.

    Call it again after the head was replaced (resized embeddings) where the model is compiled; elsewhere a new head
    is noticed. Weights, state_dict, configuration, class name and signature of forward stay as they are.

    Args:
        model: a transformers model with an output layer (`get_output_embeddings`), or a module that holds one: of
            PEFT, DistributedDataParallel, torch.compile.
        memory: "fast" or "lean", see `torch_ops.linear_cross_entropy`.
        chunk_size: rows (fast) or classes (lean) at a time; None takes the most that fit the workspace.
        grad_samples: K, for an exact loss whose gradient is sampled at K points a row, or None for the exact one; see
            `torch_ops.linear_cross_entropy`. Points are drawn from the default generator of the input's device.
        return_logits: whether a call with labels returns logits beside the loss: True computes them and the loss as
            the model does, False leaves them out, None is False in training mode and True in evaluation mode, where
            Trainer's metrics want them. `model(..., return_logits=...)` says so for one call. Without labels logits
            are always returned.

    Returns:
        The same object. Its output's `logits` is None where they are left out.

    Raises:
        TypeError: no transformers model, or an option of the wrong type.
        ValueError: the model has no output layer, or none that is a torch.nn.Linear.

    Memory:
        That of `torch_ops.linear_cross_entropy`: no (N, V) array beyond its workspace, forward and backward.

    Source:
        `torch_ops.linear_cross_entropy`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torch_ops.integrations.transformers import fuse_loss
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = fuse_loss(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))
        >>> tokens = torch.arange(6).reshape(1, 6)
        >>> out = model(input_ids=tokens, labels=tokens)
        >>> out.loss.shape, out.logits
        (torch.Size([]), None)
        >>> model(input_ids=tokens).logits.shape
        torch.Size([1, 6, 32])
    """
    contract.head_options("fuse_loss", 0, memory, chunk_size)
    contract.sampling("fuse_loss", grad_samples, memory)
    if return_logits is not None:
        contract.flag("fuse_loss", "return_logits", return_logits)
    inner = _with_head("fuse_loss", model)
    if not _head.layers_of(inner.get_output_embeddings()):
        contract.fail_value("fuse_loss", "model", "end in a torch.nn.Linear", _kind_of_head(inner))
    if not issubclass(type(inner), _Fused):
        inner.__class__ = _fused(type(inner))
    on_instance = vars(inner).get("forward")
    known = vars(inner).get("_fusion")
    own = known.own if known else None
    if on_instance is not None and not leads_to(on_instance, _forward_of(inner)):
        own = vars(inner).pop("forward")
    inner._fusion = _Fusion(memory, chunk_size, grad_samples, return_logits, own)
    _attended(inner)
    return model


def restore_loss(model: _M) -> _M:
    """Undo `fuse_loss`: the model and its head are of their own classes again.

    Args:
        model: what `fuse_loss` was given; a model that is not fused is left as it is.

    Returns:
        The same object.

    Raises:
        TypeError: no transformers model.
        ValueError: the class of the model was changed again since (by FSDP, say).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torch_ops.integrations.transformers import fuse_loss, restore_loss
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> type(restore_loss(fuse_loss(model))) is LlamaForCausalLM
        True
    """
    inner = _with_head("restore_loss", model)
    kind = type(inner)
    if issubclass(kind, _Fused):
        if "_own" not in vars(kind):
            contract.fail_value("restore_loss", "model", "have the class that fuse_loss gave it", kind.__name__)
        inner.__class__ = kind._own
        own = inner._fusion.own
        del inner._fusion
        if own is not None:
            # What was put over ours since still calls ours, which then goes on to this.
            vars(inner)["_forward_before_fuse_loss" if "forward" in vars(inner) else "forward"] = own
    for module in inner.modules():
        _head.leave(module)
    return model


@dataclass
class _Fusion:
    """What fuse_loss was asked for, the forward that stood on the instance then, and the warnings given."""

    memory: str
    chunk_size: int | None
    grad_samples: int | None
    return_logits: bool | None
    own: Callable[..., Any] | None
    said: set[str] = field(default_factory=set)


class _Fused:
    """Marks the classes that `_fused` makes."""

    _own: Any
    _fusion: _Fusion

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "forward" and "_fusion" in vars(self) and not leads_to(value, _forward_of(self)):
            warnings.warn(
                "fuse_loss: the loss is not fused from here on, because the model's forward was replaced by one that "
                "does not call the one it had; call fuse_loss again.",
                stacklevel=2,
            )


@functools.cache
def _fused(own: type) -> type:
    """A subclass under the same name: what looks at the class, its name or forward's signature sees no difference.

    A class rather than an attribute of the instance: copies, replicas and compiled graphs each find their own self.
    """
    place = list(inspect.signature(own.forward).parameters).index("labels") - 1  # self is not among the arguments

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fusion = vars(self).get("_fusion")
        before = vars(self).get("_forward_before_fuse_loss") if fusion is None else fusion.own
        run = functools.partial(own.forward, self) if before is None else before
        if fusion is None:  # restored, under a wrapper that was put on between
            return run(*args, **kwargs)
        asked = kwargs.pop("return_logits", None)
        keep = fusion.return_logits if asked is None else asked
        labels = kwargs.get("labels") if len(args) <= place else args[place]
        unfused = labels is None or (not self.training if keep is None else keep)
        how = fusion.memory, fusion.chunk_size, fusion.grad_samples
        call = None if unfused else Call(self, *how, fusion.said, torch.is_grad_enabled())
        if torch.compiler.is_compiling():
            return _traced(self, call, run, args, kwargs)
        if call is not None:
            call.context = surroundings()
            call.layers, call.why_not = _attended(self)
        known = CALL.set(call)
        try:
            output = run(*args, **kwargs)
        finally:
            CALL.reset(known)
        return output if call is None else _settled(output, call)

    # Its signature, and no way round it for what undoes wrappers.
    functools.update_wrapper(forward, own.forward)
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(own.forward)  # pyright: ignore[reportFunctionMemberAccess]

    def reduce(self: Any, protocol: Any) -> Any:
        # Found by its name, as pickle looks for it, is the model's own class.
        _, _, *state = object.__reduce_ex__(self, 2)
        return _unpickled, (own,), *state

    members = {"_own": own, "forward": forward, "__reduce_ex__": reduce, "__module__": own.__module__}
    members |= {"__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own)(own.__name__, (_Fused, own), members)


def _unpickled(own: type) -> Any:
    kind: Any = _fused(own)
    return kind.__new__(kind)


def _with_head(op: str, model: Any) -> Any:
    """The transformers model that ends in the head: the outermost one with an output layer."""
    if not isinstance(model, nn.Module):
        contract.fail_type(op, "model", "be a torch.nn.Module", f"{type(model).__name__} object")
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not found:
        contract.fail_type(op, "model", "be or hold a transformers model", f"{type(model).__name__} object")
    for inner in found:
        if inner.get_output_embeddings() is not None and "labels" in inspect.signature(inner.forward).parameters:
            return inner
    contract.fail_value(op, "model", "have an output layer and take labels", type(found[0]).__name__)


def _attended(model: Any) -> tuple[tuple[nn.Module, ...], str]:
    """(the layers whose output is to be noted down, why there are none)."""
    head = model.get_output_embeddings()
    layers = _head.layers_of(head)
    if not layers:
        return (), f"its head is now a {_kind_of_head(model)} with a forward of its own"
    if is_watched(*head.modules()):
        return (), WATCHED
    for layer in layers:
        _head.attend(layer)
    return tuple(layers), ""


def _forward_of(model: Any) -> Any:
    return type(model).forward


def _kind_of_head(model: Any) -> str:
    return type(model.get_output_embeddings()).__name__


def _traced(model: Any, call: Call | None, run: Any, args: Any, kwargs: Any) -> Any:
    """The same under torch.compile."""
    if call is not None and not is_watched(*model.get_output_embeddings().modules()):
        call.layers = tuple(_head.layers_of(model.get_output_embeddings()))
    before = TRACED.call
    TRACED.call = call
    try:
        output = run(*args, **kwargs)
    finally:
        TRACED.call = before
    return output if call is None else _settled(output, call)


def _settled(output: Any, call: Call) -> Any:
    """The output without the logits that the loss made superfluous, or with them as a tensor."""
    if not call.fused:
        _warn(call)
    top = _left_out if call.fused else _plain
    if isinstance(output, dict):
        # A ModelOutput made anew: it cannot forget a key.
        fields = {name: top(value) for name, value in output.items()}
        return type(output)(**{name: value for name, value in fields.items() if value is not None})
    return tuple(map(top, output)) if type(output) is tuple else top(output)


def _left_out(value: Any) -> Any:
    if isinstance(value, Logits):  # None, unless the model needed them beside the loss
        return computed(value) if isinstance(value, LinearLogits) and value.later.is_computed else None
    return _plain(value)


def _plain(value: Any) -> Any:
    """With every tensor of logits in it computed."""
    return tree_map(computed, value)


def _warn(call: Call) -> None:
    if not torch.compiler.is_compiling():
        why = call.why_not or "its head was not called by its forward, or in a compiled graph"
        warnings.warn(f"fuse_loss: the loss is not fused, because {why}.", stacklevel=4)
