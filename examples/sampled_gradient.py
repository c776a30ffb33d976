"""`python -m examples.sampled_gradient`: a language model trained with an exact loss and a sampled gradient.

The same data and initial weights, the exact gradient beside `grad_samples` of several K, and beside two ways of leaving
out the small entries of the exact one, which is no unbiased gradient. Told by step: the mean training loss since the
last record, the held-out loss (always exact), the median time of a step and of the processor in it, and how the head's
rows moved, by how common their classes are. All trainings go on by turns, so one that is ended early has all seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from benchmarks import records
from examples import corpus, palette
from examples.recipe import Recipe
from examples.torch_lm import LM

SAMPLES = (4, 16, 64, 256)
LEFT_OUT = (-12, -9)  # entries of a row's gradient below these powers of 2 are dropped


# Classes by how often the training text has them, 1 the commonest: a row of the head moves as its class's rank lets it.
RANKS = (1, 17, 65, 257, 1025, 4097)


@dataclass(frozen=True)
class Point:
    """A training at one step."""

    gradient: str
    seed: int
    step: int
    train_loss: float  # nats, the mean since the last record
    held_out_loss: float
    seconds: float  # of a step, the median since the last record
    processor_seconds: float  # of all threads, where other programs' time does not count


@dataclass(frozen=True)
class Moved:
    """How far the head's rows of some classes moved, in the mean over them."""

    gradient: str
    seed: int
    step: int
    first_rank: int
    last_rank: int
    update: float  # a step's change of a row, its norm; the mean over the steps since the last record
    distance: float  # from where the row began


class _WithoutSmall(torch.autograd.Function):
    """Mean cross-entropy of logits whose gradient leaves out entries p - y below a bound, as some fused heads do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.bound = bound
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        logits, target = ctx.saved_tensors
        g = torch.softmax(logits, 1)
        g[torch.arange(len(g)), target] -= 1.0
        return g.masked_fill_(g.abs() < ctx.bound, 0.0) * (upstream[0] / len(g)), None, None


def _left_out(bound: float, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _WithoutSmall.apply(F.linear(hidden, weight), target, bound)  # pyright: ignore[reportReturnType]


Loss = Callable[..., Tensor]  # of hidden states, the head's weight and targets
EXACT = "exact"
LOSSES: dict[str, Loss] = {
    EXACT: torch_ops.linear_cross_entropy,
    **{f"K = {k}": partial(torch_ops.linear_cross_entropy, grad_samples=k) for k in SAMPLES},
    **{f"without entries below 2^{power}": partial(_left_out, 2.0**power) for power in LEFT_OUT},
}


def train(name: str, recipe: Recipe, tokens: np.ndarray, every: int) -> Iterator[tuple[Point, list[Moved]]]:
    """Train with Adam on nine tenths of the tokens, and tell of it `every` few steps."""
    cut = len(tokens) * 9 // 10
    # Draws of its own: trainings go on by turns.
    draws = torch.Generator().manual_seed(recipe.seed)
    loss_of = partial(LOSSES[name], generator=draws) if name.startswith("K") else LOSSES[name]
    by_rank = torch.from_numpy(np.argsort(-np.bincount(tokens[:cut], minlength=recipe.vocab), kind="stable").copy())
    held_out = list(replace(recipe, seed=recipe.seed + 1000, steps=8).batches(tokens[cut:]))
    model = LM(recipe.initial_weights(), recipe.heads)
    head = model.embedding.detach()
    start, updates = head.clone(), torch.zeros(recipe.vocab)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    losses: list[float] = []
    times: list[tuple[float, float]] = []
    for step, windows in enumerate(recipe.batches(tokens[:cut]), 1):
        before = head.clone()
        began = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss = _loss(model, windows, loss_of)
        loss.backward()
        optimizer.step()
        times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        losses.append(loss.item())
        updates += (head - before).norm(dim=1)
        if step % every == 0:
            with torch.no_grad():
                others = [_loss(model, w, torch_ops.linear_cross_entropy).item() for w in held_out]
            medians = [statistics.median(column) for column in zip(*times, strict=True)]
            found = map(_short, (statistics.fmean(losses), statistics.fmean(others), *medians))
            sizes = (updates / len(losses))[by_rank], (head - start).norm(dim=1)[by_rank]
            yield Point(name, recipe.seed, step, *found), _moved(name, recipe.seed, step, *sizes)
            losses, times, updates = [], [], torch.zeros(recipe.vocab)


def _moved(name: str, seed: int, step: int, updates: Tensor, distances: Tensor) -> list[Moved]:
    ends = [*(first - 1 for first in RANKS[1:] if first <= len(updates)), len(updates)]
    return [
        Moved(name, seed, step, i, j, *(_short(v[i - 1 : j].mean().item()) for v in (updates, distances)))
        for i, j in zip(RANKS, ends, strict=False)
    ]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _loss(model: LM, windows: np.ndarray, loss: Loss) -> Tensor:
    batch = torch.from_numpy(windows).long()
    return loss(model(batch[:, :-1]).flatten(0, 1), model.embedding, batch[:, 1:].flatten())


def draw(path: Path, points: Sequence[Point], moved: Sequence[Moved]) -> None:
    """Held-out loss by step, beside the exact gradient's and by time; how far the head's rows are, of exact's."""
    names, seeds = (list(dict.fromkeys(getattr(p, field) for p in points)) for field in ("gradient", "seed"))
    last = max(p.step for p in points)
    with palette.sizes():
        figure = palette.canvas(6.4)
        (by_step, beside), (by_time, distances) = figure.subplots(2, 2)
        for name in names:
            look = _look(name)
            curves = [[p for p in points if (p.gradient, p.seed) == (name, seed)] for seed in seeds]
            exact = [[p for p in points if (p.gradient, p.seed) == (EXACT, seed)] for seed in seeds]
            steps = [p.step for p in curves[0]]
            loss = np.mean([[p.held_out_loss for p in curve] for curve in curves], 0)
            above = np.array([[p.held_out_loss for p in curve] for curve in curves])
            above = above - [[p.held_out_loss for p in curve] for curve in exact]
            seconds = np.cumsum(np.mean([[p.processor_seconds for p in curve] for curve in curves], 0) * steps[0])
            by_step.plot(steps, loss, **look, label=name)
            by_time.plot(seconds, loss, **look)
            if name.startswith("K"):
                beside.plot(steps, above.mean(0), **look)
                beside.fill_between(steps, above.min(0), above.max(0), color=look["color"], alpha=0.15, linewidth=0)
            if name != EXACT:
                ends = [m for m in moved if m.gradient == name and m.step == last and m.seed == seeds[0]]
                ratio = [of_exact(moved, m) for m in ends]
                distances.plot([(m.first_rank * m.last_rank) ** 0.5 for m in ends], ratio, **look, marker="o")
        by_step.set(xlabel="step", ylabel="held-out loss, nats")
        beside.set(xlabel="step", ylabel="the same above exact's, both seeds")
        by_time.set(xlabel="seconds of the processor in steps", ylabel="held-out loss, nats")
        distances.set(xlabel="rank of a class, 1 the commonest", ylabel="moved, of exact's", xscale="log")
        ratios = [float(y) for line in distances.get_lines() for y in np.asarray(line.get_ydata())]
        palette.logarithmic(distances.yaxis, min(ratios) / 1.2, max(ratios) * 1.2)
        for axes in (by_step, beside, by_time, distances):
            palette.plain(axes)
        figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        palette.save(figure, path)


def of_exact(moved: Sequence[Moved], mine: Moved) -> float:
    """How far rows have come, by those of the exact gradient at the same step, the mean over the seeds."""
    key = (mine.step, mine.first_rank)
    sums = [
        sum(m.distance for m in moved if m.gradient == name and (m.step, m.first_rank) == key)
        for name in (mine.gradient, EXACT)
    ]
    return sums[0] / max(sums[1], 1e-30)


def _look(name: str) -> dict[str, Any]:
    colours = ("#262626", "#f2b35e", "#e8710a", "#b03a0e", "#5e1a05", "#1f6fb4", "#7fbde6")
    return {"color": colours[list(LOSSES).index(name)], "linestyle": "--" if name.startswith("without") else "-"}


def _line(p: Point, moved: Sequence[Moved]) -> str:
    found = f"{p.train_loss:.4g} nats, held out {p.held_out_loss:.4g}, {1e3 * p.seconds:.0f} ms a step"
    return (
        f"seed {p.seed}, step {p.step}, {p.gradient}: {found} ({1e3 * p.processor_seconds:.0f} of the processor), "
        f"updates {moved[0].update:.2g} (common) to {moved[-1].update:.2g} (rare)"
    )


def main(given: Sequence[str] | None = None) -> tuple[list[Point], list[Moved]]:
    """Train with each gradient and seed, print, keep and draw."""
    parser = argparse.ArgumentParser("python -m examples.sampled_gradient", description=__doc__)
    parser.add_argument("--steps", type=int, default=900, help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps between records (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="(default: PyTorch's)")
    parser.add_argument("--vocab", type=int, default=corpus.VOCAB, help="(default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=corpus.MAX_BYTES, help="of text (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the tokens (default: as the demo's)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks", "results"), help="(default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("docs", "sampled.png"), help="(default: %(default)s)")
    options = parser.parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    tokens = np.load(corpus.tokens_file(options.vocab, options.bytes, options.cache)[0])
    recipe = Recipe(vocab=options.vocab, steps=options.steps, learning_rate=2e-3)
    points: list[Point] = []
    moved: list[Moved] = []
    # By turns: what the machine does meanwhile meets all of them.
    trainings = [
        train(name, replace(recipe, seed=seed), tokens, options.every) for seed in options.seeds for name in LOSSES
    ]
    for together in zip(*trainings, strict=True):
        for point, rows in together:
            print(_line(point, rows), flush=True)
            points.append(point)
            moved += rows
        records.write(Point, points, options.results / "sampled.csv")
        records.write(Moved, moved, options.results / "sampled_updates.csv")
    draw(options.picture, points, moved)
    return points, moved


if __name__ == "__main__":
    main()
