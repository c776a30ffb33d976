"""What an import of a door loads: what a first softmax and loss need; the rest comes when it is called, whoever calls.

Eager users pay for files at every start of a process: counted here, where a clock of a busy machine would be no judge.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Files of ours, softmax_ext's among them.
MOST = {"torch_ops": 38, "jax_ops": 41}

FIRST = {
    "torch_ops": """
import sys, torch, torch_ops
before = set(sys.modules)
x, target = torch.ones(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
torch_ops.softmax(x).sum().backward()
torch_ops.log_softmax(x).sum().backward()
torch_ops.cross_entropy(x, target).backward()
torch_ops.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.1, ignore_index=2).backward()
torch_ops.nn.CrossEntropyLoss(reduction="none")(x, target).sum().backward()
""",
    "jax_ops": """
import sys, jax, jax.numpy as jnp, jax_ops
before = set(sys.modules)
x, target = jnp.ones((3, 5)), jnp.array([0, 1, 2])
jax.grad(lambda x: jax_ops.softmax(x).sum() + jax_ops.log_softmax(x).sum())(x)
jax.jit(jax.grad(lambda x: jax_ops.cross_entropy(x, target)))(x)
jax_ops.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.1, ignore_index=2)
jax_ops.softmax_cross_entropy_with_integer_labels(x, target)
""",
}
OURS = "[name for name in sys.modules if name.split('.')[0] in ('softmax_ext', 'torch_ops', 'jax_ops')]"


def _run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def _too_many(loaded: set[str], package: str) -> bool:
    return len(loaded) > MOST[package]


def _loaded(package: str, source: dict[str, str] | None = None) -> set[str]:
    """Our files that an import runs, read from what stands at their heads; `source` stands for some files' text."""
    found: set[str] = set()

    def load(name: str) -> None:
        while name:  # the longest part of it that is a file, and its folders
            path = ROOT.joinpath(*name.split("."))
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if name not in found and path.exists() and name.split(".")[0] in ("softmax_ext", package):
                found.add(name)
                tree = ast.parse((source or {}).get(name) or path.read_text())
                for node in tree.body:
                    if isinstance(node, ast.Import):
                        list(map(load, (alias.name for alias in node.names)))
                    elif isinstance(node, ast.ImportFrom):
                        list(map(load, (f"{node.module}.{alias.name}" for alias in node.names)))
            name = name.rpartition(".")[0]

    load(package)
    return found


@pytest.mark.parametrize("package", MOST)
def test_an_import_loads_what_a_first_call_needs(package: str) -> None:
    loaded = _loaded(package)
    assert not _too_many(loaded, package), sorted(loaded)
    code = f"{FIRST[package]}\nprint(*(n for n in {OURS} if n in before), '|', *(n for n in {OURS} if n not in before))"
    before, _, after = " ".join(_run(code)).partition("|")
    assert set(before.split()) == loaded
    assert not after.split()


@pytest.mark.parametrize("line", ["from torch_ops._head import fast", "import torch_ops._parallel.losses"])
def test_one_import_more_is_seen(line: str) -> None:
    path = ROOT / "torch_ops" / "cross_entropy.py"
    assert _too_many(_loaded("torch_ops", {"torch_ops.cross_entropy": f"{path.read_text()}\n{line}\n"}), "torch_ops")


# Every door whose files come late, called first where somebody looks on; then here and now, with nothing of it left.
WATCHED = """
import os, sys, warnings
import torch, torch._dynamo, torch.export, torch.fx.experimental.proxy_tensor  # once, not in every child
import torch_ops

def call(x, w, t):
    z, scale = x @ w.mT, x[..., 0, 0] * 0 + 0.5
    loss, found = torch_ops.cross_entropy(z, t, stats=("log_sum_sq", "argmax"), logit_scale=scale)
    loss = loss + found["log_sum_sq"].sum() + torch_ops.linear_cross_entropy(x, w, t)
    loss = loss + torch_ops.linear_cross_entropy(x, w, t, stats=("mean_logit",), logit_scale=scale)[0]
    loss = loss + torch_ops.linear_at(x, w, t.unsqueeze(-1)).sum()
    constant = (v.detach() for v in (2.0 * z, 2.0 * x, w))
    loss = loss + torch_ops.divergence(z, next(constant), logit_scale=scale)
    return loss + torch_ops.linear_divergence(x, w, *constant)

class Call(torch.nn.Module):
    def forward(self, x, w, t):
        return call(x, w, t)

def mapped(x, w, t):
    torch.func.vmap(torch.func.grad(call), (0, None, None))(torch.stack([x, x]), w, t)

def fake(x, w, t):
    with torch._subclasses.FakeTensorMode() as mode:
        call(*map(mode.from_tensor, (x, w, t)))

def compiled(x, w, t):
    torch.compile(call, fullgraph=True, backend="aot_eager")(x.clone().requires_grad_(), w, t).backward()
    from torch_ops._rules.function import IN_GRAPH
    print("marked", len(IN_GRAPH))

def traced(x, w, t):
    torch.fx.experimental.proxy_tensor.make_fx(call)(x, w, t)

def exported(x, w, t):
    torch.export.export(Call(), (x, w, t))

warnings.simplefilter("ignore")
for way in (lambda *arrays: None, mapped, fake, compiled, traced, exported):
    sys.stdout.flush()
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, way.__name__
        continue
    x, w, t = torch.arange(6.0).reshape(3, 2) / 5, torch.arange(8.0).reshape(4, 2) / 7, torch.tensor([0, 3, 1])
    way(x, w, t)
    x.requires_grad_()
    loss = call(x, w, t)
    print(loss.item(), *torch.autograd.grad(loss, x)[0].flatten().tolist(), sep=",")
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.slow
def test_a_first_call_that_somebody_watches() -> None:
    found = _run(WATCHED)
    marked = sum(path.read_text().count("\n@in_graph\n") for path in (ROOT / "torch_ops").rglob("*.py"))
    at = found.index("marked")
    assert found[at + 1] == str(marked)  # one that came after the compiler was told would be traced into
    values = found[:at] + found[at + 2 :]
    assert len(values) == 6
    assert len(set(values)) == 1
