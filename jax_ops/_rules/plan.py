"""The static part of a loss's rows: what is asked of their logits, and which numbers of a row are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from softmax_ext.contract import LossOptions


class Plan(NamedTuple):
    """As the cache of a rule's programs takes it."""

    scale: float = 1.0
    softcap: float | None = None
    names: tuple[str, ...] = ("nll",)  # a row's differentiable results, in the order of `cross_entropy_fwd`'s
    lean: bool = False

    @classmethod
    def of(cls, options: LossOptions, dtype: Any, lean: bool = False) -> Plan:
        """The plan of checked options for arguments of the type `dtype`."""
        limits, stats = jnp.finfo(jnp.promote_types(dtype, jnp.float32)), options.stats
        scale, cap = options.fitted(float(limits.tiny), float(limits.max))
        wanted = {
            "nll": options.label_smoothing < 1.0 or "logprob" in stats,
            "lse": options.z_loss > 0.0 or "lse" in stats,
            "smooth": options.label_smoothing > 0.0,
            "entropy": "entropy" in stats,
        }
        return cls(scale, cap, tuple(name for name, on in wanted.items() if on), lean)

    @property
    def computed(self) -> list[str]:
        """What `cross_entropy_fwd` returns for the plan."""
        more = [name for name in ("smooth", "entropy") if name in self.names]
        return ["nll", "lse", *more, "m", "rest"]

    def row(self, axis: int = 1) -> dict[str, Any]:
        """The options of a row of logits along `axis` that its gradient has too."""
        return {"axis": axis, "scale": self.scale, "softcap": self.softcap}

    def wanted(self, axis: int = 1) -> dict[str, Any]:
        """The options of a row of logits along `axis` that is asked for its values."""
        return {**self.row(axis), "smooth": "smooth" in self.names, "entropy": "entropy" in self.names}

    def class_weight(self, weight: Array | None, dtype: Any, *, soft: bool) -> Array | None:
        """The class weights a row takes: of class indices only smoothing does, their own multiply from outside."""
        if weight is None or not (soft or "smooth" in self.names):
            return None
        return weight.astype(jnp.promote_types(dtype, jnp.float32))

    def upstream(self, cotangents: Any) -> list[Any]:
        """[d_nll, d_lse, d_smooth, d_entropy] from the cotangents of the names."""
        found: Mapping[str, Any] = dict(zip(self.names, cotangents, strict=True))
        return [found.get(name) for name in ("nll", "lse", "smooth", "entropy")]
