"""`tawny doctor`: what this machine has."""

from __future__ import annotations

from tawny.cli.common import console_for
from tawny.cli.options import AsJson
from tawny.cli.root import app


@app.command(
    epilog="\b\nExamples:\n  tawny doctor\n  tawny doctor --json\n  tawny doctor --json | jq '.cpu.features'"
)
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has and what is missing, and how to get it."""
    with console_for(as_json) as console:
        from tawny.doctor import examine
        from tawny.tables import doctor_tables

        report = examine()
        console.result(report, doctor_tables)
