"""Divergences between two linear heads in PyTorch compiled, exported, under selective checkpoints, and counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rich")  # the benchmark's tables

import torch_ops
from benchmarks.torch_heads import workspace_bytes
from softmax_ext.contract import KINDS
from tests.head.test_divergence_torch import CAPPED, HEAD, HEAD_KEEP
from torch_ops._head import ops

N, V, D, E = 256, 4096, 8, 4
LOGITS = N * V * 4
ATEN, OURS = torch.ops.aten, torch.ops.softmax_ext
WAYS: list[dict[str, Any]] = [
    {"chunk_size": 16},
    {"chunk_size": 16, "reduction": "none"},
    {"chunk_size": 256, "memory": "lean"},
]


def heads(n: int = N, v: int = V, kind: torch.dtype = torch.float32) -> list[Tensor]:
    """x and linear_weight, with gradients, and the teacher's."""
    g = torch.Generator().manual_seed(n)
    x, w, y, u = (torch.randn(s, generator=g).to(kind) for s in ((n, D), (v, D), (n, E), (v, E)))
    return [x.requires_grad_(), w.requires_grad_(), y, u]


def answers(call: Callable[..., Tensor], arrays: list[Tensor]) -> tuple[Tensor, ...]:
    value = call(*arrays)
    return value.detach(), *torch.autograd.grad(value.sum(), arrays[:2])


def compiled(call: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, **{"backend": "aot_eager", **options})


@pytest.mark.slow
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_compiled_holds_a_chunk_of_both_heads(options: dict[str, Any]) -> None:
    """As the same call uncompiled: its digits, and not an array of all logits of either head."""
    eager = functools.partial(torch_ops.linear_divergence, kind="jsd", **options)
    step, arrays = compiled(eager), heads()
    for mine, due in zip(answers(step, arrays), answers(eager, arrays), strict=True):
        torch.testing.assert_close(mine, due, rtol=1e-6, atol=1e-9)
    _, most = workspace_bytes(lambda: answers(step, arrays))
    _, before = workspace_bytes(lambda: answers(eager, arrays))
    assert most <= before + 8 * N * 8 + 2 * (N + V) * D * 4  # numbers of the rows; gradients as they leave the graph
    assert most < LOGITS / 2
    plain = compiled(lambda x, w, y, u: torch_ops.divergence(x @ w.T, y @ u.T, kind="jsd"))
    _, whole = workspace_bytes(lambda: answers(plain, arrays))
    assert whole > 2 * LOGITS  # the counter counts


@pytest.mark.slow
def test_a_compiled_saboteur_that_shows_its_loops_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "is_observed", lambda *arrays: False)
    for options in WAYS[:2]:
        with pytest.raises((AssertionError, RuntimeError)):
            test_compiled_holds_a_chunk_of_both_heads(options)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "backend"), [("fast", "inductor"), ("lean", "aot_eager")])
def test_one_graph_for_any_number_of_rows(memory: Any, backend: str) -> None:
    torch._dynamo.utils.counters.clear()

    def step(x: Tensor, w: Tensor, y: Tensor, u: Tensor, keep: Tensor, s: Tensor) -> Tensor:
        more: dict[str, Any] = {"softcap": 5.0, "teacher_scale": 0.5, "keep": keep, "logit_scale": s}
        return torch_ops.linear_divergence(x, w, y, u, memory=memory, chunk_size=8, kind="reverse_kl", **more)

    fast = compiled(step, dynamic=True, backend=backend)
    for n in (6, 9, 12, 31):
        arrays = heads(n, 40)
        keep, s = torch.arange(n) % 3 != 0, torch.linspace(0.5, 1.5, n)

        def at(f: Any, keep: Tensor = keep, s: Tensor = s, arrays: Any = arrays) -> tuple[Tensor, ...]:
            return answers(lambda *heads: f(*heads, keep, s), arrays)

        for mine, due in zip(at(fast), at(step), strict=True):
            torch.testing.assert_close(mine, due, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_a_student_next_to_its_teacher_loses_no_digits(kind: Any) -> None:
    x, w, *_ = (v.detach() for v in heads(32, 500))
    eye, s = torch.eye(500), x @ w.T
    t = s + 1e-6 * torch.randn(s.shape, generator=torch.Generator().manual_seed(1))
    due = torch_ops.divergence(s.double(), t.double(), kind=kind)
    for memory in ("fast", "lean"):
        step = compiled(functools.partial(torch_ops.linear_divergence, kind=kind, memory=memory, chunk_size=60))
        assert abs(step(s, eye, t, eye).item() / due.item() - 1) < 2e-5


@pytest.mark.slow
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiled_rows_whose_number_depends_on_data() -> None:
    x, w, y, u = (v.detach() for v in heads(8, 11))
    some = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)

    def of_heads(x: Tensor, y: Tensor) -> Tensor:
        return torch_ops.linear_divergence(x, w, y, u)

    def of_rows(x: Tensor, y: Tensor) -> Tensor:
        return torch_ops.divergence(x @ w.T, y @ u.T)

    for f in (of_heads, of_rows):

        def chosen(x: Tensor, y: Tensor, f: Any = f) -> Tensor:
            i = some.nonzero().squeeze(1)
            return f(x.index_select(0, i), y.index_select(0, i))

        torch.testing.assert_close(compiled(chosen)(x, y), f(x[some], y[some]))


@pytest.mark.slow
def test_exported_with_any_number_of_rows() -> None:
    """In plain ops, by the chunk, as far as a program knows how many rows there are."""

    class Both(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Any:
            more: dict[str, Any] = {"kind": "jsd", "logit_scale": 0.5, "teacher_softcap": 2.0}
            return [
                torch_ops.linear_divergence(x, w, y, u, memory=memory, shift=shift, chunk_size=2, **more)
                for memory in ("fast", "lean")
                for shift in (0, 1)
            ] + [torch_ops.divergence(x @ w.T, y @ u.T, **more)]

    n, arrays = torch.export.Dim("n", min=3, max=64), [v.detach() for v in heads(5, 40)]
    shapes = ({0: n}, None, {0: n}, None)
    for dynamic in (None, shapes):
        program = torch.export.export(Both(), tuple(arrays), dynamic_shapes=dynamic)
        assert "softmax_ext" not in str(program.graph), "exported programs run where the package is not installed"
        others = arrays if dynamic is None else [v.detach() for v in heads(13, 40)]
        torch.testing.assert_close(program.module()(*others), Both()(*others))


def test_exported_a_chunk_of_logits_at_a_time() -> None:
    class Head(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Tensor:
            return torch_ops.linear_divergence(x, w, y, u, chunk_size=64)

    arrays = tuple(v.detach() for v in heads(256, 64))
    program = torch.export.export(Head(), arrays)
    made = [n.meta["val"].numel() for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert max(made) <= 64 * 64
    torch.testing.assert_close(program.module()(*arrays), Head()(*arrays))


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lean", [False, True])
def test_raw_ops_pass_opcheck(lean: bool, low: torch.dtype | None) -> None:
    """The compiler is told what comes, of the type that comes whatever the number of rows."""
    arrays = {k: v.reshape(-1, v.shape[-1]) if "input" in k else v for k, v in HEAD.items()}
    x, w, b, y, u, c = (v.to(low or torch.float32) for v in arrays.values())
    for teacher in (torch.float64, low or torch.float32):
        y, u, c = (v.to(teacher) for v in (y, u, c))
        given = (x, w, b, y, u, c, HEAD_KEEP.reshape(-1))
        for chunk in (2, None):
            plan = ("jsd", 0.5, 1.2, 3.0, 0.9, None, lean, chunk)
            value, state = OURS.two_heads_fwd(*given, *plan)
            torch.library.opcheck(OURS.two_heads_fwd, (*given, *plan))
            for needs in ([True, True, True], [True, False, False], [False, True, False]):
                torch.library.opcheck(OURS.two_heads_bwd, (*given, state, value, needs, *plan))
                torch.library.opcheck(OURS.two_heads_fwd_bwd, (*given, value, needs, *plan))


KEPT = {
    "matmuls": [ATEN.mm.default, ATEN.mm.out, ATEN.addmm.default, ATEN.addmm.out, ATEN.addmm_.default],
    "rows": [getattr(OURS, f"divergence_{way}").default for way in ("fwd", "bwd", "bwd_", "fwd_bwd_", "sums")],
    "heads": [getattr(OURS, f"two_heads_{way}").default for way in ("fwd", "bwd", "fwd_bwd")],
    "copies": [ATEN.copy_.default, ATEN.mul.out, ATEN.masked_fill_.Scalar, ATEN.index_copy_.default],
}
CHECKPOINTED: list[dict[str, Any]] = [{}, {"memory": "lean"}, {"reduction": "none"}, {"chunk_size": 3}]


@pytest.mark.parametrize("options", CHECKPOINTED, ids=str)
@pytest.mark.parametrize("kept", KEPT)
def test_selective_checkpoints(kept: str, options: dict[str, Any]) -> None:
    """Who keeps ops of a region meets both heads as one op that writes over nothing."""
    arrays = heads(8, 11)

    def step(x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return torch_ops.linear_divergence(torch.tanh(x), w, y, u, kind="jsd", **options).sum()

    contexts = functools.partial(create_selective_checkpoint_contexts, KEPT[kept])

    def again(*arrays: Tensor) -> Any:
        return checkpoint(step, *arrays, use_reentrant=False, context_fn=contexts)

    for mine, due in zip(answers(again, arrays), answers(step, arrays), strict=True):
        torch.testing.assert_close(mine, due)


def test_a_saboteur_that_shows_its_loops_to_checkpoints_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "is_observed", lambda *arrays: False)
    caught = 0
    for kept in ("matmuls", "rows", "copies"):
        for options in CHECKPOINTED:
            try:
                test_selective_checkpoints(kept, options)
            except (AssertionError, RuntimeError):
                caught += 1
    assert caught >= 2


@pytest.mark.parametrize(
    ("options", "matmuls"),
    [
        ({}, 4),
        ({"chunk_size": 2}, 4),
        ({"reduction": "none"}, 6),
        ({"memory": "lean"}, 6),
        ({"memory": "lean", "kind": "jsd", "chunk_size": 3}, 8),
        ({"memory": "lean", "kind": "tv"}, 6),
    ],
    ids=str,
)
def test_counted_operations(options: dict[str, Any], matmuls: int) -> None:
    """FlopCounterMode sees every matmul of both heads; of a frozen weight none."""
    x, w, _, _ = heads(8, 11)
    y, u = 2.0 * x.detach(), w.detach()
    for weight, fewer in ((w, 0), (u, 1)):
        with FlopCounterMode(display=False) as counted:
            torch_ops.linear_divergence(x, weight, y, u, **options).sum().backward()
        assert counted.get_total_flops() == (matmuls - fewer) * 2 * 8 * D * 11


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_fake_tensors_outside_their_mode(memory: Any) -> None:
    with FakeTensorMode():
        x, w, y, u = (torch.randn(*s) for s in ((N, D), (V, D), (N, E), (V, E)))
    out = torch_ops.linear_divergence(x.requires_grad_(), w, y, u, memory=memory)
    (g,) = torch.autograd.grad(out, x)
    assert isinstance(g, FakeTensor)
    assert g.shape == x.shape


@pytest.mark.slow
def test_compiled_and_exported() -> None:
    arrays = {k: v.clone() for k, v in HEAD.items()}
    x, w = arrays["input"].requires_grad_(), arrays["linear_weight"].requires_grad_()

    class Both(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            given: dict[str, Any] = {**arrays, "input": x, "linear_weight": w, "kind": "jsd", **CAPPED}
            head = torch_ops.linear_divergence(**given)
            return head + torch_ops.divergence(x @ w.T, arrays["teacher_input"] @ arrays["teacher_weight"].T)

    eager, compiled = Both(), torch.compile(Both(), fullgraph=True)
    torch.testing.assert_close(compiled(x, w), eager(x, w))
    grads = [torch.autograd.grad(f(x, w), (x, w)) for f in (compiled, eager)]
    torch.testing.assert_close(*grads)
    exported = torch.export.export(eager, (x.detach(), w.detach()))
    assert not [n for n in exported.graph.nodes if "softmax_ext" in str(n.target)]
    torch.testing.assert_close(exported.module()(x, w), eager(x, w))
