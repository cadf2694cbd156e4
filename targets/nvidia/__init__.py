"""Ahead-of-time libraries for NVIDIA GPUs: compiler discovery, fat binaries, their checks."""
