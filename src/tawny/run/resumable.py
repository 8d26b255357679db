"""What lets the same command go on where another one was stopped: a folder beside OUT with a journal in it.

`journal.json` says which run this is (its identity: everything that the bytes depend on), whether replacing OUT was agreed
to, and what is finished. Files are durable before the journal names them, and the journal is replaced by one rename.
Whatever kills the process, the journal names only what is whole on the disk. If the identity differs, the run is refused
with what differs; identities are made in identity.py.

`Resumable` is the journal. Pruning keeps one in `OUT.partial`, which run/output.py makes (run/journal.py).
A `WorkFolder` is a folder of its own, `OUT.KIND`. It was made by Tawny only if its journal says so and every name in it is one
that Tawny gives; any other folder is the user's and is refused, never cleared. One process at a time may hold it.
"""

from __future__ import annotations

__all__ = ["JOURNAL", "Resumable", "WorkFolder", "named", "refuse_foreign"]

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, Self, TypeVar, final

from torch import Tensor

from tawny.errors import OutputError, TawnyError
from tawny.model import durable

JOURNAL, _LOCK = "journal.json", "lock"
_VERSION = 2
# Parts of whatever is being made under one of our names, which a process that died may have left.
_BESIDE = ("", ".tmp", ".partial", ".recovery")

T = TypeVar("T")


class Resumable:
    """The journal of one unfinished run; without a folder nothing is kept and nothing is found.

    Attributes:
        state: `identity`, `overwrite`, `once`, and whatever a run adds; in JSON types, empty before a run begins.
        writes: whether this process is the one that writes the journal.
    """

    def __init__(self, folder: Path | None, kind: str) -> None:
        self.folder, self.kind, self.writes = folder, kind, True
        self.state: dict[str, Any] = {}

    @property
    def found(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self.state)

    @property
    def consent(self) -> bool:
        """Whether the run that is unfinished here may replace OUT."""
        return bool(self.state.get("overwrite"))

    def refuse_other(self, identity: Mapping[str, Any]) -> None:
        """Raise an OutputError if the unfinished run differs in one of these."""
        if differing := self.differing(identity):
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise OutputError(
                f"{self.folder} holds an unfinished run that differs ({'; '.join(differing[:3])}{more}): repeat that command "
                "to go on with it, choose another --out, or pass --overwrite to discard it"
            )

    def differing(self, identity: Mapping[str, Any]) -> list[str]:
        """In what the unfinished run differs, in words."""
        if not self.found:
            return []
        before = self.state["identity"]
        return [line for key, value in identity.items() for line in _differences(before.get(key), value, key)]

    def once(self, name: str, make: Callable[[], T]) -> T:
        """A result (in JSON types) that is made once and kept."""
        if self.folder is None:
            return make()
        kept = self.state.setdefault("once", {})
        if name not in kept:
            kept[name] = make()
            self.save()
        found: T = kept[name]
        return found

    def save(self) -> None:
        if self.folder is None or not self.writes:
            return
        whole = {"sha256": _checksum(self.state), "run": self.state}
        path = self.folder / JOURNAL
        with durable.writing(path):
            durable.write(path, _compact(whole) + b"\n")

    def load(self) -> None:
        """Read the journal; raise an OutputError if it is damaged, or of another version or kind of run."""
        self.state = {}
        if self.folder is None:
            return
        path = self.folder / JOURNAL
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            state: dict[str, Any] = whole["run"]
            if _checksum(state) != whole["sha256"]:
                raise ValueError("its checksum does not fit")
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is damaged ({error}); what is finished beside it is untouched: put back a good copy, or move "
                "the folder away to start over"
            ) from error
        if (state.get("version"), state.get("kind")) != (_VERSION, self.kind):
            raise OutputError(
                f"{path} was written by another version of Tawny; finish it with that one, or move the folder away to "
                "start over"
            )
        self.state = state

    def start(self, identity: Mapping[str, Any], **facts: Any) -> None:
        """From here on there is something to go on with."""
        self.state = {"version": _VERSION, "kind": self.kind, "identity": dict(identity), **facts}
        self.save()

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """A durable safetensors file in the folder."""
        from safetensors.torch import save_file

        assert self.folder is not None
        path = self.folder / name
        with durable.writing(path), durable.beside(path) as temporary:
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, temporary, metadata
            )


@final
class WorkFolder(Resumable):
    """`OUT.KIND`; nothing is touched before `open`, and at the end of its `with` another process may have it.

    Args:
        ours: patterns of the names that Tawny makes in it.
        kept: patterns of what is too good to throw away unasked when another run finds it.
    """

    def __init__(self, out: Path, kind: str, ours: Sequence[str], kept: Sequence[str] = ("*",)) -> None:
        self.out = named(out)
        self.path = self.out.with_name(f"{self.out.name}.{kind}")
        super().__init__(self.path, kind)
        self._ours = [JOURNAL, f"{JOURNAL}.tmp", _LOCK, *(name + more for name in ours for more in _BESIDE)]
        self._kept = kept
        self._half_gone = False
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check(self) -> None:
        """Read the journal; raise an OutputError for a folder that is not Tawny's, or that cannot be read."""
        found = refuse_foreign(self.path, self._ours)
        names = [name for name in found if name not in (f"{JOURNAL}.tmp", _LOCK)]
        if names and JOURNAL not in names:
            raise OutputError(
                f"{self.path} holds {names[0]!r} but no {JOURNAL}, so this Tawny did not make it; move it away or choose "
                "another --out"
            )
        self.load()
        self._half_gone = bool(self.state.get("discarding"))
        if self._half_gone:
            self.state = {}

    def open(self, identity: Mapping[str, Any], overwrite: bool) -> None:
        """Go on with what is there, or begin; `overwrite` discards another run, and one that began without it.

        Of another run that made nothing worth keeping nothing is left either: this one must not build on it.

        Args:
            identity: what decides the result, in JSON types.

        Raises:
            OutputError: another run is unfinished here, another process holds it, or the folder is not Tawny's.
        """
        self.check()
        identity = json.loads(json.dumps(identity))
        other = bool(self.differing(identity))
        # Begun with --overwrite, the same command has it again: it goes on, as its interruption promised.
        if self.found and not other and (self.consent or not overwrite):
            self._lock = durable.locked(self.path / _LOCK, self.out)
            for path in self.path.glob("*.tmp"):  # half written when the run was killed; a state is large
                if path.is_file():
                    path.unlink()
            return
        if not overwrite and self.worth_keeping():
            self.refuse_other(identity)
        if self.out.exists() and not overwrite:  # what the other run was allowed, this one is not
            raise OutputError(f"{self.out} exists; choose another --out or pass --overwrite")
        with durable.writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = durable.locked(self.path / _LOCK, self.out)
            if self.found or self._half_gone:
                self._clear()
        self.start(identity, overwrite=overwrite)

    @contextmanager
    def unless_empty(self) -> Iterator[None]:
        """Inside, behind `open`: a run that is refused before it made anything worth keeping leaves nothing behind."""
        try:
            yield
        except TawnyError:
            if not self.worth_keeping():
                self.discard()
            raise

    def discard(self) -> None:
        """Remove what Tawny made; what came in since it was checked stays. Only the process that opened it does."""
        if self._lock is None:
            return
        self._clear()
        (self.path / _LOCK).unlink(missing_ok=True)
        self.__exit__()
        with suppress(OSError):
            self.path.rmdir()

    def _clear(self) -> None:
        """The journal goes last, and says first that it does: what is half removed must not be gone on with."""
        with suppress(OutputError):
            self.start({}, discarding=True)
        for path in self.path.iterdir():
            if path.name in (JOURNAL, _LOCK) or not _fits(path.name, self._ours):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        (self.path / JOURNAL).unlink(missing_ok=True)
        self.state, self._half_gone = {}, False

    def worth_keeping(self) -> bool:
        """Whether there is something that only a user may throw away."""
        names = [path.name for path in self.path.glob("*") if not path.name.startswith((JOURNAL, _LOCK))]
        return any(_fits(name, self._kept) for name in names)


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(_compact(state)).hexdigest()


def _differences(before: Any, now: Any, what: str) -> list[str]:
    """Where two values of JSON types differ, in words. A model that was only moved is the same one."""
    if isinstance(before, dict) and isinstance(now, dict):
        if "files" in before and "files" in now:
            if before["files"] != now["files"] and before["folder"] != now["folder"]:
                return [f"{what} was {before['folder']}, now {now['folder']}"]
            return _differences(before["files"], now["files"], what)
        return [
            line
            for key in dict.fromkeys([*before, *now])
            for line in _differences(before.get(key), now.get(key), f"{what} {key}")
        ]
    if before == now:
        return []
    shown = [json.dumps(value) for value in (before, now)]
    if any(len(text) > 40 for text in shown):
        return [f"{what} changed"]
    return [f"{what} was {shown[0]}, now {shown[1]}"]


def refuse_foreign(folder: Path, ours: Iterable[str]) -> list[str]:
    """The names in a folder, none where there is none; an OutputError where no pattern of `ours` fits one of them."""
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise OutputError(f"{folder} exists and is not a folder; move it away or choose another --out")
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if not _fits(name, ours):
            raise OutputError(
                f"{folder} holds {name!r}, which no run of Tawny put there; move it away or choose another --out"
            )
    return names


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


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
