"""Kernels for NVIDIA GPUs, in CUDA C++ where portable code leaves speed behind."""
