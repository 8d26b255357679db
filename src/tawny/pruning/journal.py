"""What of a run is done, so that the same command goes on where another one was stopped.

`OUT.partial/journal.json` says which run this is (its identity) and how far its walks through the blocks have come.
A commit makes block files and hidden states durable first, then replaces the journal by one rename: whatever kills
the process, the journal names only what is whole on the disk, and going on from there gives the bytes of a run that
was never stopped. Between two commits nothing is relied on; it is done again.

The identity holds everything the bytes depend on: the recipe; the model, as the
names, sizes, times and headers of its files (reading all weights to hash them would cost minutes); the tokens; the
sources of Tawny that compute and the libraries' versions; processor, threads, kernel and dtype. If any of it differs, the
journal refuses and says what.

A commit costs what writing the hidden states costs, so one is made only when the work since the last one is worth it:
`SHARE` bounds what commits may add to a run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tawny.errors import OutputError
from tawny.model import durable
from tawny.model.durable import writing
from tawny.model.output import JOURNAL
from tawny.model.streams import Samples, Stream
from tawny.pruning.ranks import Ranks

VERSION = 1
# The walk of a search, which solves at several levels.
LEVELS = "levels"
# What commits may add to the time of the work between them.
SHARE = 0.02
# The rooms whose code decides bytes.
_DECIDING = (
    "allocation",
    "calibration",
    "kernels",
    "model",
    "pruning",
    "solvers",
    "patterns.py",
    "precision.py",
    "recipe",
    "search",
)

_SOURCES = {".py", ".cpp", ".h"}

T = TypeVar("T")


class Journal:
    """The journal of one unfinished output; without a folder nothing is kept and nothing is found.

    Args:
        folder: `OUT.partial`, or None.

    Raises:
        OutputError: there is an unfinished run whose journal cannot be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.state: dict[str, Any] = {}
        self.identity: dict[str, Any] = {}
        self._ranks = Ranks(alone=True)
        self._spent = 0.0
        self._last = time.perf_counter()
        self.reload()

    def join(self, ranks: Ranks, folder: Path | None) -> None:
        """Keep this journal together with other processes: each its own hidden states, rank 0 all else."""
        self._ranks = ranks
        if ranks.size > 1:
            self.folder = folder
            # Hidden states of the others belong in folders that rank 0 has made.
            ranks.wait()

    @property
    def suffix(self) -> str:
        """Tells the files of this process from those of others."""
        return "" if self._ranks.size == 1 else f".rank{self._ranks.rank}"

    def reload(self) -> None:
        self.state = _read(self.folder) if self.folder is not None else {}

    @property
    def found(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self.state)

    def require(self, what: str, value: Any) -> None:
        """Say what this run is; refuse to go on with another one.

        Raises:
            OutputError: the unfinished run differs in it.
        """
        self.identity[what] = json.loads(json.dumps(value))
        if self.found:
            differing = differences(self.state["identity"].get(what), self.identity[what], what)
            if differing:
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                raise OutputError(
                    f"{self.folder} holds an unfinished run that differs ({'; '.join(differing[:3])}{more}): "
                    "repeat its command to go on with it, or pass --overwrite to start over"
                )

    def begin(self, **facts: Any) -> None:
        """From here on there is something to go on with."""
        if not self.found:
            self.state = {"version": VERSION, "identity": self.identity, "walks": {}, "once": {}, **facts}
        self.state["resumed"] = self.state.get("resumed", -1) + 1
        self._save()

    @property
    def has_progress(self) -> bool:
        """Whether anything is finished that would be lost."""
        return bool(self.state.get("walks") or self.state.get("once"))

    def kept_words(self) -> str:
        """`3 finished blocks`, for a person."""
        pruned, profiled, solved = (self.walk(name)[0] for name in ("prune", "profile", LEVELS))
        if not pruned and not profiled and self.state.get("once"):
            return "the results of a search"
        if solved and not pruned:
            return f"{solved} block{'s' * (solved != 1)} solved at each level"
        count, kind = (pruned, "finished") if pruned else (profiled, "profiled")
        return f"{count} {kind} block{'s' * (count != 1)}"

    def once(self, name: str, make: Callable[[], T]) -> T:
        """A result (in JSON types) that is made once and kept."""
        if name in self.state.get("once", {}):
            kept: T = self.state["once"][name]
            return kept
        made = make()
        if self.folder is not None:
            self.state["once"][name] = made
            self._save()
        return made

    # --- walks -------------------------------------------------------------------------------------

    def walk(self, name: str) -> tuple[int, dict[str, Any]]:
        """How many blocks a walk has finished, and what it had found by then."""
        kept = self.state.get("walks", {}).get(name)
        return (0, {}) if kept is None else (int(kept["blocks"]), dict(kept["found"]))

    def hidden(self, walk: str, stream: str = "pruned") -> Path | None:
        """The hidden states to go on with, or None at the beginning."""
        kept = self.state.get("walks", {}).get(walk)
        if kept is None or stream not in kept["hidden"] or self.folder is None:
            return None
        return self.folder / "hidden" / self._own(str(kept["hidden"][stream]))

    def _own(self, name: str) -> str:
        """The name rank 0 gave, as this rank has it."""
        return name.replace(".rank0.", f"{self.suffix}.") if self._ranks.size > 1 else name

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
            walk: its name.
            blocks: how many are finished.
            found: what the walk has to remember, in JSON types.
            streams: what enters block `blocks`, by name; none when the walk is over.
        """
        if self.folder is None:
            return
        start = time.perf_counter()
        names: dict[str, str] = {}
        for name, stream in streams.items():
            if stream is not None:
                path = self.hidden_path(walk, name, stream.depth)
                with writing(path):
                    stream.save(path)
                names[name] = path.name
        self._ranks.wait()  # what the journal names must be there on every rank
        before = self.state["walks"].get(walk, {"hidden": {}})["hidden"]
        # A copy, since what was found goes on growing.
        kept = json.loads(json.dumps(found))
        self.state["walks"][walk] = {"blocks": blocks, "found": kept, "hidden": names}
        self._save()
        self._ranks.wait()
        for name in {self._own(name) for name in before.values()} - set(names.values()):
            durable.remove(self.folder / "hidden" / name)
        self._last = time.perf_counter()
        self._spent = self._last - start

    def forget(self, walk: str) -> None:
        """A walk whose results are no longer needed."""
        if walk in self.state.get("walks", {}):
            left = self.state["walks"].pop(walk)["hidden"].values()
            self._save()
            for name in left:
                if self.folder is not None:
                    durable.remove(self.folder / "hidden" / name)

    def _save(self) -> None:
        if self.folder is None or not self._ranks.first:
            return
        text = json.dumps(self.state, separators=(",", ":"))
        path = self.folder / JOURNAL
        with writing(path):
            durable.write(
                path, f'{{"sha256":"{hashlib.sha256(text.encode()).hexdigest()}","run":{text}}}\n'.encode()
            )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / JOURNAL
    if not path.exists():
        left = [
            p.name for name in ("blocks", "hidden") for p in sorted((folder / name).glob("*.safetensors"))
        ]
        if left:
            raise OutputError(
                f"{folder} holds {len(left)} files of an unfinished run but no {JOURNAL}; put it back, or pass "
                "--overwrite to start over"
            )
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        whole = json.loads(text)
        state: dict[str, Any] = whole["run"]
        kept = text[text.index('"run":') + 6 : text.rindex("}")]
        if hashlib.sha256(kept.encode()).hexdigest() != whole["sha256"]:
            raise ValueError("its checksum does not fit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is damaged ({error}); the finished blocks beside it are untouched: put back a good copy, or "
            "pass --overwrite to start over"
        ) from error
    if state.get("version") != VERSION:
        raise OutputError(
            f"{path} was written by another version of Tawny; finish it with that one, or pass --overwrite to start over"
        )
    for kept_walk in state["walks"].values():
        for name in kept_walk["hidden"].values():
            if not (folder / "hidden" / name).is_file():
                raise OutputError(
                    f"{folder / 'hidden' / name}, which {JOURNAL} names, is missing; put it back, or pass --overwrite "
                    "to start over"
                )
    return state


def differences(before: Any, now: Any, what: str) -> list[str]:
    """Where two values of JSON types differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in dict.fromkeys([*before, *now])
            for line in differences(before.get(key), now.get(key), f"{what} {key}")
        ]
    if before == now:
        return []
    shown = [json.dumps(value) for value in (before, now)]
    if any(len(text) > 40 for text in shown):
        return [f"{what} changed"]
    return [f"{what} was {shown[0]}, now {shown[1]}"]


# --- identity ----------------------------------------------------------------------------------------------


def model_identity(folder: Path) -> dict[str, Any]:
    """Of each weight file its size, time and header; of the other files that matter their contents."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(min(size, 1 << 28))
            stat = path.stat()
            found[path.name] = [stat.st_size, stat.st_mtime_ns, _hash(header)]
        elif path.suffix in (".json", ".model", ".txt", ".jinja") and path.is_file():
            found[path.name] = _hash(path.read_bytes())
    return found


def tensor_digest(tensor: Tensor) -> hashlib._Hash:
    """SHA-256 of a tensor's bytes and shape."""
    digest = hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(str(list(tensor.shape)).encode())
    return digest


def tokens_identity(samples: Samples | None) -> str | None:
    if samples is None:
        return None
    digest = tensor_digest(samples.tokens)
    if samples.mask is not None:
        digest.update(samples.mask.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def code_identity() -> dict[str, str]:
    """Versions of the libraries, and one hash of the sources that compute."""
    from tawny.machine import versions

    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for name in _DECIDING:
        files = [root / name] if (root / name).is_file() else (root / name).rglob("*")
        for path in sorted(x for x in files if x.suffix in _SOURCES):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {**versions(), "sources": digest.hexdigest()}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
