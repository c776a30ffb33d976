"""The row functions, and who serves them: plain jax.numpy, and the native kernels as primitives of JAX."""
