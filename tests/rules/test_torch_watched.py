"""Who watches PyTorch's autograd: hooks on saved tensors, checkpoints, dispatch modes, fake tensors, subclasses."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import torch_ops
from torch_ops import _modes as modes
from torch_ops._head import ops as head_ops
from torch_ops._rules import cross_entropy as rule
from torch_ops._rules import kept as kept_rule
from torch_ops._rules import softmax as softmax_rule

N, D, V = 8, 6, 11
G = torch.Generator().manual_seed(0)
X0, W0 = torch.randn(N, D, generator=G), torch.randn(V, D, generator=G)
T = torch.tensor([0, 1, -100, 3, 10, 5, 6, 7])
OPTIONS: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}]


def loss(x: Tensor, inplace: bool, second: Callable[[Tensor], Tensor] | None, **options: Any) -> Tensor:
    logits = x @ W0.t()
    other = 0.0 if second is None else 0.1 * second(logits)  # made first, so that it is read last
    return torch_ops.cross_entropy(logits, T, inplace_backward=inplace, **options) + other


def squares(logits: Tensor) -> Tensor:
    return logits.square().sum()


def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
    x = X0.clone().requires_grad_()
    return torch.autograd.grad(run(x), x)[0]


def under(hooks: Any, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with hooks():
            return fn(x)

    return run


def one_copy_for_all() -> Any:
    store: dict[Any, Tensor] = {}

    def pack(v: Tensor) -> Any:
        key = (v.data_ptr(), tuple(v.shape), v.stride())
        store.setdefault(key, v.detach().clone())
        return key

    return saved_tensors_hooks(pack, store.__getitem__)


def looking() -> Any:
    return saved_tensors_hooks(lambda v: v, lambda v: v)


WATCHED: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "checkpoint": lambda fn: lambda x: checkpoint(fn, x, use_reentrant=False),  # pyright: ignore
    "a hook that looks": lambda fn: under(looking, fn),
    "one copy for all": lambda fn: under(one_copy_for_all, fn),
    "save_on_cpu": lambda fn: under(save_on_cpu, fn),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", WATCHED)
def test_in_place_under_hooks_gives_the_gradient(how: str, options: dict[str, Any]) -> None:
    """A hook switches autograd's look at versions off: a reader of the logits would be given the gradient."""
    want = gradient(lambda x: loss(x, False, squares, **options))
    got = gradient(WATCHED[how](lambda x: loss(x, True, squares, **options)))
    torch.testing.assert_close(got, want)


def test_a_saboteur_that_asks_no_hooks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "is_watched", lambda: False)
    monkeypatch.setattr(rule, "is_sole", lambda x: True)
    for how in ("a hook that looks", "one copy for all"):
        with pytest.raises(AssertionError):
            test_in_place_under_hooks_gives_the_gradient(how, {})


def kept_by_one_saved_tensor(logits: Tensor) -> Tensor:
    y = logits.square()
    y.grad_fn._raw_saved_self.register_hooks(lambda v: v, lambda v: v)  # pyright: ignore
    return y.sum()


@pytest.mark.parametrize("second", [kept_by_one_saved_tensor, torch.tanh])
def test_what_shares_the_memory_keeps_it(second: Callable[[Tensor], Tensor]) -> None:
    """A saved tensor with hooks of its own, or an output that its own derivative reads, is an owner of the memory."""
    if second is torch.tanh:

        def run(x: Tensor, inplace: bool) -> Tensor:
            return torch_ops.cross_entropy(torch.tanh(x @ W0.t()), T, inplace_backward=inplace)

    else:

        def run(x: Tensor, inplace: bool) -> Tensor:
            return loss(x, inplace, second)

    torch.testing.assert_close(gradient(lambda x: run(x, True)), gradient(lambda x: run(x, False)))


def test_a_saboteur_that_counts_no_owners_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "is_sole", lambda x: True)
    with pytest.raises(AssertionError):
        test_what_shares_the_memory_keeps_it(kept_by_one_saved_tensor)


def test_in_place_still_is() -> None:
    """Without hooks the gradient lies over the logits, a view of them included."""
    for shape in ((N, D), (2, 4, D)):  # of three dimensions F.linear gives a view
        x = X0.clone().requires_grad_().view(shape)
        logits = F.linear(x, W0)
        seen: list[Tensor] = []
        logits.register_hook(seen.append)
        torch_ops.cross_entropy(logits if logits.dim() == 2 else logits.view(N, V), T, inplace_backward=True).backward()
        assert seen[0].data_ptr() == logits.data_ptr()


def test_compiled_autograd_takes_a_new_buffer() -> None:
    from torch._dynamo import compiled_autograd

    want = gradient(lambda x: loss(x, False, None))
    x = X0.clone().requires_grad_()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss(x, True, None).backward()
    torch.testing.assert_close(x.grad, want)


ATEN, OURS = torch.ops.aten, torch.ops.softmax_ext
KEPT = {
    "matmuls": [ATEN.mm.default, ATEN.addmm.default, ATEN.linear.default],
    "every matmul": [ATEN.mm.default, ATEN.mm.out, ATEN.addmm.default, ATEN.addmm.out, ATEN.addmm_.default],
    "rows": [
        getattr(OURS, name).default
        for name in ("cross_entropy_fwd", "cross_entropy_bwd", "cross_entropy_fwd_bwd_", "cross_entropy_bwd_")
    ],
    "heads": [getattr(OURS, name).default for name in ("head_fwd", "head_bwd", "head_fwd_bwd")],
    "copies": [ATEN.copy_.default, ATEN.mul.out, ATEN.masked_fill_.Scalar, ATEN.index_copy_.default],
}


def head(x: Tensor, w: Tensor, **options: Any) -> Tensor:
    return torch_ops.linear_cross_entropy(torch.tanh(x), w, T, **options).sum()


@pytest.mark.parametrize("options", [{}, {"memory": "lean"}, {"reduction": "none"}, {"chunk_size": 3}], ids=str)
@pytest.mark.parametrize("kept", KEPT)
def test_selective_checkpoints(kept: str, options: dict[str, Any]) -> None:
    """Who keeps ops of a region meets the head as one op that writes over nothing."""
    x, w = X0.clone().requires_grad_(), W0.clone().requires_grad_()
    want = torch.autograd.grad(head(x, w, **options), [x, w])
    contexts = functools.partial(create_selective_checkpoint_contexts, KEPT[kept])
    out: Any = checkpoint(functools.partial(head, **options), x, w, use_reentrant=False, context_fn=contexts)
    for got, right in zip(torch.autograd.grad(out, [x, w]), want, strict=True):
        torch.testing.assert_close(got, right)


def test_a_saboteur_that_shows_its_loops_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_ops, "is_observed", lambda *arrays: False)
    caught = 0
    for kept in ("every matmul", "rows", "copies"):
        for options in ({}, {"memory": "lean"}, {"chunk_size": 3}):
            try:
                test_selective_checkpoints(kept, options)
            except (AssertionError, RuntimeError):
                caught += 1
    assert caught >= 2


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch_ops.softmax(x),
    "log_softmax": lambda x: torch_ops.log_softmax(x),
    "cross_entropy": lambda x: torch_ops.cross_entropy(x, T.clamp(max=D - 1)),
    "inplace": lambda x: torch_ops.cross_entropy(x, T.clamp(max=D - 1), inplace_backward=True),
    "smoothed": lambda x: torch_ops.cross_entropy(x, T.clamp(max=D - 1), label_smoothing=0.1),
    "soft": lambda x: torch_ops.cross_entropy(x, X0.softmax(1)),
    "entropy": lambda x: torch_ops.cross_entropy(x, T.clamp(max=D - 1), stats=("entropy",))[1]["entropy"],
    "head": lambda x: torch_ops.linear_cross_entropy(x, W0, T),
    "lean": lambda x: torch_ops.linear_cross_entropy(x, W0, T, memory="lean"),
    "head, each row": lambda x: torch_ops.linear_cross_entropy(x, W0, T, reduction="none"),
}
CHECKPOINTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "non-reentrant": lambda fn, x: checkpoint(fn, x, use_reentrant=False),
    "reentrant": lambda fn, x: checkpoint(fn, x, use_reentrant=True),
    "selective": lambda fn, x: checkpoint(
        fn,
        x,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, [ATEN.mm.default]),
    ),
}


def alive() -> int:
    """Bytes of the tensors that Python knows."""
    found = {}
    for o in gc.get_objects():
        if type(o) is Tensor and o.layout is torch.strided:
            found[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_nothing_waits_for_the_collector(op: str, how: str) -> None:
    """Steps of a checkpointed op leave no tensor alive, with the collector of circles off."""
    x = X0.clone().requires_grad_()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(3):
            CHECKPOINTS[how](OPS[op], x * 1.0).square().sum().backward()
            x.grad = None
        assert alive() <= before
    finally:
        gc.enable()


def test_a_saboteur_that_keeps_its_output_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_rule, "is_transforming", lambda: True)
    with pytest.raises(AssertionError):
        test_nothing_waits_for_the_collector("softmax", "non-reentrant")


@pytest.mark.parametrize(
    ("options", "matmuls"),
    [({}, 3), ({"reduction": "sum"}, 3), ({"chunk_size": 2}, 3), ({"memory": "lean"}, 4), ({"reduction": "none"}, 4)],
    ids=str,
)
def test_counted_operations(options: dict[str, Any], matmuls: int) -> None:
    """FlopCounterMode sees every matmul of the head, 2 N D V each, of the rows that are judged."""
    x, w, kept = X0.clone().requires_grad_(), W0.clone().requires_grad_(), T.clamp(min=0)
    for target, rows in ((kept, N), (T, N - 1 if "memory" not in options and "reduction" not in options else N)):
        with FlopCounterMode(display=False) as counted:
            torch_ops.linear_cross_entropy(x, w, target, **options).sum().backward()
        if target is kept:
            assert counted.get_total_flops() == matmuls * 2 * rows * D * V
        else:
            assert counted.get_total_flops() <= matmuls * 2 * N * D * V
    with FlopCounterMode(display=False) as counted:
        torch_ops.linear_cross_entropy(x.detach(), w.detach(), kept)
    assert counted.get_total_flops() == 2 * N * D * V


FAKES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "softmax": lambda x, w, t: torch_ops.softmax(x),
    "log_softmax": lambda x, w, t: torch_ops.log_softmax(x),
    "cross_entropy": lambda x, w, t: torch_ops.cross_entropy(x, t),
    "every option": lambda x, w, t: torch_ops.cross_entropy(
        x, t, label_smoothing=0.1, token_weight=x[:, 0], stats=("entropy", "argmax"), on_all_ignored="zero"
    )[0],
    "soft": lambda x, w, t: torch_ops.cross_entropy(x, x.softmax(1)),
    "head": lambda x, w, t: torch_ops.linear_cross_entropy(x, w, t),
    "lean": lambda x, w, t: torch_ops.linear_cross_entropy(x, w, t, memory="lean", reduction="none"),
}


@pytest.mark.parametrize("op", FAKES)
def test_fake_tensors_outside_their_mode(op: str) -> None:
    with FakeTensorMode():
        x, w, t = torch.randn(N, D, requires_grad=True), torch.randn(V, D), torch.zeros(N, dtype=torch.int64)
    out = FAKES[op](x, w, t)
    assert isinstance(out, FakeTensor)
    (g,) = torch.autograd.grad(out.sum(), x)
    assert isinstance(g, FakeTensor)
    assert g.shape == x.shape


class Marked(Tensor):
    """A plain subclass: a mark on results, no say in what is computed."""


def test_a_target_of_a_subclass_is_looked_at() -> None:
    bad = T.clone()
    bad[3] = V
    for call in (
        lambda t: torch_ops.cross_entropy(X0 @ W0.t(), t, reduction="sum"),
        lambda t: torch_ops.linear_cross_entropy(X0, W0, t),
    ):
        with pytest.raises(IndexError, match="row 3"):
            call(bad.as_subclass(Marked))
        torch.testing.assert_close(call(T.as_subclass(Marked)).as_subclass(Tensor), call(T))


def test_statistics_keep_the_subclass() -> None:
    names = ("lse", "logprob", "entropy", "argmax")
    for loss, stats in (
        torch_ops.cross_entropy((X0 @ W0.t()).as_subclass(Marked), T, stats=names),
        torch_ops.linear_cross_entropy(X0, W0, T.as_subclass(Marked), stats=names),
    ):
        assert type(F.cross_entropy(X0 @ W0.t(), T.as_subclass(Marked))) is type(loss) is Marked
        assert all(type(value) is Marked for value in stats.values())


def halves() -> Any:
    return saved_tensors_hooks(
        lambda v: (v.dtype, v.half() if v.is_floating_point() else v), lambda packed: packed[1].to(packed[0])
    )


@pytest.mark.parametrize("op", ["cross_entropy", "smoothed", "log_softmax", "head"])
def test_copies_in_float16_do_not_overflow(op: str) -> None:
    """Hooks that keep what is saved in float16: a row's sum of up to V - 1 is no number there from V = 65521 on."""
    classes = 70000
    target = torch.tensor([3, 5])
    x = torch.zeros(2, classes if op != "head" else 2, requires_grad=True)
    w = torch.linspace(-1, 1, classes * 2).reshape(classes, 2)

    def run() -> Tensor:
        if op == "log_softmax":
            return torch_ops.log_softmax(x * 1.0)[:, 3].sum()
        if op == "head":
            return torch_ops.linear_cross_entropy(x * 1.0, w, target, reduction="none").sum()
        return torch_ops.cross_entropy(x * 1.0, target, label_smoothing=0.1 if op == "smoothed" else 0.0)

    (want,) = torch.autograd.grad(run(), x)
    with halves():
        out = run()
    (got,) = torch.autograd.grad(out, x)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-6)


def test_a_saboteur_that_saves_the_sum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_rule, "is_watched", lambda: False)
    for op in ("cross_entropy", "log_softmax", "head"):
        with pytest.raises(AssertionError):
            test_copies_in_float16_do_not_overflow(op)


UNKNOWN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "softmax": lambda x, t: torch_ops.softmax(x),
    "softmax, first dim": lambda x, t: torch_ops.softmax(x, 0),
    "log_softmax": lambda x, t: torch_ops.log_softmax(x),
    "cross_entropy": lambda x, t: torch_ops.cross_entropy(x, t),
    "option": lambda x, t: torch_ops.cross_entropy(x, t, label_smoothing=0.1),
    "module": lambda x, t: torch_ops.nn.CrossEntropyLoss()(x, t),
    "module softmax": lambda x, t: torch_ops.nn.Softmax(-1)(x),
    "head": lambda x, t: torch_ops.linear_cross_entropy(x[:, :D], W0, t),
}


@pytest.mark.parametrize("op", UNKNOWN)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiled_for_sizes_that_depend_on_data(op: str) -> None:
    """A number of rows that the compiler does not know: nothing asks for it before asking who compiles."""
    torch._dynamo.reset()
    x, t = torch.randn(N, V, generator=torch.Generator().manual_seed(1)), T.clamp(0, V - 1)
    mask = torch.arange(N) % 3 > 0

    def chosen(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        rows = mask.nonzero().squeeze(1)
        return UNKNOWN[op](x.index_select(0, rows), t.index_select(0, rows))

    got = torch.compile(chosen, fullgraph=True, backend="aot_eager")(x, t, mask)
    torch.testing.assert_close(got, chosen(x, t, mask))


def test_a_saboteur_that_asks_for_the_size_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    is_direct = modes.is_direct
    for module in (torch_ops._rows.native, torch_ops._rows.triton):  # pyright: ignore
        monkeypatch.setattr(module, "is_direct", lambda x: x.numel() > 0 and is_direct(x))
    with pytest.raises(Exception, match="data-dependent"):
        test_compiled_for_sizes_that_depend_on_data("softmax")
