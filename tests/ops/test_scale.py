"""A scale that is an array, one or one a row: values and gradients against the reference, to every order."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import torch_ops
from softmax_ext import reference
from tests.judging import cases, checks
from tests.judging.cases import DTYPES, INF, NAN
from tests.judging.frameworks import Named, each, only
from torch_ops._rules import scaled, scaled_pieces

V = 33
KINDS = ("hard", "soft", "weights", "cap", "smooth", "small")
OPTIONS: dict[str, dict[str, Any]] = {
    "weights": {"reduction": "mean", "z_loss": 1e-6},
    "cap": {"softcap": 20.0, "label_smoothing": 0.1, "z_loss": 0.01},
    "smooth": {"label_smoothing": 0.3, "reduction": "sum"},
}


FEW = [
    ("float64", "cap", "rows"),
    ("float32", "hard", "rows"),
    ("float32", "soft", "one"),
    ("bfloat16", "smooth", "rows"),
]


def problem(dtype: str, kind: str, shape: str) -> tuple[Named, Named, dict[str, Any]]:
    """(arrays, upstream, options) of loud rows and their scales."""
    r = cases.rows(V, dtype)
    n = len(r.x)
    s = np.linspace(0.3, 2.0, n) if shape == "rows" else np.asarray(1.7)
    if kind == "small":  # where nll - H would cancel
        s = s / 64
    soft = kind in ("soft",)
    arrays: Named = {"input": r.x, "target": cases.soft(V, dtype, n) if soft else r.target}
    arrays["logit_scale"] = cases.rounded(s, dtype)
    if kind in ("weights", "smooth", "cap"):
        arrays["weight"] = cases.class_weight(V, dtype)
        arrays["token_weight"] = cases.token_weight(n, dtype)
    options = {"reduction": "none", **OPTIONS.get(kind, {})}
    return arrays, {"value": r.dloss if options["reduction"] == "none" else 1.5}, options


def judged(fw: Any, dtype: str, arrays: Named, upstream: Named, **options: Any) -> None:
    truth = checks.oracle("cross_entropy", arrays, upstream, **options)
    size = checks.scales("cross_entropy", arrays, upstream, dtype=dtype, **options)
    checks.judge("cross_entropy", dtype, fw("cross_entropy", dtype, arrays, upstream, **options), truth, size)


@each(("dtype", "kind", "shape"), torch=product(DTYPES, KINDS, ("one", "rows")), jax=FEW)
def test_values_and_gradients(fw, dtype, kind, shape):
    arrays, upstream, options = problem(dtype, kind, shape)
    judged(fw, dtype, arrays, upstream, **options)


@only("torch")
@pytest.mark.parametrize("statistic", ["lse", "entropy", "logprob"])
def test_statistics_move_with_the_scale(fw, statistic):
    arrays, upstream, options = problem("float32", "hard", "rows")
    r = np.random.default_rng(2)
    upstream |= {statistic: r.standard_normal(len(arrays["target"])).astype(np.float32)}
    judged(fw, "float32", arrays, upstream, **options, stats=(statistic,))


@only("torch")
@pytest.mark.parametrize("kind", ["hard", "soft", "weights", "smooth"])
def test_frozen_logits_are_not_visited_again(fw, kind, monkeypatch):
    """dL/ds comes from nll, lse, smooth and H: the backward runs no row function."""
    arrays, upstream, options = problem("float32", kind, "rows")
    some = slice(0, 10)  # mass on a masked class hides what the other classes add, a row of equal logits all of it
    arrays = {k: v if k == "weight" else v[some] for k, v in arrays.items()}
    upstream = {k: v if np.ndim(v) == 0 else v[some] for k, v in upstream.items()}
    truth = checks.oracle("cross_entropy", arrays, upstream, **options)[1]["logit_scale"]
    size = checks.scales("cross_entropy", arrays, upstream, dtype="float32", **options)[1]["logit_scale"]
    given = {k: fw.array(v, "float32") for k, v in arrays.items()}
    s = given["logit_scale"].requires_grad_()
    loss = torch_ops.cross_entropy(given.pop("input"), **given, **options)

    def visited(*_: Any, **__: Any) -> Any:
        raise AssertionError("the rows are visited again")

    monkeypatch.setattr(scaled.rows, "cross_entropy_bwd", visited)
    monkeypatch.setattr(scaled.rows, "cross_entropy_fwd", visited)
    (found,) = torch.autograd.grad(loss, s, torch.tensor(upstream["value"], dtype=torch.float32))
    # of numbers of their own, as a row's sum of x: nll and H, over s
    p, logp = (f(arrays["logit_scale"][:, None] * arrays["input"]) for f in (reference.softmax, reference.log_softmax))
    with np.errstate(all="ignore"):
        h = np.where(p > 0, -p * logp, 0).sum(1)
    size = size + 3 * np.abs(upstream["value"]) * (h + 1) / arrays["logit_scale"]
    checks.close(found.numpy(), truth, size, dtype="float32", c=8.0, what="scale")
    x = fw.array(arrays["input"], "float32").requires_grad_()
    with pytest.raises(AssertionError, match="visited again"):
        torch_ops.cross_entropy(x, **given, **options)


@pytest.mark.parametrize("kind", ["value", "sign", "one row", "no row", "of x"])
def test_wrong_scale_gradients_are_rejected(kind: str) -> None:
    arrays, upstream, options = problem("float32", "hard", "rows")
    values, grads = checks.oracle("cross_entropy", arrays, upstream, **options)
    size = checks.scales("cross_entropy", arrays, upstream, dtype="float32", **options)
    checks.judge("cross_entropy", "float32", (values, grads), (values, grads), size)
    s = grads["logit_scale"]
    wrong = {
        "value": s * 1.0001,
        "sign": -s,
        "one row": np.roll(s, 1),
        "no row": s * 0,
        "of x": s * arrays["logit_scale"],
    }
    with pytest.raises(AssertionError):
        checks.judge("cross_entropy", "float32", (values, {**grads, "logit_scale": wrong[kind]}), (values, grads), size)


X = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
S = torch.linspace(0.4, 1.6, 5, dtype=torch.float64)
T = torch.tensor([0, 6, -100, 3, 2])


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("one", [False, True])
def test_every_derivative(cap: float | None, one: bool) -> None:
    x, s = X[1:4, :4].clone().requires_grad_(), (S[3] if one else S[1:4]).clone().requires_grad_()
    target = torch.tensor([0, -100, 3])

    def f(x: Any, s: Any) -> Any:
        loss, stats = torch_ops.cross_entropy(
            x, target, logit_scale=s, softcap=cap, label_smoothing=0.1, z_loss=0.1, stats=("entropy",)
        )
        return loss, stats["entropy"]

    assert gradcheck(f, (x, s), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, (x, s), check_fwd_over_rev=True, fast_mode=True)
    one_at_a_time = torch.func.vmap(
        torch.func.grad(lambda x, s, t: torch_ops.cross_entropy(x, t, logit_scale=s), (0, 1))
    )
    xs, ss, ts = torch.stack([x, 2 * x]), torch.stack([s, s + 0.3]), torch.stack([target, target.flip(0)])
    for i, (dx, ds) in enumerate(zip(*one_at_a_time(xs, ss, ts), strict=True)):
        want = torch.autograd.grad(torch_ops.cross_entropy(xs[i], ts[i], logit_scale=ss[i]), (xs, ss))
        torch.testing.assert_close((dx, ds), (want[0][i], want[1][i]))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for found, want in zip(compiled(x, s), f(x, s), strict=True):
        torch.testing.assert_close(found, want)
        for a, b in zip(*(torch.autograd.grad(v.sum(), (x, s), retain_graph=True) for v in (found, want)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["middle", "last", "alone", "many pieces"])
def test_any_shape_by_any_piece(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if layout == "many pieces":
        monkeypatch.setattr(scaled_pieces, "_PIECE", 20)
    shape = {"middle": (4, 7, 3), "last": (1, 7, 6), "alone": (7,), "many pieces": (6, 7, 2)}[layout]
    g = torch.Generator().manual_seed(2)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    x = torch.randn(shape, dtype=torch.float64, generator=g).requires_grad_()
    s = (0.2 + torch.rand(rows, dtype=torch.float64, generator=g)).requires_grad_()
    t = torch.randint(7, rows, generator=g)
    each: list[dict[str, Any]] = [{}, {"softcap": 3.0}, {"inplace_backward": True}]
    for options in each:
        found = torch_ops.cross_entropy(1.0 * x, t, logit_scale=s, **options)
        options.pop("inplace_backward", None)
        product = x * (s.unsqueeze(1) if len(shape) > 1 else s)
        want = torch_ops.cross_entropy(product, t, **options)
        torch.testing.assert_close(found, want)
        for a, b in zip(*(torch.autograd.grad(v, (x, s)) for v in (found, want)), strict=True):
            torch.testing.assert_close(a, b)


def test_sparse_pairs_and_data() -> None:
    """A masked logit stays masked and moves nothing; ignored rows reach no result, NaN in both arrays included."""
    x = torch.tensor([[1.0, -INF, 2.0], [NAN] * 3, [1.0, 2.0, 3.0], [INF, 0.0, 0.0]], requires_grad=True)
    s = torch.tensor([1.0, NAN, 0.1, 1.0], requires_grad=True)
    ids = torch.tensor([[0, 1], [-100, -100], [2, 0], [0, -100]])
    y = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.3, 0.6], [1.0, NAN]])
    each: list[dict[str, Any]] = [{}, {"softcap": 2.0}]
    for target in (torch.tensor([0, -100, 2, 1]), (ids, y)):
        for options in each:
            loss = torch_ops.cross_entropy(x, target, logit_scale=s, reduction="none", **options)
            assert loss.isnan().tolist() == [False, False, False, not options]  # a cap bounds +inf
            dx, ds = torch.autograd.grad(loss[:3].sum(), (x, s))
            assert ds[1] == 0 == dx[1].abs().sum()
            assert dx[0, 1] == 0
            plain = torch.where(x.detach() == -INF, x.detach(), x.detach() * s.detach().unsqueeze(1)).requires_grad_()
            want = torch.autograd.grad(
                torch_ops.cross_entropy(plain, target, reduction="none", **options)[:3].sum(), plain
            )[0]
            held = torch.nan_to_num(x.detach(), 0.0, 0.0, 0.0)
            torch.testing.assert_close(ds[:3], (want * held).sum(1)[:3])
    turned = torch_ops.cross_entropy(x[:1], torch.tensor([0]), logit_scale=-s[:1].detach())
    torch.testing.assert_close(turned, torch.logaddexp(torch.tensor(-1.0), torch.tensor(-2.0)) + 1.0)


def test_a_module_learns_its_scale() -> None:
    scale = torch.nn.Parameter(torch.tensor(2.0))
    module = torch_ops.nn.CrossEntropyLoss(logit_scale=scale, label_smoothing=0.1)
    assert [*module.state_dict()] == ["logit_scale"]
    assert repr(module) == "CrossEntropyLoss(label_smoothing=0.1)"
    module(X.float(), T).backward()
    want = torch.autograd.grad(torch_ops.cross_entropy(X.float(), T, logit_scale=scale, label_smoothing=0.1), scale)[0]
    torch.testing.assert_close(scale.grad, want)
    fixed = torch_ops.nn.LinearCrossEntropyLoss(7, 9, logit_scale=torch.tensor(2.0)).double()
    assert fixed.logit_scale.dtype == torch.float64
    assert "logit_scale" not in fixed.state_dict()
    number = torch_ops.nn.LinearCrossEntropyLoss(7, 9, logit_scale=2.0).double()
    number.load_state_dict(fixed.state_dict())
    torch.testing.assert_close(fixed(X, T), number(X, T))
    with pytest.raises(TypeError, match="logit_scale must have type float16"):
        torch_ops.nn.CrossEntropyLoss(logit_scale=torch.tensor(2))


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("one", [False, True])
def test_divergences(kind: Any, one: bool) -> None:
    """Of rows, and of two heads with a bias and a shift; a row that is not kept may hold NaN."""
    g = torch.Generator().manual_seed(4)
    mk = lambda *n: torch.randn(*n, dtype=torch.float64, generator=g).requires_grad_()  # noqa: E731
    x, w, b, s = (
        mk(2, 5, 3),
        mk(7, 3),
        mk(7),
        (0.5 + torch.rand(() if one else (2, 5), dtype=torch.float64)).requires_grad_(),
    )
    tx, tw = mk(2, 5, 4).detach(), mk(7, 4).detach()
    of_row = s if one else s.unsqueeze(-1)
    z = (x @ w.t() + b) * of_row
    found = torch_ops.linear_divergence(x, w, tx, tw, linear_bias=b, logit_scale=s, kind=kind, shift=1)
    want = torch_ops.divergence(z[:, :-1], (tx @ tw.t())[:, :-1], kind=kind)
    rows = torch_ops.divergence(
        (x @ w.t() + b)[:, :-1], (tx @ tw.t())[:, :-1], kind=kind, logit_scale=s if one else s[:, :-1]
    )
    leaves = (x, w, b, s)
    second = []
    for value in (found, rows, want):
        torch.testing.assert_close(value, want)
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        second.append((grads, torch.autograd.grad(torch.stack([g.sin().sum() for g in grads]).sum(), leaves)))
    for other in second[:2]:
        torch.testing.assert_close(other, second[2])
    spoilt, keep = x.detach().clone(), torch.ones(2, 5, dtype=torch.bool)
    spoilt[0, 1], keep[0, 1] = NAN, False
    spoilt.requires_grad_()
    loss = torch_ops.linear_divergence(spoilt, w, tx, tw, linear_bias=b, logit_scale=s, kind=kind, keep=keep)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (spoilt, w, b, s)))
