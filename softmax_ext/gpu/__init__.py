"""The row functions in Triton: the twin of csrc/."""
