"""A checkpoint folder while it is being written: one file for each block, final shards at the end, one rename.

Everything unfinished lives in `OUT.partial/`: `blocks/` (a file a block), `hidden/` (what a run needs to go on),
`checkpoint/` (what will be `OUT`) and the journal of the run. `OUT` appears by one rename when it is complete, so an
unfinished folder never looks finished. One process at a time may hold it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tawny.errors import ModelError, OutputError, one_line
from tawny.model import durable
from tawny.model.checkpoint import INDEX, Checkpoint
from tawny.model.durable import locked, writing
from tawny.model.quantised import BESIDE
from tawny.model.shards import SHARD_BYTES, index_of, shard_names
from tawny.model.tensorfile import TensorWriter, entries, merge, natural, write_tensors
from tawny.precision import cast
from tawny.run.resumable import JOURNAL, named, refuse_foreign

# Everything that is not weights travels with the model, except what describes weights of another format.
_CARRIED = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "*.py")
# What sentence-transformers keeps of its modules, such as 1_Pooling/config.json, and a tokenizer of its further templates.
_PARTS = ("[0-9]_*/*.json", "[0-9]_*/*.safetensors", "additional_chat_templates/*.jinja")
_NOT_CARRIED = {INDEX, "run.json", "recipe.yaml", "recover.json", "slim.json", *BESIDE}
# What a folder may hold that a run may throw away.
MEASURED = "measured.json"  # of `tawny fit`, as are levels and finalists
_FILES = {name + more for name in (JOURNAL, MEASURED) for more in ("", ".tmp")}
_OURS = {"lock", "blocks", "hidden", "checkpoint", "replaced", "levels", "finalists"} | _FILES


def unfinished(out: Path) -> Path:
    """Where what will be `out` is written: `OUT.partial`, beside it."""
    out = named(out)
    return out.with_name(out.name + ".partial")


def check_savable(model: Any) -> None:
    """Refuse a live model whose settings transformers would not write beside its weights.

    Raises:
        ModelError: its generation config contradicts itself.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or not hasattr(model, "save_pretrained") or not model.can_generate():
        return
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"the live model cannot be saved: {one_line(error)}; change model.generation_config, or leave out=… out"
        ) from error


def refuse_unfinished(out: Path) -> None:
    """Raise an OutputError where work of hours may lie in `OUT.partial`, which a new run would clear."""
    work = unfinished(out)
    if (work / JOURNAL).exists():
        raise OutputError(
            f"{work} holds an unfinished run: repeat its command to go on with it, choose another --out, or pass --overwrite "
            "to discard it"
        )


def check_place(
    out: Path, *, overwrite: bool = False, source: Path | None = None, given: str | Path | None = None
) -> None:
    """Raise what `OutputFolder` would where OUT is written only after long work; what is unfinished there stays."""
    if not overwrite:
        refuse_unfinished(out)
    fresh = not unfinished(out).exists()
    folder = OutputFolder(out, overwrite=overwrite, source=source, given=given, keep=True)
    folder.discard() if fresh else folder.release()


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


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths name one file or folder: by another case on some disks, or mounted twice, they may."""
    try:
        return one.samefile(other)
    except OSError:  # one is not there
        return one.resolve() == other.resolve()


class OutputFolder:
    """A checkpoint folder being written; see the top of this file.

    Args:
        out: the folder to be.
        overwrite: replace a finished `out`, once the new one is complete.
        source: the model's folder, which is never written to, nor anything around it replaced.
        given: the model as it was named; the same holds for a file that the folder was made of.
        keep: go on with what lies in `OUT.partial`; otherwise it is thrown away.

    Raises:
        OutputError: `OUT` exists, or an unfinished run that is not kept, and `overwrite` is false; it holds `source`,
            another process writes it, or nothing can be written there.
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        source: Path | None = None,
        given: str | Path | None = None,
        keep: bool = False,
    ) -> None:
        self.out = out = named(out)
        self.work = unfinished(out)
        self.partial = self.work / "checkpoint"
        self._writer = ThreadPoolExecutor(1, "writing")
        self._behind: list[tuple[Path, Future[None]]] = []
        for read in (source, given and Path(given).expanduser()):
            if read and read.exists():
                spare((out, self.work), read, "model")
        self._mend()
        if out.is_symlink() and not out.exists():
            raise OutputError(
                f"{out} is a link to nothing ({out.readlink()}); mount what it names or choose another --out"
            )
        if out.exists():
            if not overwrite:
                raise OutputError(f"{out} exists; choose another --out or pass --overwrite")
            if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
                raise OutputError(f"{out} exists and is not a checkpoint folder; refusing to replace it")
        refuse_foreign(self.work, _OURS)
        if not keep and not overwrite:
            refuse_unfinished(out)
        with writing(out):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.work / "lock", out)
            if not keep:
                self._clear()
            self._make_folders()
            for left in self.work.glob("*/*.tmp"):
                left.unlink()

    def _mend(self) -> None:
        """Finish what a process that died inside `finish` left: an old `OUT` set aside, or a folder already renamed."""
        replaced = self.work / "replaced"
        with contextlib.suppress(OSError):
            if replaced.exists() and not self.out.exists():
                replaced.replace(self.out)
            elif self.out.exists() and (self.work / JOURNAL).exists() and not self.partial.exists():
                shutil.rmtree(self.work)

    def start_over(self) -> None:
        """Throw away what is unfinished, but hold the folder."""
        with writing(self.work):
            self._clear()
            self._make_folders()

    def _make_folders(self) -> None:
        for name in ("blocks", "hidden", "checkpoint"):
            (self.work / name).mkdir(exist_ok=True)

    def _clear(self) -> None:
        # The journal goes first: without it nothing that is left can be taken for more than it is.
        (self.work / JOURNAL).unlink(missing_ok=True)
        for name in _FILES:
            (self.work / name).unlink(missing_ok=True)
        for name in _OURS - _FILES - {"lock"}:
            shutil.rmtree(self.work / name, ignore_errors=True)

    def block_path(self, name: str) -> Path:
        return self.work / "blocks" / f"{name}.safetensors"

    def write_block(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """One file, durable before it has its name; a thread waits for the disk, see `settle`."""
        path = self.block_path(name)
        made = durable.temporary(path)
        with writing(path), durable.or_gone(made):
            write_tensors(made, tensors)
        self._behind.append((path, self._writer.submit(durable.replace, made, path)))

    def settle(self) -> None:
        """Wait until every block that was written is durable.

        Raises:
            OutputError: one of them could not be.
        """
        while self._behind:
            path, waiting = self._behind.pop(0)
            with writing(path):
                waiting.result()

    def write_outside(
        self, name: str, checkpoint: Checkpoint, keys: Sequence[str], dtype: torch.dtype | None
    ) -> None:
        """Tensors that are in no block, copied a tensor at a time; floats in `dtype`, if there is one."""
        path = self.block_path(name)
        with writing(path), durable.beside(path) as temporary:
            if dtype is None and all(key in checkpoint.places for key in keys):
                merge(temporary, [(checkpoint.files[key], key) for key in keys])
                return
            kinds = {key: checkpoint.dtype_of(key) for key in keys}
            specs = {
                key: (dtype if dtype and kind.is_floating_point else kind, checkpoint.shapes[key])
                for key, kind in kinds.items()
            }
            with TensorWriter(temporary, specs) as writer:
                for key in keys:
                    writer.write(key, cast(checkpoint.read([key])[key], specs[key][0], key))

    def carry(self, source: Path, also: Sequence[str] = ()) -> None:
        """Copy configuration, tokenizer and licence files of `source`, and those of the names `also` that it has.

        The configuration no longer says how the source was quantised: weights are written as floats.
        """
        # A link to nothing, such as a cleaned cache leaves, is no file.
        found = {p.name for pattern in _CARRIED for p in source.glob(pattern) if p.is_file()} - _NOT_CARRIED
        named = {name for name in also if (source / name).is_file()}
        with writing(self.partial):
            for name in {name for name in found if not name.endswith(".index.json")} | named:
                shutil.copyfile(source / name, self.partial / name)
            for part in (part for pattern in _PARTS for part in source.glob(pattern)):
                if part.is_file():
                    (self.partial / part.parent.name).mkdir(exist_ok=True)
                    shutil.copyfile(part, self.partial / part.parent.name / part.name)
            path = self.partial / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("quantization_config", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def write_text(self, name: str, text: str) -> None:
        with writing(self.partial / name):
            (self.partial / name).write_text(text, encoding="utf-8")

    def plan_shards(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Which tensors of which block files become which shard: `[{file, bytes, tensors: [[block, key], …]}]`."""
        self.settle()
        shards: list[dict[str, Any]] = [{"bytes": 0, "tensors": []}]
        for name in names:
            found = entries(self.block_path(name))
            for key in sorted(found, key=natural):
                if shards[-1]["tensors"] and shards[-1]["bytes"] + found[key].bytes > SHARD_BYTES:
                    shards.append({"bytes": 0, "tensors": []})
                shards[-1]["tensors"].append([name, key])
                shards[-1]["bytes"] += found[key].bytes
        for file, shard in zip(shard_names(len(shards)), shards, strict=True):
            shard["file"] = file
        return shards

    def assemble(self, shards: Sequence[Mapping[str, Any]], step: Callable[[], None] = lambda: None) -> int:
        """Merge the block files into the planned shards; returns the bytes of all tensors.

        A block file goes as soon as the shards it went into are durable, so that no more than one shard is on the
        disk twice; shards that are there already were finished by an earlier, interrupted run.
        """
        last = {block: number for number, shard in enumerate(shards) for block, _ in shard["tensors"]}
        with writing(self.partial):
            for number, shard in enumerate(shards):
                path = self.partial / shard["file"]
                if not path.exists():
                    with durable.beside(path) as temporary:
                        merge(temporary, [(self.block_path(block), key) for block, key in shard["tensors"]])
                for block in [block for block, end in last.items() if end == number]:
                    self.block_path(block).unlink(missing_ok=True)
                step()
            total = sum(int(shard["bytes"]) for shard in shards)
            if len(shards) > 1:
                keys = {shard["file"]: [key for _, key in shard["tensors"]] for shard in shards}
                (self.partial / INDEX).write_bytes(index_of(keys, total))
        return total

    def finish(self) -> None:
        """Give the folder its name; what `--overwrite` replaces goes only now."""
        with writing(self.out):
            for path in [p for p in self.partial.rglob("*") if p.is_file()] + [self.partial]:
                durable.sync(path)
            old = self.work / "replaced"
            if self.out.exists():
                self.out.replace(old)
            self.partial.replace(self.out)
            durable.sync(self.out.absolute().parent)
        self.discard()

    def release(self) -> None:
        """Let another process have the unfinished folder."""
        self._writer.shutdown()
        self._lock.close()

    def discard(self) -> None:
        """Throw away what is unfinished, but not what `finish` had only set aside."""
        self.release()
        self._mend()
        with contextlib.suppress(OSError):
            (self.work / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
