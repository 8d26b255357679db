"""`tawny fit`: the best model of a size. Read it from `fit` down.

1. One walk measures what each kind and each sparsity costs each linear, and how the output reacts (fit_measure.py).
2. Levels are chosen under the bytes that are left beside what cannot change (fit_choice.py, on
   allocation/knapsack.py and fit_bytes.py).
3. Up to three finalists are pruned and packed like any other model (fit_finalists.py): zeros and bits for each linear, bits alone for each
   linear, and the best of the uniform ones that fit. What each linear gets is an allocation file, so the recipe of the
   winner makes it again.
4. They are compared on held-out text that took no part so far. The nearest to the dense model wins; uniform wins ties
   (fit_result.py).

The held-out windows are drawn, with the recipe's seed, from what the calibration windows leave of the text.
"""

from __future__ import annotations

__all__ = ["FitSettings", "fit"]

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tawny.calibration.windows import TokenisedText, held_out_windows
from tawny.errors import ModelError, NumericalError, RecipeError, TextError
from tawny.model.streams import Samples
from tawny.model.trust import opens_models
from tawny.process_group import started_by_torchrun
from tawny.progress import Progress, silent
from tawny.pruning.memory_plan import Load, parse_size
from tawny.pruning.prepare import Job, demand_of
from tawny.pruning.session import (
    OpensPlace,
    Purpose,
    Session,
    Unfinished,
    open_output,
    open_session,
    text_or_tokens,
)
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe, validated
from tawny.record import finite
from tawny.searching.cost import SearchDemand
from tawny.searching.divergence import Divergence
from tawny.searching.fit_bytes import PackedSize
from tawny.searching.fit_choice import Finalist, Found, Table, check_budget
from tawny.searching.fit_finalists import apart, judge, lead_over_uniform, make
from tawny.searching.fit_kept import REACTIONS, keep_measured, read_measured, take_measured
from tawny.searching.fit_measure import (
    TOGETHER,
    Measures,
    measure,
    react,
    react_head,
)
from tawny.searching.fit_result import Fitted, finish
from tawny.searching.levels import WALK, LevelStore
from tawny.searching.measured import Measured
from tawny.words import size

_FEW_BITS = 20  # different values of 32 neighbours; weights that were never rounded have nearly 32

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class FitSettings:
    """What finalists are chosen and judged by.

    Attributes:
        windows: held-out windows to measure reactions on.
        deciding: others, to compare finalists on.
        length: tokens of a window, at most those of a calibration sample.
    """

    windows: Count = 2
    deciding: Annotated[int, Field(ge=2)] = 8
    length: Annotated[int, Field(ge=2)] = 1024


@opens_models
def fit(
    source: str | Path,
    out: str | Path,
    *,
    size: str | int | None = None,
    bits: float | None = None,
    recipe: Recipe | None = None,
    settings: FitSettings | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
    memory: str | int | None = None,
    measured: str | Path | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    trust_remote_code: bool = False,
    **keys: Any,
) -> Fitted:
    """Make the best packed model of a size: which kind and which sparsity each linear gets is measured and chosen.

    A fit that was stopped goes on when it is called again, from `OUT.partial`.

    Args:
        source: a folder, hub id, `.gguf` file or `smollm2`.
        out: the packed folder to write. `allocation.yaml` in it is what was chosen, and its `recipe.yaml` makes it again.
        size: of the weight files and their index, such as `700MB`; GB = 10⁹ bytes.
        bits: the same for each weight of the model, embeddings and head included: 8 × bytes / weights. Give one of the two.
        recipe: of the pruning: solver, calibration, seed. Sparsity, values and allocator are what is chosen.
        settings: what finalists are judged by; `keys` override single entries of both (`**{"fit.deciding": 16}`).
        memory: peak memory of the whole process that may not be passed.
        measured: the folder of an earlier fit of the same model, recipe and text to another size; what it measured is taken.
        calibration: tokens `[samples, tokens]`, of which some are held out; or the name or path of a text.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        RecipeError: the size cannot be reached; says the smallest one that can. Or what was measured is of another fit.
        ModelError: the model is live, or one of its linears cannot be packed.
        TextError: nothing is left of the text to compare models on.
        UserError: something else that was asked for cannot be done.
    """
    if isinstance(source, nn.Module):
        raise ModelError(
            "fit writes a packed folder from a checkpoint: save the live model and give its folder"
        )
    if started_by_torchrun():
        raise RecipeError("a fit works in one process, and torchrun started several: run it with one")
    allowed = _asked(size, bits)
    named, given = text_or_tokens(calibration)
    both = {**named, **keys}
    own = {key.removeprefix("fit."): value for key, value in both.items() if key.startswith("fit.")}
    settings = validated(FitSettings, {**(asdict(settings) if settings else {}), **own}, "fit key", "fit")
    recipe = _base(recipe, {key: value for key, value in both.items() if not key.startswith("fit.")})
    earlier = None if measured is None else read_measured(Path(measured))
    with open_session(
        recipe,
        source,
        Purpose(samples=True, demand=partial(_demand, settings), held_out=partial(_held_out, settings)),
        progress,
        place_to_write=_place(Path(out), overwrite, source, {"budget": allowed, **asdict(settings)}),
        overwrite=overwrite,
        memory=memory,
        tokenizer=tokenizer,
        calibration=given,
    ) as session:
        return _fit(session, settings, allowed, memory, tokenizer, earlier)


def _asked(size: str | int | None, bits: float | None) -> dict[str, Any]:
    if (size is None) == (bits is None):
        raise RecipeError(
            "say how large the model may be: either size (such as 700MB) or bits a weight (such as 4.25)"
        )
    if bits is not None and not 0 < float(bits) <= 32:
        raise RecipeError(f"bits {bits} is not possible; expected bits a weight in (0, 32], such as 4.25")
    return {"bytes": parse_size(size, "size"), "bits": None if bits is None else float(bits)}


def _base(recipe: Recipe | None, keys: Mapping[str, Any]) -> Recipe:
    """The recipe of all that is not chosen here."""
    made = resolve_recipe(recipe, **{"sparsity": 0.0, "allocator": "uniform", **keys})
    chosen = {
        "sparsity": made.sparsity,
        "values": made.values.names,
        "pattern": made.pattern != "unstructured",
    }
    chosen |= {
        "allocator": made.allocator.name != "uniform",
        "include": made.include,
        "exclude": made.exclude,
    }
    chosen |= {"refit": made.refit}
    wrong = [key for key, value in chosen.items() if value]
    if wrong:
        raise RecipeError(
            f"a fit chooses zeros and bits of every linear itself: leave {' and '.join(wrong)} out"
        )
    if made.make_solver().needs != "hessian":
        raise RecipeError(
            f"a fit weighs kinds by their Hessian error, and {made.solver.name} has none: choose alps or sparsegpt"
        )
    return made


def _place(out: Path, overwrite: bool, source: str | Path, asked: Mapping[str, Any]) -> OpensPlace:
    inner = open_output(out, overwrite, source)

    def opened(folder: Path | None, ranks: Any) -> tuple[Unfinished | None, Any]:
        place, journal = inner(folder, ranks)
        journal.require("fit", asked)
        return place, journal

    return opened


def _held_out(settings: FitSettings, job: Job, tokens: TokenisedText) -> Tensor:
    wanted, length = job.recipe.calibration, min(job.recipe.calibration.seqlen, settings.length)
    count = settings.windows + settings.deciding
    return held_out_windows(tokens, wanted.samples, wanted.seqlen, job.recipe.seed, length, count)


def _demand(settings: FitSettings, job: Job, load: Load) -> SearchDemand:
    own = replace(demand_of(job, load), refining=False)
    hidden = settings.windows * min(settings.length, load.seqlen) * job.stack.hidden_bytes
    return SearchDemand(own, own, job.needs, hidden, (2 * TOGETHER + 1) * hidden)


def _split(session: Session, settings: FitSettings) -> tuple[Samples, Samples, Tensor]:
    """Calibration samples, windows to measure reactions on, and windows to decide on."""
    assert session.samples is not None
    samples, held_out = session.samples, session.held_out
    if held_out is None:  # tokens were given: some of them are kept back
        if samples.mask is not None or len(samples) < 4:
            raise TextError(
                "a fit compares models on held-out tokens: give at least 4 samples, without a mask"
            )
        kept = max(3, min(settings.windows + settings.deciding, len(samples) // 4))
        samples, held_out = samples.first(len(samples) - kept), samples.tokens[-kept:, : settings.length]
    first = max(1, min(settings.windows, len(held_out) // 3))
    return samples, Samples(held_out[:first]), held_out[first : first + settings.deciding]


def _fit(
    session: Session,
    settings: FitSettings,
    asked: Mapping[str, Any],
    memory: str | int | None,
    tokenizer: Any,
    earlier: Mapping[str, Any] | None,
) -> Fitted:
    """Steps 1 to 4."""
    job, journal, output = session.job, session.journal, session.output
    assert output is not None
    sizes = PackedSize(job)
    budget = asked["bytes"] or int(asked["bits"] * job.parameters / 8)
    check_budget(job, sizes, budget)
    samples, searched, deciding = _split(session, settings)
    warnings = [line for line in [journal.once("few bits", lambda: _few_bits(job))] if line]
    of = {key: session.journal.identity.get(key) for key in ("recipe", "model", "text", "held-out text")}
    of["searched"] = list(searched.tokens.shape)
    if earlier is not None:
        take_measured(journal, earlier, of)
    found = _measured(session, samples, searched, sizes, output.work)
    table = Table(job, sizes, found)
    finalists = table.finalists(budget)
    session.progress.say(
        f"{len(finalists)} finalist{'s' * (len(finalists) > 1)}: {'; '.join(x.name for x in finalists)}"
    )
    judged: list[Finalist] = []
    rows: list[dict[str, Any]] = []
    folders: list[Path] = []
    for number, finalist in enumerate(finalists, 1):
        folder = output.work / "finalists" / str(number)
        with session.clock(f"finalist {number}"):
            try:
                make(session, folder, finalist, samples, memory, tokenizer)
                row = journal.once(f"finalist {number}", partial(judge, session, folder, finalist, deciding))
            except NumericalError as error:
                if number == len(finalists) and not judged:
                    raise
                warnings.append(f"{finalist.name} breaks down and takes no part: {error}")
            else:
                judged.append(finalist)
                rows.append(row)
                folders.append(folder)
        session.note_cost()
    finalists = judged
    order = sorted(
        range(len(rows)),
        key=lambda i: (rows[i]["bytes"] > budget, rows[i]["kl"], finalists[i].uniform is None),
    )
    winner = order[0]
    if rows[winner]["bytes"] > budget:
        warnings.append(
            f"packing took {size(rows[winner]['bytes'])}, more than the {size(budget)} that were asked for"
        )
    lead, stderr = lead_over_uniform(finalists, rows, winner)
    others = [rows[i] for i in order[1:]]
    ahead, unsure = apart(rows[winner], others[0]) if others else (0.0, 0.0)
    if ahead < unsure:
        warnings.append(
            f"{len(deciding)} windows of {deciding.shape[1]} held-out tokens do not tell the first two finalists apart: "
            f"{ahead:.5f} ± {unsure:.5f} nats a token; give a longer text, or more fit.deciding"
        )
    keep_measured(folders[winner], of, journal.state["once"][REACTIONS])
    return finish(
        session,
        asdict(settings),
        finalists,
        rows,
        winner,
        folders[winner],
        budget,
        table,
        (lead, stderr),
        warnings,
        {"reactions": len(searched), "deciding": len(deciding), "tokens": searched.seqlen},
    )


def _few_bits(job: Job) -> str:
    """A warning where the source is itself a model of few bits that was made dense."""
    first = next(index for index, linears in enumerate(job.by_block) if linears)
    with job.stack.block(first):
        W_OI = job.stack.look(job.by_block[first][0])[:64]
        columns = W_OI.shape[1] // 32 * 32
        values = W_OI[:, :columns].reshape(-1, 32)
        different = [len(torch.unique(part)) for part in values] or [32]
    if sum(different) / len(different) > _FEW_BITS:
        return ""
    return f"the weights of {job.source} were rounded to few bits before: compare with keeping the file that they came from"


def _measured(session: Session, samples: Samples, searched: Samples, sizes: PackedSize, work: Path) -> Found:
    """Step 1; what is measured once is kept."""
    job, journal = session.job, session.journal
    if REACTIONS not in journal.state.get("once", {}):
        dtype = _dtype(job)
        room = sum(x.numel for x in job.linears) * dtype.itemsize
        store = LevelStore(work / "levels", room, dtype, kept=journal.walk(WALK)[0])
        try:
            with session.clock("levels"):
                measures, hidden = measure(session, store, samples, searched)
            measured = Measured(store.folder / "scores.jsonl")
            divergence = Divergence(job, store, searched, hidden, session.progress, measured)
            with session.clock("reactions"):
                reactions = react(session, divergence, measures)
                head = react_head(session, sizes, divergence)
        finally:
            store.close()
        plain = {name: asdict(each) for name, each in measures.items()}
        journal.once(REACTIONS, lambda: finite({"measures": plain, "reactions": reactions, "head": head}))
        journal.forget(WALK)
        store.remove()
    kept = journal.state["once"][REACTIONS]
    measures = {name: Measures(**each) for name, each in kept["measures"].items()}
    return Found(measures, kept["reactions"], {k: v for k, v in kept["head"].items() if v is not None})


def _dtype(job: Job) -> torch.dtype:
    """Forwards round weights to the compute dtype anyway."""
    assert job.stack.checkpoint is not None
    return min(job.stack.checkpoint.storage_dtype, job.stack.compute, key=lambda dtype: dtype.itemsize)
