"""Before anything imports Triton: without a GPU its kernels run in its interpreter."""

import importlib.util
import os

_GPU = False
if importlib.util.find_spec("torch"):
    import torch

    _GPU = torch.cuda.is_available()
if not _GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_report_header() -> list[str]:
    """Which devices are tested, and which are not for what reason."""
    if not importlib.util.find_spec("triton"):
        return ["triton: not installed; its kernels are not tested"]
    where = "on this GPU (make gpu)" if _GPU else "in the interpreter and by compilation: PyTorch sees no GPU"
    return [f"triton: kernels tested {where}"]
