"""`tawny fit`: the best model of a size. Read it from `fit` down.

1. One walk measures what each kind and each sparsity costs each linear, and one back what the output feels of it (measuring.py).
2. Levels are chosen under the bytes that are left beside what cannot change (table.py, on
   allocation/knapsack.py and packed_size.py).
3. Up to three finalists are pruned and packed like any other model (finalists.py): zeros and bits for each linear, bits alone for each
   linear, and the best of the uniform ones that fit. What each linear gets is an allocation file, so the recipe of the
   winner makes it again.
4. They are compared on held-out text that took no part so far. The nearest to the dense model wins; of equals uniform wins
   (fitted.py).

The held-out windows are drawn, with the recipe's seed, from what the calibration windows leave of the text. A new step is a line
of `_fit`; its seconds stand in plan.py, its memory in demand.py, and its name in report/view.py.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tawny.calibration.windows import TokenisedText, held_out_windows
from tawny.choosing.demand import FitDemand, asked_windows
from tawny.choosing.divergence import Scorer
from tawny.choosing.finalists import apart, judge_all
from tawny.choosing.fitted import Fitted, tell
from tawny.choosing.formats import FORMATS, check_aim
from tawny.choosing.kept import REACTIONS, Measured, keep_measured, read_measured, take_measured
from tawny.choosing.limit import Room, Target, check_target, room_for
from tawny.choosing.measuring import ASKING, ask, few_bits, measure, probes_bytes, react, react_ends
from tawny.choosing.pace import Pace, measured_pace
from tawny.choosing.scores import Scores
from tawny.choosing.settings import FitSettings, what_is_fitted
from tawny.choosing.sizes import Sizes
from tawny.choosing.solving import WALK, LevelStore, level_dtype
from tawny.choosing.table import Table
from tawny.errors import ModelError, RecipeError, TextError
from tawny.evaluation.bench import bench
from tawny.machine import resident_memory
from tawny.model.identity import tensor_digest
from tawny.model.streams import Samples
from tawny.model.trust import opens_models
from tawny.packed.opening import loaded_bytes
from tawny.process_group import refuse_several
from tawny.progress import Progress, silent
from tawny.pruning.prepare import Job
from tawny.pruning.session import (
    Purpose,
    Session,
    open_session,
    text_or_tokens,
)
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe
from tawny.record import finite
from tawny.run.memory import parse_size
from tawny.run.place import Workplace, place_of
from tawny.words import size

_PACE = "pace"  # what the journal calls it
_PROMPT, _DECODED = 16, 32  # tokens of a measured speed


@opens_models
def fit(
    source: str | Path,
    out: str | Path,
    *,
    size: str | int | None = None,
    bits: float | None = None,
    speed: float | None = None,
    ram: str | int | None = None,
    context: int | None = None,
    recipe: Recipe | None = None,
    settings: FitSettings | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
    memory: str | int | None = None,
    measured: str | Path | None = None,
    to: str | None = None,
    quick: bool | None = None,
    kinds: str | None = None,
    template: str | Path | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    trust_remote_code: bool = False,
    **keys: Any,
) -> Fitted:
    """Make the best packed model of a size: which kind and which sparsity each linear gets is measured and chosen.

    A fit that was stopped goes on when it is called again, from `OUT.partial`.

    Args:
        source: a folder, hub id, `.gguf` file or `smollm2`.
        out: the packed folder to write, or with `fit.to` of `gguf` the file. `allocation.yaml` in it is what was chosen, unless one kind for all linears won; its `recipe.yaml`
            makes it again.
        size: of the weight files and their index, or of the whole GGUF file, such as `700MB`; GB = 10⁹ bytes.
        bits: the same for each weight of the model, embeddings and head included: 8 × bytes / weights. Give one of the four.
        speed: tokens a second of one sequence, at what this machine's memory and kernels are measured to reach now.
        ram: memory of the machine that decodes, such as `8GB`: what a text of `context` tokens (4,096) and the program leave of it.
        recipe: of the pruning: solver, calibration, seed. Sparsity, values and allocator are what is chosen.
        settings: what finalists are judged by; `keys` override single entries of both (`**{"fit.deciding": 16}`).
        memory: peak memory of the whole process that may not be passed.
        measured: the folder or GGUF file of an earlier fit of the same model, recipe and text, to another size or by another solver; what it
            measured is taken.
        to: `packed` for a folder, `gguf` for one file for llama.cpp, Ollama and LM Studio; its card and what was measured lie beside it.
            `compressed-tensors` for a folder for vLLM, SGLang and transformers; linears that these multiply as one get one kind.
        quick: round by best scales under the energy of inputs, and solve nothing: sooner, and farther from the dense model.
        kinds: types that tensors of the GGUF file may get, with commas between; of `compressed-tensors` w4, w8 and bf16, as it is.
        template: a whole GGUF file of the model, whose keys and other tensors are kept; needed where `export` has no architecture.
        calibration: tokens `[samples, tokens]`, of which some are held out; or the name or path of a text.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        RecipeError: the size or speed cannot be reached; says what can. Or what was measured is of another fit.
        ModelError: the model is live, or one of its linears cannot be packed.
        TextError: nothing is left of the text to compare models on.
        UserError: something else that was asked for cannot be done.
    """
    if isinstance(source, nn.Module):
        raise ModelError(
            "fit writes a packed folder from a checkpoint: save the live model and give its folder"
        )
    refuse_several("a fit")
    target = Target.of(size, bits, speed, ram, context)
    named, given = text_or_tokens(calibration)
    options = {"to": to, "quick": quick, "kinds": kinds, "template": template}
    recipe, settings = what_is_fitted(recipe, settings, {**named, **keys}, **options)
    check_aim(settings, target)
    earlier = None if measured is None else read_measured(Path(measured))
    with open_session(
        recipe,
        source,
        Purpose(
            samples=True,
            demand=partial(FitDemand.of, settings),
            held_out=partial(_held_out, settings),
            check=partial(check_target, target, partial(FORMATS[settings.to].known, settings)),
            identity={"verb": "fit", "fit": {**asdict(target), **asdict(settings)}},
        ),
        progress,
        place=Workplace(place_of(out), FORMATS[settings.to].accepts),
        overwrite=overwrite,
        memory=memory,
        tokenizer=tokenizer,
        calibration=given,
    ) as session:
        return _fit(session, settings, target, memory, tokenizer, earlier)


def _held_out(settings: FitSettings, job: Job, tokens: TokenisedText) -> Tensor:
    wanted, length = job.recipe.calibration, min(job.recipe.calibration.seqlen, settings.length)
    count = settings.windows + settings.deciding
    windows = held_out_windows(tokens, wanted.samples, wanted.seqlen, job.recipe.seed, length, count)
    # One to measure on and two to decide by: a single one has no standard error, and would look like certainty.
    if len(windows) < 3:
        raise TextError(
            f"the calibration leaves {len(windows)} windows of {length} tokens to compare models on, expected 3 or more: "
            "give a longer text, or fewer or shorter samples (--samples, --seqlen, or calibration in a recipe)"
        )
    return windows


def _split(session: Session, settings: FitSettings) -> tuple[Samples, Samples, Samples, Tensor]:
    """Calibration samples, windows of them to measure and ask the output on, windows to measure reactions on, and windows to decide on."""
    assert session.samples is not None
    samples, held_out = session.samples, session.held_out
    if held_out is None:  # tokens were given: some of them are kept back
        if samples.mask is not None or len(samples) < 4:
            raise TextError(
                "a fit compares models on held-out tokens: give at least 4 samples, without a mask"
            )
        length = min(samples.seqlen, settings.length)
        each = samples.seqlen // length  # pieces
        wanted = math.ceil((settings.windows + settings.deciding) / each)
        kept = max(math.ceil(3 / each), min(wanted, len(samples) // 4))
        held_out = _pieces(samples.tokens[-kept:], length)
        samples = samples.first(len(samples) - kept)
    first = max(1, min(settings.windows, len(held_out) // 3))
    count, length = asked_windows(settings, len(samples), samples.seqlen)
    pieces = _pieces(samples.tokens, length)
    asked = Samples(pieces[:: len(pieces) // count][:count])
    return samples, asked, Samples(held_out[:first]), held_out[first : first + settings.deciding]


def _pieces(tokens_ST: Tensor, length: int) -> Tensor:
    """`[pieces, length]`: the samples cut, each piece with BOS where all of several samples begin with one token."""
    whole = tokens_ST.shape[1] // length * length
    pieces = tokens_ST[:, :whole].reshape(-1, length).clone()
    if len(tokens_ST) > 1 and bool((tokens_ST[:, 0] == tokens_ST[0, 0]).all()):
        pieces[:, 0] = tokens_ST[0, 0]
    return pieces


def _fit(
    session: Session,
    settings: FitSettings,
    target: Target,
    memory: str | int | None,
    tokenizer: Any,
    earlier: Mapping[str, Any] | None,
) -> Fitted:
    """Steps 1 to 4."""
    job, journal, place = session.job, session.run.journal, session.place
    assert place is not None
    output = FORMATS[settings.to]
    sizes = output.sizes(job, settings, place.steps, session.run.progress)
    room = _room(session, target, sizes)
    samples, asked, searched, deciding = _split(session, settings)
    of = {key: journal.identity.get(key) for key in ("recipe", "model", "text")}
    of |= {"held-out text": tensor_digest(searched.tokens).hexdigest(), **output.version}
    if earlier is not None:
        take_measured(journal, earlier, of)
    warnings = [line for line in [journal.once("few bits", lambda: few_bits(job))] if line]
    for line in warnings:
        session.run.progress.say(line)
    measured = _measured(session, asked, searched, room.sizes, place.steps)
    keep_measured(place.steps, {"of": of, REACTIONS: journal.state["once"][REACTIONS]})
    # To another folder: `--overwrite` would clear what was measured before a misspelt text is refused.
    again = f"to another --out, with --measured {shlex.quote(str(place.out))}, nothing is measured again"
    table = Table(job, room, measured)
    try:
        finalists = table.finalists()
    except RecipeError as error:
        raise RecipeError(f"{error}; {again}") from None
    names = "; ".join(each.name for each in finalists)
    session.run.progress.say(f"{len(finalists)} finalist{'s' * (len(finalists) > 1)}: {names}")
    assert job.folder is not None
    keys = {"memory": memory, "tokenizer": tokenizer}
    keys |= {"calibration": samples} if session.held_out is None else {}
    make = partial(output.make, job.folder, room.sizes, progress=session.run.progress, **keys)
    base = resolve_recipe(job.recipe, solver="wanda") if settings.quick else job.recipe
    judged, broken = judge_all(session, base, finalists, deciding, make)
    if not judged:
        raise RecipeError(f"{'; '.join(broken)}: give a larger size, or more calibration; {again}")
    allowed = room.file_bytes or math.inf
    best, *others = sorted(judged, key=lambda each: each.order(allowed))
    warnings += broken
    if best.row["bytes"] > allowed:
        warnings.append(
            f"packing took {size(best.row['bytes'])}, more than the {size(int(allowed))} that were asked for"
        )
    speed = _speed(session, room, target, best.folder, parse_size(memory), warnings)
    ahead, unsure = apart(best, others[0]) if others else (0.0, 0.0)
    if ahead < 2 * unsure:
        warnings.append(
            f"{len(deciding)} windows of {deciding.shape[1]} held-out tokens do not tell the first two finalists apart: "
            f"{ahead:.5f} ± {unsure:.5f} nats a token; give a longer text, or more fit.deciding"
        )
    held_out = {"reactions": len(searched), "deciding": len(deciding), "tokens": searched.seqlen}
    fitted = tell(
        session,
        settings,
        table,
        best,
        judged,
        speed=speed,
        held_out=held_out,
        warnings=warnings,
    )
    output.deliver(session, fitted, best.folder, {"of": of, REACTIONS: journal.state["once"][REACTIONS]})
    return fitted


def _room(session: Session, target: Target, sizes: Sizes) -> Room:
    """What may be spent. A pace is measured once, so that a fit that goes on decides alike."""
    journal, job = session.run.journal, session.job
    kept = journal.state.get("once", {}).get(_PACE)

    def pace() -> Pace:
        return measured_pace(job.linears, session.run.progress) if kept is None else Pace.from_mapping(kept)

    room = room_for(job, target, sizes, pace)
    if room.pace is not None:
        plain = asdict(room.pace)
        journal.once(_PACE, lambda: plain)
    return room


def _speed(
    session: Session, room: Room, target: Target, folder: Path, memory: int | None, warnings: list[str]
) -> dict[str, Any] | None:
    """What the model does beside what was asked for; None where it was not measured."""
    if room.pace is None or target.speed is None:
        return None
    if memory is not None and resident_memory() + loaded_bytes(folder) > memory:
        warnings.append(
            f"its speed was not measured: the whole model does not fit into the {size(memory)} that were given; "
            f"`tawny bench {shlex.quote(str(session.record.out))}` measures it"
        )
        return None
    asked = target.speed
    speed = bench(folder, prompt_tokens=_PROMPT, tokens=_DECODED, rounds=3, progress=session.run.progress)
    reached = speed.decode_tokens_per_second
    if reached < asked:
        warnings.append(
            f"it reached {reached:.1f} tokens a second (target: {asked:g}): repeat to another --out "
            f"with --speed {asked * asked / reached:.3g} --measured {shlex.quote(str(session.record.out))}, which measures nothing "
            "again"
        )
    return {
        "asked": asked,
        "measured": reached,
        "quartiles": list(speed.decode_quartiles),
        "threads": speed.threads,
        "kernel": speed.kernel,
        "assumes": room.pace.told(),
    }


def _measured(session: Session, asked: Samples, searched: Samples, sizes: Sizes, work: Path) -> Measured:
    """Step 1, and what outputs, head and embedding say to it; what is measured once is kept."""
    job, journal = session.job, session.run.journal
    if REACTIONS not in journal.state.get("once", {}):
        dtype, probed = level_dtype(job.stack), journal.walk(WALK)[0]
        with LevelStore(work / "levels", probes_bytes(job), dtype, kept=probed) as store:
            with session.run.clock("levels"):
                measures, hidden = measure(session, sizes, store, asked, searched)
            scores = Scores(store.folder / "scores.jsonl")
            scorer = Scorer(job, store, searched, hidden, session.run.progress, scores)
            with session.run.clock("reactions"):
                reactions = react(session, scorer, ask(session, store, asked))
                ends = react_ends(session, sizes, scorer)
        plain = {name: asdict(each) for name, each in measures.items()}
        journal.once(REACTIONS, lambda: finite({"measures": plain, "reactions": reactions, **ends}))
        for walk in (WALK, ASKING):
            journal.forget(walk)
        store.remove()
    return Measured.kept_in(journal.state["once"])
