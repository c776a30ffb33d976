"""log_sum_sq, mean_logit and rank of each row, of logits and of a head: values, gradients, every order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import torch_ops
from softmax_ext import reference
from tests.head.problems import MEMORY
from tests.judging import cases, checks
from tests.judging.cases import DTYPES, INF, NAN
from tests.judging.frameworks import Named, each

FLOATS = ("log_sum_sq", "mean_logit")
MORE = (*FLOATS, "rank")
FEW = [("float32", "plain"), ("bfloat16", "cap"), ("float64", "scale")]


@each(("dtype", "name"), torch=[(d, n) for d in DTYPES for n in ("plain", "scale", "cap")], jax=FEW)
def test_values_and_gradients(fw, dtype, name):
    r = cases.rows(33, dtype)
    options: dict[str, Any] = {**cases.OPTIONS[name], "reduction": "none", "stats": MORE}
    arrays: Named = {"input": r.x, "target": r.target}
    rng = np.random.default_rng(1)
    none = np.zeros(len(r.x))  # in half precision two gradients of the logits would be rounded apart
    upstream: Named = {"value": none, **{k: rng.standard_normal(len(r.x)).astype(np.float32) for k in FLOATS}}
    truth = checks.oracle("cross_entropy", arrays, upstream, **options)
    size = checks.scales("cross_entropy", arrays, upstream, dtype=dtype, **options)
    answer = fw("cross_entropy", dtype, arrays, upstream, **options)
    checks.judge("cross_entropy", dtype, answer, truth, size)
    for wrong in (
        {"log_sum_sq": truth[0]["lse" if "lse" in truth[0] else "mean_logit"]},
        {"rank": answer[0]["rank"] + 1},
    ):
        with pytest.raises(AssertionError):
            checks.judge("cross_entropy", dtype, ({**answer[0], **wrong}, answer[1]), truth, size)
    other = checks.oracle("cross_entropy", arrays, {"value": none}, **options)
    with pytest.raises(AssertionError):
        checks.judge("cross_entropy", dtype, (answer[0], other[1]), truth, size)


@each(("dtype",), torch=[("float64",), ("float32",)], jax=[("float32",)])
def test_a_confident_row_keeps_both(fw, dtype):
    """log sum p^2 of a row whose other classes have e^-60 together: -2 of that, and so its gradient."""
    x = np.array([[0.0, 60.0, 0.0, 0.0, 0.0]])
    values, grads = fw(
        "cross_entropy",
        dtype,
        {"input": x, "target": np.array([1])},
        {"log_sum_sq": np.ones(1)},
        stats=("log_sum_sq",),
        reduction="none",
    )
    tiny = np.exp(-60.0)
    np.testing.assert_allclose(values["log_sum_sq"], [-8 * tiny], rtol=1e-6)
    np.testing.assert_allclose(grads["input"], [[-2 * tiny, 8 * tiny, *[-2 * tiny] * 3]], rtol=1e-6)


@each(("memory",), torch=[("fast",), ("lean",)], jax=[("fast",), ("lean",)])
def test_of_a_head(fw, memory):
    """As of its logits; an ignored row's are 0 and -1, whatever it holds."""
    r = np.random.default_rng(3)
    x, w, b = r.standard_normal((9, 4)), r.standard_normal((13, 4)), r.standard_normal(13)
    target = r.integers(0, 13, 9)
    target[2] = -100
    x[2] = NAN
    ups = {k: r.standard_normal(9) for k in FLOATS}
    options: dict[str, Any] = {"reduction": "none", "stats": MORE, "softcap": 3.0, "logit_scale": 1.3}
    head: Named = {"input": x, "linear_weight": w, "target": target, "linear_bias": b}
    values, grads = fw("linear_cross_entropy", "float64", head, ups, **options, memory=memory, chunk_size=4)
    z = np.where(np.isnan(x), 0, x) @ w.T + b
    _, stats = reference.cross_entropy(z, target, **options)
    for name in MORE:
        np.testing.assert_allclose(values[name], stats[name], rtol=1e-11, atol=1e-13, err_msg=name)
    g = reference.cross_entropy_grad(z, target, dloss=0.0, dstats=ups, **options)
    found = {"input": g @ w, "linear_weight": g.T @ np.where(np.isnan(x), 0, x), "linear_bias": g.sum(0)}
    for name, right in found.items():
        np.testing.assert_allclose(grads[name], right, rtol=1e-9, atol=1e-12, err_msg=name)
    assert values["rank"][2] == -1


@each(("soft",), torch=[(False,), (True,)], jax=[(False,), (True,)])
def test_data(fw, soft):
    """Rows without a distribution are NaN; NaN is the largest logit; masked classes take no part but in the mean."""
    x = np.array([[1.0, -INF, 2.0, 0.5], [-INF] * 4, [NAN, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    target: Any = np.full((4, 4), 0.25) if soft else np.array([0, 1, 1, 2])
    names = FLOATS if soft else MORE
    values, _ = fw("cross_entropy", "float32", {"input": x, "target": target}, reduction="none", stats=names)
    assert np.isnan(values["log_sum_sq"]).tolist() == [False, True, True, False]
    p = reference.softmax(x[[0, 3]])
    np.testing.assert_allclose(values["log_sum_sq"][[0, 3]], np.log((p * p).sum(1)), rtol=1e-6)
    np.testing.assert_array_equal(values["mean_logit"], np.array([-INF, -INF, NAN, 0.75]))
    if not soft:
        np.testing.assert_array_equal(values["rank"], [1, 0, 2, 0])


@pytest.mark.parametrize("memory", ["logits", *MEMORY])
def test_every_derivative(memory: Any) -> None:
    g = torch.Generator().manual_seed(0)
    mk = lambda *n: torch.randn(*n, dtype=torch.float64, generator=g).requires_grad_()  # noqa: E731
    target, how = torch.tensor([1, -100, 3]), {"softcap": 3.0, "stats": FLOATS, "reduction": "none"}

    def f(x: Any, w: Any) -> Any:
        if memory == "logits":
            _, stats = torch_ops.cross_entropy(x @ w.t(), target, **how)
        else:
            _, stats = torch_ops.linear_cross_entropy(x, w, target, **how, memory=memory, chunk_size=2)
        return tuple(stats.values())

    args = (mk(3, 2), mk(4, 2))
    assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(f, args, check_fwd_over_rev=True, fast_mode=True)
    compiled: Any = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), f(*args))
    one: Any = torch.func.vmap(torch.func.grad(lambda x, w: f(x, w)[0].sum()), in_dims=(0, None))
    x = torch.stack([args[0], 2 * args[0]]).detach()
    torch.testing.assert_close(
        one(x, args[1].detach())[1], torch.func.grad(lambda x, w: f(x, w)[0].sum())(x[1], args[1].detach())
    )


def test_ranks_of_a_pair_and_of_no_class() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    ids = torch.tensor([[0, 3, -100], [2, 2, 0]])
    pair = (ids, torch.ones(2, 3))
    for stats in (
        torch_ops.cross_entropy(x, pair, stats=("rank",))[1],
        torch_ops.linear_cross_entropy(x, torch.eye(4), pair, stats=("rank",))[1],
    ):
        assert stats["rank"].tolist() == [[0, 3, -1], [1, 1, 3]]
    names: Any = ("rank",)
    with pytest.raises(ValueError, match="stats must not name 'rank' with class probabilities as targets; got 'rank'"):
        torch_ops.cross_entropy(x, torch.softmax(x, 1), stats=names)
