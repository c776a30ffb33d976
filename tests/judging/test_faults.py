"""Faults put back into the package, in both frameworks: low-rank heads, array scales, statistics, divergences.

Each check passes on the package as it is, and fails with each fault of its kind.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.judging import cases, checks
from tests.judging.divergences import BETA, DOORS, judged, of_logits, pairs
from tests.judging.frameworks import Jax, Named, Torch

R = np.random.default_rng(11)
HEAD: Named = {k: R.standard_normal(s) for k, s in {"input": (9, 4), "linear_weight": (13, 4), "down": (2, 4)}.items()}
HEAD |= {"up": R.standard_normal((13, 2)), "target": np.array([0, 12, -100, 3, 3, 5, 7, 1, 2])}
UP = np.linspace(-1.0, 2.0, 9)


class _LowRank:
    """A framework that takes A and B as arrays of their own."""

    def raw(self, op: str, **arguments: Any) -> Any:
        if "up" in arguments:
            arguments["low_rank"] = (arguments.pop("down"), arguments.pop("up"))
        return super().raw(op, **arguments)  # pyright: ignore[reportAttributeAccessIssue]


KINDS = {kind.name: type(kind.__name__, (_LowRank, kind), {}) for kind in (Torch, Jax) if kind.name in DOORS}


def low_rank(fw: Any) -> None:
    plain = {k: v for k, v in HEAD.items() if k not in ("down", "up")}
    given: Any = {**plain, "low_rank": (HEAD["down"], HEAD["up"]), "reduction": "none"}
    dx, dw, _ = reference.linear_cross_entropy_grad(**given, dloss=UP)
    truth = {"input": dx, "linear_weight": dw, "down": HEAD["up"].T @ dw, "up": dw @ HEAD["down"].T}
    values, found = fw("linear_cross_entropy", "float64", HEAD, {"value": UP}, reduction="none")
    np.testing.assert_allclose(values["value"], reference.linear_cross_entropy(**given), rtol=1e-11)
    for name, right in truth.items():
        np.testing.assert_allclose(found[name], right, rtol=1e-9, atol=1e-12, err_msg=name)


def loss(fw: Any, arrays: Named, upstream: Named, **options: Any) -> None:
    truth = checks.oracle("cross_entropy", arrays, upstream, **options)
    size = checks.scales("cross_entropy", arrays, upstream, dtype="float64", **options)
    checks.judge("cross_entropy", "float64", fw("cross_entropy", "float64", arrays, upstream, **options), truth, size)


def scale(fw: Any) -> None:
    r = cases.rows(17, "float64")
    arrays = {"input": r.x, "target": r.target, "logit_scale": np.linspace(0.3, 2.0, len(r.x))}
    loss(fw, arrays, {"value": r.dloss}, reduction="none")


def statistics(fw: Any) -> None:
    r = cases.rows(17, "float64")
    ups = {"value": 0.0 * r.dloss, "log_sum_sq": r.dloss, "mean_logit": r.dloss[::-1].copy()}
    loss(fw, {"input": r.x, "target": r.target}, ups, reduction="none", stats=("log_sum_sq", "mean_logit", "rank"))


def divergence(kind: str) -> Callable[[Any], None]:
    def check(fw: Any) -> None:
        s, t = pairs(17, "float64")["elsewhere"]
        how: dict[str, Any] = {"kind": kind, "beta": BETA}
        judged(*of_logits(DOORS[fw.name](), s, t, "float64", **how), s, t, "float64", **how)

    return check


TV, JSD = divergence("tv"), divergence("jsd")


class Package:
    """A framework's package as faults see it."""

    def __init__(self, fw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.ops, self._patch = fw.name, fw.ops, monkeypatch.setattr

    def still(self, x: Any) -> Any:
        """x with a gradient of 0."""
        return (x.detach() if self.name == "torch" else importlib.import_module("jax").lax.stop_gradient(x)) + 0.0 * x

    def option(self, door: str, name: str, wrong: Callable[[Any], Any]) -> None:
        """A door that makes `wrong` of an option."""
        right = getattr(self.ops, door)
        self._patch(self.ops, door, lambda *a, **o: right(*a, **{**o, name: wrong(o[name])}))

    def part(self, torch: str, jax: str, wrong: Callable[[Any], Any]) -> None:
        """A function "module:name" of either package, exchanged for `wrong` of it."""
        module, _, name = (torch if self.name == "torch" else jax).partition(":")
        at = importlib.import_module(f"{self.name}_ops.{module}")
        self._patch(at, name, wrong(getattr(at, name)))

    def without_kernels(self) -> None:
        native = importlib.import_module(f"{self.name}_ops._rows.native")
        if self.name == "torch":
            self._patch(native, "serves", lambda x, dim: False)
        else:
            self._patch(native, "missing", "asked for by a test")


def halved(right: Any) -> Any:
    def wrong(*a: Any) -> Any:
        found = right(*a)
        return (0.5 * found[0],) if isinstance(found, tuple) else 0.5 * found

    return wrong


def tv_turned(p: Package) -> None:
    p.without_kernels()

    def wrong(right: Any) -> Any:
        return lambda *a: -right(*a) if "tv" in [getattr(v, "kind", "") for v in a] else right(*a)

    p.part("_rows.divergence:weighed", "_rows.divergence:slope_of", wrong)


OF_ROWS, OF_SHARDS = "_rules.statistics", "_parallel.statistics"
FAULTS: dict[str, tuple[Callable[[Any], None], Callable[[Package], None]]] = {
    "low rank, dA forgotten": (
        low_rank,
        lambda p: p.option("linear_cross_entropy", "low_rank", lambda pair: (p.still(pair[0]), pair[1])),
    ),
    "low rank, dB forgotten": (
        low_rank,
        lambda p: p.option("linear_cross_entropy", "low_rank", lambda pair: (pair[0], p.still(pair[1]))),
    ),
    "low rank, dA halved": (
        low_rank,
        lambda p: p.option("linear_cross_entropy", "low_rank", lambda ab: (0.5 * (ab[0] + p.still(ab[0])), ab[1])),
    ),
    "scale, its gradient forgotten": (scale, lambda p: p.option("cross_entropy", "logit_scale", p.still)),
    "scale, its gradient halved": (
        scale,
        lambda p: p.option("cross_entropy", "logit_scale", lambda s: 0.5 * (s + p.still(s))),
    ),
    "scale, of the row before": (
        scale,
        lambda p: p.option("cross_entropy", "logit_scale", lambda s: s[np.arange(len(s)) - 1]),
    ),
    "rank, ties counted": (
        statistics,
        lambda p: p.part(
            f"{OF_ROWS}:larger",
            f"{OF_SHARDS}:larger",
            lambda right: lambda z, than, at: right(z, than, at) + (z == than).sum(at, keepdims=True) - 1,
        ),
    ),
    "log_sum_sq, its gradient halved": (
        statistics,
        lambda p: p.part("_rules.log_sum_sq:_gradient", "_rules.log_sum_sq:_gradient", halved),
    ),
    "mean_logit, halved": (statistics, lambda p: p.part(f"{OF_ROWS}:_mean", f"{OF_SHARDS}:_mean", halved)),
    "tv, its gradient turned": (TV, tv_turned),
    "jsd, the shares exchanged": (JSD, lambda p: p.option("divergence", "beta", lambda b: 1.0 - b)),
    "divergence, rows exchanged": (
        JSD,
        lambda p: p.option("divergence", "teacher", lambda t: t[np.arange(3) - 1]),
    ),
}


@pytest.fixture(params=KINDS)
def fw(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each framework anew: nothing that was compiled with a fault, or without, is found again."""
    found = KINDS[request.param]()
    forget = importlib.import_module("jax").clear_caches if request.param == "jax" else lambda: None
    forget()
    yield found
    forget()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, fw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check, put_back = FAULTS[fault]
    put_back(Package(fw, monkeypatch))
    with pytest.raises(AssertionError):
        check(fw)


@pytest.mark.parametrize("check", list(dict.fromkeys(check for check, _ in FAULTS.values())))
def test_the_package_passes(check: Callable[[Any], None], fw: Any) -> None:
    check(fw)
