"""linear_cross_entropy in PyTorch: every transform, what stays in memory, how many matmuls, the built-in's calls."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torch_ops
from tests.rules.test_torch_transforms import CAP, SCALE, TARGET, THIRD, TRANSFORMS, S, Z, _composed, _same
from torch_ops._head import chunks, linear, rounding

N, D, V = 3, 2, 5
MEMORY = ("fast", "lean")
OPTIONS: dict[str, Any] = {"label_smoothing": S, "logit_scale": SCALE, "softcap": CAP, "z_loss": Z}
func = torch.func


def _inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    make = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    head = {"x": 4.0 * make(N, D) - 2.0, "lw": 2.0 * make(V, D) - 1.0, "lb": make(V)}
    return {**head, "y": make(N, V) + 0.1, "w": make(V) + 0.5, "tw": make(N) + 0.5}


IN = _inputs()


def ours(x: Tensor, lw: Tensor, memory: str, soft: bool, entropy: bool) -> Tensor:
    out: Any = torch_ops.linear_cross_entropy(
        x,
        lw,
        IN["y"] if soft else TARGET,
        linear_bias=IN["lb"],
        weight=IN["w"],
        token_weight=IN["tw"],
        memory=memory,  # pyright: ignore
        chunk_size=2,
        stats=("entropy",) if entropy else (),
        **OPTIONS,
    )
    return out[0] + 0.5 * out[1]["entropy"].sum() if entropy else out


def theirs(x: Tensor, lw: Tensor, memory: str, soft: bool, entropy: bool) -> Tensor:
    z = F.linear(x, lw, IN["lb"])
    return _composed(z, IN["y"] if soft else None, IN["w"], IN["tw"], S, True, 0.5 if entropy else 0.0)


@pytest.mark.parametrize("transform", [*TRANSFORMS, *THIRD])
@pytest.mark.parametrize(("memory", "soft", "entropy"), [("fast", False, False), ("fast", True, True), ("lean", 0, 1)])
@pytest.mark.parametrize("by", ["x", "lw"])
def test_transform_agrees_with_the_builtins(by: str, memory: str, soft: Any, entropy: Any, transform: str) -> None:
    if transform in THIRD and (by == "lw" or memory == "lean"):
        pytest.skip("third order: by the input, in one mode")
    at = (lambda v: (v, IN["lw"])) if by == "x" else (lambda v: (IN["x"], v))
    apply = {**TRANSFORMS, **THIRD}[transform]
    _same(
        apply(lambda v: ours(*at(v), memory, soft, entropy))(IN[by]),
        apply(lambda v: theirs(*at(v), memory, soft, entropy))(IN[by]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "transform"),
    [
        *(("fast", transform) for transform in ("value", "grad", "jvp", "jacrev", "hessian", "hvp", "vmap(grad)")),
        *(("lean", transform) for transform in ("grad", "vmap", "hvp")),
    ],
)
def test_transform_inside_a_compiled_function(memory: str, transform: str) -> None:
    torch._dynamo.reset()
    apply = TRANSFORMS[transform]
    compiled = torch.compile(
        apply(lambda v: ours(v, IN["lw"], memory, False, True)), fullgraph=True, backend="aot_eager"
    )
    _same(compiled(IN["x"]), apply(lambda v: theirs(v, IN["lw"], memory, False, True))(IN["x"]))


def _case(memory: str, soft: bool, reduction: str, stats: tuple[str, ...], full: bool) -> tuple[Any, list[str]]:
    names = ["x", "lw", "lb", *["y"] * soft, "w", "tw"] if full else ["x", "lw", *["y"] * soft]

    def fn(*arrays: Tensor) -> Any:
        a = dict(zip(names, arrays, strict=True))
        options = {**(OPTIONS if full else {}), "reduction": reduction, "stats": stats}
        given = {"linear_bias": a.get("lb"), "weight": a.get("w"), "token_weight": a.get("tw")}
        target = a.get("y", TARGET)
        out = torch_ops.linear_cross_entropy(a["x"], a["lw"], target, **given, **options, memory=memory, chunk_size=2)  # pyright: ignore
        return (out[0], *out[1].values()) if stats else out

    return fn, names


CHECKED = [
    ("fast", False, "mean", (), True),
    ("fast", False, "mean", (), False),
    ("lean", False, "sum", ("lse", "entropy"), True),
    ("lean", False, "none", ("logprob",), False),
    ("fast", True, "none", (), True),
    ("lean", True, "mean", (), False),
]


def _leaves(names: list[str]) -> tuple[Tensor, ...]:
    return tuple(IN[name].clone().requires_grad_() for name in names)


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_gradcheck(case: Any) -> None:
    fn, names = _case(*case)
    assert gradcheck(
        fn, _leaves(names), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("case", CHECKED, ids=str)
@pytest.mark.long
def test_gradgradcheck(case: Any) -> None:
    fn, names = _case(*case)
    # fast mode: along random directions, a tenth of the time
    assert gradgradcheck(
        fn, _leaves(names), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True, fast_mode=True
    )


def test_1d_input_passes_batched_forward_gradcheck() -> None:
    fn = lambda x, w: torch_ops.linear_cross_entropy(x, w, torch.tensor(3))  # noqa: E731
    args = (IN["x"][0].clone().requires_grad_(), IN["lw"].clone().requires_grad_())
    assert gradcheck(fn, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.long
def test_k_dimensional_and_shifted_gradgradcheck(shift: int) -> None:
    if shift:
        x, w, t = torch.rand(2, 3, 2, dtype=torch.float64), IN["lw"], torch.tensor([[0, 1, -100], [2, 3, 4]])
    else:
        x, w, t = IN["x"], torch.rand(V, 2, D, dtype=torch.float64), torch.tensor([[0, 1], [2, -100], [4, 4]])
    fn = lambda x, w: torch_ops.linear_cross_entropy(x, w, t, shift=shift, z_loss=0.1, chunk_size=2)  # noqa: E731
    args = (x.clone().requires_grad_(), w.clone().requires_grad_())
    assert gradcheck(fn, args, check_forward_ad=True)
    assert gradgradcheck(fn, args, check_fwd_over_rev=True)


def test_heads_that_differ_by_example_under_vmap() -> None:
    x, lw = torch.stack([IN["x"], -IN["x"]]), torch.stack([IN["lw"], IN["lw"].flip(0)])
    for memory, argnum in product(MEMORY, (0, 1)):
        f = func.grad(lambda x, w, memory=memory: ours(x, w, memory, False, True), argnums=argnum)
        _same(func.vmap(f)(x, lw), torch.stack([f(a, w) for a, w in zip(x, lw, strict=True)]))


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
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("memory", MEMORY)
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
    x, w, t = (a.float() for a in (IN["x"], IN["lw"])), None, torch.tensor([1, 0, 4])
    x, lw = x
    torch.library.opcheck(op.head_fwd, (x, lw, w, t, None, *plan))
    nll, _, h, m, rest, _ = op.head_fwd(x, lw, w, t, None, *plan)
    ups = (nll, None, None, h)
    torch.library.opcheck(op.head_bwd, (x, lw, w, t, None, m, rest, h, *ups, [True, True, False, False, False], *plan))
    for kind in (torch.float32, torch.bfloat16):
        args = (x.to(kind), lw.to(kind), None, t, None, nll, None, None, None, [True, True, False])
        torch.library.opcheck(op.head_fwd_bwd, (*args, *plan[:3], False, False, False, None))


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


class Live(TorchDispatchMode):
    """Bytes of the storages that ops have made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if _is(a)}
        for t in tree_leaves(out):
            if _is(t):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


ROWS, WIDTH, CLASSES = 256, 16, 4096
LOGITS = ROWS * CLASSES * 4


def _peak(memory: Any, step: Callable[[Callable[..., Tensor], Tensor, Tensor], Any], chunk: int, **options: Any) -> int:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g).requires_grad_() for s in ((ROWS, WIDTH), (CLASSES, WIDTH)))
    t = torch.randint(CLASSES, (ROWS,), generator=g)
    with Live() as live:
        step(lambda x, w: torch_ops.linear_cross_entropy(x, w, t, memory=memory, chunk_size=chunk, **options), x, w)
    return live.peak


def _first(f: Any, x: Tensor, w: Tensor) -> Any:
    return torch.autograd.grad(f(x, w), (x, w))


def _second(f: Any, x: Tensor, w: Tensor) -> Any:
    grads = torch.autograd.grad(f(x, w), (x, w), create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), (x, w))


def _forward_mode(f: Any, x: Tensor, w: Tensor) -> Any:
    return func.jvp(f, (x.detach(), w.detach()), (torch.ones_like(x), torch.ones_like(w)))


def _hvp(f: Any, x: Tensor, w: Tensor) -> Any:
    return func.jvp(func.grad(f), (x.detach(), w.detach()), (torch.ones_like(x), torch.ones_like(w)))


def test_the_counter_sees_the_builtins_logits() -> None:
    """The peak without fusion, counted the same way: above the logits, or the counter counts nothing."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g).requires_grad_() for s in ((ROWS, WIDTH), (CLASSES, WIDTH)))
    with Live() as live:
        _first(lambda x, w: F.cross_entropy(x @ w.T, torch.zeros(ROWS, dtype=torch.int64)), x, w)
    assert live.peak >= 2 * LOGITS


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1, "softcap": 5.0}], ids=str)
def test_first_derivatives_keep_one_chunk_of_logits(memory: Any, options: Any) -> None:
    chunk = 32 if memory == "fast" else CLASSES // 8
    # The chunk; dW as it is summed and as it is given (both modes: the graph's and the caller's), dX, row numbers.
    grads = CLASSES * WIDTH * 4
    assert _peak(memory, _first, chunk, **options) <= LOGITS // 8 + 2 * grads + 64 * ROWS * 8 + ROWS * WIDTH * 8
    assert LOGITS // 8 + 2 * grads + 64 * ROWS * 8 + ROWS * WIDTH * 8 < LOGITS / 2


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("step", [_second, _forward_mode, _hvp])
@pytest.mark.long
def test_no_derivative_stores_the_logits(memory: Any, step: Any) -> None:
    """Second derivatives hold some arrays of the chunk's size and several of dW's: less than the logits once."""
    chunk = 2 if memory == "fast" else CLASSES * 2 // ROWS
    assert _peak(memory, step, chunk) < LOGITS


@pytest.mark.parametrize("memory", MEMORY)
def test_none_of_the_modes_keeps_logits_for_the_backward(memory: Any) -> None:
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    x, w = torch.randn(ROWS, WIDTH).requires_grad_(), torch.randn(CLASSES, WIDTH).requires_grad_()
    t = torch.randint(CLASSES, (ROWS,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = torch_ops.linear_cross_entropy(x, w, t, memory=memory)
    gradients = x.nbytes + w.nbytes if memory == "fast" else 0
    assert sum(kept.values()) <= x.nbytes + w.nbytes + gradients + 16 * ROWS * 8
    del loss


def _matmuls(run: Callable[[], Any]) -> float:
    added = {torch.ops.aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1]}  # the counter lacks it
    with FlopCounterMode(display=False, custom_mapping=added) as flops:
        run()
    return flops.get_total_flops() / (2 * ROWS * WIDTH * CLASSES)


def test_matmuls_are_three_or_four_and_frozen_arguments_cost_none() -> None:
    x, w, t = torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH), torch.randint(CLASSES, (ROWS,))

    def count(leaves: str, **options: Any) -> float:
        a, b = (v.clone().requires_grad_(name in leaves) for name, v in (("x", x), ("w", w)))

        def run() -> None:
            loss: Any = torch_ops.linear_cross_entropy(a, b, t, **options)
            if loss.requires_grad:
                loss.sum().backward()

        return _matmuls(run)

    assert count("") == 1
    assert count("xw") == 3
    assert count("x") == count("w") == 2
    assert count("xw", reduction="sum", chunk_size=7) == pytest.approx(3)
    assert count("xw", reduction="none") == 4
    assert count("xw", memory="lean") == 4
    assert count("x", memory="lean") == 3


def test_ignored_rows_are_dropped_before_the_matmul() -> None:
    x, w = torch.randn(ROWS, WIDTH).requires_grad_(), torch.randn(CLASSES, WIDTH).requires_grad_()
    t = torch.randint(CLASSES, (ROWS,)).masked_fill(torch.arange(ROWS) % 4 != 0, -100)
    for memory, whole in (("fast", 3), ("lean", 4)):
        done = _matmuls(lambda m=memory: torch_ops.linear_cross_entropy(x, w, t, memory=m).backward())  # pyright: ignore
        assert done == pytest.approx(whole / 4)


def test_shift_reads_no_copy_of_the_input() -> None:
    """Nothing of the input's size is made but its gradient."""
    x, w = torch.randn(2, 256, 512).requires_grad_(), torch.randn(8, 512).requires_grad_()
    t = torch.randint(8, (2, 256))
    with Live() as live:
        loss = torch_ops.linear_cross_entropy(x, w, t, shift=1, chunk_size=16)
    assert live.peak < 1.25 * x.nbytes
    loss.backward()
    want = torch.autograd.grad(F.cross_entropy(F.linear(x[:, :-1], w).flatten(0, 1), t[:, 1:].flatten()), (x, w))
    for leaf, g in zip((x, w), want, strict=True):
        torch.testing.assert_close(leaf.grad, g)


def test_09_10_upstreams_of_any_stride_and_inputs_left_alone() -> None:
    x, w = IN["x"].clone().requires_grad_(), IN["lw"].clone().requires_grad_()
    t, dense = torch.tensor([0, 4, 2]), torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]], dtype=torch.float64)
    for memory in MEMORY:
        before = [v.detach().clone() for v in (x, w)]
        loss = torch_ops.linear_cross_entropy(x, w, t, reduction="none", memory=memory, chunk_size=2)
        for up in (dense[:, 0], dense[0, :1].expand(3), dense[:, 1]):
            a = torch.autograd.grad(loss, (x, w), up, retain_graph=True)
            b = torch.autograd.grad(loss, (x, w), up.clone(memory_format=torch.contiguous_format), retain_graph=True)
            for p, q in zip(a, b, strict=True):
                _same(p, q)
        assert all(torch.equal(v.detach(), b) for v, b in zip((x, w), before, strict=True))


@pytest.mark.parametrize("memory", MEMORY)
def test_results_do_not_depend_on_the_chunk(memory: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((37, 8), (53, 8), (53,)))
    t = torch.randint(53, (37,), generator=g)
    answers = []
    for chunk in (1, 7, 36, 1000, None):
        loss = torch_ops.linear_cross_entropy(
            x, w, t, linear_bias=b, label_smoothing=0.1, z_loss=0.1, memory=memory, chunk_size=chunk
        )
        answers.append((loss, *torch.autograd.grad(loss, (x, w, b))))
    for other in answers[1:]:
        for p, q in zip(answers[0], other, strict=True):
            _same(p, q, 1e-12)


def test_chunk_that_fits_the_workspace() -> None:
    for classes, itemsize in ((49152, 4), (256000, 2), (10, 4), (1 << 30, 4)):
        rows = chunks.that_fit(None, classes, itemsize)
        assert rows == 1 or rows * classes * itemsize <= chunks.WORKSPACE < (rows + 1) * classes * itemsize
    for n, size in product((0, 1, 5, 17, 100), (1, 3, 17, 1000)):
        pieces = chunks.spans(n, size)
        assert [i for i, _ in pieces[1:]] == [j for _, j in pieces[:-1]]
        assert (pieces[0][0], pieces[-1][1]) == (0, n)
        sizes = {j - i for i, j in pieces}
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1


def test_scaling_by_pieces_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PIECE", 24)
    x, factor = torch.randn(37, 8), torch.tensor(1 / 3)
    for kind in (torch.bfloat16, torch.float16):
        assert torch.equal(rounding.scaled(x, factor, kind), (x * factor).to(kind))
        y = x.to(kind)
        assert torch.equal(rounding.scaled(y, factor, kind), (y.float() * factor).to(kind))


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
