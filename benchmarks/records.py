"""Dataclasses as lines of CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write(kind: type[Any], records: Iterable[Any], file: Path) -> None:
    """Write a file anew: a column for each field."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        table = csv.DictWriter(out, [field.name for field in fields(kind)], lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, records))


def read(kind: type[T], file: Path) -> list[T]:
    """The lines of a file; an empty cell is None where the field's type allows that."""
    convert = {field.name: _TYPES[str(field.type)] for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    with file.open(newline="") as source:
        return [kind(**{name: convert[name](text) for name, text in row.items()}) for row in csv.DictReader(source)]


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: kind(text) if text else None


_TYPES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "int | None": _or_none(int),
    "float | None": _or_none(float),
}
