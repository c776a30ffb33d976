"""torch_ops.linear_cross_entropy: exported, compiled, checkpointed, under autocast; drop-in for the built-in."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import torch_ops
from tests.head.torch_arrays import IN, MEMORY, D, V, func
from tests.rules.test_torch_transforms import CAP, TARGET, S, Z, _same
from torch_ops._head import linear


class _Model(torch.nn.Module):
    def __init__(self, memory: str) -> None:
        super().__init__()
        self.memory, self.weight = memory, torch.nn.Parameter(IN["lw"])

    def forward(self, x: Tensor, t: Tensor) -> Any:
        head: Any = torch_ops.linear_cross_entropy
        loss, stats = head(x, self.weight, t, memory=self.memory, softcap=CAP, stats=("lse", "argmax"))
        return loss, stats["lse"], stats["argmax"].double(), head(x, self.weight, t, shift=1, memory=self.memory)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.long
def test_export_with_dynamic_rows(memory: str, strict: bool) -> None:
    rows = torch.export.Dim("rows", min=4, max=64)
    x, t = torch.cat([IN["x"]] * 3), torch.cat([TARGET] * 3)
    model = _Model(memory)
    program = torch.export.export(model, (x[:5], t[:5]), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    assert "softmax_ext" not in str(program.graph), "exported programs run where the package is not installed"
    for a, b in zip(program.module()(x, t), model(x, t), strict=True):
        _same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "backend"), [("fast", "inductor"), ("lean", "aot_eager")])
def test_compiled_training_step_with_dynamic_shapes(memory: Any, backend: str) -> None:
    """One graph for any number of rows, whatever the number of chunks; the loops are one node of it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return torch_ops.linear_cross_entropy(x, w, t, label_smoothing=S, z_loss=Z, memory=memory, chunk_size=4)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in (6, 9, 12, 21):
        x = torch.cat([IN["x"]] * (rows // 3)).requires_grad_()
        w, t = IN["lw"].clone().requires_grad_(), torch.cat([TARGET] * (rows // 3))
        a, b = compiled(x, w, t), step(x, w, t)
        _same(a.detach(), b.detach())
        for p, q in zip(torch.autograd.grad(a, (x, w)), torch.autograd.grad(b, (x, w)), strict=True):
            _same(p, q)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("memory", MEMORY)
def test_compiled_function_gives_nan_where_eager_raises(memory: Any) -> None:
    torch._dynamo.reset()
    f = lambda x, w, t: torch_ops.linear_cross_entropy(x, w, t, reduction="none", memory=memory)  # noqa: E731
    x, w, t = IN["x"].clone().requires_grad_(), IN["lw"].clone().requires_grad_(), torch.tensor([0, 9, -100])
    x.data[2] = torch.nan  # ignored, and not dropped where shapes are static
    loss = torch.compile(f, fullgraph=True, backend="aot_eager")(x, w, t)
    dx, dw = torch.autograd.grad(loss.sum(), (x, w))
    assert loss.isnan().tolist() == dx.isnan().all(1).tolist() == [False, True, False]
    assert (dx[2] == 0).all()
    assert dw.isnan().all()
    good = torch.compile(f, fullgraph=True, backend="aot_eager")(x, w, torch.tensor([0, 1, -100]))
    assert torch.autograd.grad(good.sum(), w)[0].isfinite().all()
    batched = func.vmap(f, in_dims=(None, None, 0))(x, w, t.expand(2, 3))
    assert batched.isnan().tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("memory", MEMORY)
def test_raw_ops_pass_opcheck(memory: str) -> None:
    op, plan = torch.ops.softmax_ext, (1.0, None, False, True, True, memory == "lean", 2)
    x, lw, t = IN["x"].float(), IN["lw"].float(), torch.tensor([1, 0, 4])
    for low in (None, torch.ones(lw.shape[0], 2)):
        rows = x if low is None else torch.cat([x, x[:, :2]], 1)
        head, is_low = (rows, lw, None, low, t, None), low is not None
        torch.library.opcheck(op.head_fwd, (*head, *plan))
        nll, _, h, m, rest, _ = op.head_fwd(*head, *plan)
        needs = [True, True, False, is_low]
        torch.library.opcheck(op.head_bwd, (*head, m, rest, h, nll, None, None, h, [*needs, False, False], *plan))
        for kind in (torch.float32, torch.bfloat16):
            args = (v if v is None or v is t else v.to(kind) for v in head)
            more = (nll, None, None, None, needs, *plan[:3], False, False, False, None)
            torch.library.opcheck(op.head_fwd_bwd, (*args, *more))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
def test_checkpoint(memory: Any, reentrant: bool) -> None:
    x, w = IN["x"].clone().requires_grad_(), IN["lw"].clone().requires_grad_()
    f = lambda x: torch_ops.linear_cross_entropy(3.0 * x, w, TARGET, memory=memory)  # noqa: E731
    loss: Any = checkpoint(f, x, use_reentrant=reentrant)
    loss.backward()
    want = torch.autograd.grad(F.cross_entropy(F.linear(3.0 * x, w), TARGET), (x, w))
    for leaf, g in zip((x, w), want, strict=True):
        _same(leaf.grad, g)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_20_second_backward_with_retain_graph(memory: Any, reduction: str) -> None:
    x, w = IN["x"].clone().requires_grad_(), IN["lw"].clone().requires_grad_()
    loss = torch_ops.linear_cross_entropy(x, w, TARGET, memory=memory, reduction=reduction, chunk_size=2).sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for g in first:
        g.mul_(7.0)  # what was given out is the caller's
    second = torch.autograd.grad(2.0 * loss, (x, w), retain_graph=True)
    third = torch.autograd.grad(loss, (x, w), create_graph=True)
    for a, b, c in zip(first, second, third, strict=True):
        _same(a / 7.0, b / 2.0)
        _same(c.detach(), b / 2.0)


@pytest.fixture(params=["half matmuls", "float32 matmuls"])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of half precision, whichever this CPU takes: logits rounded to it, or formed in float32."""
    slow = request.param == "float32 matmuls"
    monkeypatch.setattr(linear, "_slow_halves", lambda _: slow)
    return slow


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_as_the_linear_layer(memory: Any, dtype: torch.dtype, wide: bool) -> None:
    x, w, b = (IN[k].detach().to(dtype, copy=True).requires_grad_() for k in ("x", "lw", "lb"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch_ops.linear_cross_entropy(x, w, TARGET, linear_bias=b, memory=memory)
        logits = F.linear(x, w, b)
    if wide and dtype != torch.float64:  # which autocast leaves alone
        logits = F.linear(*(a.bfloat16().float() for a in (x, w, b)))
    want = torch_ops.cross_entropy(logits, TARGET)
    torch.testing.assert_close(loss, want)
    for leaf, a, c in zip((x, w, b), *(torch.autograd.grad(v, (x, w, b)) for v in (loss, want)), strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, c, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_either_way(memory: Any, dtype: torch.dtype, wide: bool, monkeypatch: Any) -> None:
    """Against float64 on the rounded arguments, over several chunks, and several pieces of the weight."""
    monkeypatch.setattr(linear, "PIECE_OF_WEIGHT", 8 * 16)
    n, d, v = 40, 16, 90
    g = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(s, generator=g).to(dtype).requires_grad_() for s in ((n, d), (v, d), (v,)))
    t = torch.randint(v, (n,), generator=g)
    t[5] = -100
    up = torch.rand(n, generator=g)
    for reduction, chunk in product(("mean", "none"), (7, 90)):
        options: dict[str, Any] = {"reduction": reduction, "memory": memory, "chunk_size": chunk}
        loss = torch_ops.linear_cross_entropy(x, w, t, linear_bias=b, softcap=20.0, **options)
        found = torch.autograd.grad((loss * up).sum() if reduction == "none" else loss, (x, w, b))
        exact = [a.detach().double().requires_grad_() for a in (x, w, b)]
        z = 20.0 * torch.tanh(F.linear(*exact) / 20.0)
        truth = F.cross_entropy(z, t, reduction=reduction)
        wanted = torch.autograd.grad((truth * up).sum() if reduction == "none" else truth, exact)
        # A logit near 16 is rounded to 2^-5 in bfloat16, and p is then off by as much.
        u = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(loss.double(), truth, rtol=0, atol=1e-5 if wide else 32 * u)
        for a, c in zip(found, wanted, strict=True):
            assert a.dtype == dtype
            bound = (1.01 if wide else 16) * u * c.abs() + (1e-6 if wide else 4 * u * c.abs().max())
            assert ((a.double() - c).abs() <= bound).all(), (reduction, chunk)


def test_subclasses_see_our_function() -> None:
    seen = []

    class Spy(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    for at in (0, 1):
        args = [IN["x"], IN["lw"], TARGET]
        args[at] = args[at].as_subclass(Spy)
        out: Any = torch_ops.linear_cross_entropy(*args, shift=1, memory="lean")  # pyright: ignore
        assert isinstance(out, Spy)
        assert seen[0] is torch_ops.linear_cross_entropy
        seen.clear()
        _same(out.as_subclass(Tensor), torch_ops.linear_cross_entropy(IN["x"], IN["lw"], TARGET, shift=1))


@pytest.mark.parametrize("memory", MEMORY)
def test_meta_tensors(memory: Any) -> None:
    x = torch.empty(4, 7, device="meta", dtype=torch.bfloat16, requires_grad=True)
    w = torch.empty(11, 7, device="meta", dtype=torch.bfloat16, requires_grad=True)
    t = torch.zeros(4, dtype=torch.int64, device="meta")
    loss, stats = torch_ops.linear_cross_entropy(x, w, t, memory=memory, reduction="none", stats=("lse", "argmax"))
    assert (loss.shape, loss.dtype, stats["argmax"].dtype) == ((4,), torch.float32, torch.int64)
    torch_ops.linear_cross_entropy(x, w, t, memory=memory).backward()
    assert w.grad is not None
    assert (w.grad.shape, w.grad.dtype) == (w.shape, w.dtype)


@pytest.mark.parametrize("memory", MEMORY)
def test_deterministic_to_the_bit(memory: Any) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        g = torch.Generator().manual_seed(0)
        x, w = (torch.randn(*s, generator=g).requires_grad_() for s in ((64, 16), (333, 16)))
        t = torch.randint(333, (64,), generator=g).masked_fill(torch.arange(64) % 7 == 0, -100)
        runs = []
        for _ in range(2):
            loss = torch_ops.linear_cross_entropy(x, w, t, memory=memory, chunk_size=20, shift=1)
            runs.append((loss, *torch.autograd.grad(loss, (x, w))))
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


builtin = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch.nn has no linear_cross_entropy")


@builtin
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_drop_in_for_the_builtin(shape: tuple[int, ...], soft: bool, reduction: str) -> None:
    x, w, b = torch.randn(6, D), torch.randn(V, *shape, D), torch.randn(V, *shape)
    t = torch.rand(6, V, *shape) if soft else torch.randint(V, (6, *shape))
    options: dict[str, Any] = {
        "linear_bias": b,
        "weight": torch.rand(V),
        "reduction": reduction,
        "label_smoothing": 0.1,
    }
    options |= {} if soft else {"ignore_index": None}
    a, c = torch_ops.linear_cross_entropy(x, w, t, **options), F.linear_cross_entropy(x, w, t, **options)
    assert a.shape == c.shape
    torch.testing.assert_close(a, c)
    if not shape:
        for one in (t[0], t[0].reshape(1)) if not soft else (t[0],):
            d = torch_ops.linear_cross_entropy(x[0], w, one, linear_bias=b)
            e = F.linear_cross_entropy(x[0], w, one, linear_bias=b)
            assert d.shape == e.shape
            torch.testing.assert_close(d, e)


@builtin
@pytest.mark.parametrize("kwargs", [{}, {"bias": True, "label_smoothing": 0.1}, {"out_features": (2, 3), "bias": True}])
def test_module_is_drop_in(kwargs: dict[str, Any]) -> None:
    kwargs = {**kwargs, "weight": torch.rand(V), "dtype": torch.float64}
    kwargs["weight"] = kwargs["weight"].double()
    a, b = torch_ops.nn.LinearCrossEntropyLoss(D, V, **kwargs), torch.nn.LinearCrossEntropyLoss(D, V, **kwargs)
    assert a.state_dict().keys() == b.state_dict().keys()
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    x, t = torch.randn(4, D, dtype=torch.float64), torch.randint(V, (4, *kwargs.get("out_features", ())))
    for module in (a, copy.deepcopy(a)):
        _same(module(x, t), b(x, t))
    a(x, t).backward()
    b(x, t).backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        _same(p.grad, q.grad)
    assert not torch.equal(a(x, t), a(x, t, token_weight=torch.rand(t.shape, dtype=torch.float64)))


def test_module_says_its_options_and_checks_them() -> None:
    module = torch_ops.nn.LinearCrossEntropyLoss(D, V, memory="lean", shift=1, stats=("lse",))
    assert "in_features=2, num_classes=5, stats=('lse',), shift=1, memory='lean'" in repr(module)
    loss, stats = module(torch.randn(2, 4, D), torch.randint(V, (2, 4)))
    assert (loss.shape, stats["lse"].shape) == ((), (2, 3))
    with pytest.raises(ValueError, match=r"^LinearCrossEntropyLoss: memory must be one of 'fast', 'lean'; got 'x'\.$"):
        torch_ops.nn.LinearCrossEntropyLoss(D, V, memory="x")
    with pytest.raises(RuntimeError, match=r"^LinearCrossEntropyLoss: weight must have shape \(5,\); got \(4,\)\.$"):
        torch_ops.nn.LinearCrossEntropyLoss(D, V, weight=torch.ones(4))
