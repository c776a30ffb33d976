"""`make accuracy`: errors in ulp against the float64 reference, ours beside the frameworks' own ops.

The truth is computed in extended precision from the same rounded inputs. One ulp is that of the inputs' type: 2^-23
(float32), 2^-7 (bfloat16) or 2^-10 (float16) relative to the true value. Numbers below 2^-124, next to float32's
smallest normal number, count as 0 (kernels flush subnormals); float16's subnormals are 2^-24 apart. The loss is one
number per row; the gradient is that of the summed loss, class index targets. The gradients of softmax and log_softmax
are taken with loud upstreams and with upstreams of 1 at the target, their errors in ulp of the largest term that an
entry is the sum of: softmax's y_j (dy_j - mean) and y_j times the mean of |dy - mean|, log_softmax's (1 - p_j) dy_j and
p_j times the others. The mean is over the entries of a case, then over cases.

Then the relative error of dL/dlinear_weight against the number of chunks (`benchmarks.weight_error`), and bias and
variance of a sampled gradient against the number of points (`benchmarks.sample_error`). All figures are kept in
benchmarks/results, the errors drawn in docs/accuracy.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import jax_ops
import torch_ops
from benchmarks import records, sample_error, weight_error
from benchmarks.accuracy_plot import draw
from benchmarks.cases import rounded
from benchmarks.errors import Error
from softmax_ext import reference
from softmax_ext.reference.arithmetic import others

ROWS = 16
SIZES = (10, 1000, 32000)
UPSTREAMS = ("loud", "one-hot")
PULLED = tuple(f"{op} gradient, {up}" for op in ("softmax", "log_softmax") for up in UPSTREAMS)
QUANTITIES = ("softmax", "log_softmax", "loss", "gradient", *PULLED)
# Of each type: an ulp relative to the true value, the number below which ulps no longer shrink, and that below which
# an answer counts as 0.
UNITS = {
    "float32": (2.0**-23, 2.0**-124, 2.0**-124),
    "bfloat16": (2.0**-7, 2.0**-124, 2.0**-124),
    "float16": (2.0**-10, 2.0**-14, 0.0),
}
ALL = "all"
RESULTS = Path("benchmarks", "results")
PICTURE = Path("docs", "accuracy.png")
Values = dict[str, np.ndarray]


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, keep and draw."""
    parser = argparse.ArgumentParser("python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="(default: %(default)s)")
    options = parser.parse_args(given)
    console = Console(width=None if sys.stdout.isatty() else 150)
    errors = list(measure())
    for dtype in UNITS:
        console.print(table(errors, dtype))
    weights = weight_error.measure()
    console.print(weight_error.table(weights))
    samples = sample_error.measure()
    console.print(sample_error.table(samples))
    records.write(Error, errors, options.results / "accuracy.csv")
    records.write(weight_error.WeightError, weights, options.results / "weight_error.csv")
    records.write(sample_error.SampleError, samples, options.results / "sample_error.csv")
    draw(options.picture, errors, weights)
    console.print(f"kept in {options.results}, drawn in {options.picture}")
    return 0


def measure(sizes: Sequence[int] = SIZES) -> Iterator[Error]:
    """Every call on every case, then on all cases together."""
    for dtype in UNITS:
        found: dict[tuple[str, str], list[Error]] = {}
        for case, x in cases(dtype, sizes).items():
            t = np.arange(ROWS) % x.shape[1]
            t[: ROWS // 2] = x.argmax(1)[: ROWS // 2]  # half the rows are right already
            dys = upstreams(x, t, dtype)
            true, terms = truth(x, t, dys)
            for call, run in CALLS.items():
                values = run(x, t, dys, dtype)
                for q in QUANTITIES:
                    # softmax's gradient starts from an output: one that counts as 0 has a gradient that does
                    start = true["softmax"] if q.startswith("softmax gradient") else None
                    off = ulps(values[q], true[q], dtype, terms.get(q), start)
                    error = Error(q, dtype, call, case, _short(off.max()), _short(off.mean()))
                    found.setdefault((q, call), []).append(error)
        for (q, call), errors in found.items():
            yield from errors
            worst, mean = max(e.worst_ulp for e in errors), float(np.mean([e.mean_ulp for e in errors]))
            yield Error(q, dtype, call, ALL, worst, _short(mean))


def cases(dtype: str, sizes: Sequence[int] = SIZES) -> dict[str, np.ndarray]:
    """Named logits, loud in different ways; float32 whatever the type, whose values they are."""
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for v in sizes:
        x = rng.standard_normal((ROWS, v)).astype(np.float32)
        for scale in (1, 5, 20):
            found[f"randn x {scale}, V = {v}"] = x * np.float32(scale)
        found[f"offset 1000, V = {v}"] = x + np.float32(1000)
        spike = x.copy()
        spike[np.arange(ROWS), rng.integers(0, v, ROWS)] += 40
        found[f"one spike of 40, V = {v}"] = spike
    return {name: rounded(x, dtype) for name, x in found.items()}


def upstreams(x: np.ndarray, t: np.ndarray, dtype: str) -> list[np.ndarray]:
    """dy of both kinds: standard normal with a 10 in each row, and 1 at the target."""
    rng = np.random.default_rng(1)
    loud = rng.standard_normal(x.shape).astype(np.float32)
    loud[np.arange(ROWS), rng.integers(0, x.shape[1], ROWS)] += 10
    return [rounded(loud, dtype), (t[:, None] == np.arange(x.shape[1])).astype(np.float32)]


def truth(x: np.ndarray, t: np.ndarray, dys: Sequence[np.ndarray]) -> tuple[Values, Values]:
    """The reference's answers, and the largest terms of those that are sums."""
    p = reference.softmax(x)
    true = {
        "softmax": p,
        "log_softmax": reference.log_softmax(x),
        "loss": np.asarray(reference.cross_entropy(x, t, reduction="none")),
        "gradient": reference.cross_entropy_grad(x, t, reduction="sum"),
    }
    terms: Values = {}
    q = others(p)
    for up, given in zip(UPSTREAMS, dys, strict=True):
        dy = given.astype(np.float64)
        names = [f"{op} gradient, {up}" for op in ("softmax", "log_softmax")]
        true[names[0]], true[names[1]] = reference.softmax_vjp(p, dy), reference.log_softmax_vjp(x, dy)
        g = dy - np.sum(p * dy, -1, keepdims=True)
        away = np.abs(g * q - others(p * g))  # |dy_j - mean|
        terms[names[0]] = p * np.maximum(away, np.sum(p * away, -1, keepdims=True))
        terms[names[1]] = np.maximum(q * np.abs(dy), p * others(np.abs(dy)))
    return true, terms


def with_torch(softmax: Callable, log_softmax: Callable, loss: Callable) -> Callable[..., Values]:
    """The quantities by three PyTorch functions."""

    def values(x: np.ndarray, t: np.ndarray, dys: Sequence[np.ndarray], dtype: str) -> Values:
        kind = getattr(torch, dtype)
        logits, target = torch.from_numpy(x).to(kind).requires_grad_(), torch.from_numpy(t)
        rows = loss(logits, target, reduction="none")
        (gradient,) = torch.autograd.grad(rows.sum(), logits)
        found = [softmax(logits, -1), log_softmax(logits, -1), rows, gradient]
        for y in found[:2]:
            for dy in dys:
                found += torch.autograd.grad(y, logits, torch.from_numpy(dy).to(kind), retain_graph=True)
        return {name: v.detach().float().numpy() for name, v in zip(QUANTITIES, found, strict=True)}

    return values


def with_jax(softmax: Callable, log_softmax: Callable, loss: Callable) -> Callable[..., Values]:
    """The quantities by three JAX functions, under jit."""

    @jax.jit
    def values(x: jax.Array, t: jax.Array, dys: list[jax.Array]) -> list[jax.Array]:
        gradient = jax.grad(lambda x: loss(x, t).sum())(x)
        found = [softmax(x), log_softmax(x), loss(x, t), gradient]
        for op in (softmax, log_softmax):
            found += [jax.vjp(op, x)[1](dy)[0] for dy in dys]
        return [v.astype(jnp.float32) for v in found]

    def run(x: np.ndarray, t: np.ndarray, dys: Sequence[np.ndarray], dtype: str) -> Values:
        found = values(jnp.asarray(x, dtype), jnp.asarray(t), [jnp.asarray(dy, dtype) for dy in dys])
        return {name: np.asarray(v) for name, v in zip(QUANTITIES, found, strict=True)}

    return run


CALLS: dict[str, Callable[..., Values]] = {
    "torch_ops": with_torch(torch_ops.softmax, torch_ops.log_softmax, torch_ops.cross_entropy),
    "jax_ops": with_jax(
        jax_ops.softmax, jax_ops.log_softmax, lambda x, t: jax_ops.cross_entropy(x, t, reduction="none")
    ),
    "torch": with_torch(torch.softmax, torch.log_softmax, F.cross_entropy),
    "jax, optax": with_jax(jax.nn.softmax, jax.nn.log_softmax, optax.softmax_cross_entropy_with_integer_labels),
}


def ulps(
    found: np.ndarray,
    true: np.ndarray,
    dtype: str,
    terms: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Errors in ulp of the true values, or of the terms they are sums of; NaN is infinitely wrong.

    Where `start`, from which they are formed, counts as 0, so may they.
    """
    unit, least, zero = UNITS[dtype]
    found = found.astype(np.float64)
    off = np.abs(found - true) / (unit * np.maximum(np.abs(true if terms is None else terms), least))
    lost = np.minimum(np.abs(true), np.abs(true if start is None else start)) < zero
    off = np.where(lost & (np.abs(found) <= zero), 0.0, off)
    return np.where(np.isnan(off), np.inf, off)


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def table(errors: Sequence[Error], dtype: str) -> Table:
    """One type: worst (mean) over all cases, and the worst one."""
    found = Table(title=f"{dtype}: worst (mean) error in ulp, and where the worst is", title_justify="left")
    found.add_column("")
    for call in CALLS:
        found.add_column(call)
    for q in QUANTITIES:
        cells = []
        for call in CALLS:
            mine = [e for e in errors if (e.quantity, e.dtype, e.call) == (q, dtype, call)]
            whole = next(e for e in mine if e.case == ALL)
            where = max((e for e in mine if e.case != ALL), key=lambda e: e.worst_ulp).case
            cells.append(f"{whole.worst_ulp:.3g} ({whole.mean_ulp:.2g})\n{where}")
        found.add_row(q, *cells)
    return found


if __name__ == "__main__":
    sys.exit(main())
