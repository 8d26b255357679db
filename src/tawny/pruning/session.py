"""One run: its job (prepare.py), output, journal, calibration and record, opened together by `open_session`.

Whatever can be checked is checked before any work. A session is plain data that is complete when it is handed out. It cleans
up whatever happens after: nothing unfinished looks finished, and nothing that was finished is lost.
"""

from __future__ import annotations

__all__ = ["Purpose", "Session", "Unfinished", "open_output", "open_session", "text_or_tokens"]

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import PushToHubMixin

from tawny.calibration.inputs import read_inputs
from tawny.calibration.mixture import Mixture, in_words, load_texts
from tawny.calibration.text import Text
from tawny.calibration.windows import TokenisedText, sample_windows, tokenise
from tawny.decoding.author import author_of
from tawny.errors import (
    Interrupted,
    LostProcess,
    ModelError,
    NumericalError,
    OutputError,
    RecipeError,
    TextError,
    UserError,
)
from tawny.kernels.native import kernel_name
from tawny.machine import device_name, machine, peak_memory, versions
from tawny.model.context import check_context, check_ids, seqlen_of
from tawny.model.identity import code_identity, model_identity, own_code, tensor_digest, tokens_identity
from tawny.model.source import load_tokenizer, revision_of
from tawny.model.stack import TOKENS, Stack
from tawny.model.streams import Samples
from tawny.model.structure import PIXELS, evaluating, input_of, predicts_tokens
from tawny.precision import products
from tawny.progress import Progress, silent
from tawny.pruning.memory_plan import (
    Demanding,
    Load,
    Placement,
    available,
    give_back,
    parse_size,
    place,
)
from tawny.pruning.prepare import Job, prepare
from tawny.recipe.schema import Recipe
from tawny.record import Record
from tawny.run.journal import Journal
from tawny.run.output import OutputFolder, check_savable, unfinished
from tawny.run.ranks import Ranks, is_lost
from tawny.run.run import Clock, Run


@dataclass(frozen=True)
class Purpose:
    """What a verb opens a session for.

    Attributes:
        samples: whether calibration samples are needed; None: as the recipe's solver and allocator say.
        changes: weights are going to change, so the source must be dense and the pattern must fit.
        demand: what the verb asks of memory; None where nothing is placed.
        held_out: windows that are kept out of the calibration, from the tokens of the text.
        check: refuses what the verb cannot do with this model, before any text is read.
        author: the model that writes the text `self`; None: the source.
    """

    samples: bool | None = None
    changes: bool = True
    demand: Callable[[Job, Load], Demanding] | None = None
    held_out: Callable[[Job, TokenisedText], Tensor] | None = None
    check: Callable[[Job], None] = lambda _: None
    author: Path | None = None


class Unfinished(Protocol):
    """A place to write, and what is unfinished in it. At most one process holds it."""

    def release(self) -> None:
        """Let another process go on with what is unfinished."""
        ...

    def discard(self) -> None:
        """Throw away what is unfinished."""
        ...


# Opens the place to write, and the journal of what is in it, from the folder of the source.
OpensPlace = Callable[[Path | None, Ranks], tuple[Unfinished | None, Journal]]


@dataclass(frozen=True)
class Session:
    """What a run works on, where it writes, and what it has recorded so far.

    Attributes:
        samples: calibration; None where nothing is calibrated.
        held_out: windows of the text that calibration leaves, where the purpose asks for them.
        placement: what is kept in memory and what on disk; None where nothing was placed.
        place: where it writes; None where nothing is written.
        output: the same where that is a checkpoint folder.
        beside: the tokenizer or processor of a live model, which is written beside it; None where nobody gave one, and
            where the source's files are carried along.
    """

    run: Run
    job: Job
    samples: Samples | None
    held_out: Tensor | None
    placement: Placement | None
    place: Unfinished | None
    output: OutputFolder | None
    record: Record
    beside: Any = None

    def note_cost(self) -> None:
        """Tell the journal what the run has taken so far, before it is written."""
        state, clock = self.run.journal.state, self.run.clock
        state["seconds"] = {**clock.seconds, "total": clock.elapsed}
        state["peak_memory"] = max(peak_memory(), self.record.peak_memory)


@contextmanager
def open_session(
    recipe: Recipe,
    source: str | Path | nn.Module,
    purpose: Purpose,
    progress: Progress,
    *,
    place_to_write: OpensPlace | None = None,
    overwrite: bool = False,
    memory: str | int | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    alone: bool = False,
) -> Iterator[Session]:
    """Everything that can be checked before work is checked; whatever happens after, the place to write is left in order.

    Args:
        place_to_write: opens the output and the journal of what is in it, from the folder of the source; None: nothing is
            written.
        memory: peak bytes that may not be passed.
        calibration: tokens `[samples, tokens]`, `(tokens, attention mask)`, or tensors by the names of the model's inputs;
            None: windows of the recipe's text, or its pictures.
        alone: do not share the work with the processes that torchrun started.
    """
    before = peak_memory()
    target: Unfinished | None = None
    journal, begun = Journal(None), False
    record = Record()
    ranks = Ranks(recipe.device, alone=alone or isinstance(source, nn.Module))
    progress = progress if ranks.first else silent
    leaving = ExitStack()
    try:
        _check_shared(recipe, ranks)
        if isinstance(source, nn.Module):  # forwards compare models, and write text, before the first block
            leaving.enter_context(evaluating(source))
        job = prepare(recipe, source, progress, ranks.device, changes=purpose.changes)
        purpose.check(job)
        if place_to_write is not None:
            target, journal = place_to_write(job.folder, ranks)
        budget = parse_size(memory)
        if budget is not None and job.folder is None:
            raise RecipeError("a live model is in memory already: memory=… is for checkpoints on disk")
        output = target if isinstance(target, OutputFolder) else None
        beside = tokenizer if job.folder is None and isinstance(tokenizer, PushToHubMixin) else None
        record = _new_record(job, output, before, readable=job.folder is not None or beside is not None)
        clock = Clock()
        if ranks.first:
            _identify(job, journal, ranks, record)

        def placed(load: Load) -> Placement | None:
            if purpose.demand is None or job.folder is None:
                return None
            share = replace(load, samples=ranks.largest_part(load.samples, load.seqlen))
            made = place(purpose.demand(job, share), budget, available(job.stack.device))
            record.memory = {
                "budget": budget,
                "estimate": made.peak,
                "hidden_states": "disk" if made.spill else "memory",
                "parts": dict(made.parts),
            }
            return made

        samples, held_out, placement = None, None, None
        if job.needs_samples if purpose.samples is None else purpose.samples:
            samples, held_out, placement = _calibration(
                job, purpose, tokenizer, calibration, placed, progress, record, clock, budget, ranks
            )
        else:
            placement = placed(Load(0, 0, 0))
        hidden = None
        if placement is not None and placement.spill:
            home = journal.folder or Path(leaving.enter_context(TemporaryDirectory(prefix="tawny-")))
            hidden = home / "hidden"
            hidden.mkdir(exist_ok=True)
        run = Run(journal, ranks, progress, clock, hidden)
        session = Session(run, job, samples, held_out, placement, target, output, record, beside)
        _begin(session, overwrite)
        begun = True
        with torch.no_grad(), evaluating(job.stack.model):
            yield session
        ranks.close()
    except RuntimeError as error:
        ranks.deafen()
        if ranks.size == 1 or not is_lost(error):
            raise
        raise LostProcess(f"a process of this run was lost, and so it ended; {_kept(journal)}") from error
    except LostProcess as error:
        raise LostProcess(f"a process of this run was lost, and so it ended; {_kept(journal)}") from error
    except KeyboardInterrupt as error:
        left = _changed(source, record) or f"the source is untouched and {_kept(journal)}"
        raise Interrupted(f"stopped by Ctrl-C; {left}") from error
    except NumericalError as error:  # fails again: there is nothing to go on with
        if begun and target is not None:
            target.discard()
        if changed := _changed(source, record):
            error.add_note(changed)
        raise
    except UserError as error:  # a full disk, a file out of reach: that can be mended
        if begun and journal.has_progress:
            progress.say(f"{_kept(journal)}, once it can")
        if changed := _changed(source, record):
            error.add_note(changed)
        raise
    finally:
        ranks.deafen()
        leaving.close()
        if target is not None:
            target.release() if journal.has_progress or (journal.found and not begun) else target.discard()


def _changed(source: str | Path | nn.Module, record: Record) -> str:
    """What a run that ended early did to a live model, or ""."""
    if not isinstance(source, nn.Module) or not record.linears:
        return ""
    return f"{len(record.linears)} linears of the live model are pruned already: load it anew"


def open_output(out: Path, overwrite: bool, source: str | Path | nn.Module) -> OpensPlace:
    """The folder to write and the journal of what is in it already; a live module has no journal."""
    given = None if isinstance(source, nn.Module) else source
    if isinstance(source, nn.Module):
        check_savable(source)
    work = unfinished(out)

    def opened(folder: Path | None, ranks: Ranks) -> tuple[OutputFolder | None, Journal]:
        if not ranks.first:
            output, journal = None, Journal(None)
        elif folder is None and not overwrite and Journal(work).found:
            raise OutputError(
                f"{work} holds an unfinished run, and a live model cannot go on with one: finish that, pass overwrite=True, "
                "or choose another out"
            )
        elif folder is None:
            output, journal = OutputFolder(out, overwrite=overwrite), Journal(None)
        elif (found := Journal.to_go_on_with(work, overwrite)) is None:
            output = OutputFolder(out, overwrite=True, source=folder, given=given)
            journal = Journal(work)
        else:
            journal = found
            # Who consented to replace a finished folder when the run was started need not do so again to go on.
            consent, keep = journal.consent, journal.found
            output = OutputFolder(out, overwrite=consent, source=folder, given=given, keep=keep)
            journal.reload()
            journal.start_over = output.start_over if overwrite else None
        journal.join(ranks, work if ranks.size > 1 else None)
        return output, journal

    return opened


def text_or_tokens(calibration: Any) -> tuple[dict[str, Any], Any]:
    """`calibration` as recipe keys where it names a text or several, and as tokens where it is those."""
    if isinstance(calibration, str | Path):
        return {"calibration.text": str(calibration)}, None
    several = isinstance(calibration, list | tuple) and len(calibration) > 0
    if several and all(isinstance(one, str | Path) for one in calibration):
        return {"calibration.text": [str(one) for one in calibration]}, None
    return {}, calibration


def _check_shared(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse what works in one process only."""
    if ranks.size > 1 and recipe.refine.epochs:
        raise RecipeError(
            f"refine.epochs trains a block on all samples in one process, and torchrun started {ranks.size}: "
            "run it with one"
        )


# --- the record and the journal --------------------------------------------------------------------------------


def _new_record(job: Job, output: OutputFolder | None, memory_before: int, readable: bool) -> Record:
    """`readable`: what reads the model's inputs, such as a tokenizer, will lie in the folder."""
    model = job.stack.model
    readers = {TOKENS: ["AutoTokenizer"], PIXELS: ["AutoImageProcessor"]}
    kind = "AutoModelForCausalLM" if predicts_tokens(model) else type(model).__name__
    return Record(
        opens=[kind, *(readers.get(input_of(model), []) if readable else [])],
        recipe=job.recipe.to_mapping(),
        source=job.source,
        revision=revision_of(job.folder) if job.folder else "",
        outlier_M=job.allocator.outlier_M,
        out=str(output.out) if output else None,
        versions=versions(),
        machine=machine(),
        compute=str(job.stack.compute).removeprefix("torch."),
        prunable=sum(linear.numel for linears in job.by_block for linear in linears),
        parameters=job.parameters,
        memory_before=memory_before,
    )


def _identify(job: Job, journal: Journal, ranks: Ranks, record: Record) -> None:
    """Tell the journal what the bytes of this run depend on, as far as it is known before any data is read.

    Raises:
        OutputError: an unfinished run in the same place is another one.
    """
    if journal.folder is None or job.folder is None:
        return
    journal.require("recipe", record.recipe)
    journal.require("model", model_identity(job.folder))
    journal.require("code", code_identity() | own_code(job.allocator, job.solver))
    here = {key: record.machine[key] for key in ("cpu", "threads")}
    here |= {"processes": ranks.size, "kernel": kernel_name()}
    here |= {"compute": record.compute, "products": products()}
    if job.stack.device.type == "cuda":
        here["device"] = device_name(job.stack.device)
    journal.require("machine", here)


def _begin(session: Session, overwrite: bool) -> None:
    """From here on what is finished is kept."""
    journal, ranks, record = session.run.journal, session.run.ranks, session.record
    if journal.folder is None:
        return
    if ranks.first:
        journal.require("text", tokens_identity(session.samples))
        if session.held_out is not None:
            journal.require("held-out text", tensor_digest(session.held_out).hexdigest())
        journal.begin(overwrite=overwrite)
    journal.state = ranks.same(journal.state)
    record.resumed = journal.state["resumed"]
    session.run.clock.go_on(journal.state.get("seconds", {}))
    record.peak_memory = int(journal.state.get("peak_memory", 0))
    if journal.has_progress:
        session.run.progress.say(f"going on with {journal.folder}, behind {journal.kept_words()}")


def _kept(journal: Journal) -> str:
    if not journal.has_progress:
        return "nothing was finished yet"
    return f"{journal.kept_words()} are kept in {journal.folder}: the same command goes on from there"


# --- calibration -----------------------------------------------------------------------------------------------


def _calibration(
    job: Job,
    purpose: Purpose,
    tokenizer: Any,
    given: Any,
    placed: Callable[[Load], Placement | None],
    progress: Progress,
    record: Record,
    clock: Clock,
    budget: int | None,
    ranks: Ranks,
) -> tuple[Samples, Tensor | None, Placement | None]:
    """The samples: tokens that were given, or seeded windows of the recipe's text.

    Memory is placed before the text is tokenised, which may be the peak.

    Raises:
        RecipeError: samples are longer than the model's table of positions.
        TextError: what was given is no tokens.
    """
    wanted, model = job.recipe.calibration, job.stack.model
    predicts, kind = predicts_tokens(model), input_of(model)
    if purpose.held_out is not None and not predicts:
        raise ModelError(
            f"{type(model).__name__} predicts no next token, by which models are compared here: choose an allocator yourself (-a)"
        )
    if given is not None or kind != TOKENS:
        samples, record.text = _without_text(job, tokenizer, given, progress, clock)
        placement = placed(Load(len(samples), samples.seqlen, 0, given=samples))
        if TOKENS in samples.inputs:
            samples = samples.repeating(wanted.repeat)
        elif wanted.repeat:
            progress.say("calibration.repeat is of text: these samples stay as they are")
        return samples, None, placement
    seqlen = seqlen_of(model, wanted.seqlen)
    if tokenizer is None:
        if job.folder is None:
            raise ModelError(
                "a live model needs tokens to be calibrated on: give calibration=tokens or tokenizer=…"
            )
        tokenizer = load_tokenizer(job.folder)
    progress.say(f"reading calibration text {in_words(wanted.text)}")
    held_out = None

    def own(seed: int, times: int, share: float) -> Text:
        # At least two windows: read again, a text may have fewer tokens than were written.
        samples = max(2, math.ceil(share * wanted.samples)) * times
        keys: dict[str, Any] = {"memory": budget, "group": ranks, "progress": progress}
        writer: Path | nn.Module = purpose.author or job.folder or model
        author = author_of(writer, tokenizer, seed, job.stack.compute, ranks.device, **keys)
        written = author.write(samples * wanted.seqlen)
        give_back()
        return written

    def load(seed: int, times: int) -> Mixture:
        return load_texts(wanted.text, "calibration", tokenizer, partial(own, seed, times))

    with clock("text"):
        text = load(job.recipe.seed, 1)
        placement = placed(Load(wanted.samples, seqlen, text.characters))
        tokens = tokenise(text, tokenizer, job.recipe.bos, around=not predicts)
        windows = sample_windows(tokens, wanted.samples, seqlen, job.recipe.seed)
        if purpose.held_out is not None:
            apart = tokens
            # The same seed would write what runs are calibrated on.
            if any(one.written for one in text.texts):
                apart = tokenise(load(job.recipe.seed + 1, 2), tokenizer, job.recipe.bos)
            held_out = purpose.held_out(job, apart)
    check_ids(model, windows)
    give_back()
    record.text = {
        **text.about([len(part) for part in tokens.parts]),
        "samples": len(windows),
        "seqlen": seqlen,
        "bos": tokens.bos is not None,
    }
    around = {"begun": tokens.bos is not None, "ended": tokens.end is not None}
    return Samples(windows).repeating(wanted.repeat, **around), held_out, placement


def _without_text(
    job: Job, processor: Any, given: Any, progress: Progress, clock: Clock
) -> tuple[Samples, dict[str, Any]]:
    """Samples that were given, or those of a model that takes no tokens; and what a record says of them."""
    if given is None:
        wanted, seed, say = job.recipe.calibration, job.recipe.seed, progress.say
        with clock("text"):
            how: dict[str, Any] = {"processor": processor, "say": say, "strict": wanted.strict}
            return read_inputs(job.stack, job.folder, wanted.text, wanted.samples, seed, **how)
    samples = _samples_of(given, job.stack)
    if TOKENS in samples.inputs:
        check_context(job.stack.model, samples.seqlen)
        check_ids(job.stack.model, samples.tokens)
    name = "tokens" if TOKENS in samples.inputs else next(iter(samples.inputs))
    return samples, {"name": name, "samples": len(samples), "seqlen": samples.seqlen}


def _samples_of(given: Any, stack: Stack) -> Samples:
    """Tokens, `(tokens, attention mask)`, or tensors by the names that the model's forward gives them."""
    if isinstance(given, Samples):
        return given
    if isinstance(given, Mapping):
        return Samples(given, seqlen=None if TOKENS in given else stack.positions(given))
    if isinstance(given, tuple):
        if len(given) != 2:
            raise TextError(f"calibration is a tuple of {len(given)}; expected (tokens, attention mask)")
        return Samples(*given)
    return Samples(given)
