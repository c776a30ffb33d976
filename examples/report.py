"""The demo's table and picture."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from examples.own_process import Run
from examples.recipe import Recipe
from examples.verdict import FACTOR, Verdict

TITLE = {"torch": "PyTorch", "jax": "JAX"}
COLOUR = {"torch": "tab:orange", "jax": "tab:blue"}
Runs = dict[tuple[str, str], Run]


def table(runs: Runs, verdicts: dict[str, Verdict], recipe: Recipe) -> Table:
    """One row for each run but the controls; 80 columns hold it."""
    result = Table(
        title=f"{recipe.steps} steps of N = {recipe.batch * recipe.length} rows, V = {recipe.vocab} classes",
        caption="difference: largest |ours - built-in| of any step; allowed: by rounding"
        "\nstep: median time; memory: peak resident memory of the run's own process;"
        "\ntraining: its growth since the framework was loaded",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("run", no_wrap=True)
    for heading in (
        "final loss\n(nats)",
        "difference\n(nats)",
        "allowed\n(nats)",
        "step\n(ms)",
        "memory\n(MiB)",
        "training\n(MiB)",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for (framework, loss), run in runs.items():
        if loss == "control":
            continue
        difference = allowed = ""
        if loss == "ours":
            verdict = verdicts[framework]
            at = int(np.argmax(verdict.difference))  # argmax finds a NaN before any number
            style = "green" if verdict.ok else "bold red"
            difference = f"[{style}]{verdict.difference[at]:.1e}[/]"
            allowed = f"{verdict.allowed[at]:.1e}"
        result.add_row(
            f"{TITLE[framework]}, {loss}",
            f"{run.losses[-1]:.6f}",
            difference,
            allowed,
            f"{1e3 * run.seconds_per_step:.1f}",
            f"{run.peak_mib:.0f}",
            f"{run.peak_mib - run.before_mib:.0f}",
        )
    return result


def picture(path: Path, runs: Runs, verdicts: dict[str, Verdict]) -> None:
    """Writes the curves (above) and their differences with the bound (below) as one image."""
    figure = Figure(figsize=(8, 8), dpi=120, layout="constrained")
    curves, differences = figure.subplots(2, 1, sharex=True)
    # The curves lie on one another: later ones are thinner, so that all can be seen.
    shown = [(key, run) for key, run in runs.items() if key[1] != "control"]
    for i, ((framework, loss), run) in enumerate(shown):
        curves.plot(
            np.arange(len(run.losses)),
            run.losses,
            color=COLOUR[framework] if loss == "built-in" else "black",
            linestyle="-" if loss == "built-in" else ("--" if framework == "torch" else ":"),
            alpha=0.6 if loss == "built-in" else 1.0,
            linewidth=(9 - 2.5 * i) if loss == "built-in" else 1.5,
            label=f"{TITLE[framework]}, {loss}",
        )
    curves.set_ylabel("loss (nats)")
    curves.legend()
    floor = 1e-8  # a log axis has no zero
    for framework, verdict in verdicts.items():
        for values, style, label in (
            (verdict.difference, "-", "|ours - built-in|"),
            (verdict.control, ":", "|renumbered - built-in|"),
            (verdict.allowed, "--", f"allowed, {FACTOR:g} x largest so far of that"),
        ):
            differences.plot(
                np.maximum(values, floor),
                style,
                color=COLOUR[framework],
                label=f"{TITLE[framework]} {label}",
            )
    differences.set_yscale("log")
    differences.set_ylabel(f"difference (nats; zero is drawn at {floor:g})")
    differences.set_xlabel("step")
    figure.legend(*differences.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
