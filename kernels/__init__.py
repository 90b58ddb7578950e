"""Kernels: each Triton kernel stands beside its naive reference in plain PyTorch."""
