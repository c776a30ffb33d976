"""What accuracy buys: training long after every row is right, in float32, with the built-in loss and with ours.

    python -m examples.confident [--steps 5000] [--share 0.4 0.7] [--results FOLDER] [--picture FILE]

The setting of Prieto et al. 2025, "Grokking at the Edge of Numerical Stability" (arXiv:2501.04697): modular addition, a
share of all pairs for training, one-hot inputs, two hidden layers of 200 without biases, full batches, AdamW without
weight decay. The modulus is 59, not the paper's 113, so that it takes minutes on a CPU. There the loss of confident
float32 rows becomes exactly 0 ("softmax collapse") and learning stops. Three losses from the same initial weights: the
built-in, the built-in on logits cast to float64, and ours on the float32 logits. Recorded: how many training rows have
loss 0, a gradient of exactly 0 at the target, and in every class; and the accuracy on both sets.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

import torch_ops
from benchmarks import records
from examples import palette

MODULUS, WIDTH = 59, 200
RATE, BETAS = 1e-3, (0.9, 0.99)
# The paper's code has 1e-25 to 1e-30. The square of a gradient below 1e-19 is no normal float32 number: divided by a
# root that underflowed plus such an epsilon, a step would be many times the learning rate.
EPSILON = 1e-18
LOSSES: dict[str, Callable[..., Tensor]] = {
    "built-in": F.cross_entropy,
    "built-in, float64 logits": lambda logits, target, **options: F.cross_entropy(logits.double(), target, **options),
    "ours": torch_ops.cross_entropy,
}
COLOUR = {"built-in": palette.TORCH, "built-in, float64 logits": "#12a4a4", "ours": palette.OURS_TORCH}


@dataclass(frozen=True)
class Point:
    """One training at one step; shares are of the training rows, accuracies of their set."""

    loss: str
    train_share: float
    step: int
    train_loss: float  # nats
    zero_loss: float
    zero_target_gradient: float
    zero_gradient: float
    train_accuracy: float
    test_accuracy: float


class Adder(nn.Module):
    """Two one-hot numbers, two hidden layers, one class for each sum."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (2 * MODULUS, WIDTH, WIDTH, MODULUS)
        self.weights = nn.ParameterList(nn.Linear(i, o, bias=False).weight for i, o in pairwise(sizes))

    def forward(self, pairs: Tensor) -> Tensor:
        """(N, 2) numbers to (N, MODULUS) logits."""
        first, *rest = self.weights
        # A one-hot row by a matrix is one of its columns.
        x = F.embedding(pairs + torch.tensor([0, MODULUS]), first.t()).sum(1)
        for weight in rest:
            x = F.linear(F.relu(x), weight)
        return x


def train(name: str, share: float, steps: int, every: int, seed: int = 0) -> Iterator[Point]:
    """One training; a point every so many steps, and after the last."""
    torch.manual_seed(seed)
    model = Adder()
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))[torch.randperm(MODULUS**2)]
    sums, count = pairs.sum(1) % MODULUS, int(share * len(pairs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True)
    for step in range(steps + 1):
        logits = model(pairs[:count])
        logits.retain_grad()
        loss = LOSSES[name](logits, sums[:count])
        optimizer.zero_grad()
        loss.backward()
        if step % every == 0 or step == steps:
            yield _point(name, share, step, model, logits, loss, pairs, sums)
        optimizer.step()


@torch.no_grad()
def _point(
    name: str, share: float, step: int, model: Adder, logits: Tensor, loss: Tensor, pairs: Tensor, sums: Tensor
) -> Point:
    count, gradient = len(logits), logits.grad
    assert gradient is not None
    here, there = sums[:count], sums[count:]
    rows = LOSSES[name](logits, here, reduction="none")
    return Point(
        loss=name,
        train_share=share,
        step=step,
        train_loss=_short(loss),
        zero_loss=_short((rows == 0).double().mean()),
        zero_target_gradient=_short((gradient.gather(1, here[:, None]) == 0).double().mean()),
        zero_gradient=_short((gradient == 0).all(1).double().mean()),
        train_accuracy=_short((logits.argmax(1) == here).double().mean()),
        test_accuracy=_short((model(pairs[count:]).argmax(1) == there).double().mean()),
    )


def _short(x: Tensor) -> float:
    return float(f"{x.item():.4g}")


def draw(path: Path, points: Sequence[Point]) -> None:
    """A row for each share of the pairs: what rounds to 0, the mean loss, and accuracy, by step."""
    shares = list(dict.fromkeys(point.train_share for point in points))
    with palette.sizes():
        figure = palette.canvas(2.9 * len(shares) + 0.5)
        for share, row in zip(shares, figure.subplots(len(shares), 3, squeeze=False), strict=True):
            _draw_row(row, [point for point in points if point.train_share == share])
            row[0].set_title(f"{share:.0%} of pairs for training", loc="left")
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
        palette.save(figure, path)


def _draw_row(row: Sequence[Axes], points: Sequence[Point]) -> None:
    zeros, losses, accuracy = row
    for name in dict.fromkeys(point.loss for point in points):
        mine, colour = [point for point in points if point.loss == name], COLOUR[name]
        style = "--" if name == "ours" else "-"  # where two lines are one, both can be seen
        steps = [point.step for point in mine]
        zeros.plot(steps, [p.zero_target_gradient for p in mine], style, color=colour, label=name)
        losses.plot(steps, [p.train_loss or math.nan for p in mine], style, color=colour)
        accuracy.plot(steps, [p.test_accuracy for p in mine], style, color=colour)
        accuracy.plot(steps, [p.train_accuracy for p in mine], ":", color=colour)
    zeros.set_ylabel("rows with gradient 0 at the target")
    losses.set_ylabel("mean training loss (nats)")
    losses.set_yscale("log")
    accuracy.set_ylabel("accuracy (dotted: training)")
    for axes in row:
        axes.set_xlabel("step")
        palette.plain(axes)


def main(given: Sequence[str] | None = None) -> list[Point]:
    """Train with each loss, print, keep and draw."""
    parser = argparse.ArgumentParser("python -m examples.confident", description=__doc__)
    parser.add_argument("--steps", type=int, default=5_000, help="(default: %(default)s)")
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.4, 0.7], help="of all pairs (default: %(default)s)"
    )
    parser.add_argument("--every", type=int, default=200, help="steps between records (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks", "results"), help="(default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("docs", "confident.png"), help="(default: %(default)s)")
    options = parser.parse_args(given)
    torch.set_num_threads(1)  # the matmuls are small, and one thread sums in one order
    points: list[Point] = []
    trainings = [train(name, share, options.steps, options.every) for share in options.share for name in LOSSES]
    for together in zip(*trainings, strict=True):
        for point in together:
            print(
                f"{point.train_share:.0%}, step {point.step}, {point.loss}: {point.train_loss:.3g} nats, gradient 0 at "
                f"the target in {point.zero_target_gradient:.1%}, everywhere in {point.zero_gradient:.1%}, accuracy "
                f"{point.train_accuracy:.1%} (training), {point.test_accuracy:.1%} (test)",
                flush=True,
            )
        points += together
        records.write(Point, points, options.results / "confident.csv")  # what there is, if it is interrupted
    draw(options.picture, points)
    return points


if __name__ == "__main__":
    main()
