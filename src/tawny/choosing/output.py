"""What a search writes: `allocation.yaml`, with all that was tried and pictures beside it."""

from __future__ import annotations

__all__ = ["USE", "accepts_allocation", "deliver_allocation"]

from pathlib import Path

from tawny.errors import OutputError
from tawny.model import durable
from tawny.model.durable import writing
from tawny.run.place import Workplace

_ENDINGS = (".yaml", ".yml")
_BESIDE = (".json", ".png", ".svg")
USE = "# Use it: tawny prune"  # begins the line by which an earlier search knows its file again


def accepts_allocation(source: Path | None, out: Path, overwrite: bool, continued: bool) -> None:
    """Raise an OutputError unless the file `out` and those beside it can be written.

    Args:
        source: folder of the model, of which nothing is replaced.
        continued: the search goes on with an unfinished one, which may have written those beside it already.
    """
    if out.suffix.lower() not in _ENDINGS:
        raise OutputError(f"--out {out} does not end in .yaml: name a file such as allocation.yaml")
    files = [out, *(out.with_suffix(ending) for ending in _BESIDE if not continued)]
    there = [path for path in files if path.exists()]
    names = ", ".join([str(there[0]), *(path.name for path in there[1:])]) if there else ""
    if there and source is not None and out.absolute().parent.samefile(source) and not _searched(out):
        raise OutputError(f"a search would replace {names} of the model; choose another --out")
    if there and not overwrite:
        exist = "exists" if len(there) == 1 else "exist"
        raise OutputError(f"{names} {exist}; choose another --out or pass --overwrite")
    if out.is_dir():
        raise OutputError(f"--out {out} is a folder; name a file in it, such as {out / 'allocation.yaml'}")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"--out {out}: its folder does not exist; make it first")


def _searched(out: Path) -> bool:
    """Whether `out` is of an earlier search, so that the files beside it are, too."""
    return out.is_file() and USE in out.read_text(encoding="utf-8", errors="replace")


def deliver_allocation(place: Workplace, tried: str, allocation: str) -> None:
    """Write the two files, each in one piece. The allocation comes last, so that it means all is there."""
    for path, text in ((place.out.with_suffix(".json"), tried), (place.out, allocation)):
        with writing(path):
            durable.write(path, text.encode())
    place.discard()
