"""Dataclasses as lines of CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

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
    convert = {name: _converter(type_) for name, type_ in get_type_hints(kind).items()}
    with file.open(newline="") as source:
        return [kind(**{name: convert[name](text) for name, text in row.items()}) for row in csv.DictReader(source)]


def _converter(kind: Any) -> Callable[[str], Any]:
    if NoneType not in get_args(kind):
        return kind
    (inner,) = (one for one in get_args(kind) if one is not NoneType)
    return lambda text: inner(text) if text else None
