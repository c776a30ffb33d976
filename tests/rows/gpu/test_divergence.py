"""The Triton kernels of divergences in the interpreter: the checks of the native rows, heads by parts, mutants."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softmax_ext.contract import KINDS
from tests.judging.divergences import Torch
from tests.ops import test_divergence as checks
from tests.rows.gpu import interpreter

if interpreter.why_not():
    pytest.skip(f"Triton's interpreter: {interpreter.why_not()}", allow_module_level=True)

torch: Any = importlib.import_module("torch")
OPS: Any = importlib.import_module("torch_ops")
kernels: Any = importlib.import_module("torch_ops._rows.triton_divergence")
plain: Any = importlib.import_module("torch_ops._rows.divergence")
native: Any = importlib.import_module("torch_ops._rows.native")


@pytest.fixture(autouse=True)
def ran() -> Iterator[list[str]]:
    with interpreter.interpreted() as names:
        yield names


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wider than 32 are read in blocks of 32: every loop, at sizes an interpreter can bear."""
    make_narrow(monkeypatch)


def make_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.gpu, "widest", lambda itemsize, many: (32, 16))


def of_sizes(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
    monkeypatch.setattr(checks, "SIZES", {"Torch": sizes})


# Every kind in the types that are often met, every type in the kind of most arithmetic.
OFTEN = [(kind, dtype) for kind in KINDS for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(("kind", "dtype"), [*OFTEN, ("jsd", "float64"), ("jsd", "float16")])
def test_digits_at_every_distance(kind: str, dtype: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    of_sizes(monkeypatch, 129)
    checks.test_digits_at_every_distance(kind, dtype, Torch())
    assert {*ran} == {"divergence_fwd_kernel", "divergence_bwd_kernel"}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_many_blocks(kind: str, narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    of_sizes(monkeypatch, 1, 129)
    checks.test_digits_at_every_distance(kind, "float32", Torch())
    checks.test_equal_rows_are_nothing_apart(kind, "float32", Torch())
    checks.test_a_class_axis_anywhere(kind, Torch())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_data_facts(dtype: str) -> None:
    checks.test_data_facts(dtype, Torch())


def test_rows_not_kept_reach_nothing(ran: list[str]) -> None:
    checks.test_rows_not_kept_reach_nothing("fast", Torch())
    checks.test_rows_not_kept_reach_nothing("lean", Torch())
    assert "divergence_bwd_kernel" in ran


@pytest.mark.parametrize("kind", KINDS)
def test_heads_go_by_the_same_kernels(kind: str, ran: list[str], narrow: None) -> None:
    same_by_kernels_and_plain_ops(kind, ran)
    assert "divergence_bwd_kernel" in ran


def same_by_kernels_and_plain_ops(kind: str, ran: list[str]) -> None:
    """Two heads in both memory modes, with caps and scales of both sides."""
    g = torch.Generator().manual_seed(1)
    x, w, y, u = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 3), (70, 3), (4, 2), (70, 2)))
    given = {"kind": kind, "softcap": 5.0, "teacher_softcap": 4.0, "logit_scale": 1.2, "chunk_size": 40}
    given |= {"keep": torch.tensor([True, True, False, True])}

    def found(memory: str) -> Any:
        leaves = [v.clone().requires_grad_() for v in (x, w)]
        value = OPS.linear_divergence(*leaves, y, u, memory=memory, **given)
        return value, *torch.autograd.grad(value, leaves)

    ours = [found(memory) for memory in ("fast", "lean")]
    assert not ran or ("divergence_sums_kernel" in ran) == (kind in ("jsd", "tv"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "serving", lambda x, dim: None)
        patch.setattr(importlib.import_module("torch_ops._rows.divergence_parts"), "serving", lambda x, dim: None)
        theirs = [found(memory) for memory in ("fast", "lean")]
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-14)


def test_ops_are_described() -> None:
    """Fakes, and what is written in place, as opcheck has it."""
    x, t, up = torch.randn(3, 5), torch.randn(3, 5), torch.rand(3)
    options = (1, 2, 0.4, 1.0, None, 0.7, 9.0)
    ops = torch.ops.softmax_ext_triton
    _, state = ops.divergence_fwd(x, t, None, *options)
    for op, args in (
        (ops.divergence_fwd, (x, t, None)),
        (ops.divergence_sums, (x, t, None, state)),
        (ops.divergence_bwd, (x, t, None, state, up)),
        (ops.divergence_bwd_, (x.clone(), t, None, state, up)),
    ):
        torch.library.opcheck(op.default, (*args, *options), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="student must be contiguous"):
        ops.divergence_fwd_bwd_(x.t(), t.t(), None, torch.rand(5), *options)


# A mutant of the kernels: file, what is replaced, by what.
MUTANTS: dict[str, tuple[str, str, str]] = {
    "the shift as it comes": ("divergence", "more = lo + off / unit", "more = lo + 0.0 * off"),
    "no second number of the shift": ("pair", "(lost - lo)", "lost"),
    "the difference's error dropped": ("pair", "((apart - hi) + (lost - lo))", "((apart - hi) - lo)"),
    "p - q as it stands": ("pair", "less = tl.where(near, base * grown, less)", "less = less + 0.0"),
    "the mean dropped": ("divergence", "p * (u - mean)", "p * u"),
    "the cap's slope dropped": ("divergence", "slope(g, a, scale, cap, F, SCALED_X, CAPPED_X)", "g"),
    "keep not read": ("divergence", "real & (tl.load(keep + row, mask=real, other=0) != 0)", "real"),
    "the last class unwritten": ("divergence", "real & (begin + cols < V)", "real & (begin + cols < V - 1)"),
}  # fmt: skip


def _judged(monkeypatch: pytest.MonkeyPatch) -> None:
    of_sizes(monkeypatch, 129)
    for kind in ("forward_kl", "jsd"):
        checks.test_digits_at_every_distance(kind, "float32", Torch())
    checks.test_rows_not_kept_reach_nothing("fast", Torch())
    same_by_kernels_and_plain_ops("jsd", [])


@pytest.mark.parametrize("name", [None, *MUTANTS])
@pytest.mark.slow
def test_no_mutant_passes(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"divergence": Path(kernels.gpu.__file__).read_text()}
    files["pair"] = Path(kernels.gpu.__file__).with_name("pair.py").read_text()
    if name is not None:
        stem, right, wrong = MUTANTS[name]
        assert right in files[stem], "the kernels no longer say this"
        files[stem] = files[stem].replace(right, wrong)
    tag = f"divergence_mutant_{abs(hash(name))}"
    (tmp_path / tag).mkdir()
    files["divergence"] = files["divergence"].replace("softmax_ext.gpu.pair", f"{tag}.pair")
    for stem, text in files.items():
        (tmp_path / tag / f"{stem}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kernels, "gpu", importlib.import_module(f"{tag}.divergence"))
    make_narrow(monkeypatch)
    if name is None:
        return _judged(monkeypatch)
    with pytest.raises(AssertionError):
        _judged(monkeypatch)
    return None
