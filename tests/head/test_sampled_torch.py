"""grad_samples in PyTorch: exact loss; a gradient without bias and of bounded variance, by its points' distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torch_ops
from torch_ops._head import sampled
from torch_ops._rows import native, picked
from torch_ops._rows import points as rows

F64 = torch.float64
OPS: Any = torch_ops


@pytest.fixture(params=["native", "plain"], autouse=True)
def served(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda *_: False)
        monkeypatch.setattr(picked, "_serving", lambda *_: None)
    return request.param


def head(n: int = 3, D: int = 4, V: int = 7, dtype: Any = F64) -> Any:
    g = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(s, generator=g, dtype=F64).to(dtype).requires_grad_() for s in ((n, D), (V, D), (V,)))
    return x, w, b, torch.randint(V, (n,), generator=g)


def gradients(
    target: Any, leaves: Any, u: Any = None, monkeypatch: Any = None, stats_up: Any = None, **options: Any
) -> Any:
    """The gradients of a loss, the points' u given or drawn."""
    x, w, b = leaves
    if u is not None:
        monkeypatch.setattr(sampled.torch, "rand", lambda *_, **__: u)
    try:
        out = OPS.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    finally:
        if u is not None:
            monkeypatch.undo()
    loss, stats = out if isinstance(out, tuple) else (out, {})
    up = torch.tensor([0.6, -1.0, 0.3], dtype=F64)[: len(x)] if loss.dim() else 1.0  # each row its own
    total = (up * loss).sum() + sum((stats[n] * c).sum() for n, c in (stats_up or {}).items())
    return torch.autograd.grad(total, [x, w, b])


def expected(target: Any, leaves: Any, K: int, n: int, patch: Any, steps: int = 4001, **options: Any) -> Any:
    """The mean of the gradient over every u, one for all points: a gradient is a sum of functions of one u each."""
    total: Any = None
    grid = (torch.arange(steps) + 0.5) / steps
    for u in grid.tolist():
        found = gradients(target, leaves, torch.full((n, K), u), patch, grad_samples=K, **options)
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    return [a / steps for a in total]


CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none", "z_loss": 0.1, "logit_scale": 0.7},
    "cap": {"softcap": 3.0, "reduction": "sum", "stats": ("entropy", "lse")},
    "smooth": {"label_smoothing": 0.2, "stats": ("entropy",)},
    "weighted": {"weight": torch.linspace(0.2, 1.0, 7), "token_weight": torch.tensor([1.0, 0.2, 0.5]),
                 "label_smoothing": 0.1, "reduction": "sum"},
}  # fmt: skip


def judge_unbiased(case: str, target: Any, leaves: Any, patch: Any, K: int = 2, steps: int = 401) -> None:
    options = dict(CASES[case])
    ups = {n: torch.tensor([0.5, -1.0, 2.0], dtype=F64) for n in options.get("stats", ())}
    exact = gradients(target, leaves, stats_up=ups, **options)
    mean = expected(target, leaves, K, 3, patch, steps, stats_up=ups, **options)
    for a, b in zip(mean, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4.0 / steps)  # an edge lies within a step


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pair", [False, True])
def test_unbiased(case, pair, monkeypatch):
    *leaves, target = head()
    if pair:
        target = (
            torch.tensor([[1, 4, 1], [0, 0, -100], [6, 2, 3]]),
            torch.tensor([[0.3, 0.5, 0.4], [1.0, 0.2, 9.0], [0.1, 0.2, 0.3]]),
        )
    judge_unbiased(case, target, leaves, monkeypatch)


POINTS = rows.points


def wrong(by: Any) -> Any:
    """points with its results changed."""
    return lambda *args, **options: by(*POINTS(*args, **options))


def without_last(ids: Any, q: Any) -> Any:
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, :1], -1)], 1), q


SABOTEURS: dict[str, Any] = {
    "target not left out": lambda z, m, rest, t, u, **kw: POINTS(z, m, rest, torch.full_like(t, -3), u, **kw),
    "weight 1/(K+1)": wrong(lambda ids, q: (ids, q * 2 / 3)),
    "last stratum dropped": wrong(without_last),
    "classes out of order": lambda z, *args, **kw: POINTS(z.roll(1, 1), *args, **kw),
    "points of a neighbouring row": wrong(lambda ids, q: (ids.roll(1, 0), q)),
}


@pytest.mark.parametrize("name", SABOTEURS)
def test_wrong_points_are_seen(name, monkeypatch):
    *leaves, target = head()
    with monkeypatch.context() as patch:
        patch.setattr(sampled, "points", SABOTEURS[name])
        inner = pytest.MonkeyPatch()
        with pytest.raises(AssertionError):
            judge_unbiased("none", target, leaves, inner)


def spread(K: int, draw: Any, rounds: int = 4000) -> Any:
    """(the variance of the logits' gradient in random directions, its bound) for one row."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 40, generator=g, dtype=F64).expand(rounds, 40).contiguous()
    t = torch.full((rounds, 1), 5)
    m, rest = z.max(1)[0], (z - z.max(1)[0][:, None]).exp().sum(1) - 1
    ids, q = POINTS(z, m, rest, t, draw(rounds, K, g), scale=1.0, softcap=None)
    p = torch.softmax(z[0], 0)
    # a direction that turns with the class is what coupled points see worst
    f = torch.stack([*torch.randn(5, 40, generator=g, dtype=F64), torch.cos(torch.cumsum(p, 0) * 2 * torch.pi * K)])
    values = q[:, None] * f[:, ids.long()].mean(-1).T
    bound = ((f.square() * p).sum(1) - (f * p).sum(1).square()) / K
    return values.var(0), bound


def test_variance_is_bounded_in_every_direction():
    stratified = lambda n, K, g: torch.rand(n, K, generator=g)  # noqa: E731
    for K in (1, 4, 16):
        found, bound = spread(K, stratified)
        assert (found <= 1.1 * bound).all(), (found / bound).tolist()


def test_one_u_a_row_breaks_the_bound():
    found, bound = spread(16, lambda n, K, g: torch.rand(n, 1, generator=g).expand(n, K).contiguous())
    assert (found > 1.1 * bound).any()


def test_u_is_drawn_for_every_row_and_point(monkeypatch):
    shapes = []
    draw = torch.rand
    monkeypatch.setattr(sampled.torch, "rand", lambda *shape, **kw: shapes.append(shape) or draw(*shape, **kw))
    x, w, b, t = head()
    OPS.linear_cross_entropy(x, w, t, linear_bias=b, grad_samples=5)
    assert shapes == [(3, 5)]


def test_loss_and_statistics_are_exact():
    x, w, b, t = head(n=9)
    t[4] = -100
    names = ("lse", "logprob", "entropy", "argmax")
    for options in ({}, {"z_loss": 0.1, "logit_scale": 0.7, "label_smoothing": 0.1}, {"softcap": 3.0}):
        a, b_ = (OPS.linear_cross_entropy(x, w, t, linear_bias=b, reduction="none", stats=names, **options, **more)
                 for more in ({}, {"grad_samples": 4}))  # fmt: skip
        assert torch.equal(a[0], b_[0])
        assert all(torch.equal(a[1][n], b_[1][n]) for n in names)


def test_a_confident_row_keeps_its_gradient():
    x, w = torch.ones(1, 1, requires_grad=True), torch.zeros(1000, 1)
    w[7] = 60.0
    w.requires_grad_()
    _, dw = torch.autograd.grad(OPS.linear_cross_entropy(x, w, torch.tensor([7]), grad_samples=8), [x, w])
    q = 999 * torch.exp(torch.tensor(-60.0, dtype=F64))
    torch.testing.assert_close(dw[7].double(), -q.reshape(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(dw.double().sum(), torch.zeros((), dtype=F64), rtol=0, atol=1e-5 * q.item())
    assert (dw != 0).sum() == 9


def test_the_same_bits_for_any_chunk_thread_and_generator_state():
    x, w, b, t = head(40, 16, 300, torch.float32)

    def grads(**options: Any) -> Any:
        g = torch.Generator().manual_seed(5)
        loss = OPS.linear_cross_entropy(x, w, t, linear_bias=b, grad_samples=8, generator=g, **options)
        return torch.autograd.grad(loss, [x, w, b])

    first, threads = grads(chunk_size=40), torch.get_num_threads()
    assert all(torch.equal(a, b_) for a, b_ in zip(first, grads(chunk_size=40), strict=True))
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b_) for a, b_ in zip(first, grads(chunk_size=40), strict=True))
    finally:
        torch.set_num_threads(threads)
    torch.manual_seed(1)
    one = torch.autograd.grad(OPS.linear_cross_entropy(x, w, t, grad_samples=8), [x, w])
    two = torch.autograd.grad(OPS.linear_cross_entropy(x, w, t, grad_samples=8), [x, w])
    assert not torch.equal(one[1], two[1])


def test_checkpoint_replays_the_points():
    x, w, _, t = head(6)
    seen = []
    for use_reentrant in (False, True):
        torch.manual_seed(2)
        call = lambda x, w: OPS.linear_cross_entropy(x, w, t, grad_samples=3)  # noqa: E731
        loss = checkpoint(call, x, w, use_reentrant=use_reentrant)
        x.grad = w.grad = None
        loss.backward()
        torch.rand(3)
        seen.append(w.grad.clone())  # pyright: ignore
    torch.manual_seed(2)
    seen.append(torch.autograd.grad(OPS.linear_cross_entropy(x, w, t, grad_samples=3), w)[0])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[2])


def test_ignored_rows_and_weights():
    x, w, b, t = head(5)
    t[1] = -100
    with torch.no_grad():
        x[1] = torch.nan
    tw, cw = torch.rand(5, dtype=F64, requires_grad=True), torch.rand(7, dtype=F64, requires_grad=True)
    exact, ours = (torch.autograd.grad(
        OPS.linear_cross_entropy(x, w, t, linear_bias=b, weight=cw, token_weight=tw, **more), [x, w, b, tw, cw])
        for more in ({}, {"grad_samples": 3}))  # fmt: skip
    assert (ours[0][1] == 0).all()
    assert all(g.isfinite().all() for g in ours)
    for a, c in zip(ours[3:], exact[3:], strict=True):
        torch.testing.assert_close(a, c)
    torch.testing.assert_close(ours[2].sum(), exact[2].sum(), rtol=0, atol=1e-12)  # a row's gradient sums to 0


def test_half_precision_and_module():
    x, w, _, t = head(8, 16, 50, torch.bfloat16)
    dx, dw = torch.autograd.grad(OPS.linear_cross_entropy(x, w, t, grad_samples=4), [x, w])
    assert dx.dtype == dw.dtype == torch.bfloat16
    module = OPS.nn.LinearCrossEntropyLoss(16, 50, grad_samples=4)
    module(torch.randn(8, 16), t).backward()
    assert (module.linear.weight.grad != 0).any(1).sum() <= 8 * 5
    assert "grad_samples=4" in repr(module)


@pytest.mark.slow
def test_compiled():
    x, w, _, t = head(6, 8, 20, torch.float32)
    f = lambda x, w: OPS.linear_cross_entropy(x, w, t, grad_samples=4)  # noqa: E731
    loss = torch.compile(f, fullgraph=True, backend="aot_eager")(x, w)
    torch.testing.assert_close(loss, f(x, w))
    loss.backward()
    assert 0 < (w.grad != 0).any(1).sum() <= 20  # pyright: ignore


def test_any_chunk_has_the_same_points():
    x, w, b, t = head(40, 16, 300, torch.float32)
    found = []
    for chunk in (None, 7, 1):
        g = torch.Generator().manual_seed(5)
        loss = OPS.linear_cross_entropy(x, w, t, linear_bias=b, grad_samples=8, generator=g, chunk_size=chunk)
        found.append(torch.autograd.grad(loss, w)[0])
    for dw in found[1:]:  # but for the roundings of a matmul of other rows
        assert torch.equal(dw != 0, found[0] != 0)
        torch.testing.assert_close(dw, found[0])


def test_transforms():
    x, w, _, t = (a.detach() for a in head())
    f = lambda x, w: OPS.linear_cross_entropy(x, w, t, grad_samples=4)  # noqa: E731
    exact = lambda x, w: OPS.linear_cross_entropy(x, w, t)  # noqa: E731
    up = torch.randn_like(x)
    torch.testing.assert_close(
        torch.func.jvp(lambda x: f(x, w), (x,), (up,)), torch.func.jvp(lambda x: exact(x, w), (x,), (up,))
    )
    xs = torch.stack([x, x, 2 * x])
    g = torch.func.vmap(torch.func.grad(f, (0, 1)), (0, None), randomness="different")(xs, w)
    assert not torch.equal(g[1][0], g[1][1])
    assert all((v.isfinite()).all() for v in g)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(f(leaf, w), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^linear_cross_entropy: grad_samples must "):
        torch.autograd.grad(dx.sum(), leaf)


def test_one_matmul_and_its_memory():
    N, D, V, K = 64, 32, 5000, 4
    x, w, _, t = head(N, D, V, torch.float32)
    with torch.profiler.profile() as seen:
        OPS.linear_cross_entropy(x, w, t, grad_samples=K).backward()
    names = [e.name for e in seen.events() or []]
    matmuls = [n for n in names if n in ("aten::mm", "aten::addmm")]
    assert len(matmuls) == 1
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        OPS.linear_cross_entropy(x, w, t, grad_samples=K)
    own = {a.data_ptr(): a.nbytes for a in kept if a.data_ptr() not in (x.data_ptr(), w.data_ptr())}
    assert sum(own.values()) <= 4 * N * K + 40 * N


MISTAKES: dict[str, dict[str, Any]] = {
    "grad_samples must be a Python integer >= 1 or None; got 0.": {"grad_samples": 0},
    "grad_samples must be a Python integer >= 1 or None; got 1.5.": {"grad_samples": 1.5},
    "grad_samples must be None with memory='lean'; got 4.": {"grad_samples": 4, "memory": "lean"},
    "generator must be a torch.Generator or None; got int object.": {"grad_samples": 4, "generator": 3},
    "grad_samples must be None with label_smoothing and softcap together; got a number.": {
        "grad_samples": 4, "softcap": 2.0, "label_smoothing": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes(sentence):
    x, w, _, t = head()
    with pytest.raises((TypeError, ValueError)) as error:
        OPS.linear_cross_entropy(x, w, t, **MISTAKES[sentence])
    assert str(error.value) == "linear_cross_entropy: " + sentence
    with pytest.raises(ValueError, match="grad_samples must be None with class probabilities as targets; got 4"):
        OPS.linear_cross_entropy(x, w, torch.rand(3, 7), grad_samples=4)
