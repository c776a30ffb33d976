"""linear_at in PyTorch: against the reference, every derivative and transform, its memory, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import torch_ops
from softmax_ext import reference
from tests.judging import checks
from tests.storages import Largest
from torch_ops._rows import native
from torch_ops._rows import picked as rows

OPS: Any = torch_ops
REFERENCE: Any = reference
TYPES = ("float64", "float32", "bfloat16", "float16")


@pytest.fixture(params=["native", "plain", "plain by pieces"])
def served(request, monkeypatch):
    if request.param == "native":
        assert not native.missing, native.missing
    else:
        monkeypatch.setattr(rows, "_serving", lambda *_: None)
    if request.param == "plain by pieces":
        monkeypatch.setattr(rows, "_WORKSPACE", 150)
    return request.param


def problem(dtype: str, lead: tuple[int, ...] = (2, 5), D: int = 7, V: int = 11, K: int = 4) -> Any:
    g = torch.Generator().manual_seed(K)
    kind = getattr(torch, dtype)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(kind) for s in ((*lead, D), (V, D), (V,)))
    ids = torch.randint(0, V, (*lead, K), generator=g)
    if ids.numel():
        ids.reshape(-1, K)[0] = 3  # one class, K times
        ids.reshape(-1)[-1] = -100
    return x, w, b, ids


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("K", [4, 1, 0])
def test_values_and_gradients(served, dtype, lead, K):
    x, w, b, ids = problem(dtype, lead, K=K)
    leaves = [a.requires_grad_() for a in (x, w, b)]
    z = OPS.linear_at(x, w, ids, linear_bias=b)
    numbers = [a.detach().double().numpy() for a in (x, w, b)]
    truth = REFERENCE.linear_at(*numbers[:2], ids.numpy(), linear_bias=numbers[2])
    kind = "float64" if dtype == "float64" else "float32"
    assert str(z.dtype) == f"torch.{kind}"
    size = np.where(np.isfinite(truth), np.abs(truth), 0) + 7 * 9
    checks.close(z.detach().numpy(), truth, size, dtype=kind, c=4)
    up = torch.randn(z.shape, dtype=z.dtype)
    up[z == -torch.inf] = torch.nan  # no gradient passes a slot without a class, whatever comes back to it
    found = torch.autograd.grad(z, leaves, up)
    for g, t, leaf in zip(
        found, REFERENCE.linear_at_grad(*numbers[:2], ids.numpy(), up.double().numpy()), leaves, strict=True
    ):
        assert g.dtype == leaf.dtype
        checks.close(g.double().numpy(), t, np.abs(t) + 40, dtype=dtype, c=4)


def fn(x: Any, w: Any, b: Any, ids: Any) -> Any:
    return OPS.linear_at(x, w, ids, linear_bias=b).masked_fill(ids == -100, 0.0)


def test_derivatives_of_every_order(served):
    x, w, b, ids = problem("float64", (3,), D=2, V=4, K=3)
    leaves = tuple(a.requires_grad_() for a in (x, w, b))
    inputs = (*leaves, ids)
    checks_ = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(fn, inputs, **checks_)
    assert torch.autograd.gradgradcheck(fn, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


def test_transforms(served):
    x, w, b, ids = problem("float64", (3,), D=2, V=4, K=3)
    dense = lambda x, w, b: (x @ w.T + b).gather(1, ids.clamp(min=0)).masked_fill(ids == -100, 0.0)  # noqa: E731
    ours = lambda x, w, b: fn(x, w, b, ids)  # noqa: E731
    f = torch.func
    tangents = tuple(torch.randn_like(a) for a in (x, w, b))

    def same(make: Any) -> None:
        for a, b_ in zip(tree_leaves(make(ours)), tree_leaves(make(dense)), strict=True):
            torch.testing.assert_close(a, b_)

    same(lambda g: f.jvp(g, (x, w, b), tangents))
    same(lambda g: f.jacrev(g, (0, 1, 2))(x, w, b))
    same(lambda g: f.jacfwd(g, (0, 1, 2))(x, w, b))
    same(lambda g: f.hessian(lambda *a: g(*a).square().sum(), (0, 1, 2))(x, w, b))
    ws, xs, bs = (
        torch.randn(5, *w.shape, dtype=w.dtype),
        torch.randn(5, *x.shape, dtype=x.dtype),
        torch.randn(5, 4, dtype=w.dtype),
    )
    same(lambda g: f.vmap(g, (0, 0, 0))(xs, ws, bs))
    same(lambda g: f.vmap(g, (None, 0, None))(x, ws, b))
    same(lambda g: f.vmap(f.grad(lambda *a: g(*a).square().sum(), (0, 1, 2)), (0, None, None))(xs, w, b))
    same(lambda g: f.vmap(f.grad(lambda *a: g(*a).square().sum(), (0, 1, 2)), (0, 0, 0))(xs, ws, bs))
    each = torch.stack([ids, ids.flip(0), ids.flip(1)])
    got = f.vmap(lambda i: fn(x, w, b, i))(each)
    torch.testing.assert_close(got, torch.stack([fn(x, w, b, i) for i in each]))


def test_compiled_and_exported():
    x, w, b, ids = problem("float32")
    leaves = [a.requires_grad_() for a in (x, w, b)]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    up = torch.randn(ids.shape)
    for make in (fn, compiled):
        out = make(x, w, b, ids)
        found = [out, *torch.autograd.grad(out, leaves, up)]
        if make is fn:
            truth = found
    for a, t in zip(found, truth, strict=True):
        torch.testing.assert_close(a, t)

    class At(torch.nn.Module):
        def forward(self, x: Any, w: Any, b: Any, ids: Any) -> Any:
            return fn(x, w, b, ids)

    program = torch.export.export(At(), (x.detach(), w.detach(), b.detach(), ids))
    assert "softmax_ext" not in str(program.graph)
    torch.testing.assert_close(program.module()(x.detach(), w.detach(), b.detach(), ids), truth[0])


def test_kernels_pass_opcheck():
    x, w, _, ids = problem("float32", (5,))
    ids = ids.clamp(min=-1)
    c = torch.randn(ids.shape)
    for op, args in (
        (native.ops.picked_fwd, (x, w, ids)),
        (native.ops.picked_input_bwd, (c, w, ids, None, None, True)),
        (native.ops.picked_weight_bwd, (c, x, ids, 11, None, None, False)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_ids_of_no_class(served):
    x, w, _, ids = problem("float32")
    ids[1, 2, 1] = 11
    with pytest.raises(
        IndexError, match=r"^linear_at: ids must be in \[0, 11\) or ignore_index \(-100\); got 11 at row 7\.$"
    ):
        OPS.linear_at(x, w, ids)
    z = torch.func.vmap(lambda i: OPS.linear_at(x[0], w, i))(ids)  # where nobody can look
    assert z.isnan().nonzero().tolist() == [[1, 2, 1]]
    loss = lambda x, w, i: OPS.linear_at(x, w, i).masked_fill(i == -100, 0.0).sum()  # noqa: E731
    dx, dw = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None, 0))(x, w, ids)
    assert dx.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert dw.isfinite().all()


def test_ids_of_every_integer_type():
    x, w, _, ids = problem("float32", (5,))
    truth = OPS.linear_at(x, w, ids)
    for kind in (torch.int8, torch.int16, torch.int32):
        assert torch.equal(OPS.linear_at(x, w, ids.to(kind)), truth)
    small = torch.tensor([[156, 3]] * 5, dtype=torch.uint8)
    with pytest.raises(IndexError):
        OPS.linear_at(x, w, small)  # 156 is not -100
    assert torch.equal(OPS.linear_at(x, w, small, ignore_index=156)[:, 0], torch.full((5,), -torch.inf))


def test_a_slot_without_a_class_reads_nothing(served):
    x, w, _, ids = problem("float32", (5,))
    x[2], ids[2] = torch.nan, -100
    w[4] = torch.nan
    ids[ids == 4] = 5
    x.requires_grad_()
    w.requires_grad_()
    z = OPS.linear_at(x, w, ids)
    z.masked_fill(ids == -100, 0.0).sum().backward()
    assert (z[2] == -torch.inf).all()
    assert (x.grad[2] == 0).all()
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()


def test_what_it_is_for():
    x, w, _, ids = problem("float64", (5,))
    whole = torch.log_softmax(x @ w.T, -1).gather(1, ids.clamp(min=0)).masked_fill(ids == -100, -torch.inf)
    torch.testing.assert_close(OPS.log_softmax(OPS.linear_at(x, w, ids)), torch.log_softmax(whole, -1))
    place = torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(
        OPS.cross_entropy(OPS.linear_at(x, w, ids), place),
        torch.nn.functional.cross_entropy(
            (x @ w.T).gather(1, ids.clamp(min=0)).masked_fill(ids == -100, -torch.inf), place
        ),
    )


def test_autocast():
    x, w, b, ids = problem("float32")
    with torch.autocast("cpu", torch.bfloat16):
        got = OPS.linear_at(x, w, ids, linear_bias=b)
    half = [a.bfloat16() for a in (x, w, b)]
    assert torch.equal(got, OPS.linear_at(half[0], half[1], ids, linear_bias=half[2]))


@pytest.mark.parametrize("native_too", [True, False])
def test_no_array_of_rows_times_classes_times_features(native_too, monkeypatch):
    if not native_too:
        monkeypatch.setattr(rows, "_serving", lambda *_: None)
        monkeypatch.setattr(rows, "_WORKSPACE", 1 << 16)
    N, K, D, V = 64, 32, 96, 50  # all rows at all classes: 768 KiB
    x, w, _, ids = problem("float32", (N,), D, V, K)
    x.requires_grad_()
    w.requires_grad_()
    with Largest() as seen:
        OPS.linear_at(x, w, ids).masked_fill(ids == -100, 0.0).sum().backward()
    assert 0 < seen.bytes <= 1 << 16


MISTAKES = {
    "linear_at: input must have type float16, bfloat16, float32 or float64; got int64.": lambda x, w, b, i: (i, w, i),
    "linear_at: linear_weight must have the input's type float32; got float64.": lambda x, w, b, i: (x, w.double(), i),
    "linear_at: linear_weight must have 2 dimensions, the last 7 (the input's); got (11, 6).": lambda x, w, b, i: (
        x, w[:, :6], i),
    "linear_at: ids must have an integer type; got float32.": lambda x, w, b, i: (x, w, i.float()),
    "linear_at: ids must have shape (2, 5, K); got (10, 4).": lambda x, w, b, i: (x, w, i.reshape(10, 4)),
}  # fmt: skip


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes(sentence):
    with pytest.raises((TypeError, ValueError)) as error:
        OPS.linear_at(*MISTAKES[sentence](*problem("float32")))
    assert str(error.value) == sentence
    with pytest.raises(ValueError, match="linear_bias must have shape"):
        OPS.linear_at(*problem("float32")[:2], problem("float32")[3], linear_bias=torch.zeros(3))
    with pytest.raises(TypeError, match="ignore_index must be a Python integer"):
        OPS.linear_at(*problem("float32")[:2], problem("float32")[3], ignore_index=1.5)  # pyright: ignore
