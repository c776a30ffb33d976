"""What a machine is called, what it is told to be able to do, and which way half precision goes there."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softmax_ext import machine, reference

EPYC = "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: avx2 avx512f avx512_bf16\n"
XEON = (
    "cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R) CPU @ 2.00GHz\nflags\t\t: avx2 avx512f amx_bf16\n"
)
GRAVITON = "Features\t: fp asimd asimdhp sve bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
NAMES = {
    EPYC: "AMD EPYC family 26 model 2, AVX2 AVX-512 bfloat16",
    XEON: "Intel Xeon CPU family 6 model 143, AVX2 AVX-512 AMX bfloat16",
    GRAVITON: "linux x86_64 CPU implementer 0x41 part 0xd40, NEON float16 bfloat16 SVE",
}


@pytest.mark.parametrize("text", NAMES, ids=["EPYC", "Xeon", "Graviton"])
def test_name(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{text}\nprocessor\t: 1\n{text.replace('avx512f', '')}")
    assert machine.name(file) == NAMES[text], "the first core speaks"
    assert "avx512f" in machine.instruction_sets(file) or "sve" in machine.instruction_sets(file)


def test_a_machine_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    assert machine.name(tmp_path / "none") == "darwin arm64 CPU"
    assert machine.instruction_sets(tmp_path / "none") == frozenset()


CAPABILITIES: list[tuple[dict[str, Any], dict[str, bool]]] = [
    ({"architecture": "x86_64", "avx512_f": True}, {"bfloat16": True, "float16": True}),
    ({"architecture": "x86_64", "avx512_bf16": True}, {"bfloat16": False, "float16": True}),
    ({"architecture": "x86_64", "amx_bf16": True, "amx_fp16": False}, {"bfloat16": False, "float16": True}),
    ({"architecture": "x86_64", "avx512_bf16": True, "avx512_fp16": True}, {"bfloat16": False, "float16": False}),
    ({"architecture": "x86_64", "amx_fp16": True}, {"bfloat16": True, "float16": False}),
    ({"architecture": "arm64", "neon": True, "bf16": False}, {"bfloat16": True, "float16": True}),
    ({"architecture": "arm64", "bf16": True, "fp16_arith": True}, {"bfloat16": False, "float16": False}),
    ({"architecture": "ppc64"}, {"bfloat16": False, "float16": False}),
    ({}, {"bfloat16": False, "float16": False}),
]


@pytest.mark.parametrize(("found", "slow"), CAPABILITIES)
def test_torch_multiplies_halves_where_the_cpu_has_a_dot_product(
    found: dict[str, Any], slow: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    linear = importlib.import_module("torch_ops._head.linear")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    for dtype, expected in slow.items():
        kind = getattr(torch, dtype)
        assert linear._slow_halves.__wrapped__(kind) == expected
        linear._slow_halves.cache_clear()
        x = torch.empty(2, 3, dtype=kind)
        try:
            assert linear.formed_in(x, torch.zeros(2).long()) == (torch.float32 if expected else kind)
            assert linear.formed_in(x, torch.zeros(2, 5)) == kind, "soft targets"
            assert linear.formed_in(x.to("meta"), torch.zeros(2).long()) == kind
            assert linear.formed_in(x.double(), torch.zeros(2).long()) == torch.float64
        finally:
            linear._slow_halves.cache_clear()


def test_torch_told_this_machine() -> None:
    """PyTorch's words and the kernel's agree here: a renamed capability would make every CPU slow."""
    torch = pytest.importorskip("torch")
    linear = importlib.import_module("torch_ops._head.linear")
    here = machine.instruction_sets()
    if not here & {"avx2", "asimd"}:
        pytest.skip("this machine does not tell its instruction sets")
    words = {"avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"}
    if "asimd" in here:
        assert linear._slow_halves(torch.bfloat16) == ("bf16" not in here)
        return
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert linear._slow_halves(kind) == (not here & {word for word in words if word.endswith(dtype)})


@pytest.fixture(params=["dot product", "none"])
def flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """A CPU with avx512_bf16 and one without, as JAX's head is told."""
    jax = pytest.importorskip("jax")
    found = {"avx512_bf16"} if request.param == "dot product" else set()
    monkeypatch.setattr(machine, "instruction_sets", lambda: frozenset(found))
    jax.clear_caches()
    yield found
    jax.clear_caches()


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_jax_either_way(flags: set[str], dtype: str, memory: Any) -> None:
    """The operands' type is the CPU's to decide; answers are as good, and dW as exact in many chunks."""
    import jax
    import jax.numpy as jnp

    import jax_ops

    r = np.random.default_rng(1)
    n, d, v = 256, 16, 33
    x, w = jnp.asarray(r.normal(size=(n, d)), dtype), jnp.asarray(r.normal(size=(v, d)), dtype)
    t = jnp.asarray(r.integers(v, size=n))
    wide = [np.asarray(a, np.float64) for a in (x, w)]
    truth: Any = reference.linear_cross_entropy_grad(wide[0], wide[1], np.asarray(t))[:2]
    errors = []
    for size in (256, 2) if memory == "fast" else (33, 1):
        f = lambda x, w, size=size: jax_ops.linear_cross_entropy(x, w, t, memory=memory, chunk_size=size)  # noqa: E731
        loss, grads = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w)
        np.testing.assert_allclose(
            float(loss), reference.linear_cross_entropy(wide[0], wide[1], np.asarray(t)), rtol=1e-6
        )
        off = [np.abs(np.asarray(g, np.float64) - c) / np.abs(c).max() for g, c in zip(grads, truth, strict=True)]
        assert off[0].max() < {"bfloat16": 6e-3, "float16": 1e-3}[dtype]
        errors.append(off[1].max())
    assert errors[0] < {"bfloat16": 4e-3, "float16": 6e-4}[dtype]
    assert errors[1] <= 1.2 * errors[0] + 2.0**-22


def test_half_types_are_the_operands_where_fast(flags: set[str]) -> None:
    """The matmul's operands, read from the program: two of bfloat16 with a dot product, else float32 ones."""
    import jax
    import jax.numpy as jnp

    linear = importlib.import_module("jax_ops._head.linear")
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((6, 8), jnp.bfloat16)
    for f, args, own in (
        (linear._half_logits_pieces, (x, w), bool(flags)),
        (linear._half_input_bwd_pieces, (jnp.ones((4, 6)), w), False),  # dlogits are not rounded
    ):
        text = jax.jit(f).lower(*args).as_text()
        (operands,) = {line.partition(" : (")[2] for line in text.splitlines() if "stablehlo.dot_general" in line}
        assert ("bf16" in operands.partition("->")[0]) == own
    half = [a.astype(jnp.float16) for a in (x, w)]
    assert "f32" in jax.jit(linear._half_logits_pieces).lower(*half).as_text().partition("dot_general")[2]
