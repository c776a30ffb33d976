"""Trains one language model with the built-in loss and with both of ours, in PyTorch and in JAX.

    python -m examples.demo [--steps 70] [--seed 0] [--out demo.png] [--cache FOLDER]

Prints one table, writes one picture, and exits with 1 when a training of ours parts from the
built-in one, in loss or weights, by more than rounding explains (`examples.verdict` says how much
that is).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples import corpus, own_process, report
from examples.recipe import Recipe
from examples.verdict import Verdict, judge

FRAMEWORKS = ("torch", "jax")
OURS = ("cross_entropy", "linear_cross_entropy")
LOSSES = ("built-in", "control", *OURS)


def losses_of(framework: str) -> tuple[str, ...]:
    """What is trained; the sampled gradient in PyTorch."""
    return (*LOSSES, report.SAMPLED) if framework == "torch" else LOSSES


def train_all(recipe: Recipe, cache: Path | None, console: Console) -> report.Runs:
    """Makes the corpus, then runs framework by framework, loss by loss, never two at once."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    runs: report.Runs = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tokens of the standard library", total=1)
        tokens_path, _ = corpus.tokens_file(recipe.vocab, cache=cache)
        progress.advance(task)
        for framework in FRAMEWORKS:
            for loss in losses_of(framework):
                name = f"{report.TITLE[framework]}, {loss}"
                task = progress.add_task(name, total=recipe.steps)

                def on_step(value: float, task=task, name=name) -> None:
                    progress.update(task, advance=1, description=f"{name}: loss {value:.3f}")

                control = loss == "control"
                runs[framework, loss] = own_process.run(
                    framework,
                    "built-in" if control else loss,
                    replace(recipe, relabel=control),
                    tokens_path,
                    on_step,
                )
    return runs


def verdicts_of(runs: report.Runs) -> dict[tuple[str, str], Verdict]:
    """Each training of ours against its framework's built-in one."""
    return {
        (framework, ours): judge(*(runs[framework, loss] for loss in ("built-in", ours, "control")))
        for framework in FRAMEWORKS
        for ours in OURS
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="default: %(default)s")
    parser.add_argument("--cache", type=Path, help="folder of the tokens; default: the user's")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    console = Console()
    started = time.perf_counter()
    recipe = Recipe(vocab=corpus.VOCAB, steps=options.steps, seed=options.seed)
    runs = train_all(recipe, options.cache, console)
    verdicts = verdicts_of(runs)
    console.print(report.table(runs, verdicts, recipe))
    console.print(report.sentence(runs, verdicts), highlight=False)
    report.picture(options.out, runs, verdicts)
    console.print(f"{options.out} written; {time.perf_counter() - started:.0f} s in all")
    parted = [run for run, verdict in verdicts.items() if not verdict.ok]
    for framework, loss in parted:
        print(
            f"{report.TITLE[framework]}, {loss}: the trainings part by more than rounding explains",
            file=sys.stderr,
        )
    return 1 if parted else 0


if __name__ == "__main__":
    sys.exit(main())
