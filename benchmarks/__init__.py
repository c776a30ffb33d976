"""Measurements: accuracy and, with the native kernels, speed."""
