"""grad_samples in PyTorch compiled, exported, under autocast and checkpoints; what lives at a time; the options."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import torch_ops
from tests.storages import Alive
from torch_ops import _modes as modes

OPS: Any = torch_ops
LOSS = OPS.linear_cross_entropy


def head(n: int = 6, D: int = 8, V: int = 40, dtype: Any = torch.float32) -> Any:
    g = torch.Generator().manual_seed(n)
    x, w = (torch.randn(s, generator=g).to(dtype).requires_grad_() for s in ((n, D), (V, D)))
    return x, w, torch.randint(V, (n,), generator=g)


def seeded(call: Any, *leaves: Any) -> Any:
    """(value, gradients) from the default generator's first state."""
    torch.manual_seed(0)
    value = call()
    return value, *torch.autograd.grad(value.sum(), leaves)


def same(ours: Any, truth: Any, **bounds: Any) -> None:
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, **bounds)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_gradient_is_the_eager_one(dynamic):
    def loss(x: Any, w: Any, t: Any, **more: Any) -> Any:
        return LOSS(x, w, t, z_loss=0.1, reduction="none", **more)

    compiled = torch.compile(partial(loss, grad_samples=4), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 9, 17) if dynamic else (6,):
        x, w, t = head(n)
        found, eager, exact = (
            seeded(partial(f, x, w, t), x, w) for f in (compiled, partial(loss, grad_samples=4), loss)
        )
        same(found, eager)
        assert not torch.allclose(found[2], exact[2])


@pytest.mark.slow
def test_export():
    class Head(torch.nn.Module):
        def forward(self, x: Any, w: Any, t: Any) -> Any:
            return LOSS(x, w, t, grad_samples=4, stats=("lse",))

    x, w, t = (a.detach() for a in head())
    n = torch.export.Dim("n", min=2, max=64)
    for shapes in (None, ({0: n}, None, {0: n})):
        program = torch.export.export(Head(), (x, w, t), dynamic_shapes=shapes)
        loss, stats = program.module()(x, w, t)
        same((loss, stats["lse"]), (LOSS(x, w, t), torch.logsumexp(x @ w.T, 1)))


def test_autocast():
    x, w, t = head(32, 16, 100)
    with torch.autocast("cpu", torch.bfloat16):
        value, dx, dw = seeded(lambda: LOSS(x, w, t, grad_samples=8), x, w)
        exact = LOSS(x, w, t)
    assert value.dtype == dx.dtype == dw.dtype == torch.float32
    assert torch.equal(value, exact)
    low = [a.detach().bfloat16().requires_grad_() for a in (x, w)]
    same((dx, dw), [g.float() for g in seeded(lambda: LOSS(*low, t, grad_samples=8), *low)[1:]])
    assert dw.count_nonzero() > 0


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("default", [False, True])
def test_a_checkpoint_has_the_points_of_its_generator(early, default):
    x, w, t = head(30, 8, 60)
    g = torch.default_generator if default else torch.Generator()

    def twice(x: Any, w: Any) -> Any:
        part = partial(LOSS, grad_samples=3, generator=g)
        return part(x, w, t) + torch.rand(1) * part(2 * x, w, t)

    def run(call: Any) -> Any:
        g.manual_seed(4)
        if not default:
            torch.manual_seed(5)
        losses = [call(x, w) for _ in range(2)]
        state = g.get_state()
        (losses[0] - 0.3 * losses[1]).backward(retain_graph=True)
        first = w.grad.clone()  # pyright: ignore
        (losses[1] + losses[0]).backward()
        found = first, w.grad, x.grad
        x.grad = w.grad = None
        assert torch.equal(g.get_state(), state), "a recomputation uses up no numbers"
        return *losses, *found

    with set_checkpoint_early_stop(early):
        kept, again = run(twice), run(lambda x, w: checkpoint(twice, x, w, use_reentrant=False))
    for a, b in zip(again, kept, strict=True):
        assert torch.equal(a, b)


def test_points_that_are_drawn_anew_are_seen(monkeypatch):
    monkeypatch.setattr(modes, "packing_hook", lambda: None)
    with pytest.raises(AssertionError):
        test_a_checkpoint_has_the_points_of_its_generator(True, False)


@pytest.mark.parametrize("pack", ["no function", "a frame of its own"])
def test_hooks_of_others_are_no_checkpoint(pack):
    x, w, t = head(30, 8, 60)
    frame = [0]

    def counted(saved: Any) -> Any:
        frame[0] += 1
        return saved

    def run() -> Any:
        g = torch.Generator().manual_seed(4)
        return torch.autograd.grad(LOSS(x, w, t, grad_samples=3, generator=g), (x, w))

    hook = partial(torch.clone) if pack == "no function" else counted
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda saved: saved):
        found = run()
    for a, b in zip(found, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"softcap": 20.0}, {"reduction": "none", "z_loss": 0.1}], ids=str)
def test_what_lives_at_a_time(more, dtype):
    """A chunk of logits, the points' ids and numbers of rows; in the backward beside the gradients less still."""
    N, D, V, K, chunk = 1024, 64, 4096, 16, 64
    x, w, t = head(N, D, V, dtype)
    logits, ids, rows = chunk * V, 4 * N * K, 4 * N
    with Alive(x, w, t) as forward:
        loss = LOSS(x, w, t, grad_samples=K, chunk_size=chunk, **more).sum()
        kept = forward.now
    most = 4 * logits + 3 * ids + 24 * rows
    assert dtype.itemsize * logits <= forward.peak <= most, "u, and two of ids while their chunks are joined"
    assert kept <= ids + 16 * rows
    grads = x.nbytes + w.nbytes
    with Alive(x, w, t, loss) as backward:
        torch.autograd.grad(loss, (x, w))
    each = 3 if "softcap" in more else 1  # its slopes are of every point
    assert backward.peak <= grads + 2 * each * ids + 24 * rows
    assert 3 * (2 * ids + 24 * rows) < V * D * 4, "a weight in float32 beside its gradient would be seen"


def test_options_of_the_door():
    """shift, positions, K-d weights, class weights with smoothing: each sums to what its rows do."""
    x, w, t = head(12, 8, 40)
    token = torch.rand(2, 6)
    grid, labels = x.view(2, 6, 8), t.view(2, 6)
    shifted = seeded(lambda: LOSS(grid, w, labels, shift=1, token_weight=token, reduction="sum", grad_samples=5), x, w)
    rows = grid[:, :-1].reshape(-1, 8), labels[:, 1:].reshape(-1), token[:, 1:].reshape(-1)
    by_rows = seeded(lambda: LOSS(rows[0], w, rows[1], token_weight=rows[2], reduction="sum", grad_samples=5), x, w)
    same(shifted, by_rows)
    two = torch.stack([w, 2 * w], 1)
    twice = torch.stack([t, t.flip(0)], 1)
    value, dx, dw = seeded(lambda: LOSS(x, two, twice, reduction="sum", grad_samples=5), x, two)
    torch.testing.assert_close(value, LOSS(x, two, twice, reduction="sum"))
    assert ((dw != 0).any(-1).sum(0) <= 12 * 6).all()
    assert (dw != 0).any(-1).any(0).all()
    # a row's gradient sums to 0 at every position
    torch.testing.assert_close(dw.sum(0), torch.zeros(2, 8), atol=1e-5, rtol=0)
    weights = torch.rand(40)
    value, dx, dw = seeded(
        lambda: LOSS(x, w, t, weight=weights, label_smoothing=0.2, reduction="sum", grad_samples=512), x, w
    )
    exact = LOSS(x, w, t, weight=weights, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(value, exact)
    same((dx, dw), torch.autograd.grad(exact, (x, w)), rtol=0, atol=0.15)
    torch.testing.assert_close(dw.sum(0), torch.zeros(8), atol=1e-4, rtol=0)


def test_half_precision_is_summed_in_float32():
    """600 rows of one class, 1 + 2^-8 each: a sum in bfloat16 would stand still at 256."""
    x = torch.ones(600, 1, dtype=torch.bfloat16, requires_grad=True)
    w = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    t = torch.zeros(600, dtype=torch.int64)
    _, dw = torch.autograd.grad(LOSS(x, w, t, grad_samples=2, reduction="sum"), (x, w))
    torch.testing.assert_close(dw.float()[0], torch.tensor([-400.0]), rtol=2**-8, atol=0)
    torch.testing.assert_close(dw.float().sum(), torch.tensor(0.0), rtol=0, atol=2.0)


def test_vmap_draws_for_each_example_or_refuses():
    x, w, t = (a.detach() for a in head(5, 8, 60))
    f = lambda x, w: LOSS(x, w, t, grad_samples=4)  # noqa: E731
    xs, ws = torch.stack([x, x]), torch.stack([w, w])
    for dims, args in (((0, None), (xs, w)), ((None, 0), (x, ws)), ((0, 0), (xs, ws))):
        call = torch.func.vmap(torch.func.grad_and_value(f, (0, 1)), dims, randomness="different")
        (dx, dw), value = call(*args)
        torch.testing.assert_close(value, torch.stack([LOSS(x, w, t)] * 2))
        assert not torch.equal(dw[0], dw[1])
        torch.testing.assert_close(dw.sum(1), torch.zeros(2, 8), atol=1e-6, rtol=0)
        assert dx.isfinite().all()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(f, (0, None))(xs, w)
