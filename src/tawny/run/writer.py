"""A checkpoint while it is being written: one file for each block, then shards, configuration and pages beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch

from tawny.errors import ModelError, one_line
from tawny.model import durable
from tawny.model.checkpoint import INDEX, Checkpoint
from tawny.model.companions import companions
from tawny.model.durable import writing
from tawny.model.shards import SHARD_BYTES, index_of, shard_names
from tawny.model.tensorfile import TensorWriter, entries, merge, natural, write_tensors
from tawny.precision import cast
from tawny.run.place import Workplace, place_of


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


ENCODED_PART = (
    ".encoded"  # ends the name of the file of a block that holds what was solved for another runtime
)


@final
class CheckpointWriter:
    """Writes a checkpoint in the place of a run.

    Args:
        place: where; it is claimed.
        anew: nothing that an earlier run wrote is taken over.

    Attributes:
        folder: what will be OUT, once it is delivered.
    """

    def __init__(self, place: Workplace, *, anew: bool = False) -> None:
        self.place = place
        self.folder = place.steps / "checkpoint"
        self._blocks = place.steps / "blocks"
        self._writer = ThreadPoolExecutor(1, "writing")
        self._behind: list[tuple[Path, Future[None]]] = []
        place.on_close(self._writer.shutdown)
        with writing(place.out):
            for folder in (self._blocks, self.folder):
                if anew and folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir(parents=True, exist_ok=True)

    def block_path(self, name: str) -> Path:
        return self._blocks / f"{name}.safetensors"

    def write_block(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """One file, durable before it has its name; a thread waits for the disk, see `settle`."""
        path = self.block_path(name)
        temporary = durable.temporary(path)
        with writing(path), durable.or_gone(temporary):
            write_tensors(temporary, tensors)
        self._behind.append((path, self._writer.submit(durable.replace, temporary, path)))

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
        self,
        name: str,
        checkpoint: Checkpoint,
        keys: Sequence[str],
        dtype: torch.dtype | None,
        instead: Mapping[str, torch.Tensor],
    ) -> None:
        """Tensors that are in no block, copied a tensor at a time; floats in `dtype`, if there is one.

        Args:
            instead: tensors that take the place of some, by their key.
        """
        path = self.block_path(name)
        with writing(path), durable.beside(path) as temporary:
            if dtype is None and not instead and all(key in checkpoint.places for key in keys):
                merge(temporary, [(checkpoint.files[key], key) for key in keys])
                return
            kinds = {key: checkpoint.dtype_of(key) for key in keys}
            specs = {
                key: (dtype if dtype and kind.is_floating_point else kind, checkpoint.shapes[key])
                for key, kind in kinds.items()
            }
            with TensorWriter(temporary, specs) as writer:
                for key in keys:
                    value = instead[key] if key in instead else checkpoint.read([key])[key]
                    writer.write(key, cast(value, specs[key][0], key))

    def write_encoded(self, name: str) -> None:
        """Put what blocks were encoded as, if they were, into one file."""
        parts = sorted(self._blocks.glob(f"*{ENCODED_PART}.safetensors"))
        path = self.folder / name
        if parts and not path.exists():
            with writing(path), durable.beside(path) as temporary:
                merge(temporary, [(part, key) for part in parts for key in entries(part)])

    def carry(self, source: Path, also: Sequence[str] = ()) -> None:
        """Copy configuration, tokenizer and licence files of `source`, and those of the names `also` that it has.

        The configuration no longer says how the source was quantised: weights are written as floats.

        Raises:
            CheckpointError: one of them is a link that leads out of `source`.
        """
        with writing(self.folder):
            for path in companions(source, also):
                copy = self.folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
            path = self.folder / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("quantization_config", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def write_text(self, name: str, text: str) -> None:
        with writing(self.folder / name):
            (self.folder / name).write_text(text, encoding="utf-8")

    def plan_shards(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Which tensors of which block files become which shard: `[{file, bytes, tensors: [[block, key], …]}]`."""
        self.settle()
        shards: list[dict[str, Any]] = [{"bytes": 0, "tensors": []}]
        for name in names:
            headers = entries(self.block_path(name))
            for key in sorted(headers, key=natural):
                if shards[-1]["tensors"] and shards[-1]["bytes"] + headers[key].bytes > SHARD_BYTES:
                    shards.append({"bytes": 0, "tensors": []})
                shards[-1]["tensors"].append([name, key])
                shards[-1]["bytes"] += headers[key].bytes
        for file, shard in zip(shard_names(len(shards)), shards, strict=True):
            shard["file"] = file
        return shards

    def assemble(self, shards: Sequence[Mapping[str, Any]], step: Callable[[], None] = lambda: None) -> int:
        """Merge the block files into the planned shards; returns the bytes of all tensors.

        A block file goes as soon as the shards it went into are durable, so that no more than one shard is on the
        disk twice; shards that are there already were finished by an earlier, interrupted run.
        """
        last = {block: number for number, shard in enumerate(shards) for block, _ in shard["tensors"]}
        with writing(self.folder):
            for number, shard in enumerate(shards):
                path = self.folder / shard["file"]
                if not path.exists():
                    with durable.beside(path) as temporary:
                        merge(temporary, [(self.block_path(block), key) for block, key in shard["tensors"]])
                for block in [block for block, end in last.items() if end == number]:
                    self.block_path(block).unlink(missing_ok=True)
                step()
            total = sum(int(shard["bytes"]) for shard in shards)
            if len(shards) > 1:
                keys = {shard["file"]: [key for _, key in shard["tensors"]] for shard in shards}
                (self.folder / INDEX).write_bytes(index_of(keys, total))
        return total

    def deliver(self) -> None:
        """Give the finished checkpoint the name OUT."""
        self.place.deliver(self.folder)


@contextmanager
def written_at_once(
    out: str | Path, source: str | Path, folder: Path, *, overwrite: bool
) -> Iterator[CheckpointWriter]:
    """A checkpoint of which nothing is kept until all of it is written and delivered.

    Args:
        source: the model that is read, as it was named.
        folder: where it lies.
    """
    with Workplace(place_of(out)) as place:
        reads = [("model", folder), ("model", Path(source).expanduser())]
        place.claim(overwrite=overwrite, reads=reads, continues=False)
        yield CheckpointWriter(place)
