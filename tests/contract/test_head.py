"""Mistakes in a linear_cross_entropy call: one class and sentence in every framework, before any computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import torch_ops
from tests.judging.doors import DOORS, SENTENCE, Torch, call
from torch_ops._head import loss

X = np.linspace(-2.0, 2.0, 12, dtype=np.float32).reshape(3, 4)
W = np.linspace(-1.0, 1.0, 20, dtype=np.float32).reshape(5, 4)
K = np.ones((5, 2, 4), np.float32)
T = np.array([0, 3, 1])
Y = np.full((3, 5), 0.2, np.float32)


def head(*args: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda door: call(door, "linear_cross_entropy", *(args or (X, W, T)), **options)


# name: (call, class, argument, what the sentence shows)
MISTAKES: dict[str, tuple[Callable[[Any], Any], type[Exception], str, str]] = {
    "input list": (head([[1.0]], W, T), TypeError, "input", "list object"),
    "input scalar": (head(np.zeros((), np.float32), W, T), IndexError, "input", "()"),
    "input int": (head(np.ones((3, 4), np.int32), W, T), TypeError, "input", "int32"),
    "input K-d": (head(X[None], K, T), RuntimeError, "input", "(1, 3, 4)"),
    "weight none": (head(X, None, T), TypeError, "linear_weight", "None"),
    "weight 1-d": (head(X, W[0], T), RuntimeError, "linear_weight", "(4,)"),
    "weight width": (head(X, W[:, :3], T), RuntimeError, "linear_weight", "(5, 3)"),
    "weight type": (head(X, W.astype(np.float16), T), RuntimeError, "linear_weight", "float16"),
    "bias shape": (head(linear_bias=X[0]), RuntimeError, "linear_bias", "(4,)"),
    "bias type": (head(linear_bias=W[:, 0].astype(np.float16)), TypeError, "linear_bias", "float16"),
    "bias K-d": (head(X, K, np.zeros((3, 2), int), linear_bias=W[:, 0]), ValueError, "linear_bias", "(5,)"),
    "target length": (head(X, W, T[:2]), ValueError, "target", "(2,)"),
    "target float": (head(X, W, T.astype(np.float32)), TypeError, "target", "float32"),
    "target soft shape": (head(X, W, Y[:, :4]), ValueError, "target", "(3, 4)"),
    "target int full": (head(X, W, Y.astype(np.int32)), TypeError, "target", "int32"),
    "target K-d": (head(X, K, T), ValueError, "target", "(3,)"),
    "class weight": (head(weight=X[0]), ValueError, "weight", "(4,)"),
    "token_weight": (head(token_weight=Y[0]), ValueError, "token_weight", "(5,)"),
    "scale": (head(logit_scale=Y), ValueError, "logit_scale", "(3, 5)"),
    "scale of integers": (head(logit_scale=T.astype(np.int32)), TypeError, "logit_scale", "int32"),
    "low rank of three": (head(low_rank=(X, X, X)), TypeError, "low_rank", "3 arrays"),
    "low rank of one": (head(low_rank=(X, None)), TypeError, "low_rank", "None"),
    "low rank an array": (head(low_rank=X), TypeError, "low_rank", "an array"),
    "low rank type": (head(low_rank=(X.astype(np.float16), W)), TypeError, "low_rank", "float16"),
    "low rank A": (head(low_rank=(X[:, :3], W[:, :3])), ValueError, "low_rank", "(3, 3)"),
    "low rank B": (head(low_rank=(X, W)), ValueError, "low_rank", "(5, 4)"),
    "shift negative": (head(shift=-1), ValueError, "shift", "-1"),
    "shift type": (head(shift=1.0), TypeError, "shift", "1.0"),
    "shift bool": (head(shift=True), TypeError, "shift", "True"),
    "shift 1-d": (head(X[0], W, np.array(1), shift=1), ValueError, "shift", "1"),
    "shift K-d": (head(X, K, np.zeros((3, 2), int), shift=2), ValueError, "shift", "2"),
    "memory": (head(memory="slow"), ValueError, "memory", "'slow'"),
    "memory type": (head(memory=None), TypeError, "memory", "None"),
    "chunk zero": (head(chunk_size=0), ValueError, "chunk_size", "0"),
    "chunk type": (head(chunk_size=2.0), TypeError, "chunk_size", "2.0"),
    "chunk array": (head(chunk_size=np.array([2])), TypeError, "chunk_size", "an array"),
    "reduction": (head(reduction="avg"), ValueError, "reduction", "'avg'"),
    "smoothing": (head(label_smoothing=1.5), RuntimeError, "label_smoothing", "1.5"),
    "stats logprob soft": (head(X, W, Y, stats=("logprob",)), ValueError, "stats", "'logprob'"),
    "ignore_index soft": (head(X, W, Y, ignore_index=1), RuntimeError, "ignore_index", "1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_sentence_in_every_framework(name: str) -> None:
    mistake, kind, argument, value = MISTAKES[name]
    said = []
    for door in DOORS:
        with pytest.raises(kind) as caught:
            mistake(door)
        match = SENTENCE.match(str(caught.value))
        assert match, str(caught.value)
        assert (match["op"], match["argument"]) == ("linear_cross_entropy", argument)
        assert match["value"] == value
        said.append((type(caught.value), str(caught.value)))
    assert len(set(said)) == 1


def test_nothing_is_computed_before_the_contract_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began before the contract call")

    monkeypatch.setattr(loss, "loss_of", computed)
    monkeypatch.setitem(torch_ops.linear_cross_entropy.__globals__, "is_on_mesh", computed)
    for mistake, kind, *_ in MISTAKES.values():
        with pytest.raises(kind):
            mistake(Torch)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch.nn has no linear_cross_entropy")
@pytest.mark.parametrize(
    "name", [n for n in MISTAKES if not n.startswith(("shift", "memory", "chunk", "token", "stats", "scale", "low"))]
)
def test_errors_are_caught_where_the_builtins_were(name: str) -> None:
    class Builtin:
        class ops:
            linear_cross_entropy = staticmethod(F.linear_cross_entropy)

        axis, array = "dim", staticmethod(Torch.array)

    mistake = MISTAKES[name][0]
    try:
        mistake(Builtin)
    except AttributeError:
        return  # the built-in met something that is no tensor unprepared
    except Exception as builtin:
        with pytest.raises(type(builtin)):
            mistake(Torch)


def test_out_of_range_target_is_an_index_error_with_row_and_value() -> None:
    with pytest.raises(IndexError) as caught:
        torch_ops.linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 5, -3]))
    want = "linear_cross_entropy: target must be in [0, 5) or ignore_index (-100); got 5 at row 1."
    assert str(caught.value) == want


def test_devices_must_agree() -> None:
    x, w, t = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match=r"linear_weight must be on the input's device \(cpu\); got meta\.$"):
        torch_ops.linear_cross_entropy(x, w.to("meta"), t)
    with pytest.raises(RuntimeError, match=r"linear_bias must be on the input's device \(cpu\); got meta\.$"):
        torch_ops.linear_cross_entropy(x, w, t, linear_bias=torch.ones(5, device="meta"))
