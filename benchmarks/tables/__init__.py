"""The tables that `readme.py` puts into pages: one function a results file, from its JSON to Markdown."""
