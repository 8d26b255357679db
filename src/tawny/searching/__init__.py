"""Allocations that are tried on the model, not computed from a profile. The room stands above pruning, which never calls it."""
