"""Prune large language models to high sparsity and make the sparsity pay."""
