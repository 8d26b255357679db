"""The tensors of a safetensors folder, read lazily, as the parameters of a model.

`Checkpoint` maps tensors to parameters and back, through transformers' own conversion mapping: names in a file need not be
names of modules, and several tensors may form one parameter. Those of a quantised checkpoint are read as the float tensors
they stand for (quantised/).
Tensors are read into memory of their own, so that only what a caller holds counts.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

from tawny.errors import CheckpointError, short
from tawny.model.quantised import Coded, read_quantised, settings_of
from tawny.model.tensorfile import DTYPES, NAMES, TensorEntry, entries, natural, read_tensor
from tawny.precision import DTYPES as FLOATS

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

INDEX = "model.safetensors.index.json"
# A folder that `tawny pack` wrote (packed/folder.py opens it): its quant_method, and the index beside its config.
METHOD = "tawny"
PACKED_INDEX = "packed.safetensors.index.json"
_PIECE = 1 << 20


def _touch(places: list[tuple[Path, TensorEntry]]) -> None:
    piece = bytearray(_PIECE)
    with contextlib.suppress(OSError):
        for path, place in places:
            with path.open("rb", buffering=0) as file:
                file.seek(place.start)
                for _ in range(0, place.bytes, _PIECE):
                    file.readinto(piece)


def _gap(keys: list[str], count: int) -> str | None:
    """The first name that is missing from `keys`, which differ in one number, below `count`."""
    parts = [key.split(".") for key in keys]
    places = [place for place, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
    if len(places) != 1:
        return None
    before, after = parts[0][: places[0]], parts[0][places[0] + 1 :]
    names = (".".join([*before, str(number), *after]) for number in range(count))
    return next((name for name in names if name not in keys), None)


@dataclass
class Unit:
    """Tensors of the file that are read together, and the parameters they become (usually one and one)."""

    sources: list[str]
    targets: list[str]
    converter: WeightConverter | None = None
    patterns: list[str] = field(default_factory=list)


class Checkpoint:
    """The safetensors of one folder, read lazily.

    Args:
        folder: holds `*.safetensors`, sharded or not.

    Attributes:
        files: where each tensor lies, by name; of one that is decoded, where its weight lies.
        places: where in its file a tensor lies as it is read. Those that are decoded are not among them.
        coded: the tensors that are decoded, by name, in the dtype that the model says it computes in.
        zero_biases: biases of the model that are in no file are zero, and written like the rest.

    Raises:
        CheckpointError: a shard named by the index is missing, a file is truncated or not safetensors, or the tensors that
            a quantised weight is made from are not all there or do not fit each other.
        ModelError: quantised in a way that is not read.
    """

    zero_biases = False

    def __init__(self, folder: Path) -> None:
        self._begin(folder)
        for path in weight_paths(folder):
            for key, entry in sorted(entries(path).items()):  # of which what is copied keeps the order
                self.files[key] = path
                self.shapes[key] = entry.shape
                self.dtypes[key] = entry.dtype
                self.places[key] = entry
        settings = settings_of(folder)
        if settings is not None and settings.get("quant_method") != METHOD:
            self._decode(settings)

    def _begin(self, folder: Path) -> None:
        """No tensor is known yet."""
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.places: dict[str, TensorEntry] = {}
        self.coded: dict[str, Coded] = {}
        self.units: list[Unit] = []
        self._parameters: set[str] = set()
        self._parts: dict[str, tuple[Path, TensorEntry]] = {}

    def _decode(self, settings: Mapping[str, Any]) -> None:
        """Put the float tensors of a quantised checkpoint in the place of those it stores."""
        stored = {key: (self.files[key], entry) for key, entry in self.places.items()}

        def read(key: str) -> torch.Tensor:
            return self._read(key, *stored[key])

        self.coded, consumed = read_quantised(self.folder, settings, self.places, read)
        dtype = NAMES[computed_in(self.folder)]
        for key in consumed:
            self._parts[key] = stored[key]
            del self.files[key], self.shapes[key], self.dtypes[key], self.places[key]
        for key, coded in self.coded.items():
            self.files[key] = stored[next(iter(coded.parts.values()))][0]
            self.shapes[key], self.dtypes[key] = coded.shape, dtype

    @property
    def stored_as(self) -> str:
        """How most weights are stored, in words: `bfloat16`; of a quantised checkpoint each form of the quantised ones, `int4, groups of 128`."""
        sizes: Counter[str] = Counter()
        for key in self.coded or self.files:
            own = str(DTYPES.get(self.dtypes[key], self.dtypes[key])).removeprefix("torch.")
            form = self.coded[key].form if key in self.coded else own
            sizes[form] += int(torch.Size(self.shapes[key]).numel())
        return " and ".join(form for form, _ in sizes.most_common(None if self.coded else 1))

    @property
    def decoding_bytes(self) -> int:
        """What decoding a tensor takes beside it at most; 0 where nothing is decoded."""
        return max(
            (
                coded.working + sum(self._parts[name][1].bytes for name in coded.parts.values())
                for coded in self.coded.values()
            ),
            default=0,
        )

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype most weights are stored in; a mask that lies beside them is none of them."""
        sizes: Counter[str] = Counter()
        for unit in self.units:
            if self._parameters.intersection(unit.targets):
                for key in unit.sources:
                    sizes[self.dtypes[key]] += int(torch.Size(self.shapes[key]).numel())
        name = sizes.most_common(1)[0][0]
        known = {"F64": torch.float64, **{NAMES[dtype]: dtype for dtype in FLOATS.values()}}
        if name not in known:
            raise CheckpointError(
                f"{self.folder} stores its weights as {name}; expected float weights: dequantise the model first"
            )
        return known[name]

    def bytes_of(self, key: str) -> int:
        """Bytes of one tensor, decoded where it is."""
        if key in self.places:
            return self.places[key].bytes
        return int(torch.Size(self.shapes[key]).numel()) * self.dtype_of(key).itemsize

    def bytes_in(self, dtype: torch.dtype | None) -> int:
        """Bytes of all tensors, floats in `dtype` if there is one."""

        def size(key: str) -> int:
            own = DTYPES.get(self.dtypes[key])
            if own is None or (key in self.places and (dtype is None or not own.is_floating_point)):
                return self.places[key].bytes
            return int(torch.Size(self.shapes[key]).numel()) * (dtype or own).itemsize

        return sum(map(size, self.files))

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype one tensor is stored in."""
        try:
            return DTYPES[self.dtypes[key]]
        except KeyError:
            raise self._unknown(key, self.dtypes[key]) from None

    def same(self, one: Unit, other: Unit) -> bool:
        """Whether two parameters, each of them one stored tensor, hold the same numbers."""
        keys = [*one.sources, *other.sources]
        if len(keys) != 2 or self.shapes[keys[0]] != self.shapes[keys[1]]:
            return False
        first, second = self.read(keys).values()
        return torch.equal(first, second.to(first.dtype))

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Copies of the named tensors, as stored; quantised ones decoded."""
        tensors: dict[str, torch.Tensor] = {}
        for key in keys:
            dtype = self.dtype_of(key)  # refuses one that torch lacks
            if key in self.coded:
                parts = {role: self._read(n, *self._parts[n]) for role, n in self.coded[key].parts.items()}
                tensors[key] = self.coded[key].make(parts, dtype)
            elif key not in self.files:
                tensors[key] = torch.zeros(self.shapes[key], dtype=dtype)
            else:
                tensors[key] = self._read(key, self.files[key], self.places[key])
        return tensors

    def _read(self, key: str, path: Path, entry: TensorEntry) -> torch.Tensor:
        if entry.dtype not in DTYPES:
            raise self._unknown(key, entry.dtype)
        try:
            with path.open("rb") as file:
                return read_tensor(file, entry)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error

    def _unknown(self, key: str, dtype: str) -> CheckpointError:
        return CheckpointError(
            f"{key!r} in {self.folder} is stored as {dtype}, which is not supported; "
            f"expected one of {', '.join(DTYPES)}: convert it first"
        )

    def map_to(self, model: PreTrainedModel) -> None:
        """Work out which stored tensors form which parameters and buffers of `model`.

        Raises:
            CheckpointError: parameters of the model are in no file, or do not have its shapes.
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
        for key in sorted(self.files, key=natural):
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
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for twin, name in dict(tied).items():  # either of two that are one may be the one in the file
            if name not in grouped and twin in grouped and grouped[twin].converter is None:
                grouped[name] = grouped.pop(twin)
                grouped[name].targets = [name]
        if self.zero_biases:
            self._add_biases(model, grouped)
        self.units = list(grouped.values())
        self._parameters = {name for name, _ in model.named_parameters()}
        targets = {target for unit in self.units for target in unit.targets}
        absent = [n for n, _ in model.named_parameters() if n not in targets and n not in tied]
        if absent:
            raise CheckpointError(
                f"{self.folder} lacks {len(absent)} weights of the model, first {absent[0]!r}; fetch the checkpoint again"
            )
        for unit in self.units:
            self._check_shapes(unit, model, {name: tuple(wanted[name].shape) for name in unit.targets})

    def _add_biases(self, model: PreTrainedModel, grouped: dict[str, Unit]) -> None:
        """Zeros for biases that no file has, named and typed like the weights beside them."""
        for name, parameter in model.named_parameters():
            weight = grouped.get(name.removesuffix(".bias") + ".weight")
            if (
                name in grouped
                or not name.endswith(".bias")
                or weight is None
                or weight.converter is not None
            ):
                continue
            source = weight.sources[0].removesuffix(".weight") + ".bias"
            grouped[name] = Unit([source], [name])
            self.shapes[source], self.dtypes[source] = tuple(parameter.shape), self.dtypes[weight.sources[0]]

    def _check_shapes(
        self, unit: Unit, model: PreTrainedModel, expected: Mapping[str, tuple[int, ...]]
    ) -> None:
        first, target = unit.sources[0], unit.targets[0]
        if unit.converter is None:
            if self.shapes[first] != expected[target]:
                raise CheckpointError(
                    f"{first!r} in {self.folder} has shape {list(self.shapes[first])}, config.json implies {list(expected[target])}"
                )
            return
        try:
            empty = {key: torch.empty(self.shapes[key], device="meta") for key in unit.sources}
            shapes = {name: tuple(value.shape) for name, value in self.convert(unit, empty, model).items()}
        except NotImplementedError:  # a step that looks at numbers
            return
        except (RuntimeError, ValueError, LookupError):
            shapes = {}
        if any(shapes.get(name) != shape for name, shape in expected.items()):
            raise CheckpointError(self._misfit(unit, expected[target]))

    def _misfit(self, unit: Unit, expected: tuple[int, ...]) -> str:
        """Which of the tensors that form one parameter is the wrong one, as far as their names and shapes tell."""
        by_pattern: dict[str, list[str]] = {}
        for key, pattern in zip(unit.sources, unit.patterns, strict=True):
            by_pattern.setdefault(pattern, []).append(key)
        for keys in by_pattern.values():
            absent = _gap(keys, expected[0])
            if absent is not None:
                return f"{self.folder} lacks {absent!r}; fetch the checkpoint again"
            usual, _ = Counter(self.shapes[key] for key in keys).most_common(1)[0]
            odd = next((key for key in keys if self.shapes[key] != usual), None)
            if odd is not None:
                return f"{odd!r} in {self.folder} has shape {list(self.shapes[odd])}, others like it {list(usual)}; fetch the checkpoint again"
        return (
            f"the {len(unit.sources)} tensors of {unit.targets[0]!r} in {self.folder}, first {unit.sources[0]!r}, "
            f"do not form the shape {list(expected)} that config.json implies; fetch the checkpoint again"
        )

    def units_of(self, prefix: str) -> list[Unit]:
        """Units whose first parameter lies under the module path `prefix`."""
        return [unit for unit in self.units if unit.targets[0].startswith(prefix + ".")]

    def read_ahead(self, prefix: str) -> None:
        """Bring what lies under a module path into the system's file cache, in a thread, while others compute.

        Nothing is kept here, so that it costs this process no memory. Whoever needs a tensor says if it cannot be read.
        """
        keys = [key for unit in self.units_of(prefix) for key in unit.sources]
        places = [(self.files[key], self.places[key]) for key in keys if key in self.places]
        places += [
            self._parts[n] for key in keys if key in self.coded for n in self.coded[key].parts.values()
        ]
        if places:
            Thread(target=_touch, args=(places,), daemon=True).start()

    def load(self, unit: Unit, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Parameters of one unit, by name, in the stored dtype."""
        return self.convert(unit, self.read(unit.sources), model)

    def convert(
        self, unit: Unit, stored: Mapping[str, torch.Tensor], model: PreTrainedModel
    ) -> dict[str, torch.Tensor]:
        """Parameters of one unit, by name, from its tensors as they are stored."""
        if unit.converter is None:
            return {unit.targets[0]: stored[unit.sources[0]]}
        converter = deepcopy(unit.converter)
        for source, pattern in zip(unit.sources, unit.patterns, strict=True):
            converter.add_tensor(unit.targets[0], source, pattern, stored[source])
        converted = converter.convert(unit.targets[0], model=model, config=model.config)
        return {name: (value[0] if isinstance(value, list) else value) for name, value in converted.items()}

    def store(
        self,
        unit: Unit,
        parameters: Mapping[str, torch.Tensor],
        model: PreTrainedModel,
        *,
        fewer: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The inverse of `load`: tensors under the names and in the dtypes of the file, views of the parameters where possible.

        Args:
            fewer: the parameters may hold fewer experts than the file.

        Raises:
            CheckpointError: transformers' own inverse mapping does not give back the names that were read.
        """
        if unit.converter is None:
            return {unit.sources[0]: parameters[unit.targets[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(parameters))
        if set(reverted) != set(unit.sources) and not (fewer and set(reverted) < set(unit.sources)):
            raise CheckpointError(
                f"{unit.targets[0]!r} cannot be written back as the {len(unit.sources)} tensors it was read from "
                f"(first {unit.sources[0]!r}); this layout is not supported yet"
            )
        # Those of several dtypes were made one parameter of the widest.
        return {key: value.to(self.dtype_of(key)) for key, value in reverted.items()}


def weight_paths(folder: Path) -> list[Path]:
    """The safetensors files that make up the model of a folder, dense or packed.

    Other safetensors may lie beside them (an adapter, the same weights once more as `consolidated.safetensors`), so
    the name of a lone file says which count, then the index; only a folder with neither is taken as it is.

    Raises:
        CheckpointError: the index is damaged, a shard it names is missing, or there is no file at all.
    """
    single = folder / "model.safetensors"
    packed = is_packed(folder)
    # As transformers has it: what was saved in one file over a sharded folder has left the old index beside it.
    if not packed and single.is_file():
        return [single]
    index = folder / (PACKED_INDEX if packed else INDEX)
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("its weight_map names no files")
            outside = [x for x in names if Path(x).is_absolute() or ".." in Path(x).parts]
            if outside:  # whatever lies there would be written and pushed as a part of the model
                raise ValueError(f"its weight_map names {short(outside[0])}, which is not in the folder")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{index} is not a valid safetensors index ({error}); fetch the checkpoint again"
            ) from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(names)} shards named by its index, first {missing[0]}; "
                "fetch the checkpoint again"
            )
        return [folder / name for name in names]
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no *.safetensors file; expected a Hugging Face checkpoint")
    return paths


def file_bytes(folder: Path) -> int:
    """Bytes on the disk of the `weight_paths` of a folder; an index beside them is not counted."""
    return sum(path.stat().st_size for path in weight_paths(folder))


def computed_in(folder: Path) -> torch.dtype:
    """The dtype that `config.json` says the model computes in; bfloat16 where it names none of those that weights have."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        inner = config.get("text_config") or {}
        named = [known.get(key) for known in (config, inner) for key in ("dtype", "torch_dtype")]
    except (OSError, ValueError, AttributeError, RecursionError):
        named = []
    return next((FLOATS[name] for name in named if isinstance(name, str) and name in FLOATS), torch.bfloat16)


def is_packed(folder: Path) -> bool:
    """True for a folder that `tawny pack` wrote."""
    return (settings_of(folder) or {}).get("quant_method") == METHOD
