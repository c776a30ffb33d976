"""What the backward passes keep, and the in-place backward: never a wrong number, never a second (N, V)."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from tests.judging import cases
from tests.judging.cases import OPTIONS
from tests.judging.frameworks import only

N, V = 64, 257


def kept_bytes(torch: Any, run: Any) -> tuple[int, Any]:
    """(bytes of distinct memory saved for backward, the result)."""
    seen: dict[int, int] = {}

    def pack(t: Any) -> Any:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(seen.values()), out


@only("torch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_torch_softmax_keeps_one_array(fw, op, dtype):
    torch = fw.torch
    x = torch.randn(N, V).to(getattr(torch, dtype)).requires_grad_()
    size, y = kept_bytes(torch, lambda: getattr(fw.ops, op)(x))
    statistics = 0 if op == "softmax" else 2 * N * 4
    assert size == x.nbytes + statistics
    (saved, *_) = y.grad_fn.saved_tensors
    assert saved.data_ptr() == (y if op == "softmax" else x).data_ptr()


@only("torch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_torch_cross_entropy_keeps_no_second_array(fw, dtype, soft, name):
    torch = fw.torch
    x = torch.randn(N, V).to(getattr(torch, dtype)).requires_grad_()
    target = torch.rand(N, V).to(x.dtype) if soft else torch.randint(V, (N,))
    weight = torch.rand(V).to(x.dtype)
    options = {**OPTIONS[name], "stats": ("lse", "entropy")}
    size, out = kept_bytes(torch, lambda: fw.ops.cross_entropy(x, target, weight, **options))
    # Logits, targets (canonical: 8 bytes a row), weights (also as float32), two numbers a row (m and rest);
    # the reduction keeps some more row-shaped numbers.
    given = x.nbytes + target.nbytes + weight.nbytes + V * 4
    assert given - weight.nbytes - V * 4 <= size <= given + 16 * N * 8
    assert 16 * N * 8 < N * V * 2, "the slack must be smaller than any (N, V) array"
    del out


@only("torch")
def test_torch_keeps_nothing_without_a_gradient(fw):
    torch = fw.torch
    x = torch.randn(N, V)
    for run in (lambda: fw.ops.softmax(x), lambda: fw.ops.log_softmax(x), lambda: fw.ops.cross_entropy(x, x.argmax(1))):
        assert kept_bytes(torch, run)[0] == 0


@only("torch")
@pytest.mark.parametrize("op", ["softmax", "log_softmax", "cross_entropy"])
def test_torch_frees_what_it_kept(fw, op):
    """No reference cycle holds the graph: an (N, V) array would wait for the garbage collector."""
    import weakref

    torch = fw.torch
    x = torch.randn(4, 5, requires_grad=True) * 1.0
    args = (torch.tensor([0, 1, 2, 3]),) if op == "cross_entropy" else ()
    gone = weakref.ref(x)
    gc.disable()
    try:
        y = getattr(fw.ops, op)(x, *args)
        y.sum().backward()
        del x, y
        assert gone() is None
    finally:
        gc.enable()


@only("jax")
@pytest.mark.parametrize("op", ["softmax", "log_softmax", "cross_entropy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_keeps_one_array(fw, op, dtype):
    """The residuals of jax.vjp under jit are the arrays its pullback holds."""
    jax, jnp = fw.jax, fw.jax.numpy
    x = jnp.asarray(np.random.default_rng(0).standard_normal((N, V)), dtype)
    rest = (jnp.arange(N), jnp.ones(V)) if op == "cross_entropy" else ()
    options = {"stats": ("lse", "entropy"), **OPTIONS["all"]} if op == "cross_entropy" else {}

    _, pull = jax.jit(lambda x: jax.vjp(lambda x: getattr(fw.ops, op)(x, *rest, **options), x))(x)
    big = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= N * V]
    assert len(big) == 1
    assert big[0].dtype == x.dtype
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) - big[0].nbytes
    assert small <= 16 * N * 8 + 2 * V * 4


# The in-place backward, torch only.


def problem(fw: Any, dtype: str = "float32") -> tuple[Any, Any]:
    r = cases.rows(V, dtype)
    return fw.array(r.x, dtype), fw.array(r.target, dtype)


def loss_of(fw: Any, logits: Any, target: Any, **options: Any) -> Any:
    return fw.ops.cross_entropy(logits, target, inplace_backward=True, reduction="sum", **options)


@only("torch")
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_inplace_gradient_is_the_same_bits_in_the_logits_memory(fw, dtype, name, soft):
    torch = fw.torch
    base, target = problem(fw, dtype)
    target = fw.array(cases.soft(V, dtype, len(base)), dtype) if soft else target
    leaf = base.clone().requires_grad_()
    fw.ops.cross_entropy(leaf, target, reduction="sum", **OPTIONS[name]).backward()

    logits = base.clone().requires_grad_() * 1.0
    before, where, version = logits.detach().clone(), logits.data_ptr(), logits._version
    caught = []
    logits.register_hook(lambda g: caught.append((g.data_ptr(), g.detach().clone())))
    loss = loss_of(fw, logits, target, **OPTIONS[name])
    assert torch.equal(logits, before), "the logits are intact until the backward pass"
    assert logits._version == version
    loss.backward()
    ((at, grad),) = caught
    assert at == where
    assert torch.equal(grad.view(torch.uint8), leaf.grad.view(torch.uint8))
    assert torch.equal(logits.detach().view(torch.uint8), grad.view(torch.uint8))
    assert logits._version > version


@only("torch")
@pytest.mark.parametrize("rows", [3, 3000])
def test_inplace_gradient_of_many_slices(fw, rows):
    """More elements than one slice of the workspace holds, middle class dimension included."""
    torch = fw.torch
    g = torch.Generator().manual_seed(0)
    for shape in ((rows, 1000), (rows // 3, 100, 30), (1000 * rows // 3,)):
        base = torch.randn(shape, generator=g)
        target = torch.randint(shape[1] if len(shape) > 1 else shape[0], shape[:1] + shape[2:], generator=g)
        target = target if len(shape) > 1 else target[0]
        leaf = base.clone().requires_grad_()
        fw.ops.cross_entropy(leaf, target, reduction="sum").backward()
        logits = base.clone().requires_grad_() * 1.0
        loss_of(fw, logits, target).backward()
        assert torch.equal(logits.detach(), leaf.grad)


@only("torch")
def test_inplace_needs_no_second_array(fw):
    """The peak of the backward pass above its start, counted by the allocator's own events."""
    torch = fw.torch
    rows, classes = 2048, 4096  # 8 slices of the workspace
    logits = torch.randn(rows, classes).requires_grad_() * 1.0
    target = torch.randint(classes, (rows,))

    def peak(inplace: bool) -> int:
        loss = fw.ops.cross_entropy(logits, target, inplace_backward=inplace)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as p:
            torch.autograd.grad(loss, logits)
        now = most = 0
        for e in p.profiler.kineto_results.events():
            if e.name() == "[memory]":
                now += e.nbytes()
                most = max(most, now)
        return most

    size = logits.nbytes
    fresh, inplace = peak(False), peak(True)
    assert fresh >= size
    assert inplace < size


@only("torch")
def test_later_use_of_overwritten_logits_is_an_error(fw):
    torch = fw.torch
    base, target = problem(fw)
    for other in (lambda z: z.exp().sum() + (z * z).sum(), lambda z: fw.ops.log_softmax(z).sum()):
        logits = base.clamp(-30, 30).requires_grad_() * 1.0
        second = other(logits)
        loss_of(fw, logits, target).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()
    # A producer that needs its own output owns the memory too: the gradient goes elsewhere.
    found = []
    for inplace in (False, True):
        leaf = base.clamp(-5, 5).requires_grad_()
        fw.ops.cross_entropy(leaf.exp(), target, inplace_backward=inplace).backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@only("torch")
def test_two_losses_on_the_same_logits(fw):
    """Right, or autograd's error; never a wrong number."""
    base, target = problem(fw)
    leaf = base.clone().requires_grad_()
    logits = leaf * 1.0
    total = loss_of(fw, logits, target) + loss_of(fw, logits, target.roll(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    assert leaf.grad is None


@only("torch")
def test_another_consumer_that_needs_no_logits(fw):
    """Its gradient is added to one that lies in the logits' memory."""
    torch = fw.torch
    base, target = problem(fw)
    results = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        logits = leaf * 1.0
        loss = fw.ops.cross_entropy(logits, target, inplace_backward=inplace, reduction="sum")
        ((3.0 * logits).sum() + loss + (5.0 * logits[2:]).sum()).backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


@only("torch")
def test_second_backward_after_inplace_is_an_error(fw):
    base, target = problem(fw)
    logits = base.requires_grad_() * 1.0
    loss = loss_of(fw, logits, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _leaf(torch: Any, base: Any) -> Any:
    return base.clone().requires_grad_()


def _view_of_leaf(torch: Any, base: Any) -> Any:
    return torch.cat([base, base]).requires_grad_()[: len(base)]


def _expanded(torch: Any, base: Any) -> Any:
    return (base[:1].clone().requires_grad_() * 1.0).expand(base.shape)


def _strided(torch: Any, base: Any) -> Any:
    return (base.repeat(1, 2).requires_grad_() * 1.0)[:, ::2]


def _without_gradient(torch: Any, base: Any) -> Any:
    return base.clone()


@only("torch")
@pytest.mark.parametrize("make", [_leaf, _view_of_leaf, _expanded, _strided, _without_gradient])
def test_inplace_leaves_other_logits_alone(fw, make):
    torch = fw.torch
    base, target = problem(fw)
    logits = make(torch, base)
    before = logits.detach().clone()
    y = torch.rand(base.shape).requires_grad_()
    loss = loss_of(fw, logits, target) + loss_of(fw, logits, y)
    loss.backward()
    assert torch.equal(logits.detach(), before)
    if logits.requires_grad:
        leaf = before.requires_grad_()
        (
            fw.ops.cross_entropy(leaf, target, reduction="sum") + fw.ops.cross_entropy(leaf, y, reduction="sum")
        ).backward()
        if make is _leaf:
            assert torch.equal(logits.grad, leaf.grad)
            assert logits.grad.data_ptr() != logits.data_ptr()


@only("torch")
def test_inplace_leaves_logits_alone_with_create_graph(fw):
    torch = fw.torch
    base = torch.randn(5, 7, dtype=torch.float64)
    target = torch.tensor([0, 6, 3, -100, 2])
    leaf = base.clone().requires_grad_()
    logits = leaf * 1.0
    (dx,) = torch.autograd.grad(loss_of(fw, logits, target), leaf, create_graph=True)
    assert torch.equal(logits.detach(), base)
    (ddx,) = torch.autograd.grad(dx.square().sum(), leaf)
    want = torch.autograd.functional.vhp(
        lambda x: torch.nn.functional.cross_entropy(x, target, reduction="sum"), base, 2 * dx.detach()
    )[1]
    torch.testing.assert_close(ddx, want)


@only("torch")
@pytest.mark.parametrize("transform", ["grad", "vjp", "vmap of grad", "hessian"])
def test_inplace_leaves_logits_alone_under_torch_func(fw, transform):
    torch = fw.torch
    f = torch.func
    base = torch.randn(3, 5, dtype=torch.float64)
    target = torch.tensor([0, 4, 2])
    seen = []

    def loss(x, t=target, op=None):
        logits = x * 1.0
        seen.append(logits)
        if op is not None:
            return op(logits, t, reduction="sum")
        return loss_of(fw, logits, t)

    def own(x, t=target):
        return loss(x, t, torch.nn.functional.cross_entropy)

    runs = {
        "grad": lambda fn: f.grad(fn)(base),
        "vjp": lambda fn: f.vjp(fn, base)[1](torch.ones((), dtype=torch.float64))[0],
        "vmap of grad": lambda fn: f.vmap(f.grad(fn))(base, target),
        "hessian": lambda fn: f.hessian(fn)(base),
    }
    torch.testing.assert_close(runs[transform](loss), runs[transform](own))


@only("torch")
def test_inplace_under_checkpoint(fw):
    torch = fw.torch
    base, target = problem(fw)
    w = torch.eye(base.shape[1]).requires_grad_()
    x = torch.where(base.isinf(), -30.0, base)
    grads = []
    for inplace in (False, True):
        w.grad = None

        def head(inplace=inplace):
            return fw.ops.cross_entropy(x @ w, target, inplace_backward=inplace)

        torch.utils.checkpoint.checkpoint(head, use_reentrant=False).backward()
        grads.append(w.grad)
    assert torch.equal(*grads)
