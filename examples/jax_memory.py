"""The memory of head and loss in JAX: what the compiler set aside for them."""

import jax
import jax.numpy as jnp

from examples.jax_lm import LOSSES
from examples.recipe import Recipe


def loss_bytes(recipe: Recipe, loss: str) -> int:
    """The bytes beyond hidden states, weight and targets that the compiled loss with both gradients needs.

    Temporaries and results: the gradients count, as they do in `examples.torch_memory`.

    Raises:
        RuntimeError: the backend does not say.
    """
    n = recipe.batch * recipe.length
    hidden = jax.ShapeDtypeStruct((n, recipe.width), jnp.float32)
    weight = jax.ShapeDtypeStruct((recipe.vocab, recipe.width), jnp.float32)
    target = jax.ShapeDtypeStruct((n,), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(LOSSES[loss], argnums=(0, 1))).lower(hidden, weight, target).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("this JAX backend does not say how much memory a compiled function needs")
    return memory.temp_size_in_bytes + memory.output_size_in_bytes
