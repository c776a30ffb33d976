"""Framework-neutral core of softmax-ext: the contract, the reference and the row kernels."""

from softmax_ext.memory import keep_memory

__all__ = ["__version__", "keep_memory"]
__version__ = "0.1.0"  # the one place: pyproject.toml reads it here
