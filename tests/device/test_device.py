"""`make gpu`: everything that needs a GPU. Without one each test is skipped, aloud.

Values, gradients and derivatives against the reference and the CPU, no host sync, CUDA graphs, the compiler, offsets
past 2^31, memory; for JAX the memory of the plain lowering.
"""

from __future__ import annotations

import importlib
import importlib.util
from itertools import product
from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.judging import cases, checks
from tests.judging.frameworks import HERE
from tests.ops import arrays as test_ops_arrays
from tests.ops import test_ops
from tests.rows.gpu import interpreter

FW: Any = next((fw for fw in HERE if fw.name == "torch"), None)
torch: Any = FW and FW.torch
on_cuda = pytest.mark.skipif(
    torch is None or not torch.cuda.is_available(), reason="PyTorch sees no CUDA or ROCm device"
)


def _jax_gpu() -> bool:
    if importlib.util.find_spec("jax") is None:
        return False
    return importlib.import_module("jax").default_backend() == "gpu"


on_jax_gpu = pytest.mark.skipif(not _jax_gpu(), reason="JAX sees no GPU")


class Cuda(type(FW) if FW else object):  # pyright: ignore[reportGeneralTypeIssues]
    """tests.judging.frameworks' adapter with every array on the GPU; strides, 0 included, stay as they are."""

    def array(self, value: Any, dtype: str) -> Any:
        x = super().array(value, dtype)  # pyright: ignore[reportAttributeAccessIssue]
        one = x[tuple(slice(0, 1) if s == 0 and n else slice(None) for n, s in zip(x.shape, x.stride(), strict=True))]
        return one.cuda().expand(x.shape)

    def numpy(self, x: Any) -> Any:
        return super().numpy(x.cpu())  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(checks, "FAST_HALVES", checks.FAST)
    return Cuda()


@on_cuda
def test_the_kernels_serve_this_device() -> None:
    triton = importlib.import_module("torch_ops._rows.triton")
    x = torch.empty(2, 3, device="cuda")
    assert triton.why_not(x.device) == ""
    assert triton.serves(x, 1)
    assert interpreter.why_not()


SIZES = (1, 2, 7, 65, 129, 1000, 1025, 4097, 8193, 16385, 32000, 32769, 128256)
SIZED = [("float32", v) for v in SIZES] + list(product(("float64", "bfloat16", "float16"), (1, 5, 1000, 4097, 50257)))


@on_cuda
@pytest.mark.parametrize(("dtype", "classes"), SIZED)
def test_accuracy(cuda: Any, dtype: str, classes: int) -> None:
    test_ops.test_accuracy(cuda, dtype, classes)


@on_cuda
@pytest.mark.parametrize(
    ("dtype", "kind", "name"), list(product(["float32", "bfloat16"], test_ops_arrays.KINDS, cases.OPTIONS))
)
def test_accuracy_of_loss_options(cuda: Any, dtype: str, kind: str, name: str) -> None:
    test_ops.test_accuracy_of_loss_options(cuda, dtype, kind, name)


@on_cuda
@pytest.mark.parametrize("kind", test_ops_arrays.KINDS)
def test_statistics(cuda: Any, kind: str) -> None:
    for name in ("plain", "all"):
        test_ops.test_accuracy_of_statistics(cuda, kind, name)


@on_cuda
def test_any_axis_and_shape(cuda: Any) -> None:
    for axis in (0, 1, 2):
        test_ops.test_softmax_along_any_axis(cuda, "float32", axis)
    for shape in ((6,), (3, 2), (3, 1, 2), ()):
        test_ops.test_cross_entropy_of_any_shape(cuda, "bfloat16", shape)


@on_cuda
def test_middle_axis_of_images(cuda: Any) -> None:
    for shape in ((2, 21, 67, 129), (3, 300, 5, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        y = torch.softmax(x, 1)
        ours = importlib.import_module("torch_ops").softmax(x.float().cuda(), 1)
        torch.testing.assert_close(ours.double().cpu(), torch.softmax(x.float().double(), 1), rtol=2e-6, atol=1e-30)
        assert y.shape == ours.shape


@on_cuda
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("soft", [False, True])
def test_derivatives_are_the_cpus(name: str, soft: bool) -> None:
    """First to third order, forward mode, torch.func: the same numbers as on the CPU."""
    ops = importlib.import_module("torch_ops")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=g, dtype=torch.float64)
    v = torch.randn(3, 5, generator=g, dtype=torch.float64)
    target = torch.rand(3, 5, generator=g, dtype=torch.float64) if soft else torch.tensor([4, -100, 0])

    def answers(device: str) -> list[Any]:
        t, dx = target.to(device), v.to(device)

        def f(x: Any) -> Any:
            loss, stats = ops.cross_entropy(x, t, stats=("entropy",), **cases.OPTIONS[name])
            return loss + 0.3 * stats["entropy"].sum() + (ops.softmax(x) * ops.log_softmax(x, 0)).sum()

        at, func = x.to(device), torch.func
        gradient = func.grad(f)
        hvp = func.jvp(gradient, (at,), (dx,))[1]
        third = func.grad(lambda x: (func.jvp(gradient, (x,), (dx,))[1] * dx).sum())(at)
        return [f(at), func.jvp(f, (at,), (dx,))[1], gradient(at), func.hessian(f)(at), hvp, third]

    for ours, cpu in zip(answers("cuda"), answers("cpu"), strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-11, atol=1e-12)


@on_cuda
def test_gradcheck() -> None:
    ops = importlib.import_module("torch_ops")
    x = torch.randn(3, 5, dtype=torch.float64, device="cuda", requires_grad=True)
    t = torch.tensor([1, -100, 4], device="cuda")
    for f in (ops.softmax, ops.log_softmax, lambda x: ops.cross_entropy(x, t, **cases.OPTIONS["all"])):
        assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, (x,))


def _training(dtype: str, *, invalid: bool) -> dict[str, Any]:
    n, v = 64, 1000
    ops = importlib.import_module("torch_ops")
    x = torch.randn(n, v, device="cuda").to(getattr(torch, dtype)).requires_grad_()
    t = torch.randint(v, (n,), device="cuda")
    t[::7] = -100
    if invalid:
        t[3] = v + 5
    y, w = torch.rand(n, v, device="cuda"), torch.rand(v, device="cuda")
    every = {**cases.OPTIONS["all"], "stats": ("lse", "entropy", "argmax")}
    return {
        "softmax": lambda: (ops.softmax(x, dtype=torch.float32).square().sum(), x),
        "log_softmax": lambda: (ops.log_softmax(x).float().square().sum(), x),
        "cross_entropy": lambda: (ops.cross_entropy(x, t), x),
        "in place": lambda: (ops.cross_entropy(x * 1, t, inplace_backward=True), x),
        "every option": lambda: (ops.cross_entropy(x, t, w, on_all_ignored="zero", **every)[0], x),
        "soft": lambda: (ops.cross_entropy(x, y, w, **every)[0], x),
    }


@on_cuda
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy", "in place", "every option", "soft"])
def test_no_sync_and_graph_capture(name: str) -> None:
    run = _training("bfloat16", invalid=True)[name]

    def step() -> Any:
        loss, x = run()
        return loss, torch.autograd.grad(loss, x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            want = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, want, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), "deterministic: the same bits"


@on_cuda
def test_compiled() -> None:
    inductor: Any = importlib.import_module("torch._inductor.utils")
    torch._dynamo.reset()
    for name, run in _training("float32", invalid=False).items():
        if name == "in place":
            continue
        loss, x = run()
        compiled = torch.compile(lambda run=run: run()[0], fullgraph=True)
        out, codes = inductor.run_and_get_code(compiled)
        assert any("softmax_ext_triton" in code for code in codes), name
        torch.testing.assert_close(out, loss)
        torch.testing.assert_close(torch.autograd.grad(out, x)[0], torch.autograd.grad(loss, x)[0])


@on_cuda
def test_more_than_two_to_the_31_logits() -> None:
    ops = importlib.import_module("torch_ops")
    n, v = 16800, 128256  # 2.15e9 entries, 4.3 GB in bfloat16
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB")
    x = torch.empty(n, v, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    t = torch.randint(v, (n,), device="cuda")
    loss = ops.cross_entropy(x, t, reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    y = ops.softmax(x.detach())
    for i in (0, n // 2, n - 1):
        row, at = x[i].detach().double().cpu().numpy(), int(t[i])
        p = reference.softmax(row)
        np.testing.assert_allclose(y[i].double().cpu().numpy(), p, rtol=4.1e-3, atol=1e-30)
        p[at] -= 1
        np.testing.assert_allclose(dx[i].double().cpu().numpy(), p, rtol=4.1e-3, atol=1e-30)
        assert abs(loss[i].item() + reference.log_softmax(row)[at]) < 1e-5


@on_cuda
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_cross_entropy_holds_nothing_but_the_gradient(name: str, inplace: bool) -> None:
    ops = importlib.import_module("torch_ops")
    n, v = 1024, 32000
    leaf = torch.randn(n, v, device="cuda", dtype=torch.bfloat16).requires_grad_()
    t = torch.randint(v, (n,), device="cuda")
    hidden = leaf * 1
    ops.cross_entropy(hidden, t, **cases.OPTIONS[name]).backward()  # compiles
    leaf.grad, hidden = None, leaf * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = ops.cross_entropy(hidden, t, inplace_backward=inplace, **cases.OPTIONS[name])
    (dx,) = torch.autograd.grad(loss, hidden)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < (0 if inplace else dx.nbytes) + dx.nbytes // 16, f"{extra / dx.nbytes:.2f} gradients"


@on_jax_gpu
def test_jax_plain_lowering_keeps_no_array() -> None:
    """The analytic rule in XLA: value and gradient of the loss need no (N, V) array beside input and gradient.

    With a soft cap one in float32 and a mask: XLA will not form a tanh again where it is used.
    """
    jax: Any = importlib.import_module("jax")
    ops: Any = importlib.import_module("jax_ops")
    n, v = 1024, 32000
    x = jax.ShapeDtypeStruct((n, v), "bfloat16")
    t = jax.ShapeDtypeStruct((n,), "int32")
    for options, arrays in (({}, 0.0), ({"label_smoothing": 0.1, "z_loss": 0.1}, 0.0), (cases.OPTIONS["all"], 1.26)):
        f = jax.value_and_grad(lambda x, t, o=options: ops.cross_entropy(x, t, **o))
        memory = jax.jit(f).lower(x, t).compile().memory_analysis()
        assert memory.temp_size_in_bytes < n * v * (4 * arrays + 0.5), (options, memory)


@on_jax_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_accuracy(dtype: str) -> None:
    fw: Any = next(fw for fw in HERE if fw.name == "jax")
    for classes in (129, 4099, 32000):
        r = cases.rows(classes, dtype)
        for op in ("softmax", "log_softmax"):
            arrays, up = {"input": r.x}, {"value": r.dy}
            truth = checks.oracle(op, arrays, up)
            checks.judge(op, dtype, fw(op, dtype, arrays, up), truth, checks.scales(op, arrays, up, dtype=dtype))
