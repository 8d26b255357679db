"""Recipes as files: YAML, the `run.json` of a finished run, and the recipes that come with Tawny.

YAML is read as people mean it: 2:4 is a text, 1e-3 a number, `no` a word, and no key is given twice.
`parse_yaml(dump_yaml(mapping)) == mapping`, and other readers of YAML get the same from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tawny.checked import show, yaml_error
from tawny.errors import RecipeError, nearest, one_line
from tawny.recipe.schema import Recipe


def load_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file, of the `run.json` of a finished run, or of a name (`named_recipes`).

    Raises:
        RecipeError: there is no such recipe, or something in it is wrong.
        PatternError: its pattern is none.
    """
    return Recipe.from_mapping(read_mapping(path))


def named_recipes() -> dict[str, Path]:
    """The recipes that come with Tawny, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))}


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return dump_yaml(recipe.to_mapping())


def read_mapping(path: str | Path) -> Mapping[str, Any]:
    """What `load_recipe` reads, before it is validated."""
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
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid JSON: {one_line(error)}") from None
    except yaml.YAMLError as error:
        raise RecipeError(yaml_error(str(path), error)) from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("recipe"), Mapping):
        loaded = loaded["recipe"]  # a run.json holds its recipe under this key
    if not isinstance(loaded, Mapping):
        raise RecipeError(
            f"recipe {str(path)!r} holds {show(loaded)}: a recipe is a mapping of keys to values"
        )
    return loaded


def parse_yaml(text: str) -> Any:
    """What a YAML document holds.

    Raises:
        yaml.YAMLError: it is none; a `yaml.MarkedYAMLError` knows the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError, KeyError) as error:
        # A tag or an escape whose value Python does not have.
        raise yaml.YAMLError(f"a value cannot be read ({one_line(error)})") from None


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """A mapping of plain types in its own order, an inner one on one line."""
    dumped: str = yaml.dump(
        dict(mapping), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100
    )
    return dumped


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: PyYAML's own rules read 2:4 as the number 124, 1e-3 as text and `no` as false. No aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of them stand for more than memory holds
            alias: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{alias.anchor} is not supported; write the value out",
                problem_mark=alias.start_mark,
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(
                    problem=f"{key!r} is given twice", problem_mark=node.value[index][0].start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either set of rules would not read back as text, so that other YAML readers agree."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf))$|^\.(?:nan|NaN)$",
        list("-+0123456789."),
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
