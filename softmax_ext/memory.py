"""Memory that a process keeps: what a fresh large result costs, and how to pay it once."""

from __future__ import annotations

import ctypes
import sys
import warnings

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_LARGEST = 2**31 - 1  # its options are C ints


def keep_memory() -> bool:
    """Let this process keep the memory it frees: glibc's malloc then serves large arrays from it, of every library.

    A fresh array costs page faults, two to five times the arithmetic of a softmax. glibc returns each block above
    32 MiB to the system, so every call pays anew; afterwards (`mallopt`: no mmap, no trimming) only growth does.
    Call it once, early; again it does nothing more. The process holds the most memory it ever had, and what other
    threads freed may lie in gaps. A malloc that replaces glibc's (jemalloc, tcmalloc) has settings of its own.

    Returns:
        Whether memory is kept. Where the C library is not glibc, nothing changes and a RuntimeWarning says so.

    Example:
        >>> import softmax_ext
        >>> kept = softmax_ext.keep_memory()
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        rule = "keep_memory: the C library must be glibc for memory to be kept"
        warnings.warn(f"{rule}; got another one on {sys.platform}.", RuntimeWarning, stacklevel=2)
        return False
    return all(library.mallopt(option, value) == 1 for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST)))
