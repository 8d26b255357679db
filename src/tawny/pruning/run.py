"""Prune a model block by block. This file is the job; read it from `prune` down.

Only one block's weights are in memory at a time; embeddings leave once the samples are embedded. The samples walk through
the stack with the pruning: each block is observed on the outputs of the already pruned blocks before it, solved,
and run again to give the next one its inputs. No forward is run whose result nobody uses. What is finished is
kept in a journal, and the same command goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tawny.allocation.profile import Allocation
from tawny.errors import RecipeError
from tawny.machine import peak_memory
from tawny.model.streams import Samples, Stream
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent
from tawny.pruning.block import PRUNED
from tawny.pruning.blocks import choose_blocks
from tawny.pruning.experts import PROBE, Cut, asking_experts, check_experts, describe_cut, probe_samples
from tawny.pruning.output import asking_output
from tawny.pruning.prepare import demand_of, notices
from tawny.pruning.profiling import profile_walk, spend
from tawny.pruning.refine import holds_out
from tawny.pruning.session import Purpose, Session, open_session, text_or_tokens
from tawny.pruning.visitors import Refine, Solve, Write, samples_of
from tawny.pruning.writing import write_pages, write_rest
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe
from tawny.record import Record, weight_files
from tawny.run.place import Workplace, place_of
from tawny.run.walk import Advance, walk

WALK = "prune"  # what the journal calls it


@opens_models
def prune(
    source: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
    memory: str | int | None = None,
    tokenizer: Any = None,
    calibration: Tensor
    | tuple[Tensor, Tensor]
    | Mapping[str, Tensor]
    | Samples
    | str
    | Path
    | Sequence[str | Path]
    | None = None,
    trust_remote_code: bool = False,
    **keys: Any,
) -> Record:
    """Prune a model to a target sparsity.

    A run that was stopped, however it was stopped, leaves what it finished in `OUT.partial`; the same call goes on
    from there and gives the bytes of a run that was never stopped. A live module starts from the beginning.

    Args:
        source: a folder, hub id, `.gguf` file or `smollm2`; or a live module, which is pruned in place.
        out: folder to write; needed for a path, optional for a live module (then nothing is written).
        recipe: everything that decides the result; `keys` override single entries of it
            (`sparsity=0.6, allocator="owl", solver="wanda"`, or dotted: `**{"solver.damp": 0.1}`).
        progress: told how far the work is.
        overwrite: replace an existing `out` once the new one is complete, and discard an unfinished run, unless it is
            this same one and began with it, too: then it goes on.
        memory: peak memory of the whole process that may not be passed (`"6GB"`); the result does not depend on it.
        tokenizer: for a live module calibrated on text.
        calibration: tokens `[samples, tokens]`, `(tokens, attention mask)`, or tensors by the names of the model's inputs. They are
            taken as they are. Else the name or path of a text, or several with shares (`["wiki=0.6", "code.jsonl=0.4"]`). Samples
            of a text begin with BOS as `calibration.bos` says.
        trust_remote_code: let code that lies in a model's folder run.

    Returns:
        The record that `run.json` holds.

    Raises:
        UserError: something asked for cannot be done; one line says what can.
        NumericalError: a weight, activation or factorisation is not usable; names the linear.
        Interrupted: the user pressed Ctrl-C; finished blocks are kept, and nothing unfinished looks finished.
    """
    named, given = text_or_tokens(calibration)
    recipe = resolve_recipe(recipe, **named, **keys)
    if out is None and not isinstance(source, nn.Module):
        raise RecipeError(f"pruning {source} needs a folder to write to: give out=… (or --out DIR)")
    with open_session(
        recipe,
        source,
        Purpose(demand=demand_of, identity={"verb": "prune"}),
        progress,
        place=None if out is None else Workplace(place_of(out)),
        overwrite=overwrite,
        memory=memory,
        tokenizer=tokenizer,
        calibration=given,
    ) as session:
        if session.job.mixtures:
            return _without_experts(session)
        with asking_output(session, session.job.factor) as session:
            solve = Solve(session, _allocate(session))
            visitors = [solve, Refine(solve), Advance(PRUNED), Write(session)]
            walk(
                session.run,
                session.job.stack,
                samples_of(session),
                visitors,
                name=WALK,
                phase="pruning",
                drop_outside=True,
            )
        return _finish(session)


def _without_experts(session: Session) -> Record:
    """Cut whole experts out of every block; a probe goes along, by which the result is proven."""
    check_experts(session)
    with asking_output(session, session.job.factor) as session:
        allocation = _allocate(session)
    cut = Cut(session, allocation, asking_experts(session))
    samples = samples_of(session) | {PROBE: probe_samples(session.job.stack)}
    visitors = [cut, Advance(*samples), Write(session)]
    streams = walk(
        session.run, session.job.stack, samples, visitors, name=WALK, phase="cutting experts", ends={PROBE}
    )
    return _finish(session, streams[PROBE])


def _allocate(session: Session) -> Allocation:
    """Sparsity of every linear: the profile walk, where the allocator wants one, and its decision."""
    job, record = session.job, session.record
    if job.recipe.refine.epochs and session.samples is not None:
        holds_out(len(session.samples), job.recipe.refine, job.recipe.seed)  # refuses a single sample
    profile = profile_walk(session, job.allocator)
    samples = session.samples
    warnings = notices(job, 0 if samples is None else len(samples) * samples.seqlen)
    if job.chooses_blocks:
        with session.run.clock("choose"):
            record.allocation = choose_blocks(session)
    else:
        record.allocation, record.values = spend(job, profile, warnings)
    if session.run.journal.walk(WALK)[0] == 0:  # later, the finished blocks bring them along
        record.warnings += warnings
    if profile.measures:
        record.profile = {"blocks": list(profile.measures)}
    return record.allocation


def _finish(session: Session, probe: Stream | None = None) -> Record:
    record, output, clock = session.record, session.output, session.run.clock
    record.zeros = sum(entry.zeros for entry in record.linears)
    record.sparsity = record.zeros / max(1, record.prunable)
    assert len({entry.name for entry in record.linears}) == sum(map(len, session.job.by_block))
    if output is not None:
        with clock("write"):
            write_rest(session)
            if probe is not None:
                describe_cut(session, probe)
        with clock("hash"):
            record.files = weight_files(output.folder)
    record.peak_memory = max(peak_memory(), record.peak_memory)
    clock.seconds["total"] = clock.elapsed
    record.seconds = {phase: round(seconds, 3) for phase, seconds in clock.seconds.items()}
    if output is not None:
        output.write_text("run.json", record.to_json())
        write_pages(session)
        output.deliver()
    return record
