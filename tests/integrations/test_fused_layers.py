"""fuse_loss beside what others do to a model's layers: forwards of their own, other classes of head, hooks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils._pytree import tree_leaves, tree_map_only

tf = pytest.importorskip("transformers")

from tests.integrations.bodies import BOTH, V, make, trained  # noqa: E402
from torch_ops.integrations import _call  # noqa: E402
from torch_ops.integrations import transformers as integration  # noqa: E402
from torch_ops.integrations.transformers import fuse_loss, restore_loss  # noqa: E402


def compiled(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def wrapped(model: Any) -> Any:
    old = model.forward
    model.forward = functools.wraps(old)(lambda *args, **kwargs: old(*args, **kwargs))
    return model


def prepared(model: Any, unwrap: bool = False) -> Any:
    accelerate = pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = by.prepare(model)
    return by.unwrap_model(model, keep_fp32_wrapper=False) if unwrap else model


SETTERS: dict[str, Callable[[Any], Any]] = {
    "accelerate": prepared,
    "accelerate, undone": functools.partial(prepared, unwrap=True),
    "a wrapper": wrapped,
    "torch.compile": compiled,
}


@pytest.mark.parametrize("name", [*list(SETTERS)[:3], pytest.param("torch.compile", marks=pytest.mark.slow)])
def test_a_forward_on_the_instance(name: str) -> None:
    """Set before or after: fused, or a warning; and restore_loss gives the model back."""
    put = SETTERS[name]
    own = put(make())(**BOTH)
    first = fuse_loss(put(make()))
    if name == "torch.compile":
        with pytest.warns(UserWarning, match="fuse_loss: the loss is not fused"):
            first(**BOTH)
    else:
        out = first(**BOTH)
        assert "logits" not in out
        torch.testing.assert_close(out.loss, own.loss, rtol=1e-2, atol=0.0)
    last = put(fuse_loss(make()))
    assert "logits" not in last(**BOTH)
    for model in (first, last):
        restore_loss(model)
        torch.testing.assert_close(dict(model(**BOTH)), dict(own))


def test_a_forward_that_passes_ours_by_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    old = model.forward
    fuse_loss(model)
    with pytest.warns(UserWarning, match="not fused from here on, because the model's forward was replaced"):
        model.forward = old
    assert "logits" not in fuse_loss(model)(**BOTH)
    monkeypatch.setattr(integration, "leads_to", lambda function, ours: True)
    model = fuse_loss(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward = old


def test_the_head_keeps_its_class() -> None:
    """What goes by the exact class (dynamic quantisation) treats it as ever."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        small = [quantize_dynamic(model.eval(), {nn.Linear}) for model in (make(), fuse_loss(make()))]
    assert type(small[0].lm_head) is type(small[1].lm_head) is not nn.Linear
    with pytest.warns(UserWarning, match="not fused, because its head is now a Linear"):
        out = small[1](**BOTH, return_logits=False)
    torch.testing.assert_close(out.loss, small[0](**BOTH).loss)
    heads = [torch.nn.utils.parametrizations.weight_norm(model.lm_head) for model in (make(), fuse_loss(make()))]
    assert type(heads[0]) is type(heads[1]) or type(heads[0]).__name__ == type(heads[1]).__name__


def test_a_parametrised_head() -> None:
    both = [make(), fuse_loss(make())]
    for model in both:
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    theirs, ours = trained(both[0]), trained(both[1])
    assert "logits" not in ours[2]
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-4, atol=1e-5)


REGISTER: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "forward": lambda hook: everywhere.register_module_forward_hook(lambda m, args, out: hook(m, out)),
    "backward": lambda hook: everywhere.register_module_full_backward_hook(lambda m, gi, go: hook(m, gi)),
    "before backward": lambda hook: everywhere.register_module_full_backward_pre_hook(lambda m, go: hook(m, go)),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_on_all_modules(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> tuple[Any, Any]:
        kinds: list[set[type]] = [set(), set()]
        results = []
        for model, seen in zip((make(), fuse_loss(make())), kinds, strict=True):

            def hook(m: Any, values: Any, seen: set[type] = seen) -> Any:
                if getattr(m, "out_features", 0) != V:
                    return None
                seen.update(type(v) for v in tree_leaves(values))
                return tree_map_only(Tensor, lambda v: 2.0 * v, values)

            handle = REGISTER[kind](hook)
            try:
                results.append(trained(model))
            finally:
                handle.remove()
        return results, kinds

    with pytest.warns(UserWarning, match="not fused, because its head has hooks"):
        results, kinds = both()
    assert kinds[0] == kinds[1] == {Tensor}
    torch.testing.assert_close(results[1][:2], results[0][:2])
    for module in (integration, _call):
        monkeypatch.setattr(module, "is_watched", lambda *modules: False)
    results, kinds = both()
    assert kinds[0] != kinds[1] or "logits" in results[1][2]
