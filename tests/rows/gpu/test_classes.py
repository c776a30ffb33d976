"""The Triton kernels of K classes a row in the interpreter: the checks of the native ones, the heads, and mutants."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rows import order
from tests.rows.gpu import interpreter

if interpreter.why_not():
    pytest.skip(f"Triton's interpreter: {interpreter.why_not()}", allow_module_level=True)

torch: Any = importlib.import_module("torch")
OPS: Any = importlib.import_module("torch_ops")
kernels: Any = importlib.import_module("torch_ops._rows.triton_classes")
checks: Any = importlib.import_module("tests.rows.native.test_classes")
FakeTensorMode: Any = importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode

POINTS = ("points_mass_kernel", "points_except_kernel", "points_sums_kernel", "points_kernel")
PICKED = ("picked_fwd_kernel", "picked_input_bwd_kernel", "picked_weight_bwd_kernel")


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setattr(checks, "ops", torch.ops.softmax_ext_triton)
    with interpreter.interpreted() as names:
        yield names


@pytest.fixture
def few_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter adds a row's groups up one by one, those past its last as well."""
    monkeypatch.setattr(kernels.gpu_points, "SUMMED", 8)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop at sizes an interpreter can bear: rows of many groups and steps, parts of few pairs."""
    make_narrow(monkeypatch)


def make_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GROUP": 16, "GROUPS": 4, "SUMMED": 8, "TOGETHER": 4}.items():
        monkeypatch.setattr(kernels.gpu_points, name, value)
    for name, value in {"PART": 4, "IDS": 4, "AHEAD": 2}.items():
        monkeypatch.setattr(kernels.gpu_picked, name, value)


@pytest.mark.parametrize("dtype", checks.TYPES, ids=str)
@pytest.mark.parametrize(("V", "K"), [(1, 3), (17, 40), (257, 1), (600, 20)])
def test_points(ran: list[str], dtype: Any, V: int, K: int) -> None:
    checks.test_points(dtype, V, K)
    assert set(POINTS) <= {*ran}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.long
def test_points_of_many_groups(narrow: None, dtype: Any) -> None:
    for classes, k in ((16, 3), (129, 10), (300, 9)):
        checks.test_points(dtype, classes, k)
    checks.test_edges_of_points()


@pytest.mark.long
def test_edges_of_points() -> None:
    checks.test_edges_of_points()
    checks.test_no_point_of_a_long_row_is_lost()


@pytest.mark.usefixtures("few_sums")
@pytest.mark.long
def test_every_point_falls_where_its_stratum_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "STEPS", 64)
    checks.test_every_point_falls_where_its_stratum_says()


@pytest.mark.long
def test_every_boundary_between_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CLASSES", 8)
    for name, value in {"GROUP": 2, "SUMMED": 4}.items():
        monkeypatch.setattr(kernels.gpu_points, name, value)
    checks.test_every_boundary_between_shards(4.0)


# One program of the interpreter a class: fewer of those, as many ids and features.
SMALLER = [(*s[:2], min(s[2], 40), s[3]) for s in checks.SHAPES[:-1]]
SHAPED = [(torch.float32, s) for s in SMALLER] + [(d, checks.SHAPES[0]) for d in checks.TYPES[1:]]


@pytest.mark.parametrize(("dtype", "shape"), SHAPED, ids=str)
def test_three_products(dtype: Any, shape: Any) -> None:
    checks.test_three_products(dtype, shape)


@pytest.mark.long
def test_three_products_by_parts(narrow: None, ran: list[str]) -> None:
    for shape in ((20, 17, 3, 9), (5, 40, 2, 3), (4, 5, 300, 2)):
        checks.test_three_products(torch.float32, shape)
    assert {*PICKED, "picked_parts_kernel"} == {*ran}


def test_ids_and_coefficients() -> None:
    checks.test_the_first_coefficient_is_that_of_all_leading_ids()
    checks.test_ids_of_no_class_are_nan_and_reach_no_weight()


@pytest.mark.long
def test_a_class_with_many_terms_keeps_its_digits() -> None:
    """9,000 equal float32 terms: 35 parts, added one by one they would round the same way every time."""
    x, c = torch.full((9000, 3), 1.1), torch.full((9000, 1), 0.7)
    dw = kernels.picked_weight_bwd(c, x, torch.ones(9000, 1, dtype=torch.int32), 3, None, None, True)
    due = (x.double() * c.double()).sum(0)
    torch.testing.assert_close(dw[1].double(), due, rtol=3e-6, atol=0)
    assert (dw[::2] == 0).all()


def _weight_bwd(c: Any, x: Any, ids: Any) -> np.ndarray:
    given = (torch.from_numpy(np.array(a)) for a in (c, x, ids))
    return kernels.picked_weight_bwd(*given, order.V, None, None, True).numpy()


def test_pairs_are_summed_in_the_order_of_their_rows() -> None:
    order.judge(_weight_bwd)


SORTED = kernels._sorted


def _from_the_end(c: Any, ids: Any, classes: int) -> Any:
    by_class, rows, by_pair, start = SORTED(c.flip(0, 1), ids.flip(0, 1), classes)
    return by_class, len(ids) - 1 - rows, by_pair, start


def _unsorted(c: Any, ids: Any, classes: int) -> Any:
    by_class, rows, by_pair, start = SORTED(c, ids, classes)
    return by_class, rows.roll(1), by_pair.roll(1), start


def _a_pair_late(c: Any, ids: Any, classes: int) -> Any:
    by_class, rows, by_pair, start = SORTED(c, ids, classes)
    return by_class, rows, by_pair, torch.cat([start[:3], start[3:4] + 1, start[4:]])


SORTS = {"not stable": _from_the_end, "not sorted": _unsorted, "a class begins a pair late": _a_pair_late}


@pytest.mark.parametrize("name", SORTS)
def test_a_broken_order_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_sorted", SORTS[name])
    with pytest.raises(AssertionError):
        order.judge(_weight_bwd)


def _problem(dtype: Any = torch.float64, n: int = 3, d: int = 4, v: int = 40) -> Any:
    g = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((n, d), (v, d), (v,)))
    return *(a.requires_grad_() for a in (x, w, b)), torch.randint(v, (n,), generator=g)


def _pair(n: int, v: int) -> Any:
    g = torch.Generator().manual_seed(4)
    ids, mass = torch.randint(v, (n, 4), generator=g), torch.rand(n, 4, generator=g, dtype=torch.float64)
    ids[0, 1], ids[1, 0] = ids[0, 0], -100
    return ids, mass


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none", "z_loss": 0.1, "logit_scale": 0.7},
    "cap": {"softcap": 3.0, "stats": ("entropy",)},
    "smooth": {"label_smoothing": 0.2, "reduction": "sum"},
}


@pytest.mark.usefixtures("few_sums")
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("pair", [False, True])
def test_sampled_gradient_is_the_cpus(name: str, pair: bool, ran: list[str]) -> None:
    """The head with grad_samples: loss and gradients those of the native kernels at the same points."""
    x, w, b, target = _problem()
    target = _pair(3, 40) if pair else target

    def answers() -> list[Any]:
        out = OPS.linear_cross_entropy(
            x, w, target, linear_bias=b, grad_samples=8, generator=torch.Generator().manual_seed(1), **HEADS[name]
        )
        loss, stats = out if isinstance(out, tuple) else (out, {})
        total = loss.sum() + sum(s.square().sum() for s in stats.values())
        return [loss, *stats.values(), *torch.autograd.grad(total, [x, w, b])]

    ours = answers()
    assert {*POINTS, "picked_input_bwd_kernel", "picked_weight_bwd_kernel"} <= {*ran}
    with _native():
        truths = answers()
    for one, other in zip(ours, truths, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@contextlib.contextmanager
def _native() -> Iterator[None]:
    """Within the interpreter's block, CPU tensors are the native kernels' again."""
    native: Any = importlib.import_module("torch_ops._rows.native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "serves_matrix", importlib.import_module("torch_ops._rows.triton").serves_matrix)
        yield


SPARSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none", "z_loss": 0.1, "logit_scale": 0.7, "stats": ("logprob", "lse")},
    "all": {"softcap": 3.0, "label_smoothing": 0.2, "stats": ("entropy",), "reduction": "sum"},
    "entropy": {"stats": ("entropy", "logprob")},
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_targets_are_the_cpus(name: str, ran: list[str]) -> None:
    """Along either axis, over the logits, in both heads: K ids a row by kernels that know one."""
    g = torch.Generator().manual_seed(7)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    ids, mass = torch.randint(20, (6, 5), generator=g), make(6, 5).abs()
    ids[0, 1:3], ids[1, 0], ids[2] = ids[0, 0], -100, -100
    x, w = 4 * make(6, 20), make(20).abs()
    x[3, :19], x[4, ids[4, 0]] = -torch.inf, 40.0
    hidden, table = make(6, 3), make(20, 3)

    def answers() -> list[Any]:
        found = []
        for inplace in (False, True):
            leaves = [x.clone().requires_grad_(), mass.clone().requires_grad_(), w.clone().requires_grad_()]
            given = leaves[0] * 1, (ids, leaves[1]), leaves[2]
            found += _all_of(OPS.cross_entropy(*given, inplace_backward=inplace, **SPARSE[name]), leaves)
        middle = [a.reshape(2, 3, -1).mT.clone().requires_grad_() for a in (x, mass)]
        found += _all_of(OPS.cross_entropy(middle[0], (ids.reshape(2, 3, 5).mT, middle[1]), **SPARSE[name]), middle)
        for memory in ("fast", "lean"):
            leaves = [a.clone().requires_grad_() for a in (hidden, table, mass)]
            out = OPS.linear_cross_entropy(
                *leaves[:2], (ids, leaves[2]), memory=memory, chunk_size=4 if memory == "fast" else 7, **SPARSE[name]
            )
            found += _all_of(out, leaves)
        return found

    ours = answers()
    assert {"cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel", "by_class_kernel", "place_kernel"} <= {*ran}
    with _native():
        for i, (one, other) in enumerate(zip(ours, answers(), strict=True)):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, equal_nan=True, msg=lambda m, i=i: f"{i} {m}")


def _all_of(out: Any, leaves: list[Any]) -> list[Any]:
    loss, stats = out if isinstance(out, tuple) else (out, {})
    total = loss.sum() + sum(s.nan_to_num(0.0, 0.0, 0.0).square().sum() for s in stats.values())
    return [loss, *stats.values(), *torch.autograd.grad(total, leaves)]


def test_sums_by_class() -> None:
    """Own, others', the first of equals: in plain ops and in the kernel, against sums by hand."""
    sparse: Any = importlib.import_module("torch_ops._rows.sparse")
    ids = torch.tensor([[3, 1, 3, -1, 1, 3], [-2, 5, 4, 5, -1, 0]])
    a = torch.tensor([[1e-9, 2, 4, 0, 1, 1], [0, 3, 5, 7, 0, 1e9]], dtype=torch.float32)
    same = ids[:, :, None] == ids[:, None]
    own, others = ((m.double() * a.double()[:, None]).sum(2) for m in (same, ~same))
    first = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1]]).bool()
    for found in (sparse.by_class(ids, a), kernels.by_class(ids, a)):
        torch.testing.assert_close(found[0].double()[ids >= 0], own[ids >= 0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[1].double()[ids >= 0], others[ids >= 0], rtol=1e-6, atol=0)
        assert torch.equal(found[2], first)


def test_linear_at_is_the_cpus(ran: list[str]) -> None:
    x, w, b, _ = _problem()
    ids, up = _pair(3, 40)

    def answers() -> list[Any]:
        z = OPS.linear_at(x, w, ids, linear_bias=b)
        first = torch.autograd.grad(z, [x, w, b], up, create_graph=True)
        return [z, *first, *torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), [x, w])]

    ours = answers()
    assert {*PICKED} <= {*ran}
    with _native():
        for one, other in zip(ours, answers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_no_value_is_looked_at() -> None:
    """A fake tensor has none: whatever would be a sync on a device raises here."""
    with FakeTensorMode():
        x, w = torch.empty(5, 7, requires_grad=True), torch.empty(300, 7, requires_grad=True)
        ids = torch.empty(5, 3, dtype=torch.int64)
        for target in (torch.empty(5, dtype=torch.int64), (ids, torch.empty(5, 3))):
            for options in ({}, {"softcap": 3.0, "stats": ("entropy",), "reduction": "none"}, {"label_smoothing": 0.1}):
                out = OPS.linear_cross_entropy(x, w, target, grad_samples=4, **options)
                loss, stats = out if isinstance(out, tuple) else (out, {})
                torch.autograd.grad(loss.sum() + sum(s.sum() for s in stats.values()), (x, w))
        for options in ({}, {"label_smoothing": 0.1, "stats": ("entropy",)}):
            for out in (
                OPS.linear_cross_entropy(x, w, (ids, torch.empty(5, 3)), **options),
                OPS.cross_entropy(x @ w.T, (ids, torch.empty(5, 3)), inplace_backward=True, **options),
            ):
                loss, stats = out if isinstance(out, tuple) else (out, {})
                torch.autograd.grad(loss + sum(s.sum() for s in stats.values()), (x, w))
        (dx,) = torch.autograd.grad(OPS.linear_at(x, w, ids).sum(), x, create_graph=True)
        torch.autograd.grad(dx.sum(), w)


def test_opcheck() -> None:
    x, w, ids, c, _ = checks.family(torch.float32, 5, 7, 9, 3)
    z, row, u = torch.randn(5, 9), torch.ones(5), torch.rand(5, 4)
    calls = {
        "points": (z, z.max(1)[0], row, ids, u, None, 1.0, None),
        "picked_fwd": (x, w, ids),
        "picked_input_bwd": (c, w, ids, row, torch.ones(7), True),
        "picked_weight_bwd": (c, x.half(), ids, 9, None, None, False),
        "by_class": (ids, c),
        "place_": (z, ids, c, 1),
    }
    for name, args in calls.items():
        op = getattr(torch.ops.softmax_ext_triton, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


CHECKS: dict[str, Callable[[], None]] = {
    "points": lambda: checks.test_points(torch.float32, 129, 10),
    "edges": checks.test_edges_of_points,
    "products": lambda: checks.test_three_products(torch.float32, (20, 17, 3, 9)),
    "ids": checks.test_ids_of_no_class_are_nan_and_reach_no_weight,
    "lead": checks.test_the_first_coefficient_is_that_of_all_leading_ids,
}
# A mutant of the kernels: file, what is replaced, by what, and the check that must fail.
MUTANTS: dict[str, tuple[str, str, str, str]] = {
    "target not left out": ("points", "if LESS:", "if LESS and V < 0:", "points"),
    "one u a row": ("points", "tl.load(u + row * K + k, mask", "tl.load(u + row * K + 0 * k, mask", "points"),
    "last stratum dropped": ("points", "mine = (k < K)", "mine = (k < K - 1)", "points"),
    "strata of K + 1": ("points", ".to(tl.float64)) / K * whole", ".to(tl.float64)) / (K + 1) * whole", "points"),
    "sums not carried": ("points", "own + tl.cumsum(s, axis=1)", "tl.cumsum(s, axis=1)", "points"),
    "group before": ("points", "return low, tl.load", "return low - 1, tl.load", "points"),
    "padding has mass": ("points", 'mask=inside, other=-float("inf")', "mask=inside, other=0.0", "points"),
    "bad rows": ("points", "bad & (ignored == 0), 0, -1", "bad & ignored, 0, -1", "edges"),
    "last part dropped": ("picked", "last * PART, end, cols", "end, end, cols", "products"),
    "parts dropped": ("picked", "range(first, last)", "range(first, last - 1)", "products"),
    "begun with nothing": ("picked", "if by is None", "if by is None or True", "products"),
    "one column for all": ("picked", "tl.maximum(k - (K - C), 0)", "0", "products"),
    "no class is a class": ("picked", "lost > 0", "lost > K", "ids"),
}  # fmt: skip


@pytest.mark.parametrize("name", [None, *MUTANTS])
@pytest.mark.slow
def test_no_mutant_passes(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {stem: Path(getattr(kernels, f"gpu_{stem}").__file__).read_text() for stem in ("points", "picked")}
    caught = None
    if name is not None:
        stem, right, wrong, caught = MUTANTS[name]
        assert right in files[stem], "the kernels no longer say this"
        files[stem] = files[stem].replace(right, wrong)
    tag = f"classes_mutant_{abs(hash(name))}"
    (tmp_path / tag).mkdir()
    for stem, text in files.items():
        (tmp_path / tag / f"{stem}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for stem in files:
        monkeypatch.setattr(kernels, f"gpu_{stem}", importlib.import_module(f"{tag}.{stem}"))
    make_narrow(monkeypatch)
    if caught is not None:
        with pytest.raises(AssertionError):
            CHECKS[caught]()
        return
    for check in CHECKS.values():
        check()
