"""`file`: an allocation written by a person or another program, taken as it is.

YAML or JSON that maps linears to sparsities; names may be globs. A name written out beats a glob, a later
glob beats an earlier one:

    "*": 0.7                            # everything, then the exceptions
    "model.layers.0.*": 0.5
    model.layers.29.mlp.down_proj: 0.62

A file whose values stand under `allocation:` (such as a `run.json`) is read too. Beside it, `values:` may give each linear
the kind that its survivors are rounded to, by the same rules; bf16, f16 and f32 leave them as they are:

    allocation: {"*": 0}
    values: {"*": int4, "*.down_proj": int6}

The configurations that EvoPress writes (Sieberling 2025, ICML, 2410.14649) are read, too: lines `linear: level` with whole
numbers, level k meaning that the linear loses `S·n + k·step` of its n weights. EvoPress keeps the step in its
database: give it as `step`; unset it is EvoPress's default for 8 levels, `⌊0.5·min(S, 1−S)/8·width²⌋`.

The numbers are not altered, and the recipe carries the SHA-256 of the file beside its name: another file under the
same name is another recipe, and a recipe made from one is refused on the other. What is checked: every linear has a value, every line has a linear, values are
sparsities, and the parameter-weighted mean is the asked-for sparsity to within `tolerance`. Under an n:m pattern each
number must keep a whole n of every m weights of its linear.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field

from tawny.allocation.profile import Allocation, Allocator, Profile
from tawny.checked import yaml_error
from tawny.errors import RecipeError, nearest, short
from tawny.kinds import KINDS, names_of, solved_kind, solved_kinds
from tawny.patterns import removed_count

# The sections of a text, and what a line of each looks like.
_SECTIONS = {"allocation": "'\"*\": 0.7'", "values": "'\"*\": int4'"}


@dataclass(frozen=True)
class AllocationLine:
    """One line: a name or a glob, the number as it was written, and where."""

    pattern: str
    text: str
    where: str


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, those given twice too, and not to be taken for a JSON list."""


_Line = tuple[str, Any, str]  # a key of a mapping, its value as JSON or a YAML node, and where it stands


def read_entries(
    text: str, name: str = "the allocation", section: str = "allocation"
) -> list[AllocationLine]:
    """The lines of a YAML, JSON or EvoPress text, in order; a key or a section that is given twice is refused.

    Args:
        section: under which they stand. Without an `allocation` the whole text is one, and it has no `values`.
    """
    lines = _lines(_parsed(text, name), name)
    if lines is None:
        raise _no_mapping(name)
    _check_sections(lines)
    sections = {key: (value, where) for key, value, where in reversed(lines)}
    if "allocation" in sections:
        value, where = sections.get(section, (_Object(), name))
        lines = _lines(value, name)
        if lines is None:
            raise _no_mapping(f"{where}: {section}", section)
    elif section != "allocation":
        return []
    if not lines and section == "allocation":
        raise RecipeError(f"{name} is empty, expected lines such as '\"*\": 0.7'")
    first: dict[str, AllocationLine] = {}
    for key, value, where in lines:
        if (written := _written(value)) is None:
            raise _no_number(where, key, "a list or a mapping", section)
        if key in first:
            raise RecipeError(f"{where}: {short(key)} is given twice, first as {short(first[key].text)}")
        first[key] = AllocationLine(key, written, where)
    return list(first.values())


def _parsed(text: str, name: str) -> Any:
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):  # a YAML flow mapping also starts with a brace
            return json.loads(text, object_pairs_hook=_Object)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(yaml_error(name, error)) from None
    except RecursionError:
        raise RecipeError(f"{name}: nested too deeply, expected lines such as '\"*\": 0.7'") from None
    return _Object() if node is None else node


def _lines(value: Any, name: str) -> list[_Line] | None:
    """What a mapping holds; None where it is none."""
    if isinstance(value, _Object):
        return [(key, inner, name) for key, inner in value]
    if not isinstance(value, yaml.MappingNode):
        return None
    lines = [(key, inner, f"{name}:{key.start_mark.line + 1}") for key, inner in value.value]
    for key, _, where in lines:
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{where}: a list or a mapping is given a value, expected the name of a linear")
    return [(key.value, inner, where) for key, inner, where in lines]


def _written(value: Any) -> str | None:
    """A number or a word as it was written: YAML would make 1:30 a number and 70% a text. None for all else."""
    if isinstance(value, yaml.Node):
        return str(value.value) if isinstance(value, yaml.ScalarNode) else None
    return None if isinstance(value, list) else str(value)


def _check_sections(lines: Sequence[_Line]) -> None:
    """Refuse a section that is given twice or has another name; what a record holds beside its allocation is its own."""
    names = [key for key, _, _ in lines]
    if "allocation" not in names:
        return
    for index, (key, _, where) in enumerate(lines):
        if key in _SECTIONS and key in names[:index]:
            raise RecipeError(
                f"{where}: the section {key} is given twice, expected one: put its lines together"
            )
        if key not in _SECTIONS and "recipe" not in names:  # every record has one
            raise RecipeError(
                f"{where}: {short(key)} stands beside the section allocation, expected only values"
                f"{nearest(key, _SECTIONS)}: rename it or take it out"
            )


def _no_mapping(what: str, section: str = "allocation") -> RecipeError:
    given = "values" if section == "values" else "sparsities"
    return RecipeError(
        f"{what} is not a mapping of linears to {given}, expected lines such as {_SECTIONS[section]}"
    )


def _no_number(where: str, pattern: str, what: str, section: str = "allocation") -> RecipeError:
    expected = "values such as int4" if section == "values" else "a sparsity such as 0.7"
    return RecipeError(f"{where}: {short(pattern)} has {what}, expected {expected}")


def resolve(
    entries: Sequence[AllocationLine], profile: Profile, section: str = "allocation"
) -> dict[str, AllocationLine]:
    """Which line of a section speaks for which linear."""
    names = [linear.name for linear in profile.linears]
    chosen: dict[str, AllocationLine] = {}
    for exact in (False, True):
        for entry in entries:
            hits = [n for n in names if (entry.pattern == n if exact else fnmatchcase(n, entry.pattern))]
            chosen.update(dict.fromkeys(hits, entry))
            if exact and not hits and not any(fnmatchcase(n, entry.pattern) for n in names):
                raise RecipeError(
                    f"{entry.where}: no prunable linear is called {short(entry.pattern)}{nearest(entry.pattern, names)}"
                )
    missing = [name for name in names if name not in chosen]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RecipeError(
            f"{'the allocation' if section == 'allocation' else f'the section {section}'} says nothing of {', '.join(missing[:3])}{more}: "
            f"add lines for them, or a first line such as {_SECTIONS[section]}"
        )
    return chosen


def _number(entry: AllocationLine) -> float:
    try:
        return float(entry.text)
    except ValueError:
        raise _no_number(entry.where, entry.pattern, short(repr(entry.text))) from None


def _are_levels(entries: Sequence[AllocationLine], path: str) -> bool:
    """EvoPress writes whole numbers that add up to 0 into a .txt; a sparsity is never negative."""
    values = [_number(entry) for entry in entries]
    whole = all(
        value.is_integer() and "." not in entry.text for value, entry in zip(values, entries, strict=True)
    )
    return whole and (path.endswith(".txt") or min(values) < 0)


@dataclass(frozen=True)
class File(Allocator):
    """The sparsities of a YAML, JSON or EvoPress file (`path`); taken as they are, the mean is checked.

    `{linear or glob: sparsity}`, or EvoPress's `linear: level` (2410.14649). Needs no data. With `allocation:` and
    `values:` it says kinds, too.

    Raises:
        RecipeError: the file cannot be read, does not fit the model, has changed, or misses the mean.
    """

    path: Annotated[
        str, Field(min_length=1, description="the name of a YAML or JSON file: -o allocator.path=FILE")
    ]
    step: Annotated[int | None, Field(ge=1, description="a number of weights")] = None
    tolerance: Annotated[float, Field(ge=0, le=1, description="a share in [0, 1]")] = 1e-3
    sha256: str | None = None  # of the file; filled in when the recipe is made
    as_given: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sha256 is None and os.path.isfile(self.path):  # noqa: PTH113 - never raises, whatever the name
            # A file that is not there is reported when it is read: a recipe can be shown without it.
            object.__setattr__(self, "sha256", hashlib.sha256(self._bytes()).hexdigest())

    @property
    def named_kinds(self) -> tuple[str, ...]:
        if not os.path.isfile(self.path):  # noqa: PTH113 - never raises, whatever the name
            return ()
        named = dict.fromkeys(entry.text for entry in self._kinds())
        return tuple(name for name in named if solved_kind(name).scaled)

    def kinds(self, profile: Profile) -> dict[str, str]:
        entries = self._kinds()
        chosen = resolve(entries, profile, "values") if entries else {}
        kinds = {name: chosen[name].text for name in profile.sizes if name in chosen}
        return {name: kind for name, kind in kinds.items() if solved_kind(kind).scaled}

    def _kinds(self) -> list[AllocationLine]:
        entries = read_entries(self._checked_text(), self.path, "values")
        for entry in entries:
            if entry.text not in KINDS.keys() | {kind.name for kind in solved_kinds()}:
                names = names_of(solved_kinds(), " or ")
                raise RecipeError(
                    f"{entry.where}: {short(entry.pattern)} has values {short(repr(entry.text))}, expected {names}"
                )
        return entries

    def allocate(self, profile: Profile, target: float) -> Allocation:
        entries = read_entries(self._checked_text(), self.path)
        chosen = resolve(entries, profile)
        step = self._step(profile, target) if _are_levels(entries, self.path) else None
        allocation: Allocation = {}
        for linear in profile.linears:
            entry = chosen[linear.name]
            value = _number(entry)
            if step is not None:
                value = (removed_count(linear.numel, target) + value * step) / linear.numel
            if not 0 <= value <= 1:  # also refuses nan
                hint = f", did you mean {value / 100:g}?" if step is None and 1 < value <= 100 else ""
                text = short(entry.text)
                says = f"level {text}, which is sparsity {value:.4g}" if step is not None else text
                raise RecipeError(
                    f"{entry.where}: {linear.name} has {says}, expected a share of the weights in [0, 1]{hint}"
                )
            allocation[linear.name] = value
        self._check_mean(allocation, profile, target)
        return allocation

    def _bytes(self) -> bytes:
        try:
            return Path(self.path).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"the allocation {self.path!r} cannot be read: {reason}") from None

    def _checked_text(self) -> str:
        content = self._bytes()
        digest = hashlib.sha256(content).hexdigest()
        if self.sha256 not in (None, digest):
            raise RecipeError(
                f"the allocation {self.path!r} has changed: its SHA-256 is {digest[:12]}…, the recipe was made for "
                f"{str(self.sha256)[:12]}…; give the old file, or leave allocator.sha256 out of the recipe"
            )
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise RecipeError(f"the allocation {self.path!r} cannot be read: it is not text") from None

    def _step(self, profile: Profile, target: float) -> int:
        if self.step is not None:
            return self.step
        width = Counter(linear.shape[1] for linear in profile.linears).most_common(1)[0][0]
        return int(0.5 * min(target, 1 - target) / 8 * width**2)

    def _check_mean(self, allocation: Allocation, profile: Profile, target: float) -> None:
        total = sum(profile.sizes.values())
        removed = math.fsum(allocation[name] * size for name, size in profile.sizes.items())
        mean = removed / total if total else target
        if abs(mean - target) > self.tolerance:
            raise RecipeError(
                f"the allocation {self.path!r} removes {mean:.4f} of the weights, not the {target:.4f} asked for: "
                f"use -s {mean:.4f}, or change the file, or allow it with a larger allocator.tolerance"
            )
