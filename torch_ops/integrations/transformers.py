"""Hugging Face transformers: a causal language model's training loss through `linear_cross_entropy`, in one call."""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from softmax_ext import contract
from torch_ops.integrations._linear_logits import DeferringLinear, LinearLogits, Pass

_M = TypeVar("_M", bound=nn.Module)


def fuse_loss(
    model: _M,
    *,
    memory: Literal["fast", "lean"] = "fast",
    chunk_size: int | None = None,
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
    if return_logits is not None:
        contract.flag("fuse_loss", "return_logits", return_logits)
    inner = _with_head("fuse_loss", model)
    kind = type(inner)
    if not issubclass(kind, _Fused):
        inner.__class__ = _fused(kind)
    inner._fusion = _Options(memory, chunk_size, return_logits)
    if not _defer(inner):
        found = type(inner.get_output_embeddings()).__name__
        restore_loss(model)
        contract.fail_value("fuse_loss", "model", "end in a torch.nn.Linear", found)
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
        del inner._fusion
    for module in inner.modules():
        if type(module) is DeferringLinear:
            module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
            vars(module).pop("current", None)
    return model


@dataclass(frozen=True)
class _Options:
    """What fuse_loss was asked for."""

    memory: str
    chunk_size: int | None
    return_logits: bool | None


class _Fused:
    """Marks the classes that `_fused` makes."""

    _own: Any
    _fusion: _Options


@functools.cache
def _fused(own: type) -> type:
    """A subclass under the same name: what looks at the class, its name or forward's signature sees no difference.

    A class rather than an attribute of the instance: copies, replicas and compiled graphs each find their own self.
    """
    place = list(inspect.signature(own.forward).parameters).index("labels") - 1  # self is not among the arguments

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, return_logits: bool | None = None, **kwargs: Any) -> Any:
        options = self._fusion
        keep = options.return_logits if return_logits is None else return_logits
        labels = kwargs.get("labels") if len(args) <= place else args[place]
        if labels is None or (not self.training if keep is None else keep):
            return own.forward(self, *args, **kwargs)
        made_in = Pass(options.memory, options.chunk_size)
        layers = _deferring(self) if torch.compiler.is_compiling() else _defer(self)
        if _is_watched(self.get_output_embeddings()):
            layers, made_in.why_not = [], "its head has hooks, which want a tensor"
        for layer in layers:
            layer.current = made_in
        try:
            output = own.forward(self, *args, **kwargs)
        finally:
            for layer in layers:
                layer.current = None
        return _settled(output, made_in)

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


def _defer(model: Any) -> list[DeferringLinear]:
    """The head's linear layers over the classes, made to defer: the head itself, or those an adapter is made of."""
    head = model.get_output_embeddings()
    layers = [m for m in head.modules() if isinstance(m, nn.Linear)] if isinstance(head, nn.Module) else []
    classes = max((m.out_features for m in layers), default=0)
    for layer in layers:
        # An instance's own forward (a hook of accelerate) would not be ours.
        if type(layer) is nn.Linear and layer.out_features == classes and "forward" not in vars(layer):
            layer.__class__ = DeferringLinear
    return _deferring(model)


def _deferring(model: Any) -> list[DeferringLinear]:
    head = model.get_output_embeddings()
    return [m for m in head.modules() if isinstance(m, DeferringLinear)] if isinstance(head, nn.Module) else []


def _is_watched(head: nn.Module) -> bool:
    """Whether something takes or changes the head's output or its gradients, as tensor parallelism and ZeRO do."""
    return any(m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in head.modules())


def _settled(output: Any, made_in: Pass) -> Any:
    """The output without the logits that the loss made superfluous, or with them as a tensor."""
    if not made_in.fused:
        _warn(made_in)
    settle = _left_out if made_in.fused else _as_tensor
    if isinstance(output, dict):
        # A ModelOutput made anew: it cannot forget a key.
        fields = {name: settle(value) for name, value in output.items()}
        return type(output)(**{name: value for name, value in fields.items() if value is not None})
    return tuple(map(settle, output)) if isinstance(output, tuple) else settle(output)


def _left_out(value: Any) -> Any:
    if not isinstance(value, LinearLogits):
        return value
    return value.value  # None, unless the model needed them beside the loss


def _as_tensor(value: Any) -> Any:
    return value.tensor("output") if isinstance(value, LinearLogits) else value


def _warn(made_in: Pass) -> None:
    if not torch.compiler.is_compiling():
        why = made_in.why_not or "the model did not use its head"
        warnings.warn(f"fuse_loss: the loss is not fused, because {why}.", stacklevel=4)
