"""Hessian-vector products through the loss, in PyTorch and JAX: the largest curvature of a linear classifier.

    python -m examples.hessian_vector

Forward mode over reverse mode: one product costs a few gradients, and no Hessian is formed. Power iteration on it finds
the largest eigenvalue, which bounds the learning rate of gradient descent by 2 / eigenvalue.
"""

from collections.abc import Callable

import jax
import numpy as np
import torch

import jax_ops
import torch_ops

ROWS, FEATURES, CLASSES, ROUNDS = 64, 8, 10, 60
Product = Callable[[np.ndarray], np.ndarray]


def by_torch(x: np.ndarray, w: np.ndarray, t: np.ndarray) -> Product:
    """v to H v, of the head's loss in its weight."""
    inputs, weight, target = torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(t)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return torch_ops.linear_cross_entropy(inputs, weight, target)

    def product(v: np.ndarray) -> np.ndarray:
        return torch.func.jvp(torch.func.grad(loss), (weight,), (torch.from_numpy(v),))[1].numpy()

    return product


def by_jax(x: np.ndarray, w: np.ndarray, t: np.ndarray) -> Product:
    """The same."""

    @jax.jit
    def product(v: jax.Array) -> jax.Array:
        return jax.jvp(jax.grad(lambda w: jax_ops.linear_cross_entropy(x, w, t)), (w,), (v,))[1]

    return lambda v: np.asarray(product(v))


def largest(product: Product, v: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest eigenvalue by power iteration, and its vector."""
    value = 0.0
    for _ in range(ROUNDS):
        v = v / np.linalg.norm(v)
        hv = product(v)
        value, v = float(np.vdot(v, hv)), hv
    return value, v / np.linalg.norm(v)


def main() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((ROWS, FEATURES), np.float32), rng.standard_normal((CLASSES, FEATURES), np.float32)
    t, start = rng.integers(0, CLASSES, ROWS), rng.standard_normal(w.shape, np.float32)
    x[:, 0] *= 3  # one direction stands out, so that few rounds find it
    torch_product, jax_product = by_torch(x, w, t), by_jax(x, w, t)
    np.testing.assert_allclose(torch_product(start), jax_product(start), rtol=1e-4, atol=1e-6)

    values = []
    for name, product in {"torch": torch_product, "jax": jax_product}.items():
        value, vector = largest(product, start)
        np.testing.assert_allclose(product(vector), value * vector, atol=0.02 * value)
        print(f"{name}: largest eigenvalue {value:.5f}, gradient descent is stable below {2 / value:.3f}")
        values.append(value)
    np.testing.assert_allclose(*values, rtol=1e-3)


if __name__ == "__main__":
    main()
