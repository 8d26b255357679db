"""Putting a recipe together: a base, then keyword keys, then `KEY=VALUE` overrides, validated once at the end.

Keys may be written dotted (`allocator.M=7`), or bare (`M=7`) where only one section knows them. Names are applied
before options, since they decide which options there are: the order in which keys are given does not matter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tawny.checked import option_keys, plain_key, suggest
from tawny.errors import RecipeError, nearest
from tawny.recipe.files import parse_yaml, read_mapping
from tawny.recipe.schema import (
    NAMED,
    SECTIONS,
    SHORTHANDS,
    Recipe,
    as_list,
    as_section,
    default_name,
    lift_refit,
    registry,
    section_keys,
    top_level_keys,
    unknown_name,
)


def resolve_recipe(
    base: Recipe | Mapping[str, Any] | str | Path | None = None,
    overrides: Mapping[str, Any] | Iterable[str] = (),
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
        mapping = read_mapping(base)
    later = overrides.items() if isinstance(overrides, Mapping) else map(parse_override, overrides)
    merged = _merge(mapping, [*((k, v) for k, v in keys.items() if v is not None), *later])
    if merged.get("sparsity") is None and ":" not in str(merged.get("pattern")):
        merged["sparsity"] = default_sparsity
    return Recipe.from_mapping(merged)


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


def changes_from(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    """What `recipe` says otherwise than `base`, by dotted key, so that `resolve_recipe(base, changes) == recipe`.

    An option of an allocator or solver that `base` does not name is always told.
    """
    mine, theirs = _dotted(recipe.to_mapping()), _dotted(base.to_mapping())
    return {key: value for key, value in mine.items() if key not in theirs or theirs[key] != value}


def _dotted(mapping: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def bare_keys() -> set[str]:
    """Every key that can be written without its section, whichever allocator and solver are chosen."""
    return {
        *top_level_keys(),
        *(key for section in SECTIONS for key in section_keys(section)),
        *_options_of_all(),
    }


def _options_of_all() -> list[str]:
    return [key for section in NAMED for kind in registry(section).values() for key in option_keys(kind)]


def _chosen(section: str, merged: Mapping[str, Any]) -> Any:
    return merged[section].get("name") or default_name(section, merged)


def _merge(base: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Apply dotted, bare and whole-section keys."""
    merged: dict[str, Any] = copy.deepcopy(dict(base))
    for section in SHORTHANDS:
        merged[section] = as_section(section, merged.get(section))
    lift_refit(merged)
    pairs = [(key.removesuffix(".name"), value) for key, value in changes]
    pairs = [("refit" if key == "solver.refit" else key, value) for key, value in pairs]
    seen: set[str] = set()
    for key, value in sorted(
        pairs, key=lambda pair: (pair[0] not in ("compat", "pattern"), pair[0] not in NAMED)
    ):
        if key in SHORTHANDS:
            new = as_section(key, value)
            # An allocator or solver of another name has other options.
            other = key in NAMED and new.get("name", _chosen(key, merged)) != _chosen(key, merged)
            merged[key] = new if other else {**merged[key], **new}
            if other and key == "solver":
                merged["output"].pop("factor", None)  # each solver makes use of its own
            lift_refit(merged)
            continue
        *section_of, name = _locate(key, merged)
        target = merged[section_of[0]] if section_of else merged
        again = name in ("include", "exclude") and name in seen  # -o include=A -o include=B
        # A value that is not a list is refused with all others.
        joins = again and all(isinstance(one, str | list | tuple) for one in (value, target[name]))
        target[name] = [*as_list(target[name]), *as_list(value)] if joins else value
        seen.add(name)
    patterns = (str(base.get("pattern")), str(merged.get("pattern")))
    if "pattern" in seen and "sparsity" not in seen and all(":" in pattern for pattern in patterns):
        merged["sparsity"] = None  # the base's was implied by its n:m, the new pattern implies another
    return merged


def _locate(key: str, merged: Mapping[str, Any]) -> tuple[str, ...]:
    """Where a key lives: `("seed",)` or `("allocator", "M")`."""
    sections: dict[str, list[str]] = {}
    for section in SHORTHANDS:
        name = _chosen(section, merged) if section in NAMED else None
        if section in NAMED and not isinstance(name, str):
            raise unknown_name(section, name)
        sections[section] = section_keys(section, name)  # none of an unknown name, which validation reports
    head, dot, rest = key.partition(".")
    if dot:
        if head not in sections:
            raise RecipeError(f"{key} is not a known recipe key{suggest(head, sections)}")
        if plain_key(rest) not in sections[head]:
            _refuse_of_others(key, [head], merged)
            raise RecipeError(f"{key} is not a known recipe key{suggest(plain_key(rest), sections[head])}")
        return head, plain_key(rest)
    if key in top_level_keys():
        return (key,)
    word = plain_key(key)
    homes = [section for section, names in sections.items() if word in names]
    if len(homes) > 1:
        raise RecipeError(f"{key} is ambiguous: write {' or '.join(f'{home}.{word}' for home in homes)}")
    if not homes:
        _refuse_of_others(key, NAMED, merged)
        everything = [*top_level_keys(), *(name for names in sections.values() for name in names)]
        near = nearest(word, [*everything, *_options_of_all()])
        raise RecipeError(f"{key} is not a known recipe key{near or suggest(word, everything)}")
    return homes[0], word


def _refuse_of_others(key: str, sections: Iterable[str], merged: Mapping[str, Any]) -> None:
    """Refuse an option of a class that was not chosen, by that class's name."""
    option = plain_key(key.rpartition(".")[2])
    for section in NAMED:
        owners = [name for name, kind in registry(section).items() if option in option_keys(kind)]
        if owners and section in sections:
            raise RecipeError(
                f"{key} is an option of {section} {' or '.join(owners)}, and the {section} is "
                f"{_chosen(section, merged)}: give {section}={owners[0]} too"
            )
