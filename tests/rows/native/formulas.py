"""Rows in float64 NumPy, and the native ops' levels, types and layouts."""

import shutil

import pytest

from torch_ops._rows import native

if native.missing and not (shutil.which("g++") or shutil.which("clang++")):
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)


ops = native.ops


LEVELS = [pytest.param(2), pytest.param(1, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow)]
