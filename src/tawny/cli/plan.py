"""`tawny plan`: the same recipe without the work."""

from __future__ import annotations

from tawny.cli.common import console_for, recipe_from
from tawny.cli.options import (
    AllocatorName,
    AsJson,
    CalibrationText,
    Device,
    Memory,
    Model,
    Overrides,
    PatternName,
    RecipeFile,
    Samples,
    SeqLen,
    SolverName,
    Sparsity,
    TrustRemoteCode,
)
from tawny.cli.root import RecipeCommand, app


@app.command(
    cls=RecipeCommand,
    epilog="\b\nExamples:\n"
    "  tawny plan smollm2 -s 0.7\n"
    "  tawny plan ./model -c owl-sparsegpt-70 --memory 6GB\n"
    "  tawny plan ./model -s 0.6 -a uniform -m wanda -o 'exclude=*.down_proj' --json",
)
def plan(
    model: Model,
    sparsity: Sparsity = None,
    allocator: AllocatorName = None,
    solver: SolverName = None,
    pattern: PatternName = None,
    recipe: RecipeFile = None,
    option: Overrides = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: SeqLen = None,
    device: Device = None,
    memory: Memory = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what the same `tawny prune` would do, and what it would take, without doing it."""
    with console_for(as_json) as console:
        chosen = recipe_from(
            recipe,
            option,
            sparsity=sparsity,
            allocator=allocator,
            solver=solver,
            pattern=pattern,
            calibration_text=calibration,
            calibration_samples=samples,
            calibration_seqlen=seqlen,
            device=device,
        )
        import tawny

        with console.progress() as progress:
            made = tawny.plan(model, recipe=chosen, memory=memory, progress=progress).to_dict()
        from tawny.tables import plan_tables

        console.result(made, plan_tables)
