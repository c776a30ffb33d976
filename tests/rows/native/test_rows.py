"""The native rows against float64 NumPy, through their raw ops: every instruction set, type and layout."""

import shutil

import numpy as np
import pytest
import torch

from tests.rows.native.formulas import LEVELS, ops
from torch_ops._rows import native

if native.missing and not (shutil.which("g++") or shutil.which("clang++")):
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)


TYPES = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
UC = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24}
TINY = 2.0**-125


@pytest.fixture(params=LEVELS, ids=["avx512", "avx2", "base"], autouse=True)
def level(request):
    assert not native.missing, native.missing  # a machine with a compiler has the kernels
    if native.limit_instruction_set(request.param) != request.param:
        pytest.skip("this CPU lacks the instruction set")
    yield request.param
    native.limit_instruction_set(-1)


def f64(x):
    return x.to(torch.float64).numpy()


def rows(x, dim, scale=1.0, cap=None):
    """z with the axis last, m, e, rest, log p, p, all float64 (long double for float64 input)."""
    kind = np.longdouble if x.dtype == torch.float64 else np.float64
    x = np.moveaxis(f64(x), dim, -1).astype(kind)
    z = scale * x
    if cap is not None:
        z = np.where(z == -np.inf, z, cap * np.tanh(z / cap))
    with np.errstate(all="ignore"):
        m = z.max(-1, keepdims=True)
        e = np.exp(z - m)
        at = np.argmax(np.where(np.isnan(z), -np.inf, z), -1)[..., None]
        others = e.copy()
        np.put_along_axis(others, at, 0, -1)
        rest = others.sum(-1, keepdims=True)
        bad = ~np.isfinite(m)
        rest = np.where(bad, np.nan, rest)
        lp = (z - m) - np.log1p(rest)
        return z, m, e, rest, lp, e / (1 + rest)


def close(ours, truth, dtype, u, scale=None, c=8.0, what=""):
    """|ours - truth| <= half an ulp of the storage type + c * u * scale; NaN meets NaN, inf meets inf."""
    o, t = f64(ours).astype(np.longdouble), np.asarray(truth, dtype=np.longdouble)
    assert o.shape == t.shape, (what, o.shape, t.shape)
    assert (np.isnan(o) == np.isnan(t)).all(), what + ": NaN"
    inf = np.isinf(t)
    assert (o[inf] == t[inf]).all(), what + ": inf"
    s = np.abs(t) if scale is None else scale
    tiny = {torch.float16: 2.0**-25}.get(dtype, 0) + (TINY if u > 2.0**-50 else 1e-305)
    with np.errstate(all="ignore"):
        bound = TYPES[dtype] * np.abs(t) * 1.01 + c * u * s + tiny
        ok = np.isnan(t) | inf | (np.abs(o - t) <= bound)
    assert ok.all(), f"{what}: worst {np.nanmax(np.where(ok, 0, np.abs(o - t) / bound))} x the bound"


def others(p):
    """The sum of a row without each entry in turn, by prefix and suffix: 1 - p would cancel."""
    zero = np.zeros_like(p[..., :1])
    before = np.concatenate([zero, np.cumsum(p[..., :-1], -1)], -1)
    return before + np.concatenate([np.cumsum(p[..., :0:-1], -1)[..., ::-1], zero], -1)


def centred(d, p):
    """d - sum(p d), without cancelling at a row's maximum."""
    d = d - (p * d).sum(-1, keepdims=True)
    return d * others(p) - others(p * d)


VS = sorted(set(range(1, 36)) | {63, 64, 65, 100, 127, 128, 129, 143, 144, 145, 160, 257, 1000, 4096, 4097, 8200})
LAYOUTS = [((5,), ()), ((67,), ()), ((2,), (3,)), ((3,), (15,)), ((2,), (16,)), ((2,), (17,)), ((1,), (70,))]


def make(lead, V, trail, dtype, seed=0, k=3.0, special=True):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, V, *trail, generator=g, dtype=torch.float64) * k
    if special and V > 2:
        x = x.movedim(len(lead), -1).reshape(-1, V).clone()
        x[0, V // 2] = 30  # a confident row
        x[1, 0] = -np.inf
        if x.shape[0] > 3:
            x[2, :] = 0.5
            x[3, : V - 1] = -np.inf
        x = x.reshape(*lead, *trail, V).movedim(-1, len(lead)).contiguous()
    return x.to(dtype).contiguous()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("lead", "trail"), LAYOUTS)
def test_softmax(lead, trail, dtype):
    dim = len(lead)
    for V in VS if trail == () else VS[::3]:
        if V > 300 and trail:
            continue
        x = make(lead, V, trail, dtype, V)
        _z, _m, _e, _rest, lp, p = rows(x, dim)

        def back(a):
            return np.moveaxis(a, -1, dim)

        y = ops.softmax_fwd(x, dim)
        close(y, back(p), dtype, UC[dtype], what=f"softmax V={V}")
        log_p, mm, rr = ops.log_softmax_fwd(x, dim)
        close(log_p, back(lp), dtype, UC[dtype], what=f"log_softmax V={V}")
        dy = make(lead, V, trail, dtype, V + 1, special=False)
        kind = np.longdouble if dtype == torch.float64 else np.float64  # truth is one type wider than what it judges
        D, Y = (np.moveaxis(f64(a).astype(kind), dim, -1) for a in (dy, y))
        away = centred(D, Y / Y.sum(-1, keepdims=True))  # half precision: the rounded y do not sum to 1
        scale = Y * (np.abs(away) + (Y * np.abs(away)).sum(-1, keepdims=True))
        close(ops.softmax_bwd(dy, y, dim), back(Y * away), dtype, UC[dtype], back(scale), what=f"softmax_bwd V={V}")
        q = others(p)
        scale = q * np.abs(D) + p * others(np.abs(D))
        close(
            ops.log_softmax_bwd(dy, x, mm, rr, dim),
            back(q * D - p * others(D)),
            dtype,
            UC[dtype],
            back(scale),
            what=f"log_softmax_bwd V={V}",
        )


OPTIONS = [
    {},
    {"smooth": True},
    {"entropy": True},
    {"weight": True, "smooth": True, "entropy": True},
    {"scale": 0.7},
    {"cap": 5.0, "scale": 1.3},
    {"dense": True},
    {"dense": True, "weight": True, "smooth": True, "entropy": True},
    {"dense": True, "compute": True, "cap": 3.0},
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("lead", "trail"), LAYOUTS)
def test_cross_entropy(lead, trail, dtype, option):
    dim = len(lead)
    F = torch.float64 if dtype == torch.float64 else torch.float32
    u = UC[dtype]
    scale, cap = option.get("scale", 1.0), option.get("cap")
    smooth, entropy, dense = (option.get(k, False) for k in ("smooth", "entropy", "dense"))
    loose = 60.0 if cap or scale != 1 else 8.0  # a rounded z moves log p by |z| u
    for V in (
        [1, 2, 3, 10, 15, 16, 17, 31, 33, 100, 127, 128, 129, 145, 257, 4097] if trail == () else [1, 2, 10, 33, 130]
    ):
        x = make(lead, V, trail, dtype, V, special=not (dense and V < 3))
        g = torch.Generator().manual_seed(V)
        z, m, e, rest, lp, p = rows(x, dim, scale, cap)
        shape = z.shape[:-1]
        n = int(np.prod(shape))
        w = (torch.rand(V, generator=g, dtype=torch.float64) + 0.1).to(F) if option.get("weight") else None
        W = f64(w) if w is not None else np.ones(V)
        ign = np.zeros(shape, bool)
        inval = np.zeros(shape, bool)
        if dense:
            y = torch.rand(*lead, V, *trail, generator=g, dtype=torch.float64)
            y = torch.where(x == -torch.inf, torch.zeros(()), y)
            target = y.to(F if option.get("compute") else dtype).contiguous()
            Y = np.moveaxis(f64(target), dim, -1)
            M = Y * W
        else:
            t = torch.randint(0, V, shape, generator=g)
            am = torch.from_numpy(np.argmax(np.where(np.isnan(z), -np.inf, z), -1))
            t.view(-1)[::2] = am.reshape(-1)[::2]
            t.view(-1)[n - 1] = -2
            if n > 4:
                t.view(-1)[4] = -1
            target = t
            ign, inval = (t == -1).numpy(), (t == -2).numpy()
            Y = np.zeros(z.shape)
            np.put_along_axis(Y, np.clip(t.numpy(), 0, None)[..., None], 1, -1)
            M = Y
        with np.errstate(all="ignore"):

            def term(a, lp=lp):
                return -np.where(a == 0, 0, a * lp).sum(-1)

            nll, smo, ent = term(M), term(np.broadcast_to(W, z.shape)), term(p)
            lse = (m + np.log1p(rest))[..., 0]

        def dead(a, v=0.0, ign=ign):
            return np.where(ign, v, a)

        out = ops.cross_entropy_fwd(x, target, w, dim, scale, cap, smooth, entropy)
        name = f"V={V} "
        zscale = np.abs(np.where(np.isinf(z), 0, z)).max(-1)
        mass = np.abs(M).sum(-1)
        close(
            out[0],
            dead(np.where(inval, np.nan, nll)),
            F,
            u,
            dead(np.nan_to_num(np.abs(nll), posinf=0) + (zscale * mass if loose > 8 else 0)),
            what=name + "nll",
        )
        close(
            out[1],
            dead(lse),
            F,
            u,
            np.abs(m[..., 0]) + np.log1p(rest)[..., 0] + zscale * (loose > 8),
            what=name + "lse",
        )
        i = 2
        if smooth:
            close(out[i], dead(smo), F, u, what=name + "smooth")
            i += 1
        if entropy:
            close(out[i], dead(ent), F, u, np.abs(ent) * 1 + (1e-7 + 0 * ent) * (u > 1e-10), what=name + "entropy")
        d: dict[str, torch.Tensor | None] = {
            k: (torch.rand(shape, generator=g, dtype=torch.float64) + 0.5).to(F)
            for k in ("nll", "lse", "smooth", "entropy")
        }
        if not smooth:
            d["smooth"] = None
        if not entropy:
            d["entropy"] = None
        D = {k: (f64(v)[..., None] if v is not None else 0.0) for k, v in d.items()}
        with np.errstate(all="ignore"):
            G = D["nll"] * M + D["smooth"] * W
            A = G.sum(-1, keepdims=True) + D["lse"]
            H = ent[..., None]
            grad = A * p - G - np.where(p == 0, 0, D["entropy"] * p * (lp + H))
            if not dense:
                at = np.clip(target.numpy(), 0, None)[..., None]
                oth = e.copy()
                np.put_along_axis(oth, at, 0, -1)
                q = oth.sum(-1, keepdims=True) / (1 + rest)
                pt = np.take_along_axis(p, at, -1)
                extra = np.take_along_axis(np.where(p == 0, 0, D["entropy"] * p * (lp + H)), at, -1)
                Wt = np.take_along_axis(np.broadcast_to(W, z.shape), at, -1)
                np.put_along_axis(grad, at, -D["nll"] * q + (A - D["nll"]) * pt - D["smooth"] * Wt - extra, -1)
            slope = scale * np.ones_like(z)
            if cap:
                slope = np.where(
                    np.isinf(z),
                    0,
                    scale / np.cosh(np.where(np.isinf(z), 0, scale * np.moveaxis(f64(x), dim, -1)) / cap) ** 2,
                )
            mag = (np.abs(A) * p + np.abs(G) + np.where(p == 0, 0, np.abs(D["entropy"] * p * (np.abs(lp) + H)))) * slope
            if loose > 8:
                mag = mag * (1 + zscale[..., None])
            grad = grad * slope
            grad = np.where(inval[..., None], np.nan, np.where(ign[..., None], 0, grad))

        def back(a):
            return np.moveaxis(a, -1, dim)

        args = (d["nll"], d["lse"], d["smooth"], d["entropy"], dim, scale, cap)
        before = x.clone()
        dx = ops.cross_entropy_bwd(x, target, w, out[-2], out[-1], *args)
        assert torch.equal(x, before) or torch.isnan(before).any()
        close(dx, back(grad), dtype, u, np.nan_to_num(back(mag), nan=0), c=10, what=name + "grad")
        a = x.clone()
        ops.cross_entropy_bwd_(a, target, w, out[-2], out[-1], *args)
        torch.testing.assert_close(a, dx, rtol=0, atol=0, equal_nan=True)
        a = x.clone()
        both = ops.cross_entropy_fwd_bwd_(a, target, w, *args, smooth, entropy)
        close(a, back(grad), dtype, u, np.nan_to_num(back(mag), nan=0), c=10, what=name + "one visit")
        for b, o in zip(both, out, strict=False):
            torch.testing.assert_close(b, o, rtol=4 * u, atol=0, equal_nan=True)  # another order of summation
