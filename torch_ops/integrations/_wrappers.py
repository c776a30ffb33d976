"""What a function set on an instance was made around."""

from __future__ import annotations

from typing import Any

from torch import nn


def leads_to(function: Any, ours: Any) -> bool:
    """Whether a forward set on the instance is one around ours: bound, partial, wrapped, closed over or compiled."""
    seen: list[Any] = []
    todo = [function]
    while todo and len(seen) < 100:
        f = todo.pop()
        if f is ours:
            return True
        if any(f is s for s in seen) or not callable(f):
            continue
        seen.append(f)
        names = ("__func__", "func", "__wrapped__", "_torchdynamo_orig_callable", "__call__")
        todo += [vars(type(f)).get(n) if n == "__call__" else getattr(f, n, None) for n in names]
        todo += [*getattr(f, "args", ()), *_cells(f), *(getattr(f, "__defaults__", None) or ())]
        if not isinstance(f, type | nn.Module) and hasattr(f, "__dict__"):
            todo += [v for k, v in vars(f).items() if k != "__wrapped__"]
    return False


def _cells(function: Any) -> list[Any]:
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # empty
            continue
    return found
