"""A recipe: everything that decides the result of a pruning run, and nothing else.

A recipe is made of frozen dataclasses and is the same thing as a YAML file:

    sparsity: 0.7
    allocator: {name: owl, M: 5, lambda: 0.08}     # or `allocator: owl`, or `allocator: allocation.yaml`
    solver: sparsegpt
    pattern: unstructured                          # 2:4 stays the text "2:4"
    calibration: {text: c4, samples: 128, seqlen: 2048}

What this file promises:

- A recipe that exists is valid: names are in the registries, options are fields of the class they are for,
  numbers are in range. A mistake is one `RecipeError` line with the key, the value and the nearest name.
- `Recipe.from_mapping(recipe.to_mapping()) == recipe`, with every default spelled out, so that a recipe kept
  in `run.json` means the same to a later version whose defaults moved.
- `fingerprint()` is the same on every machine for the same recipe and differs for any other,
  but for `calibration.strict`, which lets a run end or not and changes none.

merge.py puts a recipe together from a base and changes; files.py reads and writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from tawny.calibration.mixture import parse_texts
from tawny.checked import adapter, checked, option_keys, plain_key, refuse_unknown, show, suggest
from tawny.errors import RecipeError, check_option, nearest
from tawny.gguf_kinds import GGUF_KINDS
from tawny.kinds import names_of, scaled_kinds, solved_kind

if TYPE_CHECKING:
    from tawny.patterns import AnyPattern
    from tawny.solvers.grid import Grid

Storage = Literal["float32", "bfloat16", "float16"]
_DTYPE_ALIASES = {
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    "bf16": "bfloat16",
}
_CONFIG = ConfigDict(extra="forbid")


def _long_dtype(value: Any) -> Any:
    text = str(value).removeprefix("torch.")  # a torch.dtype is as good as its name
    return None if value is None else _DTYPE_ALIASES.get(text, text)


def as_list(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


def _known_texts(value: Any) -> Any:
    """One text as it is, several as a tuple; shares that do not add up are refused here."""
    given = [str(value)] if isinstance(value, str | Path) else value
    if not isinstance(given, list | tuple) or not all(isinstance(one, str | Path) for one in given):
        return value
    parse_texts(given)
    return str(given[0]) if len(given) == 1 else tuple(map(str, given))


TextNames = Annotated[str | tuple[str, ...], BeforeValidator(_known_texts)]
Dtype = Annotated[Storage | None, BeforeValidator(_long_dtype)]
Compute = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_long_dtype)]
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_list)]


@dataclass(frozen=True, config=_CONFIG)
class Selection:
    """One name of a registry and the options of its class, all of them, defaults included."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=_CONFIG)
class Calibration:
    """Which tokens the model is shown: `samples` seeded random windows of `seqlen` tokens of `text`, or of several in shares.

    The last share `repeat` of each window repeats what stood before it. `bos` true begins each window with BOS; false
    leaves BOS to the window at the beginning of the text. None does what the tokenizer does, and what the papers do under
    `compat: official`. `strict` refuses the first picture that cannot be read, instead of skipping it.
    """

    text: TextNames = "c4"
    samples: Annotated[int, Field(ge=1)] = 128
    seqlen: Annotated[int, Field(ge=2)] = 2048
    repeat: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    bos: bool | None = None
    strict: bool = False


@dataclass(frozen=True, config=_CONFIG)
class Refinement:
    """Block reconstruction after the solves of a block; `epochs` 0 leaves it out."""

    epochs: Annotated[int, Field(ge=0)] = 0
    lr: Annotated[float, Field(gt=0, le=1)] = 0.005  # of a tensor's own root mean square, a step
    batch: Annotated[int, Field(ge=1)] = 2  # samples a step
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.125  # share of the samples that choose the best epoch
    patience: Annotated[int, Field(ge=1)] = 2  # epochs without a better one until it ends


@dataclass(frozen=True, config=_CONFIG)
class Values:
    """What survivors are rounded to while they are solved. A kind of None leaves them as the checkpoint has them.

    A scale belongs to `group_size` columns of a row; None is the kind's usual number. `head` is the kind that the head is
    rounded to when the model is packed, and `embedding` that of an embedding which shares no weight with it (None: the
    same). With `mean` and `of` the allocator spends bits instead of zeros: each linear gets one of the kinds, and a weight
    has so many bits on average. With `of` alone an allocation file says each linear's kind.
    """

    kind: str | None = None
    group_size: int | None = None
    mean: float | None = None
    of: Globs = ()
    head: str | None = None
    embedding: str | None = None

    def __post_init__(self) -> None:
        both = self.mean is not None and len(self.of) > 1 and self.kind is None
        single = self.mean is None and not (self.of and self.kind)
        given = f"{self.mean} of {list(self.of)}" + (f" with {self.kind}" if self.kind else "")
        check_option(
            both or single, "values.mean", given, "a mean of two kinds or more, and no kind beside it"
        )
        for end in (self.head, self.embedding):
            if end is not None and solved_kind(end).target == "compressed-tensors":
                raise RecipeError(
                    f"values: {end} is a kind for GPUs, whose runtimes read head and embedding as floats; give it to linears alone"
                )
        kinds = [solved_kind(name, self.group_size) for name in self.names]
        for kind in kinds:
            if not kind.scaled:
                names = names_of(scaled_kinds(), " or ")
                raise RecipeError(
                    f"values: {kind.name} are floats, which nothing is rounded to; choose {names}"
                )
        outer = next((kind for kind in kinds if kind.target != "packed"), None)
        if outer and (self.mean is not None or len({kind.target for kind in kinds}) > 1):
            what = "a type of GGUF files" if outer.target == "gguf" else "a kind for GPUs"
            raise RecipeError(
                f"values: {outer.name} is {what}, and goes with others of these alone and without values.mean: "
                f"`tawny fit --to {outer.target} --bits` shares bits among them"
            )
        bits = [kind.bits for kind in kinds]
        if self.mean is not None and not min(bits) <= self.mean <= max(bits):
            raise RecipeError(
                f"values.mean is {self.mean}; expected {min(bits)} to {max(bits)} bits, as the kinds have"
            )
        if not kinds and self.group_size is not None:
            raise RecipeError(
                f"values.group_size is {self.group_size}; expected a kind with it, such as values=int4"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds that a linear may get."""
        return self.of if self.kind is None else (self.kind,)

    def grid(self, name: str, width: int = 0) -> Grid:
        """What a solver rounds a linear of a width to for a kind."""
        from tawny.solvers.block_grid import grid_of

        return grid_of(name, self.group_size, width)


@dataclass(frozen=True, config=_CONFIG)
class Output:
    """What the solver knows of how the model's output feels an error of a linear.

    `none`: all outputs of the linear alike. `rows`: a number for each of them, the diagonal of the Fisher's factor. `whole`: the
    factor itself, which also says how they go together. None does what the solver does by default. `tokens` of the
    calibration are run backward for it.
    """

    factor: Literal["none", "rows", "whole"] | None = None
    tokens: Annotated[int, Field(ge=1)] = 16384


@dataclass(frozen=True, config=_CONFIG)
class Recipe:
    """Everything that decides the result. Make one with `Recipe.from_mapping` or `load_recipe`."""

    sparsity: Annotated[float, Field(ge=0, lt=1)]
    allocator: Selection
    solver: Selection
    pattern: str = "unstructured"
    calibration: Calibration = Field(default_factory=Calibration)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    include: Globs = ()
    exclude: Globs = ()
    dtype: Dtype = None  # storage of the pruned weights; None is the checkpoint's own
    compute: Compute = "auto"  # of the forwards; auto is bfloat16 where the machine has it
    refit: bool = False  # move the survivors of every mask to their least squares; also `solver.refit`
    refine: Refinement = Field(default_factory=Refinement)
    values: Values = Field(default_factory=Values)
    output: Output = Field(default_factory=Output)
    compat: Literal["official"] | None = None
    profile_samples: Annotated[int, Field(ge=1)] | None = None
    device: Annotated[str, Field(pattern=r"^[a-z]+(:\d+)?$")] = "cpu"
    version: Literal[2] = 2

    @property
    def bos(self) -> bool | None:
        """`calibration.bos`; under `compat: official` windows do not begin with BOS unless it says so."""
        given = self.calibration.bos
        return False if given is None and self.compat == "official" else given

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Recipe:
        """The only door.

        Raises:
            RecipeError: anything in it is wrong; a PatternError where that is the pattern.
        """
        if not isinstance(mapping, Mapping):
            raise RecipeError(f"a recipe is a mapping of keys to values, not {show(mapping)}")
        values = dict(mapping)
        if values.get("order") == "block":  # spelled out by recipes from when there was another
            del values["order"]
        for key in values:
            home = next((section for section in SECTIONS if key in section_keys(section)), None)
            if home is not None and key not in top_level_keys():
                raise RecipeError(f"{key} belongs under {home}: in a recipe ({home}: {{{key}: ...}})")
        refuse_unknown(values, top_level_keys(), "recipe key")
        version = values.pop("version", 2)
        if version not in (1, 2):
            raise RecipeError(
                f"version {show(version)} of recipes is unknown to this Tawny, which reads 1 and 2"
            )
        if version == 1 and not values.get("output"):  # of a run from before outputs were asked
            values["output"] = "none"
        compat = values.get("compat")
        # Asked before it is handed down, so that the error names the right key.
        if compat not in (None, "official"):
            raise RecipeError(f"compat: {show(compat)} given, expected official or nothing")
        lift_refit(values)
        for section, kind in SECTIONS.items():
            values[section] = checked(kind, as_section(section, values.get(section)), "recipe key", section)
        for section in reversed(NAMED):  # the solver first: what it asks for is what an allocator may read
            given = as_section(section, values.get(section))
            values[section] = _choice(section, given, compat, default_name(section, values))
        values["values"] = _with_kinds(values["values"], values["allocator"])
        values["pattern"], values["sparsity"] = _pattern_and_sparsity(values)
        values["output"] = _with_factor(values)
        recipe = checked(cls, values, "recipe key")
        names = ", ".join(recipe.values.names)
        if names and recipe.refit:
            raise RecipeError(
                f"refit moves survivors off the grid of {names} values: leave one of the two out"
            )
        dense = [kind.name for kind in map(solved_kind, recipe.values.names) if not kind.zero]
        if dense and (recipe.sparsity or ":" in recipe.pattern):
            holding = names_of([kind for kind in GGUF_KINDS.values() if kind.zero], " or ")
            raise RecipeError(
                f"{dense[0]} values hold no zeros, and sparsity {recipe.sparsity:g} asks for some: leave it out, or choose {holding}"
            )
        if recipe.refine.epochs and any(solved_kind(n).target != "packed" for n in recipe.values.names):
            raise RecipeError(
                f"refine trains the grids of packed folders, and {names} is for other runtimes: leave one of the two out"
            )
        if recipe.values.mean is not None and (recipe.sparsity or ":" in recipe.pattern):
            raise RecipeError(
                f"values.mean spends the budget in bits and sparsity {recipe.sparsity:g} spends it in zeros: leave one out"
            )
        _check_whole(recipe)
        return recipe

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON and YAML types, every default spelled out."""
        plain: dict[str, Any] = adapter(Recipe).dump_python(self, mode="json")
        for section in NAMED:
            options = dict(plain[section]["options"])
            if options.get("compat", self.compat) == self.compat:
                options.pop("compat", None)  # handed down again on the way in
            plain[section] = {"name": plain[section]["name"], **{plain_key(k): v for k, v in options.items()}}
        return plain

    def fingerprint(self) -> str:
        """64 hex digits that name this recipe: the SHA-256 of its canonical JSON, without what changes no result."""
        return fingerprint_of(self.to_mapping())

    def make_allocator(self) -> Any:
        return registry("allocator")[self.allocator.name](**self.allocator.options)

    def make_solver(self) -> Any:
        return registry("solver")[self.solver.name](**self.solver.options)

    def make_pattern(self) -> AnyPattern:
        from tawny.patterns import parse_pattern

        return parse_pattern(self.pattern)


# --- sections --------------------------------------------------------------------------------------------

NAMED = ("allocator", "solver")  # sections whose name decides what their options are
SECTIONS: dict[str, type[Any]] = {
    "calibration": Calibration,
    "refine": Refinement,
    "values": Values,
    "output": Output,
}
# Section → the key that a bare value is for: `solver: wanda` is `solver: {name: wanda}`.
SHORTHANDS = {
    "allocator": "name",
    "solver": "name",
    "calibration": "text",
    "refine": "epochs",
    "values": "kind",
    "output": "factor",
}
# The best for its time of what benchmarks/recipes.py has measured, and what `compat: official` is about.
_DEFAULT_NAMES = {"allocator": "atp", "solver": "alps"}
_OFFICIAL_NAMES = {"allocator": "owl", "solver": "sparsegpt"}
_ALLOCATION_FILES = (".yaml", ".yml", ".json", ".txt")


def registry(section: str) -> Mapping[str, Any]:
    """The classes that `allocator` or `solver` can name."""
    # Imported here: the numerics bring torch along, which the command line's help must not wait for.
    from tawny.allocation import ALLOCATORS
    from tawny.solvers import BLOCK_SOLVERS, EXPERT_SOLVERS, MEMBER_SOLVERS, RANK_SOLVERS, SOLVERS

    registries: dict[str, Mapping[str, Any]] = {
        "allocator": ALLOCATORS,
        "solver": {**SOLVERS, **MEMBER_SOLVERS, **BLOCK_SOLVERS, **EXPERT_SOLVERS, **RANK_SOLVERS},
    }
    return registries[section]


def default_name(section: str, values: Mapping[str, Any]) -> str:
    """The allocator or solver of a recipe, given as its keys, that names none."""
    whole = _whole(values.get("pattern"))
    if whole in ("blocks", "experts"):
        solver = {"blocks": "divergence", "experts": "reap"}[whole]
        return {"solver": solver, "allocator": "uniform"}[section]
    if section == "solver" and whole:
        return {"members": "obs", "rank": "svd"}[whole]
    if section == "allocator" and _shares_bits(values.get("values")):
        return "owl"  # the best at it (docs/results/few-bits.md), where sparsity that rises with depth gains nothing
    # The best of all, and what it reads is there (docs/log/curves.md). Of n:m it would make another n of some blocks.
    if section == "allocator" and ":" not in str(values.get("pattern")) and _factor_of(values) != "none":
        return "curves"
    return (_OFFICIAL_NAMES if values.get("compat") == "official" else _DEFAULT_NAMES)[section]


def _factor_of(values: Mapping[str, Any]) -> str:
    """The factor of the output that a recipe, given as its keys, asks for: by name, or as its solver does by default."""
    given = values.get("output")
    factor = given.factor if isinstance(given, Output) else as_section("output", given).get("factor")
    if factor is not None:
        return str(factor)
    solver = values.get("solver")
    name = solver.name if isinstance(solver, Selection) else as_section("solver", solver).get("name")
    name = name or default_name("solver", values)
    kind = registry("solver").get(name) if isinstance(name, str) else None
    rounded = values.get("values")
    kinds = rounded.names if isinstance(rounded, Values) else as_section("values", rounded)
    sparsity = values.get("sparsity")
    bits_alone = sparsity == 0 or (sparsity is None and kinds and ":" not in str(values.get("pattern")))
    if kind is None or bits_alone or values.get("compat") == "official":
        return "none"
    return str(kind.default_output)


def _shares_bits(given: Any) -> bool:
    mean = given.mean if isinstance(given, Values) else as_section("values", given).get("mean")
    return mean is not None


_Whole = Literal["", "members", "blocks", "experts", "rank"]


def _whole(pattern: Any) -> _Whole:
    """What the budget is spent in; nothing where single weights go."""
    from tawny.errors import PatternError
    from tawny.patterns import Blocks, Experts, Members, Rank, parse_pattern

    try:
        parsed = parse_pattern(pattern) if isinstance(pattern, str) else None
    except PatternError:  # reported where it is read
        return ""
    kinds: dict[type, _Whole] = {
        Blocks: "blocks",
        Experts: "experts",
        Members: "members",
        Rank: "rank",
    }
    return kinds.get(type(parsed), "")


def top_level_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(Recipe)]


def section_keys(section: str, name: Any = None) -> list[str]:
    """The keys of a section; those of `allocator` and `solver` depend on the name that is chosen."""
    kind = SECTIONS[section] if section in SECTIONS else registry(section).get(name)
    return [] if kind is None else list(option_keys(kind))


def as_section(section: str, value: Any) -> dict[str, Any]:
    """A section as a mapping: a bare value is its shorthand, and the path of an allocation is the allocator `file`."""
    if value is None:
        given = {}
    elif isinstance(value, Mapping):
        given = {str(key): item for key, item in value.items()}
    elif isinstance(value, (str, Path, {"refine": int, "calibration": list}.get(section, str))):
        given = {SHORTHANDS[section]: value}
    else:
        kind = "a count" if section == "refine" else "a text"
        raise RecipeError(
            f"{section}: {show(value)} given, expected {kind} ({SHORTHANDS[section]}) or a mapping"
        )
    if section == "allocator" and _is_path(name := given.get("name")):
        if not os.path.isfile(str(name)):  # noqa: PTH113 - never raises, whatever the name
            raise unknown_name(section, str(name))
        # The hash of another file does not hold for this one.
        given = {"sha256": None, **given, "name": "file", "path": name}
    return {key: str(item) if isinstance(item, Path) else item for key, item in given.items()}


def _is_path(name: Any) -> bool:
    if not isinstance(name, str):
        return isinstance(name, Path)
    return name.endswith(_ALLOCATION_FILES) or "/" in name or os.sep in name


def lift_refit(values: dict[str, Any]) -> None:
    """`solver: {name: wanda, refit: true}` is `refit: true`: it is done to a mask, whoever chose it."""
    if isinstance(values.get("solver"), Mapping) and "refit" in values["solver"]:
        given = dict(values["solver"])
        values["refit"] = given.pop("refit")
        values["solver"] = given


def _choice(section: str, given: dict[str, Any], compat: Any, default: str) -> Selection:
    name = given.pop("name", None) or default
    if not isinstance(name, str) or name not in registry(section):
        raise unknown_name(section, name)
    known = option_keys(registry(section)[name])
    if "compat" in known and given.get("compat") is None:
        given["compat"] = compat
    built = checked(registry(section)[name], given, f"option of {section} {name!r}", section)
    return Selection(name, {field: getattr(built, field) for field in known.values()})


def fingerprint_of(mapping: Mapping[str, Any]) -> str:
    """The fingerprint of the recipe that `to_mapping` told, which need not be valid any more: a file may have changed."""
    calibration = {key: value for key, value in mapping["calibration"].items() if key != "strict"}
    canonical = json.dumps({**mapping, "calibration": calibration}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _with_kinds(values: Values, allocator: Selection) -> Values:
    """The values with the kinds that an allocation file names, where nothing else says any."""
    if values.kind is not None or values.mean is not None:
        return values
    if not values.of:
        named = registry("allocator")[allocator.name](**allocator.options).named_kinds
        return dataclasses.replace(values, of=named) if named else values
    if allocator.name != "file":
        raise RecipeError(
            f"values.of is {list(values.of)} without values.mean: expected an allocation file that says each linear's kind"
        )
    return values  # as they were when the recipe was made; the file may have moved since


def _with_factor(values: Mapping[str, Any]) -> Output:
    """What is asked of the output, with the factor that holds where none is named."""
    from tawny.calibration.output import FACTORS

    solver, factor = values["solver"].name, _factor_of(values)
    known = FACTORS[: FACTORS.index(registry("solver")[solver].output) + 1]
    if factor not in known:
        raise RecipeError(
            f"output {factor} is more than solver {solver} makes use of: expected {' or '.join(known)}"
        )
    output: Output = values["output"]
    return dataclasses.replace(output, factor=factor)


def unknown_name(section: str, name: Any) -> RecipeError:
    names = list(registry(section))
    if section == "allocator" and isinstance(name, str):
        near = nearest(name, names)
        return RecipeError(f"allocator {show(name)} is neither a file nor one of {', '.join(names)}{near}")
    return RecipeError(f"{section} {show(name)} is unknown{suggest(str(name), names)}")


def _pattern_and_sparsity(values: Mapping[str, Any]) -> tuple[str, float]:
    from tawny.patterns import NM, parse_pattern

    pattern = values.get("pattern") or "unstructured"
    if not isinstance(pattern, str):
        raise RecipeError(f"pattern: {show(pattern)} given, expected a text such as unstructured or 2:4")
    parsed = parse_pattern(pattern)
    sparsity = _share(values.get("sparsity"))
    if isinstance(parsed, NM):
        implied = 1 - parsed.n / parsed.m
        if sparsity is not None and abs(sparsity - implied) > 1e-3:  # 0.333 is meant to be 2:3
            raise RecipeError(
                f"pattern {pattern} keeps {parsed.n} of every {parsed.m} and so implies sparsity "
                f"{implied:g}, but sparsity {sparsity:g} was given, here or by a recipe: say -s {implied:g}, or choose another pattern"
            )
        return pattern, implied
    if sparsity is None and values["values"].names:
        return pattern, 0.0  # bits alone
    if sparsity is None:
        raise RecipeError(
            "sparsity is missing: give the share of weights to remove, such as sparsity=0.6 (-s 0.6)"
        )
    return pattern, sparsity


def _check_whole(recipe: Recipe) -> None:
    """Refuse a solver that does not know the pattern, and what whole members or blocks make pointless."""
    from tawny.solvers import BLOCK_SOLVERS, EXPERT_SOLVERS, MEMBER_SOLVERS, RANK_SOLVERS, SOLVERS

    whole = _whole(recipe.pattern)
    of_all: dict[str, Mapping[str, Any]] = {
        "": SOLVERS,
        "members": MEMBER_SOLVERS,
        "blocks": BLOCK_SOLVERS,
        "experts": EXPERT_SOLVERS,
        "rank": RANK_SOLVERS,
    }
    known = of_all[whole]
    if recipe.solver.name not in known:
        raise RecipeError(
            f"solver {recipe.solver.name} does not remove {recipe.pattern if whole else 'single weights'}: choose "
            f"{', '.join(known)}, or another pattern than {recipe.pattern}"
        )
    if whole == "blocks" and recipe.allocator.name not in ("uniform", "file"):
        raise RecipeError(
            f"allocator {recipe.allocator.name} shares a budget among blocks, and pattern blocks lets the solver choose which of them "
            "leave: leave the allocator out, or give an allocation file"
        )
    if whole == "rank" and (recipe.refit or recipe.refine.epochs or recipe.values.names):
        raise RecipeError(
            "pattern rank is for studies of how ranks are shared: leave refit, refine and values out"
        )
    if whole == "experts" and recipe.refine.epochs:
        raise RecipeError(
            "refine trains what is left of single weights, and experts leave as a whole: leave it out, and `tawny recover` the result"
        )
    if whole and recipe.refit:
        raise RecipeError(
            f"refit is for masks of single weights, and {recipe.pattern} leave as a whole: leave it out"
        )
    if whole and recipe.values.names:
        raise RecipeError(
            f"values {', '.join(recipe.values.names)} are for masks of single weights: prune {recipe.pattern}"
            f"{'' if whole == 'experts' else ', `tawny slim`'}, then `tawny pack --values`"
        )


def _share(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if 1 <= number <= 100:
        hint = f"did you mean {number / 100:g}?" if 1 < number < 100 else "and something must be left"
        raise RecipeError(f"sparsity {value} is outside [0, 1): it is a share of the weights, {hint}")
    if not 0 <= number < 1:
        raise RecipeError(f"sparsity {show(value)} is not a number in [0, 1): give a share such as 0.6")
    return number
