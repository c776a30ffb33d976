"""Large results lie in huge pages, but for a while after these were dear."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

import torch_ops
from torch_ops._rows import native

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE = 2**26
pytestmark = [
    pytest.mark.skipif(bool(native.missing), reason=f"no kernels: {native.missing}"),
    pytest.mark.skipif(
        not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no huge pages to be had on this machine"
    ),
]


@pytest.fixture(autouse=True)
def plentiful() -> Iterator[None]:
    native.judge_huge_pages(SIZE, 0)
    yield
    native.judge_huge_pages(SIZE, 0)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.ones(64, SIZE // 256)  # 64 rows, 2**26 bytes: above what malloc keeps


def is_advised(x: torch.Tensor) -> bool:
    """Whether the mapping that the middle of x lies in has asked for huge pages."""
    at, inside = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            inside = int(head[1], 16) <= at < int(head[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds x")


def test_large_results_ask_for_huge_pages(logits: torch.Tensor) -> None:
    x = logits.clone().requires_grad_()
    loss = torch_ops.cross_entropy(x, torch.zeros(64, dtype=torch.long))
    for result in (
        lambda: torch_ops.softmax(logits),
        lambda: torch_ops.log_softmax(logits),
        lambda: torch.autograd.grad(loss, x)[0],
    ):
        native.judge_huge_pages(SIZE, 0)  # this machine's may be dear
        assert is_advised(result())
    assert not is_advised(logits)


def dear() -> int:
    return native.judge_huge_pages(SIZE, 2 * SIZE)


def test_after_two_dear_ones_some_go_without(logits: torch.Tensor) -> None:
    assert dear() == 0
    assert is_advised(torch_ops.softmax(logits))
    native.judge_huge_pages(SIZE, 0)
    assert [dear(), dear()] == [0, 4]
    assert [is_advised(torch_ops.softmax(logits)) for _ in range(5)] == [False] * 4 + [True]


def test_the_longer_they_are_dear_the_more_go_without() -> None:
    assert [dear() for _ in range(12)] == [0, 4, 0, 8, 0, 16, 0, 32, 0, 64, 0, 64]
    assert native.judge_huge_pages(SIZE, SIZE // 2) == 0
    assert [dear(), dear()] == [0, 4]


@pytest.mark.skipif(
    not native.missing and native.instruction_set() == "baseline", reason="slow rows are not told from dear pages"
)
def test_what_a_result_takes_is_judged(logits: torch.Tensor) -> None:
    def forgets() -> bool:  # that the last one was dear, once this one is not
        native.judge_huge_pages(SIZE, 0)
        dear()
        torch_ops.softmax(logits)
        return dear() == 0

    assert any(forgets() for _ in range(20)), "no result was judged, or each was dear"
