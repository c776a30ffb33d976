"""fuse_loss in a graph of torch.compile, and under a dispatch mode: what is done to logits between head and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

tf = pytest.importorskip("transformers")

from tests.integrations.bodies import BOTH, V, ce, make  # noqa: E402
from torch_ops.integrations import _logits, _operations  # noqa: E402
from torch_ops.integrations.transformers import fuse_loss  # noqa: E402


def entry(self: Any, h: Tensor, labels: Tensor) -> Tensor:
    z = self.lm_head(h)
    z[..., 3] = -2.0
    return ce(z, labels)


def another_name(self: Any, h: Tensor, labels: Tensor) -> Tensor:
    z = self.lm_head(h)
    y = z
    z *= 2.0
    return ce(y, labels)


def view(self: Any, h: Tensor, labels: Tensor) -> Tensor:
    z = self.lm_head(h)
    y = z.view(-1, V)
    y *= 2.0
    return ce(z, labels)


def weight(self: Any, h: Tensor, labels: Tensor) -> Tensor:
    z = self.lm_head(h)
    with torch.no_grad():
        self.lm_head.weight.mul_(2.0)
    return ce(z, labels).detach() + h.sum()


WRITES: dict[str, Callable[..., Tensor]] = {
    "entry": entry,
    "another name": another_name,
    "view": view,
    "weight": weight,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_writes_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss() -> Tensor:
        torch._dynamo.reset()
        model = torch.compile(fuse_loss(make(WRITES[name])), fullgraph=True, backend="aot_eager")
        return model(**BOTH).loss.detach()

    theirs = make(WRITES[name])(**BOTH).loss.detach()
    torch.testing.assert_close(loss(), theirs)
    if name == "entry":
        monkeypatch.setattr(_logits.TracedLogits, "current", lambda z: z.recipe)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(loss(), theirs)


class Twice(TorchDispatchMode):
    """Does more than it was asked for."""

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2.0 if func is torch.ops.aten.tanh.default else out


def under_a_mode(self: Any, h: Tensor, labels: Tensor) -> Tensor:
    with Twice():
        return ce(self.lm_head(h).tanh(), labels)


@pytest.mark.filterwarnings("ignore:fuse_loss")
def test_a_mode_that_changes_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = make(under_a_mode)(**BOTH).loss
    torch.testing.assert_close(fuse_loss(make(under_a_mode))(**BOTH).loss, theirs)
    for module in (_logits, _operations):
        monkeypatch.setattr(module, "is_expected", lambda func, reached: True)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(fuse_loss(make(under_a_mode))(**BOTH).loss, theirs)
