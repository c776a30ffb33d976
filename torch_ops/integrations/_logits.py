"""Logits that exist as what they are made of: a loss takes that whole, anything else has them computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from torch_ops.integrations._call import Call
from torch_ops.integrations._deferred import NOTED, Deferred, deferred_in
from torch_ops.integrations._later import Held
from torch_ops.integrations._operations import (
    FACTS,
    MEMORY,
    PLAIN,
    WATCHES,
    WRITES,
    is_expected,
    name_of,
)
from torch_ops.integrations._recipe import STEPS, Recipe, loss_type


class Logits(Tensor):
    """Logits with their recipe: `current()` if that is all they are, `whole()` if a loss may take it."""

    call: Call
    recipe: Recipe | None = None
    held: tuple[Held, ...] = ()
    current: Any
    whole: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _above(func, args, kwargs or {})


class TracedLogits(Logits):
    """The computed logits under torch.compile, which drops what nobody uses."""

    @classmethod
    def of(cls, z: Tensor, recipe: Recipe, call: Call) -> TracedLogits:
        """The same values."""
        traced = z.as_subclass(cls)
        traced.recipe, traced.call = recipe, call
        return traced

    def current(self) -> Recipe | None:
        """The recipe where gradients are on as at the call's begin: a custom Function's forward turns them off."""
        return self.recipe if torch.is_grad_enabled() == self.call.grad and not self.call.watched else None

    def whole(self) -> Recipe | None:
        return self.current()


class LinearLogits(Logits, Deferred):
    """Logits of a linear layer: a Tensor without memory, with the layer's node of autograd's graph behind it.

    Below autograd every operation computes the logits and goes on with them, in place too: values and gradients are
    those of a plain tensor whatever is done, because autograd notes what was done. Above, the operations of `STEPS`
    give such a tensor again, with its recipe, as long as nothing but they lies between it and the head; and
    `F.cross_entropy` of one is `linear_cross_entropy` of the recipe's arrays.
    """

    node: Any = None
    tracked: bool = False

    def note(self, recipe: Recipe, held: tuple[Held, ...]) -> LinearLogits:
        """Said of a tensor that autograd has just put into its graph."""
        with torch._C.DisableTorchFunctionSubclass():
            self.node, self.tracked = self.grad_fn, self.requires_grad
        self.recipe, self.held = recipe, held
        return self

    def current(self) -> Recipe | None:
        """The recipe, unless a Function gave this very tensor back, a hook or a flag was set, or it was computed."""
        is_its = self.grad_fn is self.node and self.requires_grad == self.tracked and not self._backward_hooks
        is_new = not self.later.is_computed and not self.call.watched
        return self.recipe if is_its and is_new else None

    def whole(self) -> Recipe | None:
        """The recipe, if its arrays are still what they were and autograd does what it did."""
        is_now = self.call.has_begun_as_now() and all(h.is_same() for h in self.held)
        return self.current() if is_now else None


# Above autograd: the operations as the model wrote them.


def _above(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is F.cross_entropy:
        return _cross_entropy(*args, **kwargs)
    step = STEPS.get(func)
    noted = None if step is None else _noted(step, func, args, kwargs)
    if noted is not None:
        return noted
    calls = [a.call for a in deferred_in((args, kwargs))]
    if func in FACTS or not calls:
        if func not in FACTS:  # a graph's logits: a write, perhaps into a view of them, would be seen by all of them
            for a in [a for a in tree_leaves((args, kwargs)) if isinstance(a, TracedLogits)]:
                a.call.watched = "another operation"
        return func(*args, **kwargs)
    name = name_of(func)
    for call in calls:
        if func in WATCHES:
            call.watch(name)
        else:
            call.asked_by = name
    if func in MEMORY:  # what reads memory past autograd wants a tensor that has some
        args, kwargs = tree_map(computed, (args, kwargs))
    try:
        return func(*args, **kwargs)
    finally:
        for call in calls:
            call.asked_by = ""


def _noted(step: Callable[..., Recipe | None], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation that a recipe can hold, or None."""
    at = 0 if isinstance(args[0], Logits) else 1  # bias + z, z + z'
    if at == len(args) or not isinstance(args[at], Logits) or (at and step.__name__ != "_add"):
        return None
    if kwargs and step.__name__ not in ("_to", "_same", "_flatten"):
        return None
    z = args[at]
    if isinstance(z, TracedLogits) and func in WRITES:
        return None
    recipe, held = z.current(), z.held
    if recipe is None or torch.is_grad_enabled() != z.call.grad:
        return None
    others = []
    for other in (*args[:at], *args[at + 1 :]):
        if isinstance(other, Logits):
            known = other.current() if other.call is z.call else None
            if known is None:
                return None
            others.append(known)
            held = (*held, *other.held)
        else:
            others.append(other)
            if step.__name__ == "_add" and isinstance(other, Tensor) and isinstance(z, LinearLogits):
                if type(other) not in PLAIN:
                    return None
                held = (*held, Held(other))
    recipe = step(recipe, z, *others, **kwargs)
    if recipe is None:
        return None
    if isinstance(z, TracedLogits):
        return TracedLogits.of(func(*args, **kwargs), recipe, z.call)
    reached: list[str] = []
    before = NOTED.set(reached)
    try:
        out = func(*args, **kwargs)
    finally:
        NOTED.reset(before)
    is_all = is_expected(func, reached)  # a dispatch mode may have done more
    return out.note(recipe, held) if is_all and isinstance(out, LinearLogits) else out


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """F.cross_entropy: of the recipe where there is one."""
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    old: dict[str, Any] = {"size_average": size_average, "reduce": reduce}
    calls = [a.call for a in (input, target, weight) if isinstance(a, Logits)]
    recipe = None
    if isinstance(input, Logits) and len(calls) == 1 and input.dim() <= 2 and size_average is None is reduce:
        recipe = input.whole()
    if recipe is None:
        for call in calls:
            call.asked_by = "cross_entropy"
        return F.cross_entropy(input, target, weight, **options, **old)
    call = input.call
    call.fused = True
    how = {"memory": call.memory, "chunk_size": call.chunk_size, "grad_samples": call.grad_samples}
    return recipe.loss(target, weight, {**how, **options}).to(loss_type(input.dtype, input.device))


def computed(a: Any) -> Any:
    """A plain tensor at the same place of autograd's graph."""
    if not isinstance(a, Logits):
        return a
    with torch._C.DisableTorchFunctionSubclass():
        return torch.ops.aten.alias.default(a)
