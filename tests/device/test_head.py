"""`make gpu`: the linear head on a GPU. Without one these tests are skipped, aloud, but for a rehearsal on the CPU.

Values, gradients and derivatives against the reference and the CPU, no host sync, CUDA graphs, the compiler, memory,
offsets past 2^31, autocast, a group's ranks; for JAX accuracy and memory.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.device.test_device import FW, Cuda, on_cuda, on_jax_gpu, torch
from tests.head import test_facts as test_head_facts
from tests.head import test_head
from tests.judging import cases
from tests.judging.frameworks import HERE

ops: Any = FW and FW.ops
MODES = ("fast", "lean")
MIB = 1 << 20


def rehearsed(*, slow: bool = True) -> Any:
    """Run a test on the GPU, and without one on the CPU: whether the test itself is right can be seen there."""
    here = pytest.mark.skipif(torch is None or torch.cuda.is_available(), reason="PyTorch sees a GPU, or is not here")
    marks = [here, pytest.mark.slow] if slow else [here]
    return pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda), pytest.param("cpu", marks=marks)])


def adapter(device: str) -> Any:
    return Cuda() if device == "cuda" else FW


SIX = [(d, m, s, name) for d in ("float32", "bfloat16", "float16") for m in MODES for s in (0, 1) for name in ("all",)]
SIX += [("bfloat16", m, 0, name) for m in MODES for name in ("plain", "smooth", "scale", "cap", "z-loss")]
SIX += [("float64", m, 0, "all") for m in MODES]


@rehearsed()
@pytest.mark.parametrize(("dtype", "memory", "soft", "name"), SIX)
def test_values_and_gradients(device: str, dtype: str, memory: str, soft: int, name: str) -> None:
    test_head.test_values_and_gradients(adapter(device), dtype, memory, 4, bool(soft), name)


@rehearsed()
@pytest.mark.parametrize("memory", MODES)
def test_data_facts(device: str, memory: str) -> None:
    """Ignored, masked, infinite and confident rows, nothing at all, upstream gradients by the row."""
    fw = adapter(device)
    test_head_facts.test_ignored_rows_reach_nothing(fw, memory, "mean")
    test_head_facts.test_all_ignored_and_no_rows(fw, memory)
    test_head_facts.test_mass_on_a_masked_class_is_an_infinite_loss(fw, memory)
    test_head_facts.test_a_row_without_a_distribution_is_nan_alone(fw, memory, np.inf)
    test_head_facts.test_05_confident_row_keeps_its_gradient(fw, memory, "bfloat16")
    test_head_facts.test_08_every_row_has_its_own_upstream_gradient(fw, memory)
    test_head_facts.test_float16_mean_over_many_rows_keeps_its_gradient(fw, memory)
    for name in ("leading", "K-d", "1-d", "shift 1", "shift 2, one sequence"):
        test_head.test_shapes(fw, name, memory, False, "sum")


@on_cuda
@pytest.mark.parametrize("memory", MODES)
def test_class_index_out_of_range_is_a_row_of_nan(memory: Any) -> None:
    x, w = (torch.randn(n, 8, device="cuda", requires_grad=True) for n in (6, 50))
    target = torch.tensor([0, 50, 3, -1, -100, 2**40], device="cuda")
    loss = ops.linear_cross_entropy(x, w, target, memory=memory, reduction="none", chunk_size=4)
    assert loss.isnan().tolist() == [False, True, False, True, False, True]
    dx, dw = torch.autograd.grad(loss.sum(), (x, w))
    assert dx.isnan().any(1).tolist() == loss.isnan().tolist()
    assert dw.isnan().all()


def _problem(device: str, dtype: Any, n: int, d: int, v: int) -> tuple[Any, Any, Any]:
    """(input, linear_weight, target), the same on every device; every other row has half its mass on its target."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=g) for shape in ((n, d), (v, d)))
    w /= d**0.5
    target = torch.randint(v, (n,), generator=g)
    x[::2] += w[target[::2]] * np.log(v)
    return *(a.to(dtype).to(device).requires_grad_() for a in (x, w)), target.to(device)


@rehearsed()
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 6e-2), ("float16", 8e-3)])
def test_gradients_are_the_cpus(device: str, dtype: str, near: float, memory: Any) -> None:
    """Loss and gradients at a size with many tiles, by chunks, beside the CPU's: each line within its own scale.

    Half-precision logits are rounded on a GPU; on a CPU they may be float32: that is 3e-2 in bfloat16, 4e-3 in float16.
    """
    found = []
    for at, chunk in ((device, 100 if memory == "fast" else 700), ("cpu", None)):
        x, w, t = _problem(at, getattr(torch, dtype), 300, 96, 2500)
        loss = ops.linear_cross_entropy(x, w, t, memory=memory, chunk_size=chunk, z_loss=1e-3, softcap=30.0)
        found.append([a.detach().cpu().double() for a in (loss, *torch.autograd.grad(loss, (x, w)))])
    (loss, *grads), (due, *truths) = found
    torch.testing.assert_close(loss, due, rtol=1e-4 if dtype != "float32" else 1e-6, atol=0)
    for ours, cpu in zip(grads, truths, strict=True):
        off = torch.linalg.vector_norm(ours - cpu, dim=1)
        size = torch.linalg.vector_norm(cpu, dim=1)
        assert bool((size > 0).all())
        assert bool((off <= near * size).all()), f"{float((off / size).max()):.3g} of a line's size"


@rehearsed(slow=False)
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("soft", [False, True])
def test_derivatives_are_the_cpus(device: str, memory: Any, soft: bool) -> None:
    """First and second order in both arguments, forward mode, torch.func: the same numbers as on the CPU."""
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x, w, vx, vw = make(5, 3), make(7, 3), make(5, 3), make(7, 3)
    target = make(5, 7).abs() if soft else torch.tensor([4, -100, 0, 6, 2])
    options = {**cases.OPTIONS["all"], "memory": memory, "chunk_size": 2, "stats": ("entropy",)}

    def answers(at: str) -> list[Any]:
        t, given, along = target.to(at), (x.to(at), w.to(at)), (vx.to(at), vw.to(at))

        def f(x: Any, w: Any) -> Any:
            loss, stats = ops.linear_cross_entropy(x, w, t, **options)
            return loss + 0.3 * stats["entropy"].sum()

        func, both = torch.func, (0, 1)
        hvp = func.jvp(func.grad(f, argnums=both), given, along)[1]
        leaves = [a.clone().requires_grad_() for a in given]
        plain = ops.linear_cross_entropy(*leaves, t, memory=memory, chunk_size=2, z_loss=0.1)
        first = torch.autograd.grad(plain, leaves, create_graph=True)
        second = torch.autograd.grad(sum((a * v).sum() for a, v in zip(first, along, strict=True)), leaves)
        return [f(*given), func.jvp(f, given, along)[1], *hvp, *first, *second, func.hessian(f)(*given)]

    for ours, cpu in zip(answers(device), answers("cpu"), strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-10, atol=1e-12)


@rehearsed()
@pytest.mark.parametrize("memory", MODES)
def test_gradcheck(device: str, memory: Any) -> None:
    x, w = (torch.randn(n, 2, dtype=torch.float64, device=device, requires_grad=True) for n in (3, 5))
    t = torch.tensor([1, -100, 4], device=device)

    def f(x: Any, w: Any) -> Any:
        return ops.linear_cross_entropy(x, w, t, memory=memory, chunk_size=2, **cases.OPTIONS["all"])

    assert torch.autograd.gradcheck(f, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, w))


STEPS: dict[str, dict[str, Any]] = {
    "fast": {"chunk_size": 30},
    "lean": {"memory": "lean", "chunk_size": 300},
    "fast, options": {"chunk_size": 30, "z_loss": 0.1, "label_smoothing": 0.1, "softcap": 5.0, "shift": 1},
    "lean, options": {"memory": "lean", "chunk_size": 300, "z_loss": 0.1, "label_smoothing": 0.1, "shift": 1},
    "statistics": {"chunk_size": 30, "stats": ("lse", "logprob", "entropy", "argmax")},
}


def _step(device: str, name: str, dtype: str) -> Any:
    g = torch.Generator(device).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device=device, generator=g).to(getattr(torch, dtype))  # noqa: E731
    x, w, b = (a.requires_grad_() for a in (make(2, 32, 16), make(1000, 16), make(1000)))
    t = torch.randint(1000, (2, 32), device=device, generator=g)
    t.view(-1)[::7] = -100
    weight = torch.rand(1000, device=device, generator=g)

    def step() -> Any:
        out = ops.linear_cross_entropy(x, w, t, linear_bias=b, weight=weight, **STEPS[name])
        loss, stats = out if isinstance(out, tuple) else (out, {})
        total = loss + sum(s.sum() for s in stats.values() if s.is_floating_point())
        return total, *torch.autograd.grad(total, (x, w, b))

    return step


@on_cuda
@pytest.mark.parametrize(("name", "dtype"), [*product(STEPS, ["bfloat16"]), ("fast", "float16"), ("lean", "float16")])
def test_no_sync_and_graph_capture(name: str, dtype: str) -> None:
    step = _step("cuda", name, dtype)
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
        assert torch.isfinite(a).all()
        assert torch.equal(a, b), "deterministic: the same bits"


@rehearsed()
@pytest.mark.parametrize("memory", MODES)
def test_compiled(device: str, memory: Any) -> None:
    torch._dynamo.reset()
    x, w, t = _problem(device, torch.bfloat16, 96, 16, 500)

    def step(x: Any, w: Any) -> Any:
        return ops.linear_cross_entropy(2.0 * x, w, t, memory=memory, chunk_size=40, z_loss=1e-3)

    backend = "inductor" if device == "cuda" else "aot_eager"
    loss, plain = torch.compile(step, fullgraph=True, backend=backend)(x, w), step(x, w)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for ours, eager in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(plain, (x, w)), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1.6e-2, atol=1e-6)


@rehearsed()
@pytest.mark.parametrize("memory", MODES)
def test_autocast(device: str, memory: Any) -> None:
    """float32 arguments under autocast: the loss and gradients of the same in bfloat16, given in float32."""
    x, w, t = _problem(device, torch.float32, 64, 16, 300)
    with torch.autocast(device, torch.bfloat16):
        loss = ops.linear_cross_entropy(x, w, t, memory=memory, chunk_size=50)
    grads = torch.autograd.grad(loss, (x, w))
    assert {loss.dtype, *(g.dtype for g in grads)} == {torch.float32}
    narrow = [a.detach().bfloat16().requires_grad_() for a in (x, w)]
    due = ops.linear_cross_entropy(*narrow, t, memory=memory, chunk_size=50)
    assert torch.equal(loss, due)
    for ours, theirs in zip(grads, torch.autograd.grad(due, narrow), strict=True):
        assert torch.equal(ours, theirs.float())


@on_cuda
@pytest.mark.parametrize("memory", MODES)
def test_workspace_is_bounded(memory: Any) -> None:
    """Beyond arguments and gradients: a chunk of logits and the float32 dW (fast), or a slice and the float32 dX."""
    n, d, v = 4096, 512, 32000
    x, w, t = _problem("cuda", torch.bfloat16, n, d, v)

    def step() -> Any:
        chunk = 512 if memory == "fast" else 4000
        loss = ops.linear_cross_entropy(x, w, t, memory=memory, chunk_size=chunk)
        return loss, *torch.autograd.grad(loss, (x, w))

    step()  # kernels are compiled, cuBLAS' own workspace is there
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answers = step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(a.nbytes for a in answers)
    if memory == "fast":  # dX is kept unrounded until it is scaled, a chunk's x stands without its ignored rows
        bound = 512 * v * 2 + v * d * 4 + n * d * 2 + 512 * d * 2
    else:
        bound = n * 4000 * 2 + n * d * 4 + n * d * 2
    assert extra <= bound + 16 * MIB, f"{extra / MIB:.0f} MiB where {bound / MIB:.0f} are due"


@rehearsed()
def test_weight_gradient_is_as_good_in_many_chunks(device: str) -> None:
    """bfloat16, 64 chunks beside one: products are summed unrounded by cuBLAS, or in float32.

    A CPU with a dot product for bfloat16 rounds each product once before it is summed: 1.17 there, and a sum kept in
    bfloat16 would be 5.
    """
    unrounded: Any = importlib.import_module("torch_ops._head.unrounded")
    linear: Any = importlib.import_module("torch_ops._head.linear")
    x, w, t = _problem(device, torch.bfloat16, 4096, 32, 200)
    exact = [a.detach().double().requires_grad_() for a in (x, w)]
    truth = torch.autograd.grad(ops.linear_cross_entropy(*exact, t), exact)[1]
    if device == "cuda" and torch.version.hip is None:
        assert unrounded._offered(x.device, torch.bfloat16), "PyTorch refuses what 2.11 is to take"
    errors = []
    for chunk in (4096, 64):
        dw = torch.autograd.grad(ops.linear_cross_entropy(x, w, t, chunk_size=chunk), w)[0]
        errors.append(float((dw.double() - truth).norm() / truth.norm()))
    assert errors[0] < 4e-3
    rounded = device == "cpu" and linear.formed_in(x, t) == torch.bfloat16
    assert errors[1] < (1.3 if rounded else 1.05) * errors[0], errors


@on_cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cublas_sums_products_unrounded(dtype: str) -> None:
    unrounded: Any = importlib.import_module("torch_ops._head.unrounded")
    a, b = (torch.randn(s, device="cuda").to(getattr(torch, dtype)) for s in ((301, 257), (301, 75)))
    out = torch.full((257, 75), torch.nan, device="cuda")
    assert unrounded.add_product(out, a.t(), b, first=True)
    truth = a.double().t() @ b.double()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-3)
    assert unrounded.add_product(out, a.t(), b, first=False)
    torch.testing.assert_close(out.double(), 2 * truth, rtol=1e-5, atol=2e-3)


@on_cuda
@pytest.mark.parametrize("size", [(1001, 129), (4096, 4096)])
def test_a_gradient_by_a_number_is_rounded_once(size: tuple[int, int]) -> None:
    rounding: Any = importlib.import_module("torch_ops._head.rounding")
    x, factor = torch.randn(size, device="cuda"), torch.tensor(1 / 3, device="cuda")
    for given in (x, x.bfloat16()):
        for kind in (torch.bfloat16, torch.float16):
            assert torch.equal(rounding.scaled(given, factor, kind), (given.float() * factor).to(kind))


@on_cuda
@pytest.mark.parametrize("memory", MODES)
def test_more_than_two_to_the_31_logits(memory: Any) -> None:
    """All in one chunk: rows at both ends against the reference."""
    n, d, v = 16800, 32, 128256
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    x, w, t = _problem("cuda", torch.bfloat16, n, d, v)
    loss = ops.linear_cross_entropy(x, w, t, memory=memory, reduction="none", chunk_size=n if memory == "fast" else v)
    dx, dw = torch.autograd.grad(loss.sum(), (x, w))
    rows, target = [0, 1, n // 2, n - 2, n - 1], t.cpu().numpy()
    weight = w.detach().double().cpu().numpy()
    for i in rows:
        given = x[i : i + 1].detach().double().cpu().numpy()
        value = reference.linear_cross_entropy(given, weight, target[i : i + 1], reduction="sum")
        due, *_ = reference.linear_cross_entropy_grad(given, weight, target[i : i + 1], reduction="sum")
        assert abs(loss[i].item() - value) < 5e-2 * max(1.0, abs(float(value)))
        assert np.linalg.norm(dx[i].double().cpu().numpy() - due[0]) < 6e-2 * np.linalg.norm(due[0])
    assert torch.isfinite(dw).all()
    last = int(t[-1])
    assert float(dw[last].norm()) > 0.01


@rehearsed()
@pytest.mark.parametrize("world", [2, 1])
def test_group(device: str, world: int, tmp_path: Path) -> None:
    """Classes on the ranks of a group: NCCL where there are GPUs, gloo in the rehearsal."""
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"{torch.cuda.device_count()} GPU for {world} ranks")
    if device == "cpu" and world == 1:
        pytest.skip("two ranks of the rehearsal do more")
    command = [sys.executable, "-m", "tests.device.group"]
    given: dict[str, Any] = {"cwd": Path(__file__).parents[2], "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([*command, device, str(rank), str(world), str(tmp_path / "store")], **given)
        for rank in range(world)
    ]
    said = []
    try:
        for rank in ranks:
            _, err = rank.communicate(timeout=200)
            if rank.returncode:
                said.append(err[-4000:])
    finally:
        for rank in ranks:
            rank.kill()
    assert not said, "\n".join(said)


@on_jax_gpu
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_accuracy(dtype: str, memory: str) -> None:
    jax: Any = importlib.import_module("jax")
    fw: Any = next(fw for fw in HERE if fw.name == "jax")
    with jax.default_matmul_precision("highest"):  # the default is TF32 for float32
        test_head.test_values_and_gradients(fw, dtype, memory, 4, False, "all")
        test_head.test_values_and_gradients(fw, dtype, memory, 4, True, "all")


@on_jax_gpu
@pytest.mark.parametrize("memory", MODES)
def test_jax_temporaries_are_bounded_by_the_chunk(memory: str) -> None:
    """Value and gradients: a chunk of logits with what XLA puts beside it, and the gradients' sums in float32."""
    jax: Any = importlib.import_module("jax")
    jax_ops: Any = importlib.import_module("jax_ops")
    n, d, v = 4096, 256, 32000
    x, w = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((n, d), (v, d)))
    t = jax.ShapeDtypeStruct((n,), "int32")
    chunk = 256 if memory == "fast" else 2000
    f = jax.value_and_grad(
        lambda x, w, t: jax_ops.linear_cross_entropy(x, w, t, memory=memory, chunk_size=chunk), argnums=(0, 1)
    )
    size = jax.jit(f).lower(x, w, t).compile().memory_analysis().temp_size_in_bytes
    assert size < 4 * (256 * v * 4) + 2 * (n + v) * d * 4, f"{size / MIB:.0f} MiB"
    assert size < n * v * 2, "less than the logits"
