"""Modules with torch.nn's constructors, reprs and state_dict keys, plus this library's loss options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from softmax_ext import contract
from torch_ops._arguments import describe
from torch_ops.cross_entropy import cross_entropy
from torch_ops.linear_cross_entropy import linear_cross_entropy
from torch_ops.softmax import log_softmax, softmax


class _Along(torch.nn.Module):
    """A module over one dimension."""

    _op: str
    dim: int

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        if not contract.is_integer(dim):
            contract.fail_type(self._op, "dim", "be a Python integer", repr(dim))
        self.dim = int(dim)  # pyright: ignore[reportArgumentType]

    def extra_repr(self) -> str:
        """The argument as it prints."""
        return f"dim={self.dim}"


class Softmax(_Along):
    """`torch_ops.softmax` along `dim`, as torch.nn.Softmax; dim=None is refused here, not at the first call.

    Example:
        >>> import torch, torch_ops
        >>> torch_ops.nn.Softmax(dim=-1)(torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    _op = "Softmax"

    def forward(self, input: Tensor) -> Tensor:
        """Probabilities of the input's shape."""
        return softmax(input, self.dim)


class LogSoftmax(_Along):
    """`torch_ops.log_softmax` along `dim`, as torch.nn.LogSoftmax; dim=None is refused.

    Example:
        >>> import torch, torch_ops
        >>> torch_ops.nn.LogSoftmax(dim=-1)(torch.zeros(1, 2))
        tensor([[-0.6931, -0.6931]])
    """

    _op = "LogSoftmax"

    def forward(self, input: Tensor) -> Tensor:
        """Log-probabilities of the input's shape, in nats."""
        return log_softmax(input, self.dim)


class _Loss(torch.nn.Module):
    """A loss whose options are attributes."""

    _more: dict[str, Any]  # those beside LossOptions, with their defaults
    weight: Tensor | None

    def _keep(self, options: contract.LossOptions, weight: Tensor | None, **more: Any) -> None:
        for name, value in {**vars(options), **more}.items():
            setattr(self, name, value)
        self.register_buffer("weight", weight)

    def _scale(self, logit_scale: Any) -> Any:
        """The number an option holds: of a tensor 1.0; that is a parameter or a buffer of the module's own."""
        if not isinstance(logit_scale, Tensor):
            return logit_scale
        contract.floating(type(self).__name__, "logit_scale", describe(logit_scale))
        return 1.0

    def _learn(self, logit_scale: Any) -> None:
        if isinstance(logit_scale, torch.nn.Parameter):
            del self.logit_scale
            self.logit_scale = logit_scale
        elif isinstance(logit_scale, Tensor):
            del self.logit_scale
            self.register_buffer("logit_scale", logit_scale, persistent=False)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*vars(contract.LossOptions()), *self._more)}

    def _changed(self) -> dict[str, Any]:
        defaults = {**vars(contract.LossOptions()), **self._more}
        options = {k: v for k, v in self._options().items() if not isinstance(v, Tensor)}
        return {name: value for name, value in options.items() if value != defaults[name]}

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        return ", ".join(f"{k}={v!r}" for k, v in self._changed().items())


class CrossEntropyLoss(_Loss):
    """`torch_ops.cross_entropy` as a module: torch.nn.CrossEntropyLoss's constructor and state_dict, plus our options.

    Options are checked at construction; see `torch_ops.cross_entropy` for each. A logit_scale that is a parameter is
    learnt with the module's others, under that name.

    Example:
        >>> import torch, torch_ops
        >>> loss = torch_ops.nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> round(loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).item(), 4)
        0.2269
    """

    _more: ClassVar = {"inplace_backward": False}

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        on_all_ignored: str = "nan",
        stats: Sequence[str] = (),
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        options = contract.LossOptions(
            ignore_index,
            reduction,
            label_smoothing,
            self._scale(logit_scale),
            softcap,
            z_loss,
            on_all_ignored,
            stats,
        )
        options.check("CrossEntropyLoss")
        contract.flag("CrossEntropyLoss", "inplace_backward", inplace_backward)
        self._keep(options, weight, inplace_backward=inplace_backward)
        self._learn(logit_scale)

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Any:
        """The loss in nats, with (loss, stats) as `torch_ops.cross_entropy` returns them."""
        return cross_entropy(input, target, self.weight, token_weight=token_weight, **self._options())


class LinearCrossEntropyLoss(_Loss):
    """`torch_ops.linear_cross_entropy` with its own linear layer, as torch.nn.LinearCrossEntropyLoss (2.13).

    The constructor and state_dict of that, plus our options, which are checked at construction; see
    `torch_ops.linear_cross_entropy` for each. `linear.weight` is (num_classes * prod(out_features), in_features).

    Example:
        >>> import torch, torch_ops
        >>> loss = torch_ops.nn.LinearCrossEntropyLoss(8, 4, bias=True)
        >>> loss(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)).shape
        torch.Size([])
        >>> loss
        LinearCrossEntropyLoss(
          in_features=8, num_classes=4, bias=True
          (linear): Linear(in_features=8, out_features=4, bias=True)
        )
    """

    _more: ClassVar = {"shift": 0, "memory": "fast", "chunk_size": None, "grad_samples": None}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        on_all_ignored: str = "nan",
        stats: Sequence[str] = (),
        shift: int = 0,
        memory: str = "fast",
        chunk_size: int | None = None,
        grad_samples: int | None = None,
    ) -> None:
        super().__init__()
        options = contract.LossOptions(
            ignore_index,
            reduction,
            label_smoothing,
            self._scale(logit_scale),
            softcap,
            z_loss,
            on_all_ignored,
            stats,
        )
        options.check("LinearCrossEntropyLoss")
        contract.head_options("LinearCrossEntropyLoss", shift, memory, chunk_size)
        contract.sampling("LinearCrossEntropyLoss", grad_samples, memory)
        if weight is not None and weight.shape != (num_classes,):
            contract.fail_value(
                "LinearCrossEntropyLoss", "weight", f"have shape ({num_classes},)", str(tuple(weight.shape))
            )
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        outputs = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)
        self._keep(options, weight, shift=shift, memory=memory, chunk_size=chunk_size, grad_samples=grad_samples)
        self._learn(logit_scale)

    def extra_repr(self) -> str:
        """The sizes, and the options that differ from their defaults."""
        own: dict[str, Any] = {"in_features": self.linear.in_features, "num_classes": self.num_classes}
        own |= {"out_features": self.out_features} if self.out_features else {}
        own |= {"bias": True} if self.linear.bias is not None else {}
        own |= self._changed()
        return ", ".join(f"{k}={v!r}" for k, v in own.items())

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Any:
        """The loss in nats, with (loss, stats) as `torch_ops.linear_cross_entropy` returns them."""
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:  # kept flat, as torch.nn does; 2-d weights go through unchanged
            shape = (self.num_classes, *self.out_features)
            weight = weight.reshape(*shape, self.linear.in_features)
            bias = bias if bias is None else bias.reshape(shape)
        arrays: dict[str, Any] = {"linear_bias": bias, "weight": self.weight, "token_weight": token_weight}
        return linear_cross_entropy(input, weight, target, **arrays, **self._options())
