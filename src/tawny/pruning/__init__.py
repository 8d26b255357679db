"""Prune a model block by block: open, profile, allocate, and for each block observe, solve, advance, write."""
