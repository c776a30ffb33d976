"""Corners of PyTorch's own making: gradients written over logits, odd call forms, modules that are changed later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from tests.storages import Largest

N, V = 6, 9


def _rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape))) + 0.1


HIDDEN, HEAD = _rand(N, 4), _rand(4, V) * 3
TARGET = torch.tensor([0, 8, 3, -100, 3, 1])


def _loss_gradients(inplace: bool, target: Tensor, weight: Tensor | None, **options: Any) -> list[Tensor]:
    leaves = [HIDDEN.clone().requires_grad_()]
    for given in (target if target.is_floating_point() else None, weight):
        if given is not None:
            leaves.append(given.requires_grad_())
    loss = torch_ops.cross_entropy(leaves[0] @ HEAD, target, weight, inplace_backward=inplace, **options)
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3, "softcap": 4.0, "z_loss": 0.1}])
def test_inplace_gives_the_same_gradients_to_every_argument(soft: bool, options: dict[str, Any]) -> None:
    target = _rand(N, V) if soft else TARGET
    with_copy = _loss_gradients(False, target, _rand(V), **options)
    over = _loss_gradients(True, target, _rand(V), **options)
    for a, b in zip(with_copy, over, strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 1e-3


def test_inplace_steps_aside_for_forward_over_reverse() -> None:
    direction, answers = _rand(N, 4), []
    for inplace in (False, True):
        with fwd.dual_level():
            h = fwd.make_dual(HIDDEN.clone().requires_grad_(), direction)
            loss = torch_ops.cross_entropy(h @ HEAD, TARGET, inplace_backward=inplace)
            answers.append(fwd.unpack_dual(torch.autograd.grad(loss, h)[0]).tangent)
    assert torch.equal(*answers)
    assert answers[0].abs().max() > 1e-3


def test_inplace_steps_aside_for_batched_gradients_and_vmap() -> None:
    h = HIDDEN.clone().requires_grad_()
    rows = torch_ops.cross_entropy(h @ HEAD, TARGET, reduction="none", inplace_backward=True)
    (batched,) = torch.autograd.grad(rows, h, torch.eye(N, dtype=h.dtype), is_grads_batched=True)
    rows = torch_ops.cross_entropy(h @ HEAD, TARGET, reduction="none")
    for i in range(N):
        torch.testing.assert_close(batched[i], torch.autograd.grad(rows[i], h, retain_graph=True)[0])
    x = h @ HEAD
    targets = torch.stack([TARGET, TARGET.flip(0)])
    total = torch.func.vmap(lambda t: torch_ops.cross_entropy(x, t, inplace_backward=True))(targets).sum()
    alone = torch.stack([F.cross_entropy(x, t) for t in targets]).sum()
    (expected,) = torch.autograd.grad(alone, h, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, h)[0], expected)


def test_inplace_on_parts_of_one_tensor() -> None:
    h = HIDDEN.clone().requires_grad_()
    x = h @ HEAD
    parts = [
        torch_ops.cross_entropy(part, t, inplace_backward=True)
        for part, t in ((x[:2], TARGET[:2]), (x[2:], TARGET[2:]))
    ]
    (ours,) = torch.autograd.grad(sum(parts), h)  # pyright: ignore
    y = h @ HEAD
    (theirs,) = torch.autograd.grad(F.cross_entropy(y[:2], TARGET[:2]) + F.cross_entropy(y[2:], TARGET[2:]), h)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(4096, 1000), (1, 1000, 64, 64), (3, 1000, 4096)])
def test_inplace_needs_no_second_array_of_the_logits_size(shape: tuple[int, ...]) -> None:
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    largest = {}
    for inplace in (True, False):
        x = torch.zeros(shape, requires_grad=True) * 1.0
        loss = torch_ops.cross_entropy(x, target, inplace_backward=inplace)
        with Largest(x) as seen:
            torch.autograd.grad(loss, x)
        largest[inplace] = seen.bytes
    assert largest[True] < 4 * np.prod(shape) / 2
    assert largest[False] >= 4 * np.prod(shape), "the measurement sees a full-size gradient when there is one"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft", [False, True])
def test_one_row_with_a_differentiable_class_weight(soft: bool, smoothing: float) -> None:
    x, w = _rand(V).requires_grad_(), _rand(V).requires_grad_()
    target = _rand(V) if soft else torch.tensor(2)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return torch_ops.cross_entropy(x, target, w, label_smoothing=smoothing, reduction="sum")

    assert torch.autograd.gradcheck(loss, (x, w), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, (x, w), fast_mode=True)


def test_one_row_with_the_target_forms_of_the_builtin() -> None:
    x = _rand(V)
    for t in (torch.tensor(2), torch.tensor([2])):
        ours, theirs = torch_ops.cross_entropy(x, t), F.cross_entropy(x, t)
        assert ours.shape == theirs.shape == ()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "value"), [("reduction", "sum"), ("label_smoothing", 0.25), ("ignore_index", 3)])
def test_module_attributes_set_later_count(name: str, value: Any) -> None:
    ours, theirs = torch_ops.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()
    before = ours(HIDDEN @ HEAD, TARGET.clamp(0))
    setattr(ours, name, value)
    setattr(theirs, name, value)
    after = ours(HIDDEN @ HEAD, TARGET.clamp(0))
    torch.testing.assert_close(after, theirs(HIDDEN @ HEAD, TARGET.clamp(0)))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_ignored_rows_read_no_class_weight(bad: float) -> None:
    weight = torch.tensor([bad, *[1.0] * (V - 1)], dtype=torch.float64)
    target = torch.tensor([1, 2, -100, 4, 5, -100])
    torch.testing.assert_close(
        torch_ops.cross_entropy(HIDDEN @ HEAD, target, weight), F.cross_entropy(HIDDEN @ HEAD, target, weight)
    )
    nothing = torch.full((N,), -100)
    assert torch_ops.cross_entropy(HIDDEN @ HEAD, nothing, weight, on_all_ignored="zero") == 0


def test_linearize_of_one_row_with_weights() -> None:
    x, weight, target = _rand(V), _rand(V).sqrt(), torch.tensor(2)
    value, tangent = torch.func.linearize(lambda x: torch_ops.cross_entropy(x, target, weight, reduction="sum"), x)
    direction = x.cos()
    expected = torch.func.jvp(lambda x: F.cross_entropy(x, target, weight, reduction="sum"), (x,), (direction,))[1]
    torch.testing.assert_close(tangent(direction), expected)
    assert value > 0


def test_float16_log_softmax_has_second_derivatives_at_wide_rows() -> None:
    x = torch.zeros(1, 2**17, dtype=torch.float16, requires_grad=True)
    (first,) = torch.autograd.grad(torch_ops.log_softmax(x), x, torch.ones_like(x), create_graph=True)
    (second,) = torch.autograd.grad(first, x, torch.ones_like(x))
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()
    tangent = torch.func.jvp(
        lambda d: torch.func.vjp(torch_ops.log_softmax, x.detach())[1](d)[0],
        (torch.ones_like(x),),
        (torch.ones_like(x),),
    )[1]
    assert torch.isfinite(tangent).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numpy_scalars_as_options(kind: type) -> None:
    x = HIDDEN @ HEAD
    ours = torch_ops.cross_entropy(x, TARGET, label_smoothing=kind(0.25), logit_scale=kind(0.5), z_loss=kind(0.0))
    torch.testing.assert_close(ours, F.cross_entropy(x / 2, TARGET, label_smoothing=0.25))


def test_unsigned_targets_beyond_signed_range() -> None:
    target = torch.from_numpy(np.array([0, 2**64 - 100], np.uint64))
    with pytest.raises(IndexError, match=f"got {2**64 - 100} at row 1"):
        torch_ops.cross_entropy(_rand(2, V), target)
    with pytest.raises(ValueError, match="ignore_index must be a Python integer of 64 bits or None"):
        torch_ops.cross_entropy(_rand(2, V), torch.tensor([0, 1]), ignore_index=2**64 - 100)


@pytest.mark.parametrize("cap", [1e-50, 1e-40, 1e39, 1e300])
def test_soft_caps_no_float32_can_hold(cap: float) -> None:
    x = _rand(N, V, dtype=torch.float32).requires_grad_()
    loss = torch_ops.cross_entropy(x, TARGET, softcap=cap)
    (dx,) = torch.autograd.grad(loss, x)
    uncapped = F.cross_entropy(x.detach() * (cap > 1), TARGET)
    torch.testing.assert_close(loss.detach(), uncapped)
    assert torch.isfinite(dx).all()


def test_logits_that_overflow_under_the_scale_meet_the_cap_as_numbers() -> None:
    x = torch.tensor([[-3e38, -3e38, -3.2e38], [3e38, -3e38, 0.0]])
    loss = torch_ops.cross_entropy(x, torch.tensor([0, 1]), logit_scale=10.0, softcap=30.0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([np.log(3.0), 60.0], dtype=torch.float32))


@pytest.mark.parametrize("op", [torch_ops.softmax, torch_ops.log_softmax])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_integers_with_a_dtype(op: Any, dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 1]]).to(dtype)
    torch.testing.assert_close(op(x, dtype=torch.float32), getattr(torch, op.__name__)(x, -1, dtype=torch.float32))
    with pytest.raises(TypeError, match="input must have type"):
        op(x)
    with pytest.raises(TypeError, match=r"dtype must be a floating torch\.dtype or None; got 'float32'"):
        op(x, dtype="float32")
