"""The native rows: facts of the data, strides, refusals, bits."""

import shutil

import pytest
import torch

from tests.rows.native.formulas import LEVELS, ops
from torch_ops._rows import native

if native.missing and not (shutil.which("g++") or shutil.which("clang++")):
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)


@pytest.fixture(params=LEVELS, ids=["avx512", "avx2", "base"], autouse=True)
def level(request):
    assert not native.missing, native.missing  # a machine with a compiler has the kernels
    if native.limit_instruction_set(request.param) != request.param:
        pytest.skip("this CPU lacks the instruction set")
    yield request.param
    native.limit_instruction_set(-1)


@pytest.mark.parametrize(("V", "inner"), [(3, 1), (40, 1), (200, 1), (9000, 1), (5, 16), (5, 3), (200, 3)])
def test_data_facts(V, inner):
    inf, nan = float("inf"), float("nan")
    bad = [[nan, None], [inf, None], [None, nan], [-inf, nan], [nan, -inf]]
    x = torch.randn(12, V, inner)
    clean = x.clone()
    for r, (a, b) in enumerate(bad):
        if a is not None:
            x[r, 0] = a
        if b is not None:
            x[r, V - 1] = b
    x[5] = -inf
    x[6] = -inf
    x[6, V // 2] = nan
    x[7] = inf
    x[8, 1:] = -inf
    t = torch.zeros(12, inner, dtype=torch.int64)
    n, lse, m, rest = ops.cross_entropy_fwd(x, t, None, 1, 1.0, None, False, False)
    assert torch.isnan(n[:8]).all()
    assert torch.isnan(lse[:8]).all()
    assert torch.isfinite(n[8:]).all()
    assert (n[8] == 0).all()
    one = torch.ones(12, inner)
    g = ops.cross_entropy_bwd(x, t, None, m, rest, one, None, None, None, 1, 1.0, None)
    assert torch.isnan(g[:8]).all()
    assert (g[8] == 0).all()
    assert torch.isfinite(g[8:]).all()
    y = ops.softmax_fwd(x, 1)
    ly, _, _ = ops.log_softmax_fwd(x, 1)
    assert torch.isnan(y[:8]).all()
    assert torch.isnan(ly[:8]).all()
    assert (y[8, 0] == 1).all()
    assert (y[8, 1:] == 0).all()
    assert (ly[8, 1:] == -inf).all()
    assert (ly[8, 0] == 0).all()
    assert torch.equal(y[9:], ops.softmax_fwd(clean, 1)[9:])
    t[:] = V - 1
    n, *_ = ops.cross_entropy_fwd(x, t, None, 1, 1.0, None, False, False)
    assert (n[8] == inf).all()
    # ignored rows: nothing of the row is seen
    r = ops.cross_entropy_fwd(x, torch.full_like(t, -1), None, 1, 1.0, None, True, True)
    assert all((a == 0).all() for a in r)
    g = ops.cross_entropy_bwd(x, torch.full_like(t, -1), None, r[-2], r[-1], one, one, one, one, 1, 1.0, None)
    assert (g == 0).all()
    assert not torch.isnan(g).any()
    # far targets are never an address
    for far in (V, 2**31, 2**40, -2, -(2**40), 2**63 - 1, -(2**63)):
        n, lse, m, rest = ops.cross_entropy_fwd(clean, torch.full_like(t, far), None, 1, 1.0, None, False, False)
        assert torch.isnan(n).all()
        assert torch.isfinite(lse).all()
        assert torch.isnan(
            ops.cross_entropy_bwd(clean, torch.full_like(t, far), None, m, rest, one, None, None, None, 1, 1.0, None)
        ).all()


def test_mass_on_masked_logit():
    x = torch.randn(3, 150)
    x[:, 7] = -torch.inf
    y = torch.rand(3, 150)
    y[0, 7] = 0
    n = ops.cross_entropy_fwd(x, y, None, 1, 1.0, None, True, False)
    assert torch.isfinite(n[0][0])
    assert (n[0][1:] == torch.inf).all()
    assert (n[2] == torch.inf).all()
    w = torch.ones(150)
    w[7] = 0
    assert torch.isfinite(ops.cross_entropy_fwd(x, y, w, 1, 1.0, None, True, True)[2]).all()
    for first in (4096, 5000):  # a first block of nothing but masked classes
        x = torch.randn(2, 9000)
        x[:, :first] = -torch.inf
        y = torch.rand(2, 9000)
        y[:, :first] = 0
        p = torch.log_softmax(x.double(), 1)
        got = ops.cross_entropy_fwd(x, y, None, 1, 1.0, None, False, True)
        torch.testing.assert_close(got[0].double(), -torch.where(y == 0, 0.0, y * p).sum(1), rtol=1e-6, atol=0)


def test_strided_and_expanded_inputs_are_read_right():
    x = torch.randn(6, 200)
    assert torch.equal(ops.softmax_fwd(x.t().contiguous().t(), 1), ops.softmax_fwd(x, 1))
    t = torch.zeros(6, dtype=torch.int64)
    r = ops.cross_entropy_fwd(x, t, None, 1, 1.0, None, False, False)
    a = ops.cross_entropy_bwd(x, t, None, r[-2], r[-1], torch.tensor(0.25).expand(6), None, None, None, 1, 1.0, None)
    b = ops.cross_entropy_bwd(x, t, None, r[-2], r[-1], torch.full((6,), 0.25), None, None, None, 1, 1.0, None)
    assert torch.equal(a, b)


def test_refusals():
    x, t, r = torch.randn(4, 10), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    bad = [
        lambda: ops.softmax_fwd(x, 2),
        lambda: ops.softmax_fwd(x, -1),
        lambda: ops.softmax_fwd(x.int(), 1),
        lambda: ops.softmax_bwd(x, x[:3], 1),
        lambda: ops.softmax_bwd(x.double(), x, 1),
        lambda: ops.log_softmax_bwd(x, x, r[:3], r, 1),
        lambda: ops.cross_entropy_fwd(x, t[:3], None, 1, 1.0, None, False, False),
        lambda: ops.cross_entropy_fwd(x, t.to(torch.int16), None, 1, 1.0, None, False, False),
        lambda: ops.cross_entropy_fwd(x, x.double(), None, 1, 1.0, None, False, False),
        lambda: ops.cross_entropy_fwd(x, t, torch.ones(9), 1, 1.0, None, False, False),
        lambda: ops.cross_entropy_fwd(x, t, None, 1, float("nan"), None, False, False),
        lambda: ops.cross_entropy_bwd(x, t, None, r.double(), r, r, None, None, None, 1, 1.0, None),
        lambda: ops.cross_entropy_bwd_(
            x.t(),
            torch.zeros(10, dtype=torch.int64),
            None,
            torch.zeros(10),
            torch.zeros(10),
            None,
            None,
            None,
            None,
            1,
            1.0,
            None,
        ),
    ]
    for f in bad:
        with pytest.raises((RuntimeError, NotImplementedError)):
            f()


def test_empty():
    for shape in [(0, 10), (2, 3, 0), (0, 3, 2)]:
        x = torch.randn(shape)
        assert ops.softmax_fwd(x, 1).shape == x.shape
    for shape in [(10, 0), (0, 0), (2, 0, 3)]:  # no class: nothing to normalise, and nothing left unwritten
        with pytest.raises(RuntimeError, match="at least one class"):
            ops.softmax_fwd(torch.randn(shape), 1)
    assert ops.cross_entropy_fwd(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64), None, 1, 1.0, None, True, True)[
        0
    ].shape == (0,)


def test_same_bits_for_any_thread_count():
    n = torch.get_num_threads()
    for shape in ((300, 1000), (5000, 10), (6, 21, 500)):
        x = torch.randn(shape)
        torch.set_num_threads(1)
        a = ops.softmax_fwd(x, 1)
        torch.set_num_threads(2)
        b = ops.softmax_fwd(x, 1)
        assert torch.equal(a, b)
    torch.set_num_threads(n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_the_rounded_float32_result(dtype):
    for V in (10, 100, 1000, 1001):
        x = (torch.randn(40, V) * 4).to(dtype)
        assert torch.equal(ops.softmax_fwd(x, 1), ops.softmax_fwd(x.float(), 1).to(dtype))
        assert torch.equal(ops.log_softmax_fwd(x, 1)[0], ops.log_softmax_fwd(x.float(), 1)[0].to(dtype))
