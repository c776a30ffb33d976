"""The demo's table and picture."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from examples.own_process import Run
from examples.recipe import CHUNKS, Recipe
from examples.verdict import FACTOR, Bounded, Verdict

TITLE = {"torch": "PyTorch", "jax": "JAX"}
COLOUR = {"torch": "tab:orange", "jax": "tab:blue"}
DASH = {"torch": "--", "jax": ":"}
SHADE = {"built-in": "tab:gray", "cross_entropy": "black", "linear_cross_entropy": "tab:green"}
Key = tuple[str, str]  # framework, loss
Runs = dict[Key, Run]
CAPTION = f"""curve: largest |ours - built-in| of any step, and its share of the allowed
weights: that share of the weights after the last step
step: median time
head: most bytes alive in one call of head and loss, forward and backward,
  beyond hidden states, weight and targets; the gradients count;
  linear_cross_entropy works by {CHUNKS} chunks of the rows
process: growth of resident memory since the framework was loaded"""


def table(runs: Runs, verdicts: dict[Key, Verdict], recipe: Recipe) -> Table:
    """One row for each run but the controls; 80 columns hold it."""
    result = Table(
        title=f"{recipe.steps} steps of N = {recipe.batch * recipe.length} rows, V = {recipe.vocab} classes",
        caption=CAPTION,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )
    result.add_column("run", no_wrap=True)
    for heading in (
        "final loss\n(nats)",
        "curve\n(nats)",
        "\n(share)",
        "weights\n(share)",
        "step\n(ms)",
        "head\n(MiB)",
        "process\n(MiB)",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    framework = ""
    for key, run in shown(runs).items():
        if key[0] != framework:
            framework = key[0]
            result.add_section()
            result.add_row(f"[bold]{TITLE[framework]}[/]")
        curve = share = weights = ""
        if key in verdicts:
            verdict = verdicts[key]
            curve = f"{np.max(verdict.curve.difference):.1e}"
            share, weights = _percent(verdict.curve), _percent(verdict.weights)
        result.add_row(
            key[1],
            f"{run.losses[-1]:.6f}",
            curve,
            share,
            weights,
            f"{1e3 * run.seconds_per_step:.1f}",
            f"{run.loss_mib:.1f}",
            f"{run.peak_mib - run.before_mib:.0f}",
        )
    return result


def shown(runs: Runs) -> Runs:
    """All but the controls, which are there for the bounds."""
    return {key: run for key, run in runs.items() if key[1] != "control"}


def _percent(judged: Bounded) -> str:
    style = "green" if judged.ok else "bold red"
    return f"[{style}]{100 * judged.share:.0f} %[/]"


def picture(path: Path, runs: Runs, verdicts: dict[Key, Verdict]) -> None:
    """Writes the curves, their differences with the bounds, and the memory of head and loss as one image."""
    figure = Figure(figsize=(8, 12), dpi=120, layout="constrained")
    curves, differences, memory = figure.subplots(3, 1, height_ratios=(3, 3, 2))
    _draw_curves(curves, shown(runs))
    _draw_differences(differences, verdicts)
    _draw_memory(memory, shown(runs))
    for axes in (curves, differences, memory):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_curves(axes: Axes, runs: Runs) -> None:
    width = 9.0
    for (framework, loss), run in runs.items():
        built_in = loss == "built-in"
        axes.plot(
            np.arange(len(run.losses)),
            run.losses,
            color=COLOUR[framework] if built_in else SHADE[loss],
            linestyle="-" if built_in else DASH[framework],
            alpha=0.6 if built_in else 1.0,
            linewidth=width,
            label=f"{TITLE[framework]}, {loss}",
        )
        width *= 0.75  # the curves lie on one another: later ones are thinner, so that all can be seen
    axes.set_ylabel("loss (nats)")
    axes.set_xlabel("step")
    axes.legend()


def _draw_differences(axes: Axes, verdicts: dict[Key, Verdict]) -> None:
    floor = 1e-8  # a log axis has no zero
    seen = set()
    for (framework, loss), verdict in verdicts.items():
        lines = [(verdict.curve.difference, "-" if loss == "cross_entropy" else "-.", f"|{loss} - built-in|")]
        if framework not in seen:  # all losses of a framework share its control
            seen.add(framework)
            lines += [
                (verdict.curve.control, ":", "|renumbered - built-in|"),
                (verdict.curve.allowed, "--", f"allowed, {FACTOR:g} x largest so far of that"),
            ]
        for values, style, label in lines:
            axes.plot(np.maximum(values, floor), style, color=COLOUR[framework], label=f"{TITLE[framework]} {label}")
    axes.set_yscale("log")
    axes.set_ylabel(f"difference (nats; zero is drawn at {floor:g})")
    axes.set_xlabel("step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize="small")


def _draw_memory(axes: Axes, runs: Runs) -> None:
    """Three bars a framework."""
    frameworks = list(dict.fromkeys(framework for framework, _ in runs))
    losses = list(dict.fromkeys(loss for _, loss in runs))
    width = 0.8 / len(losses)
    for i, loss in enumerate(losses):
        at = np.arange(len(frameworks)) + (i - (len(losses) - 1) / 2) * width
        bars = axes.bar(at, [runs[f, loss].loss_mib for f in frameworks], width, color=SHADE[loss], label=loss)
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks(np.arange(len(frameworks)), [TITLE[f] for f in frameworks])
    axes.set_ylabel("memory of head and loss (MiB)")
    axes.margins(y=0.15)
    axes.legend()
