"""Pictures can be read where they are shown: no text below 9 points at the width of a page, one colour a call."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks import figures
from benchmarks.table import LIMITS, OURS
from examples import palette

ROOT = Path(__file__).parents[2]
DRAWN = ("overview.png", "speed.png", "scaling.png", "accuracy.png", "confident.png", "sampled.png")


@pytest.fixture(scope="module")
def pictures() -> dict[str, Figure]:
    """What `make figures` draws, before it becomes pixels."""
    found: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path) -> None:
        figure.draw_without_rendering()
        found[Path(path).name] = figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(palette, "save", keep)
        figures.draw(figures.read(ROOT / figures.RESULTS, figures.shown(ROOT / figures.README)), Path("docs"))
    return found


def _texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible() and text.get_text()]


def _small(figure: Figure) -> list[str]:
    """Texts below the smallest size, at the width that a page shows a picture in."""
    shrunk = min(1.0, palette.WIDTH / figure.get_figwidth())
    return [text.get_text() for text in _texts(figure) if float(text.get_fontsize()) * shrunk < palette.SMALLEST]


@pytest.mark.long
@pytest.mark.parametrize("name", DRAWN)
def test_text_is_large_enough(name: str, pictures: dict[str, Figure]) -> None:
    assert len(_texts(pictures[name])) > 10
    assert not _small(pictures[name])
    assert (ROOT / "docs" / name).exists()


def test_small_text_is_seen() -> None:
    figure = Figure(figsize=(palette.WIDTH, 2))
    figure.text(0, 0, "large", fontsize=9)
    assert not _small(figure)
    figure.text(0, 0, "small", fontsize=8)
    assert _small(figure) == ["small"]
    wide = Figure(figsize=(2 * palette.WIDTH, 2))
    wide.text(0, 0, "shrunk", fontsize=12)
    assert _small(wide) == ["shrunk"]


def _beyond(figure: Figure) -> float:
    """By how many inches what is drawn sticks out of the picture."""
    box = figure.get_tightbbox()
    return max(-box.x0, -box.y0, box.x1 - figure.get_figwidth(), box.y1 - figure.get_figheight())


@pytest.mark.long
@pytest.mark.parametrize("name", DRAWN)
def test_nothing_is_cut_off(name: str, pictures: dict[str, Figure]) -> None:
    assert _beyond(pictures[name]) < 0.01


def test_what_is_cut_off_is_seen() -> None:
    figure = Figure(figsize=(2, 2))
    figure.text(0.2, 0.5, "inside")
    assert _beyond(figure) < 0
    figure.text(0.5, 0.5, "this does not fit in")
    assert _beyond(figure) > 0.1


@pytest.mark.long
def test_the_cpu_is_named(pictures: dict[str, Figure]) -> None:
    kept = figures.read(ROOT / figures.RESULTS, figures.shown(ROOT / figures.README))
    for name in ("overview.png", "speed.png"):
        assert any(kept.shown.name in text.get_text() for text in _texts(pictures[name])), name


def test_one_colour_a_call() -> None:
    """What looks alike is a framework's built-in, by its several names."""
    kept = figures.read(ROOT / figures.RESULTS, figures.shown(ROOT / figures.README))
    looks: dict[tuple[str, str], set[str]] = {}
    for line in kept.shown.lines:
        if line.call not in LIMITS:
            door = line.framework.split()[0]
            looks.setdefault((palette.of(door, line.call), palette.mark(line.call)), set()).add(line.call)
    torch = {"torch", "F.linear + F.cross_entropy"}
    torch |= {"torch, dense targets", "F.linear, dense targets", "F.linear, gathered"}
    jax = {"jax.nn", "optax", "jax.nn(x @ W.T)", "optax(x @ W.T)", "optax, dense targets", "x @ W.T, gathered"}
    assert len(looks) > 6
    assert [calls for calls in looks.values() if len(calls) > 1 and not (calls <= torch or calls <= jax)] == []
    assert palette.of("torch", OURS) != palette.of("jax", OURS)
