"""Do two trainings part by more than rounding explains?"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from examples.recipe import Weights

FACTOR = 10.0


class Trained(Protocol):
    """What is judged of a run: losses in nats by step, and the weights after the last."""

    @property
    def losses(self) -> list[float]: ...  # noqa: D102
    @property
    def weights(self) -> Weights: ...  # noqa: D102


@dataclass(frozen=True)
class Bounded:
    """Entry by entry: |ours - built-in|, |control - built-in|, and what rounding allows."""

    difference: np.ndarray
    control: np.ndarray
    allowed: np.ndarray

    @property
    def ok(self) -> bool:
        """False also for NaN: a comparison with NaN is false."""
        return bool(self.difference.size and np.all(self.difference <= self.allowed))

    @property
    def share(self) -> float:
        """The largest difference / allowed; NaN where there is one."""
        return float(np.max(self.difference / self.allowed))


@dataclass(frozen=True)
class Verdict:
    """A loss curve by step in nats, and the largest difference in each array of weights."""

    curve: Bounded
    weights: Bounded

    @property
    def ok(self) -> bool:
        """Both are within their bounds."""
        return self.curve.ok and self.weights.ok


def judge(built_in: Trained, ours: Trained, control: Trained) -> Verdict:
    """Compares our training with the built-in one, by bounds measured on the built-in alone.

    Training amplifies rounding at a rate that belongs to model, data and optimizer, so no fixed
    number is right for every length of run. The control measures that rate: the built-in loss on
    the same model with its tokens renumbered, which changes nothing but the order of the sums over
    the vocabulary. Our loss sums in another order too, and may part from the built-in FACTOR times
    as far as the control has. FACTOR is 10 because one control is one draw of a random walk. What
    is not finite is never within the bound.
    """
    return Verdict(
        judge_curve(built_in.losses, ours.losses, control.losses),
        judge_weights(built_in.weights, ours.weights, control.weights),
    )


def judge_curve(built_in: list[float], ours: list[float], control: list[float]) -> Bounded:
    """Losses by step, each by the farthest that the control has parted up to that step.

        allowed_t = FACTOR * max(ulp(loss_0), max_{s <= t} |control_s - built_in_s|)

    with ulp the float32 spacing, about 1e-6 at a loss of 10.

    Raises:
        ValueError: the lengths differ.
    """
    truth, mine, other = (np.asarray(x, np.float64) for x in (built_in, ours, control))
    if not truth.shape == mine.shape == other.shape:
        raise ValueError(f"curves of lengths {truth.size}, {mine.size} and {other.size}")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, as it should be
        difference, drift = np.abs(mine - truth), np.abs(other - truth)
    return _bounded(difference, drift, np.maximum.accumulate(drift), np.abs(truth[:1]))


def judge_weights(built_in: Weights, ours: Weights, control: Weights) -> Bounded:
    """One entry for each array, by name in order: only the weights show the last step's gradient.

    The largest difference of any weight may be FACTOR times the control's, or times the float32
    spacing at the array's largest weight.

    Raises:
        ValueError: the names or the shapes differ.
    """
    shapes = [{name: w.shape for name, w in weights.items()} for weights in (built_in, ours, control)]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise ValueError(f"weights of other shapes: {shapes}")
    names = sorted(built_in)

    def apart(weights: Weights) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.array([np.abs(weights[name] - built_in[name].astype(np.float64)).max() for name in names])

    largest = np.array([np.abs(built_in[name]).max() for name in names])
    difference, drift = apart(ours), apart(control)
    return _bounded(difference, drift, drift, largest)


def _bounded(difference: np.ndarray, control: np.ndarray, drift: np.ndarray, at: np.ndarray) -> Bounded:
    ulp = np.spacing(at.astype(np.float32)).astype(np.float64)
    allowed = FACTOR * np.maximum(ulp, drift)
    allowed[~np.isfinite(allowed)] = np.nan  # a control that blew up allows nothing
    return Bounded(difference, control, allowed)
