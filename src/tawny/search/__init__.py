"""Allocations that are tried on the model, not computed from a profile."""
