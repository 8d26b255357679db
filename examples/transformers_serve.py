"""`transformers serve` with packed folders: the same command, after Tawny is imported.

python examples/transformers_serve.py packed --port 8001
"""

from __future__ import annotations

import sys

import tawny  # noqa: F401  packed folders open once it is imported

if __name__ == "__main__":
    from transformers.cli.transformers import app

    sys.argv[1:1] = ["serve"]
    app()
