"""`tawny inspect`: what a checkpoint really holds."""

from __future__ import annotations

from tawny.cli.common import console_for
from tawny.cli.options import AsJson, Model, TrustRemoteCode
from tawny.cli.root import app


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny inspect pruned\n"
    "  tawny inspect smollm2\n"
    "  tawny inspect pruned --json | jq '.sparsity'"
)
def inspect(model: Model, trust_remote_code: TrustRemoteCode = False, as_json: AsJson = False) -> None:
    """Show what a checkpoint really holds, linear by linear: zeros, n:m patterns, ties."""
    with console_for(as_json) as console:
        import tawny

        with console.progress() as progress:
            found = tawny.inspect(model, progress=progress).to_dict()
        from tawny.tables import inspection_tables

        console.result(found, inspection_tables)
