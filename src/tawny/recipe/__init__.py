"""A recipe: everything that decides the result of a run, its checks, and its files."""
