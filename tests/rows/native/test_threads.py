"""Both doors from many Python threads at once and in forked processes: the bits of one thread alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.judging.frameworks import both, only

CALLERS = 8
# One for each way through the kernels: along a row, short rows side by side, strips of a middle axis.
SHAPES = {"wide": (300, 1000), "short": (4000, 10), "middle": (6, 21, 500)}


def _problem(fw: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    r = np.random.default_rng(0)
    target = r.integers(shape[1], size=(shape[0], *shape[2:]))
    return fw.array(3 * r.standard_normal(shape), "float32"), fw.array(target, "int64")


def _answers(fw: Any) -> Callable[..., list[bytes]]:
    """softmax, log_softmax, the loss of every row and the gradient of their sum, as bits."""

    axis = {} if fw.name == "torch" else {"axis": 1}

    def rows(x: Any, target: Any) -> Any:
        return fw.ops.cross_entropy(x, target, reduction="none", label_smoothing=0.1, **axis)

    def torch(x: Any, target: Any) -> list[Any]:
        x = x.clone().requires_grad_()
        loss = rows(x, target)
        values = [fw.ops.softmax(x, 1), fw.ops.log_softmax(x, 1), loss, fw.torch.autograd.grad(loss.sum(), x)[0]]
        return [v.detach() for v in values]

    def jax(x: Any, target: Any) -> list[Any]:
        loss, pull = fw.jax.vjp(lambda x: rows(x, target), x)
        return [fw.ops.softmax(x, 1), fw.ops.log_softmax(x, 1), loss, pull(fw.jax.numpy.ones_like(loss))[0]]

    run = torch if fw.name == "torch" else fw.jax.jit(jax)
    return lambda *args: [np.asarray(v).tobytes() for v in run(*args)]


@both
def test_many_threads_at_once(fw: Any) -> None:
    answers = _answers(fw)
    problems = [_problem(fw, shape) for shape in SHAPES.values()]
    alone = [answers(*problem) for problem in problems]
    with ThreadPoolExecutor(CALLERS) as pool:
        at_once = list(pool.map(lambda i: answers(*problems[i % len(problems)]), range(10 * CALLERS)))
    for i, got in enumerate(at_once):
        assert got == alone[i % len(problems)], f"call {i}"


@only("jax")
def test_many_threads_compile_at_once(fw: Any) -> None:
    x, target = _problem(fw, SHAPES["wide"])
    alone = _answers(fw)(x, target)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: _answers(fw)(x, target), range(4))) == [alone] * 4


def _script(code: str) -> str:
    command, root = [sys.executable, "-c", code], Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


FORK = """
import os, sys
sys.path.insert(0, os.getcwd())
from tests.rows.native import test_threads as t
from tests.judging.frameworks import {door} as Door
def bits():
    return [t._answers(fw)(*t._problem(fw, shape)) for shape in t.SHAPES.values()]
fw = Door()
{before}
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    {inside}
    os.write(writer, str(hash(str(bits()))).encode())
    os._exit(0)
print(os.read(reader, 64).decode() == str(hash(str(bits()))), os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("", ""),  # each process starts its own threads
        # PyTorch's OpenMP pool survives no fork (the built-ins hang too): one thread, as in DataLoader's workers
        ("bits()", "fw.torch.set_num_threads(1)"),
        ("fw.torch.set_num_threads(1); bits()", ""),
    ],
    ids=["pool not started", "pool started", "one thread"],
)
@only("torch")
@pytest.mark.long
def test_a_forked_process(fw: Any, before: str, inside: str) -> None:
    assert _script(FORK.format(door="Torch", before=before, inside=inside or "pass")) == "True 0"


@only("jax")
@pytest.mark.long
def test_a_process_forked_before_jax_starts(fw: Any) -> None:
    """JAX supports no fork after its first computation."""
    assert _script(FORK.format(door="Jax", before="", inside="pass")) == "True 0"
