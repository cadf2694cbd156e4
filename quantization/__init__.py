"""Quantisation: schemes as data, the policy that assigns them, the numpy reference of packing.

`linear` and the kernels (`*_kernels`, `native`) are the only modules here that import TVM.
"""
