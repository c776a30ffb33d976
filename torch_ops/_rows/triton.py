"""Whether the Triton kernels serve a tensor. Triton itself is imported with the first tensor of a GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from torch_ops._modes import is_direct, is_none, is_plain
from torch_ops._rows.native import FLOATS

# ROCm calls itself "cuda". Everything else (MPS, TPU, private devices) has the plain path.
DEVICES = ("cuda", "xpu")
# uint64 is compared by its own rules: a value from 2**63 on is no negative one.
_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

missing = "" if importlib.util.find_spec("triton") else "Triton is not installed"
ops: Any = torch.ops.softmax_ext_triton


def serves(x: Tensor, dim: int) -> bool:
    """Whether the Triton kernels take x; exported programs hold no op of ours, so that they run anywhere."""
    return serves_matrix(x) and not is_none(x.shape[dim])


def serves_matrix(x: Tensor) -> bool:
    """The same where no dimension need have a class."""
    return (
        x.device.type in DEVICES
        and x.dtype in FLOATS
        and is_plain(x)
        and not torch.compiler.is_exporting()
        and not why_not(x.device)
        and not (x.device.type == "xpu" and x.dtype == torch.float64)  # some of these chips have no float64
    )


def serves_directly(x: Any) -> bool:
    """Whether x may go to a Triton op as it is: `native.serves_directly` on a GPU."""
    return type(x) is Tensor and x.device.type in DEVICES and is_direct(x) and serves(x, -1)


def serves_indices(target: Tensor) -> bool:
    """Whether the kernel of class indices takes an eager call's."""
    return target.device.type in DEVICES and target.dtype in _INDICES and not why_not(target.device)


def cross_entropy_mean(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """(loss, m, rest, how many rows are kept) of logits (N, V) and canonical indices, 0 / 0 where none is kept."""
    nll, _, m, rest = ops.cross_entropy_fwd(logits, target, None, 1, 1.0, None, False, False)
    loss, kept = ops.kept_mean(nll, target)
    return loss, m, rest, kept


def scaled(x: Tensor, factor: Tensor, out: Tensor) -> bool:
    """Whether the kernels wrote x * factor to `out`: PyTorch's own, which converts, takes three times a copy's time."""
    if not (x.device.type in DEVICES and x.is_contiguous() and out.is_contiguous()) or why_not(x.device):
        return False
    importlib.import_module("torch_ops._rows.triton_ops").scaled(x, factor, out)
    return True


@functools.cache
def why_not(device: torch.device) -> str:
    """Why the kernels do not serve a device, or "" if they do."""
    if missing:
        return missing
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"Triton needs compute capability 8.0; this device has {capability[0]}.{capability[1]}"
    try:
        for ops in ("classes", "divergence"):  # and with them triton_ops
            importlib.import_module(f"torch_ops._rows.triton_{ops}")
    except (ImportError, OSError) as error:  # a Triton built for another system
        return f"Triton does not load ({error})"
    return ""
