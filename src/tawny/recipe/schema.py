"""A recipe: everything that decides the result of a pruning run, and nothing else.

A recipe is made of frozen dataclasses and is the same thing as a YAML file:

    sparsity: 0.7
    allocator: {name: owl, M: 5, lambda: 0.08}     # or just `allocator: owl`
    solver: sparsegpt
    pattern: unstructured                          # 2:4 stays the text "2:4"
    calibration: {text: c4, samples: 128, seqlen: 2048}

What this file promises:

- A recipe that exists is valid: names are in the registries, options are fields of the class they are for,
  numbers are in range. Whatever is wrong is one `RecipeError` line with the key, the value, the nearest name.
- `Recipe.from_mapping(recipe.to_mapping()) == recipe`, with every default spelled out, so that a recipe kept
  in `run.json` means the same to a later version whose defaults moved.
- `fingerprint()` is the same on every machine for the same recipe and differs for any other.

Keys may be written dotted (`allocator.M=7`), or bare (`M=7`) where only one section knows them.
"""

from __future__ import annotations

__all__ = [
    "Calibration",
    "Choice",
    "Recipe",
    "Refine",
    "bare_keys",
    "dump_recipe",
    "load_recipe",
    "named_recipes",
    "option_keys",
    "parse_override",
    "resolve_recipe",
]

import copy
import dataclasses
import hashlib
import json
import keyword
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from tawny.errors import RecipeError, TawnyError, nearest, short
from tawny.recipe.yaml_text import dump_yaml, parse_yaml

Storage = Literal["float32", "bfloat16", "float16"]
_DTYPE_ALIASES = {
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}
_CONFIG = ConfigDict(extra="forbid")


def _long_dtype(value: Any) -> Any:
    text = str(value).removeprefix("torch.")  # a torch.dtype is as good as its name
    return None if value is None else _DTYPE_ALIASES.get(text, text)


def _as_list(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


Dtype = Annotated[Storage | None, BeforeValidator(_long_dtype)]
Compute = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_long_dtype)]
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_list)]


@dataclass(frozen=True, config=_CONFIG)
class Choice:
    """One name of a registry and the options of its class, all of them, defaults included."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}


@dataclass(frozen=True, config=_CONFIG)
class Calibration:
    """Which tokens the model is shown: `samples` seeded random windows of `seqlen` tokens of `text`.

    The last `repeat` of each, as a share, says again what stood before in it. `bos`: each begins with BOS, or only what
    stands at the beginning of the text; as the tokenizer begins a text if None, but as the papers do under `compat: official`.
    """

    text: Annotated[str, Field(min_length=1)] = "c4"
    samples: Annotated[int, Field(ge=1)] = 128
    seqlen: Annotated[int, Field(ge=2)] = 2048
    repeat: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    bos: bool | None = None


@dataclass(frozen=True, config=_CONFIG)
class Refine:
    """Block reconstruction after the solves of a block; `epochs` 0 leaves it out."""

    epochs: Annotated[int, Field(ge=0)] = 0
    lr: Annotated[float, Field(gt=0, le=1)] = 0.005  # of a tensor's own root mean square, a step
    batch: Annotated[int, Field(ge=1)] = 2  # samples a step
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.125  # share of the samples that choose the best epoch
    patience: Annotated[int, Field(ge=1)] = 2  # epochs without a better one until it ends


@dataclass(frozen=True, config=_CONFIG)
class Recipe:
    """Everything that decides the result. Make one with `Recipe.from_mapping` or `load_recipe`."""

    sparsity: Annotated[float, Field(ge=0, lt=1)]
    allocator: Choice
    solver: Choice
    pattern: str = "unstructured"
    calibration: Calibration = Field(default_factory=Calibration)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    include: Globs = ()
    exclude: Globs = ()
    dtype: Dtype = None  # storage of the pruned weights; None is the checkpoint's own
    compute: Compute = "auto"  # of the forwards; auto is bfloat16 where the machine has it
    order: Literal["block", "data"] = "block"
    refit: bool = False  # move the survivors of every mask to their least squares; also `solver.refit`
    refine: Refine = Field(default_factory=Refine)
    compat: Literal["official"] | None = None
    profile_samples: Annotated[int, Field(ge=1)] | None = None
    device: Annotated[str, Field(pattern=r"^[a-z]+(:\d+)?$")] = "cpu"
    version: Literal[1] = 1

    @property
    def bos(self) -> bool | None:
        """`calibration.bos`; under `compat: official` windows do not begin with BOS unless it says so."""
        given = self.calibration.bos
        return False if given is None and self.compat == "official" else given

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Recipe:
        """The only door: validates everything, raises a `RecipeError` of one line."""
        return _validate(mapping)

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON and YAML types, every default spelled out."""
        plain: dict[str, Any] = _recipe_adapter().dump_python(self, mode="json")
        for section in _REGISTRIES:
            options = dict(plain[section]["options"])
            if options.get("compat", self.compat) == self.compat:
                options.pop("compat", None)  # handed down again on the way in
            plain[section] = {"name": plain[section]["name"], **{_key(k): v for k, v in options.items()}}
        return plain

    def with_overrides(self, overrides: Iterable[str | tuple[str, Any]]) -> Recipe:
        """A new recipe with `KEY=VALUE` texts (or pairs) applied, as `tawny prune -o` does."""
        return _validate(_merge(self.to_mapping(), map(_pair, overrides)))

    def fingerprint(self) -> str:
        """64 hex digits that name this recipe: the SHA-256 of its canonical JSON."""
        canonical = json.dumps(self.to_mapping(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def make_allocator(self) -> Any:
        return _registry("allocator")[self.allocator.name](**self.allocator.options)

    def make_solver(self) -> Any:
        return _registry("solver")[self.solver.name](**self.solver.options)

    def make_pattern(self) -> Any:
        from tawny.patterns import parse_pattern

        return parse_pattern(self.pattern)


def load_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file, of the `run.json` of a finished run, or of a name (`named_recipes`)."""
    return Recipe.from_mapping(_read(path))


def named_recipes() -> dict[str, Path]:
    """The recipes that come with Tawny, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))}


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return dump_yaml(recipe.to_mapping())


def resolve_recipe(
    base: Recipe | Mapping[str, Any] | str | Path | None = None,
    overrides: Mapping[str, Any] | Iterable[str | tuple[str, Any]] = (),
    *,
    default_sparsity: float | None = None,
    **keys: Any,
) -> Recipe:
    """Put a recipe together: a base (a recipe, mapping, file or name), then keyword keys, then overrides.

    A key that is None is unset. The whole is validated once, at the end, so that a base file may leave out
    what the keys supply. `default_sparsity` holds where nothing says one and no n:m implies it.
    """
    if base is None:
        mapping: Mapping[str, Any] = {}
    elif isinstance(base, Recipe):
        mapping = base.to_mapping()
    elif isinstance(base, Mapping):
        mapping = base
    else:
        mapping = _read(base)
    later = overrides.items() if isinstance(overrides, Mapping) else map(_pair, overrides)
    merged = _merge(mapping, [*((k, v) for k, v in keys.items() if v is not None), *later])
    if merged.get("sparsity") is None and ":" not in str(merged.get("pattern")):
        merged["sparsity"] = default_sparsity
    return _validate(merged)


def parse_override(text: str) -> tuple[str, Any]:
    """`allocator.M=7` → `("allocator.M", 7)`; a value that is not valid YAML is plain text (`*.mlp.*`)."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"-o {text!r} is not KEY=VALUE: write for example -o seed=1")
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError:
        parsed = value.strip()
    return key.strip(), parsed


# --- validation ------------------------------------------------------------------------------------------

_REGISTRIES = ("allocator", "solver")
# The best for its time of what benchmarks/recipes.py has measured.
_DEFAULT_NAMES = {"allocator": "atp", "solver": "alps"}
_OFFICIAL_NAMES = {"allocator": "owl", "solver": "sparsegpt"}  # what `compat: official` is about
_SECTIONS: dict[str, tuple[Any, str]] = {"calibration": (Calibration, "text"), "refine": (Refine, "epochs")}


def _registry(section: str) -> Mapping[str, Any]:
    # Imported here: the numerics bring torch along, which the command line's help must not wait for.
    from tawny.allocation import ALLOCATORS
    from tawny.solvers import SOLVERS

    registries: dict[str, Mapping[str, Any]] = {"allocator": ALLOCATORS, "solver": SOLVERS}
    return registries[section]


@cache
def _recipe_adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def _validate(mapping: Mapping[str, Any]) -> Recipe:
    if not isinstance(mapping, Mapping):
        raise RecipeError(f"a recipe is a mapping of keys to values, not {_show(mapping)}")
    values = dict(mapping)
    for key in values:
        home = next((name for name in _SECTIONS if key in _section_keys(name)), None)
        if home is not None and key not in _top_level_keys():
            raise RecipeError(f"{key} belongs under {home}: in a recipe ({home}: {{{key}: ...}})")
    _refuse_unknown(values, _top_level_keys(), "recipe key")
    if values.get("version", 1) != 1:
        raise RecipeError(
            f"version {_show(values['version'])} of recipes is unknown to this Tawny, which reads version 1"
        )
    for name, (_, shorthand) in _SECTIONS.items():
        values[name] = _section(values.get(name), name, shorthand)
        _refuse_unknown(values[name], _section_keys(name), "recipe key", f"{name}.")
    compat = values.get("compat")
    if compat not in (None, "official"):  # before it is handed down, so that the error names the right key
        raise RecipeError(f"compat: {_show(compat)} given, expected official or nothing")
    _lift_refit(values)
    for section in _REGISTRIES:
        values[section] = _choice(section, values.get(section), compat)
    values["pattern"], values["sparsity"] = _pattern_and_sparsity(values)
    try:
        return _recipe_adapter().validate_python(values)
    except ValidationError as error:
        raise RecipeError(_one_line(error)) from None


def _section(value: Any, name: str, shorthand: str) -> dict[str, Any]:
    """`solver: wanda` is short for `solver: {name: wanda}`; a section left empty is its defaults."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    if isinstance(value, Path):
        return {shorthand: str(value)}
    if isinstance(value, str) or (isinstance(value, int) and name == "refine"):
        return {shorthand: value}
    kind = "a count" if name == "refine" else "a text"
    raise RecipeError(f"{name}: {_show(value)} given, expected {kind} ({shorthand}) or a mapping")


def _lift_refit(values: dict[str, Any]) -> None:
    """`solver: {name: wanda, refit: true}` is `refit: true`: it is done to a mask, whoever chose it."""
    if isinstance(values.get("solver"), Mapping) and "refit" in values["solver"]:
        given = dict(values["solver"])
        values["refit"] = given.pop("refit")
        values["solver"] = given


def _default_name(section: str, compat: Any) -> str:
    return (_OFFICIAL_NAMES if compat == "official" else _DEFAULT_NAMES)[section]


def _choice(section: str, value: Any, compat: Any) -> dict[str, Any]:
    registry = _registry(section)
    given = _section(value, section, shorthand="name")
    name = given.pop("name", None) or _default_name(section, compat)
    if not isinstance(name, str) or name not in registry:
        raise _unknown_name(section, name)
    kind = registry[name]
    known = option_keys(kind)
    _refuse_unknown(
        {_key(k): v for k, v in given.items()}, known, f"option of {section} {name!r}", f"{section}."
    )
    options = {known[_key(k)]: v for k, v in given.items()}
    if "compat" in known and options.get("compat") is None:
        options["compat"] = compat
    try:
        built = TypeAdapter(kind).validate_python(options)
    except ValidationError as error:
        raise RecipeError(_one_line(error, section)) from None
    except TawnyError as error:
        raise RecipeError(str(error)) from None  # a class names its own fields, as `allocator.M`
    return {"name": name, "options": {field: getattr(built, field) for field in known.values()}}


def _unknown_name(section: str, name: Any) -> RecipeError:
    return RecipeError(f"{section} {_show(name)} is unknown{_suggest(str(name), _registry(section))}")


def _pattern_and_sparsity(values: Mapping[str, Any]) -> tuple[str, float]:
    from tawny.patterns import NM, parse_pattern

    pattern = values.get("pattern") or "unstructured"
    if not isinstance(pattern, str):
        raise RecipeError(f"pattern: {_show(pattern)} given, expected a text such as unstructured or 2:4")
    parsed = parse_pattern(pattern)
    sparsity = _number(values.get("sparsity"))
    if isinstance(parsed, NM):
        implied = 1 - parsed.n / parsed.m
        if sparsity is not None and abs(sparsity - implied) > 1e-3:  # 0.333 is meant to be 2:3
            raise RecipeError(
                f"pattern {pattern} keeps {parsed.n} of every {parsed.m} and so implies sparsity "
                f"{implied:g}, but sparsity {sparsity:g} was given, here or by a recipe: say -s {implied:g}, or choose another pattern"
            )
        return pattern, implied
    if sparsity is None:
        raise RecipeError(
            "sparsity is missing: give the share of weights to remove, such as sparsity=0.6 (-s 0.6)"
        )
    return pattern, sparsity


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if 1 <= number <= 100:
        raise RecipeError(
            f"sparsity {value} is outside [0, 1): it is a share of the weights{_share_hint(number)}"
        )
    if not 0 <= number < 1:
        raise RecipeError(f"sparsity {_show(value)} is not a number in [0, 1): give a share such as 0.6")
    return number


def _share_hint(number: float) -> str:
    return f", did you mean {number / 100:g}?" if 1 < number < 100 else ", and something must be left"


def _refuse_unknown(given: Mapping[str, Any], known: Iterable[str], what: str, prefix: str = "") -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise RecipeError(f"{prefix}{key} is not a known {what}{_suggest(str(key), known)}")


def _suggest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    folded = {name.lower(): name for name in names}  # `m` and `Lambda` are as near as it gets
    if word.lower() in folded:
        return f" (did you mean {folded[word.lower()]!r}?)"
    return nearest(word, names) or (f" (known: {', '.join(names)})" if names else " (it has no options)")


def _one_line(error: ValidationError, prefix: str = "") -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    # The branch of a union leaves parts in the location that are no key.
    parts = [str(p) for p in first["loc"] if isinstance(p, int) or re.fullmatch(r"[A-Za-z_]\w*", str(p))]
    place = ".".join(filter(None, [prefix, *map(_key, parts)]))
    if first["type"] in ("missing", "missing_argument"):
        return f"{place} is missing: give it a value (-o {place}=…)"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {_show(first['input'])} given, {message[:1].lower()}{message[1:]}"


def _show(value: Any) -> str:
    return short(repr(value))


# --- keys ------------------------------------------------------------------------------------------------


def _key(field: str) -> str:
    """The recipe key of a field: `lambda_` is only called so because Python owns the word."""
    return field[:-1] if field.endswith("_") and keyword.iskeyword(field[:-1]) else field


def _top_level_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(Recipe)]


def _section_keys(section: str) -> list[str]:
    return [field.name for field in dataclasses.fields(_SECTIONS[section][0])]


def option_keys(kind: Any) -> dict[str, str]:
    """Recipe key → field name of a solver or allocator class; its fields are its options."""
    return {_key(field.name): field.name for field in dataclasses.fields(kind) if field.init}


def bare_keys() -> set[str]:
    """Every key that can be written without its section, whichever allocator and solver are chosen."""
    kinds = [kind for section in _REGISTRIES for kind in _registry(section).values()]
    inner = [key for section in _SECTIONS for key in _section_keys(section)]
    return {*_top_level_keys(), *inner, *(key for kind in kinds for key in option_keys(kind))}


def _pair(override: str | tuple[str, Any]) -> tuple[str, Any]:
    return parse_override(override) if isinstance(override, str) else override


def _merge(base: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Apply dotted, bare and whole-section keys; names first, since they decide which options there are."""
    merged: dict[str, Any] = copy.deepcopy(dict(base))
    shorthands = {**dict.fromkeys(_REGISTRIES, "name"), **{name: s for name, (_, s) in _SECTIONS.items()}}
    for section, shorthand in shorthands.items():
        merged[section] = _section(merged.get(section), section, shorthand)
    _lift_refit(merged)
    pairs = [(key.removesuffix(".name"), value) for key, value in changes]
    pairs = [("refit" if key == "solver.refit" else key, value) for key, value in pairs]
    seen: set[str] = set()
    for key, value in sorted(pairs, key=lambda pair: (pair[0] != "compat", pair[0] not in _REGISTRIES)):
        if key in _REGISTRIES:
            new = _section(value, key, "name")
            known_name = merged[key].get("name") or _default_name(key, merged.get("compat"))
            same = new.get("name", known_name) == known_name
            merged[key] = {**merged[key], **new} if same else new  # another class has other options
            _lift_refit(merged)
        elif key in _SECTIONS:
            merged[key].update(_section(value, key, shorthands[key]))
        else:
            path = _locate(key, merged)
            target = merged if len(path) == 1 else merged[path[0]]
            again = path[-1] in ("include", "exclude") and path[-1] in seen  # -o include=A -o include=B
            target[path[-1]] = [*_as_list(target[path[-1]]), *_as_list(value)] if again else value
            seen.add(path[-1])
    if (
        "pattern" in seen
        and "sparsity" not in seen
        and ":" in str(base.get("pattern"))
        and ":" in str(merged["pattern"])
    ):
        merged["sparsity"] = None  # the base's was implied by its n:m, the new pattern implies another
    return merged


def _locate(key: str, merged: Mapping[str, Any]) -> tuple[str, ...]:
    """Where a key lives: `("seed",)` or `("allocator", "M")`."""
    sections: dict[str, list[str]] = {name: _section_keys(name) for name in _SECTIONS}
    for section in _REGISTRIES:
        name = merged[section].get("name") or _default_name(section, merged.get("compat"))
        if not isinstance(name, str):
            raise _unknown_name(section, name)
        kind = _registry(section).get(name)
        sections[section] = (
            list(option_keys(kind)) if kind else []
        )  # an unknown name is reported by _validate
    head, dot, rest = key.partition(".")
    if dot:
        if head not in sections:
            raise RecipeError(f"{key} is not a known recipe key{_suggest(head, sections)}")
        if _key(rest) not in sections[head]:
            if head in _REGISTRIES:  # the other sections are one class each
                _refuse_of_others(key, [head], merged)
            raise RecipeError(f"{key} is not a known recipe key{_suggest(_key(rest), sections[head])}")
        return head, _key(rest)
    if key in _top_level_keys():
        return (key,)
    homes = [section for section, names in sections.items() if _key(key) in names]
    if len(homes) > 1:
        choices = " or ".join(f"{home}.{_key(key)}" for home in homes)
        raise RecipeError(f"{key} is ambiguous: write {choices}")
    if not homes:
        _refuse_of_others(key, _REGISTRIES, merged)
        everything = [*_top_level_keys(), *(name for names in sections.values() for name in names)]
        others = [
            name
            for section in _REGISTRIES
            for kind in _registry(section).values()
            for name in option_keys(kind)
        ]
        near = nearest(_key(key), [*everything, *others])
        raise RecipeError(f"{key} is not a known recipe key{near or _suggest(_key(key), everything)}")
    return homes[0], _key(key)


def _refuse_of_others(key: str, sections: Iterable[str], merged: Mapping[str, Any]) -> None:
    """Refuse an option of a class that was not chosen, by that class's name."""
    option = _key(key.rpartition(".")[2])
    for section in sections:
        owners = [name for name, kind in _registry(section).items() if option in option_keys(kind)]
        if owners:
            chosen = merged[section].get("name") or _default_name(section, merged.get("compat"))
            raise RecipeError(
                f"{key} is an option of {section} {' or '.join(owners)}, and the {section} is {chosen}: "
                f"give {section}={owners[0]} too"
            )


# --- files ---------------------------------------------------------------------------------------------


def _read(path: str | Path) -> Mapping[str, Any]:
    path, named = Path(path), named_recipes()
    if path.name == str(path) and not path.suffix and not path.is_file():
        if str(path) not in named:
            raise RecipeError(
                f"recipe {str(path)!r} is neither a file nor one of {', '.join(named)}{nearest(str(path), named)}"
            )
        path = named[str(path)]
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"recipe {str(path)!r} is not text: give a YAML file") from None
    try:
        # A run.json holds generated words too, and JSON allows characters that YAML does not.
        loaded = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("recipe"), Mapping):
        loaded = loaded["recipe"]  # a run.json holds its recipe under this key
    if not isinstance(loaded, Mapping):
        raise RecipeError(
            f"recipe {str(path)!r} holds {_show(loaded)}: a recipe is a mapping of keys to values"
        )
    return loaded
