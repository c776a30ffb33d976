"""`python -m examples.sampled_gradient`: a language model trained with an exact loss and a sampled gradient.

The same data and initial weights, the exact gradient beside `grad_samples` of several K, and beside two ways of leaving
out the small entries of the exact one, which is no unbiased gradient. Told by step: the mean training loss since the
last record, the held-out loss (always exact), the median time of a step, and how the head's rows moved.
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
LEFT_OUT = (2.0**-12, 2.0**-9)  # entries of a row's gradient below it are dropped


@dataclass(frozen=True)
class Point:
    """A training at one step."""

    gradient: str
    seed: int
    step: int
    train_loss: float
    held_out_loss: float
    seconds: float  # of a step, the median since the last record
    common_update: float  # mean size of a step's change of a row of the head: of the 256 commonest classes
    rare_update: float  # of the others


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


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "exact": torch_ops.linear_cross_entropy,
    **{f"K = {k}": partial(torch_ops.linear_cross_entropy, grad_samples=k) for k in SAMPLES},
    **{f"without entries below {bound:g}": partial(_left_out, bound) for bound in LEFT_OUT},
}


def train(name: str, recipe: Recipe, tokens: np.ndarray, every: int) -> Iterator[Point]:
    """Train with Adam on nine tenths of the tokens, and tell of it `every` few steps."""
    torch.manual_seed(recipe.seed)
    cut = len(tokens) * 9 // 10
    common = torch.from_numpy(np.argsort(-np.bincount(tokens[:cut], minlength=recipe.vocab))[:256].copy())
    is_common = torch.zeros(recipe.vocab, dtype=torch.bool).index_fill(0, common, True)
    held_out = list(replace(recipe, seed=recipe.seed + 1000, steps=8).batches(tokens[cut:]))
    model = LM(recipe.initial_weights(), recipe.heads)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    losses, times = [], []
    for step, windows in enumerate(recipe.batches(tokens[:cut]), 1):
        record = step % every == 0
        before = model.embedding.detach().clone() if record else None
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = _loss(model, windows, LOSSES[name])
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
        if before is not None:
            moved = (model.embedding.detach() - before).norm(dim=1)
            with torch.no_grad():
                others = [_loss(model, w, torch_ops.linear_cross_entropy).item() for w in held_out]
            found = (statistics.fmean(losses), statistics.fmean(others), statistics.median(times))
            sizes = (moved[is_common].mean().item(), moved[~is_common].mean().item())
            yield Point(name, recipe.seed, step, *(float(f"{v:.4g}") for v in (*found, *sizes)))
            losses, times = [], []


def _loss(model: LM, windows: np.ndarray, loss: Loss) -> Tensor:
    batch = torch.from_numpy(windows).long()
    return loss(model(batch[:, :-1]).flatten(0, 1), model.embedding, batch[:, 1:].flatten())


def draw(path: Path, points: Sequence[Point]) -> None:
    """Held-out loss by step and by time, and the head's updates of rare classes beside the exact gradient's."""
    with palette.sizes():
        figure = palette.canvas(3.2)
        by_step, by_time, updates = figure.subplots(1, 3)
        exact = [p for p in points if p.gradient == "exact" and p.seed == points[0].seed]
        for i, name in enumerate(dict.fromkeys(p.gradient for p in points)):
            mine = [p for p in points if p.gradient == name and p.seed == points[0].seed]
            style = "--" if name.startswith("without") else "-"
            seconds = np.cumsum(
                [p.seconds * (p.step - q) for p, q in zip(mine, [0, *(p.step for p in mine)], strict=False)]
            )
            by_step.plot([p.step for p in mine], [p.held_out_loss for p in mine], style, color=f"C{i}", label=name)
            by_time.plot(seconds, [p.held_out_loss for p in mine], style, color=f"C{i}")
            ratio = [p.rare_update / max(q.rare_update, 1e-30) for p, q in zip(mine, exact, strict=False)]
            updates.plot([p.step for p in mine], ratio, style, color=f"C{i}")
        by_step.set(xlabel="step", ylabel="held-out loss (nats)")
        by_time.set(xlabel="seconds of steps")
        updates.set(xlabel="step", ylabel="updates of rare classes, of exact", yscale="log")
        for axes in (by_step, by_time, updates):
            palette.plain(axes)
        figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        palette.save(figure, path)


def _line(p: Point) -> str:
    found = f"{p.train_loss:.4g} nats, held out {p.held_out_loss:.4g}, {1e3 * p.seconds:.0f} ms a step"
    moved = f"updates {p.common_update:.2g} (common), {p.rare_update:.2g} (rare)"
    return f"seed {p.seed}, step {p.step}, {p.gradient}: {found}, {moved}"


def main(given: Sequence[str] | None = None) -> list[Point]:
    """Train with each gradient and seed, print, keep and draw."""
    parser = argparse.ArgumentParser("python -m examples.sampled_gradient", description=__doc__)
    parser.add_argument("--steps", type=int, default=900, help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps between records (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=corpus.VOCAB, help="(default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=corpus.MAX_BYTES, help="of text (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the tokens (default: as the demo's)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks", "results"), help="(default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("build", "sampled.png"), help="(default: %(default)s)")
    options = parser.parse_args(given)
    tokens = np.load(corpus.tokens_file(options.vocab, options.bytes, options.cache)[0])
    recipe = Recipe(vocab=options.vocab, steps=options.steps, learning_rate=2e-3)
    points: list[Point] = []
    for seed in options.seeds:
        trainings = [train(name, replace(recipe, seed=seed), tokens, options.every) for name in LOSSES]
        for together in zip(*trainings, strict=True):  # by turns: what the machine does meanwhile meets all of them
            for p in together:
                print(_line(p), flush=True)
            points += together
            records.write(Point, points, options.results / "sampled.csv")
    draw(options.picture, points)
    return points


if __name__ == "__main__":
    main()
