"""YAML as people mean it: 2:4 is a text, 1e-3 a number, `no` a word, and no key is given twice.

What this file promises: `parse_yaml(dump_yaml(mapping)) == mapping`, and other readers of YAML get the same from it.
"""

from __future__ import annotations

__all__ = ["dump_yaml", "parse_yaml"]

import re
from collections.abc import Mapping
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """What a YAML document holds.

    Raises:
        yaml.YAMLError: it is none; a `yaml.MarkedYAMLError` knows the line.
    """
    return yaml.load(text, Loader=_Loader)


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """A mapping of plain types in its own order, an inner one on one line."""
    dumped: str = yaml.dump(
        dict(mapping), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100
    )
    return dumped


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: PyYAML's own rules read 2:4 as the number 124, 1e-3 as text and `no` as false."""

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
