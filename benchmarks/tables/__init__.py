"""The tables that `readme.py` puts into pages. Each function turns the JSON of one results file into Markdown."""
