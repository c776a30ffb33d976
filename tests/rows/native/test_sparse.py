"""The native cross-entropy of K classes a row against the reference: layouts, types, options, masked and odd ids."""

import numpy as np
import pytest
import torch

from softmax_ext import reference
from tests.judging import checks
from tests.rows.native.formulas import LEVELS
from torch_ops._rows import native

ops = native.ops
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = [((5,), 40, (), 3), ((3,), 300, (), 7), ((2,), 50, (20,), 4), ((2,), 200, (3,), 5), ((70,), 9, (), 20),
           ((1,), 6, (17,), 2), ((2,), 5, (), 0)]  # fmt: skip
OPTIONS = [{}, {"scale": 0.7}, {"cap": 3.0, "weight": True, "smooth": True, "entropy": True}]


@pytest.fixture(params=LEVELS, ids=["avx512", "avx2", "base"], autouse=True)
def level(request):
    if native.limit_instruction_set(request.param) != request.param:
        pytest.skip("this CPU lacks the instruction set")
    yield request.param
    native.limit_instruction_set(-1)


def problem(dtype, lead, V, inner, K):
    g = torch.Generator().manual_seed(V + K)
    x = (3 * torch.randn(*lead, V, *inner, generator=g, dtype=torch.float64)).to(dtype)
    x.movedim(1, -1)[0, ..., 0] = 40.0  # confident rows
    x.movedim(1, -1)[-1, ..., 1] = -torch.inf
    ids = torch.randint(-1, V, (*lead, K, *inner), generator=g)
    if K > 1:
        ids.movedim(1, -1)[0, ..., :2] = 0  # twice the class that holds nearly everything
        ids.movedim(1, -1)[-1, ..., 0] = 1
        if lead[0] > 2:
            ids[1] = -1  # an ignored row
    return x, ids, g


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cross_entropy_of_k_classes(layout, dtype, option):
    x, ids, g = problem(dtype, *layout)
    V, kind = x.shape[1], torch.promote_types(dtype, torch.float32)
    scale, cap = option.get("scale", 1.0), option.get("cap")
    smooth, entropy = option.get("smooth", False), option.get("entropy", False)
    w = torch.rand(V, generator=g).to(kind) if option.get("weight") else None
    static = (1, scale, cap)
    out = ops.cross_entropy_fwd(x, ids, w, *static, smooth, entropy)
    m, rest = out[-2:]
    named = dict(zip(["nll", "lse", *["smooth"] * smooth, *["entropy"] * entropy], out, strict=False))
    ups = {n: torch.randn(v.shape, generator=g, dtype=torch.float64).to(kind) for n, v in named.items()}
    given = [ups.get(n) for n in ("nll", "lse", "smooth", "entropy")]

    names = ("lse", "logprob", "entropy")
    target, weight = (ids.numpy(), np.zeros(ids.shape)), None if w is None else w.double().numpy()
    options = {"logit_scale": scale, "softcap": cap, "ignore_index": -1, "stats": names, "reduction": "none"}
    options |= {"label_smoothing": 1.0} if smooth else {}
    loss, stats = reference.cross_entropy(x.double().numpy(), target, weight, axis=1, **options)
    dstats = {"logprob": -ups["nll"].double().numpy(), "lse": ups["lse"].double().numpy()}
    dstats |= {"entropy": ups["entropy"].double().numpy()} if entropy else {}
    dloss = V * ups["smooth"].double().numpy() if smooth else np.zeros(loss.shape)
    grad = reference.cross_entropy_grad(
        x.double().numpy(), target, weight, axis=1, dloss=dloss, dstats=dstats, **options
    )

    name = str(dtype).removeprefix("torch.")
    size = np.abs(np.where(np.isfinite(x.double().numpy()), x.double().numpy(), 0)).max(1)
    nll = np.where(ids.numpy() == -1, 0, -stats["logprob"])
    masked = nll == np.inf
    loose = size[:, None] if option else 0.0  # a scaled or capped logit is rounded
    checks.close(named["nll"].numpy(), np.where(masked, -1, nll), np.abs(np.where(masked, 1, nll)) + loose,
                 dtype=str(kind)[6:], c=8)  # fmt: skip
    checks.close(named["lse"].numpy(), stats["lse"], np.abs(stats["lse"]) + size, dtype=str(kind)[6:], c=8)
    if smooth:
        truth = np.where((ids >= 0).any(1).numpy(), V * loss, 0)
        checks.close(named["smooth"].numpy(), truth, np.abs(truth) + size * V, dtype=str(kind)[6:], c=8)

    p = reference.softmax(np.moveaxis(_z(x, scale, cap), 1, -1))
    a = np.zeros(p.shape)
    kept = np.moveaxis(ids.numpy(), 1, -1)
    up = np.moveaxis(np.abs(ups["nll"].double().numpy()), 1, -1)
    for at in np.ndindex(kept.shape):
        if kept[at] >= 0:
            a[(*at[:-1], kept[at])] += up[at]
    total = a.sum(-1, keepdims=True) + np.abs(ups["lse"].double().numpy())[..., None]
    q = (p.sum(-1, keepdims=True) - p) if option else np.moveaxis(_rest(x, scale, cap), 1, -1)
    bound = (total - a) * p + a * q
    if smooth:
        bound = bound + np.abs(ups["smooth"].double().numpy())[..., None] * (V * p + 1) + total * size[..., None] * p
    if entropy:
        bound = bound + np.abs(ups["entropy"].double().numpy())[..., None] * p * 30 * (1 + size[..., None])
    if option:
        bound = bound + (a + total * p) * (1 + size[..., None])
    bound = np.moveaxis(bound, -1, 1)
    found = ops.cross_entropy_bwd(x, ids, w, m, rest, *given, *static)
    checks.close(found.double().numpy(), grad, bound, dtype=name, c=10)
    over = x.clone()
    again = ops.cross_entropy_fwd_bwd_(over, ids, w, *given, *static, smooth, entropy)
    assert all(torch.equal(b, c) for b, c in zip(out, again, strict=True))
    checks.close(over.double().numpy(), grad, bound, dtype=name, c=10)


def _z(x, scale, cap):
    z = scale * x.double().numpy()
    return z if cap is None else np.where(np.isneginf(z), z, cap * np.tanh(z / cap))


def _rest(x, scale, cap):
    """1 - p without a subtraction."""
    z = np.moveaxis(_z(x, scale, cap), 1, -1)
    e = np.exp(z - z.max(-1, keepdims=True))
    zero = np.zeros_like(e[..., :1])
    before = np.concatenate([zero, np.cumsum(e[..., :-1], -1)], -1)
    after = np.concatenate([np.cumsum(e[..., :0:-1], -1)[..., ::-1], zero], -1)
    return np.moveaxis((before + after) / e.sum(-1, keepdims=True), -1, 1)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
def test_ids_of_no_class_make_their_row_nan_and_no_other(kind):
    x, g = torch.randn(4, 200), torch.ones(4, 3)
    ids = torch.tensor([[1, 2, -1], [5, 200, 7], [-2, -1, -1], [3, 3, 3]], dtype=kind)
    out = ops.cross_entropy_fwd(x, ids, None, 1, 1.0, None, False, False)
    assert out[0].isnan().tolist() == [[False] * 3, [False, True, False], [True, False, False], [False] * 3]
    assert out[1].isfinite().all()
    found = ops.cross_entropy_bwd(x, ids, None, *out[-2:], g, None, None, None, 1, 1.0, None)
    assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == [False, True, True, False]


def test_what_an_ignored_slot_holds_is_not_read():
    x = torch.randn(3, 9)
    x[1] = torch.nan
    ids = torch.tensor([[1, -1], [-1, -1], [4, -1]])
    up = torch.tensor([[1.0, torch.nan], [torch.nan, torch.inf], [2.0, torch.inf]])
    out = ops.cross_entropy_fwd(x, ids, None, 1, 1.0, None, False, False)
    assert out[0][:, 1].tolist() == [0, 0, 0]
    assert out[1][1] == 0
    found = ops.cross_entropy_bwd(x, ids, None, *out[-2:], up, None, None, None, 1, 1.0, None)
    assert found.isfinite().all()
    assert (found[1] == 0).all()


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("other", [1e-6, 1e-13, 1e-20])
@pytest.mark.parametrize("layout", [((5,), 40, ()), ((3,), 300, ()), ((2,), 50, (20,)), ((2,), 200, (3,))], ids=str)
def test_a_small_term_beside_a_confident_target_keeps_its_digits(layout, other, dtype):
    """(A - a_t) p_t - a_t q_t, where A - a_t is another class's mass, or the upstream of lse: no difference of sums."""
    lead, V, inner = layout
    x = torch.zeros(*lead, V, *inner, dtype=dtype)
    x[:, 7] = 60.0
    w = np.exp(-60.0)
    p, q = 1 / (1 + (V - 1) * w), (V - 1) * w / (1 + (V - 1) * w)
    ids = torch.full((*lead, 4, *inner), -1)
    ids[:, 0], ids[:, 1], ids[:, 3] = 7, 3, 3
    up = torch.zeros(ids.shape, dtype=dtype)
    up[:, 0], up[:, 1], up[:, 3] = 0.7, other, other / 2
    m, rest = ops.cross_entropy_fwd(x, ids, None, 1, 1.0, None, False, False)[-2:]
    own, mass = float(up[:, 0].flatten()[0]), float(up[:, 1].flatten()[0]) + float(up[:, 3].flatten()[0])
    bound = 8 * (2.0**-53 if dtype == torch.float64 else 2.0**-24) * (mass * p + own * q)
    found = ops.cross_entropy_bwd(x, ids, None, m, rest, up, None, None, None, 1, 1.0, None)
    assert (found[:, 7].double() - (mass * p - own * q)).abs().max() <= bound
    over = x.clone()
    ops.cross_entropy_fwd_bwd_(over, ids, None, up, None, None, None, 1, 1.0, None, False, False)
    assert (over[:, 7].double() - (mass * p - own * q)).abs().max() <= bound
    # one target, and a z-loss's upstream beside it
    d_nll, d_lse = up[:, 0].contiguous(), (up[:, 1] + up[:, 3]).contiguous()
    mass = float(d_lse.flatten()[0])
    found = ops.cross_entropy_bwd(x, ids[:, 0].contiguous(), None, m, rest, d_nll, d_lse, None, None, 1, 1.0, None)
    assert (found[:, 7].double() - (mass * p - own * q)).abs().max() <= bound
