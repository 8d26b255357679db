"""Kernels for packed weights: C++ sources one file an instruction set, their twin in plain torch, and the calls.

`native` finds and chooses the compiled code, `reference` is plain torch, `ops` calls one or the other.
"""
