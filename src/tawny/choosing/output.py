"""Where a search writes: `allocation.yaml`, and `allocation.yaml.partial/` while it is not finished."""

from __future__ import annotations

__all__ = ["SearchOutput", "open_search"]

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tawny.choosing.settings import SearchSettings
from tawny.errors import OutputError
from tawny.model import durable
from tawny.model.durable import locked, writing
from tawny.run.journal import Journal
from tawny.run.output import unfinished
from tawny.run.ranks import Ranks
from tawny.run.resumable import JOURNAL, named, refuse_foreign

# What a folder may hold that a search may throw away.
_OURS = {"lock", JOURNAL, f"{JOURNAL}.tmp", "levels", "hidden", "picture.png", "picture.svg"}
_ENDINGS = (".yaml", ".yml")
_BESIDE = (".json", ".png", ".svg")
USE = "# Use it: tawny prune"  # begins the line by which an earlier search knows its file again


class SearchOutput:
    """The file that is written with those beside it, and the folder of what is unfinished.

    Args:
        keep: go on with what lies in the folder; otherwise it is thrown away.
        source: folder of the model, of which nothing is replaced.

    Raises:
        OutputError: one of the files exists, their folder does not, or the folder of what is unfinished is not Tawny's.
    """

    def __init__(self, out: Path, *, overwrite: bool, keep: bool, source: Path | None = None) -> None:
        self.out, self.work = named(out), unfinished(out)
        # A search that is gone on with may have written those beside it already.
        files = [self.out, *(self.out.with_suffix(ending) for ending in _BESIDE if not keep)]
        there = [path for path in files if path.exists()]
        names = ", ".join([str(there[0]), *(path.name for path in there[1:])]) if there else ""
        if (
            there
            and source is not None
            and self.out.absolute().parent.samefile(source)
            and not self._searched()
        ):
            raise OutputError(f"a search would replace {names} of the model; choose another --out")
        if there and not overwrite:
            exist = "exists" if len(there) == 1 else "exist"
            raise OutputError(f"{names} {exist}; choose another --out or pass --overwrite")
        if self.out.is_dir():
            raise OutputError(
                f"--out {out} is a folder; name a file in it, such as {out / 'allocation.yaml'}"
            )
        if not self.out.absolute().parent.is_dir():
            raise OutputError(f"--out {out}: its folder does not exist; make it first")
        refuse_foreign(self.work, _OURS)
        with writing(self.work):
            self.work.mkdir(exist_ok=True)
            self._lock = locked(self.work / "lock", out)
            if not keep:
                self._clear()
            (self.work / "hidden").mkdir(exist_ok=True)

    def start_over(self) -> None:
        """Throw away what is unfinished, but hold the folder."""
        with writing(self.work):
            self._clear()
            (self.work / "hidden").mkdir(exist_ok=True)

    def _clear(self) -> None:
        (self.work / JOURNAL).unlink(missing_ok=True)
        for name in ("levels", "hidden"):
            shutil.rmtree(self.work / name, ignore_errors=True)

    def _searched(self) -> bool:
        """Whether `out` is of an earlier search, so that the files beside it are, too."""
        return self.out.is_file() and USE in self.out.read_text(encoding="utf-8", errors="replace")

    def finish(self, told: str, allocation: str) -> None:
        """Write the two files, each in one piece, and drop what was unfinished."""
        for path, text in ((self.out.with_suffix(".json"), told), (self.out, allocation)):
            with writing(path):
                durable.write(path, text.encode())
        self.discard()

    def release(self) -> None:
        """Let another process have the unfinished folder."""
        self._lock.close()

    def discard(self) -> None:
        """Throw away what is unfinished."""
        self._lock.close()
        (self.work / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)


def open_search(
    out: Path, settings: SearchSettings, overwrite: bool
) -> Callable[[Path | None, Ranks], tuple[SearchOutput, Journal]]:
    """Opens the file to write and the journal of an unfinished search; a live module has no journal."""
    if out.suffix.lower() not in _ENDINGS:
        raise OutputError(f"--out {out} does not end in .yaml: name a file such as allocation.yaml")
    work = unfinished(out)

    def opened(folder: Path | None, ranks: Ranks) -> tuple[SearchOutput, Journal]:
        if folder is None:
            if not overwrite and Journal(work).found:
                raise OutputError(
                    f"{work} holds an unfinished search, which a live model cannot go on with: repeat that one, choose another out, "
                    "or pass overwrite=True to discard it"
                )
            output, journal = SearchOutput(out, overwrite=overwrite, keep=False), Journal(None)
        elif (found := Journal.to_go_on_with(work, overwrite)) is None:
            output = SearchOutput(out, overwrite=True, keep=False, source=folder)
            journal = Journal(work)
        else:
            journal = found
            output = SearchOutput(out, overwrite=journal.consent, keep=journal.found, source=folder)
            journal.reload()
            journal.start_over = output.start_over if overwrite else None
        journal.require("search", asdict(settings))
        return output, journal

    return opened
