"""What this machine is: its CPU's name and family, and the instruction sets that decide how fast it multiplies."""

from __future__ import annotations

import platform
import re
import sys
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# As the Linux kernel spells them, x86 first, then aarch64; what speed depends on, widest registers last.
TOLD = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "bfloat16",
    "avx512_fp16": "float16",
    "amx_bf16": "AMX bfloat16",
    "amx_fp16": "AMX float16",
    "asimd": "NEON",
    "asimdhp": "float16",
    "bf16": "bfloat16",
    "sve": "SVE",
}
FAMILY = {"family": "cpu family", "model": "model", "implementer": "CPU implementer", "part": "CPU part"}


@cache
def instruction_sets(file: Path = CPUINFO) -> frozenset[str]:
    """What the CPU can do, in the Linux kernel's words; nothing where Linux is not."""
    return frozenset(_fact(file, "flags", "Features").split())


def name(file: Path = CPUINFO) -> str:
    """The CPU's model, family and instruction sets: results of one machine lie under one such name."""
    model = _fact(file, "model name") or f"{sys.platform} {platform.machine()} CPU"
    words = [" ".join(re.sub(r"\((R|TM)\)|@.*", " ", model).split())]
    for word, key in FAMILY.items():
        if value := _fact(file, key):
            words.append(f"{word} {value}")
    sets = dict.fromkeys(said for flag, said in TOLD.items() if flag in instruction_sets(file))
    return ", ".join(filter(None, [" ".join(words), " ".join(sets)]))


def _fact(file: Path, *words: str) -> str:
    """The first core's value under the first of these words that the file has."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return next((facts[word] for word in words if word in facts), "")
