"""What XLA is given for a GPU, without one: programs of plain operations, none of our CPU kernels among them."""

from __future__ import annotations

import re
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax_ops  # noqa: E402
from jax_ops._rows import native  # noqa: E402

N, D, V = 6, 4, 300
OPTIONS: dict[str, Any] = {"label_smoothing": 0.2, "softcap": 3.0, "z_loss": 0.1}


def _program(f: Any, *shapes: tuple[tuple[int, ...], str], platform: str) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def _head(**options: Any) -> Any:
    def f(x: Any, w: Any, t: Any) -> Any:
        out = jax_ops.linear_cross_entropy(x, w, t, chunk_size=3, **options)
        loss, stats = out if isinstance(out, tuple) else (out, {})
        return loss.sum() + sum(value.sum() for value in stats.values())

    return jax.value_and_grad(f, argnums=(0, 1))


def _hvp(x: Any, w: Any, t: Any) -> Any:
    return jax.jvp(lambda x: jax.grad(lambda x: jax_ops.linear_cross_entropy(x, w, t))(x), (x,), (x,))


LOGITS, CLASS, PROBABILITIES = ((N, V), "float32"), ((N,), "int32"), ((N, V), "float32")
HEAD = (((N, D), "bfloat16"), ((V, D), "bfloat16"))
STATS = ("lse", "entropy")
PROGRAMS: dict[str, tuple[Any, ...]] = {
    "softmax": (jax.value_and_grad(lambda x: (jax_ops.softmax(x) ** 2).sum()), LOGITS),
    "log_softmax": (jax.value_and_grad(lambda x: jax_ops.log_softmax(x, axis=0).sum()), LOGITS),
    "cross_entropy": (jax.value_and_grad(lambda x, t: jax_ops.cross_entropy(x, t, **OPTIONS)), LOGITS, CLASS),
    "soft cross_entropy": (jax.value_and_grad(jax_ops.cross_entropy), LOGITS, PROBABILITIES),
    "optax, integers": (
        jax.value_and_grad(lambda x, t: jax_ops.softmax_cross_entropy_with_integer_labels(x, t).sum()),
        LOGITS,
        CLASS,
    ),
    "optax": (jax.value_and_grad(lambda x, y: jax_ops.softmax_cross_entropy(x, y).sum()), LOGITS, PROBABILITIES),
    "head, fast": (_head(**OPTIONS), *HEAD, CLASS),
    "head, lean": (_head(memory="lean", **OPTIONS), *HEAD, CLASS),
    "head, soft": (_head(stats=STATS), *HEAD, PROBABILITIES),
    "head, lean, rows": (_head(memory="lean", reduction="none", stats=STATS), *HEAD, CLASS),
    "head, twice": (_hvp, ((N, D), "float32"), ((V, D), "float32"), CLASS),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_cpu_kernel_in_a_gpus_program(name: str) -> None:
    f, *shapes = PROGRAMS[name]
    for platform in ("cuda", "rocm"):
        text = _program(f, *shapes, platform=platform)
        assert "func.func public @main" in text
        calls = re.findall(r"custom_call\s*@?\"?([\w.]+)", text)
        assert not [call for call in calls if "softmax_ext" in call], calls
    if not native.missing:
        assert "softmax_ext" in _program(f, *shapes, platform="cpu"), "the measurement sees a kernel where one is"
