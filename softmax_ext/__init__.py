"""Framework-neutral core of softmax-ext: the contract, the reference and the row kernels."""

from importlib.metadata import PackageNotFoundError, version

from softmax_ext.memory import keep_memory

__all__ = ["__version__", "keep_memory"]

try:
    __version__ = version("softmax-ext")
except PackageNotFoundError:  # imported from a checkout, as `make gpu` does, which installs nothing
    __version__ = "not installed"
