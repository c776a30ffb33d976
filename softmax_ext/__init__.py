"""Framework-neutral core of softmax-ext: the contract, the reference and the row kernels."""

from importlib.metadata import version

__version__ = version("softmax-ext")
