"""Row functions as JAX primitives: native kernels where XLA compiles for one CPU, plain jax.numpy everywhere else.

The plain function defines the primitive: its types, its derivatives in the arguments it is not linear in, and
its lowering wherever no kernel serves. The kernel is only another lowering, so that no transform knows of it.
Linear arguments (the upstream gradients) stay on primitives under jvp and transposition: a gradient that JAX
transposes twice, as `_autodiff.analytic` has it do, is a kernel call again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ops import _native as native

_FLOATS = ("float32", "float64", "bfloat16", "float16")
_LAYOUT = ("present", "axis", "options")

Attributes = Callable[[tuple[bool, ...], dict[str, Any]], dict[str, Any]]


class Row:
    """A row function (*arrays or None, axis, **options) as a primitive of the arrays that are present."""

    def __init__(
        self,
        name: str,
        plain: Callable[..., Any],
        *,
        linear: Sequence[int] = (),
        weight: int | None = None,
        attributes: Attributes | None = None,
    ) -> None:
        self.primitive = Primitive(f"softmax_ext_{name}")
        self.primitive.multiple_results = True
        self._name, self._function, self._attributes = name, plain, attributes
        self._linear, self._weight = frozenset(linear), weight

        self.primitive.def_impl(partial(jax.jit(self._bind, static_argnames=_LAYOUT)))
        self.primitive.def_abstract_eval(self._types)
        ad.primitive_jvps[self.primitive] = self._jvp
        batching.primitive_batchers[self.primitive] = self._batch
        # Not cacheable: the same types may be lowered for one device and, outside a shard_map, for many.
        self._lower_plain = mlir.lower_fun(self._plain, multiple_results=True)
        mlir.register_lowering(self.primitive, self._lower_plain, cacheable=False)
        if attributes is not None:
            mlir.register_lowering(self.primitive, self._lower, platform="cpu", cacheable=False)

    def __call__(self, *args: Any, axis: int, **options: Any) -> list[jax.Array]:
        """The results, in a list; None stands for an absent argument."""
        present = tuple(a is not None for a in args)
        return self._bind(*_some(args), present=present, axis=axis, options=tuple(options.items()))

    def _bind(self, *arrays: Any, **layout: Any) -> list[Any]:
        return self.primitive.bind(*arrays, **layout)

    def _plain(self, *arrays: Any, present: tuple[bool, ...], axis: int, options: Any) -> list[Any]:
        out = self._function(*_all(arrays, present), axis=axis, **dict(options))
        return list(out) if isinstance(out, tuple | list) else [out]

    def _types(self, *avals: Any, **layout: Any) -> Any:
        return jax.make_jaxpr(partial(self._plain, **layout))(*avals).out_avals

    def _lower(self, ctx: Any, *values: Any, present: tuple[bool, ...], axis: int, options: Any) -> Any:
        if native.missing or not _serves(ctx):
            return self._lower_plain(ctx, *values, present=present, axis=axis, options=options)
        native.register()
        assert self._attributes is not None
        attributes = self._attributes(present, dict(options))
        return jax.ffi.ffi_lowering(native.target(self._name))(ctx, *values, axis=np.int64(axis), **attributes)

    def _jvp(self, primals: Any, tangents: Any, *, present: tuple[bool, ...], axis: int, options: Any) -> Any:
        out = self._bind(*primals, present=present, axis=axis, options=options)
        args = _all(primals, present)
        moved = {i: t for i, t in enumerate(_all(tangents, present)) if _is_tangent(t)}
        parts = []
        if curved := [i for i in moved if i not in self._linear]:

            def along(*some: Any) -> list[Any]:
                full = [dict(zip(curved, some, strict=True)).get(i, a) for i, a in enumerate(args)]
                return self._plain(*_some(full), present=present, axis=axis, options=options)

            parts.append(jax.jvp(along, [args[i] for i in curved], [moved[i] for i in curved])[1])
        if any(i in self._linear for i in moved):
            parts.append(self(*(moved.get(i) if i in self._linear else a for i, a in enumerate(args)), axis=axis,
                              **dict(options)))
        return out, [jnp.asarray(sum(part)) for part in zip(*parts, strict=True)] or list(map(jnp.zeros_like, out))

    def _batch(self, arrays: Any, dims: Any, *, present: tuple[bool, ...], axis: int, options: Any) -> Any:
        layout = {"present": present, "options": options}
        args, along = _all(arrays, present), _all(dims, present)
        if self._weight is not None and along[self._weight] is not None:
            # The kernels have one weight for all rows.
            out = jax.vmap(partial(self._plain, axis=axis, **layout), in_axes=tuple(dims))(*arrays)
            return out, [0] * len(out)
        size = next(a.shape[d] for a, d in zip(arrays, dims, strict=True) if d is not None)

        def moved(i: int, a: Any) -> Any:
            if along[i] is not None:
                return jnp.moveaxis(a, along[i], 0)
            return a if i == self._weight or a is None else jnp.broadcast_to(a, (size, *a.shape))

        out = self._bind(*_some(moved(i, a) for i, a in enumerate(args)), axis=axis + 1, **layout)
        return out, [0] * len(out)


def with_transpose(row: Row, types: Callable[[list[Any]], Any]) -> Row:
    """Gives a row function with one result its transpose in the linear arguments, a primitive as well.

    `types(args)` is an array, of the arguments that remain, of the linear arguments' shape and type. The
    transpose takes the result's cotangent in place of the first linear argument.
    """
    linear = sorted(row._linear)
    first = linear[0]

    def turned(*args: Any, axis: int, linear_present: tuple[bool, ...], **options: Any) -> list[Any]:
        wanted = [i for i, on in zip(linear, linear_present, strict=True) if on]

        def forward(*some: Any) -> Any:
            full = [None if i in linear else a for i, a in enumerate(_spread(args))]
            for i, v in zip(wanted, some, strict=True):
                full[i] = v
            return row._function(*full, axis=axis, **options)

        like = types(list(_spread(args)))
        return list(jax.linear_transpose(forward, *[like] * len(wanted))(args[first]))

    def _spread(args: Sequence[Any]) -> list[Any]:
        return [*args[: first + 1], *[None] * (len(linear) - 1), *args[first + 1 :]]

    back = Row(f"{row._name}_transpose", turned, linear=[first], weight=row._weight)

    def transpose(cotangents: Any, *arrays: Any, present: tuple[bool, ...], axis: int, options: Any) -> list[Any]:
        args, (ct,) = _all(arrays, present), cotangents
        linear_present = tuple(present[i] for i in linear)
        kept = [ct if i == first else a for i, a in enumerate(args) if i == first or i not in linear]
        found = iter(back(*kept, axis=axis, linear_present=linear_present, **dict(options)))
        return [next(found) if i in linear else None for i, on in enumerate(present) if on]

    def transpose_back(cotangents: Any, *arrays: Any, present: tuple[bool, ...], axis: int, options: Any) -> list[Any]:
        named = dict(options)
        given = iter(cotangents)
        ups = [next(given) if on else None for on in named.pop("linear_present")]
        full = _spread(_all(arrays, present))
        for i, up in zip(linear, ups, strict=True):
            full[i] = None if up is None or type(up) is ad.Zero else up
        (ct,) = row(*full, axis=axis, **named)
        at = sum(present[:first])
        return [ct if i == at else None for i in range(len(arrays))]

    ad.primitive_transposes[row.primitive] = transpose
    ad.primitive_transposes[back.primitive] = transpose_back
    return row


def _serves(ctx: Any) -> bool:
    """Whether the kernels may stand in the program being lowered.

    Not in an export, which has to run anywhere. Not where XLA itself partitions over several devices: it knows
    nothing of a custom call, and would gather all of the rows on every one of them.
    """
    module = ctx.module_context
    context = module.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        alone = set(context.manual_axes) == set(context.mesh.axis_names)
    else:
        alone = isinstance(context, mlir.ShardingContext) and context.num_devices == 1
    return (
        alone
        and not module.lowering_parameters.for_export
        and str(ctx.avals_in[0].dtype) in _FLOATS
        and all(0 not in aval.shape for aval in ctx.avals_in)
    )


def _is_tangent(t: Any) -> bool:
    return t is not None and type(t) is not ad.Zero and t.dtype != jax.dtypes.float0


def _all(arrays: Sequence[Any], present: tuple[bool, ...]) -> list[Any]:
    it = iter(arrays)
    return [next(it) if on else None for on in present]


def _some(args: Any) -> list[Any]:
    return [a for a in args if a is not None]
