"""The row functions, and who serves them: plain PyTorch, the native kernels, Triton's."""
