"""Triton kernels, one op a file; installed as fastmerge.kernels."""
