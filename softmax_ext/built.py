"""What the installation built of the native kernels, and why not the rest, in the words of CMakeLists.txt."""

from __future__ import annotations

from pathlib import Path

import softmax_ext

FILE = "built.txt"


def doors() -> dict[str, str]:
    """What became of each door; nothing where the package was not installed."""
    for folder in softmax_ext.__path__:
        file = Path(folder) / FILE
        if file.exists():
            lines = (line.partition(": ") for line in file.read_text().splitlines())
            return {door: what for door, _, what in lines}
    return {}


def why_not(door: str) -> str:
    """Why a door's library is not there."""
    return doors().get(door, "not built: the package was not installed, or without a compiler and headers")
