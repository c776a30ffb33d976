"""Recipes for JAX, each beside the plain computation; `examples/recipes_torch` has the same for PyTorch."""
