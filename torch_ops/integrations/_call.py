"""One call of a fused model: how its loss is to be computed, who may see it, and what became of the logits."""

from __future__ import annotations

import contextvars
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module


@dataclass(eq=False)
class Call:
    """The state of one call. It lies in `CALL`, which other threads and calls do not see, never on a module."""

    model: nn.Module
    memory: str
    chunk_size: int | None
    grad_samples: int | None
    said: set[str]
    grad: bool = True
    context: Any = None
    layers: tuple[nn.Module, ...] = ()
    fused: bool = False
    why_not: str = ""
    watched: str = ""
    asked_by: str = ""

    def is_of(self, layer: nn.Module) -> bool:
        """Whether the layer is the head, or a part of it, that this call ends in."""
        return any(one is layer for one in self.layers)

    def has_begun_as_now(self) -> bool:
        """Whether autograd treats what is done now as it treated the call's begin: no checkpoint began in between."""
        return torch.is_grad_enabled() == self.grad and surroundings() == self.context

    def used(self, operation: str) -> None:
        """The logits had to be computed; said once where their loss is fused all the same."""
        name = self.asked_by or operation
        if not self.fused:
            self.why_not = self.why_not or f"the model used its logits in `{name}`"
        elif name not in self.said:
            self.said.add(name)
            warnings.warn(
                f"fuse_loss: logits were computed beside the fused loss, because the model used them in `{name}`.",
                stacklevel=2,
            )

    def watch(self, operation: str) -> None:
        """Somebody wants the logits' own gradient, which a fused loss does not form."""
        if self.fused:
            raise NotImplementedError(
                f"fuse_loss: model must not ask for the gradient of logits after their loss; got {operation}. "
                "restore_loss gives the model's own loss back."
            )
        self.watched = operation
        self.why_not = self.why_not or f"the model used its logits in `{operation}`"


CALL: contextvars.ContextVar[Call | None] = contextvars.ContextVar("fuse_loss", default=None)


class _Traced(threading.local):
    """The call that torch.compile is tracing in this thread: it knows no context variables."""

    def __init__(self) -> None:
        self.call: Call | None = None


TRACED = _Traced()


def surroundings() -> Any:
    """What changes autograd's work from outside: saved-tensor hooks, inference mode, torch.func, forward mode."""
    c: Any = torch._C
    hooks = c._autograd._top_saved_tensors_default_hooks(True)
    levels = c._functorch.peek_interpreter_stack() is None, torch.autograd.forward_ad._current_level
    return hooks, torch.is_inference_mode_enabled(), levels


def asked_by_model(layer: nn.Module, call: Call) -> bool:
    """Whether the model's own forward called its head: no callback of another module stands between.

    The frames of this thread say it, up to the one that made the call: each module that runs there must hold the head.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_locals.get("call") is not call:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner is not call.model and owner is not layer:
            if not any(m is layer for m in owner.modules()):
                return False
            if is_watched(owner):
                call.why_not = call.why_not or WATCHED
                return False
        frame = frame.f_back
    return frame is not None


WATCHED = "its head has hooks, which want a tensor"


def is_watched(*modules: nn.Module) -> bool:
    """Whether something takes or changes a module's output or its gradients, as tensor parallelism and ZeRO do."""
    everywhere = (_module._global_forward_hooks, _module._global_backward_hooks, _module._global_backward_pre_hooks)
    return any(everywhere) or any(m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
