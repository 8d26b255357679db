"""Which class each picture shows: by a table beside the pictures, or by the folders they lie in.

    FILE.csv    the file's name relative to the folder, then its class; a first line that names neither is a header
    folder      DIR/CLASS/picture: the first folder below names the class

A class is a name in the model's `id2label`, or its number.
"""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tawny.calibration.mixture import Source, Texts, check_texts, in_words, parse_texts
from tawny.calibration.pictures import pictures_in
from tawny.errors import TextError, first_line, nearest, short

FOLDER = "folder"


@dataclass(frozen=True)
class Labelled:
    """Pictures in the order of their names and the class of each, and how many pictures have none."""

    files: list[Path]
    classes: list[int]
    unlabelled: int


def read_labels(given: str | Path, data: Texts, names: Mapping[int, str]) -> Labelled:
    """The pictures of a folder that have a label.

    Args:
        given: `folder`, or the path of a table that ends in .csv.
        data: `images:DIR`.
        names: of the model's classes, by number.

    Raises:
        TextError: the pictures are not of one folder, the table cannot be read, or a row fits no picture or no class.
    """
    source = check_labels(given, data)
    root = Path(source.pictures or "").expanduser()
    files = {path.relative_to(root).as_posix(): path for path in pictures_in(source)}
    rows = _by_folder(files, root) if str(given) == FOLDER else _by_table(Path(given), files, root, names)
    numbers = {name: _number(label, names, where) for name, label, where in rows}
    if not numbers:
        raise TextError(f"labels {given} name no picture: expected a line FILE,CLASS for each")
    chosen = sorted(numbers, key=files.__getitem__)
    return Labelled(
        [files[name] for name in chosen], [numbers[name] for name in chosen], len(files) - len(numbers)
    )


def check_labels(given: str | Path, data: Texts) -> Source:
    """The one folder of pictures that labels are of; raises what can be said before a model or a picture is opened."""
    check_texts(data)
    sources = parse_texts(data)
    if len(sources) > 1 or sources[0].pictures is None:
        raise TextError(
            f"labels are of the pictures in a folder, and {in_words(data)} was given: give one images:DIR"
        )
    if str(given) != FOLDER and (
        Path(given).suffix.lower() != ".csv" or not Path(given).expanduser().is_file()
    ):
        raise TextError(
            f"labels {str(given)!r}: no such table; expected FILE.csv, or {FOLDER} for DIR/CLASS/picture"
        )
    return sources[0]


def _by_folder(files: Mapping[str, Path], root: Path) -> Iterator[tuple[str, str, str]]:
    for name, path in files.items():
        label, below, _ = name.partition("/")
        if not below:
            raise TextError(
                f"{path} lies in no folder of a class: expected {root}/CLASS/{path.name}, or give the labels as FILE.csv"
            )
        yield name, label, f"folder {root / label}"


def _by_table(
    table: Path, files: Mapping[str, Path], root: Path, names: Mapping[int, str]
) -> Iterator[tuple[str, str, str]]:
    seen: dict[str, int] = {}
    for number, cells in enumerate(_lines(table), 1):
        where = f"{table}, line {number}"
        if not any(cells):
            continue
        if len(cells) < 2:
            raise TextError(
                f"{where}: {short(cells[0])!r} is not FILE,CLASS: expected two columns, and a comma between them"
            )
        name, label = posixpath.normpath(cells[0]), cells[1]
        if len(cells) > 2 and (whole := ", ".join(cells[1:])) in names.values():
            raise TextError(f"{where}: the class {whole!r} holds a comma: put it in quotes")
        if name not in files:
            if number == 1 and not _numbers(label, names):
                continue
            raise TextError(
                f"{where}: {cells[0]!r} is not a picture in {root}{nearest(name, files)}: give names relative to that folder"
            )
        if name in seen:
            raise TextError(
                f"{where}: {cells[0]!r} stands in line {seen[name]} already: give each picture one class"
            )
        seen[name] = number
        yield name, label, where


def _lines(table: Path) -> Sequence[Sequence[str]]:
    try:
        with table.expanduser().open(encoding="utf-8-sig", newline="") as file:
            return [[cell.strip() for cell in line] for line in csv.reader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise TextError(
            f"labels {str(table)!r} cannot be read ({first_line(error)}): expected lines FILE,CLASS in UTF-8"
        ) from None


def _numbers(label: str, names: Mapping[int, str]) -> list[int]:
    """The classes of that name, or the one of that number; some models have two of one name."""
    named = [number for number, name in names.items() if name == label]
    return named or [number for number in names if str(number) == label]


def _number(label: str, names: Mapping[int, str], where: str) -> int:
    numbers = _numbers(label, names)
    if len(numbers) == 1:
        return numbers[0]
    most = max(names)
    if numbers:
        raise TextError(
            f"{where}: {label!r} is the name of the classes {' and '.join(map(str, numbers))}: give the number"
        )
    raise TextError(
        f"{where}: {label!r} is not one of the model's {len(names)} classes{nearest(label, names.values())}: give a name in "
        f"its id2label, such as {names[min(names)]!r}, or a number from 0 to {most}"
    )
