"""`make gpu`: K classes a row on a GPU. Without one these tests are skipped, aloud, but for a rehearsal on the CPU.

Points of a distribution, the three products, sparse targets, linear_at and grad_samples beside the reference and the
CPU; no host sync, CUDA graphs, memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.device.test_device import FW, on_cuda, torch
from tests.device.test_head import MIB, rehearsed

ops: Any = FW and FW.ops
rows: Any = importlib.import_module("tests.rows.native.test_classes") if FW else None
sampled: Any = importlib.import_module("torch_ops._head.sampled") if FW else None


class On:
    """The row functions of a device, for tests whose arrays are on the CPU."""

    def __init__(self, device: str) -> None:
        self.device, self.ops = device, torch.ops.softmax_ext if device == "cpu" else torch.ops.softmax_ext_triton
        if device != "cpu":
            importlib.import_module("torch_ops._rows.triton_classes")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out = getattr(self.ops, name)(*(a.to(self.device) if isinstance(a, torch.Tensor) else a for a in args))
            return [a.cpu() for a in out] if isinstance(out, tuple | list) else out.cpu()

        return call


@pytest.fixture
def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ops", On(device))


TYPES = ("float32", "float64", "bfloat16", "float16")


@rehearsed(slow=False)
@pytest.mark.parametrize("dtype", TYPES)
def test_points(device: str, on: None, dtype: str) -> None:
    for classes, k in ((1, 3), (17, 100), (256, 7), (1000, 64), (4099, 16), (131072, 64)):
        rows.test_points(getattr(torch, dtype), classes, k)


@rehearsed()
def test_points_strata_edges_and_shards(device: str, on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows.test_every_point_falls_where_its_stratum_says()
    rows.test_edges_of_points()
    rows.test_no_point_of_a_long_row_is_lost()
    monkeypatch.setattr(rows, "CLASSES", 60)
    for cap in (None, 4.0):
        rows.test_every_boundary_between_shards(cap)


@rehearsed()
@pytest.mark.parametrize("dtype", TYPES)
def test_three_products(device: str, on: None, dtype: str) -> None:
    for shape in rows.SHAPES:
        rows.test_three_products(getattr(torch, dtype), shape)
    rows.test_the_first_coefficient_is_that_of_all_leading_ids()
    rows.test_ids_of_no_class_are_nan_and_reach_no_weight()
    rows.test_a_class_with_many_terms_keeps_its_digits()


def _leaves(device: str, dtype: Any, n: int, d: int, v: int) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=g, dtype=torch.float64) / d**0.25 for s in ((n, d), (v, d), (v,))]
    return [a.to(device=device, dtype=dtype).requires_grad_() for a in made]


def _targets(device: str, n: int, v: int, pair: bool, ignored: bool = True) -> Any:
    g = torch.Generator().manual_seed(1)
    if not pair:
        target = torch.randint(v, (n,), generator=g)
        target[::7] = -100 if ignored else 3
        return target.to(device)
    ids, mass = torch.randint(v, (n, 5), generator=g), torch.rand(n, 5, generator=g)
    ids[::3, 1], ids[::4, 2], ids[::7] = ids[::3, 0], -100, -100 if ignored else 3
    return ids.to(device), mass.to(device)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none", "z_loss": 0.1, "logit_scale": 0.7},
    "cap": {"softcap": 3.0, "stats": ("entropy", "logprob")},
    "smooth": {"label_smoothing": 0.2, "reduction": "sum", "stats": ("entropy",)},
}


def _answers(out: Any, leaves: Any) -> list[Any]:
    loss, stats = out if isinstance(out, tuple) else (out, {})
    total = loss.sum() + sum(s.sum() for s in stats.values())
    return [a.detach().cpu().double() for a in (loss, *stats.values(), *torch.autograd.grad(total, leaves))]


@rehearsed()
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_sampled_gradient_is_the_cpus(device: str, name: str, pair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same u: the same points, in float64, where no threshold lies within a rounding of an edge.

    No row is ignored: a CPU looks and draws for the others alone, a GPU does not.
    """
    n, v = 60, 3000
    u = torch.rand(n, 16, generator=torch.Generator().manual_seed(5))
    found = []
    for at, chunk in ((device, 25), ("cpu", None)):
        leaves, target = _leaves(at, torch.float64, n, 40, v), _targets(at, n, v, pair, ignored=False)
        with monkeypatch.context() as patch:
            patch.setattr(sampled.torch, "rand", lambda *_, at=at, **__: u.to(at))
            out = ops.linear_cross_entropy(
                *leaves[:2], target, linear_bias=leaves[2], grad_samples=16, chunk_size=chunk, **OPTIONS[name]
            )
        found.append(_answers(out, leaves))
    for ours, cpu in zip(*found, strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-9, atol=1e-10)


@rehearsed()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampled_gradient_is_without_bias(device: str, dtype: str) -> None:
    """The mean of many draws is the exact gradient, within what the mean of so many may be off."""
    n, d, v, k, draws = 64, 24, 2000, 16, 60
    leaves, target = _leaves(device, getattr(torch, dtype), n, d, v)[:2], _targets(device, n, v, False)
    loss = ops.linear_cross_entropy(*leaves, target, reduction="sum")
    exact = [g.double() for g in torch.autograd.grad(loss, leaves)]
    total = [torch.zeros_like(g) for g in exact]
    for i in range(draws):
        g = torch.Generator(device).manual_seed(i)
        same = ops.linear_cross_entropy(*leaves, target, reduction="sum", grad_samples=k, generator=g)
        torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
        for t, one in zip(total, torch.autograd.grad(same, leaves), strict=True):
            t += one.double() / draws
    one = ops.linear_cross_entropy(*leaves, target, reduction="sum", grad_samples=k)
    apart = [(g.double() - e).norm() / e.norm() for g, e in zip(torch.autograd.grad(one, leaves), exact, strict=True)]
    for mean, due, noise in zip(total, exact, apart, strict=True):
        off = float((mean - due).norm() / due.norm())
        assert off <= 1.5 * float(noise) / draws**0.5 + 4e-3, (off, float(noise))


@rehearsed()
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_sparse_targets_are_the_cpus(device: str, dtype: str, head: bool) -> None:
    kind = getattr(torch, dtype)
    near = {"float64": (1e-10, 1e-12), "float32": (2e-5, 2e-5), "bfloat16": (3e-2, 3e-2)}[dtype]
    for name, options in OPTIONS.items():
        found = []
        for at in (device, "cpu"):
            leaves, (ids, mass) = _leaves(at, kind, 21, 12, 700), _targets(at, 21, 700, True)
            mass.requires_grad_()
            if head:
                out = ops.linear_cross_entropy(*leaves[:2], (ids, mass), linear_bias=leaves[2], chunk_size=8, **options)
            else:
                logits = torch.randn(21, 700, generator=torch.Generator().manual_seed(2)).to(at, kind)
                leaves = [(3 * logits).requires_grad_()]
                out = ops.cross_entropy(leaves[0], (ids, mass), **options)
            found.append(_answers(out, [*leaves, mass]))
        for ours, cpu in zip(*found, strict=True):
            torch.testing.assert_close(ours, cpu, rtol=near[0], atol=near[1] * float(cpu.abs().max()), msg=name)


@rehearsed()
def test_linear_at_is_the_cpus(device: str) -> None:
    found = []
    for at in (device, "cpu"):
        x, w, b = _leaves(at, torch.float64, 11, 13, 90)
        ids, up = _targets(at, 11, 90, True)
        z = ops.linear_at(x, w, ids, linear_bias=b)
        first = torch.autograd.grad(z, [x, w, b], up.double(), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), [x, w])
        found.append([a.detach().cpu() for a in (z, *first, *second)])
    for ours, cpu in zip(*found, strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-10, atol=1e-12)


STEPS: dict[str, Callable[..., Any]] = {
    "sampled": lambda x, w, b, t, y: ops.linear_cross_entropy(x, w, t, linear_bias=b, grad_samples=8, chunk_size=40),
    "sampled pair": lambda x, w, b, t, y: ops.linear_cross_entropy(
        x, w, y, grad_samples=8, softcap=5.0, stats=("entropy",)
    )[0],
    "pair": lambda x, w, b, t, y: ops.linear_cross_entropy(x, w, y, linear_bias=b, chunk_size=40),
    "linear_at": lambda x, w, b, t, y: torch.log_softmax(ops.linear_at(x, w, y[0], linear_bias=b).clamp(min=-99), -1),
}


@on_cuda
@pytest.mark.parametrize("name", STEPS)
def test_no_sync_and_graph_capture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = _leaves("cuda", torch.bfloat16, 64, 16, 1000)
    arrays = (*leaves, _targets("cuda", 64, 1000, False), _targets("cuda", 64, 1000, True))
    leaves = [a for a, used in zip(leaves, (True, True, name != "sampled pair"), strict=True) if used]

    def step() -> Any:
        total = STEPS[name](*arrays).sum()
        return total, *torch.autograd.grad(total, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    u = torch.rand(64, 8, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with monkeypatch.context() as patch:  # a captured draw is another at each replay
        patch.setattr(sampled.torch, "rand", lambda *_, **__: u)
        with torch.cuda.stream(stream):  # on the default one the leaves' nodes would tie a captured backward to it
            want = step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, want, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b), "deterministic: the same bits"
    if "sampled" in name:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        found = []
        for _ in range(2):
            graph.replay()
            found.append(captured[2].clone())
        assert not torch.equal(*found), "each replay draws points of its own"


@on_cuda
def test_workspace_of_a_sampled_gradient() -> None:
    """Beyond arguments and gradients a chunk of logits, and in the backward pass some 40 bytes a point."""
    n, d, v, k, chunk = 4096, 512, 32000, 32, 512
    x, w, _ = _leaves("cuda", torch.bfloat16, n, d, v)
    t = _targets("cuda", n, v, False)

    def step() -> Any:
        loss = ops.linear_cross_entropy(x, w, t, grad_samples=k, chunk_size=chunk)
        return loss, *torch.autograd.grad(loss, (x, w))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answers = step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(a.nbytes for a in answers)
    # a sum of each 256 logits in double and single; x without its ignored rows; parts of classes many rows name
    bound = chunk * v * 2 + 40 * n * k + n * d * 2 + n * (k + 1) // 256 * d * 4
    assert extra <= bound + 8 * MIB, f"{extra / MIB:.0f} MiB where {bound / MIB:.0f} are due"


@on_cuda
def test_more_than_two_to_the_31() -> None:
    """N V and N K D past 2^31, all rows in one chunk: the last rows' gradients beside their own alone."""
    n, d, v, k = 33600, 1024, 65536, 64
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB")
    g = torch.Generator("cuda").manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device="cuda", generator=g).bfloat16()  # noqa: E731
    x, w = make(n, d).requires_grad_(), (make(v, d) / 16).requires_grad_()
    t = torch.randint(v, (n,), device="cuda", generator=g)
    loss = ops.linear_cross_entropy(x, w, t, grad_samples=k, chunk_size=n, reduction="none")
    dx, dw = torch.autograd.grad(loss[-64:].sum(), (x, w))
    assert (dx[:-64] == 0).all()
    exact = ops.linear_cross_entropy(x[-64:], w, t[-64:], reduction="sum")
    due, _ = torch.autograd.grad(exact, (x, w))
    assert float((dx[-64:] - due[-64:]).double().norm() / due[-64:].double().norm()) < 0.5
    named = (dw != 0).any(1)
    assert named[t[-64:]].all()
    assert 64 < int(named.sum()) <= 64 * (k + 1)
