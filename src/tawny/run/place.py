"""`OUT.partial`: the one place in which a run keeps what is not finished.

    OUT.partial/journal.json   which run this is, and what of it is finished (journal.py)
    OUT.partial/lock           held by one process at a time
    OUT.partial/steps/NAME     what its steps make: files of blocks, hidden states, whole checkpoints
    OUT.partial/replaced       an older OUT, until the new one has its name

OUT appears by one rename when it is complete, so nothing unfinished looks finished. The same command goes on with an unfinished
run. Another command is refused, or clears it with `--overwrite`. Whatever lies in `OUT.partial` under another name is the
user's: a run refuses to begin there, and never removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar, final

from torch import nn

from tawny.errors import OutputError
from tawny.model import durable
from tawny.model.companions import companions
from tawny.model.durable import locked, writing
from tawny.model.source import resolve
from tawny.run.journal import JOURNAL, STEPS, Journal

_LOCK, _REPLACED = "lock", "replaced"
_OURS = {JOURNAL, f"{JOURNAL}.tmp", _LOCK, _REPLACED, STEPS}

T = TypeVar("T")

# Raises an OutputError where OUT cannot be written: (OUT, whether it may be replaced, whether an unfinished run is continued).
Accepts = Callable[[Path, bool, bool], None]


def place_of(out: str | Path) -> Path:
    """Where `out` is, with `~` for the home folder, as in what is read.

    Raises:
        OutputError: nobody of that name has a home.
    """
    try:
        return Path(out).expanduser()
    except RuntimeError as error:
        raise OutputError(f"{out} cannot be written: {error}") from None


def named(out: Path) -> Path:
    """`out` as it was given where its last part is a name; absolute where it is none (`.`, `..`). Never the root."""
    if out.name in ("", ".."):
        out = out.resolve()
    if not out.name:
        raise OutputError(f"{out} is the root of the file system; choose a folder inside it as --out")
    return out


def unfinished(out: Path) -> Path:
    """Where what will be `out` is made: `OUT.partial`, beside it."""
    out = named(out)
    return out.with_name(out.name + ".partial")


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths name one file or folder: by another case on some disks, or mounted twice, they may."""
    try:
        return one.samefile(other)
    except OSError:  # one is not there
        return one.resolve() == other.resolve()


def spare(places: Sequence[Path], read: Path, what: str) -> None:
    """Refuse places to write whose replacement, or whose clearing, would take a model that is read with it.

    Args:
        what: how the refusal calls the model.

    Raises:
        OutputError: a place is the model's folder, or holds it.
    """
    read = read.resolve()
    for place in places:
        if any(same_place(place, above) for above in (read, *read.parents)):
            said = f"is the {what} itself" if same_place(place, read) else f"holds the {what} {read}"
            raise OutputError(f"{place} {said}; a source is never overwritten: choose another --out")


def models_read(**models: str | Path | nn.Module | None) -> list[tuple[str, Path]]:
    """The places of models that a run reads, each with what it is called: its folder, and the file that was made into one."""
    return [
        (what, place)
        for what, model in models.items()
        if model is not None and not isinstance(model, nn.Module)
        for place in (resolve(model), Path(model).expanduser())
    ]


def accepts_checkpoint(out: Path, overwrite: bool, continued: bool) -> None:
    """Raise an OutputError unless `out` is free, or is a checkpoint that may be replaced."""
    if out.is_symlink() and not out.exists():
        raise OutputError(
            f"{out} is a link to nothing ({out.readlink()}); mount what it names or choose another --out"
        )
    if not out.exists():
        return
    if not overwrite:
        raise OutputError(f"{out} exists; choose another --out or pass --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise OutputError(f"{out} exists and is not a checkpoint folder; refusing to replace it")


@final
class Workplace:
    """The place of one run. Nothing is touched before `claim`; as a context it is left in order, whatever happens.

    Args:
        out: what is to be written.
        accepts: raises an OutputError where `out` cannot be.

    Attributes:
        path: `OUT.partial`.
        steps: the folder of what steps make, by name.
        journal: what is finished; without a folder where the run cannot be continued.
    """

    def __init__(self, out: Path, accepts: Accepts = accepts_checkpoint) -> None:
        self.out, self.path = named(out), unfinished(out)
        self.steps = self.path / STEPS
        self.journal = Journal(None)
        self._accepts = accepts
        self._overwrite = self._claimed = self._begun = False
        self._lock: IO[bytes] | None = None
        self._closing = contextlib.ExitStack()

    def claim(
        self, *, overwrite: bool = False, reads: Iterable[tuple[str, Path]] = (), continues: bool = True
    ) -> None:
        """Hold the place. An unfinished run stays where it may be continued, or where it is refused.

        Args:
            overwrite: replace a finished OUT once the new one is complete. Discard an unfinished run, unless it is this same
                one and began with it, too.
            reads: places of models, which are never replaced or cleared, and what each is called.
            continues: a run that was stopped is continued; otherwise nothing of it is kept.

        Raises:
            OutputError: OUT exists, the place is another run's, another process holds it, or nothing can be written there.
            CheckpointError: a model's folder holds a link that leads out of it.
        """
        self._overwrite = overwrite
        for what, read in reads:
            if read.exists():
                spare((self.out, self.path), read, what)
            if read.is_dir():
                companions(
                    read, ("README.md",)
                )  # what is carried along at the end is refused before the work
        self._mend()
        journal = Journal(self.path if continues else None)
        keep = self._keeps(journal)
        self._accepts(self.out, overwrite or (keep and journal.consent), keep)
        self._refuse_foreign()
        with writing(self.out):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.path / _LOCK, self.out)
            self._claimed = True
            if keep:
                journal.load()  # another process may have worked here meanwhile
            else:
                self._clear()
                journal.state = {}
            self.steps.mkdir(exist_ok=True)
            for left in [*self.steps.glob("*.tmp"), *self.steps.glob("*/*.tmp")]:
                if left.is_file():  # half written when the run was killed
                    left.unlink()
        self.journal = journal

    def _keeps(self, journal: Journal) -> bool:
        """Whether what is unfinished here stays, and may be continued."""
        if journal.folder is None:
            if not self._overwrite and (self.path / JOURNAL).exists():
                raise OutputError(
                    f"{self.path} holds an unfinished run: repeat its command to go on with it, choose another --out, or pass "
                    "--overwrite to discard it"
                )
            return False
        try:
            journal.load()
        except OutputError:
            if self._overwrite:
                return False
            raise
        return journal.found and (journal.consent or not self._overwrite)

    def _refuse_foreign(self) -> None:
        """Raise an OutputError where something lies in the place that no run of Tawny put there."""
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise OutputError(f"{self.path} exists and is not a folder; move it away or choose another --out")
        for name in sorted(path.name for path in self.path.iterdir()):
            if name not in _OURS:
                raise OutputError(
                    f"{self.path} holds {name!r}, which no run of Tawny put there; move it away or choose another --out"
                )

    def _mend(self) -> None:
        """Finish what a process that died inside `deliver` left: an old OUT set aside, or one that has its name already."""
        replaced = self.path / _REPLACED
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if replaced.exists() and not self.out.exists():
                replaced.replace(self.out)
                return
            delivered = json.loads((self.path / JOURNAL).read_text(encoding="utf-8"))["run"]["delivering"]
            if self.out.exists() and not (self.steps / delivered).exists():
                shutil.rmtree(self.path)

    def require(self, **identity: Any) -> None:
        """Say what this run is, in JSON types.

        Raises:
            OutputError: an unfinished run differs, something of it is finished, and nobody asked to overwrite it.
        """
        for what, value in identity.items():
            replaceable = self._overwrite or not self.journal.has_progress
            if replaceable and self.journal.differing(what, value):
                if not self._overwrite:  # that run may have been allowed to replace OUT, and this one is not
                    self._accepts(self.out, False, False)
                with writing(self.path):
                    self._clear()
                    self.steps.mkdir(exist_ok=True)
            self.journal.require(what, value)

    def begin(self) -> None:
        """From here on there is something to go on with."""
        self._begun = True
        self.journal.begin(overwrite=self._overwrite)

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder that a step makes once: by a rename at its end, so that what is there is whole."""
        path = self.steps / name
        if not path.exists():
            make(path)
        return path

    def on_close(self, call: Callable[[], object]) -> None:
        """Have something called before another process may have the place."""
        self._closing.callback(call)

    def deliver(self, made: Path) -> None:
        """Give a finished folder of `steps` the name OUT; what stands there goes only when the new one is in its place."""
        self._closing.close()
        with writing(self.out):
            for path in [p for p in made.rglob("*") if p.is_file()] + [made]:
                durable.sync(path)
            if self.journal.found:
                self.journal.state["delivering"] = made.relative_to(self.steps).as_posix()
                self.journal.save()
            if self.out.exists():
                self.out.replace(self.path / _REPLACED)
            made.replace(self.out)
            durable.sync(self.out.absolute().parent)
        self.discard()

    def discard(self) -> None:
        """Throw away what is unfinished, but not what `deliver` had only set aside. Only the process that claimed it does."""
        if not self._claimed:
            return
        self._put_back()
        self._clear()
        with contextlib.suppress(OSError):
            (self.path / _LOCK).unlink(missing_ok=True)
        self.release()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def release(self) -> None:
        """Let another process go on with what is unfinished."""
        self._closing.close()
        self._put_back()
        if self._lock is not None:
            self._lock.close()
        self._lock, self._claimed = None, False

    def _put_back(self) -> None:
        """Give an old OUT that was set aside its name again, unless the new one has it."""
        replaced = self.path / _REPLACED
        with contextlib.suppress(OSError):
            if self._claimed and replaced.exists() and not self.out.exists():
                replaced.replace(self.out)

    def _clear(self) -> None:
        """The journal goes last, and says first that it does: what is half removed must not be gone on with."""
        if (self.path / JOURNAL).exists():
            with contextlib.suppress(OutputError):
                Journal(self.path).start(discarding=True)
        for name in (STEPS, _REPLACED):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (f"{JOURNAL}.tmp", JOURNAL):
            (self.path / name).unlink(missing_ok=True)
        self.journal.state = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what is finished; where nothing is, or all was delivered, leave nothing behind."""
        others = self.journal.found and not self._begun
        if self.journal.has_progress or others:
            self.release()
        else:
            self.discard()
