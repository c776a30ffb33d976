"""`softmax_ext.keep_memory`, each time in a process of its own: what it sets stays set."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

import softmax_ext
from softmax_ext import memory

GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
# Faults of blocks of 64 MiB, written and freed: 16384 pages each, unless the block was kept.
FAULTS = """
import resource
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        b"x" * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def _faults(program: str) -> list[int]:
    command = [sys.executable, "-c", FAULTS + program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert not done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_freed_memory_is_kept() -> None:
    calls = "import softmax_ext\nassert softmax_ext.keep_memory() and softmax_ext.keep_memory()\n"
    fresh, first, kept = _faults("print(faults())\n" + calls + "print(faults(), faults())")
    assert kept < fresh / 100, "the same three blocks again: no page is new"
    assert first < fresh, "only the first of the three grew the heap"
    # Put back: the library loaded, and not asked.
    before, without = _faults("print(faults())\nimport softmax_ext\nprint(faults())")
    assert without > before / 2


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
@pytest.mark.parametrize("missing", ["mmap", "trim"])
def test_both_settings_are_needed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Library:
        def __init__(self, _: None) -> None: ...

        gnu_get_libc_version = None

        def mallopt(self, option: int, value: int) -> int:
            asked.append((option, value))
            return int((option == -4) != (missing == "mmap"))

    monkeypatch.setattr(memory.ctypes, "CDLL", Library)
    assert not softmax_ext.keep_memory()
    assert set(asked) <= {(-4, 0), (-1, 2**31 - 1)}


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_a_sentence_where_glibc_is_not(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())  # musl's
    with pytest.warns(RuntimeWarning) as told:
        assert not softmax_ext.keep_memory()
    sentence = f"keep_memory: the C library must be glibc for memory to be kept; got another one on {platform}."
    assert [str(one.message) for one in told] == [sentence]
    assert told[0].filename == __file__
