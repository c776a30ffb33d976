"""Small and loud problems of the linear head, and their judge."""

from __future__ import annotations

from typing import Any

from softmax_ext import reference
from tests.judging.frameworks import Named

MEMORY = ("fast", "lean")


def oracle(arrays: Named, upstream: Named, **options: Any) -> Any:
    """(values, gradients at input, linear_weight and linear_bias)."""
    given = [arrays[k] for k in ("input", "linear_weight", "target")]
    rest = {k: arrays.get(k) for k in ("linear_bias", "weight", "token_weight")}
    out = reference.linear_cross_entropy(*given, **rest, **options)
    loss, stats = out if isinstance(out, tuple) else (out, {})
    ups = {k: v for k, v in upstream.items() if k != "value"}
    dx, dw, db = reference.linear_cross_entropy_grad(*given, **rest, dloss=upstream["value"], dstats=ups, **options)
    grads = {"input": dx, "linear_weight": dw} | ({} if db is None else {"linear_bias": db})
    return {"value": loss, **stats}, grads
