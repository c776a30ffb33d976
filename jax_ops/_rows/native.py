"""The native CPU kernels as XLA FFI targets: found, loaded, registered; or the reason they are missing."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import jax

import softmax_ext
from softmax_ext import built

LIBRARY = "libsoftmax_ext_xla.so"
_ROWS = [f"{op}_{way}" for op in ("softmax", "log_softmax", "cross_entropy") for way in ("fwd", "bwd")]
_ROWS += ["cross_entropy_fwd_bwd", "divergence_fwd", "divergence_sums", "divergence_bwd", "divergence_fwd_bwd"]
_ROWS += ["picked_fwd", "picked_input_bwd", "picked_weight_bwd", "points"]


def _find() -> tuple[Any, str]:
    """(the loaded library, "") or (None, why not)."""
    for folder in softmax_ext.__path__:
        path = Path(folder) / LIBRARY
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:  # built for another machine
                return None, f"{LIBRARY} does not load ({error})"
            # A handler newer than the runtime would keep the whole CPU backend from starting.
            theirs, ours = _interface(), (library.softmax_ext_ffi_major(), library.softmax_ext_ffi_minor())
            if theirs is None or ours[0] != theirs[0] or ours[1] > theirs[1]:
                return None, f"{LIBRARY} was built for another FFI version ({ours}) than this jaxlib's ({theirs})"
            return library, ""
    return None, f"{LIBRARY} is {built.why_not('jax', softmax_ext.__path__)}"


def _interface() -> tuple[int, int] | None:
    """The installed runtime's FFI version, which nothing but its headers tells."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    text = header.read_text(encoding="utf-8", errors="replace") if header.exists() else ""
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(m[1]) if m else None for m in found)
    return None if major is None or minor is None else (major, minor)


_library, missing = _find()


def instruction_set() -> str:
    """What the kernels run on here, by its maker's name."""
    _library.softmax_ext_instruction_set.restype = ctypes.c_char_p
    return _library.softmax_ext_instruction_set().decode()


def target(row: str) -> str:
    """The name compiled programs call a row function by; serialized programs hold it, so it never changes."""
    return f"softmax_ext_{row}"


# A library that was built of an earlier checkout has not all of them.
served = [row for row in _ROWS if hasattr(_library, target(row))]

# At import, which starts no backend: an executable that another process compiled and saved looks for them when it is
# loaded, before any program is lowered here.
for _row in served:
    _handler = jax.ffi.pycapsule(getattr(_library, target(_row)))
    jax.ffi.register_ffi_target(target(_row), _handler, platform="cpu")
