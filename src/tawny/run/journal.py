"""How far a pruning run has come: its walks through the blocks, in the journal of `OUT.partial` (run/resumable.py).

A commit makes block files and hidden states durable first, then replaces the journal. Between two commits nothing is
relied on; it is done again, to the same bytes. A commit costs what writing the hidden states costs, so one is made
only when the work since the last one is worth it: `SHARE` bounds what commits may add to a run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from tawny.errors import OutputError
from tawny.model.durable import writing
from tawny.model.streams import Stream
from tawny.process_group import ProcessGroup
from tawny.run.ranks import Ranks
from tawny.run.resumable import JOURNAL, Resumable

# The walk of a search, which solves at several levels; and the choice of whole blocks that leave.
LEVELS = "levels"
BLOCKS = "blocks"
# What commits may add to the time of the work between them.
SHARE = 0.02


@final
class Journal(Resumable):
    """The journal of one unfinished output in `OUT.partial`; an OutputError if one is there and cannot be read.

    Attributes:
        start_over: clears what another run left; None: another run is refused.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder, "partial")
        self.identity: dict[str, Any] = {}
        self.start_over: Callable[[], None] | None = None
        self._ranks: ProcessGroup = Ranks(alone=True)
        self._spent = 0.0
        self._last = time.perf_counter()
        self.reload()

    def join(self, ranks: ProcessGroup, folder: Path | None) -> None:
        """Keep this journal together with other processes: each its own hidden states, rank 0 all else."""
        self._ranks, self.writes = ranks, ranks.first
        if ranks.several:
            self.folder = folder
            # Hidden states of the others belong in folders that rank 0 has made.
            ranks.wait()

    @property
    def suffix(self) -> str:
        """Tells the files of this process from those of others."""
        return f".rank{self._ranks.rank}" if self._ranks.several else ""

    def reload(self) -> None:
        self.load()
        if self.folder is None:
            return
        left = [path for name in ("blocks", "hidden") for path in (self.folder / name).glob("*.safetensors")]
        if left and not self.found:
            raise OutputError(
                f"{self.folder} holds {len(left)} files of an unfinished run but no {JOURNAL}; put it back, or pass "
                "--overwrite to start over"
            )
        for walk in self._walks.values():
            for path in (self.folder / "hidden" / name for name in walk["hidden"].values()):
                if not path.is_file():
                    raise OutputError(
                        f"{path}, which {JOURNAL} names, is missing; put it back, or pass --overwrite to start over"
                    )

    def require(self, what: str, value: Any) -> None:
        """Say what this run is; start over, or raise an OutputError, if the unfinished one differs in it."""
        self.identity[what] = json.loads(json.dumps(value))
        if self.start_over is not None and self.differing({what: self.identity[what]}):
            self.start_over()
            self.state = {}
        self.refuse_other({what: self.identity[what]})

    @classmethod
    def to_go_on_with(cls, folder: Path, overwrite: bool) -> Journal | None:
        """The journal in a folder; None where `--overwrite` clears it, unread or because its run began without.

        Begun with --overwrite, the same command has it again: it goes on, as its interruption promised.
        """
        try:
            journal = cls(folder)
        except OutputError:
            if overwrite:
                return None
            raise
        return None if overwrite and not journal.consent else journal

    def begin(self, **facts: Any) -> None:
        """From here on there is something to go on with."""
        if not self.found:
            self.start(self.identity, walks={}, **facts)
        self.state["resumed"] = self.state.get("resumed", -1) + 1
        self.save()

    @property
    def _walks(self) -> dict[str, Any]:
        walks: dict[str, Any] = self.state.get("walks", {})
        return walks

    @property
    def has_progress(self) -> bool:
        """Whether anything is finished that would be lost."""
        return bool(self._walks or self.state.get("once"))

    def kept_words(self) -> str:
        """`3 finished blocks`, for a person."""
        pruned, profiled, solved = (self.walk(name)[0] for name in ("prune", "profile", LEVELS))
        if not pruned and not profiled and self.state.get("once"):
            return "the results of a search"
        if (chosen := self.walk(BLOCKS)[0]) and not pruned:
            return f"choices of {chosen} block{'s' * (chosen != 1)}"
        if solved and not pruned:
            return f"{solved} block{'s' * (solved != 1)} solved at each level"
        count, kind = (pruned, "finished") if pruned else (profiled, "profiled")
        return f"{count} {kind} block{'s' * (count != 1)}"

    def walk(self, name: str) -> tuple[int, dict[str, Any]]:
        """How many blocks a walk has finished, and what it had found by then."""
        kept = self._walks.get(name)
        return (0, {}) if kept is None else (int(kept["blocks"]), dict(kept["found"]))

    def hidden(self, walk: str, stream: str = "pruned") -> Path | None:
        """The hidden states to go on with, or None at the beginning."""
        kept = self._walks.get(walk, {"hidden": {}})["hidden"]
        return self._path(str(kept[stream])) if stream in kept else None

    def _path(self, name: str) -> Path:
        """Of hidden states, by the name that rank 0 gave them, the file of this rank."""
        assert self.folder is not None
        return self.folder / "hidden" / name.replace(".rank0.", f"{self.suffix}.")

    def hidden_path(self, walk: str, stream: str, depth: int) -> Path:
        assert self.folder is not None
        return self.folder / "hidden" / f"{walk}.{stream}{self.suffix}.{depth:05d}.safetensors"

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
