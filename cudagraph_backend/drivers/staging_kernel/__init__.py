"""Triton kernels of our own, and what prepares their launches."""
