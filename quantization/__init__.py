"""Quantisation: schemes as data, the policy that assigns them, the numpy reference of packing.

`linear` is the only module here that imports TVM.
"""
