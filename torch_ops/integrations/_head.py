"""The layer a model ends in: while a call asks for it, its `F.linear` gives `LinearLogits`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torch_ops.integrations._call import CALL, TRACED, Call, asked_by_model, surroundings
from torch_ops.integrations._later import Held, Later
from torch_ops.integrations._logits import LinearLogits, TracedLogits
from torch_ops.integrations._operations import PLAIN
from torch_ops.integrations._recipe import Recipe


def layers_of(head: Any) -> list[nn.Linear]:
    """The head's linear layers over the classes: the head itself, or those an adapter is made of."""
    layers = [m for m in head.modules() if isinstance(m, nn.Linear)] if isinstance(head, nn.Module) else []
    classes = 0
    for layer in layers:
        classes = max(classes, layer.out_features)
    return [m for m in layers if m.out_features == classes and is_plain(m)]


def is_plain(layer: nn.Linear) -> bool:
    """Whether it computes F.linear of its input: parametrised weights do, a forward of its own may not."""
    return type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)


def attend(layer: nn.Module) -> None:
    """Have `enter` called before the layer, after every other hook: its class and its forward stay what they are."""
    hooks: Any = layer._forward_pre_hooks
    ours = [key for key, hook in hooks.items() if hook is enter]
    if not ours:
        layer.register_forward_pre_hook(enter)
    elif ours[0] != next(reversed(hooks)):
        hooks.move_to_end(ours[0])


def leave(layer: nn.Module) -> None:
    """Undo `attend`."""
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is enter]:
        del layer._forward_pre_hooks[key]


def enter(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook: the input, told of the call where the call's own model asks."""
    tracing = torch.compiler.is_compiling()
    call = TRACED.call if tracing else CALL.get()
    if call is None or not call.is_of(layer) or len(args) != 1 or type(args[0]) not in PLAIN:
        return None
    if not tracing and (not asked_by_model(layer, call) or not _is_eager(call)):
        return None
    x = args[0].as_subclass(HeadInput)
    x.source, x.call = args[0], call
    return (x,)


def _is_eager(call: Call) -> bool:
    """Whether no graph is made of what takes the logits: a compiler wants tensors that have memory."""
    compiler: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
    if not callable(compiler.get_eval_frame_callback()):
        return True
    call.why_not = call.why_not or "its head ran between two graphs of torch.compile"
    return False


class HeadInput(Tensor):
    """The hidden states on their way through the layer's forward: F.linear of them is noted down."""

    source: Tensor
    call: Call

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args_, kwargs_ = tree_map(lambda a: a.source if isinstance(a, HeadInput) else a, (args, kwargs or {}))
        if func is F.linear and isinstance(args[0], HeadInput) and not kwargs_:
            return linear(args[0].call, *args_)
        return func(*args_, **kwargs_)


def linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, noted down where that is the same."""
    arrays = (x, weight) if bias is None else (x, weight, bias)
    if torch.compiler.is_compiling():
        if torch.is_grad_enabled() != call.grad:
            return F.linear(*arrays)
        # Copies, for a graph may write into either before its loss; the compiler drops those that it sees no write for.
        now = [a.clone() for a in _autocast(arrays)]
        return TracedLogits.of(F.linear(*arrays), Recipe((_term(*now),)), call)
    reason = _why_not(call, arrays)
    if reason:
        call.why_not = call.why_not or reason
        return F.linear(*arrays)
    arrays = _autocast(arrays)
    if len({a.dtype for a in arrays}) > 1:
        return F.linear(*arrays)  # its own error
    held = tuple([Held(a) for a in arrays])
    inference = torch.is_inference_mode_enabled()

    def compute() -> Tensor:
        with torch.inference_mode(inference), torch.autocast(x.device.type, enabled=False):
            return torch.ops.aten.linear.default(*[h.values() for h in held])

    z = _Head.apply(call, Later(compute), *arrays)
    return z.note(Recipe((_term(*arrays),)), held)


def _term(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return x, weight, bias


def _why_not(call: Call, arrays: tuple[Tensor, ...]) -> str:
    x, weight = arrays[:2]
    if any(type(a) not in PLAIN for a in arrays):
        return "its head's arrays are no plain tensors"
    if not call.has_begun_as_now():
        return "its head ran under another gradient mode, other saved-tensor hooks or transforms than the model"
    if surroundings()[2] != (True, -1) or torch._C._get_tracing_state() is not None:
        return "torch.func, forward mode or torch.jit.trace works on its head"
    shapes = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    kinds = all(a.is_floating_point() and a.device == x.device and a.layout == torch.strided for a in arrays)
    if not shapes or not kinds or x.device.type == "meta" or (len(arrays) == 3 and arrays[2].dim() != 1):
        return "its head's arrays are not those of a linear layer on one device"
    return ""


def _autocast(arrays: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In the type F.linear would compute in under the autocast that is on."""
    device = arrays[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return arrays
    dtype = torch.get_autocast_dtype(device)
    return tuple([a if a.dtype == torch.float64 else a.to(dtype) for a in arrays])


class _Head(torch.autograd.Function):
    """The layer in autograd's graph, for what uses the logits in another way than by their recipe."""

    @staticmethod
    def forward(ctx: Any, call: Call, later: Later, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return LinearLogits.of(later, (*x.shape[:-1], weight.shape[0]), x.dtype, x.device, call)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        _, _, of_x, of_weight, *of_bias = ctx.needs_input_grad
        rows = grads[0].reshape(-1, weight.shape[0])
        dx = (rows @ weight).reshape(x.shape) if of_x else None
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None
        return (None, None, dx, dweight, *[rows.sum(0) if wanted else None for wanted in of_bias])
