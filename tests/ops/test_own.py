"""The public ops against the frameworks' own, and against each other."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.judging import cases
from tests.judging.cases import OPTIONS
from tests.judging.frameworks import HERE, Named, both, each
from tests.ops.arrays import KINDS, SOFTMAXES, loss_arrays


def own_torch(fw: Any, arrays: Named, up: Any, options: Named) -> Named:
    """F.cross_entropy and torch.logsumexp, differentiated by autograd."""
    torch = fw.torch
    f = torch.nn.functional
    t = {k: fw.array(v, "float64") for k, v in arrays.items()}
    for leaf in t.values():
        leaf.requires_grad_(leaf.is_floating_point())
    z, c = t["input"] * options.get("logit_scale", 1.0), options.get("softcap")
    z = z if c is None else c * torch.tanh(z / c)
    s = options.get("label_smoothing", 0.0)
    w = t.get("weight")
    detached = None if w is None else w.detach()
    loss = f.cross_entropy(z, t["target"], detached, label_smoothing=s, reduction="none")
    hard = not t["target"].is_floating_point()
    keep = t["target"] != -100 if hard else torch.ones_like(loss, dtype=torch.bool)
    keep = keep.double()  # a bool times a Python float is float32
    loss = loss + keep * options.get("z_loss", 0.0) * torch.logsumexp(z, 1) ** 2
    tw = t.get("token_weight", torch.ones_like(loss))
    share = tw * keep
    if hard and w is not None:
        share = share * w.detach()[t["target"].clamp(0)]
    loss = loss * tw
    loss = loss if options["reduction"] == "none" else loss.sum()
    loss = loss / share.sum() if options["reduction"] == "mean" else loss
    leaves = {k: v for k, v in t.items() if v.requires_grad and k != "weight"}
    grads = torch.autograd.grad(loss, list(leaves.values()), fw.array(up, "float64"), materialize_grads=True)
    return {"value": fw.numpy(loss), **{k: fw.numpy(g) for k, g in zip(leaves, grads, strict=True)}}


def own_jax(fw: Any, arrays: Named, up: Any, options: Named) -> Named:
    """optax's losses and jax.nn, differentiated by JAX."""
    optax = pytest.importorskip("optax", reason="optax is not installed here")
    jax, jnp = fw.jax, fw.jax.numpy

    def run(floats: Named) -> Any:
        t = {**arrays, **floats}
        x, y = jnp.asarray(t["input"]), jnp.asarray(t["target"])
        z, c = x * options.get("logit_scale", 1.0), options.get("softcap")
        z = z if c is None else c * jnp.tanh(z / c)
        w = t.get("weight", jnp.ones(x.shape[1]))
        s = options.get("label_smoothing", 0.0)
        hard = y.dtype.kind == "i"
        keep = y != -100 if hard else jnp.ones(len(x), bool)
        index = jnp.where(keep, y, 0) if hard else None
        if hard:
            nll = w[index] * optax.softmax_cross_entropy_with_integer_labels(z, index)
        else:
            nll = optax.softmax_cross_entropy(z, w * y)
        smooth = -jnp.sum(w * jax.nn.log_softmax(z, 1), 1)
        lse = jax.nn.logsumexp(z, 1)
        loss = (1 - s) * nll + s / x.shape[1] * smooth + options.get("z_loss", 0.0) * lse**2
        tw = t.get("token_weight", jnp.ones(len(x)))
        loss = keep * tw * loss
        share = keep * tw * (w[index] if hard else 1)
        loss = loss if options["reduction"] == "none" else loss.sum()
        return loss / share.sum() if options["reduction"] == "mean" else loss

    @jax.jit
    def both(floats: Named, up: Any) -> Any:
        loss, pull = jax.vjp(run, floats)
        return loss, pull(up)[0]

    with jax.enable_x64(True):
        floats = {k: jnp.asarray(v) for k, v in arrays.items() if np.asarray(v).dtype.kind == "f"}
        loss, grads = both(floats, jnp.asarray(up))
        return {"value": np.asarray(loss), **{k: np.asarray(g) for k, g in grads.items()}}


OWN = {"torch": own_torch, "jax": own_jax}


@each(
    ("kind", "name", "reduction"),
    torch=product(KINDS, OPTIONS, ["none", "sum", "mean"]),
    jax=[
        ("hard", "plain", "none"),
        ("soft", "z-loss", "sum"),
        ("hard weighted", "all", "mean"),
        ("soft weighted", "all", "mean"),
    ],
)
def test_cross_entropy_agrees_with_the_frameworks_own(fw, kind, name, reduction):
    options = {**OPTIONS[name], "reduction": reduction}
    arrays, r = loss_arrays(kind, 9, "float64")
    calm = [0, 1, 6, 7, 12]  # without offsets, where the built-ins lose digits, or -inf, where they give NaN
    arrays = {k: v if k == "weight" else v[calm] for k, v in arrays.items()}
    up = r.dloss[calm] if reduction == "none" else np.float64(1.5)
    want = OWN[fw.name](fw, arrays, up, options)
    values, grads = fw("cross_entropy", "float64", arrays, {"value": up}, **options)
    ours = {"value": values["value"], **grads}
    for key, w in want.items():
        np.testing.assert_allclose(ours[key], w, rtol=1e-11, atol=1e-13, err_msg=key)


@both
@pytest.mark.parametrize("op", SOFTMAXES)
@pytest.mark.parametrize("axis", [0, -1])
def test_softmax_agrees_with_the_frameworks_own(fw, op, axis):
    r = cases.rows(9, "float64")
    calm = slice(0, 3)
    x, dy = r.x[calm], r.dy[calm]
    values, grads = fw(op, "float64", {"input": x}, {"value": dy}, axis=axis)
    if fw.name == "torch":
        t = fw.array(x, "float64").requires_grad_()
        y = getattr(fw.torch, op)(t, axis)
        own = [fw.numpy(y), fw.numpy(fw.torch.autograd.grad(y, t, fw.array(dy, "float64"))[0])]
    else:
        with fw.jax.enable_x64(True):
            y, pull = fw.jax.vjp(lambda a: getattr(fw.jax.nn, op)(a, axis=axis), fw.array(x, "float64"))
            own = [y, pull(fw.array(dy, "float64"))[0]]
    for ours, theirs in zip([values["value"], grads["input"]], own, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(len(HERE) < 2, reason="needs both frameworks")
@pytest.mark.parametrize("kind", KINDS)
def test_frameworks_agree(kind):
    arrays, r = loss_arrays(kind, 17, "float64")
    arrays["input"] = np.maximum(arrays["input"], -30.0)
    ups = {"value": 1.5, "lse": r.dloss, "entropy": r.dloss}
    options = {"stats": ("lse", "entropy", "argmax"), **OPTIONS["all"]}
    answers = [fw("cross_entropy", "float64", arrays, ups, **options) for fw in HERE]
    for ours, theirs in zip(*answers, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-11, atol=1e-11, err_msg=key)
