"""`make accuracy` sees errors, and what it kept keeps the README's promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import accuracy, accuracy_plot, records, weight_error
from benchmarks.accuracy import ALL, CALLS, QUANTITIES, UNITS, Error
from benchmarks.weight_error import WeightError

RESULTS = Path(__file__).parents[2] / accuracy.RESULTS


@pytest.mark.parametrize(
    ("dtype", "found", "true", "expected"),
    [
        ("float32", 1 + 2.0**-23, 1.0, 1.0),
        ("bfloat16", 1 + 2.0**-7, 1.0, 1.0),
        ("float16", 2 * (1 - 2.0**-10), 2.0, 1.0),
        ("float32", 0.0, 2.0**-125, 0.0),  # flushed
        ("float32", 2.0**-124, 2.0**-124 * 0.9999, 0.0),  # rounded up to the first number that counts
        ("float32", 0.0, 2.0**-123, 2.0**23),
        ("float32", 1e-30, 0.0, 1e-30 * 2.0**147),
        ("float16", 2.0**-24, 1.5 * 2.0**-24, 0.5),  # subnormals are evenly spaced
        ("float32", np.nan, 1.0, np.inf),
        ("float32", np.inf, 1.0, np.inf),
    ],
)
def test_an_ulp(dtype: str, found: float, true: float, expected: float) -> None:
    assert accuracy.ulps(np.array([found]), np.array([true]), dtype)[0] == pytest.approx(expected)


def test_errors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = CALLS["torch_ops"]

    def spoilt(x: np.ndarray, t: np.ndarray, dys: list[np.ndarray], dtype: str) -> dict[str, np.ndarray]:
        values = ours(x, t, dys, dtype)
        values["gradient"].flat[-1] = np.nan
        pulled = values["softmax gradient, one-hot"]
        np.put_along_axis(pulled, x.argmax(1)[:, None], 0, 1)  # what cancellation leaves at a confident maximum
        return values | {"softmax": values["softmax"] * np.float32(1 + 2.0**-6)}

    monkeypatch.setattr(accuracy, "CALLS", {"ours": ours, "spoilt": spoilt})
    errors = {(e.quantity, e.dtype, e.call): e for e in accuracy.measure((10,)) if e.case == ALL}
    assert len(errors) == len(QUANTITIES) * len(UNITS) * 2
    for dtype in UNITS:
        for quantity in QUANTITIES:
            assert 0 < errors[quantity, dtype, "ours"].mean_ulp <= errors[quantity, dtype, "ours"].worst_ulp < 8
        assert errors["softmax", dtype, "spoilt"].worst_ulp > 2
        assert errors["softmax gradient, one-hot", dtype, "spoilt"].worst_ulp > 100
        assert errors["gradient", dtype, "spoilt"].worst_ulp == np.inf
        assert errors["loss", dtype, "spoilt"].worst_ulp == errors["loss", dtype, "ours"].worst_ulp


def test_what_was_kept_is_what_is_promised(tmp_path: Path) -> None:
    errors, weights = (
        records.read(Error, RESULTS / "accuracy.csv"),
        records.read(WeightError, RESULTS / "weight_error.csv"),
    )
    whole = {(e.quantity, e.dtype, e.call): e for e in errors if e.case == ALL}
    assert set(whole) == {(q, d, c) for q in QUANTITIES for d in UNITS for c in CALLS}
    for (quantity, dtype, call), error in whole.items():
        mine = [e for e in errors if (e.quantity, e.dtype, e.call) == (quantity, dtype, call) and e.case != ALL]
        assert len(mine) == 5 * len(accuracy.SIZES)
        assert error.worst_ulp == max(e.worst_ulp for e in mine)
        assert error.mean_ulp == pytest.approx(np.mean([e.mean_ulp for e in mine]), rel=1e-3)
        if call.endswith("_ops"):
            # softmax's gradient starts from an output that half precision rounded, float16 to multiples of 2^-24
            starts = {"float32": 2.5, "bfloat16": 1.6, "float16": 8.0}[dtype]
            rounded = 0.51 if quantity in QUANTITIES[:4] else 0.75  # of the largest term, not of their sum
            limit = starts if quantity.startswith("softmax gradient") else 2.0 if dtype == "float32" else rounded
            assert error.worst_ulp < limit
    ours = [e for e in weights if "ours" in e.call]
    assert {e.chunks for e in ours} == set(weight_error.CHUNKS)
    assert max(e.relative for e in ours) < 2**-8
    accuracy_plot.draw(tmp_path / "a.png", errors, weights)
    assert (tmp_path / "a.png").stat().st_size > 10_000
