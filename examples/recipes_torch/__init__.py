"""Recipes for PyTorch, each beside the plain computation; `examples/recipes_jax` has the same for JAX."""
