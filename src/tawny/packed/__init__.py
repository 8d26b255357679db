"""Make sparsity pay: packed weights that take the bytes of their survivors, and modules that multiply them as they are."""
