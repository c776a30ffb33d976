"""The PyTorch door: which kernel ran, what the compiler and exporters see of it, and where it steps aside."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch._inductor.utils as inductor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ops
from torch_ops._rows import dispatch as rows
from torch_ops._rows import native, plain

if native.missing and not (shutil.which("g++") or shutil.which("clang++")):
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

X = torch.linspace(-3, 3, 35).reshape(5, 7)
T = torch.tensor([0, 6, -1, 3, 3])
Y = X.softmax(1).flip(1)
W = torch.linspace(0.5, 1.5, 7)
LAYOUT: dict[str, Any] = {"dim": 1, "scale": 0.7, "softcap": 3.0}


class _Ran(TorchDispatchMode):
    """The native ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("softmax_ext."):
            self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def _ran(call: Any) -> list[str]:
    with _Ran() as ran:
        call()
    return ran.names


def test_a_machine_with_a_compiler_has_the_kernels() -> None:
    assert native.missing == ""
    assert native.instruction_set() in ("AVX-512", "AVX2", "NEON", "baseline")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_public_ops_run_the_kernels(dtype: torch.dtype, needs_grad: bool) -> None:
    x = X.to(dtype).requires_grad_(needs_grad)

    def run(op: Any, *args: Any) -> None:
        out = op(x, *args)
        if needs_grad:
            torch.autograd.grad(out.sum(), x)

    for op in ("softmax", "log_softmax"):
        assert _ran(lambda op=op: run(getattr(torch_ops, op))) == [f"{op}_fwd", f"{op}_bwd"][: 1 + needs_grad]
    ran = _ran(lambda: run(torch_ops.cross_entropy, T.clamp(0)))
    assert ran == ["cross_entropy_fwd", "cross_entropy_bwd"][: 1 + needs_grad]
    if needs_grad:
        loss = torch_ops.cross_entropy(x * 1, T.clamp(0), inplace_backward=True)
        assert _ran(lambda: torch.autograd.grad(loss, x)) == ["cross_entropy_bwd_"]


class _Subclass(Tensor):
    """A tensor that dispatches for itself knows the framework's ops, not ours."""


@pytest.mark.parametrize("x", [X.to("meta"), X.as_subclass(_Subclass), X[:, :0]], ids=["meta", "subclass", "V = 0"])
def test_everything_else_runs_plain_ops(x: Tensor) -> None:
    assert _ran(lambda: rows.softmax_fwd(x, dim=1)) == []


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_agree_with_the_plain_rows(soft: bool, dtype: torch.dtype) -> None:
    x, target, w = X.to(dtype), Y.to(dtype) if soft else T, W.to(dtype)
    ours = rows.cross_entropy_fwd(x, target, w, **LAYOUT, smooth=True, entropy=True)
    truth = plain.cross_entropy_fwd(x, target, w, **LAYOUT, smooth=True, entropy=True)
    read = torch.ones(5, dtype=torch.bool) if soft else T != -1  # nobody reads m and rest of an ignored row
    torch.testing.assert_close(ours[:-2], truth[:-2])
    for one, other in zip(ours[-2:], truth[-2:], strict=True):
        torch.testing.assert_close(one[read], other[read])
    up = [torch.linspace(-1, 2, 5, dtype=dtype) + i for i in range(4)]
    args = (x, target, w, *ours[-2:], *up)
    torch.testing.assert_close(rows.cross_entropy_bwd(*args, **LAYOUT), plain.cross_entropy_bwd(*args, **LAYOUT))


@pytest.mark.parametrize("target_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_targets_of_any_type(target_dtype: torch.dtype) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, y = X.to(dtype), Y.to(target_dtype)
        loss = torch_ops.cross_entropy(x, y)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(x.double(), y.double()).to(loss.dtype), rtol=2e-6, atol=0
        )


@pytest.mark.parametrize("soft", [False, True])
def test_opcheck(soft: bool) -> None:
    target, up = Y if soft else T, torch.ones(5)
    m, rest = plain.log_softmax_fwd(plain.capped(X, 0.7, 3.0), dim=1)[1:]
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (native.ops.softmax_fwd, (X, 1)),
        (native.ops.softmax_bwd, (X, Y, 1)),
        (native.ops.log_softmax_fwd, (X, 1)),
        (native.ops.log_softmax_bwd, (Y, X, m, rest, 1)),
        (native.ops.cross_entropy_fwd, (X, target, W, 1, 0.7, 3.0, True, True)),
        (native.ops.cross_entropy_bwd, (X, target, None, m, rest, up, None, up, None, 1, 0.7, 3.0)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_exported_programs_hold_no_op_of_ours() -> None:
    class Head(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch_ops.cross_entropy(torch_ops.softmax(x), t)

    program = torch.export.export(Head(), (X, T.clamp(0)))
    assert "softmax_ext" not in str(program.graph)
    torch.testing.assert_close(program.module()(X, T.clamp(0)), Head()(X, T.clamp(0)))


@pytest.mark.slow
def test_compiled_functions_call_the_kernels() -> None:
    torch._dynamo.reset()
    x = X.clone().requires_grad_()
    compiled = torch.compile(lambda x: torch_ops.cross_entropy(x, T.clamp(0), label_smoothing=0.1), fullgraph=True)
    loss, grad = compiled(x), None
    (grad,) = torch.autograd.grad(loss, x)
    eager = torch_ops.cross_entropy(x, T.clamp(0), label_smoothing=0.1)
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(grad, torch.autograd.grad(eager, x)[0])
    _, code = inductor.run_and_get_code(compiled, x.detach())
    assert any("softmax_ext" in text for text in code)


def test_threads_and_strides_change_nothing() -> None:
    x = torch.randn(64, 1003, generator=torch.Generator().manual_seed(0))
    wide = torch.zeros(64, 2006)
    wide[:, ::2] = x
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers += [torch_ops.softmax(x), torch_ops.softmax(wide[:, ::2])]
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert torch.equal(answers[0], answer)


def test_raw_ops_refuse_rows_without_classes() -> None:
    with pytest.raises(RuntimeError, match="at least one class"):
        native.ops.cross_entropy_fwd(X[:, :0], T, None, 1, 1.0, None, False, False)
    assert torch_ops.softmax(X[:, :0]).shape == (5, 0)


def test_lazily_negated_logits() -> None:
    x = (-X).requires_grad_()
    negated, target = torch._neg_view(x), T.clamp(0)  # pyright: ignore[reportPrivateImportUsage]
    assert negated.is_neg()
    torch.testing.assert_close(torch_ops.softmax(negated), X.softmax(1))
    grads = []
    for inplace in (False, True):
        y = torch._neg_view(x * 1)  # pyright: ignore[reportPrivateImportUsage]
        loss = torch_ops.cross_entropy(y, target, inplace_backward=inplace)
        grads += torch.autograd.grad(loss, x)
    truth = (X.softmax(1) - torch.nn.functional.one_hot(target, 7)) / len(T)
    torch.testing.assert_close(grads, [-truth, -truth])
