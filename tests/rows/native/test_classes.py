"""The native functions of K classes a row against the reference, through the PyTorch door: values, edges, bits."""

import itertools
import math

import numpy as np
import pytest
import torch

from softmax_ext import reference
from tests.judging import checks
from tests.rows.native.formulas import LEVELS
from torch_ops._rows import native

ops = native.ops
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAST = 1 - 2.0**-24  # the largest u there is
# Of the two thorough tests; the interpreter of the GPU's kernels has fewer.
STEPS, CLASSES = 4096, 300


@pytest.fixture(params=LEVELS, ids=["avx512", "avx2", "base"], autouse=True)
def level(request):
    if native.limit_instruction_set(request.param) != request.param:
        pytest.skip("this CPU lacks the instruction set")
    yield request.param
    native.limit_instruction_set(-1)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def near(ours, truth, scale, dtype, c):
    """Within c units of roundoff of `scale`, one more rounding where the result is of a half type."""
    checks.close(ours.double().numpy(), truth, scale, dtype=str(dtype).removeprefix("torch."), c=c)


def family(dtype, N, D, V, K):
    """x, W, ids with markers and repeats, c; and W[id] (N, K, D) in float64, 0 for no class."""
    g = torch.Generator().manual_seed(N + D + V + K)
    x, w = (torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (N, V))
    ids = torch.randint(-1, V, (N, K), generator=g)
    c = torch.randn(N, K, generator=g, dtype=torch.float64).to(wide(dtype))
    return x, w, ids, c, torch.where((ids >= 0)[..., None], w.double()[ids.clamp(min=0)], 0.0)


SHAPES = [(5, 7, 11, 3), (20, 64, 50, 9), (9, 129, 300, 70), (3, 1, 4, 1), (4, 5, 6, 0), (0, 5, 6, 2), (700, 17, 3, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_three_products(dtype, shape):
    x, w, ids, c, picked = family(dtype, *shape)
    _, D, V, _ = shape
    kind, depth = wide(dtype), 2.0 + math.sqrt(max(shape))
    terms = (x.double()[:, None] * picked).abs().sum(-1).numpy()
    z = ops.picked_fwd(x, w, ids)
    near(z, (x.double()[:, None] * picked).sum(-1).numpy(), terms, kind, depth)
    by, of_all = torch.linspace(-1, 1, max(len(x), V), dtype=kind), torch.linspace(1, 2, D, dtype=kind)
    for more, broad in itertools.product((False, True), repeat=2):
        row, col = (by[: len(x)], of_all) if more else (None, None)
        begin = torch.outer(row, col).double() if row is not None and col is not None else 0.0
        terms = c.double()[..., None] * picked
        found = ops.picked_input_bwd(c, w, ids.int(), row, col, broad)
        size = terms.abs().sum(1) + (begin.abs() if isinstance(begin, torch.Tensor) else 0.0)
        near(found, (terms.sum(1) + begin).numpy(), size.numpy(), kind if broad else dtype, depth)
        row = by[:V] if more else None
        begin = torch.outer(row, of_all).double() if row is not None else torch.zeros(V, D, dtype=torch.float64)
        terms = (c.double()[..., None] * x.double()[:, None]).reshape(-1, D)
        at = torch.where(ids < 0, V, ids).reshape(-1)
        truth, size = (
            torch.zeros(V + 1, D, dtype=torch.float64).index_add_(0, at, t)[:V] + b
            for t, b in ((terms, begin), (terms.abs(), begin.abs()))
        )
        found = ops.picked_weight_bwd(c, x, ids, V, row, col, broad)
        near(found, truth.numpy(), size.numpy(), kind if broad else dtype, 3 * depth)


def test_the_first_coefficient_is_that_of_all_leading_ids():
    _, w, ids, c, _ = family(torch.float32, 6, 33, 50, 9)
    x = torch.randn(6, 33)
    full = torch.cat([c[:, :1].expand(6, 6), c[:, 1:4]], 1)
    assert torch.equal(ops.picked_input_bwd(c[:, :4], w, ids, None, None, False),
                       ops.picked_input_bwd(full, w, ids, None, None, False))  # fmt: skip
    assert torch.equal(ops.picked_weight_bwd(c[:, :4], x, ids, 50, None, None, False),
                       ops.picked_weight_bwd(full, x, ids, 50, None, None, False))  # fmt: skip


def test_ids_of_no_class_are_nan_and_reach_no_weight():
    x, w, ids, c, _ = family(torch.float32, 4, 5, 6, 3)
    ids.clamp_(min=0)
    ids[1, 2], ids[2, 0], ids[3] = 6, -2, torch.tensor([2**62, -(2**62), -1])
    z = ops.picked_fwd(x, w, ids)
    bad = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0]]).bool()
    assert torch.equal(z.isnan(), bad)
    assert z[3, 2] == 0
    dx = ops.picked_input_bwd(c, w, ids, None, None, False)
    assert torch.equal(dx.isnan().all(1), bad.any(1))
    assert dx[0].isfinite().all()
    found = ops.picked_weight_bwd(c, x, ids, 6, None, None, False)
    assert torch.equal(found, ops.picked_weight_bwd(c, x, torch.where(bad, -1, ids), 6, None, None, False))
    assert found.isfinite().all()


def test_a_class_with_many_terms_keeps_its_digits():
    # one class takes 40,000 equal float32 terms: added one by one they round the same way every time
    x = torch.full((40_000, 3), 1.1)
    dw = ops.picked_weight_bwd(
        torch.full((40_000, 1), 0.7), x, torch.zeros(40_000, 1, dtype=torch.int32), 2, None, None, True
    )
    np.testing.assert_allclose(dw[0].double(), 40_000 * float(np.float32(1.1)) * float(np.float32(0.7)), rtol=3e-6)
    assert (dw[1] == 0).all()


def test_threads_change_no_bit():
    x, w, ids, c, _ = family(torch.float32, 300, 65, 90, 40)
    z = torch.randn(300, 9000)
    m = z.max(1)[0]
    rest, u = (z - m[:, None]).exp().sum(1) - 1, torch.rand(300, 16)

    def run():
        out = [ops.picked_fwd(x, w, ids), ops.picked_input_bwd(c, w, ids, None, None, True)]
        out += [ops.picked_weight_bwd(c, x, ids, 90, None, None, True)]
        return [*out, *ops.points(z, m, rest, ids[:, :1], u, None, 1.0, None), *ops.cross_entropy_fwd(
            z, ids, None, 1, 1.0, None, False, False)]  # fmt: skip

    threads, two = torch.get_num_threads(), run()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(run(), two, strict=True))
    finally:
        torch.set_num_threads(threads)


def points(z, excepted, u, span=None, cap=None):
    """ids and mass / total, from the row's own m and rest."""
    z, excepted, u = torch.as_tensor(z), torch.as_tensor(excepted), torch.as_tensor(u, dtype=torch.float32)
    *_, m, rest = ops.cross_entropy_fwd(z, torch.zeros(len(z), dtype=torch.int64), None, 1, 1.0, cap, False, False)
    ids, mass = ops.points(z, m, rest, excepted, u, span, 1.0, cap)
    return ids.numpy(), (mass.double().sum(1) / (1 + rest.double())).numpy()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("V", "K"), [(1, 3), (2, 5), (17, 100), (127, 4), (128, 7), (129, 1), (1000, 64), (4099, 16)])
def test_points(dtype, V, K):
    g = torch.Generator().manual_seed(V)
    z = (3 * torch.randn(6, V, generator=g, dtype=torch.float64)).to(dtype)
    z[1, : V // 2], z[2, V // 3 :] = -torch.inf, -torch.inf
    z[2, 0] = z[3, V // 2] = 30
    excepted = torch.randint(-1, V, (6, 2), generator=g)
    u = torch.rand(6, K, generator=g)
    u[0, 0], u[0, -1] = 0.0, LAST
    ids, q = points(z, excepted, u)
    truth, of = reference.points(z.double().numpy(), excepted.numpy(), u.double().numpy())
    has = (excepted >= 0).any(1).numpy()  # a row whose targets are all ignored has no points
    np.testing.assert_array_equal(ids[~has], -1)
    np.testing.assert_allclose(q[has], of[has], rtol=1e-6 if dtype != torch.float64 else 1e-14)
    # within rounding of an edge either class is right
    p = reference.softmax(z.double().numpy())
    for i, k in np.argwhere((ids != truth) & has[:, None]):
        p[i, [t for t in excepted[i].tolist() if t >= 0]] = 0
        sums = np.cumsum(p[i]) / p[i].sum()
        at = (k + u[i, k].item()) / K
        assert abs(at - sums[min(ids[i, k], truth[i, k])]) < 1e-6, (i, k, ids[i, k], truth[i, k])
    assert (ids[has] != truth[has]).mean() < 0.01


def test_every_point_falls_where_its_stratum_says():
    """The whole distribution, by going through each stratum in small steps: no average."""
    r = np.array([0.05, 0.0, 0.3, 0.15, 0.02, 0.48], np.float64)
    z = np.log(np.maximum(r, 0) * 0.25 + 1e-300).astype(np.float32)[None]
    z[0, 1] = -np.inf
    z = np.concatenate([z, [[np.log(0.75)]]], 1).astype(np.float32)  # the target, with three quarters of the mass
    steps, K = STEPS, 5
    grid = (np.arange(steps) + 0.5) / steps
    ids, q = points(np.repeat(z, steps, 0), np.full((steps, 1), 6), np.repeat(grid[:, None], K, 1))
    np.testing.assert_allclose(q, 0.25, rtol=1e-6)
    share = np.zeros((K, 7))
    for k in range(K):
        share[k] = np.bincount(ids[:, k], minlength=7) / steps
    edges = np.concatenate([[0], np.cumsum(r)])
    for k in range(K):  # the share of each class in each stratum is the length of their overlap
        overlap = np.clip(np.minimum(edges[1:], (k + 1) / K) - np.maximum(edges[:-1], k / K), 0, None) * K
        np.testing.assert_allclose(share[k, :6], overlap, atol=1.5 / steps)
    assert (share[:, 6] == 0).all()
    np.testing.assert_allclose(share.mean(0)[:6], r, atol=0.5 / steps)  # unbiased
    # Var sum_j r^_j f_j = 1/K^2 sum_k Var f in stratum k, at most Var_r f / K for any f; were all points of a row taken
    # at one u, there would be directions that break it: the last is the worst of all for this r
    directions = [*np.eye(7)[:6], np.arange(7.0), np.array([2.82, 0.0, 0.08, 1.38, -4.79, 0.5, 0.0])]
    for f in directions:
        bound = (r @ f[:6] ** 2 - (r @ f[:6]) ** 2) / K
        found = (share @ f**2 - (share @ f) ** 2).sum() / K**2
        assert found <= bound + 3 * (f**2).max() / steps
    if steps > 1000:
        assert f[ids].mean(1).var() > 1.1 * bound


def test_edges_of_points():
    K = 4
    u = np.array([[0.0, LAST, 0.0, LAST]], np.float32)
    # one class beside the target: it takes every point; far below the target it still does
    z = np.full((1, 300), -np.inf, np.float32)
    z[0, 5], z[0, 200] = 0, -60
    ids, q = points(z, [[5]], u)
    assert (ids == 200).all()
    np.testing.assert_allclose(q, np.exp(-60.0), rtol=1e-5)
    # a mass below the smallest float32 is none, and so is a row with nothing beside its target
    z[0, 200] = -110
    assert (points(z, [[5]], u)[0] == -1).all()
    z[0, 200] = -np.inf
    assert (points(z, [[5]], u)[0] == -1).all()
    assert points(z, [[5]], u)[1] == 0
    # thresholds at the edges of four equal classes: 0 begins the first, and each stratum's last u stays inside it
    z = np.zeros((1, K + 1), np.float32)
    np.testing.assert_array_equal(points(z, [[2]], np.zeros((1, K), np.float32))[0], [[0, 1, 3, 4]])
    np.testing.assert_array_equal(points(z, [[2]], np.full((1, K), LAST, np.float32))[0], [[0, 1, 3, 4]])
    # trailing classes without mass are nobody's, even where rounding brings the last threshold to the whole
    z = np.full((1, 700), -np.inf, np.float32)
    z[0, :3] = 0
    assert points(z, [[1]], np.full((1, 1), LAST, np.float32))[0] == 2
    # more points than classes, all targets left out, bad rows
    assert set(points(np.zeros((1, 3), np.float32), [[1]], np.random.rand(1, 50))[0].ravel()) == {0, 2}
    assert (points(np.zeros((1, 3), np.float32), [[0, 1, 2, 2, 0]], u)[0] == -1).all()
    z = np.zeros((3, 9), np.float32)
    z[1, 3], z[2] = np.nan, -np.inf
    ids, q = points(z, [[0]] * 3, np.repeat(u, 3, 0))
    assert (ids[1:] == 0).all()
    np.testing.assert_array_equal(np.isnan(q), [False, True, True])


def test_no_point_of_a_long_row_is_lost():
    """256,000 equal float32 classes: a float32 running sum would stand still from 2^24 terms of roundoff on."""
    V, K = 256_000, 1000
    u = np.full((1, K), 0.5, np.float32)
    ids, q = points(np.zeros((1, V), np.float32), [[V - 1]], u)
    np.testing.assert_array_equal(ids[0], ((np.arange(K) + 0.5) / K * (V - 1)).astype(int))
    np.testing.assert_allclose(q, (V - 1) / V, rtol=1e-7)


def split(x):
    hi = x.to(torch.float32)
    return torch.stack([hi, (x - hi.double()).to(torch.float32)], -1)


@pytest.mark.parametrize("cap", [None, 4.0])
def test_every_boundary_between_shards(cap):
    """Classes in two parts: each takes the points that fall on its own, none is lost or taken twice."""
    g = torch.Generator().manual_seed(0)
    N, V, K = 3, CLASSES, 40
    z, u = 2 * torch.randn(N, V, generator=g), torch.rand(N, K, generator=g)
    target = torch.tensor([[7], [V // 2], [V - 1]])
    ids, _ = points(z, target, u, cap=cap)
    *_, m, rest = ops.cross_entropy_fwd(z, target[:, 0], None, 1, 1.0, cap, False, False)
    for cut in range(1, V):
        parts = [(z[:, :cut].contiguous(), 0, cut), (z[:, cut:].contiguous(), cut, V)]
        inside = [torch.where((target >= b) & (target < e), target - b, -3) for _, b, e in parts]
        own = [
            ops.points(p, m, rest, t, u, None, 1.0, cap)[1].double().sum(1)
            for (p, *_), t in zip(parts, inside, strict=True)
        ]
        ends = [torch.zeros_like(own[0]), own[0], own[0] + own[1]]
        found = torch.full((N, K), -1)
        for i, ((p, b, _), t) in enumerate(zip(parts, inside, strict=True)):
            span = torch.stack([split(v) for v in (ends[i], ends[i + 1], ends[2])], 1)
            here = ops.points(p, m, rest, t, u, span, 1.0, cap)[0]
            assert not ((here >= 0) & (found >= 0)).any(), cut
            found = torch.where(here >= 0, here + b, found)
        assert (found >= 0).all(), cut
        # one rounding of the whole moves a point that stands at an edge to its neighbour
        assert ((found - torch.from_numpy(ids)).abs() > 0).sum() <= 1, cut


def test_doors_refuse_what_the_kernels_cannot_read():
    x, w, ids, c, _ = family(torch.float32, 4, 5, 6, 3)
    z = torch.randn(4, 6)
    row = torch.zeros(4)
    u = torch.rand(4, 2)
    calls = [
        lambda: ops.picked_fwd(x[:3], w, ids),
        lambda: ops.picked_fwd(x, w[:, :4], ids),
        lambda: ops.picked_fwd(x, w.double(), ids),
        lambda: ops.picked_fwd(x, w, ids.float()),
        lambda: ops.picked_input_bwd(c[:3], w, ids, None, None, False),
        lambda: ops.picked_input_bwd(torch.cat([c, c], 1), w, ids, None, None, False),
        lambda: ops.picked_input_bwd(c.double(), w, ids, None, None, False),
        lambda: ops.picked_input_bwd(c, w, ids, row, None, False),
        lambda: ops.picked_weight_bwd(c, x, ids, -1, None, None, False),
        lambda: ops.picked_weight_bwd(c, x[:3], ids, 6, None, None, False),
        lambda: ops.picked_weight_bwd(c, x, ids, 6, row, torch.zeros(5), False),
        lambda: ops.points(z, row, row, ids[:, :1], u.double(), None, 1.0, None),
        lambda: ops.points(z, row, row, ids[:3, :1], u, None, 1.0, None),
        lambda: ops.points(z, row, row, ids[:, :1], u, torch.zeros(4, 2, 2), 1.0, None),
        lambda: ops.points(z[0], row, row, ids[:, :1], u, None, 1.0, None),
        lambda: ops.cross_entropy_fwd(z, ids[:3], None, 1, 1.0, None, False, False),
        lambda: ops.cross_entropy_bwd(z, ids, None, row, row, row, None, None, None, 1, 1.0, None),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"must|has the wrong|needs"):
            call()
