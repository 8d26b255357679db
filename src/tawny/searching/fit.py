"""`tawny fit`: the best model of a size. Read it from `fit` down.

1. One walk measures what each kind and each sparsity costs each linear, and how the output reacts (fit_measure.py).
2. Levels are chosen under the bytes that are left beside what cannot change (allocation/knapsack.py, fit_bytes.py).
3. Up to three finalists are pruned and packed like any other model: zeros and bits for each linear, bits alone for each
   linear, and the best of the uniform ones that fit. What each linear gets is an allocation file, so the recipe of the
   winner makes it again.
4. They are compared on held-out text that took no part so far. The nearest to the dense model wins; uniform wins ties.

The held-out windows are drawn, with the recipe's seed, from what the calibration windows leave of the text.
"""

from __future__ import annotations

__all__ = ["FitSettings", "Fitted", "fit"]

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tawny.allocation.knapsack import choose
from tawny.allocation.profile import LinearInfo
from tawny.calibration.windows import TokenisedText, held_out_windows
from tawny.errors import ModelError, NumericalError, RecipeError, TextError
from tawny.evaluation.agreement import agreement
from tawny.kinds import KINDS
from tawny.machine import peak_memory
from tawny.model.checkpoint import file_bytes
from tawny.model.output import OutputFolder
from tawny.model.streams import Samples
from tawny.model.trust import opens_models
from tawny.packed.convert import pack
from tawny.packed.folder import INDEX
from tawny.patterns import removed_count
from tawny.process_group import started_by_torchrun
from tawny.progress import Progress, silent
from tawny.pruning.memory_plan import Load, parse_size
from tawny.pruning.prepare import Job, demand_of
from tawny.pruning.run import prune
from tawny.pruning.session import (
    OpensPlace,
    Purpose,
    Session,
    Unfinished,
    open_output,
    open_session,
    text_or_tokens,
)
from tawny.recipe.files import dump_recipe
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe, validated
from tawny.record import finite
from tawny.report.pages import or_say, write_beside
from tawny.report.plot import plot_fit
from tawny.report.publish import refresh
from tawny.searching.cost import SearchDemand
from tawny.searching.divergence import Divergence
from tawny.searching.fit_bytes import PackedSize
from tawny.searching.fit_measure import (
    KINDS_TRIED,
    TOGETHER,
    Level,
    Measures,
    levels,
    measure,
    react,
    react_head,
)
from tawny.searching.levels import WALK, LevelStore
from tawny.searching.measured import Measured
from tawny.words import kl_text, percent, size

_ALLOCATION = "allocation.yaml"
_CURVE = 24  # sizes that the picture's line of expectations is drawn through
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


@dataclass(frozen=True)
class Finalist:
    """A model that fits.

    Attributes:
        levels: of each linear.
        group: columns of a scale; None is each kind's usual number.
        head: kind of the head; None leaves it as it is.
        bytes: at most; packing may find a few integers that are 0.
        expected: divergence from the dense model, nats a token, as far as single measurements add up.
    """

    name: str
    levels: Mapping[str, Level]
    group: int | None
    head: str | None
    bytes: int
    expected: float

    @property
    def uniform(self) -> str | None:
        """The kind of all linears, where it is one and nothing is removed."""
        every = set(self.levels.values())
        one = next(iter(every))
        return one.kind if len(every) == 1 and not one.sparsity else None


@dataclass(frozen=True)
class Fitted:
    """What a fit made.

    Attributes:
        budget: bytes that were allowed.
        bytes: of the weight files and their index.
        bits: of those files, a weight of the model.
        finalists: name, bytes, bits, expected and measured divergence with its standard error, perplexity, top-1.
        lead: how much nearer to the dense model than the best uniform one, as a share of that one's divergence.
        says: what was chosen, in one line; `zeros` where zeros were used, in another.
        blocks: bits a weight of survivors, and sparsity, of each block.
        curve: sizes and the divergence that is expected there.
    """

    source: str
    out: str
    recipe: dict[str, Any]
    settings: dict[str, Any]
    budget: int
    bytes: int
    bits: float
    winner: str
    says: str
    zeros: str
    lead: float
    lead_stderr: float
    finalists: list[dict[str, Any]]
    blocks: dict[str, list[float]]
    curve: list[tuple[int, float]]
    linears: dict[str, dict[str, Any]]
    head: dict[str, float]
    held_out: dict[str, int]
    warnings: list[str]
    seconds: dict[str, float]
    peak_memory: int
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        calibration: tokens `[samples, tokens]`, of which some are held out; or the name or path of a text.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        RecipeError: the size cannot be reached; says the smallest one that can.
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
        return _fit(session, settings, allowed, memory, tokenizer)


def _asked(size: str | int | None, bits: float | None) -> dict[str, Any]:
    if (size is None) == (bits is None):
        raise RecipeError(
            "say how large the model may be: either size (such as 700MB) or bits a weight (such as 4.25)"
        )
    if bits is not None and not 0 < float(bits) <= 32:
        raise RecipeError(f"bits {bits} is not possible; expected bits a weight in (0, 32], such as 4.25")
    return {"bytes": parse_size(size), "bits": None if bits is None else float(bits)}


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
) -> Fitted:
    """Steps 1 to 4."""
    job, journal, output = session.job, session.journal, session.output
    assert output is not None
    sizes = PackedSize(job)
    budget = asked["bytes"] or int(asked["bits"] * job.parameters / 8)
    _check_budget(job, sizes, budget)
    samples, searched, deciding = _split(session, settings)
    warnings = [line for line in [journal.once("few bits", lambda: _few_bits(job))] if line]
    found = _measured(session, samples, searched, sizes, output.work)
    table = _Table(job, sizes, found)
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
                _made(session, folder, finalist, samples, memory, tokenizer)
                row = journal.once(
                    f"finalist {number}", partial(_judged, session, folder, finalist, deciding)
                )
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
    lead, stderr = _lead(finalists, rows, winner)
    others = [rows[i] for i in order[1:]]
    if others and _apart(rows[winner], others[0])[0] < _apart(rows[winner], others[0])[1]:
        apart = _apart(rows[winner], others[0])
        warnings.append(
            f"{len(deciding)} windows of {deciding.shape[1]} held-out tokens do not tell the first two finalists apart: "
            f"{apart[0]:.5f} ± {apart[1]:.5f} nats a token; give a longer text, or more fit.deciding"
        )
    return _finish(
        session,
        settings,
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


def _check_budget(job: Job, sizes: PackedSize, budget: int) -> None:
    least = sizes.rest + min(sizes.of_head(kind) for kind in (None, *KINDS_TRIED))
    least += sum(min(sizes.linear(x, l.sparsity, l.kind) for l in levels()) for x in job.linears)
    if budget < least:
        raise RecipeError(
            f"{job.source} cannot be made as small as {size(budget)}: the least that linears, head and all that stays as it is "
            f"take is {size(least)}; give --size {least} (or --bits {_up(8 * least / job.parameters)}), or more"
        )


def _up(bits: float) -> str:
    """Not less than it is, for a person who is going to ask for it."""
    return f"{math.ceil(1000 * bits) / 1000:.3f}"


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


@dataclass(frozen=True)
class _Found:
    measures: dict[str, Measures]
    reactions: dict[str, float]
    head: dict[str, float]


def _measured(session: Session, samples: Samples, searched: Samples, sizes: PackedSize, work: Path) -> _Found:
    """Step 1; what is measured once is kept."""
    job, journal = session.job, session.journal
    if "reactions" not in journal.state.get("once", {}):
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
        journal.once("reactions", lambda: finite({"measures": plain, "reactions": reactions, "head": head}))
        journal.forget(WALK)
        store.remove()
    kept = journal.state["once"]["reactions"]
    measures = {name: Measures(**each) for name, each in kept["measures"].items()}
    return _Found(measures, kept["reactions"], {k: v for k, v in kept["head"].items() if v is not None})


def _dtype(job: Job) -> torch.dtype:
    """Forwards round weights to the compute dtype anyway."""
    assert job.stack.checkpoint is not None
    return min(job.stack.checkpoint.storage_dtype, job.stack.compute, key=lambda dtype: dtype.itemsize)


class _Table:
    """What each level of each linear costs and takes, and of the head."""

    def __init__(self, job: Job, sizes: PackedSize, found: _Found) -> None:
        self.job, self.sizes, self.linears, self.every = job, sizes, job.linears, levels()
        self.found = found
        self.costs = [[self._cost(x.name, level) for level in self.every] for x in self.linears]
        self.bytes = [[self._size(x, level, None) for level in self.every] for x in self.linears]
        self.heads: list[str | None] = [None, *found.head]
        self.head_costs = [0.0, *found.head.values()]

    def _cost(self, name: str, level: Level) -> float:
        return self.found.reactions[name] * self.found.measures[name].relative(level)

    def _size(self, x: LinearInfo, level: Level, group: int | None) -> int:
        return self.sizes.linear(x, level.sparsity, level.kind, group, self.found.measures[x.name].had)

    def chosen(self, budget: float, name: str = "", *, zeros: bool) -> Finalist | None:
        """The least cost that fits; None where nothing does."""
        usable = [i for i, level in enumerate(self.every) if zeros or not level.sparsity]
        costs = [[item[i] for i in usable] for item in self.costs]
        taken = [[float(item[i]) for i in usable] for item in self.bytes]
        heads = [float(self.sizes.of_head(kind)) for kind in self.heads]
        picked = choose([*costs, self.head_costs], [*taken, heads], budget - self.sizes.rest)
        if picked is None:
            return None
        of = {x.name: self.every[usable[p]] for x, p in zip(self.linears, picked, strict=False)}
        return self._finalist(name, of, None, self.heads[picked[-1]])

    def _finalist(self, name: str, of: Mapping[str, Level], group: int | None, head: str | None) -> Finalist:
        total = self.sizes.rest + self.sizes.of_head(head)
        total += sum(self._size(x, of[x.name], group) for x in self.linears)
        expected = math.fsum(self._cost(x.name, of[x.name]) for x in self.linears)
        return Finalist(name, of, group, head, total, expected + self.head_costs[self.heads.index(head)])

    def uniform(self, budget: float) -> Finalist | None:
        """One kind for all linears, by expected divergence; of groups the one that fills the size best."""
        fits = []
        for kind in KINDS_TRIED:
            for group in KINDS[kind].groups:
                for head in self.heads:
                    of = dict.fromkeys((x.name for x in self.linears), Level(0.0, kind))
                    columns = "rows" if group is None else f"groups of {group}"
                    named = f"uniform {kind} in {columns}, head {head or 'as it is'}"
                    fits.append(self._finalist(named, of, group, head))
        fits = [each for each in fits if each.bytes <= budget]
        return min(fits, key=lambda each: (each.expected, -each.bytes), default=None)

    def finalists(self, budget: float) -> list[Finalist]:
        """Each once."""
        made = [
            self.chosen(budget, "zeros and bits by the linear", zeros=True),
            self.chosen(budget, "bits by the linear", zeros=False),
            self.uniform(budget),
        ]
        if made[0] is not None and not any(level.sparsity for level in made[0].levels.values()):
            made[0] = None
        if made[1] is not None and made[1].uniform is not None and made[2] is not None:
            made[1] = None
        return [each for each in made if each is not None]

    def curve(self) -> list[tuple[int, float]]:
        """Sizes, and the least divergence that is expected there."""
        smallest = self.sizes.rest + sum(min(x) for x in self.bytes)
        smallest += min(self.sizes.of_head(kind) for kind in self.heads)
        largest = self.sizes.rest + sum(max(x) for x in self.bytes) + self.sizes.of_head(None)
        step = (largest / smallest) ** (1 / (_CURVE - 1))
        found = (self.chosen(smallest * step**i, zeros=True) for i in range(_CURVE))
        return [(each.bytes, each.expected) for each in found if each is not None]


# --- finalists -------------------------------------------------------------------------------------------------


def _recipe_of(session: Session, finalist: Finalist, folder: Path) -> Recipe:
    """The recipe of a finalist; what its linears get goes into a file beside its folder."""
    base, head = session.job.recipe, finalist.head
    if finalist.uniform is not None:
        return resolve_recipe(
            base, values={"kind": finalist.uniform, "group_size": finalist.group, "head": head}
        )
    numel = {x.name: x.numel for x in session.job.linears}
    removed = sum(removed_count(numel[name], level.sparsity) for name, level in finalist.levels.items())
    kinds = sorted({level.kind for level in finalist.levels.values()}, key=lambda name: -KINDS[name].bits)
    lines = [
        f"# {finalist.name}. Its mean sparsity is {removed / sum(numel.values()):.6f}.",
        "# Use it: tawny prune MODEL -s MEAN -a FILE --head KIND --out DIR, or the recipe.yaml beside it.",
        "allocation:",
        *(f"  {name}: {level.sparsity!r}" for name, level in finalist.levels.items()),
        "values:",
        *(f"  {name}: {level.kind}" for name, level in finalist.levels.items()),
    ]
    path = folder.with_suffix(".yaml")
    write_beside(path, "\n".join(lines) + "\n")
    return resolve_recipe(
        base, allocator=str(path), sparsity=removed / sum(numel.values()), values={"of": kinds, "head": head}
    )


def _made(
    session: Session,
    folder: Path,
    finalist: Finalist,
    samples: Samples,
    memory: str | int | None,
    tokenizer: Any,
) -> Path:
    """The packed folder of a finalist: pruned in earnest, packed, and not done again."""
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    dense, progress = folder.with_suffix(".dense"), session.progress
    if not dense.exists():
        progress.say(f"making {finalist.name} ({size(finalist.bytes)})")
        given = samples if session.held_out is None else None
        recipe = _recipe_of(session, finalist, folder)
        source = session.job.folder
        assert source is not None
        prune(
            source,
            dense,
            recipe=recipe,
            progress=progress,
            memory=memory,
            tokenizer=tokenizer,
            calibration=given,
        )
    pack(dense, folder, progress=progress)
    shutil.rmtree(dense)
    return folder


def _judged(session: Session, folder: Path, finalist: Finalist, deciding: Tensor) -> dict[str, Any]:
    """A row of the table of finalists."""
    source = session.job.folder
    assert source is not None
    found = agreement(folder, source, deciding, compute=session.job.recipe.compute, progress=session.progress)
    taken = file_bytes(folder) + (folder / INDEX).stat().st_size
    return {
        "name": finalist.name,
        "uniform": finalist.uniform is not None,
        "bytes": taken,
        "planned": finalist.bytes,
        "bits": 8 * taken / session.job.parameters,
        "head": finalist.head,
        "expected": finalist.expected,
        "kl": found.kl,
        "kl_stderr": found.kl_stderr,
        "kl_by_window": list(found.kl_by_window),
        "top1": found.top1,
        "perplexity": found.perplexity.perplexity,
        "dense_perplexity": found.dense.perplexity,
    }


def _apart(better: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """How far a row is ahead of another in nats a token, and the standard error of that, over the same windows."""
    apart = torch.tensor(other["kl_by_window"]) - torch.tensor(better["kl_by_window"])
    return float(apart.mean()), float(apart.std()) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0


def _lead(
    finalists: Sequence[Finalist], rows: Sequence[Mapping[str, Any]], winner: int
) -> tuple[float, float]:
    """Of the winner over the best uniform one, as a share of its divergence, with the standard error."""
    uniform = next((row for row in rows if row["uniform"]), None)
    if uniform is None or finalists[winner].uniform is not None or not uniform["kl"]:
        return 0.0, 0.0
    apart, stderr = _apart(rows[winner], uniform)
    return apart / uniform["kl"], stderr / uniform["kl"]


# --- the end ---------------------------------------------------------------------------------------------------


def _zeros_told(job: Job, finalist: Finalist) -> str:
    """Where zeros were used."""
    with_zeros = [x for x in job.linears if finalist.levels[x.name].sparsity]
    if not with_zeros:
        return "no zeros: at this size bits alone are expected to lose less in every linear"
    blocks = sorted({x.block for x in with_zeros})
    names = sorted({x.name.rpartition(".")[2] for x in with_zeros})
    share = sum(x.numel * finalist.levels[x.name].sparsity for x in with_zeros) / sum(
        x.numel for x in job.linears
    )
    return (
        f"zeros in {len(with_zeros)} of {len(job.linears)} linears ({', '.join(names)}), in blocks "
        f"{', '.join(map(str, blocks))}: {percent(share)} of all weights in blocks"
    )


def _told(
    finalists: Sequence[Finalist], rows: Sequence[Mapping[str, Any]], winner: int, lead: tuple[float, float]
) -> str:
    row = rows[winner]
    head = f"{row['name']}: {size(row['bytes'])}, {row['bits']:.3f} bits a weight, KL {kl_text(row['kl'], row['kl_stderr'])}"
    uniform = next((other for other in rows if other["uniform"]), None)
    if finalists[winner].uniform is not None:
        return f"{head}; nothing that fits came nearer to the dense model"
    if uniform is None:
        return f"{head}; no uniform model fits"
    return (
        f"{head}; {percent(lead[0], 1)} ± {100 * lead[1]:.1f} nearer to the dense model than {uniform['name']} "
        f"({size(uniform['bytes'])}, KL {uniform['kl']:.4f})"
    )


def _blocks(job: Job, finalist: Finalist) -> dict[str, list[float]]:
    """Of each block: bits of a survivor, and sparsity."""
    bits, zeros = [], []
    for block in range(len(job.by_block)):
        here = [x for x in job.linears if x.block == block]
        total = max(1, sum(x.numel for x in here))
        bits.append(sum(x.numel * KINDS[finalist.levels[x.name].kind].bits for x in here) / total)
        zeros.append(sum(x.numel * finalist.levels[x.name].sparsity for x in here) / total)
    return {"bits": bits, "sparsity": zeros}


def _finish(
    session: Session,
    settings: FitSettings,
    finalists: Sequence[Finalist],
    rows: Sequence[dict[str, Any]],
    winner: int,
    folder: Path,
    budget: int,
    table: _Table,
    lead: tuple[float, float],
    warnings: Sequence[str],
    held_out: Mapping[str, int],
) -> Fitted:
    """Make the winner's folder the output."""
    job, output, clock, record = session.job, session.output, session.clock, session.record
    assert output is not None
    chosen = finalists[winner]
    clock.seconds["total"] = clock.elapsed
    fitted = Fitted(
        source=job.source,
        out=str(output.out),
        recipe=job.recipe.to_mapping(),
        settings=asdict(settings),
        budget=budget,
        bytes=rows[winner]["bytes"],
        bits=rows[winner]["bits"],
        winner=chosen.name,
        says=_told(finalists, rows, winner, lead),
        zeros=_zeros_told(job, chosen),
        lead=lead[0],
        lead_stderr=lead[1],
        finalists=list(rows),
        blocks=_blocks(job, chosen),
        curve=table.curve(),
        linears={
            x.name: {**asdict(chosen.levels[x.name]), "expected": table._cost(x.name, chosen.levels[x.name])}
            for x in job.linears
        },
        head=table.found.head,
        held_out=dict(held_out),
        warnings=list(warnings),
        seconds={phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
        peak_memory=max(peak_memory(), record.peak_memory),
        resumed=record.resumed,
    )
    told = finite(fitted.to_dict())
    beside = folder.with_suffix(".yaml")
    if beside.exists():
        shutil.copyfile(beside, folder / _ALLOCATION)
    _own(folder, output, told)
    for suffix in (".png", ".svg"):
        path = folder / f"fit{suffix}"
        or_say(path, partial(plot_fit, told, path), session.progress)
    text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_beside(folder / "fit.json", text)
    shutil.rmtree(output.partial)
    folder.replace(output.partial)
    output.finish()
    return fitted


def _own(folder: Path, output: OutputFolder, told: Mapping[str, Any]) -> None:
    """Let record and recipe name what will be there, and let record, card and page tell of the fit."""
    path = folder / "run.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    allocator = plain["recipe"]["allocator"]
    if "path" in allocator:
        allocator["path"] = str(output.out / _ALLOCATION)
    kept = ("budget", "says", "zeros", "lead", "lead_stderr", "finalists", "warnings")
    plain |= {"out": str(output.out), "source": told["source"], "fit": {key: told[key] for key in kept}}
    write_beside(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    write_beside(folder / "recipe.yaml", dump_recipe(Recipe.from_mapping(plain["recipe"])))
    refresh(folder)
