"""Row functions as JAX primitives: native kernels where XLA compiles for one CPU, plain jax.numpy everywhere else.

The plain function defines the primitive: its types, its derivatives in the arguments it is not linear in, and
its lowering wherever no kernel serves. A kernel is only another lowering, so no transform knows of it. Linear
arguments (the upstream gradients) stay on primitives under jvp and transposition: a gradient that JAX transposes
twice is a kernel call again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ops._lowering import alone, as_typed, compiled, mapped, outputs_mapped
from jax_ops._rows import native

_FLOATS = ("float32", "float64", "bfloat16", "float16")

# The kernel's attributes from which arguments are present and the options by name.
Attributes = Callable[[Sequence[bool], dict[str, Any]], dict[str, Any]]


class Row:
    """A row function (*arrays or None, axis, **options) as a primitive of the arrays that are present."""

    def __init__(
        self,
        name: str,
        plain: Callable[..., Any],
        *,
        linear: Sequence[int] = (),
        weight: int | None = None,
        kernel: tuple[str, Attributes] | None = None,
        inplace: bool = False,
    ) -> None:
        self.name, self.plain, self.linear, self.weight, self.kernel = name, plain, linear, weight, kernel
        # The kernel writes the first result over the first argument; XLA copies one that lives on.
        self.aliases = {0: 0} if inplace else None
        self.primitive = p = Primitive(f"softmax_ext_{name}")
        p.multiple_results = True
        p.def_impl(compiled(p, "present", "axis", "options"))
        p.def_abstract_eval(self._types)
        ad.primitive_jvps[p] = as_typed(self._jvp)
        batching.fancy_primitive_batchers[p] = as_typed(self._batch)
        # Not cached by types alone: inside a shard_map and outside it the same types may have other lowerings. One
        # rule for all platforms: JAX (0.10.2) does not lower for several at once where one has a rule of its own.
        mlir.register_lowering(p, self._lower, cacheable=False)

    def __call__(self, *args: Any, axis: int, **options: Any) -> list[jax.Array]:
        """The results, always a list; None stands for an absent argument."""
        present = tuple(a is not None for a in args)
        return self.primitive.bind(*_some(args), present=present, axis=axis, options=tuple(options.items()))

    @as_typed
    def _flat(self, *arrays: Any, present: Sequence[bool], axis: int, options: Any) -> list[Any]:
        out = self.plain(*_all(arrays, present), axis=axis, **dict(options))
        return list(out) if isinstance(out, tuple | list) else [out]

    def _types(self, *avals: Any, **layout: Any) -> Any:
        return jax.make_jaxpr(partial(self._flat, **layout))(*avals).out_avals

    def _lower(self, ctx: Any, *values: Any, present: Sequence[bool], axis: int, options: Any) -> Any:
        if self.kernel is None or native.missing or self.kernel[0] not in native.served or not serves(ctx):
            plain = mlir.lower_fun(self._flat, multiple_results=True)
            return plain(ctx, *values, present=present, axis=axis, options=options)
        name, attributes = self.kernel
        lower = jax.ffi.ffi_lowering(native.target(name), operand_output_aliases=self.aliases)
        return lower(ctx, *values, axis=np.int64(axis), **attributes(present, dict(options)))

    def _jvp(self, primals: Any, tangents: Any, *, present: Sequence[bool], axis: int, options: Any) -> Any:
        layout = {"present": present, "axis": axis, "options": options}
        out = self.primitive.bind(*primals, **layout)
        args = dict(enumerate(_all(primals, present)))
        moved = {i: t for i, t in enumerate(_all(tangents, present)) if _is_tangent(t)}
        total = [jnp.zeros_like(o) for o in out]
        if curved := [i for i in moved if i not in self.linear]:

            def along(*some: Any) -> list[Any]:
                full = args | dict(zip(curved, some, strict=True))
                return self._flat(*_some(full.values()), **layout)

            _, total = jax.jvp(along, [args[i] for i in curved], [moved[i] for i in curved])
        if any(i in self.linear for i in moved):
            # Where only some upstream gradients move, the others' terms have no tangent: absent, not zero.
            full = [moved.get(i) if i in self.linear else a for i, a in args.items()]
            steady = self(*full, axis=axis, **dict(options))
            total = list(map(jnp.add, total, steady)) if curved else steady
        return out, total

    def _batch(
        self, mapping: Any, arrays: Any, dims: Any, *, present: Sequence[bool], axis: int, options: Any
    ) -> tuple[list[Any], list[int | None]]:
        layout = {"present": present, "axis": axis, "options": options}
        if all(d is None for d in dims):
            out = self.primitive.bind(*arrays, **layout)
            return out, [None] * len(out)
        along, full = _all(dims, present), _all(arrays, present)
        classes = max(a.ndim - (d is not None) for a, d in zip(arrays, dims, strict=True))
        for i, (a, d) in enumerate(zip(full, along, strict=True)):
            # The kernels read every argument densely, and have one weight for all rows. What is as large as the logits
            # is not repeated for them, unless the result is as large: one row of logits for many targets would be.
            if a is None or (d is None and i == self.weight):
                continue
            if (d is None and a.ndim == classes and i not in self.linear) or i == self.weight:
                flat = partial(self._flat, **layout)
                out = outputs_mapped(flat, mapping, dims, arrays)
                return mapped(flat, mapping, dims, out)(*arrays), out
            full[i] = batching.bdim_at_front(a, d, mapping.size, mapping.explicit_mesh_axis)
        out = self(*full, axis=axis + 1, **dict(options))
        return out, [0] * len(out)


def transposable(
    row: Row, *, like: int, symmetric: bool = False, back: Callable[..., Sequence[Any]] | None = None
) -> Row:
    """The row function (of one result), with its transpose in the linear arguments, a primitive as well.

    The transpose takes the same arguments: the result's cotangent in place of the first linear one, and none in
    place of the others. A symmetric row function is its own, kernel and all; `back` is one that is written out, of the
    same arguments and the `wanted` ones' places. Argument `like` has the linear ones' shape and type, then too.
    """
    first = row.linear[0]

    def turned(*args: Any, axis: int, wanted: Sequence[int], **options: Any) -> list[Any]:
        if symmetric:
            return [row.plain(*args, axis=axis, **options)]
        if back is not None:
            return list(back(*args, axis=axis, wanted=wanted, **options))

        def forward(*some: Any) -> Any:
            full = dict(enumerate(args)) | {first: None} | dict(zip(wanted, some, strict=True))
            return row.plain(*full.values(), axis=axis, **options)

        return list(jax.linear_transpose(forward, *[args[like]] * len(wanted))(args[first]))

    kernel = row.kernel if symmetric else None
    other = Row(f"{row.name}_transpose", turned, linear=[first], weight=row.weight, kernel=kernel)

    def transpose(cotangents: Any, *arrays: Any, present: Sequence[bool], axis: int, options: Any) -> list[Any]:
        full: list[Any] = [None if i in row.linear else a for i, a in enumerate(_all(arrays, present))]
        full[first] = cotangents[0]
        wanted = tuple(i for i in row.linear if present[i])
        found = dict(zip(wanted, other(*full, axis=axis, wanted=wanted, **dict(options)), strict=True))
        return [found.get(i) for i, on in enumerate(present) if on]

    def transpose_back(cotangents: Any, *arrays: Any, present: Sequence[bool], axis: int, options: Any) -> list[Any]:
        named = dict(options)
        ups = dict(zip(named.pop("wanted"), cotangents, strict=True))
        full = dict(enumerate(_all(arrays, present))) | {first: None}
        full |= {i: up for i, up in ups.items() if type(up) is not ad.Zero}
        (ct,) = row(*full.values(), axis=axis, **named)
        return [ct if i == first else None for i, on in enumerate(present) if on]

    ad.primitive_transposes[row.primitive] = as_typed(transpose)
    ad.primitive_transposes[other.primitive] = as_typed(transpose_back)
    return row


def serves(ctx: Any) -> bool:
    """Whether the kernels may stand in the program being lowered.

    Only in one for the CPU alone, and not in an export, which has to run anywhere. Not where XLA itself partitions over
    several devices: it knows nothing of a custom call, and would gather all of the rows on every one of them.
    """
    return (
        tuple(ctx.module_context.platforms) == ("cpu",)
        and alone(ctx)
        and not ctx.module_context.lowering_parameters.for_export
        and str(ctx.avals_in[0].dtype) in _FLOATS
        and all(0 not in aval.shape for aval in ctx.avals_in)
    )


def _is_tangent(t: Any) -> bool:
    return t is not None and type(t) is not ad.Zero and t.dtype != jax.dtypes.float0


def _all(arrays: Iterable[Any], present: Iterable[bool]) -> list[Any]:
    """None put back where an argument is absent."""
    rest = iter(arrays)
    return [next(rest) if on else None for on in present]


def _some(args: Iterable[Any]) -> list[Any]:
    return [a for a in args if a is not None]
