"""Mistakes: one sentence, one form, the same in both frameworks, in a class the built-in's callers already catch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jax_ops
import torch_ops
from softmax_ext import contract
from tests.judging.doors import SENTENCE, Jax, Torch, call

X = np.linspace(-2.0, 2.0, 12, dtype=np.float32).reshape(3, 4)
T = np.array([0, 3, 1])
Y = np.full((3, 4), 0.25, np.float32)


def loss(*args: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda door: call(door, "cross_entropy", *(args or (X, T)), **options)


OPTION = np.array([0.5], np.float32)
# name: (call, class, argument, what the sentence shows)
MISTAKES: dict[str, tuple[Callable[[Any], Any], type[Exception], str, str]] = {
    "dim none": (lambda d: call(d, "softmax", X, "x"), TypeError, "dim", "'x'"),
    "dim range": (lambda d: call(d, "softmax", X, 2), ValueError, "dim", "2"),
    "dim low": (lambda d: call(d, "log_softmax", X, -3), ValueError, "dim", "-3"),
    "dim bool": (lambda d: call(d, "softmax", X, True), TypeError, "dim", "True"),
    "softmax list": (lambda d: call(d, "softmax", [1.0, 2.0]), TypeError, "input", "list object"),
    "softmax complex": (lambda d: call(d, "softmax", X.astype(np.complex64)), TypeError, "input", "complex64"),
    "input int": (loss(np.ones((3, 4), np.int32), T), TypeError, "input", "int32"),
    "input list": (loss([[1.0]], T), TypeError, "input", "list object"),
    "input scalar": (loss(np.zeros((), np.float32), T), ValueError, "input", "()"),
    "target list": (loss(X, [0, 1, 2]), TypeError, "target", "list object"),
    "target bool": (loss(X, T > 0), TypeError, "target", "bool"),
    "target float": (loss(X, T.astype(np.float32)), TypeError, "target", "float32"),
    "target float shape": (loss(X, Y[:, :3]), ValueError, "target", "(3, 3)"),
    "target int full": (loss(X, Y.astype(np.int32)), TypeError, "target", "int32"),
    "target length": (loss(X, T[:2]), ValueError, "target", "(2,)"),
    "weight shape": (loss(X, T, Y[0, :3]), ValueError, "weight", "(3,)"),
    "weight int": (loss(X, T, np.ones(4, np.int32)), TypeError, "weight", "int32"),
    "token_weight shape": (loss(token_weight=Y[0]), ValueError, "token_weight", "(4,)"),
    "token_weight a number": (loss(token_weight=1.0), TypeError, "token_weight", "float object"),
    "weight a number": (loss(weight=np.float32(1.0)), TypeError, "weight", "float32 object"),
    "token_weight list": (loss(token_weight=[1.0] * 3), TypeError, "token_weight", "list object"),
    "ignore_index": (loss(ignore_index=1.5), TypeError, "ignore_index", "1.5"),
    "ignore_index bool": (loss(ignore_index=True), TypeError, "ignore_index", "True"),
    "ignore_index array": (loss(ignore_index=T[:1]), TypeError, "ignore_index", "an array"),
    "ignore_index soft": (loss(X, Y, ignore_index=1), ValueError, "ignore_index", "1"),
    "reduction": (loss(reduction="avg"), ValueError, "reduction", "'avg'"),
    "reduction type": (loss(reduction=None), TypeError, "reduction", "None"),
    "smoothing low": (loss(label_smoothing=-0.1), ValueError, "label_smoothing", "-0.1"),
    "smoothing high": (loss(label_smoothing=1.5), ValueError, "label_smoothing", "1.5"),
    "smoothing nan": (loss(label_smoothing=float("nan")), ValueError, "label_smoothing", "nan"),
    "smoothing array": (loss(label_smoothing=OPTION), TypeError, "label_smoothing", "an array"),
    "scale zero": (loss(logit_scale=0.0), ValueError, "logit_scale", "0.0"),
    "scale inf": (loss(logit_scale=float("inf")), ValueError, "logit_scale", "inf"),
    "scale beyond every float": (loss(logit_scale=10**400), ValueError, "logit_scale", "an integer of 1329 bits"),
    "z_loss beyond every float": (loss(z_loss=10**5000), ValueError, "z_loss", "an integer of 16610 bits"),
    "scale a list": (loss(logit_scale=[1.0]), TypeError, "logit_scale", "[1.0]"),
    "scale of another shape": (loss(logit_scale=X), ValueError, "logit_scale", "(3, 4)"),
    "scale of integers": (loss(logit_scale=T.astype(np.int32)), TypeError, "logit_scale", "int32"),
    "softcap negative": (loss(softcap=-1), ValueError, "softcap", "-1"),
    "softcap str": (loss(softcap="1"), TypeError, "softcap", "'1'"),
    "z_loss negative": (loss(z_loss=-1e-4), ValueError, "z_loss", "-0.0001"),
    "z_loss nan": (loss(z_loss=float("nan")), ValueError, "z_loss", "nan"),
    "on_all_ignored": (loss(on_all_ignored="one"), ValueError, "on_all_ignored", "'one'"),
    "on_all_ignored type": (loss(on_all_ignored=0), TypeError, "on_all_ignored", "0"),
    "stats name": (loss(stats=("lse", "max")), ValueError, "stats", "'max'"),
    "stats str": (loss(stats="lse"), TypeError, "stats", "'lse'"),
    "stats item": (loss(stats=(1,)), TypeError, "stats", "1"),
    "stats logprob soft": (loss(X, Y, stats=("logprob",)), ValueError, "stats", "'logprob'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_sentence_in_both_frameworks(name: str) -> None:
    """Same class, same words (but for dim / axis), the argument and the value named."""
    mistake, kind, argument, value = MISTAKES[name]
    said = []
    for door in (Torch, Jax):
        with pytest.raises(kind) as caught:
            mistake(door)
        sentence = str(caught.value)
        match = SENTENCE.match(sentence)
        assert match, sentence
        assert match["argument"] in (argument, door.axis if argument == "dim" else argument)
        assert match["value"] == value, sentence
        said.append((type(caught.value), re.sub(r"\baxis\b", "dim", sentence)))
    assert said[0] == said[1]


# The built-in's own call for the same mistake: its class must be a base of ours.
BUILTIN: dict[str, Callable[[], Any]] = {
    "dim none": lambda: torch.softmax(torch.from_numpy(X), "x"),  # pyright: ignore
    "dim range": lambda: torch.softmax(torch.from_numpy(X), 2),
    "softmax list": lambda: torch.softmax([1.0, 2.0], -1),  # pyright: ignore
    "input int": lambda: F.cross_entropy(torch.ones(3, 4, dtype=torch.int32), torch.from_numpy(T)),
    "target float": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(T).float()),
    "target bool": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(T > 0)),
    "target int full": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(Y).int()),
    "target float shape": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(Y[:, :3])),
    "target length": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(T[:2])),
    "weight shape": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(T), torch.ones(3)),
    "reduction": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(T), reduction="avg"),
    "reduction type": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(T), reduction=None),  # pyright: ignore
    "smoothing high": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(T), label_smoothing=1.5),
    "ignore_index": lambda: F.cross_entropy(torch.from_numpy(X), torch.from_numpy(T), ignore_index=1.5),  # pyright: ignore
}


@pytest.mark.parametrize("name", BUILTIN)
def test_errors_are_caught_where_the_builtins_were(name: str) -> None:
    with pytest.raises(Exception) as builtin:  # noqa: PT011 - the class is what is being asked
        BUILTIN[name]()
    with pytest.raises(type(builtin.value)):
        MISTAKES[name][0](Torch)


def test_out_of_range_target_is_an_index_error_with_row_and_value() -> None:
    logits, target = torch.from_numpy(X), torch.tensor([0, 7, -3])
    with pytest.raises(IndexError) as caught:
        torch_ops.cross_entropy(logits, target)
    assert str(caught.value) == "cross_entropy: target must be in [0, 4) or ignore_index (-100); got 7 at row 1."
    with pytest.raises(IndexError):
        F.cross_entropy(logits, target)


def test_softmax_refuses_dim_none_at_call_and_construction() -> None:
    for make in (torch_ops.nn.Softmax, torch_ops.nn.LogSoftmax):
        with pytest.raises(TypeError, match=r"oftmax: dim must be a Python integer; got None\."):
            make(dim=None)
    with pytest.raises(TypeError, match=r"^softmax: dim must be a Python integer; got None\.$"):
        torch_ops.softmax(torch.zeros(2), None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("options", [{"label_smoothing": 2.0}, {"stats": ("x",)}, {"reduction": "avg"}])
def test_modules_check_options_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^CrossEntropyLoss: "):
        torch_ops.nn.CrossEntropyLoss(**options)


def test_devices_must_agree() -> None:
    with pytest.raises(RuntimeError, match=r"target must be on the input's device \(meta\); got cpu\."):
        torch_ops.cross_entropy(torch.zeros(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64))


def test_sparse_and_nested_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"input must be dense \(strided\); got sparse_coo"):
        torch_ops.softmax(torch.eye(2).to_sparse())


def test_traced_options_are_refused_in_the_same_words() -> None:
    def traced(cap: Any) -> Any:
        return jax_ops.cross_entropy(jnp.asarray(X), jnp.asarray(T), softcap=cap)

    with pytest.raises(TypeError, match=r"softcap must be a Python number > 0, finite; got an array\."):
        jax.jit(traced)(1.0)
    with pytest.raises(TypeError, match=r"softcap must be a Python number > 0, finite; got an array\."):
        torch_ops.cross_entropy(torch.from_numpy(X), torch.from_numpy(T), softcap=torch.tensor(1.0))  # pyright: ignore


def test_nothing_is_computed_before_the_contract_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any, **__: Any) -> Any:
        raise AssertionError("a row function ran before the contract call")

    for door in ("torch_ops", "jax_ops"):
        rows = importlib.import_module(f"{door}._rows.dispatch")
        monkeypatch.setattr(rows, "cross_entropy_fwd", computed)
    for name, (mistake, kind, *_) in MISTAKES.items():
        if "oftmax" not in name and not name.startswith("dim"):
            for door in (Torch, Jax):
                with pytest.raises(kind):
                    mistake(door)


def test_numpy_scalars_are_python_values_to_the_contract() -> None:
    options = contract.LossOptions(ignore_index=np.int64(-100), label_smoothing=np.float32(0.5), z_loss=1)  # pyright: ignore
    options.check("cross_entropy")
    assert contract.dimension("softmax", "dim", np.int64(-1), 2) == 1


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8", "uint16", "uint32"])
def test_jax_takes_class_indices_of_any_integer_type(dtype: str) -> None:
    target = jnp.asarray(T).astype(dtype)
    assert jax_ops.cross_entropy(jnp.asarray(X), target) == jax_ops.cross_entropy(jnp.asarray(X), jnp.asarray(T))


def test_soft_target_on_a_masked_class_has_gradient_zero_in_both_frameworks() -> None:
    """-log p is infinite there; counting it 0 keeps forward mode from forming 0 * inf."""
    x, y = X.copy(), Y.copy()
    x[:, 1], y[:, 1] = -np.inf, 0.0
    leaf = torch.from_numpy(y).requires_grad_()
    (ours,) = torch.autograd.grad(torch_ops.cross_entropy(torch.from_numpy(x), leaf), leaf)
    theirs = np.asarray(jax.grad(lambda y: jax_ops.cross_entropy(jnp.asarray(x), y))(jnp.asarray(y)))
    for gradient in (ours.numpy(), theirs):
        assert (gradient[:, 1] == 0).all()
        assert (gradient[:, [0, 2, 3]] > 0).all()
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)
