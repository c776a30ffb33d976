"""The demo's table and picture."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.table import Table

from examples import palette
from examples.own_process import Run
from examples.recipe import CHUNKS, SAMPLES, Recipe
from examples.verdict import FACTOR, Bounded, Verdict

TITLE = {"torch": "PyTorch", "jax": "JAX"}
BUILT_IN = {"torch": palette.TORCH, "jax": palette.JAX}
SAMPLED = f"grad_samples={SAMPLES}"
DASH = {SAMPLED: ":", "built-in": "-", "cross_entropy": "--", "linear_cross_entropy": "-"}
HATCH = {SAMPLED: "...", "built-in": "", "cross_entropy": "///", "linear_cross_entropy": ""}
Key = tuple[str, str]  # framework, loss
Runs = dict[Key, Run]
PARTS = dict(
    zip(
        range(2, 13),
        (
            "half",
            *(f"a {word}" for word in ("third", "quarter", "fifth", "sixth", "seventh")),
            "an eighth",
            "a ninth",
            "a tenth",
            "an eleventh",
            "a twelfth",
        ),
        strict=True,
    )
)
CAPTION = f"""curve: largest |ours - built-in| of any step, and its share of the allowed
weights: that share of the weights after the last step
step: median time
head: most bytes alive in one call of head and loss, forward and backward,
  beyond hidden states, weight and targets; the gradients count;
  linear_cross_entropy works by {CHUNKS} chunks of the rows
{SAMPLED}: other, unbiased gradients, so its curve is not compared
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


def sentence(runs: Runs, verdicts: dict[Key, Verdict]) -> str:
    """What the table says of the fused head, beside the built-in, in one sentence."""
    parts = []
    for framework in dict.fromkeys(framework for framework, _ in verdicts):
        ours, built_in = runs[framework, "linear_cross_entropy"], runs[framework, "built-in"]
        same = all(verdict.ok for (where, _), verdict in verdicts.items() if where == framework)
        time = part_of(ours.seconds_per_step / built_in.seconds_per_step)
        memory = part_of(ours.loss_mib / built_in.loss_mib)
        curve = "same curve" if same else "another curve"
        part = f"{TITLE[framework]}: {curve}, {time} step time, {memory} memory of head and loss"
        if (framework, SAMPLED) in runs:
            sampled = part_of(runs[framework, SAMPLED].seconds_per_step / built_in.seconds_per_step)
            part += f", {sampled} step time by {SAMPLED}"
        parts.append(part)
    return "; ".join(parts) + "."


def part_of(ratio: float) -> str:
    """A quotient above 0 in words that something follows: "a third of the", "1.2 times the"."""
    if ratio >= 0.95:
        return f"{ratio:.1f} times the" if ratio >= 1.05 else "the same"
    if ratio > 0.55:
        return f"{ratio:.1f} of the"
    parts = max(2, round(1 / ratio))
    return f"{PARTS.get(parts, f'1/{parts}')} of the"


def picture(path: Path, runs: Runs, verdicts: dict[Key, Verdict]) -> None:
    """Writes the curves, their differences with the bounds, and the memory of head and loss as one image."""
    with palette.sizes():
        figure = palette.canvas(11.5)
        curves, differences, memory = figure.subplots(3, 1, height_ratios=(3, 3, 2))
        _draw_curves(curves, shown(runs))
        _draw_differences(differences, verdicts)
        _draw_memory(memory, shown(runs))
        titles = (
            "one curve: the losses lie on one another, a sampled gradient beside them",
            "largest difference from the built-in so far: dashed is what rounding allows",
            "memory of one call of head and loss, MiB: shorter is better",
        )
        for axes, title in zip((curves, differences, memory), titles, strict=True):
            axes.set_title(title, loc="left")
            palette.plain(axes)
        palette.save(figure, path)


def _colour(framework: str, loss: str) -> str:
    return BUILT_IN[framework] if loss == "built-in" else palette.of(framework, "ours")


def _draw_curves(axes: Axes, runs: Runs) -> None:
    width = 9.0
    for (framework, loss), run in runs.items():
        axes.plot(
            np.arange(len(run.losses)),
            run.losses,
            color=_colour(framework, loss),
            linestyle=DASH[loss],
            alpha=0.5 if loss == "built-in" else 1.0,
            linewidth=width,
            label=f"{TITLE[framework]}, {loss}",
        )
        width *= 0.72  # the curves lie on one another: later ones are thinner, so that all can be seen
    axes.set_ylabel("loss (nats)")
    axes.set_xlabel("step")
    axes.legend()


def _draw_differences(axes: Axes, verdicts: dict[Key, Verdict]) -> None:
    floor = 1e-8  # a log axis has no zero
    seen = set()
    for (framework, loss), verdict in verdicts.items():
        lines = [(verdict.curve.difference, "-" if loss == "cross_entropy" else "-.", 1.6, loss)]
        if framework not in seen:  # all losses of a framework share its control
            seen.add(framework)
            lines += [
                (verdict.curve.control, ":", 1.2, "built-in, tokens renumbered"),
                (verdict.curve.allowed, "--", 1.2, f"allowed, {FACTOR:g} x that"),
            ]
        for values, style, width, label in lines:
            colour = palette.of(framework, "ours")
            shown = np.maximum.accumulate(np.maximum(values, floor))
            axes.plot(shown, style, color=colour, linewidth=width, label=f"{TITLE[framework]}: {label}")
    axes.set_yscale("log")
    axes.set_ylabel(f"|difference| (nats; 0 is drawn at {floor:g})")
    axes.set_xlabel("step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_memory(axes: Axes, runs: Runs) -> None:
    """A bar a run."""
    frameworks = list(dict.fromkeys(framework for framework, _ in runs))
    for i, (framework, loss) in enumerate(runs):
        at = i + frameworks.index(framework) * 0.6
        size, colour = runs[framework, loss].loss_mib, _colour(framework, loss)
        bar = axes.barh(at, size, 0.8, color=colour, hatch=HATCH[loss], edgecolor="white")
        axes.bar_label(bar, fmt="%.1f", padding=3)
    places = [i + frameworks.index(framework) * 0.6 for i, (framework, _) in enumerate(runs)]
    axes.set_yticks(places, [f"{TITLE[f]} built-in" if loss == "built-in" else loss for f, loss in runs])
    axes.invert_yaxis()
    axes.margins(x=0.1)
