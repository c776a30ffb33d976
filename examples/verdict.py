"""Do two loss curves part by more than rounding explains?"""

from dataclasses import dataclass

import numpy as np

FACTOR = 10.0


@dataclass(frozen=True)
class Verdict:
    """Curves by step, all in nats: |ours - built-in|, |control - built-in|, and the bound."""

    difference: np.ndarray
    control: np.ndarray
    allowed: np.ndarray

    @property
    def ok(self) -> bool:
        """False also for NaN: a comparison with NaN is false."""
        return bool(self.difference.size and np.all(self.difference <= self.allowed))


def judge(built_in: list[float], ours: list[float], control: list[float]) -> Verdict:
    """Compares our curve with the built-in one, by a bound measured on the built-in alone.

    Training amplifies rounding at a rate that belongs to model, data and optimizer, so no fixed
    number is right for every length of run. The control measures that rate: the built-in loss on
    the same model with its tokens renumbered, which changes nothing but the order of the sums over
    the vocabulary. Our loss sums in another order too, and may part from the built-in FACTOR times
    as far as the control has up to that step:

        allowed_t = FACTOR * max(ulp(loss_0), max_{s <= t} |control_s - built_in_s|)

    with ulp the float32 spacing, about 1e-6 at a loss of 10. FACTOR is 10 because one control is
    one draw of a random walk. A curve that is not finite is never within the bound.

    Args:
        built_in: losses by step.
        ours: losses by step, same length.
        control: losses by step, same length.

    Raises:
        ValueError: the lengths differ.
    """
    truth, mine, other = (np.asarray(x, np.float64) for x in (built_in, ours, control))
    if not truth.shape == mine.shape == other.shape:
        raise ValueError(f"curves of lengths {truth.size}, {mine.size} and {other.size}")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, as it should be
        difference, drift = np.abs(mine - truth), np.abs(other - truth)
    ulp = np.spacing(np.abs(truth[:1]).astype(np.float32)).astype(np.float64)
    allowed = FACTOR * np.maximum(ulp, np.maximum.accumulate(drift))
    allowed[~np.isfinite(allowed)] = np.nan  # a control that blew up allows nothing
    return Verdict(difference, drift, allowed)
