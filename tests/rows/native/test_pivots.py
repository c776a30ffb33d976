"""What softmax's backward takes for a pivot, row by row: nothing cancels, nothing hangs on the row before."""

import shutil

import numpy as np
import pytest
import torch

from tests.rows.native.formulas import LEVELS, ops
from torch_ops._rows import native

if native.missing and not (shutil.which("g++") or shutil.which("clang++")):
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

FLOATS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Beside flat rows and loud upstreams: what a pivot that is chosen before the row is read may get wrong.
KINDS = (
    "flat",
    "peaked",
    "confident",
    "one-hot",
    "one-hot first",
    "offset",
    "offset, confident",
    "first far",
    "first masked",
    "masked garbage",
    "as its y",
)


@pytest.fixture(params=LEVELS, ids=["avx512", "avx2", "base"], autouse=True)
def level(request):
    if native.limit_instruction_set(request.param) != request.param:
        pytest.skip("this CPU lacks the instruction set")
    yield request.param
    native.limit_instruction_set(-1)


def problem(kind: str, V: int, rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(KINDS.index(kind) + V)
    x, dy = r.standard_normal((rows, V)), r.standard_normal((rows, V))
    first = slice(0, min(150, V // 2))
    if kind == "peaked":
        x *= 5
    if "confident" in kind:
        x[np.arange(rows), r.integers(V, size=rows)] += 30
    if "one-hot" in kind:
        dy[:] = 0
        dy[np.arange(rows), 1 if "first" in kind else r.integers(V, size=rows)] = -1
    if "offset" in kind:
        dy += 1000
    if kind == "first far":
        dy[:, first] += 1e4
    if "masked" in kind:
        x[:, first] = -200
        dy[:, first] = 1e6 if kind == "first masked" else 1e14 * (1 + 0.1 * dy[:, first])
    if kind == "as its y":
        dy = 2 * np.exp(x) / np.exp(x).sum(1, keepdims=True)
    return x, dy


def every_kind(V: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, dy), a row of each kind in turn: what a row expects of the next is wrong as often as it can be."""
    x, dy = (np.stack(a, 1).reshape(-1, V) for a in zip(*(problem(kind, V) for kind in KINDS), strict=True))
    return ops.softmax_fwd(torch.tensor(x).to(dtype), 1), torch.tensor(dy).to(dtype)


def units(dx: torch.Tensor, dy: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """The worst error of each row, in units of roundoff of its own terms."""
    a, g = y.numpy().astype(np.longdouble), dy.numpy().astype(np.longdouble)
    m = a.argmax(1)[:, None]
    confident = np.take_along_axis(a, m, 1) > 0.5
    whole = np.where(confident, 1, a.sum(1, keepdims=True))
    g = g - np.where(confident, np.take_along_axis(g, m, 1), (a * g).sum(1, keepdims=True) / whole)
    s = (a * g).sum(1, keepdims=True) / whole
    scale = FLOATS[y.dtype] * a * (np.abs(g) + (a * np.abs(g)).sum(1, keepdims=True))
    error = np.abs(dx.numpy() - a * (g - s)) / np.maximum(scale, 1e-300)
    return np.where(scale > FLOATS[y.dtype] * 2.0**-118, error, 0).max(1).astype(float)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("V", [4, 40, 129, 1000, 4099])
def test_every_row_has_its_pivot(V: int, dtype: torch.dtype) -> None:
    y, dy = every_kind(V, dtype)
    dx = ops.softmax_bwd(dy, y, 1)
    assert units(dx, dy, y).max() < 6
    alone = torch.cat([ops.softmax_bwd(dy[i : i + 1], y[i : i + 1], 1) for i in range(len(y))])
    assert torch.equal(dx, alone), "a row's bits must not hang on the rows before it"


@pytest.mark.parametrize("V", [4, 129, 4099])
def test_saboteurs_are_caught(V: int) -> None:
    y, dy = every_kind(V, torch.float32)
    few = dy[:, : min(128, V)].mean(1, keepdim=True)
    largest = dy.gather(1, y.argmax(1, keepdim=True))
    for pivot in (torch.zeros_like(few), few, *[largest] * (V > 100)):  # of four classes the largest is a fair pivot
        g = dy - pivot
        wrong = y * (g - (y * g).sum(1, keepdim=True))
        assert units(wrong, dy, y).max() > 6
    late = ops.softmax_bwd(dy, y, 1).roll(1, 0)
    assert units(late, dy, y).max() > 1e3


@pytest.mark.parametrize("V", [129, 4099])
def test_what_all_have_in_common_has_no_gradient(V: int) -> None:
    y, _ = every_kind(V, torch.float32)
    dy = torch.full_like(y, 3.3)
    assert (ops.softmax_bwd(dy, y, 1) == 0).all()
    dy[y == 0] = 1e6  # where no mass is
    assert (ops.softmax_bwd(dy, y, 1) == 0).all()
