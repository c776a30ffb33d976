"""Sparse targets (ids, probabilities) in PyTorch: the dense soft target that adds the pairs up, in every option."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import torch_ops
from softmax_ext import reference
from tests.judging import checks
from tests.storages import Largest
from torch_ops._rows import native

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 5.0, "logit_scale": 0.7},
    {"label_smoothing": 1.0},
]
OPS: Any = torch_ops
F64 = torch.float64


@pytest.fixture(params=["native", "plain"], autouse=True)
def served(request, monkeypatch):
    if request.param == "native":
        assert not native.missing, native.missing
    else:
        monkeypatch.setattr(native, "serves", lambda *_: False)
    return request.param


def dense(ids: Any, v: Any, V: int, dim: int, ignored: int = -100) -> Any:
    kept = ids != ignored
    shape = [V if i == dim % ids.dim() else s for i, s in enumerate(ids.shape)]
    return torch.zeros(shape, dtype=v.dtype).scatter_add(dim, ids.where(kept, 0), v.where(kept, 0.0))


def pair(shape: tuple[int, ...], dim: int, V: int, K: int, seed: int = 0) -> Any:
    """ids with repeats and ignored slots (but no ignored row), probabilities with NaN in those."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, tuple(K if i == dim else s for i, s in enumerate(shape)), generator=g)
    v = torch.rand(ids.shape, generator=g, dtype=F64)
    if K > 1:
        at = tuple(K - 1 if i == dim else 0 for i in range(ids.dim()))
        ids[at], v[at] = -100, torch.nan
    return ids, v


def both(call: Any, ids: Any, v: Any, others: list[Any], V: int, dim: int) -> None:
    """Value, gradient and its derivative along a direction, by the pair and by the dense target."""
    results = []
    for sparse in (True, False):
        probabilities = v.clone().requires_grad_()
        leaves = [probabilities, *(a for a in others if a is not None)]
        make = lambda p=probabilities, s=sparse: (ids, p) if s else dense(ids, p, V, dim)  # noqa: E731
        loss = call(make())
        torch.manual_seed(1)
        up = torch.randn_like(loss)
        first = torch.autograd.grad(call(make()), leaves, up, materialize_grads=True)  # gradients on the way
        grads = torch.autograd.grad(loss, leaves, up, create_graph=True, materialize_grads=True)
        along = [(g, torch.randn_like(g)) for g in grads]
        used = [(g, u) for g, u in along if g.requires_grad]
        second = torch.autograd.grad([g for g, _ in used], leaves, [u for _, u in used], materialize_grads=True)
        results.append([loss, *first, *grads, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("form", [((5, 9), 1, 3), ((3, 8, 2, 2), 1, 4), ((7,), 0, 2), ((4, 6, 20), 1, 12)], ids=str)
def test_logits(options, weights, form):
    shape, dim, K = form
    V, rows = shape[dim], shape[:dim] + shape[dim + 1 :]
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    ids, v = pair(shape, dim, V, K)
    w = torch.rand(V, dtype=F64, requires_grad=True) if weights else None
    t = torch.rand(rows, dtype=F64, requires_grad=True) if weights else None
    for reduction in ("none", "sum", "mean"):
        call = lambda target, r=reduction: OPS.cross_entropy(x, target, w, token_weight=t, reduction=r, **options)  # noqa: E731
        both(call, ids, v, [x, w, t], V, dim)


HEADS = {"plain": ((5,), ()), "lead": ((2, 3), ()), "shift": ((2, 4), ()), "kd": ((5,), (2,)), "one": ((), ())}


LOOPS = [("fast", None), ("fast", 2), ("lean", None), ("lean", 4)]
REDUCED = [("none", True), ("sum", False), ("mean", True)]


@pytest.mark.parametrize("loop", LOOPS, ids=str)
@pytest.mark.parametrize("form", HEADS)
def test_heads(form, loop):
    """Every loop on every form; options and reductions in turn, so that each meets every loop and nearly every form."""
    (lead, inner), (memory, chunk) = HEADS[form], loop
    turn = [*HEADS].index(form) + LOOPS.index(loop)
    options, (reduction, weights) = OPTIONS[turn % 2], REDUCED[turn % 3]
    D, V, K = 4, 9, 3
    dim = 1 if inner else len(lead)
    x, W, b = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((*lead, D), (V, *inner, D), (V, *inner)))
    ids, v = pair((*lead, V, *inner), dim, V, K)
    w, t = torch.rand(V, dtype=F64, requires_grad=True), torch.rand((*lead, *inner), dtype=F64, requires_grad=True)
    kw = {"weight": w, "token_weight": t} if weights else {}
    kw |= {"reduction": reduction, "memory": memory, "chunk_size": chunk, "shift": int(form == "shift"), **options}
    call = lambda target: OPS.linear_cross_entropy(x, W, target, linear_bias=b, **kw)  # noqa: E731
    both(call, ids, v, [x, W, b, *([w, t] if weights else [])], V, dim)


def head_or_logits(x: Any, target: Any, **options: Any) -> Any:
    """The loss of logits x, and the same through a head that is the identity, fast and lean."""
    yield OPS.cross_entropy(x, target, **options)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    for memory in ("fast", "lean"):
        yield OPS.linear_cross_entropy(x, eye, target, memory=memory, chunk_size=3, **options)


def test_statistics_at_every_id():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=g, dtype=F64)
    x[1, 2] = -torch.inf
    ids = torch.tensor([[0, 5, -100], [2, 1, 1], [-100, -100, -100], [3, 3, 0]])
    names = ("lse", "logprob", "entropy", "argmax")
    up = torch.randn(4, 3, generator=g, dtype=F64)
    truth = torch.log_softmax(x, 1).gather(1, ids.clamp(min=0)).masked_fill(ids == -100, 0.0)
    options = {"axis": 1, "stats": names, "reduction": "sum"}
    given = x.numpy(), (ids.numpy(), np.zeros((4, 3)))
    grad = reference.cross_entropy_grad(*given, dloss=0.0, dstats={"logprob": up.numpy()}, **options)
    _, stats = reference.cross_entropy(*given, **options)
    x.requires_grad_()
    _, found = OPS.cross_entropy(x, (ids, torch.zeros(4, 3)), reduction="sum", stats=names)
    for name in names:
        np.testing.assert_allclose(found[name].detach(), stats[name], rtol=1e-12, atol=1e-12)
    assert torch.equal(found["logprob"].isneginf(), truth.isneginf())
    (dx,) = torch.autograd.grad(found["logprob"], x, up)
    np.testing.assert_allclose(dx, grad, rtol=1e-12, atol=1e-12)
    eye = torch.eye(6, dtype=F64)
    finite = x.detach().masked_fill(x.isneginf(), -50.0)
    for memory in ("fast", "lean"):
        _, head = OPS.linear_cross_entropy(finite, eye, (ids, up), stats=names, memory=memory, chunk_size=2)
        _, rows = OPS.cross_entropy(finite, (ids, up), stats=names)
        for name in names:
            torch.testing.assert_close(head[name], rows[name])
    kd = OPS.linear_cross_entropy(
        finite, eye.unsqueeze(1).expand(6, 2, 6).contiguous(), (ids.unsqueeze(-1).expand(4, 3, 2), torch.ones(4, 3, 2)),
        stats=("logprob",))[1]  # fmt: skip
    assert kd["logprob"].shape == (4, 3, 2)
    torch.testing.assert_close(
        kd["logprob"][..., 1], OPS.cross_entropy(finite, (ids, up), stats=("logprob",))[1]["logprob"]
    )


def test_ignored_slots_and_rows():
    x = torch.randn(4, 6, dtype=F64)
    ids = torch.tensor([[0, 5, -100], [2, 1, 1], [-100, -100, -100], [3, 3, 0]])
    v = torch.rand(4, 3, dtype=F64)
    v[ids == -100] = torch.nan
    x[2] = torch.nan  # an ignored row reaches nothing
    kept = torch.tensor([0, 1, 3])
    t = torch.tensor([1.0, 2.0, torch.nan, 0.5], dtype=F64)
    y = dense(ids[kept], v[kept], 6, 1)
    for tw in (None, t):
        truth = OPS.cross_entropy(x[kept], y, token_weight=None if tw is None else tw[kept])
        leaf = x.clone().requires_grad_()
        for loss in head_or_logits(leaf, (ids, v), token_weight=tw):
            torch.testing.assert_close(loss, truth)
            (g,) = torch.autograd.grad(loss, leaf)
            assert (g[2] == 0).all()
            assert g.isfinite().all()
    # an explicit ignore_index may be a class here, and K = 0 or no kept slot is a mean over nothing
    ids5 = torch.where(ids == -100, 5, torch.where(ids == 5, 4, ids))
    y = dense(ids5[kept], v[kept], 6, 1, ignored=5)
    for loss in head_or_logits(x, (ids5, v), ignore_index=5):
        torch.testing.assert_close(loss, OPS.cross_entropy(x[kept], y))
    for none in (ids[:, :0], torch.full_like(ids, -100)):
        leaf = x[kept].clone().requires_grad_()
        for zero in head_or_logits(leaf, (none[:3], v[:3, : none.shape[1]]), on_all_ignored="zero"):
            assert zero.item() == 0
            assert (torch.autograd.grad(zero, leaf)[0] == 0).all()
        assert all(loss.isnan() for loss in head_or_logits(leaf, (none[:3], v[:3, : none.shape[1]])))


def test_mass_on_a_masked_class():
    """A probability of 0 there counts nothing, more than 0 is an infinite loss; the gradient is the dense target's."""
    x = torch.randn(3, 6, dtype=F64)
    x[:, 2] = -torch.inf
    ids, v = torch.tensor([[2, 1], [2, 1], [0, 1]]), torch.tensor([[0.0, 0.7], [0.3, 0.7], [0.5, 0.5]], dtype=F64)
    for reduction in ("none", "sum"):
        for w in (None, torch.rand(6, dtype=F64)):
            results = []
            for sparse in (True, False):
                leaf, probabilities = x.clone().requires_grad_(), v.clone().requires_grad_()
                target = (ids, probabilities) if sparse else dense(ids, probabilities, 6, 1)
                loss = OPS.cross_entropy(leaf, target, w, reduction=reduction)
                results.append([loss, *torch.autograd.grad(loss.sum(), [leaf, probabilities])])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)
    assert results[0][0] == torch.inf


def test_confident_rows_keep_their_digits():
    x = torch.zeros(2, 1000, requires_grad=True)
    with torch.no_grad():
        x[:, 7] = 60.0
    ids, v = torch.tensor([[7, -100, 7], [7, 3, -100]]), torch.tensor([[0.25, 0.0, 0.75], [1.0, 0.5, 0.0]])
    loss = OPS.cross_entropy(x, (ids, v), reduction="sum")
    (g,) = torch.autograd.grad(loss, x)
    truth = reference.cross_entropy_grad(x.detach().double().numpy(), (ids.numpy(), v.double().numpy()), axis=1,
                                         reduction="sum")  # fmt: skip
    checks.close(g.numpy(), truth, np.abs(truth), dtype="float32", c=8)
    assert abs(g[0, 7]) > 1e-30


def test_ids_of_no_class():
    x, v = torch.randn(3, 6), torch.ones(3, 2)
    ids = torch.tensor([[0, 1], [2, 6], [3, -1]])
    said = r"target must be in \[0, 6\) or ignore_index \(-100\); got 6 at row 1\."
    with pytest.raises(IndexError, match="^cross_entropy: " + said):
        OPS.cross_entropy(x, (ids, v))
    with pytest.raises(IndexError, match="^linear_cross_entropy: " + said):
        OPS.linear_cross_entropy(x, torch.eye(6), (ids, v))
    middle = torch.randint(6, (2, 2, 3))
    middle[1, 1, 2] = 9
    with pytest.raises(IndexError, match="got 9 at row 5"):
        OPS.cross_entropy(torch.randn(2, 6, 3), (middle, torch.ones(2, 2, 3)))
    one = lambda x, i, v: OPS.cross_entropy(x, (i, v))  # noqa: E731
    loss = torch.func.vmap(one)(x.unsqueeze(1), ids.unsqueeze(1), v.unsqueeze(1))
    g = torch.func.vmap(torch.func.grad(one))(x.unsqueeze(1), ids.unsqueeze(1), v.unsqueeze(1))
    assert loss.isnan().tolist() == [False, True, True]
    assert g.isnan().all(-1).squeeze(1).tolist() == g.isnan().any(-1).squeeze(1).tolist() == [False, True, True]


def test_types_of_ids_and_probabilities():
    x = torch.randn(4, 6)
    ids, v = torch.tensor([[0, 5]] * 4), torch.rand(4, 2)
    truth = OPS.cross_entropy(x, (ids, v))
    for kind in (torch.int32, torch.int8, torch.uint8):
        assert torch.equal(OPS.cross_entropy(x, [ids.to(kind), v]), truth)
    half = v.bfloat16()
    assert torch.equal(OPS.cross_entropy(x, (ids, half)), OPS.cross_entropy(x, (ids, half.float())))
    for kind in (torch.bfloat16, torch.float16):
        low, weight = x.to(kind), torch.randn(6, 6).to(kind)
        assert OPS.cross_entropy(low, (ids, v)).dtype == torch.float32
        leaves = [low.requires_grad_(), weight.requires_grad_()]
        loss = OPS.linear_cross_entropy(low, weight, (ids, v), reduction="sum")
        wide = [a.detach().double().requires_grad_() for a in leaves]
        truth64 = OPS.linear_cross_entropy(*wide, (ids, v.double()), reduction="sum")
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth64, wide), strict=True):
            assert a.dtype == kind
            torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03)


def test_derivatives_of_every_order():
    x = torch.randn(2, 4, dtype=F64, requires_grad=True)
    ids, v = torch.tensor([[0, 3, -100], [1, 1, 2]]), torch.rand(2, 3, dtype=F64, requires_grad=True)
    w = torch.rand(4, dtype=F64, requires_grad=True)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0, "stats": ("logprob", "entropy")}

    def logits(x: Any, v: Any, w: Any) -> Any:
        loss, stats = OPS.cross_entropy(x, (ids, v), w, **options)
        return loss, stats["logprob"], stats["entropy"]

    def head(x: Any, w: Any, v: Any) -> Any:
        return OPS.linear_cross_entropy(x, w, (ids, v), reduction="none")

    forward = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(logits, (x, v, w), **forward)
    assert torch.autograd.gradgradcheck(logits, (x, v, w), check_fwd_over_rev=True, fast_mode=True)
    lw = torch.randn(5, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(head, (x, lw, v), **forward)
    assert torch.autograd.gradgradcheck(head, (x, lw, v), check_fwd_over_rev=True, fast_mode=True)


def test_transforms_and_compile():
    x, ids, v = torch.randn(3, 5, 6, dtype=F64), torch.randint(6, (3, 5, 2)), torch.rand(3, 5, 2, dtype=F64)
    W = torch.randn(6, 6, dtype=F64)
    for one in (
        lambda x, i, v: OPS.cross_entropy(x, (i, v), label_smoothing=0.1),
        lambda x, i, v: OPS.linear_cross_entropy(x, W, (i, v)),
    ):
        many = torch.func.vmap(torch.func.grad(one, (0, 2)))(x, ids, v)
        for j in range(3):
            for a, b in zip(many, torch.func.grad(one, (0, 2))(x[j], ids[j], v[j]), strict=True):
                torch.testing.assert_close(a[j], b)
        compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
        leaf = x[0].clone().requires_grad_()
        got = compiled(leaf, ids[0], v[0])
        torch.testing.assert_close(got, one(x[0], ids[0], v[0]))
        torch.testing.assert_close(torch.autograd.grad(got, leaf)[0], torch.func.grad(one)(x[0], ids[0], v[0]))


def test_nothing_of_the_logits_size_beside_them():
    N, V, K = 8, 5000, 4
    x, ids, v = torch.randn(N, V), torch.randint(V, (N, K)), torch.rand(N, K, requires_grad=True)
    with Largest() as seen:
        loss = OPS.cross_entropy(x, (ids, v))
        loss.backward()
    if native.serves(x, 1):
        assert seen.bytes <= 8 * N * K
    leaf = x.clone().requires_grad_()
    loss = OPS.cross_entropy(leaf, (ids, v))
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OPS.cross_entropy(leaf, (ids, v))
    assert sum(t.numel() for t in saved if t.data_ptr() != leaf.data_ptr()) < N * V // 10


def test_three_matmuls():
    x, W = torch.randn(64, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    ids, v = torch.randint(50, (64, 4)), torch.rand(64, 4, requires_grad=True)
    with torch.profiler.profile() as seen:
        OPS.linear_cross_entropy(x, W, (ids, v)).backward()
    names = [e.name for e in seen.events() or []]
    assert sum(name in ("aten::mm", "aten::addmm") for name in names) == 3


MISTAKES = {
    "be an array; got tuple object.": lambda i, v: (i, v, v),
    "have ids of an integer type in its pair; got float32.": lambda i, v: (v, v),
    "have probabilities of a floating type in its pair; got int64.": lambda i, v: (i, i),
    "have ids of shape (3, K) in its pair; got (3,).": lambda i, v: (i[:, 0], v),
    "have ids of shape (3, 2) in its pair; got (2, 2).": lambda i, v: (i[:2], v),
    "have probabilities of shape (3, 2) in its pair; got (3, 1).": lambda i, v: (i, v[:, :1]),
    "be an array; got int object.": lambda i, v: (i, 3),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes(sentence):
    target = MISTAKES[sentence](torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    for op, args in (("cross_entropy", ()), ("linear_cross_entropy", (torch.randn(6, 6),))):
        with pytest.raises((TypeError, ValueError)) as error:
            getattr(torch_ops, op)(torch.randn(3, 6), *args, target)
        assert str(error.value) == f"{op}: target must {sentence}"
