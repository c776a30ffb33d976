"""The logits of a linear layer as what they are made of: a loss takes them whole, anything else has them computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torch_ops.linear_cross_entropy import linear_cross_entropy


@dataclass
class Pass:
    """One forward pass: how its loss is to be computed, and what became of the logits."""

    memory: str
    chunk_size: int | None
    fused: bool = False
    why_not: str = ""


class DeferringLinear(nn.Linear):
    """torch.nn.Linear that, while a `Pass` is set, returns `LinearLogits` instead of a tensor."""

    current: Pass | None = None

    def forward(self, input: Tensor) -> Any:
        """The layer's output, computed or not."""
        if self.current is None:
            return super().forward(input)
        return LinearLogits(
            self.current,
            [(input, self.weight, self.bias)],
            _computed_in(input),
            lambda: F.linear(input, self.weight, self.bias),
        )


class LinearLogits:
    """cap * tanh(scale * sum_k (x_k W_kT + b_k)), or without a cap scale * sum_k (x_k W_kT + b_k), not computed.

    Not a Tensor: what models do between head and loss (scale, cap, cast, reshape, slice) is noted down, and
    `F.cross_entropy` becomes `linear_cross_entropy`. Any other use computes the logits by the operations that were
    asked for, in their order, and goes on with that tensor: never a wrong loss, only one that is not fused.
    """

    def __init__(
        self,
        made_in: Pass,
        terms: list[tuple[Tensor, Tensor, Tensor | None]],
        dtype: torch.dtype,
        compute: Callable[[], Tensor],
        scale: float = 1.0,
        cap: float | None = None,
        is_view: bool = False,
    ) -> None:
        self.made_in, self.terms, self.dtype, self.compute = made_in, terms, dtype, compute
        self.scale, self.cap, self.is_view = scale, cap, is_view
        self.value: Tensor | None = None
        self.is_source = False

    def tensor(self, asked_by: str) -> Tensor:
        """The logits, computed at most once; `asked_by` names the operation that needs them."""
        if self.value is None:
            self.made_in.why_not = self.made_in.why_not or f"the model used its logits in `{asked_by}`"
            self.value = self.compute()
        return self.value

    def _then(self, compute: Callable[[Tensor], Tensor], name: str, **changed: Any) -> LinearLogits:
        """The result of an operation that the formula can hold."""
        self.is_source = True
        now = {"terms": self.terms, "dtype": self.dtype, "scale": self.scale, "cap": self.cap, **changed}
        return LinearLogits(self.made_in, compute=lambda: compute(self.tensor(name)), **now)

    def _rows(self, take: Callable[[Tensor], Tensor], compute: Callable[[Tensor], Tensor], name: str) -> LinearLogits:
        """The result of an operation on the leading dimensions, which are the input's."""
        return self._then(compute, name, terms=[(take(x), w, b) for x, w, b in self.terms], is_view=True)

    @property
    def shape(self) -> torch.Size:
        """As the tensor's."""
        x, weight, _ = self.terms[0]
        return torch.Size((*x.shape[:-1], weight.shape[0]))

    @property
    def device(self) -> torch.device:
        """As the tensor's."""
        return self.terms[0][0].device

    @property
    def ndim(self) -> int:
        """As the tensor's."""
        return self.terms[0][0].dim()

    def dim(self) -> int:
        """As the tensor's."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """As the tensor's."""
        return self.shape if dim is None else self.shape[dim]

    # Scale and cap.

    def __mul__(self, by: Any) -> Any:
        if self.value is not None or not isinstance(by, int | float) or isinstance(by, bool) or not 0.0 < by < math.inf:
            return self.tensor("multiplication") * _plain(by, "multiplication")
        new = {"scale": self.scale * by} if self.cap is None else {"cap": self.cap * by}
        return self._then(lambda z: z * by, "multiplication", **new)

    __rmul__ = __mul__

    def __truediv__(self, by: Any) -> Any:
        if self.value is not None or not isinstance(by, int | float) or isinstance(by, bool) or not 0.0 < by < math.inf:
            return self.tensor("division") / _plain(by, "division")
        new = {"scale": self.scale / by} if self.cap is None else {"cap": self.cap / by}
        return self._then(lambda z: z / by, "division", **new)

    def tanh(self) -> Any:
        """The cap, once."""
        if self.value is not None or self.cap is not None:
            return self.tensor("tanh").tanh()
        return self._then(torch.tanh, "tanh", cap=1.0)

    def __add__(self, other: Any) -> Any:
        """The sum of two linear layers is one (a low-rank adapter beside the head)."""
        one_layer = (
            isinstance(other, LinearLogits)
            and self.value is other.value is None
            and self.cap is other.cap is None
            and self.shape == other.shape
        )
        if not one_layer:
            return self.tensor("addition") + _plain(other, "addition")
        other.is_source = True
        terms = [*_scaled(self.terms, self.scale), *_scaled(other.terms, other.scale)]
        dtype = torch.promote_types(self.dtype, other.dtype)
        return self._then(lambda z: z + other.tensor("addition"), "addition", terms=terms, dtype=dtype, scale=1.0)

    __radd__ = __add__

    # `z *= 2` binds the name anew, but what others took from z before would have to change too.

    def __imul__(self, by: Any) -> Any:
        return self._to_write("multiplication in place").__imul__(by) if self._is_memory() else self * by

    def __itruediv__(self, by: Any) -> Any:
        return self._to_write("division in place").__itruediv__(by) if self._is_memory() else self / by

    def __iadd__(self, other: Any) -> Any:
        if not self._is_memory():
            return self + other
        return self._to_write("addition in place").__iadd__(_plain(other, "addition in place"))

    def __isub__(self, other: Any) -> Any:
        return self._to_write("subtraction in place").__isub__(_plain(other, "subtraction in place"))

    def _is_memory(self) -> bool:
        """Whether a write would be seen elsewhere."""
        return self.value is not None or self.is_source or self.is_view

    # Type and place.

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Another floating type, or the device it is on."""
        named = [v for k, v in kwargs.items() if k in ("dtype", "device")]
        wanted = [a for a in (*args, *named) if not isinstance(a, bool)]
        dtype = next((a for a in wanted if isinstance(a, torch.dtype)), self.dtype)
        places = [torch.device(a) for a in wanted if isinstance(a, str | torch.device)]
        known = all(isinstance(a, str | torch.device | torch.dtype) for a in wanted) and not kwargs.get("copy")
        if self.value is not None or not known or not dtype.is_floating_point or any(p != self.device for p in places):
            return self.tensor("to").to(*(_plain(a, "to") for a in args), **kwargs)
        return self if dtype == self.dtype else self._then(lambda z: z.to(dtype), "to", dtype=dtype)

    def float(self) -> Any:
        """In float32."""
        return self.to(torch.float32)

    def contiguous(self) -> Any:
        """Itself: there is no memory yet."""
        return self if self.value is None else self.value.contiguous()

    # Leading dimensions.

    def view(self, *shape: Any) -> Any:
        """Other leading dimensions over the same classes."""
        return self._reshaped("view", shape)

    def reshape(self, *shape: Any) -> Any:
        """Other leading dimensions over the same classes."""
        return self._reshaped("reshape", shape)

    def _reshaped(self, name: str, shape: Any) -> Any:
        x, classes = self.terms[0][0], self.shape[-1]
        asked = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], list | tuple) else tuple(shape)
        if self.value is None and asked and all(isinstance(n, int | torch.SymInt) for n in asked):
            *lead, last = asked
            if last == -1 and math.prod(lead) == math.prod(x.shape[:-1]):
                last = classes
            if last == classes:
                take = lambda x: x.reshape(*lead, x.shape[-1])  # noqa: E731
                return self._rows(take, lambda z: getattr(z, name)(*asked), name)
        return getattr(self.tensor(name), name)(*shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        """Leading dimensions as one."""
        if self.value is not None or not 0 <= start_dim < end_dim % self.ndim < self.ndim - 1:
            return self.tensor("flatten").flatten(start_dim, end_dim)
        by = lambda x: x.flatten(start_dim, end_dim)  # noqa: E731
        return self._rows(by, by, "flatten")

    def __getitem__(self, index: Any) -> Any:
        """Some of the rows, by any index; of the classes all, or the first of them."""
        at = index if isinstance(index, tuple) else (index,)
        split = None if self.value is not None else _rows_and_classes(at, self.ndim)
        if split is None:
            return self.tensor("indexing")[tree_map(lambda i: _plain(i, "indexing"), index)]
        rows, classes = split
        whole = self
        if classes is not None and classes < self.shape[-1]:
            terms = [(x, w[:classes], b if b is None else b[:classes]) for x, w, b in self.terms]
            whole = self._then(lambda z: z[..., :classes], "indexing", terms=terms, is_view=True)
        by = lambda x: x[(*rows, slice(None))]  # noqa: E731
        return whole._rows(by, by, "indexing")

    # The loss.

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """F.cross_entropy of the logits, in nats."""
        options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        if self.value is not None or self.ndim > 2 or size_average is not None or reduce is not None:
            z = self.tensor("cross_entropy")
            return F.cross_entropy(z, target, weight, size_average=size_average, reduce=reduce, **options)
        self.made_in.fused = True
        x, linear_weight, linear_bias = _one_layer(self.terms)
        of_logits: dict[str, Any] = {"logit_scale": self.scale}
        if self.cap is not None:
            of_logits = {"logit_scale": self.scale * self.cap, "softcap": self.cap}
        how: dict[str, Any] = {"memory": self.made_in.memory, "chunk_size": self.made_in.chunk_size}
        arrays: dict[str, Any] = {"linear_bias": linear_bias, "weight": weight}
        loss = linear_cross_entropy(x, linear_weight, target, **arrays, **options, **of_logits, **how)
        return loss if loss.dtype == self.dtype or torch.is_autocast_enabled(x.device.type) else loss.to(self.dtype)

    # Everything else.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            return getattr(self._to_write(name), name)
        return getattr(self.tensor(name), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._to_write("assignment")[index] = _plain(value, "assignment")

    def _to_write(self, name: str) -> Tensor:
        """The tensor, where nobody else can have noted down what it was, or shares its memory."""
        if self.is_source or self.is_view:
            raise NotImplementedError(
                f"fuse_loss: model must not write into logits that share memory with others; got {name}. "
                "restore_loss gives the model's own loss back."
            )
        return self.tensor(name)

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], LinearLogits):
            if func is F.cross_entropy:
                return args[0].cross_entropy(*args[1:], **kwargs)
            if func is torch.tanh:
                return args[0].tanh()
        name = getattr(func, "__name__", str(func))
        args, kwargs = tree_map(lambda a: _plain(a, name), (args, kwargs))
        return func(*args, **kwargs)


def _plain(value: Any, name: str) -> Any:
    return value.tensor(name) if isinstance(value, LinearLogits) else value


def _computed_in(x: Tensor) -> torch.dtype:
    """The type of F.linear's result."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _scaled(terms: list[tuple[Tensor, Tensor, Tensor | None]], by: float) -> list[Any]:
    return terms if by == 1.0 else [(x * by, w, b if b is None else b * by) for x, w, b in terms]


def _one_layer(terms: list[tuple[Tensor, Tensor, Tensor | None]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """sum_k (x_k W_kT + b_k) as one layer: inputs and weights side by side, in the first one's type."""
    if len(terms) == 1:
        return terms[0]
    weight = terms[0][1]
    biases = [b.to(weight.dtype) for _, _, b in terms if b is not None]
    return (
        torch.cat([x.to(weight.dtype) for x, _, _ in terms], -1),
        torch.cat([w.to(weight.dtype) for _, w, _ in terms], -1),
        sum(biases[1:], biases[0]) if biases else None,
    )


def _rows_and_classes(index: tuple[Any, ...], ndim: int) -> tuple[tuple[Any, ...], int | None] | None:
    """(an index for every leading dimension, how many classes if not all); None where it says more of the classes."""
    dots = [i for i, at in enumerate(index) if at is Ellipsis]  # `in` would ask tensors for ==
    left = ndim - sum(_dimensions(at) for at in index)
    if left < 0 or len(dots) > 1:
        return None
    at = dots[0] if dots else len(index)
    *rows, classes = (*index[:at], *[slice(None)] * left, *index[at + 1 :])
    if not isinstance(classes, slice) or classes.step not in (None, 1) or classes.start not in (None, 0):
        return None
    return None if classes.stop is not None and classes.stop < 0 else (tuple(rows), classes.stop)


def _dimensions(at: Any) -> int:
    """How many dimensions a part of an index stands for."""
    if at is None or at is Ellipsis or isinstance(at, bool):
        return 0
    return at.dim() if isinstance(at, Tensor) and at.dtype == torch.bool else 1


def _on_tensor(name: str) -> Any:
    return lambda self, *others: getattr(self.tensor(name), name)(*(_plain(other, name) for other in others))


# Operators are looked up on the class: __getattr__ does not see them.
_OPERATORS = "neg pos abs sub rsub rtruediv pow rpow matmul rmatmul mod floordiv eq ne lt le gt ge iter"
for _name in _OPERATORS.split():
    setattr(LinearLogits, f"__{_name}__", _on_tensor(f"__{_name}__"))
