"""The Triton kernels in Triton's interpreter, on CPU tensors, through the public ops: the same checks as the C++ rows.

What these tests and test_gpu_compiled.py cannot see, for want of a GPU (`make gpu` can):
- races: the interpreter runs one program after another, and a program's threads as one;
- the hardware's exp2 (2 ulp by NVIDIA's manual) in half-precision rows: the interpreter's is NumPy's; likewise
  division (`div.full.f32`, 2 ulp; only the soft cap and a corrected reciprocal use it);
- the driver, the launcher and its argument specialisation, launches on a second device and on a stream;
- CUDA-graph capture, host syncs of the real allocator (fake tensors see those that read a value);
- offsets past 2^31 in a real tensor (the arithmetic of `place` is checked), memory, and every speed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.contract import test_facts
from tests.judging import cases
from tests.judging.frameworks import HERE
from tests.ops import arrays as test_ops_arrays
from tests.ops import test_ops
from tests.rows import test_rows
from tests.rows.gpu import interpreter

if interpreter.why_not():
    pytest.skip(f"Triton's interpreter: {interpreter.why_not()}", allow_module_level=True)

torch: Any = importlib.import_module("torch")
torch_ops: Any = importlib.import_module("torch_ops")
ops: Any = importlib.import_module("torch_ops._rows.triton_ops")
FW: Any = next(fw for fw in HERE if fw.name == "torch")
CE = ("cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel")
SOFT = tuple(f"{op}_{way}_kernel" for op in ("softmax", "log_softmax") for way in ("fwd", "bwd"))


@pytest.fixture(autouse=True)
def ran() -> Iterator[list[str]]:
    with interpreter.interpreted() as names:
        yield names


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wider than 32 are read in blocks of 32: every loop, at sizes an interpreter can bear."""
    plan = ops.gpu.plan
    monkeypatch.setattr(ops.gpu, "plan", lambda o, v, i, widest, *rest: plan(o, v, i, 32, *rest))


SIZED = [("float32", v) for v in (1, 2, 3, 17, 257, 1025)] + [
    (d, v) for d in ("float64", "bfloat16", "float16") for v in (1, 5, 129)
]


@pytest.mark.parametrize(("dtype", "classes"), SIZED)
def test_accuracy(dtype: str, classes: int, ran: list[str]) -> None:
    test_ops.test_accuracy(FW, dtype, classes)
    assert set(ran) == {*SOFT, *CE}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("dtype", "classes"), [("float32", 33), ("float32", 200), ("float64", 129), ("bfloat16", 65)])
@pytest.mark.long
def test_accuracy_block_by_block(dtype: str, classes: int) -> None:
    test_ops.test_accuracy(FW, dtype, classes)


@pytest.mark.parametrize("classes", [40000])
def test_rows_wider_than_any_block(classes: int, ran: list[str]) -> None:
    r = cases.rows(classes, "float32")
    pick = [8, 15]  # confident; first tiles -inf
    test_ops.check_all(FW, "float32", cases.Rows(r.x[pick], r.target[pick], r.dy[pick], r.dloss[pick], r.names))
    assert set(ran) == {*SOFT, *CE}


LOSSES = [
    ("hard", "scale"),
    ("hard", "cap"),
    ("hard", "z-loss"),
    ("hard", "smooth"),
    ("hard weighted", "uniform"),
    ("hard weighted", "all"),
    ("soft", "plain"),
    ("soft", "cap"),
    ("soft weighted", "all"),
]


@pytest.mark.parametrize(("kind", "name"), LOSSES)
def test_accuracy_of_loss_options(kind: str, name: str) -> None:
    test_ops.test_accuracy_of_loss_options(FW, "bfloat16", kind, name)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("kind", "name"), [("hard weighted", "all"), ("soft weighted", "smooth"), ("soft", "all")])
@pytest.mark.long
def test_loss_options_block_by_block(kind: str, name: str) -> None:
    loss_by_hand(kind, 100, name)


def loss_by_hand(kind: str, classes: int, name: str) -> None:
    arrays, r = test_ops_arrays.loss_arrays(kind, classes, "float32")
    ups = {"value": r.dloss, "lse": r.dloss[::-1].copy(), "entropy": 0.5 * r.dloss}
    options = {"reduction": "none", "stats": ("lse", "entropy"), **cases.OPTIONS[name]}
    test_ops.check(FW, "cross_entropy", "float32", arrays, ups, **options)


@pytest.mark.parametrize("at", [0, 9])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["hard", "one-hot", "weighted one-hot"])
def test_confident_row(dtype: str, at: int, kind: str) -> None:
    test_ops.test_confident_row_keeps_its_loss_and_gradient(FW, dtype, at, kind)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis(axis: int) -> None:
    test_ops.test_softmax_along_any_axis(FW, "float32", axis)


@pytest.mark.usefixtures("narrow")
def test_any_axis_block_by_block() -> None:
    r = cases.rows(70, "bfloat16")
    x, dy = (np.moveaxis(a[:6].reshape(2, 3, 70), -1, 1) for a in (r.x, r.dy))
    for op in test_ops_arrays.SOFTMAXES:
        test_ops.check(FW, op, "bfloat16", {"input": x}, {"value": dy}, axis=1)
    arrays, up = {"input": x, "target": np.abs(r.target[:6].reshape(2, 3))}, {"value": r.dloss[:6].reshape(2, 3)}
    test_ops.check(FW, "cross_entropy", "bfloat16", arrays, up, reduction="none", stats=("lse", "entropy"))


@pytest.mark.parametrize("shape", [(6,), (3, 2), (3, 1, 2), ()])
def test_any_shape(shape: tuple[int, ...]) -> None:
    test_ops.test_cross_entropy_of_any_shape(FW, "float32", shape)


def test_strides() -> None:
    for layout in ("transposed", "every other column"):
        test_ops.test_layout_changes_no_number(FW, layout)
    test_ops.test_expanded_input_and_upstream(FW)


def test_data_facts() -> None:
    """The facts of the contract, by hand: ignored, invalid, -inf, NaN and +inf rows."""
    test_rows.test_canonical_targets(FW)
    for row in ([-np.inf] * 3, [1.0, np.inf, 2.0], [1.0, np.nan, 2.0]):
        test_rows.test_rest_is_nan_where_the_maximum_is_not_finite(FW, row)
    for dtype in ("float32", "bfloat16"):
        test_facts.test_masked_logit_in_softmax(FW, dtype)
        for cap in (None, 50.0):
            test_facts.test_masked_logit_without_mass(FW, dtype, cap)
    test_rows.test_backward_is_linear_in_every_upstream(FW, True)
    test_rows.test_statistics_of_a_row(FW, 1, "float32")


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_masks_of_the_smallest_number(dtype: str, blocks: str, request: pytest.FixtureRequest) -> None:
    """Lanes that hold nothing but finfo.min: the sums they bring to the row's maximum are of nothing, not 0 * inf."""
    if blocks == "many":
        request.getfixturevalue("narrow")
    x = torch.full((2, 300), torch.finfo(getattr(torch, dtype)).min, dtype=getattr(torch, dtype))
    x[0, 200], x[1, 7], x[1, 250] = 1.0, 0.5, 1.25
    target = torch.tensor([200, 7])
    value, stats = torch_ops.cross_entropy(x, target, reduction="none", stats=("lse", "entropy"))
    truth, right = reference.cross_entropy(x.double(), target, reduction="none", stats=("lse", "entropy"))
    for one, other in ((value, truth), (stats["lse"], right["lse"]), (stats["entropy"], right["entropy"])):
        np.testing.assert_allclose(one.double(), np.asarray(other, np.float64), rtol=1e-6)


@pytest.mark.parametrize("blocks", ["one", "many"])
def test_a_row_of_nan_alone_is_told_from_one_of_masks(blocks: str, request: pytest.FixtureRequest) -> None:
    """Its maximum is NaN: a slice or shard without a class is -inf, and takes no part in the row."""
    if blocks == "many":
        request.getfixturevalue("narrow")
    x = torch.full((4, 90), -torch.inf)
    x[0], x[1, 70], x[2, 3] = torch.nan, torch.nan, 2.0
    for dtype in (torch.float32, torch.bfloat16):
        for values in (
            ops.cross_entropy_fwd(x.to(dtype), torch.zeros(4, dtype=torch.int64), None, 1, 1.0, None, False, False),
            ops.cross_entropy_fwd_bwd_(
                x.to(dtype, copy=True),
                torch.zeros(4).long(),
                None,
                torch.ones(4),
                None,
                None,
                None,
                1,
                1.0,
                None,
                False,
                False,
            ),
        ):
            assert str(values[-2].tolist()) == "[nan, nan, 2.0, -inf]"
            assert str(values[-1].isnan().tolist()) == "[True, True, False, True]"


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.long
def test_forward_and_gradient_in_one_visit(dtype: str, soft: bool, blocks: str, request: pytest.FixtureRequest) -> None:
    """cross_entropy_fwd_bwd_ gives the bits of the two alone (half precision: p comes from the unrounded rest)."""
    if blocks == "many":
        request.getfixturevalue("narrow")
    r = cases.rows(100, dtype)
    kind = getattr(torch, dtype)
    x = torch.from_numpy(r.x).to(kind)
    target = torch.from_numpy(cases.soft(100, dtype, len(r.x))).float() if soft else torch.from_numpy(r.target)
    target = target if soft else target.where(target >= 0, -1)
    w = torch.from_numpy(cases.class_weight(100, "float32")).float()
    ups = [torch.from_numpy(r.dloss).float() * (i + 1) for i in range(4)]
    for given, smooth, cap in (((ups[0], None, None, None), False, None), (ups, True, 20.0)):
        weight = w if smooth else None
        values = ops.cross_entropy_fwd(x, target, weight, 1, 0.7, cap, smooth, smooth)
        dx = ops.cross_entropy_bwd(x, target, weight, *values[-2:], *given, 1, 0.7, cap)
        over = x.clone()
        both = ops.cross_entropy_fwd_bwd_(over, target, weight, *given, 1, 0.7, cap, smooth, smooth)
        for a, b in zip(both, values, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        tolerance = {"rtol": 8e-3, "atol": 1e-30} if dtype == "bfloat16" else {"rtol": 2e-6, "atol": 2e-7}
        torch.testing.assert_close(over, dx, **tolerance, equal_nan=True)
        assert ops.cross_entropy_bwd_(x, target, weight, *values[-2:], *given, 1, 0.7, cap) is None
        assert torch.equal(x.nan_to_num(9.0), dx.nan_to_num(9.0)), "over the logits: the same bits"
        x = torch.from_numpy(r.x).to(kind)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hardware_exp2(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision rows with an exp2 as wrong as a GPU's may be: losses and gradients within their bounds."""
    builder: Any = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder

    def exp2(self: Any, arg: Any) -> Any:
        # as chance has it, but for one argument always the same, as on a chip
        chance = np.ascontiguousarray(arg.data).view(np.uint32) * np.uint32(2654435761) >> np.uint32(31)
        wrong = 1 + (2.0 * chance - 1) * 2.0**-22.5
        return type(arg)((np.exp2(arg.data.astype(np.float64)) * wrong).astype(np.float32), arg.dtype)

    monkeypatch.setattr(builder, "create_exp2", exp2)
    for classes in (2, 5, 129):
        test_ops.test_accuracy(FW, dtype, classes)


def test_a_row_does_not_know_its_neighbours() -> None:
    """The same bits alone, in a tile of rows, and last in a tile that is not full."""
    x = torch.from_numpy(cases.rows(100, "float32").x).float()
    whole, alone = ops.softmax_fwd(x, 1), torch.cat([ops.softmax_fwd(x[i : i + 1], 1) for i in range(len(x))])
    assert torch.equal(whole, alone)
    assert torch.equal(ops.softmax_fwd(x.repeat(3, 1)[:40], 1), whole.repeat(3, 1)[:40])


def test_offsets_are_64_bit() -> None:
    """Row 3 of 2^30 columns begins at 3 * 2^30, along either layout."""
    triton: Any = importlib.import_module("triton")
    tests: Any = importlib.import_module("tests.rows.gpu.offsets")
    out = torch.zeros(8, 2, dtype=torch.int64)
    tests.offsets_kernel[(4,)](out, 4, 2**30, 1, INNER=False, ROWS=1)
    tests.offsets_kernel[(2,)](out[4:], 2, 2**30, 2, INNER=True, ROWS=2)
    assert out[:4].tolist() == [[i, i * 2**30] for i in range(4)]
    assert out[4:].tolist() == [[0, 0], [1, 1], [2, 2**31], [3, 2**31 + 1]]
    assert triton.__version__


def test_log_softmax_of_a_confident_row() -> None:
    """The gradient at a row's maximum by its own upstream: 1 - p, which is not formed from p."""
    x, dy = torch.zeros(2, 100), torch.zeros(2, 100)
    x[:, 7], dy[:, 7] = torch.tensor([25.0, 60.0]), 1.0
    _, m, rest = ops.log_softmax_fwd(x, 1)
    dx, others = ops.log_softmax_bwd(dy, x, m, rest, 1)[:, 7].double(), 99 * torch.exp(-x[:, 7].double())
    torch.testing.assert_close(dx, others / (1 + others), rtol=1e-6, atol=0)
