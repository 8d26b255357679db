"""The verbs of `tawny`: one file each, a short function from arguments to a recipe, a library call, and a table.

Everything that decides a result is a key of the recipe; an option exists only for the keys that are used daily, all
others are `-o KEY=VALUE` or a file with `-c`. torch and transformers are imported inside the verbs, so that help
answers at once. Every verb turns a failure into one line and an exit code: 2 for what the user can put right, 1 for
the rest. A new verb is a file here, and an import below: `--help` lists them in that order.
"""

from __future__ import annotations

__all__ = ["app", "main"]

from tawny.cli.root import app, main

# One import a line: importing a verb registers it, and this is the order of the help.
# isort: off
from tawny.cli import prune  # noqa: F401
from tawny.cli import search  # noqa: F401
from tawny.cli import fit  # noqa: F401
from tawny.cli import recover  # noqa: F401
from tawny.cli import plan  # noqa: F401
from tawny.cli import profile  # noqa: F401
from tawny.cli import eval_  # noqa: F401
from tawny.cli import compare  # noqa: F401
from tawny.cli import inspect  # noqa: F401
from tawny.cli import slim  # noqa: F401
from tawny.cli import pack  # noqa: F401
from tawny.cli import unpack  # noqa: F401
from tawny.cli import export  # noqa: F401
from tawny.cli import generate  # noqa: F401
from tawny.cli import chat  # noqa: F401
from tawny.cli import serve  # noqa: F401
from tawny.cli import bench  # noqa: F401
from tawny.cli import push  # noqa: F401
from tawny.cli import list_  # noqa: F401
from tawny.cli import doctor  # noqa: F401
# isort: on
