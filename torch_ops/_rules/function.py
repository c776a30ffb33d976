"""How an autograd.Function of ours is written: called cheaply, mapped, differentiated twice forward, in graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import Function, forward_ad

from torch_ops._modes import is_constant

_F = TypeVar("_F", bound=Callable[..., Any])

IN_GRAPH: list[Callable[..., Any]] = []


class Rule(Function):
    """An autograd.Function (forward and setup_context apart) whose call costs no more than a small row."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The outputs of forward, with the derivative where somebody wants it."""
        if is_constant(*args):
            return cls.forward(*args)
        if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportAttributeAccessIssue]
            return super().apply(*args)
        return cls.recorded(*args)

    @classmethod
    def recorded(cls, *args: Any) -> Any:
        """The same for who knows that somebody wants the derivative and that no transform is under way."""
        # Function.apply does the same after an inspect.signature, which fills in defaults (ours have none) and
        # takes 16 of its 23 us on a 2-core x86-64.
        alive = [unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in args]
        return super(Function, cls).apply(*alive)  # pyright: ignore[reportAttributeAccessIssue]


def batch_first(info: Any, in_dims: tuple[int | None, ...], *arrays: Any) -> tuple[Any, ...]:
    """The arrays of a vmap rule with their batch dimension first, expanded where they have none."""
    return tuple(
        x if x is None else x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
        for x, at in zip(arrays, in_dims, strict=False)
    )


def forward_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A jvp rule `rule(ctx, saved, *tangents)` that can itself be differentiated in forward mode.

    PyTorch calls jvp with forward mode switched off, so a rule written in plain ops loses every outer level (a
    jvp of a jvp is silently 0). Switched on again, the saved inputs still carry the tangents of the level
    being computed, which must not enter its own tangent: hence the primals (level 0 is the only one there is;
    while a function is compiled PyTorch does not know it is current).
    """

    @wraps(rule)
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [x if x is None else forward_ad.unpack_dual(x, level=0).primal for x in ctx.saved_tensors]
            return rule(ctx, saved, *tangents)

    return jvp


def in_graph(fn: _F) -> _F:
    """Mark a function that applies an autograd.Function with jvp, which torch.compile cannot inline.

    Such a function enters the compiler's graph as one node and is traced, with all its rules, by the stage that
    follows. It takes tensors and Python constants only.
    """
    IN_GRAPH.append(fn)
    return fn
