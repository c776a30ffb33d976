"""torch_ops.linear_cross_entropy: what lives at a time, matmuls, chunks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import torch_ops
from tests.head.torch_arrays import IN, MEMORY, func
from tests.rules.test_torch_transforms import _same
from tests.storages import Alive
from torch_ops._head import chunks, ops, rounding

ROWS, WIDTH, CLASSES = 256, 16, 4096
LOGITS = ROWS * CLASSES * 4


def _peak(memory: Any, step: Callable[[Callable[..., Tensor], Tensor, Tensor], Any], chunk: int, **options: Any) -> int:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g).requires_grad_() for s in ((ROWS, WIDTH), (CLASSES, WIDTH)))
    t = torch.randint(CLASSES, (ROWS,), generator=g)
    with pytest.MonkeyPatch.context() as patch, Alive(x, w, t) as live:
        patch.setattr(ops, "is_observed", lambda *arrays: False)  # else the counter is shown one op for a loop
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


def test_alive_counts_what_is_held() -> None:
    given = torch.zeros(1000)
    with Alive(given) as alive:
        given.add_(1).view(10, 100).t()
        assert alive.peak == 0, "the arguments' own memory"
        held = given + 1
        assert alive.now == alive.peak == held.nbytes
        torch.cat([held, given])
        del held
        assert alive.now == 0
    assert alive.peak == 3 * given.nbytes


def test_the_counter_sees_the_builtins_logits() -> None:
    """The peak without fusion, counted the same way: above the logits, or the counter counts nothing."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g).requires_grad_() for s in ((ROWS, WIDTH), (CLASSES, WIDTH)))
    with Alive(x, w) as live:
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


def test_shift_reads_no_copy_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the input's size is made but its gradient."""
    monkeypatch.setattr(ops, "is_observed", lambda *arrays: False)  # the loop is shown
    x, w = torch.randn(2, 256, 512).requires_grad_(), torch.randn(8, 512).requires_grad_()
    t = torch.randint(8, (2, 256))
    with Alive(x, w, t) as live:
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
    for n, size in product((0, 1, 5, 17, 100, 1000, 128256), (1, 3, 17, 64, 65, 100, 1000, 4063)):
        pieces = chunks.spans(n, size)
        assert [i for i, _ in pieces[1:]] == [j for _, j in pieces[:-1]]
        assert (pieces[0][0], pieces[-1][1]) == (0, n)
        sizes = {j - i for i, j in pieces}
        assert max(sizes) <= size
        if size < chunks.TILE or n <= size:
            assert max(sizes) - min(sizes) <= 1
        else:  # a matmul of half precision is fast where its rows begin at 16 bytes
            assert all(i % chunks.TILE == 0 for i, _ in pieces)
            assert len(pieces) <= -(-n // (size // chunks.TILE * chunks.TILE))


def test_scaling_by_pieces_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PIECE", 24)
    x, factor = torch.randn(37, 8), torch.tensor(1 / 3)
    for kind in (torch.bfloat16, torch.float16):
        assert torch.equal(rounding.scaled(x, factor, kind), (x * factor).to(kind))
        y = x.to(kind)
        assert torch.equal(rounding.scaled(y, factor, kind), (y.float() * factor).to(kind))
