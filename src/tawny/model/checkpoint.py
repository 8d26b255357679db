"""Lazy safetensors in, a file a block while running, final shards at the end.

`Checkpoint` maps the tensors of a folder to the parameters of a model, both ways, through transformers' own
conversion mapping: names in a file need not be names of modules, and several tensors may form one parameter.
Tensors are copied out of the mapped file at once, so that only what a caller holds counts as memory.
`OutputFolder` writes under `OUT.partial/` and renames at the end: an unfinished folder never looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tawny.errors import CheckpointError, OutputError

SHARD_BYTES = 2_000_000_000
_INDEX = "model.safetensors.index.json"
# Everything that is not weights travels with the model, except what describes weights of another format.
_CARRIED = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "*.py")
_NOT_CARRIED = {_INDEX, "run.json", "allocation.json", "recipe.yaml"}


@dataclass
class Unit:
    """Tensors of the file that are read together, and the parameters they become (usually one and one)."""

    sources: list[str]
    targets: list[str]
    converter: Any = None
    patterns: list[str] = field(default_factory=list)


class Checkpoint:
    """The safetensors of one folder, read lazily.

    Args:
        folder: holds `*.safetensors`, sharded or not.

    Raises:
        CheckpointError: a shard named by the index is missing, or a file is truncated or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.units: list[Unit] = []
        self._unit_of: dict[str, Unit] = {}
        for path in self._shards():
            with self._open(path) as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                    view = file.get_slice(key)
                    self.files[key] = path
                    self.shapes[key] = tuple(view.get_shape())
                    self.dtypes[key] = str(view.get_dtype())

    def _shards(self) -> list[Path]:
        index = self.folder / _INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index} is not a valid safetensors index: {error}") from error
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{self.folder} lacks {len(missing)} of {len(names)} shards named by its index, first {missing[0]}; "
                    "fetch the checkpoint again"
                )
            return [self.folder / name for name in names]
        single = self.folder / "model.safetensors"
        if single.is_file():
            return [single]
        found = sorted(self.folder.glob("*.safetensors"))
        if not found:
            raise CheckpointError(
                f"{self.folder} holds no *.safetensors file; expected a Hugging Face checkpoint"
            )
        return found

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({error}); fetch it again"
            ) from error

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype most weights are stored in."""
        from collections import Counter

        sizes: Counter[str] = Counter()
        for key, shape in self.shapes.items():
            sizes[self.dtypes[key]] += int(torch.Size(shape).numel())
        name = sizes.most_common(1)[0][0]
        known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        if name not in known:
            raise CheckpointError(
                f"{self.folder} stores its weights as {name}; expected float weights: dequantise the model first"
            )
        return known[name]

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Copies of the named tensors, as stored."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.files[key], []).append(key)
        tensors: dict[str, torch.Tensor] = {}
        for path, names in by_file.items():
            with self._open(path) as file:
                for name in names:
                    tensors[name] = file.get_tensor(name).clone()
        return tensors

    def map_to(self, model: Any) -> None:
        """Work out which stored tensors form which parameters and buffers of `model`.

        Raises:
            CheckpointError: parameters of the model are in no file.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        wanted = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = model.base_model_prefix
        grouped: dict[str, Unit] = {}
        for key in sorted(self.files, key=_natural):
            target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if target not in wanted and key in wanted:
                target, pattern = key, None
            if target not in wanted:
                continue
            unit = grouped.setdefault(target, Unit([], [target], by_pattern[pattern] if pattern else None))
            unit.sources.append(key)
            unit.patterns.append(pattern or key)
            if pattern:
                first, *others = by_pattern[pattern].target_patterns
                for other in others:  # one stored tensor may become several parameters (a fused q/k/v)
                    named = target.replace(first, other)
                    if named in wanted and named not in unit.targets:
                        unit.targets.append(named)
        self.units = list(grouped.values())
        self._unit_of = {target: unit for unit in self.units for target in unit.targets}
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        absent = [n for n, _ in model.named_parameters() if n not in self._unit_of and n not in tied]
        if absent:
            raise CheckpointError(
                f"{self.folder} lacks {len(absent)} weights of the model, first {absent[0]!r}; fetch the checkpoint again"
            )
        for unit in self.units:
            stored, expected = self.shapes[unit.sources[0]], tuple(wanted[unit.targets[0]].shape)
            if unit.converter is None and stored != expected:
                raise CheckpointError(
                    f"{unit.sources[0]!r} in {self.folder} has shape {list(stored)}, config.json implies {list(expected)}"
                )

    def units_of(self, prefix: str) -> list[Unit]:
        """Units whose first parameter lies under the module path `prefix`."""
        return [unit for unit in self.units if unit.targets[0].startswith(prefix + ".")]

    def load(self, unit: Unit, model: Any) -> dict[str, torch.Tensor]:
        """Parameters of one unit, by name, in the stored dtype."""
        stored = self.read(unit.sources)
        if unit.converter is None:
            return {unit.targets[0]: stored[unit.sources[0]]}
        from copy import deepcopy

        converter = deepcopy(unit.converter)
        for source, pattern in zip(unit.sources, unit.patterns, strict=True):
            converter.add_tensor(unit.targets[0], source, pattern, stored[source])
        made = converter.convert(unit.targets[0], model=model, config=model.config)
        return {name: (value[0] if isinstance(value, list) else value) for name, value in made.items()}

    def store(
        self, unit: Unit, parameters: Mapping[str, torch.Tensor], model: Any
    ) -> dict[str, torch.Tensor]:
        """The inverse of `load`: tensors under the names of the file.

        Raises:
            CheckpointError: transformers' own inverse mapping does not give back the names that were read.
        """
        if unit.converter is None:
            return {unit.sources[0]: parameters[unit.targets[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        made: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(parameters))
        if set(made) != set(unit.sources):
            raise CheckpointError(
                f"{unit.targets[0]!r} cannot be written back as the {len(unit.sources)} tensors it was read from "
                f"(first {unit.sources[0]!r}); this layout is not supported yet"
            )
        return {name: value.contiguous().clone() for name, value in made.items()}


def _natural(key: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]


class ShardWriter:
    """Collect tensors, write a safetensors shard whenever enough have come, and name them at the end.

    The split depends on sizes and order only, so the same tensors give the same bytes.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._written: list[tuple[Path, list[str], int]] = []

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            size = value.numel() * value.element_size()
            if self._pending and self._pending_bytes + size > self.limit:
                self._flush()
            self._pending[name] = value.contiguous()
            self._pending_bytes += size

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._written):05d}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._written.append((path, list(self._pending), self._pending_bytes))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> int:
        """Write what is left and the index; returns the bytes of all tensors."""
        if self._pending or not self._written:
            self._flush()
        total = sum(size for _, _, size in self._written)
        if len(self._written) == 1:
            self._written[0][0].rename(self.folder / "model.safetensors")
            return total
        weight_map: dict[str, str] = {}
        for number, (path, names, _) in enumerate(self._written, 1):
            final = f"model-{number:05d}-of-{len(self._written):05d}.safetensors"
            path.rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return total


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn a full disk or a read-only place into one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        text = str(error)
        if code == errno.ENOSPC or "No space left" in text or "os error 28" in text:
            free = shutil.disk_usage(what.parent if what.parent.exists() else Path.cwd()).free
            raise OutputError(
                f"{what}: the disk is full ({free / 1e9:.1f} GB free); free some space and run again"
            ) from error
        if code in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(
                f"{what} cannot be written (read-only or no permission); choose another --out"
            ) from error
        raise OutputError(f"{what} cannot be written: {text}") from error


class OutputFolder:
    """A checkpoint folder being written: `OUT.partial/` until `finish`, then `OUT`.

    Raises:
        OutputError: `OUT` exists and `overwrite` is false, or nothing can be written there.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, source: Path | None = None) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.overwrite = overwrite
        if source is not None and out.exists() and out.resolve() == source.resolve():
            raise OutputError(
                f"{out} is the model itself; the source is never overwritten: choose another --out"
            )
        if out.exists() and not overwrite:
            raise OutputError(f"{out} exists; choose another --out or pass --overwrite")
        if out.exists() and not (
            out.is_dir() and (not any(out.iterdir()) or (out / "config.json").is_file())
        ):
            raise OutputError(f"{out} exists and is not a checkpoint folder; refusing to replace it")
        with writing(out):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            (self.partial / "blocks").mkdir()

    def write_block(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """One file, durable before it has its name."""
        path = self.partial / "blocks" / f"{name}.safetensors"
        temporary = path.with_suffix(".tmp")
        with writing(path):
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.rename(path)

    def carry(self, source: Path) -> None:
        """Copy configuration, tokenizer and licence files of `source`."""
        with writing(self.partial):
            for pattern in _CARRIED:
                for path in sorted(source.glob(pattern)):
                    if path.name not in _NOT_CARRIED and not path.name.endswith(".index.json"):
                        shutil.copyfile(path, self.partial / path.name)

    def write_text(self, name: str, text: str) -> None:
        with writing(self.partial / name):
            (self.partial / name).write_text(text, encoding="utf-8")

    def assemble(self, names: Sequence[str], step: Callable[[], None] = lambda: None) -> int:
        """Merge the block files into final shards, in order; returns the bytes of all tensors."""
        with writing(self.partial):
            writer = ShardWriter(self.partial)
            for name in names:
                path = self.partial / "blocks" / f"{name}.safetensors"
                with safe_open(path, framework="pt") as file:
                    keys = sorted(file.keys(), key=_natural)
                    writer.add({key: file.get_tensor(key).clone() for key in keys})
                step()
            total = writer.finish()
            shutil.rmtree(self.partial / "blocks")
        return total

    def finish(self) -> None:
        """Give the folder its name; what `--overwrite` replaces goes only now."""
        with writing(self.out):
            if self.out.exists():
                old = self.out.with_name(self.out.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                self.out.rename(old)
                self.partial.rename(self.out)
                shutil.rmtree(old, ignore_errors=True)
            else:
                self.partial.rename(self.out)

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
