"""One run: its job (prepare.py), output, journal, calibration and record, opened together by `open_session`.

Whatever can be checked is checked before any work. A session is plain data that is complete when it is handed out. It cleans
up whatever happens after: nothing unfinished looks finished, and nothing that was finished is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers.utils import PushToHubMixin

from tawny.calibration.inputs import read_inputs
from tawny.calibration.mixture import TextMixture, in_words, load_texts
from tawny.calibration.text import Text
from tawny.calibration.windows import TokenisedText, sample_windows, tokenise
from tawny.decoding.author import author_of
from tawny.errors import (
    Interrupted,
    LostProcess,
    ModelError,
    NumericalError,
    RecipeError,
    TextError,
    UserError,
)
from tawny.kernels.native import kernel_name
from tawny.machine import device_name, machine, peak_memory, versions
from tawny.model.context import check_context, check_ids, seqlen_of
from tawny.model.identity import code_identity, model_identity, own_code, tensor_digest, tokens_identity
from tawny.model.source import load_tokenizer, revision_of
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.model.structure import PIXELS, TOKENS, evaluating, input_of, predicts_tokens
from tawny.precision import products
from tawny.progress import Progress, silent
from tawny.pruning.factors import OutputFactors
from tawny.pruning.prepare import Job, prepare
from tawny.recipe.schema import Recipe
from tawny.record import Record
from tawny.run.journal import Journal
from tawny.run.memory import Demanding, Load, Placement, available, give_back, parse_size
from tawny.run.memory import place as place_in_memory
from tawny.run.place import Workplace, models_read
from tawny.run.ranks import Ranks, is_lost
from tawny.run.run import Clock, Run
from tawny.run.writer import CheckpointWriter, check_savable


@dataclass(frozen=True)
class Purpose:
    """What a verb opens a session for.

    Attributes:
        samples: whether calibration samples are needed; None: as the recipe's solver and allocator say.
        changes: weights are going to change, so the source must be dense and the pattern must fit.
        demand: what the verb asks of memory; None where nothing is placed.
        held_out: windows that are kept out of the calibration, from the tokens of the text.
        check: refuses what the verb cannot do with this model, before any text is read.
        identity: what the run is beside its recipe, model, text and machine.
        writes_checkpoint: whether OUT is a checkpoint.
    """

    samples: bool | None = None
    changes: bool = True
    demand: Callable[[Job, Load], Demanding] | None = None
    held_out: Callable[[Job, TokenisedText], Tensor] | None = None
    check: Callable[[Job], None] = lambda _: None
    identity: Mapping[str, Any] = field(default_factory=dict)
    writes_checkpoint: bool = True


@dataclass(frozen=True)
class Session:
    """What a run works on, where it writes, and what it has recorded so far.

    Attributes:
        samples: calibration; None where nothing is calibrated.
        held_out: windows of the text that calibration leaves, where the purpose asks for them.
        place: where it writes; None where nothing is written.
        output: what writes a checkpoint there, in the first process.
        factors: what the model's output feels of each linear; of none where it was not asked.
        beside: the tokenizer or processor of a live model, which is written beside it; None where nobody gave one, and
            where the source's files are carried along.
    """

    run: Run
    job: Job
    samples: Samples | None
    held_out: Tensor | None
    place: Workplace | None
    output: CheckpointWriter | None
    record: Record
    beside: Any = None
    factors: OutputFactors = field(default_factory=OutputFactors)


@contextmanager
def open_session(
    recipe: Recipe,
    source: str | Path | nn.Module,
    purpose: Purpose,
    progress: Progress,
    *,
    place: Workplace | None = None,
    overwrite: bool = False,
    memory: str | int | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    alone: bool = False,
) -> Iterator[Session]:
    """Everything that can be checked before work is checked; whatever happens after, the place to write is left in order.

    Args:
        place: where to write; None: nothing is written.
        memory: peak bytes that may not be passed.
        calibration: tokens `[samples, tokens]`, `(tokens, attention mask)`, or tensors by the names of the model's inputs;
            None: windows of the recipe's text, or its pictures.
        alone: do not share the work with the processes that torchrun started.
    """
    before = peak_memory()
    live = isinstance(source, nn.Module)
    ranks = Ranks(recipe.device, alone=alone or live)
    run = Run(Journal(None), ranks, progress if ranks.first else silent, Clock())
    ending = _Ending(source, run)
    with ending, ExitStack() as leaving:
        _check_shared(recipe, ranks)
        if isinstance(source, nn.Module):  # forwards compare models, and write text, before the first block
            if place is not None:
                check_savable(source)
            leaving.enter_context(evaluating(source))
        job = prepare(recipe, source, run.progress, ranks.device, changes=purpose.changes)
        purpose.check(job)
        if place is not None:
            if ranks.first:
                leaving.enter_context(place)
                reads = models_read(model=source)
                place.claim(overwrite=overwrite, reads=reads, continues=not live)
                run = replace(run, journal=place.journal)
            run.journal.join(ranks, place.path if ranks.size > 1 else None)
            ending.run = run
        leaving.callback(ranks.deafen)
        budget = parse_size(memory)
        if budget is not None and live:
            raise RecipeError("a live model is in memory already: memory=… is for checkpoints on disk")
        beside = tokenizer if live and isinstance(tokenizer, PushToHubMixin) else None
        record = ending.record = _new_record(job, place, before, readable=not live or beside is not None)
        if ranks.first and place is not None:
            _identify(job, place, purpose, run, record)

        def placed(load: Load) -> Placement | None:
            if purpose.demand is None or job.folder is None:
                return None
            share = replace(load, samples=ranks.largest_part(load.samples, load.seqlen))
            placement = place_in_memory(purpose.demand(job, share), budget, available(job.stack.device))
            record.memory = {
                "budget": budget,
                "estimate": placement.peak,
                "hidden_states": "disk" if placement.spill else "memory",
                "parts": dict(placement.parts),
            }
            return placement

        samples, held_out, placement = None, None, None
        if job.needs_samples if purpose.samples is None else purpose.samples:
            samples, held_out, placement = _calibration(
                job, purpose, tokenizer, calibration, placed, run, record, budget
            )
        else:
            placement = placed(Load(0, 0, 0))
        if run.journal.folder is not None and place is not None:
            _begin(run, place, record, samples, held_out)
        if placement is not None and placement.spill:
            hidden = run.journal.steps(leaving) / "hidden"
            hidden.mkdir(parents=True, exist_ok=True)
            run = replace(run, hidden=hidden)
        ending.begun = True
        output = (
            None
            if place is None or not purpose.writes_checkpoint or not ranks.first
            else CheckpointWriter(place)
        )
        with torch.no_grad(), evaluating(job.stack.model):
            try:
                yield Session(run, job, samples, held_out, place, output, record, beside)
            except NumericalError:  # fails again: there is nothing to go on with
                if place is not None:
                    place.discard()
                raise
        ranks.close()


@final
class _Ending:
    """Says what is left of a run that ends early."""

    def __init__(self, source: str | Path | nn.Module, run: Run) -> None:
        self.source, self.run, self.record, self.begun = source, run, Record(), False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        ranks = self.run.ranks
        ranks.deafen()
        lost = isinstance(error, LostProcess) or (
            isinstance(error, RuntimeError) and ranks.size > 1 and is_lost(error)
        )
        if lost:
            raise LostProcess(f"a process of this run was lost, and so it ended; {self._kept}") from error
        changed = ""
        if isinstance(self.source, nn.Module) and self.record.linears:
            changed = f"{len(self.record.linears)} linears of the live model are pruned already: load it anew"
        if isinstance(
            error, KeyboardInterrupt | Interrupted
        ):  # of a run inside this one, what it says is not all
            left = changed or f"the source is untouched and {self._kept}"
            raise Interrupted(f"stopped by Ctrl-C; {left}") from error
        if not isinstance(error, NumericalError | UserError):
            return
        # A full disk or a file out of reach can be mended.
        if isinstance(error, UserError) and self.begun and self.run.journal.has_progress:
            self.run.progress.say(f"{self._kept}, once it can")
        if changed:
            error.add_note(changed)

    @property
    def _kept(self) -> str:
        journal = self.run.journal
        if not journal.has_progress:
            return "nothing was finished yet"
        return f"{journal.kept_words()} are kept in {journal.folder}: the same command goes on from there"


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


def _new_record(job: Job, place: Workplace | None, memory_before: int, readable: bool) -> Record:
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
        out=None if place is None else str(place.out),
        versions=versions(),
        machine=machine(),
        compute=str(job.stack.compute).removeprefix("torch."),
        prunable=sum(linear.numel for linears in job.by_block for linear in linears),
        parameters=job.parameters,
        memory_before=memory_before,
    )


def _identify(job: Job, place: Workplace, purpose: Purpose, run: Run, record: Record) -> None:
    """Say what the bytes of this run depend on, as far as it is known before any data is read.

    Raises:
        OutputError: an unfinished run in the same place is another one.
    """
    if job.folder is None:
        return
    here = {key: record.machine[key] for key in ("cpu", "threads")}
    here |= {"processes": run.ranks.size, "kernel": kernel_name()}
    here |= {"compute": record.compute, "products": products()}
    if job.stack.device.type == "cuda":
        here["device"] = device_name(job.stack.device)
    place.require(
        **purpose.identity,
        recipe=record.recipe,
        model=model_identity(job.folder),
        code=code_identity() | own_code(job.allocator, job.solver),
        machine=here,
    )


def _begin(
    run: Run, place: Workplace, record: Record, samples: Samples | None, held_out: Tensor | None
) -> None:
    """From here on what is finished is kept."""
    journal, ranks = run.journal, run.ranks
    if ranks.first:
        place.require(text=tokens_identity(samples))
        if held_out is not None:
            place.require(**{"held-out text": tensor_digest(held_out).hexdigest()})
        place.begin()
    journal.state = ranks.same(journal.state)
    record.resumed = journal.state["resumed"]
    run.clock.go_on(journal.state.get("seconds", {}))
    record.peak_memory = int(journal.state.get("peak_memory", 0))
    if journal.has_progress:
        run.progress.say(f"going on with {journal.folder}, after {journal.kept_words()}")


# --- calibration -----------------------------------------------------------------------------------------------


def _calibration(
    job: Job,
    purpose: Purpose,
    tokenizer: Any,
    given: Any,
    placed: Callable[[Load], Placement | None],
    run: Run,
    record: Record,
    budget: int | None,
) -> tuple[Samples, Tensor | None, Placement | None]:
    """The samples: tokens that were given, or seeded windows of the recipe's text.

    Memory is placed before the text is tokenised, which may be the peak.

    Raises:
        RecipeError: samples are longer than the model's table of positions.
        TextError: what was given is not tokens.
    """
    wanted, model = job.recipe.calibration, job.stack.model
    progress, clock, ranks = run.progress, run.clock, run.ranks
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
        author = author_of(job.folder or model, tokenizer, seed, job.stack.compute, ranks.device, **keys)
        written = author.write(samples * wanted.seqlen)
        give_back()
        return written

    def load(seed: int, times: int) -> TextMixture:
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
