"""Packed sparse weights: a bitmap and the kept values; their files, their loading, and the kernels that run them."""
