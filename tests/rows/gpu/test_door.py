"""The Triton kernels as PyTorch ops: who is served, what the compiler sees, and that no value is ever looked at."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.rows.gpu import interpreter

if interpreter.why_not():
    pytest.skip(f"Triton's interpreter: {interpreter.why_not()}", allow_module_level=True)

torch: Any = importlib.import_module("torch")
torch_ops: Any = importlib.import_module("torch_ops")
triton: Any = importlib.import_module("torch_ops._rows.triton")
ops: Any = importlib.import_module("torch_ops._rows.triton_ops")
plain: Any = importlib.import_module("torch_ops._rows.plain")
report: Any = importlib.import_module("torch_ops._report")
FakeTensorMode: Any = importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode

X = torch.linspace(-3, 3, 35).reshape(5, 7)
T = torch.tensor([0, 6, -1, 3, 3])
Y = X.softmax(1).flip(1)
W = torch.linspace(0.5, 1.5, 7)
EVERY = {"label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1, "on_all_ignored": "zero"}


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not triton.serves(X, 1)
    assert not triton.serves(X.to("meta"), 1)
    with FakeTensorMode():
        for device, dtype, served in (
            ("cuda", torch.float64, True),
            ("cuda", torch.bfloat16, True),
            ("cuda", torch.complex64, False),
            ("xpu", torch.float16, True),
            ("xpu", torch.float64, False),
            ("mps", torch.float32, False),
        ):
            assert triton.serves(torch.empty(2, 3, dtype=dtype, device=device), 1) is served
        assert not triton.serves(torch.empty(2, 0, device="cuda"), 1)
        y = torch_ops.softmax(torch.empty(2, 3, device="cuda"))
        assert (y.device.type, y.shape) == ("cuda", (2, 3))
        monkeypatch.setattr(triton, "missing", "Triton is not installed")
        triton.why_not.cache_clear()
        assert not triton.serves(torch.empty(2, 3, device="cuda"), 1)
    triton.why_not.cache_clear()


def test_an_old_device_runs_plain_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in triton.why_not.__wrapped__(torch.device("cuda", 0))


def test_no_value_is_looked_at() -> None:
    """A fake tensor has none: whatever would be a sync on a device raises here, forward, backward and twice."""
    with interpreter.interpreted(), FakeTensorMode():
        x = torch.empty(5, 7, requires_grad=True)
        for y in (torch_ops.softmax(x), torch_ops.log_softmax(x, 0)):
            (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            torch.autograd.grad(dx.sum(), x)
        for target in (torch.empty(5, dtype=torch.int64), torch.empty(5, 7)):
            for reduction in ("mean", "sum", "none"):
                options = {**EVERY, "reduction": reduction, "stats": ("lse", "logprob", "entropy", "argmax")}
                if target.is_floating_point():
                    options["stats"] = ("lse", "entropy", "argmax")
                w, tw = torch.empty(7, requires_grad=True), torch.empty(5)
                loss, stats = torch_ops.cross_entropy(x, target, w, token_weight=tw, **options)
                both = loss.sum() + stats["entropy"].sum() + stats["lse"].sum()
                dx, _ = torch.autograd.grad(both, (x, w), create_graph=True)
                torch.autograd.grad(dx.sum(), x)
            torch_ops.cross_entropy(x * 1, target, inplace_backward=True).backward()


@pytest.mark.parametrize("soft", [False, True])
def test_opcheck(soft: bool) -> None:
    target, up = Y if soft else T, torch.ones(5)
    m, rest = plain.log_softmax_fwd(plain.capped(X, 0.7, 3.0), dim=1)[1:]
    ups = (up, None, up, None)
    calls = {
        "softmax_fwd": (X, 1),
        "softmax_bwd": (X, Y, 1),
        "log_softmax_fwd": (X.T, 0),
        "log_softmax_bwd": (Y, X, m, rest, 1),
        "cross_entropy_fwd": (X, target, W, 1, 0.7, 3.0, True, True),
        "cross_entropy_bwd": (X, target, W, m, rest, *ups, 1, 0.7, 3.0),
        "cross_entropy_bwd_": (X.clone(), target, None, m, rest, *ups, 1, 0.7, 3.0),
        "cross_entropy_fwd_bwd_": (X.clone(), target, W, *ups, 1, 0.7, 3.0, True, False),
    }
    with interpreter.interpreted():
        for name, args in calls.items():
            op = getattr(torch.ops.softmax_ext_triton, name).default
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_no_rows_no_launch() -> None:
    with interpreter.interpreted():
        assert ops.softmax_fwd(X[:0], 1).shape == (0, 7)
        assert [o.shape for o in ops.cross_entropy_fwd(X[:0], T[:0], None, 1, 1.0, None, False, False)] == [(0,)] * 4


def test_strided_logits_are_not_overwritten() -> None:
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.cross_entropy_bwd_(X.T, T, None, X[0], X[0], X[0], None, None, None, 0, 1.0, None)


@pytest.mark.slow
def test_compiled_functions_call_the_kernels() -> None:
    inductor: Any = importlib.import_module("torch._inductor.utils")
    torch._dynamo.reset()
    x, t = X.clone().requires_grad_(), T.clamp(0)
    with interpreter.interpreted() as ran:
        compiled = torch.compile(lambda x: torch_ops.cross_entropy(torch_ops.softmax(x), t, **EVERY), fullgraph=True)
        loss, codes = inductor.run_fw_bw_and_get_code(lambda: compiled(x))
        assert {"softmax_fwd_kernel", "softmax_bwd_kernel", "cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel"} <= {
            *ran
        }
        assert any("softmax_ext_triton" in code for code in codes)
        (grad,) = torch.autograd.grad(torch_ops.cross_entropy(torch_ops.softmax(x), t, **EVERY), x)
    torch.testing.assert_close(loss, torch_ops.cross_entropy(torch_ops.softmax(X), t, **EVERY))
    torch.testing.assert_close(x.grad, grad)
    torch._dynamo.reset()


def test_the_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert report.kernels()[1][:2] == ("cuda", "triton")
    monkeypatch.setattr(triton, "missing", "Triton is not installed")
    triton.why_not.cache_clear()
    assert report.kernels()[1] == ("cuda", "plain", "analytic rules in PyTorch ops: Triton is not installed")
    triton.why_not.cache_clear()
