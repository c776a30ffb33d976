"""What the installation built of the native kernels, and why not the rest, in the words of CMakeLists.txt."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FILE = "built.txt"


def doors(package: Iterable[str]) -> dict[str, str]:
    """What became of each door, from the package's folders; nothing where it was not installed."""
    for folder in package:
        file = Path(folder) / FILE
        if file.exists():
            lines = (line.partition(": ") for line in file.read_text().splitlines())
            return {door: what for door, _, what in lines}
    return {}


def why_not(door: str, package: Iterable[str]) -> str:
    """Why a door's library is not there."""
    return doors(package).get(door, "not built: the package was not installed, or without a compiler and headers")
