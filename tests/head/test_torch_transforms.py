"""torch_ops.linear_cross_entropy: every transform, to every order."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_ops
from tests.head.torch_arrays import IN, MEMORY, D, V, func
from tests.rules.test_torch_transforms import CAP, SCALE, TARGET, THIRD, TRANSFORMS, S, Z, _composed, _same

OPTIONS: dict[str, Any] = {"label_smoothing": S, "logit_scale": SCALE, "softcap": CAP, "z_loss": Z}


def ours(x: Tensor, lw: Tensor, memory: str, soft: bool, entropy: bool) -> Tensor:
    out: Any = torch_ops.linear_cross_entropy(
        x,
        lw,
        IN["y"] if soft else TARGET,
        linear_bias=IN["lb"],
        weight=IN["w"],
        token_weight=IN["tw"],
        memory=memory,  # pyright: ignore
        chunk_size=2,
        stats=("entropy",) if entropy else (),
        **OPTIONS,
    )
    return out[0] + 0.5 * out[1]["entropy"].sum() if entropy else out


def theirs(x: Tensor, lw: Tensor, memory: str, soft: bool, entropy: bool) -> Tensor:
    z = F.linear(x, lw, IN["lb"])
    return _composed(z, IN["y"] if soft else None, IN["w"], IN["tw"], S, True, 0.5 if entropy else 0.0)


@pytest.mark.parametrize("transform", [*TRANSFORMS, *THIRD])
@pytest.mark.parametrize(("memory", "soft", "entropy"), [("fast", False, False), ("fast", True, True), ("lean", 0, 1)])
@pytest.mark.parametrize("by", ["x", "lw"])
def test_transform_agrees_with_the_builtins(by: str, memory: str, soft: Any, entropy: Any, transform: str) -> None:
    if transform in THIRD and (by == "lw" or memory == "lean"):
        pytest.skip("third order: by the input, in one mode")
    at = (lambda v: (v, IN["lw"])) if by == "x" else (lambda v: (IN["x"], v))
    apply = {**TRANSFORMS, **THIRD}[transform]
    _same(
        apply(lambda v: ours(*at(v), memory, soft, entropy))(IN[by]),
        apply(lambda v: theirs(*at(v), memory, soft, entropy))(IN[by]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "transform"), [("fast", "jvp"), ("fast", "hessian"), ("fast", "vmap(grad)"), ("lean", "hvp")]
)
def test_transform_inside_a_compiled_function(memory: str, transform: str) -> None:
    torch._dynamo.reset()
    apply = TRANSFORMS[transform]
    compiled = torch.compile(
        apply(lambda v: ours(v, IN["lw"], memory, False, True)), fullgraph=True, backend="aot_eager"
    )
    _same(compiled(IN["x"]), apply(lambda v: theirs(v, IN["lw"], memory, False, True))(IN["x"]))


def _case(memory: str, soft: bool, reduction: str, stats: tuple[str, ...], full: bool) -> tuple[Any, list[str]]:
    names = ["x", "lw", "lb", *["y"] * soft, "w", "tw"] if full else ["x", "lw", *["y"] * soft]

    def fn(*arrays: Tensor) -> Any:
        a = dict(zip(names, arrays, strict=True))
        options = {**(OPTIONS if full else {}), "reduction": reduction, "stats": stats}
        given = {"linear_bias": a.get("lb"), "weight": a.get("w"), "token_weight": a.get("tw")}
        target = a.get("y", TARGET)
        out = torch_ops.linear_cross_entropy(a["x"], a["lw"], target, **given, **options, memory=memory, chunk_size=2)  # pyright: ignore
        return (out[0], *out[1].values()) if stats else out

    return fn, names


CHECKED = [
    ("fast", False, "mean", (), True),
    ("lean", False, "sum", ("lse", "entropy"), True),
    ("lean", False, "none", ("logprob",), False),
    ("fast", True, "none", (), True),
    ("lean", True, "mean", (), False),
]


def _leaves(names: list[str]) -> tuple[Tensor, ...]:
    return tuple(IN[name].clone().requires_grad_() for name in names)


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_gradcheck(case: Any) -> None:
    fn, names = _case(*case)
    assert gradcheck(
        fn, _leaves(names), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("case", CHECKED, ids=str)
@pytest.mark.long
def test_gradgradcheck(case: Any) -> None:
    fn, names = _case(*case)
    # fast mode: along random directions, a tenth of the time
    assert gradgradcheck(
        fn, _leaves(names), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True, fast_mode=True
    )


def test_1d_input_passes_batched_forward_gradcheck() -> None:
    fn = lambda x, w: torch_ops.linear_cross_entropy(x, w, torch.tensor(3))  # noqa: E731
    args = (IN["x"][0].clone().requires_grad_(), IN["lw"].clone().requires_grad_())
    assert gradcheck(fn, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.long
def test_k_dimensional_and_shifted_gradgradcheck(shift: int) -> None:
    if shift:
        x, w, t = torch.rand(2, 3, 2, dtype=torch.float64), IN["lw"], torch.tensor([[0, 1, -100], [2, 3, 4]])
    else:
        x, w, t = IN["x"], torch.rand(V, 2, D, dtype=torch.float64), torch.tensor([[0, 1], [2, -100], [4, 4]])
    fn = lambda x, w: torch_ops.linear_cross_entropy(x, w, t, shift=shift, z_loss=0.1, chunk_size=2)  # noqa: E731
    args = (x.clone().requires_grad_(), w.clone().requires_grad_())
    assert gradcheck(fn, args, check_forward_ad=True)
    assert gradgradcheck(fn, args, check_fwd_over_rev=True, fast_mode=True)


def test_heads_that_differ_by_example_under_vmap() -> None:
    x, lw = torch.stack([IN["x"], -IN["x"]]), torch.stack([IN["lw"], IN["lw"].flip(0)])
    for memory, argnum in product(MEMORY, (0, 1)):
        f = func.grad(lambda x, w, memory=memory: ours(x, w, memory, False, True), argnums=argnum)
        _same(func.vmap(f)(x, lw), torch.stack([f(a, w) for a, w in zip(x, lw, strict=True)]))
