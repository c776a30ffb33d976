"""Modules with torch.nn's constructors, reprs and state_dict keys, plus this library's loss options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softmax_ext import contract
from torch_ops.cross_entropy import cross_entropy
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


class CrossEntropyLoss(torch.nn.Module):
    """`torch_ops.cross_entropy` as a module: torch.nn.CrossEntropyLoss's constructor and state_dict, plus our options.

    Options are checked at construction; see `torch_ops.cross_entropy` for each.

    Example:
        >>> import torch, torch_ops
        >>> loss = torch_ops.nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> round(loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).item(), 4)
        0.2269
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
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
            logit_scale,
            softcap,
            z_loss,
            on_all_ignored,
            stats,
        )
        options.check("CrossEntropyLoss")
        contract.flag("CrossEntropyLoss", "inplace_backward", inplace_backward)
        for name, value in vars(options).items():
            setattr(self, name, value)
        self.inplace_backward = inplace_backward
        self.register_buffer("weight", weight)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*vars(contract.LossOptions()), "inplace_backward")}

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        defaults = {**vars(contract.LossOptions()), "inplace_backward": False}
        return ", ".join(f"{k}={v!r}" for k, v in self._options().items() if v != defaults[k])

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Any:
        """The loss in nats, with (loss, stats) as `torch_ops.cross_entropy` returns them."""
        return cross_entropy(input, target, self.weight, token_weight=token_weight, **self._options())
