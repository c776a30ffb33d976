"""PyTorch's peers and what they are asked: per-row losses of hidden states and a head, with the options they have."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import softmax_ext
import torch_ops
from benchmarks import feature_cases as cases
from benchmarks.feature_cases import Absent, Question

Rows = Callable[..., Tensor]  # (x, head, target, **options) -> (N,)


@dataclass(frozen=True)
class Peer:
    """A library's way to the loss of each row; `stats` gives (log-probability, entropy) of each."""

    version: str
    rows: Rows
    stats: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def _tensors(*arrays: Any) -> list[Tensor]:
    return [torch.tensor(a, dtype=torch.float32 if a.dtype.kind == "f" else torch.int64) for a in arrays]


def _row_losses(peer: Peer, target: Any = cases.TARGET, **options: Any) -> dict[str, tuple[Any, Any]]:
    x, head, up = _tensors(cases.X, cases.HEAD, cases.UP)
    (mine,) = _tensors(target)
    x.requires_grad_()
    given = {name: torch.tensor(o, dtype=torch.float32) if name == "weight" else o for name, o in options.items()}
    rows = peer.rows(x, head, mine, **given)
    (rows * up).sum().backward()
    value, gradient = cases.truth(target, **options)
    return {"loss": (rows.detach(), value), "gradient": (x.grad, gradient)}


def _sparse(peer: Peer) -> dict[str, tuple[Any, Any]]:
    x, head, up, ids, shares = _tensors(cases.X, cases.HEAD, cases.UP, cases.IDS, cases.SHARES)
    x.requires_grad_()
    rows = peer.rows(x, head, (ids, shares))
    (rows * up).sum().backward()
    value, gradient = cases.truth(cases.dense())
    return {"loss": (rows.detach(), value), "gradient": (x.grad, gradient)}


def _confident(peer: Peer) -> dict[str, tuple[Any, Any]]:
    x, head, target = _tensors(cases.SURE_X, cases.SURE_HEAD, cases.SURE_TARGET)
    x.requires_grad_()
    loss = peer.rows(x, head, target)
    loss.sum().backward()
    assert x.grad is not None
    tail = torch.exp(torch.tensor(-60.0, dtype=torch.float64)).item()
    # by its size: the numbers are far below any floor
    return {"loss": (loss.detach() / tail, [4.0]), "gradient": (x.grad[0, :1] / tail, [-4.0])}


def _summed(peer: Peer) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    x, head, target, up, direction = _tensors(cases.X, cases.HEAD, cases.TARGET, cases.UP, cases.DIRECTION)
    return lambda x: (peer.rows(x, head, target) * up).sum(), x, direction


def _second(peer: Peer) -> dict[str, tuple[Any, Any]]:
    loss, x, direction = _summed(peer)
    x.requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (along,) = torch.autograd.grad((first * direction).sum(), x)
    return {"second derivative": (along, cases.second())}


def _forward(peer: Peer) -> dict[str, tuple[Any, Any]]:
    loss, x, direction = _summed(peer)
    tangent = torch.func.jvp(loss, (x,), (direction,))[1]
    return {"tangent": (tangent, (cases.truth()[1] * cases.DIRECTION).sum())}


def _mapped(peer: Peer) -> dict[str, tuple[Any, Any]]:
    loss, x, _ = _summed(peer)
    gradients = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, x]))
    return {"gradients": (gradients, [cases.truth()[1]] * 2)}


def _weight_gradient(peer: Peer) -> dict[str, tuple[Any, Any]]:
    x, head, target, up, weight = _tensors(cases.X, cases.HEAD, cases.TARGET, cases.UP, cases.WEIGHT)
    weight.requires_grad_()
    (peer.rows(x, head, target, weight=weight) * up).sum().backward()
    return {"gradient": (weight.grad, cases.class_weight_gradient())}


def _stats(peer: Peer) -> dict[str, tuple[Any, Any]]:
    if peer.stats is None:
        raise Absent("no statistics of a row")
    x, head, target, up = _tensors(cases.X, cases.HEAD, cases.TARGET, cases.UP)
    x.requires_grad_()
    logprob, entropy = peer.stats(x, head, target)
    (loss_rows, loss_gradient), (rows, gradient) = cases.truth(), cases.entropy()
    mine = [torch.autograd.grad((s * up).sum(), x, retain_graph=True)[0] for s in (logprob, entropy)]
    return {
        "log-probability": (logprob.detach(), -loss_rows),
        "its gradient": (mine[0], -loss_gradient),
        "entropy": (entropy.detach(), rows),
        "its gradient too": (mine[1], gradient),
    }


QUESTIONS = [
    Question("loss and gradient of each row", _row_losses),
    Question("soft targets", lambda peer: _row_losses(peer, cases.SOFT)),
    Question("K classes a row as target", _sparse),
    Question("class weights", lambda peer: _row_losses(peer, weight=cases.WEIGHT)),
    *(Question(name, lambda peer, o=o: _row_losses(peer, **o)) for name, o in cases.OPTIONS.items()),
    Question("log-probability and entropy", _stats),
    Question("gradient of class weights", _weight_gradient),
    Question("second derivatives", _second),
    Question("forward mode", _forward),
    Question("vmap of the gradient", _mapped),
    Question("a confident row's digits", _confident, floor=0.0),
]


def _only(known: tuple[str, ...], options: dict[str, Any], target: Any) -> None:
    if isinstance(target, tuple):
        raise Absent("no sparse targets")
    for name in options:
        if name not in known:
            raise Absent(f"no {name}")
    if target.is_floating_point() and "soft" not in known:
        raise Absent("class indices only")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on the path, not installed
        return "unknown"


def _ours() -> Peer:
    def stats(x: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        found = torch_ops.linear_cross_entropy(x, head, target, reduction="none", stats=("logprob", "entropy"))[1]
        return found["logprob"], found["entropy"]

    def rows(x: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
        return torch_ops.linear_cross_entropy(x, head, target, reduction="none", **options)

    return Peer(softmax_ext.__version__, rows, stats)


def _built_in() -> Peer:
    def rows(x: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
        _only(("soft", "weight", "label_smoothing"), options, target)
        return F.cross_entropy(F.linear(x, head), target, reduction="none", **options)

    return Peer(torch.__version__, rows)


def _chunked() -> Peer:
    how = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)

    def rows(x: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
        _only(("soft", "weight", "label_smoothing"), options, target)
        return F.linear_cross_entropy(x, head, target, reduction="none", options=how, **options)

    return Peer(torch.__version__, rows)


def _cut() -> Peer:
    from cut_cross_entropy import linear_cross_entropy

    def rows(x: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
        _only(("softcap",), options, target)
        return linear_cross_entropy(x, head, target, reduction="none", impl="torch_compile", **options)

    return Peer(_version("cut-cross-entropy"), rows)


def _liger() -> Peer:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearScaledCrossEntropyFunction as Scaled,
    )

    def rows(x: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
        _only(("logit_scale",), options, target)
        return Scaled.apply(x, head, target, 1 / options.get("logit_scale", 1.0))

    def stats(x: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = Scaled.apply(x, head, target, 1.0, -100, 1, True)
        return -nll, entropy

    return Peer(_version("liger-kernel"), rows, stats)


def _trl() -> Peer:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]

    def call(x: Tensor, head: Tensor, target: Tensor, softcap: float | None = None, scale: float = 1.0) -> Any:
        return ChunkedLogProbFunction.apply(x, head, None, target, 1.0, 16, softcap, scale, ("log_probs", "entropy"))

    def rows(x: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
        _only(("softcap", "logit_scale"), options, target)
        return -call(x, head, target, options.get("softcap"), options.get("logit_scale", 1.0))[0]

    return Peer(_version("trl"), rows, lambda x, head, target: call(x, head, target)[:2])


def _verl() -> Peer:
    module = _file("verl", "utils/experimental/torch_functional.py")

    def stats(x: Tensor, head: Tensor, target: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return module.FusedLinearForPPO()(x, head, target, 1 / scale)

    def rows(x: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
        _only(("logit_scale",), options, target)
        return -stats(x, head, target, options.get("logit_scale", 1.0))[0]

    return Peer(_version("verl"), rows, stats)


def _unsloth() -> Peer:
    for name in ("unsloth_zoo", "unsloth_zoo.fused_losses", "unsloth_zoo.temporary_patches"):
        _folder(name)
    module = importlib.import_module("unsloth_zoo.fused_losses.chunked_logprob")

    def rows(x: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
        _only(("softcap", "logit_scale"), options, target)
        about = {"logit_softcapping": options.get("softcap", 0.0), "temperature": 1 / options.get("logit_scale", 1.0)}
        return -module.unsloth_chunked_logprobs(x, head, target, **about)

    return Peer(_version("unsloth-zoo"), rows)


def _file(package: str, name: str) -> types.ModuleType:
    """One file of a package that is there, without the package's start: it asks for much that a loss does not need."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"No module named '{package}'")
    spec = importlib.util.spec_from_file_location(
        f"{package}_{Path(name).stem}", Path(found.submodule_search_locations[0]) / name
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder(name: str) -> None:
    """A package whose modules can be imported, its own start left out."""
    if name in sys.modules:
        return
    top, _, rest = name.partition(".")
    if top in sys.modules:
        place = [str(Path(sys.modules[top].__path__[0]) / rest)]
    else:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise ImportError(f"No module named '{name}'")
        place = list(found.submodule_search_locations)
    module = types.ModuleType(name)
    module.__path__ = place
    sys.modules[name] = module


PEERS: dict[str, Callable[[], Peer]] = {
    "softmax-ext, PyTorch": _ours,
    "torch: F.linear, F.cross_entropy": _built_in,
    "torch: F.linear_cross_entropy, chunked": _chunked,
    "Liger-Kernel": _liger,
    "cut-cross-entropy": _cut,
    "TRL": _trl,
    "verl": _verl,
    "unsloth_zoo": _unsloth,
}
