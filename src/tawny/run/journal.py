"""What a run has finished: `journal.json` in `OUT.partial`, from which the same command continues.

It says which run this is (its identity: everything that the bytes depend on), whether replacing OUT was agreed to, which results
were made once, and how far each walk through the blocks has come. Files are durable before the journal names them, and the
journal is replaced by one rename. Whatever kills the process, the journal names only what is whole on the disk.

A commit of a walk makes block files and hidden states durable first. Between two commits nothing is relied on; it is done again,
to the same bytes. A commit costs what writing the hidden states costs, so one is made only when the work since the last one is
worth it: `SHARE` bounds what commits may add to a run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, final

from tawny.errors import OutputError
from tawny.model import durable
from tawny.model.durable import writing
from tawny.model.streams import Stream
from tawny.process_group import ProcessGroup
from tawny.run.ranks import Ranks

JOURNAL, STEPS = "journal.json", "steps"
_VERSION = 3
# The walk of a search, which solves at several levels; and the choice of whole blocks that leave.
LEVELS = "levels"
BLOCKS = "blocks"
# What commits may add to the time of the work between them.
SHARE = 0.02
# In `steps`, what is no loss by itself: parts of what is being made.
_PASSING = ("blocks", "hidden", "checkpoint", "levels", "finalists", "training", "unpacked", "template.gguf")

T = TypeVar("T")


@final
class Journal:
    """The journal of one unfinished run. Without a folder nothing is kept and nothing is found.

    Attributes:
        state: `identity`, `overwrite`, `once`, `walks`, in JSON types; empty before a run begins.
        identity: what this run has said of itself so far.
        writes: whether this process is the one that writes the journal.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.writes = folder, True
        self.state: dict[str, Any] = {}
        self.identity: dict[str, Any] = {}
        self._ranks: ProcessGroup = Ranks(alone=True)
        self._spent = 0.0
        self._last = time.perf_counter()

    def join(self, ranks: ProcessGroup, folder: Path | None) -> None:
        """Keep this journal together with other processes: each its own hidden states, rank 0 all else."""
        self._ranks, self.writes = ranks, ranks.first
        if ranks.several:
            self.folder = folder
            # Hidden states of the others belong in folders that rank 0 has made.
            ranks.wait()

    def steps(self, leaving: ExitStack) -> Path:
        """The folder of what steps make; where nothing is kept, one that goes with `leaving`."""
        if self.folder is None:
            return Path(leaving.enter_context(TemporaryDirectory(prefix="tawny-")))
        return self.folder / STEPS

    # --- the file ----------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Read the file.

        Raises:
            OutputError: it is damaged, of another version, or missing beside what it should name; or a file that it names is.
        """
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
            steps = self.folder / STEPS
            if left := [
                path for name in ("blocks", "hidden") for path in (steps / name).glob("*.safetensors")
            ]:
                raise OutputError(
                    f"{self.folder} holds {len(left)} files of an unfinished run but no {JOURNAL}; put it back, or pass "
                    "--overwrite to start over"
                ) from None
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is damaged ({error}); what is finished beside it is untouched: put back a good copy, or pass "
                "--overwrite to start over"
            ) from error
        if state.get("version") != _VERSION:
            raise OutputError(
                f"{path} was written by another version of Tawny; finish it with that one, or move the folder away to "
                "start over"
            )
        if state.get("discarding"):
            return
        self.state = state
        for walk in self._walks.values():
            for hidden in (self._hidden / name for name in walk["hidden"].values()):
                if not hidden.is_file():
                    raise OutputError(
                        f"{hidden}, which {JOURNAL} names, is missing; put it back, or pass --overwrite to start over"
                    )

    def save(self) -> None:
        if self.folder is None or not self.writes:
            return
        whole = {"sha256": _checksum(self.state), "run": self.state}
        path = self.folder / JOURNAL
        with writing(path):
            durable.write(path, _compact(whole) + b"\n")

    # --- which run it is ---------------------------------------------------------------------------------------

    @property
    def found(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self.state)

    @property
    def consent(self) -> bool:
        """Whether the run that is unfinished here may replace OUT."""
        return bool(self.state.get("overwrite"))

    def differing(self, what: str, value: Any) -> list[str]:
        """In what the unfinished run differs, in words."""
        plain = json.loads(json.dumps(value))
        return _differences(self.state["identity"].get(what), plain, what) if self.found else []

    def require(self, what: str, value: Any) -> None:
        """Say what this run is, in JSON types.

        Raises:
            OutputError: the unfinished one differs in it.
        """
        if differing := self.differing(what, value):
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise OutputError(
                f"{self.folder} holds an unfinished run that differs ({'; '.join(differing[:3])}{more}): repeat that command "
                "to go on with it, choose another --out, or pass --overwrite to discard it"
            )
        self.identity[what] = json.loads(json.dumps(value))

    def begin(self, **facts: Any) -> None:
        """From here on there is something to go on with."""
        if not self.found:
            self.start(identity=self.identity, walks={}, **facts)
        self.state["resumed"] = self.state.get("resumed", -1) + 1
        self.save()

    def start(self, **facts: Any) -> None:
        """Replace what was unfinished by a run that has finished nothing."""
        self.state = {"version": _VERSION, **facts}
        self.save()

    # --- what is finished --------------------------------------------------------------------------------------

    @property
    def has_progress(self) -> bool:
        """Whether anything is finished that would be lost."""
        if self._walks or self.state.get("once"):
            return True
        steps = None if self.folder is None or not self.found else self.folder / STEPS
        if steps is None or not steps.is_dir():
            return False
        whole = (path for path in steps.iterdir() if path.suffix not in (".partial", ".tmp"))
        return (
            any(path.name not in _PASSING for path in whole)
            or any(steps.glob("training/state*.safetensors"))
            or any(steps.glob(f"*.partial/{JOURNAL}"))
        )

    def kept_words(self) -> str:
        """`3 finished blocks`, for a person."""
        pruned, profiled, solved = (self.walk(name)[0] for name in ("prune", "profile", LEVELS))
        if not pruned and not profiled and self.state.get("once"):
            return f"the results of a {'fit' if self.state['identity'].get('verb') == 'fit' else 'search'}"
        if (chosen := self.walk(BLOCKS)[0]) and not pruned:
            return f"choices of {chosen} block{'s' * (chosen != 1)}"
        if solved and not pruned:
            return f"{solved} block{'s' * (solved != 1)} solved at each level"
        count, kind = (pruned, "finished") if pruned else (profiled, "profiled")
        return f"{count} {kind} block{'s' * (count != 1)}"

    def once(self, name: str, make: Callable[[], T]) -> T:
        """A result, in JSON types, that is made once and kept."""
        if self.folder is None:
            return make()
        kept = self.state.setdefault("once", {})
        if name not in kept:
            kept[name] = make()
            self.save()
        value: T = kept[name]
        return value

    @property
    def suffix(self) -> str:
        """Tells the files of this process from those of others."""
        return f".rank{self._ranks.rank}" if self._ranks.several else ""

    @property
    def _walks(self) -> dict[str, Any]:
        walks: dict[str, Any] = self.state.get("walks", {})
        return walks

    @property
    def _hidden(self) -> Path:
        assert self.folder is not None
        return self.folder / STEPS / "hidden"

    def walk(self, name: str) -> tuple[int, dict[str, Any]]:
        """How many blocks a walk has finished, and what it had found by then."""
        kept = self._walks.get(name)
        return (0, {}) if kept is None else (int(kept["blocks"]), dict(kept["found"]))

    def hidden(self, walk: str, stream: str) -> Path | None:
        """The hidden states to go on with, or None at the beginning."""
        kept = self._walks.get(walk, {"hidden": {}})["hidden"]
        return self._path(str(kept[stream])) if stream in kept else None

    def _path(self, name: str) -> Path:
        """Of hidden states, by the name that rank 0 gave them, the file of this rank."""
        return self._hidden / name.replace(".rank0.", f"{self.suffix}.")

    def hidden_path(self, walk: str, stream: str, depth: int) -> Path:
        return self._hidden / f"{walk}.{stream}{self.suffix}.{depth:05d}.safetensors"

    def due(self) -> bool:
        """Whether enough has been done since the last commit to be worth one."""
        enough = time.perf_counter() - self._last >= self._spent / SHARE
        return self.folder is not None and self._ranks.same(enough)

    def commit(
        self, walk: str, blocks: int, found: Mapping[str, Any], streams: Mapping[str, Stream | None]
    ) -> None:
        """`blocks` blocks of a walk are finished; what they left in files is durable already.

        Args:
            found: what the walk has to remember, in JSON types.
            streams: what enters block `blocks`, by name; none when the walk is over.
        """
        if self.folder is None:
            return
        start = time.perf_counter()
        paths: dict[str, Path] = {}
        for name, stream in streams.items():
            if stream is not None:
                paths[name] = self.hidden_path(walk, name, stream.depth)
                with writing(paths[name]):
                    paths[name].parent.mkdir(parents=True, exist_ok=True)
                    stream.save(paths[name])
        self._ranks.wait()  # what the journal names must be there on every rank
        before = self._walks.get(walk, {"hidden": {}})["hidden"]
        names = {name: path.name for name, path in paths.items()}
        # A copy, since what was found goes on growing.
        self._walks[walk] = {"blocks": blocks, "found": json.loads(json.dumps(found)), "hidden": names}
        self.save()
        self._ranks.wait()
        for path in set(map(self._path, before.values())) - set(paths.values()):
            path.unlink(missing_ok=True)
        self._last = time.perf_counter()
        self._spent = self._last - start

    def forget(self, walk: str) -> None:
        """A walk whose results are no longer needed."""
        if walk in self._walks:
            left = self._walks.pop(walk)["hidden"].values()
            self.save()
            for path in map(self._path, left):
                path.unlink(missing_ok=True)


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
