"""Faults put back, for the tests of who watches PyTorch's autograd to catch: a kind each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import torch_ops
from tests.rules import test_torch_watched as watched
from torch_ops import _modes as modes
from torch_ops._head import flops
from torch_ops._head import ops as head_ops
from torch_ops._rows import dispatch as rows
from torch_ops._rules import cross_entropy as rule


def test_a_counter_made_before_the_head_was_loaded() -> None:
    counted = FlopCounterMode(display=False)
    ours = [op for op in counted.flop_registry if "softmax_ext" in str(op)]
    assert ours
    counted.flop_registry = {op: of for op, of in counted.flop_registry.items() if op not in ours}
    with counted:
        torch_ops.linear_cross_entropy(watched.X0, watched.W0, watched.T.clamp(min=0))
    assert counted.get_total_flops() == 2 * watched.N * watched.D * watched.V


def test_compiled_autograd_leaves_the_logits() -> None:
    from torch._dynamo import compiled_autograd

    logits = watched.X0.clone().requires_grad_() @ watched.W0.t()
    before = logits.detach().clone()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        torch_ops.cross_entropy(logits, watched.T.clamp(min=0), inplace_backward=True).backward()
    assert torch.equal(logits.detach(), before)


def watched_producer(own: Callable[[Tensor], Tensor], view: bool) -> None:
    def run(x: Tensor, inplace: bool) -> Tensor:
        with watched.looking():
            logits = own(x @ watched.W0.t())
        logits = logits.view(watched.N, watched.V) if view else logits
        return torch_ops.cross_entropy(logits, watched.T, inplace_backward=inplace)

    want, got = (watched.gradient(lambda x, i=i: run(x, i)) for i in (False, True))
    torch.testing.assert_close(got, want)


class Doubled(torch.autograd.Function):
    """2 z, which keeps its output."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        y = 2 * z
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * (2 + 0.1 * ctx.saved_tensors[0])


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("own", [torch.tanh, torch.sigmoid, Doubled.apply], ids=["tanh", "sigmoid", "a Function"])
def test_what_made_the_logits_keeps_them_by_a_hook(own: Callable[[Tensor], Tensor], view: bool) -> None:
    """Its derivative reads the logits themselves: nobody checks their version, and no owner more is counted."""
    if not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"):  # pyright: ignore
        pytest.skip("this PyTorch does not tell the hooks of one saved tensor")
    watched_producer(own, view)


def always_over(args: tuple[Any, ...], layout: tuple[Any, ...], *, inplace: bool) -> Tensor:
    dim, scale, softcap = layout
    return rows.cross_entropy_bwd(*args, dim=dim, scale=scale, softcap=softcap, out=args[0].detach())


FAULTS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "a fake is looked at": (
        modes,
        "dispatches",
        lambda x: False,
        lambda: watched.test_fake_tensors_outside_their_mode("head"),
    ),
    "a subclass is taken for one with a say": (
        modes,
        "dispatches",
        lambda x: type(x) is not Tensor,
        watched.test_a_target_of_a_subclass_is_looked_at,
    ),
    "statistics lose their subclass": (
        sys.modules["torch_ops.cross_entropy"],
        "alike",
        lambda found: found,
        watched.test_statistics_keep_the_subclass,
    ),
    "a counter sees loops instead of the op": (
        head_ops,
        "is_observed",
        lambda *arrays: False,
        lambda: watched.test_counted_operations({"chunk_size": 2}, 3),
    ),
    "a counter is told of nothing": (flops, "tell", lambda: None, test_a_counter_made_before_the_head_was_loaded),
    "the hooks of what made the logits are not asked for": (
        modes,
        "told_hooks",
        lambda node: False,
        lambda: watched_producer(torch.tanh, False),
    ),
    "a compiled backward writes over the logits": (
        rule,
        "_input_bwd",
        always_over,
        test_compiled_autograd_leaves_the_logits,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_saboteurs_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong, test = FAULTS[fault]
    test()
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises((Exception, pytest.fail.Exception)):
        test()
