"""PyTorch: exported and ahead-of-time compiled programs in a process without this package, modules on disk."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ops

G = torch.Generator().manual_seed(4)
X = 3.0 * torch.randn(6, 8, generator=G)
T = torch.tensor([0, 1, -100, 49, 3, 4])


class Everything(nn.Module):
    """Each op once, the linear head with what it returns beside its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 50)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.head.weight, self.head.bias
        options: dict[str, Any] = {"linear_bias": bias, "softcap": 5.0, "stats": ("lse", "argmax")}
        loss, stats = torch_ops.linear_cross_entropy(x, weight, t, **options)
        logits = self.head(x)
        return (
            loss,
            stats["lse"],
            stats["argmax"],
            torch_ops.linear_cross_entropy(x, weight, t, label_smoothing=0.1, z_loss=1e-3),
            torch_ops.cross_entropy(logits, t, label_smoothing=0.1),
            torch_ops.softmax(logits, -1),
            torch_ops.log_softmax(logits, -1),
        )


# The package is out of reach: an op of ours in the program would be one nobody has registered.
ELSEWHERE = """
import sys
from pathlib import Path
sys.modules["torch_ops"] = sys.modules["softmax_ext"] = None
import torch
folder = Path(sys.argv[1])
exported = torch.export.load(folder / "exported.pt2").module()
compiled = torch._inductor.aoti_load_package(str(folder / "compiled.pt2"))
for x, t, outputs in torch.load(folder / "cases.pt", weights_only=True):
    for program in (exported, compiled):
        torch.testing.assert_close(tuple(program(x, t)), outputs, rtol=1e-5, atol=1e-6)
        print("same")
"""


@pytest.mark.slow
def test_export_and_aotinductor_run_where_the_package_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (X, T), dynamic_shapes=({0: rows}, {0: rows}))
    torch.export.save(program, tmp_path / "exported.pt2")
    # How a wrapper of this size is optimised matters to nobody here, and takes half the time.
    options: dict[str, Any] = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own deprecations
        path = str(tmp_path / "compiled.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    cases = [(x, t, model(x, t)) for x, t in ((X, T), (torch.cat([X, X.flip(0)]), torch.cat([T, T.flip(0)])))]
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same"] * 4


WEIGHT = torch.rand(5, generator=G) + 0.5
PAIRS: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "Softmax": (lambda m: m.Softmax(-1), (X,), ()),
    "LogSoftmax": (lambda m: m.LogSoftmax(-1), (X,), ()),
    "CrossEntropyLoss": (lambda m: m.CrossEntropyLoss(torch.ones(5)), (X[:, :5], T.clamp(max=4)), (WEIGHT,)),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # since PyTorch 2.13
    linear = lambda m: m.LinearCrossEntropyLoss(8, 5, bias=True, weight=torch.ones(5))  # noqa: E731
    PAIRS["LinearCrossEntropyLoss"] = (linear, (X, T.clamp(max=4)), (WEIGHT,))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("way", ["ours to torch.nn", "torch.nn to ours"])
def test_saved_modules_load_into_the_others(name: str, way: str) -> None:
    """By state_dict, which must hold all there is: before it is loaded the two answer differently."""
    make, inputs, weights = PAIRS[name]
    doors = (torch_ops.nn, nn) if way == "ours to torch.nn" else (nn, torch_ops.nn)
    torch.manual_seed(0)
    source, target = (make(door) for door in doors)
    for weight in weights:
        source.weight.copy_(weight)
        assert not torch.allclose(source(*inputs), target(*inputs))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert str(target.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    torch.testing.assert_close(target(*inputs), source(*inputs))


@pytest.mark.parametrize("name", PAIRS)
def test_saved_whole(name: str) -> None:
    make, inputs, _ = PAIRS[name]
    module = nn.Sequential(make(torch_ops.nn))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert repr(again) == repr(module)
    torch.testing.assert_close(again[0](*inputs), module[0](*inputs), rtol=0.0, atol=0.0)
