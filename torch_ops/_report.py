"""What `python -m softmax_ext` asks of this door."""

from __future__ import annotations

import numpy as np
import torch

import torch_ops
from torch_ops._rows import native, triton


def version() -> str:
    """The framework's version."""
    return torch.__version__


def threads() -> str:
    """The thread pool the kernels use."""
    return f"{torch.get_num_threads()} threads of PyTorch's pool"


def kernels() -> list[tuple[str, str, str]]:
    """(device, kernel, why) for each device found and for those that would be used if they were."""
    accelerator = torch.accelerator.current_accelerator()
    if native.missing:
        rows = [("cpu", "plain", f"analytic rules in PyTorch ops: {native.missing}")]
    else:
        rows = [("cpu", "native", f"{native.instruction_set()} kernels; plain PyTorch ops for higher derivatives")]
    if accelerator is not None and torch.accelerator.is_available():
        rows.append((accelerator.type, *_on(accelerator)))
    else:
        rows.append(("gpu", "none", "PyTorch sees no accelerator"))
    return rows


def _on(device: torch.device) -> tuple[str, str]:
    """(kernel, why) on an accelerator."""
    if device.type not in triton.DEVICES:
        return "plain", "analytic rules in PyTorch ops"
    if why := triton.why_not(device):
        return "plain", f"analytic rules in PyTorch ops: {why}"
    return "triton", "row kernels; plain PyTorch ops for higher derivatives"


def self_check(logits: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Each quantity of the report's table, from the public functions."""
    x = torch.from_numpy(logits).requires_grad_()
    t = torch.from_numpy(target)
    loss, stats = torch_ops.cross_entropy(x, t, reduction="none", stats=("entropy",))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    values = {
        "softmax": torch_ops.softmax(x),
        "log_softmax": torch_ops.log_softmax(x),
        "loss": loss,
        "gradient": gradient,
        "entropy": stats["entropy"],
    }
    return {name: value.detach().numpy() for name, value in values.items()}
