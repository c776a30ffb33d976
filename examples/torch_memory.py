"""The memory of head and loss in PyTorch, by the CPU allocator's own record."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler need not say that it starts

import torch
from torch.profiler import ProfilerActivity, profile

from examples.recipe import Recipe
from examples.torch_lm import LOSSES


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes alive at a time beyond those there were before."""
    # Not by a dispatch mode, which is shown one operation for a head's loops.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events: Any = seen.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    alive = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def loss_bytes(recipe: Recipe, loss: str) -> int:
    """The most bytes alive at a time beyond hidden states, weight and targets, from the loss to both gradients."""
    rng = np.random.default_rng(recipe.seed)
    n = recipe.batch * recipe.length
    hidden = torch.from_numpy(rng.standard_normal((n, recipe.width), np.float32)).requires_grad_()
    weight = torch.from_numpy(recipe.initial_weights()["embedding"]).requires_grad_()
    target = torch.from_numpy(rng.integers(0, recipe.vocab, n))
    return peak_bytes(lambda: LOSSES[loss](hidden, weight, target).backward())
