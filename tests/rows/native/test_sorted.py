"""The counting sort of sorted.cpp by itself: stable, whole, by ranges of classes; and with its order broken."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.rows.native.test_exp import COMPILER, CSRC, ROOT

ROOM, MOST = "room = 32 << 20", "(int64_t)UINT32_MAX"
# As it is; with room for a few pairs, so that it goes by ranges and one class has more than there is room for; and as
# if a few pairs were more than 32 bits count.
WAYS: dict[str, list[tuple[str, str]]] = {
    "at once": [],
    "by ranges": [(ROOM, "room = 2000")],
    "by ranges, 64 bits": [(ROOM, "room = 4000"), (MOST, "(int64_t)8")],
}
FILL = "small[at[c]++] = (uint32_t)p;"
MUTANTS: dict[str, tuple[str, str]] = {
    "filled from the end": (FILL, "small[start[c] + start[c + 1] - 2 * start[from] - 1 - at[c]++] = (uint32_t)p;"),
    "two pairs exchanged": (
        "pairs_.small = wide ? nullptr : small;",
        "pairs_.small = small; if (start[to] > start[from] + 1) { auto s = *small; *small = small[1], small[1] = s; }",
    ),
    "a class on its neighbour's place": ("at[c] = start[c] - start[from]", "at[c] = start[c & ~1] - start[from]"),
    "the pairs of the range's first class left out": ("if (c < from || c >= to) return;", "if (c <= from) return;"),
    "places cut to 16 bits": ("= (uint32_t)p;", "= (uint16_t)p;"),
}


def in_order(folder: Path, changes: list[tuple[str, str]]) -> bool:
    """Whether the sort leaves every class's pairs in order, its text changed."""
    if not COMPILER or not CSRC.exists():
        pytest.skip("no compiler" if CSRC.exists() else "no sources here: an installed wheel")
    texts = {name: (CSRC / name).read_text() for name in ("sorted.h", "sorted.cpp")}
    for right, wrong in changes:
        assert any(right in text for text in texts.values()), "the sort no longer says this"
        texts = {name: text.replace(right, wrong) for name, text in texts.items()}
    for name, text in texts.items():
        (folder / name).write_text(text)
    program, driver = folder / "sorted", ROOT / "tests" / "rows" / "native" / "sorted_order.cpp"
    build = [COMPILER, "-std=gnu++17", "-O1", f"-I{folder}", f"-I{CSRC}"]  # the copies first
    subprocess.run([*build, str(driver), str(folder / "sorted.cpp"), "-o", str(program)], check=True)
    return subprocess.run([program], capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_each_class_has_its_pairs_in_order(way: str, tmp_path: Path) -> None:
    assert in_order(tmp_path, WAYS[way])


@pytest.mark.long
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_order_is_seen(name: str, tmp_path: Path) -> None:
    assert not in_order(tmp_path, [MUTANTS[name]])
