"""Prune a model block by block. This file is the job; read it from `prune` down.

Only one block's weights are in memory at a time, beside embeddings and head. The calibration samples walk through
the stack with the pruning: each block is observed on the outputs of the already pruned blocks before it, solved,
and run again to give the next one its inputs. A forward is never run whose result nobody uses. What is finished is
kept in a journal, and the same command goes on from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tawny.allocation.profile import Allocation, Profile
from tawny.calibration.context import check_context, check_ids
from tawny.calibration.observe import Stage
from tawny.calibration.statistics import Needs, Statistics
from tawny.errors import (
    Interrupted,
    LostProcess,
    ModelError,
    NumericalError,
    OutputError,
    RecipeError,
    UserError,
)
from tawny.kernels.native import kernel_name
from tawny.machine import machine, peak_memory, versions
from tawny.model.linears import Linear, check_selection, check_writable, select
from tawny.model.output import OutputFolder, check_savable, unfinished
from tawny.model.source import load_tokenizer, resolve, revision_of
from tawny.model.stack import Stack, live_stack, open_stack
from tawny.model.streams import Samples, Stream
from tawny.model.structure import evaluating
from tawny.model.trust import opens_models
from tawny.patterns import Pattern, check_pattern
from tawny.precision import DTYPES
from tawny.progress import Progress, silent
from tawny.pruning.block import BlockRun
from tawny.pruning.demand import demand_of, needs_of
from tawny.pruning.inputs import check_dense, check_live, compute_dtype, samples_of, text_or_tokens
from tawny.pruning.journal import Journal, code_identity, model_identity, tensor_digest, tokens_identity
from tawny.pruning.memory_plan import (
    Placement,
    available,
    give_back,
    parse_size,
    place,
)
from tawny.pruning.outliers import DEFAULT_M
from tawny.pruning.profiling import allocate, profile_walk
from tawny.pruning.ranks import Ranks, is_lost
from tawny.pruning.refine import holds_out
from tawny.pruning.writing import write_pages, write_rest
from tawny.recipe.schema import Recipe, resolve_recipe
from tawny.record import Clock, LinearRecord, Record, weight_files

if TYPE_CHECKING:
    from tawny.calibration.text import Text


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
    calibration: Tensor | tuple[Tensor, Tensor] | Samples | str | None = None,
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
        overwrite: replace an existing `out` once the new one is complete, and start over what is unfinished.
        memory: peak memory of the whole process that may not be passed (`"6GB"`); the result does not depend on it.
        tokenizer: for a live module calibrated on text.
        calibration: tokens `[samples, tokens]` or `(tokens, attention mask)`, taken as they are, or the name or path of a
            text, whose samples begin with BOS as `calibration.bos` says.
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
    with open_run(
        recipe,
        source,
        out,
        progress,
        overwrite=overwrite,
        memory=memory,
        tokenizer=tokenizer,
        calibration=given,
    ) as run:
        allocation = run.allocate()
        for block in run.blocks(allocation):
            block.target()
            for stage, statistics in block.stages(recipe.order):
                run.spread(block, stage, statistics)
            block.refine()
            block.advance()
            block.write()
        return run.finish()


@contextmanager
def open_run(
    recipe: Recipe,
    source: str | Path | nn.Module,
    out: str | Path | None,
    progress: Progress,
    *,
    overwrite: bool,
    tokenizer: Any,
    calibration: Any,
    memory: str | int | None = None,
    measuring: Any = None,
) -> Iterator[Run]:
    """Check everything that can be checked before work, and clean up whatever happens after.

    `measuring` is something with `needs` that only measures the dense model: then nothing is written.
    """
    before = peak_memory()
    output: OutputFolder | None = None
    journal, begun = Journal(None), False
    run: Run | None = None
    ranks = Ranks(recipe.device, alone=isinstance(source, nn.Module) or measuring is not None)
    progress = progress if ranks.first else silent
    try:
        if isinstance(source, nn.Module):
            folder, stack = None, live_stack(source)
            check_live(recipe, stack)
            if out is not None:
                check_savable(source)
        elif out is None and measuring is None:
            raise RecipeError(f"pruning {source} needs a folder to write to: give out=… (or --out DIR)")
        else:
            folder = resolve(source, progress.say)
            if measuring is None:
                check_dense(source, folder)
            stack = open_stack(folder, compute_dtype(recipe), ranks.device)
        if out is not None and ranks.first:
            output, journal = open_output(Path(out), folder, overwrite)
        journal.join(ranks, unfinished(Path(out)) if out is not None and ranks.size > 1 else None)
        name = str(source) if folder else type(source).__name__
        run = Run(recipe, name, folder, stack, output, progress, journal, ranks)
        run.check_shared()
        run.record.memory_before = before
        run.budget = parse_size(memory)
        if run.budget is not None and folder is None:
            raise RecipeError("a live model is in memory already: memory=… is for checkpoints on disk")
        run.identify()
        run.find_linears(check=measuring is None)
        wanted = run.needs_samples if measuring is None else measuring.needs != "none"
        if wanted:
            run.samples = run.load_samples(tokenizer, calibration)
        else:
            run.place(0, 0, 0)
        if measuring is None and recipe.refine.epochs and run.samples is not None:
            holds_out(len(run.samples), recipe.refine, recipe.seed)  # refuses a single sample
        run.begin(overwrite)
        begun = True
        with torch.no_grad(), evaluating(stack.model):
            yield run
        ranks.close()
    except RuntimeError as error:
        ranks.deafen()
        if ranks.size == 1 or not is_lost(error):
            raise
        raise LostProcess(f"a process of this run was lost, and so it ended; {_kept(journal)}") from error
    except LostProcess as error:
        raise LostProcess(f"a process of this run was lost, and so it ended; {_kept(journal)}") from error
    except KeyboardInterrupt as error:
        changed = len(run.record.linears) if run is not None and run.folder is None else 0
        left = f"the source is untouched and {_kept(journal)}"
        if changed:
            left = f"{changed} linears of the live model are pruned already: load it anew"
        raise Interrupted(f"stopped by Ctrl-C; {left}") from error
    except NumericalError:  # fails again: there is nothing to go on with
        if begun and output is not None:
            output.discard()
        raise
    except UserError:  # a full disk, a file out of reach: that can be mended
        if begun and journal.has_progress:
            progress.say(f"{_kept(journal)}, once it can")
        raise
    finally:
        ranks.deafen()
        if output is not None:
            output.release() if journal.has_progress or (journal.found and not begun) else output.discard()


def _kept(journal: Journal) -> str:
    if not journal.has_progress:
        return "nothing was finished yet"
    return f"{journal.kept_words()} are kept in {journal.folder}: the same command goes on from there"


def open_output(out: Path, folder: Path | None, overwrite: bool) -> tuple[OutputFolder, Journal]:
    """The folder to write and the journal of what is in it already; a live module has no journal."""
    work = unfinished(out)
    if folder is None and not overwrite and Journal(work).found:
        raise OutputError(
            f"{work} holds an unfinished run, and a live model cannot go on with one: finish that, pass overwrite=True, "
            "or choose another out"
        )
    if folder is None or overwrite:
        made = OutputFolder(out, overwrite=overwrite, source=folder)
        return made, Journal(None if folder is None else made.work)
    journal = Journal(work)
    # Who consented to replace a finished folder when the run was started need not do so again to go on.
    output = OutputFolder(
        out, overwrite=bool(journal.state.get("overwrite")), source=folder, keep=journal.found
    )
    journal.reload()
    return output, journal


@dataclass
class Run:
    """One pruning run: what it works on, and what it has recorded so far."""

    walk: ClassVar[str] = "prune"  # what its journal calls the walk that `blocks` makes

    recipe: Recipe
    source: str
    folder: Path | None
    stack: Stack
    output: OutputFolder | None
    progress: Progress
    journal: Journal
    ranks: Ranks

    def __post_init__(self) -> None:
        self.solver = self.recipe.make_solver()
        self.allocator = self.recipe.make_allocator()
        self.pattern: Pattern = self.recipe.make_pattern()
        self.needs: Needs = needs_of(self.recipe, self.solver)
        self.samples: Samples | None = None
        self.held_out: Tensor | None = None  # windows of the text that calibration leaves, for a search
        self.text: Text | None = None
        self.by_block: list[list[Linear]] = []
        self.profile: Profile | None = None
        self.budget: int | None = None
        self.placement: Placement | None = None
        self.clock = Clock()
        self.started = time.perf_counter()
        self.record = Record(
            recipe=self.recipe.to_mapping(),
            source=self.source,
            revision=revision_of(self.folder) if self.folder else "",
            outlier_M=float(getattr(self.allocator, "M", DEFAULT_M)),
            out=str(self.output.out) if self.output else None,
            versions=versions(),
            machine=machine(),
            compute=str(self.stack.compute).removeprefix("torch."),
        )

    @property
    def needs_samples(self) -> bool:
        return bool(self.needs != "none" or self.allocator.needs != "none" or self.recipe.refine.epochs)

    def check_shared(self) -> None:
        """Refuse what works in one process only.

        Raises:
            RecipeError: the recipe refines or searches, and several processes share the run.
        """
        if self.ranks.size == 1:
            return
        for asked, what in (
            (self.recipe.refine.epochs > 0, "refine.epochs trains a block on all samples"),
            (getattr(self.allocator, "searches", False), f"{self.recipe.allocator.name} searches"),
        ):
            if asked:
                raise RecipeError(
                    f"{what} in one process, and torchrun started {self.ranks.size}: run it with one"
                )

    def identify(self) -> None:
        """Tell the journal what the bytes of this run depend on, as far as it is known before any data is read.

        Raises:
            OutputError: an unfinished run in the same place is another one.
        """
        if self.journal.folder is None or self.folder is None or not self.ranks.first:
            return
        machine = self.record.machine
        self.journal.require("recipe", self.record.recipe)
        self.journal.require("model", model_identity(self.folder))
        self.journal.require("code", code_identity())
        self.journal.require(
            "machine",
            {
                "cpu": machine["cpu"],
                "threads": machine["threads"],
                "processes": self.ranks.size,
                "kernel": kernel_name(),
                "compute": self.record.compute,
            },
        )

    def begin(self, overwrite: bool) -> None:
        """From here on what is finished is kept."""
        if self.journal.folder is None:
            return
        if self.ranks.first:
            self.journal.require("text", tokens_identity(self.samples))
            if self.held_out is not None:
                self.journal.require("held-out text", tensor_digest(self.held_out).hexdigest())
            self.journal.begin(overwrite=overwrite)
        self.journal.state = self.ranks.same(self.journal.state)
        self.record.resumed = self.journal.state["resumed"]
        self.clock.seconds.update(self.journal.state.get("seconds", {}))
        self.started -= self.clock.seconds.pop("total", 0.0)
        self.record.peak_memory = int(self.journal.state.get("peak_memory", 0))
        if self.journal.has_progress:
            self.progress.say(f"going on with {self.journal.folder}, behind {self.journal.kept_words()}")

    def find_linears(self, *, check: bool = True) -> None:
        """Choose what is pruned, and refuse a pattern that does not fit it.

        Raises:
            ModelError: a glob matches nothing, or there is nothing to prune.
            PatternError: m does not divide a width.
        """
        recipe = self.recipe
        every = [self.stack.linears(index) for index in range(len(self.stack))]
        self.by_block = [select(linears, recipe.include, recipe.exclude) for linears in every]
        chosen = [linear for linears in self.by_block for linear in linears]
        check_selection(
            chosen, [linear for linears in every for linear in linears], recipe.include, recipe.exclude
        )
        if check:
            check_writable(chosen)
            check_pattern(self.pattern, {linear.name: linear.shape for linear in chosen})
        self.record.prunable = sum(linear.numel for linear in chosen)
        self.record.parameters = sum(p.numel() for p in self.stack.model.parameters())

    def load_samples(self, tokenizer: Any, given: Any) -> Samples:
        """Calibration tokens: those given, or seeded windows of the recipe's text.

        Raises:
            RecipeError: samples longer than the model's table of positions.
        """
        recipe = self.recipe
        if given is not None:
            samples = samples_of(given)
            check_context(self.stack.model, samples.seqlen)
            check_ids(self.stack.model, samples.tokens)
            self.record.text = {"name": "tokens", "samples": len(samples), "seqlen": samples.seqlen}
            self.place(len(samples), samples.seqlen, 0, given=samples)
            return samples.repeating(recipe.calibration.repeat)
        from tawny.calibration.text import load_text
        from tawny.calibration.windows import held_out_windows, sample_windows, tokenise

        check_context(self.stack.model, recipe.calibration.seqlen)
        if tokenizer is None:
            if self.folder is None:
                raise ModelError(
                    "a live model needs tokens to be calibrated on: give calibration=tokens or tokenizer=…"
                )
            tokenizer = load_tokenizer(self.folder)
        self.progress.say(f"reading calibration text {recipe.calibration.text}")
        with self.clock("text"):
            text = load_text(recipe.calibration.text, "calibration")
            self.place(recipe.calibration.samples, recipe.calibration.seqlen, len(text.text))
            wanted = recipe.calibration
            tokens = tokenise(text, tokenizer, recipe.bos)
            windows = sample_windows(tokens, wanted.samples, wanted.seqlen, recipe.seed)
            if getattr(self.allocator, "searches", False):
                length, count = min(wanted.seqlen, self.allocator.length), self.allocator.held_out
                self.held_out = held_out_windows(
                    tokens, wanted.samples, wanted.seqlen, recipe.seed, length, count
                )
        check_ids(self.stack.model, windows)
        give_back()
        self.record.text = {
            "name": text.name,
            "sha256": text.sha256,
            "tokens": len(tokens),
            "samples": len(windows),
            "seqlen": recipe.calibration.seqlen,
            "bos": tokens.bos is not None,
        }
        return Samples(windows).repeating(recipe.calibration.repeat, begun=tokens.bos is not None)

    def place(self, samples: int, seqlen: int, characters: int, *, given: Samples | None = None) -> None:
        """Decide what is kept in memory and what on disk.

        Raises:
            RecipeError: the budget cannot hold this run.
        """
        if self.folder is None or (self.output is None and self.ranks.first):
            return
        # What one process takes: its share of the samples.
        samples = self.ranks.largest_part(samples, seqlen)
        demand = demand_of(
            self.recipe,
            self.stack,
            self.by_block,
            self.solver,
            self.allocator,
            characters,
            (samples, seqlen),
            given=given,
        )
        self.placement = place(demand, self.budget, available())
        self.record.memory = {
            "budget": self.budget,
            "estimate": self.placement.peak,
            "hidden_states": "disk" if self.placement.spill else "memory",
            "parts": dict(self.placement.parts),
        }

    def spill(self, walk: str, stream: str = "pruned") -> Path | None:
        """Where the hidden states of a walk are kept, if not in memory."""
        if self.placement is None or not self.placement.spill or self.journal.folder is None:
            return None
        return self.journal.folder / "hidden" / f"{walk}.{stream}{self.journal.suffix}"

    def allocate(self) -> Allocation:
        """Sparsity of every linear: the profile walk, where the allocator wants one, and its decision."""
        if getattr(self.allocator, "searches", False):
            from tawny.search.run import allocate_by_search

            with self.clock("search"):
                self.record.allocation = allocate_by_search(self)
            return self.record.allocation
        with self.clock("profile"):
            self.profile = profile_walk(
                self.stack,
                self.by_block,
                self.allocator,
                self.samples,
                self.recipe,
                self.progress,
                self.journal,
                self.spill("profile"),
                self.ranks,
            )
        warnings: list[str] = []
        allocation = allocate(self.allocator, self.profile, self.pattern, self.recipe.sparsity, warnings)
        if self.journal.walk("prune")[0] == 0:  # later, the finished blocks bring them along
            self.record.warnings += warnings
        self.record.allocation = allocation
        if self.profile.measures:
            self.record.profile = {"blocks": list(self.profile.measures)}
        return allocation

    def blocks(self, allocation: Mapping[str, float]) -> Iterator[BlockRun]:
        """Load, hand out and drop each block in turn, behind those an earlier run has finished."""
        done, found = self.journal.walk(self.walk)
        self.record.linears = [LinearRecord.from_dict(entry) for entry in found.get("linears", [])]
        self.record.warnings += found.get("warnings", [])
        self.record.refined = found.get("refined", [])
        count = len(self.stack)
        stream: Stream | None = None
        dense: Stream | None = None
        refining = self.recipe.refine.epochs > 0
        if self.samples is not None and (self.needs != "none" or refining) and done < count:
            with self.clock("forward"):
                stream = self._stream("pruned", done)
                dense = self._stream("dense", done) if refining else None
        self.progress.phase("pruning", count - done)
        for index in range(done, count):
            with self.clock("read"):
                self.stack.load(index)
            yield BlockRun(self, index, stream, dense, allocation)
            self.stack.release(index)
            if index == count - 1 or self.journal.due():
                with self.clock("write"):
                    streams = {} if index == count - 1 else {"pruned": stream, "dense": dense}
                    self.commit(index + 1, streams)
            self.progress.step(self.stack.name(index))

    def _stream(self, name: str, done: int) -> Stream:
        assert self.samples is not None
        saved, spill = self.journal.hidden(self.walk, name), self.spill(self.walk, name)
        return Stream(self.stack, self.ranks.part(self.samples), depth=done, saved=saved, spill=spill)

    def commit(self, blocks: int, streams: Mapping[str, Stream | None]) -> None:
        """Keep what is finished: `blocks` blocks, and what enters the next."""
        if self.output is not None:
            self.output.settle()
        record = self.record
        found = {
            "linears": [asdict(x) for x in record.linears],
            "warnings": record.warnings,
            "refined": record.refined,
        }
        self.note_cost()
        self.journal.commit(self.walk, blocks, found, streams)

    @property
    def elapsed(self) -> float:
        """Seconds so far, those of a run that was stopped included."""
        return time.perf_counter() - self.started

    def note_cost(self) -> None:
        """Tell the journal what the run has taken so far, before it is written."""
        self.journal.state["seconds"] = {**self.clock.seconds, "total": self.elapsed}
        self.journal.state["peak_memory"] = max(peak_memory(), self.record.peak_memory)

    def spread(self, block: BlockRun, stage: Stage, statistics: Mapping[str, Statistics]) -> None:
        """Solve every linear of a stage; of several processes each solves some, and tells the others."""
        exact = self.needs == "hessian"
        costs = [x.numel * x.shape[1] + x.shape[1] ** 3 / 3 if exact else x.numel for x in stage.linears]
        owners = self.ranks.owners(costs)
        for linear, owner in zip(stage.linears, owners, strict=True):
            if owner == self.ranks.rank:
                block.solve(linear, statistics.get(linear.name))
        if self.ranks.size > 1:
            block.exchange(stage.linears, owners, statistics)

    def finish(self) -> Record:
        record = self.record
        done = {entry.name for entry in record.linears}
        record.zeros = sum(entry.zeros for entry in record.linears)
        record.sparsity = record.zeros / max(1, record.prunable)
        assert len(done) == sum(map(len, self.by_block))
        if self.output is not None:
            with self.clock("write"):
                write_rest(self)
            with self.clock("hash"):
                record.files = weight_files(self.output.partial)
            if record.search is not None:
                from tawny.search.run import write_search

                write_search(self)
        record.peak_memory = max(peak_memory(), record.peak_memory)
        self.clock.seconds["total"] = self.elapsed
        record.seconds = {phase: round(seconds, 3) for phase, seconds in self.clock.seconds.items()}
        if self.output is not None:
            self.output.write_text("run.json", record.to_json())
            write_pages(self)
            self.output.finish()
        return record

    def stored(self, value: Tensor) -> Tensor:
        wanted = self.recipe.dtype
        return value.to(DTYPES[wanted]) if wanted and value.is_floating_point() else value
