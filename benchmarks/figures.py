"""`make figures`: the tables and pictures of README and docs, from the CSVs that the other commands keep.

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->` and is written anew; nothing else of a page is
touched, and nothing is measured. `tests/house/test_readme.py` fails where a page shows other numbers than the CSVs.

Pages show every machine that was measured. README and the pictures show one: the last one whose file has all that they
need, by the time of its commit, or by that of the file if it is not committed as it is. README says which.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks import accuracy_plot, overview_plot, page_tables, records, scaling_plot, speed_plot, table
from benchmarks.accuracy import Error
from benchmarks.features import Answer
from benchmarks.fresh import Fresh
from benchmarks.gpu_lines import DeviceLine
from benchmarks.page_tables import TABLES, Kept, Machine
from benchmarks.sample_error import SampleError
from benchmarks.scaling import swept
from benchmarks.table import Line
from benchmarks.weight_error import WeightError
from examples import confident, sampled_gradient

RESULTS = Path("benchmarks", "results")
README = "README.md"
_PAGES = ("index", "accuracy", "sampled", "performance", "leaderboard", "gpu")
PAGES = (README, *(f"docs/{name}.md" for name in _PAGES))
SHOWN = re.compile(r"<!-- figures of: (\S+) -->")


def main(given: Sequence[str] | None = None) -> int:
    """Write tables and pictures."""
    parser = argparse.ArgumentParser("python -m benchmarks.figures", description="Tables and pictures of the pages.")
    parser.add_argument("--machine", help="file in benchmarks/results that README shows; default: the last whole one")
    options = parser.parse_args(given)
    name = options.machine or last(RESULTS)
    kept = read(RESULTS, name)
    readme = Path(README)
    readme.write_text(SHOWN.sub(f"<!-- figures of: {name} -->", readme.read_text()))
    for page in map(Path, PAGES):
        page.write_text(filled(page.read_text(), kept))
        print(f"{page} written")
    draw(kept, Path("docs"))
    print(f"README shows {kept.shown.name} ({name})")
    return 0


def draw(kept: Kept, docs: Path) -> None:
    """The pictures."""
    machine = kept.shown.name
    overview_plot.draw(docs / "overview.png", page_tables.pairs(kept), machine)
    speed_plot.draw(docs / "speed.png", kept.shown.cells(), machine)
    if kept.scaling:
        scaling_plot.draw(docs / "scaling.png", swept(kept.scaling), table.machine(kept.scaling))
    accuracy_plot.draw(docs / "accuracy.png", kept.errors, kept.weights)
    confident.draw(docs / "confident.png", kept.trainings)
    sampled_gradient.draw(docs / "sampled.png", kept.gradients, kept.moved)


def read(folder: Path, first: str) -> Kept:
    """The CSVs of a folder; the machine of the file `first` comes first."""
    names = sorted(files(folder), key=lambda file: (file.name != first, file.name))
    machines = [Machine(table.read(file)) for file in names]
    sweeps = {file.name: table.read(file) for file in files(folder / "scaling")}
    return Kept(
        machines,
        sweeps.get(first) or next(iter(sweeps.values()), []),
        records.read(Error, folder / "accuracy.csv"),
        records.read(WeightError, folder / "weight_error.csv"),
        records.read(SampleError, folder / "sample_error.csv"),
        records.read(confident.Point, folder / "confident.csv"),
        records.read(sampled_gradient.Point, folder / "sampled.csv"),
        records.read(sampled_gradient.Moved, folder / "sampled_updates.csv"),
        records.read(Answer, folder / "features.csv"),
        [records.read(DeviceLine, file) for file in files(folder, DeviceLine)],
        [records.read(Fresh, file) for file in sorted((folder / "fresh").glob("*.csv"))],
    )


def files(folder: Path, kind: type[Line | DeviceLine] = Line) -> list[Path]:
    """The CSVs of `make bench`, or of `python -m benchmarks.gpu`, told from others by their columns."""
    found = []
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="") as source:
            if set(next(csv.reader(source), [])) >= {field.name for field in fields(kind)}:
                found.append(file)
    return found


def shown(readme: Path) -> str:
    """The file that README says it shows."""
    found = SHOWN.search(readme.read_text())
    if found is None:
        raise SystemExit(f"{readme} names no file: it needs a line `<!-- figures of: FILE -->`")
    return found[1]


def last(folder: Path) -> str:
    """The file that was measured last, of those that hold all that README and pictures show."""
    whole = [file for file in files(folder) if page_tables.is_whole(Machine(table.read(file)))]
    if not whole:
        raise SystemExit(f"no file in {folder} has all that README shows: run `make bench` without options")
    return max(whole, key=_written).name


def _written(file: Path) -> float:
    """When its figures were committed; when the file was written, if they are not."""
    about = ("git", "-C", str(file.parent))
    changed = subprocess.run([*about, "status", "--porcelain", file.name], capture_output=True, text=True, check=False)
    when = subprocess.run([*about, "log", "-1", "--format=%ct", file.name], capture_output=True, text=True, check=False)
    known = changed.returncode == 0 and not changed.stdout and when.stdout.strip()
    return float(when.stdout) if known else file.stat().st_mtime


def filled(page: str, kept: Kept) -> str:
    """The page with each of its tables as the CSVs have it."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](kept)}\n{match[3]}"

    return re.sub(r"(<!-- begin: (\w+) -->)\n.*?(<!-- end: \2 -->)", block, page, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
