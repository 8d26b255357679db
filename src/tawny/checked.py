"""Plain values, as a recipe, an index or a request holds them, checked by the annotations of a dataclass.

pydantic looks at types, ranges and unknown keys. What it finds becomes one line: what was given, what was expected, what to
do. What is expected is the `description` of a field, or follows from its annotation:

    damp: Annotated[float, Field(ge=0, le=1e6, description="a number in [0, 1e6], such as 0.01")] = 0.01

What depends on several fields is checked in the class's `__post_init__`, or by its own constructor.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tawny.errors import RecipeError, TawnyError, nearest, printable, short

T = TypeVar("T")


def checked(kind: type[T], values: Mapping[str, Any], what: str, section: str = "") -> T:
    """An instance of a dataclass, made from plain values.

    Args:
        kind: a dataclass whose annotations pydantic understands.
        values: by key; those left out have their defaults.
        what: a key is called in errors, such as `recipe key`.
        section: stands before the key in errors.

    Raises:
        RecipeError: one line for the first key that is unknown, or whose value does not fit.
    """
    known, schema = option_keys(kind), cast(Any, kind)
    prefix = f"{section}." if section else ""
    given = {plain_key(str(key)): value for key, value in values.items()}
    if len(given) < len(values):
        twice = min({str(key) for key in values} - given.keys())
        raise RecipeError(f"{prefix}{plain_key(twice)} is given twice, also as {twice}")
    refuse_unknown(given, known, what, prefix)
    try:
        instance: T = adapter(schema).validate_python({known[key]: value for key, value in given.items()})
    except ValidationError as error:
        raise RecipeError(one_line_of(error, section, _expected_by(schema))) from None
    except TawnyError as error:
        raise RecipeError(str(error)) from None  # a class names its own fields, as `allocator.M`
    for key, value in given.items():  # to pydantic `true` is the number 1
        if isinstance(value, bool) and not isinstance(vars(instance)[known[key]], bool):
            raise RecipeError(f"{prefix}{key} is {show(value)}; expected a number")
    return instance


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """What validates and dumps a type, made once."""
    return TypeAdapter(kind)


def one_line_of(error: ValidationError, section: str = "", expected: Mapping[str, str] | None = None) -> str:
    """The first thing that pydantic finds wrong, in Tawny's words.

    Args:
        section: stands before the key.
        expected: of keys whose values are described.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    # The branch of a union leaves parts in the location that are not keys.
    parts = [str(p) for p in first["loc"] if not re.search(r"[\[\](){}]|constrained-", str(p))]
    # A damaged file may have any key.
    place = printable(" ".join(".".join(filter(None, [section, *map(plain_key, parts)])).split()))
    if first["type"] in ("missing", "missing_argument"):
        return f"{place} is missing" + (f": give it a value (-o {place}=…)" if expected is not None else "")
    if first["type"] == "value_error":
        return f"{place}: {show(first['input'])} given, {first['msg'].removeprefix('Value error, ')}"
    known = first["msg"].removeprefix("Input should be ").split(", unable to")[0]
    said = (expected or {}).get(parts[0] if parts else "") or known
    if said.startswith(("greater", "less")):
        said = f"a number {said}"
    return f"{place} is {show(first['input'])}; expected {said[:1].lower()}{said[1:]}"


@functools.cache
def _expected_by(kind: Any) -> dict[str, str]:
    """Descriptions of the fields of a dataclass that have one."""
    hints = typing.get_type_hints(kind, include_extras=True)
    about = {field.name: _described(hints[field.name]) for field in dataclasses.fields(kind)}
    return {name: said[0] for name, said in about.items() if said}


def _described(hint: Any) -> list[str]:
    """The descriptions in an annotation, of `Annotated[…] | None` too."""
    own = [x.description for x in getattr(hint, "__metadata__", ()) if isinstance(x, FieldInfo)]
    parts = [said for part in typing.get_args(hint) for said in _described(part)]
    return [*filter(None, own), *parts]


def option_keys(kind: Any) -> dict[str, str]:
    """Recipe key → field name of a dataclass, of a solver or allocator for example; its fields are its options."""
    return {plain_key(field.name): field.name for field in dataclasses.fields(kind) if field.init}


def plain_key(field: str) -> str:
    """The recipe key of a field: `lambda_` is only called so because Python owns the word."""
    return field[:-1] if field.endswith("_") and keyword.iskeyword(field[:-1]) else field


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str, prefix: str = "") -> None:
    """Raise a RecipeError for the first key that is not known, with the nearest that is."""
    known = list(known)
    for key in given:
        if key not in known:
            raise RecipeError(f"{prefix}{key} is not a known {what}{suggest(str(key), known)}")


def suggest(word: str, known: Iterable[str]) -> str:
    """The nearest of the known names in brackets, or all of them."""
    names = list(known)
    folded = {name.lower(): name for name in names}  # `m` and `Lambda` are as near as it gets
    if word.lower() in folded:
        return f" (did you mean {folded[word.lower()]!r}?)"
    return nearest(word, names) or (f" (known: {', '.join(names)})" if names else " (it has no options)")


def yaml_error(name: str, error: yaml.YAMLError) -> str:
    """What is wrong with a YAML file, in one line with the file's name and, where it is known, the line."""
    if not isinstance(error, yaml.MarkedYAMLError):  # a character that YAML does not allow
        return f"{name}: not valid YAML: {' '.join(str(error).split())}"
    where = f"{name}:{error.problem_mark.line + 1}" if error.problem_mark else name
    return f"{where}: not valid YAML: {error.problem}"


def show(value: Any) -> str:
    """A value as Python writes it, at most 60 characters."""
    return short(repr(value))
