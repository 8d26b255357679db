"""`pack` and `unpack`: a dense checkpoint folder into a packed one and back, one tensor at a time.

Packing never holds more than one shard of a few hundred megabytes and one parameter; where that is all experts of a
block, whose file holds each apart, it is there twice for a moment. Unpacking holds one tensor. The headers of the dense
files are kept in the packed index, so unpacking writes those files again byte for byte: for float kinds that hold what
the dense checkpoint stored, the files are identical.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tawny.errors import CheckpointError, RecipeError, UserError
from tawny.kinds import KINDS, kind_of, range_of
from tawny.model.checkpoint import METHOD, Checkpoint, Unit, file_bytes, is_packed, weight_paths
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.model.durable import writing
from tawny.model.linears import Linear, is_plain, linears_of
from tawny.model.shards import index_of
from tawny.model.source import resolve
from tawny.model.structure import find_blocks, staying_dense
from tawny.model.tensorfile import DTYPES, header_for, raw
from tawny.model.trust import opens_models
from tawny.packed import format
from tawny.packed.choice import LinearForm, PackingKinds, experts_by_parameter, is_changed, pack_end, tell
from tawny.packed.folder import PackedFolder, PackedLinearEntry, header_of
from tawny.packed.format import PackedTensor
from tawny.packed.install import check_ends, ends_of, table_of
from tawny.packed.places import CheckpointPlace, places_of
from tawny.packed.writer import PackedWriter
from tawny.progress import Progress, silent
from tawny.recipe.files import load_recipe
from tawny.recipe.schema import Values
from tawny.record import weight_files
from tawny.run.writer import CheckpointWriter, written_at_once

_DENSE_INDEX = "model.safetensors.index.json"
# What a pruning run leaves beside the weights belongs to the packed model as well.
_ALSO_CARRIED = ("recipe.yaml", "recover.json", "README.md", "report.html")
_NOTE = (
    "<!-- packed -->\n\n> **Packed by Tawny** ({values}): `pip install tawny`, then `import tawny` before "
    "`from_pretrained`, or `tawny.load`. Plain transformers cannot open it; "
    "`tawny unpack` gives the dense checkpoint back.\n\n<!-- /packed -->\n"
)


@dataclass(frozen=True)
class PackReport:
    """What packing made of a checkpoint. Bytes are those of all tensors; `source_bytes` those of the dense ones."""

    source: str
    out: str
    values: str
    group: int | None
    head: str | None
    embedding: str | None
    bytes: int
    source_bytes: int
    file_bytes: int
    packed: int
    dense: int
    untouched: list[str]
    seconds: float
    linears: list[LinearForm] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.bytes / max(1, self.source_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class UnpackReport:
    """What unpacking wrote; `exact` when every weight has the bits of the checkpoint that was packed."""

    source: str
    out: str
    bytes: int
    source_bytes: int
    linears: int
    exact: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _FolderPacking:
    """One checkpoint on its way into a packed folder."""

    def __init__(self, folder: Path, writer: PackedWriter, choice: PackingKinds) -> None:
        from tawny.model.skeleton import open_skeleton

        self.writer, self.choice = writer, choice
        self.checkpoint = Checkpoint(folder)
        self.model: Any = open_skeleton(folder, torch.float32)
        self.checkpoint.map_to(self.model)
        if choice.head is None or choice.embedding in (None, choice.head) or not self._untied():
            check_ends(self.model, choice.head, choice.embedding)
        self.blocks = find_blocks(self.model)
        self.linears: list[LinearForm] = []
        self.untouched: list[str] = []
        self.rounded = 0  # linears in few bits that were not solved for them
        self.changed: set[str] = set()  # kinds that linears were rounded to
        self.done: set[str] = set()

    @property
    def source_bytes(self) -> int:
        checkpoint = self.checkpoint
        return sum(
            torch.Size(shape).numel() * checkpoint.dtype_of(key).itemsize
            for key, shape in checkpoint.shapes.items()
        )

    def block(self, name: str, module: torch.nn.Module) -> None:
        linears = linears_of(module, name)
        by_key = {
            linear.key: linear for linear in linears if linear.expert is None and is_plain(linear.module)
        }
        own = {linear.key for linear in linears} - by_key.keys()
        fused = experts_by_parameter(linears)
        for unit in self.checkpoint.units_of(name):
            if len(unit.targets) == 1 and unit.targets[0] in fused:
                self._experts(unit, fused[unit.targets[0]])
                continue
            linear = by_key.get(unit.targets[0])
            if linear is not None and unit.converter is None:
                self._linear(unit, linear)
                continue
            for target in unit.targets:
                if target in by_key or target in own:
                    self.untouched.append(target)
            self._as_it_is(unit.sources)

    def _linear(self, unit: Unit, linear: Linear) -> None:
        source = unit.sources[0]
        stored = self.checkpoint.read([source])[source]
        W_OI = linear.view(stored)
        packed, sparsity = self.choice.pack_linear(W_OI, linear.name)
        if packed is None:
            self.writer.add(source, stored)
            self.writer.dense.append(linear.name)
            self._left_dense(linear, sparsity, stored.nbytes, sparsity)
        else:
            self._add(linear.name, packed, CheckpointPlace([source]), linear.transposed, sparsity)
            self._compare(packed, W_OI)
        self.done.add(source)

    def _experts(self, unit: Unit, experts: list[Linear]) -> None:
        """All experts of one fused parameter, however the file holds them."""
        stored = self.checkpoint.read(unit.sources)
        fused = self.checkpoint.convert(unit, stored, self.model)[unit.targets[0]]
        places = places_of(unit, stored, fused, experts)
        if places is None:
            self.untouched.append(unit.targets[0])
            self._as_it_is(unit.sources)
            return
        size = sum(value.nbytes for value in stored.values()) // len(experts)
        del stored
        sparsities, together = self.choice.sparsities(fused, experts)
        if not self.choice.pays(together):
            for expert, own in zip(experts, sparsities, strict=True):
                self._left_dense(expert, own, size, together)
            self._as_it_is(unit.sources)
            return
        for expert, place, own in zip(experts, places, sparsities, strict=True):
            packed = self.choice.pack_expert(fused, expert, own)
            self._add(expert.name, packed, place, expert.transposed, own)
            self._compare(packed, expert.view(fused))
        self.done.update(unit.sources)

    def _compare(self, packed: PackedTensor, W_OI: Tensor) -> None:
        if is_changed(packed, W_OI):
            self.changed.add(packed.values)
            self.rounded += kind_of(packed.values).bits < 8

    def _left_dense(self, linear: Linear, sparsity: float, size: int, decisive: float) -> None:
        why = f"{decisive:.1%} zeros are too few for {self.choice.values}"
        self.linears.append(LinearForm(linear.name, linear.shape, sparsity, "dense", size, why))

    def _add(
        self,
        name: str,
        packed: PackedTensor,
        place: CheckpointPlace,
        transposed: bool,
        sparsity: float,
        embedding: str | None = None,
    ) -> None:
        entry = PackedLinearEntry(
            name,
            **vars(packed.form),
            sources=tuple(place.sources),
            transposed=transposed,
            storage=self.checkpoint.dtypes[place.sources[0]],
            embedding=embedding,
            rows=place.rows,
            index=place.index,
        )
        size = self.writer.add_packed(packed, entry)
        self.linears.append(LinearForm(name, packed.shape, sparsity, "packed", size))

    def _as_it_is(self, sources: list[str]) -> None:
        for key, value in self.checkpoint.read(sources).items():
            self.writer.add(key, value)
            self.done.add(key)

    def ends(self) -> None:
        """Head and embedding, if they are wanted packed, and everything else that lies outside the blocks."""
        if self.choice.table is not None:
            self._head()
        for key in self.checkpoint.files:  # tensors no parameter uses travel too
            if key not in self.done:
                self._as_it_is([key])

    def _head(self) -> None:
        """The head and the embedding: one matrix where they are tied, else two."""
        outside, inside, tied = ends_of(self.model)
        none = UserError(f"{type(self.model).__name__} has no plain linear head to pack; leave --head out")
        if outside is None and inside is None:
            raise none
        if outside is not None and self.choice.head is not None:
            head = self.model.get_submodule(outside)
            keys = [f"{outside}.weight", *([f"{inside}.weight"] if tied else [])]
            weights = self._found(keys) if isinstance(head, torch.nn.Linear) and is_plain(head) else {}
            if not weights:
                raise none
            first = next(iter(weights))
            # Two that are stored apart and differ are not tied after all.
            tied = tied and all(torch.equal(weights[first], other) for other in weights.values())
            both = weights if tied else {first: weights[first]}
            self._end(outside, both, self.choice.head, inside if tied else None)
        if inside is not None and not tied:
            assert self.choice.table is not None
            table = isinstance(self.model.get_submodule(inside), torch.nn.Embedding)
            if weights := self._found([f"{inside}.weight"]) if table else {}:
                self._end(table_of(inside), weights, self.choice.table, inside)
            elif outside is None:
                raise none

    def _untied(self) -> bool:
        """Whether head and embedding, one matrix by the config, are stored apart and differ."""
        outside, inside, tied = ends_of(self.model)
        units = {unit.targets[0]: unit for unit in self.checkpoint.units if unit.converter is None}
        ends = [units[key] for key in (f"{outside}.weight", f"{inside}.weight") if key in units]
        return tied and len(ends) == 2 and not self.checkpoint.same(*ends)

    def _found(self, keys: list[str]) -> dict[str, torch.Tensor]:
        """What the files hold for parameters, by source; empty where one of them is held in another layout."""
        units = {unit.targets[0]: unit for unit in self.checkpoint.units}
        held = [units[key] for key in keys if key in units]
        if not all(unit.converter is None for unit in held):
            return {}
        return {unit.sources[0]: self.checkpoint.read(unit.sources)[unit.sources[0]] for unit in held}

    def _end(self, name: str, weights: dict[str, torch.Tensor], kind: str, embedding: str | None) -> None:
        """Pack equal weights once, as a head or as the rows of an embedding."""
        first = next(iter(weights.values()))
        packed = pack_end(first, kind, name)
        sparsity = 1 - int(torch.count_nonzero(first)) / first.numel()
        self._add(name, packed, CheckpointPlace(list(weights)), False, sparsity, embedding)
        self.done.update(weights)


@opens_models
def pack(
    source: str | Path,
    out: str | Path,
    values: str | None = None,
    group: int | None = None,
    head: str | None = None,
    embedding: str | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> PackReport:
    """Pack a checkpoint: masks and survivors instead of matrices with zeros.

    Args:
        source: folder or hub id of a (pruned) checkpoint.
        out: folder to write.
        values: kind of the survivors, such as bf16 or int8; `tawny pack --help` lists them. None is the kind and group
            that the checkpoint was solved for, or else bf16.
        group: columns that share a scale, of integers; None is the kind's usual number.
        head: kind to pack the head and the embedding in, too, whatever their zeros. If they are tied, one matrix serves both.
        embedding: kind of an embedding that shares no weight with the head; None is that of the head.
        overwrite: replace an existing `out`.
        progress: told how far the work is.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        UserError: unknown values or group, the model has no linear head, or its embedding none of its own.
        CheckpointError: the folder is packed already, or damaged.
        NumericalError: a weight is not finite, or too large for the kind.
        OutputError: `out` exists or cannot be written.
    """
    started = time.perf_counter()
    if values is not None:
        PackingKinds(values, group, head, embedding)  # refused before anything is fetched
    folder = resolve(source, progress.say)
    choice = _choice(folder, values, group, head, embedding)
    if is_packed(folder):
        raise CheckpointError(f"{source} is packed already; `tawny unpack` it first to pack it another way")
    record = _record_of(folder)
    with written_at_once(out, source, folder, overwrite=overwrite) as output:
        writer = PackedWriter(output.folder)
        files = weight_paths(folder)  # one without tensors, too: the index names it
        for path in files:
            if path.parent != folder or path.suffix != ".safetensors":
                raise CheckpointError(
                    f"{folder}: its index names {str(path)!r}; expected *.safetensors in the folder: save it again"
                )
        work = _FolderPacking(folder, writer, choice)
        progress.phase("packing", len(work.blocks))
        for name, block in zip(work.blocks.names, work.blocks.modules, strict=True):
            work.block(name, block)
            progress.step(name)
        progress.phase("head and embedding", 1, "step")
        work.ends()
        progress.step("head and embedding")
        method = {
            "quant_method": METHOD,
            "version": format.VERSION,
            **choice.told,
            "linears": {"packed": len(writer.linears), "dense": sum(x.form == "dense" for x in work.linears)},
        }
        _carry(output, folder, method)
        total = writer.finish(*_layout_of(work.checkpoint, files))
        _card(output, folder, _NOTE.format(values=range_of(choice.kinds.values() or [choice.values])))
        rounded = {"values": sorted(work.changed), "head": choice.head, "embedding": choice.embedding}
        facts = {**choice.told, "bytes": total, "source_bytes": work.source_bytes}
        if record is not None:
            _record(output, record, facts, total, {key: value for key, value in rounded.items() if value})
        dense = [form for form in work.linears if form.form == "dense"]
        tell(progress, len(work.linears) - len(dense), len(dense), len(work.untouched), work.rounded)
        for line in staying_dense(work.model, work.blocks):
            progress.say(line)
        PackedFolder(output.folder)  # nothing that cannot be opened looks finished
        output.deliver()
    return PackReport(
        source=str(source),
        out=str(out),
        **choice.told,
        bytes=total,
        source_bytes=work.source_bytes,
        file_bytes=file_bytes(output.place.out) + (output.place.out / INDEX).stat().st_size,
        packed=len(work.linears) - len(dense),
        dense=len(dense),
        untouched=work.untouched,
        seconds=time.perf_counter() - started,
        linears=work.linears,
    )


def _layout_of(checkpoint: Checkpoint, files: Sequence[Path]) -> tuple[list[dict[str, str]], str | None]:
    """The headers and the index that the dense checkpoint has, or that the one would have which a quantised one stands for."""
    index_file = checkpoint.folder / _DENSE_INDEX
    # Decoded from bytes: reading it as text would change its line ends.
    # One file of the usual name counts before an index that lies beside it (weight_paths).
    alone = [path.name for path in files] == ["model.safetensors"]
    index = index_file.read_bytes().decode() if index_file.is_file() and not alone else None
    if not checkpoint.coded:
        return [{"file": path.name, "header": header_of(path)} for path in files], index
    held = {path.name: [key for key, place in checkpoint.files.items() if place == path] for path in files}
    headers = [
        {
            "file": name,
            "header": header_for({key: (checkpoint.dtype_of(key), checkpoint.shapes[key]) for key in keys}),
        }
        for name, keys in held.items()
    ]
    return headers, None if index is None else index_of(held, checkpoint.bytes_in(None)).decode()


def solved_for(folder: Path) -> tuple[Values, dict[str, str]]:
    """The values that a folder was pruned or recovered for, and each linear's kind, as far as `run.json` says so."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        recovery = run.get("recovery") or {}
        trained = recovery.get("grid") or recovery.get("settings", {})
        if trained.get("values"):  # `tawny recover` trained through another grid, or through the same
            ends = (run.get("recipe") or {}).get("values") or {}
            head, embedding = ends.get("head"), ends.get("embedding")
            return Values(trained["values"], trained.get("group_size"), head=head, embedding=embedding), {}
        values, kinds = load_recipe(folder / "run.json").values, run.get("values") or {}
    except (RecipeError, OSError, ValueError, AttributeError):
        return Values(), {}
    return values, {name: kind for name, kind in kinds.items() if kind in values.names}


def _choice(
    folder: Path, values: str | None, group: int | None, head: str | None, embedding: str | None
) -> PackingKinds:
    """What is asked for, and where nobody asked for values, what the folder was solved for."""
    solved, kinds = solved_for(folder)
    head, embedding = head or solved.head, embedding or solved.embedding
    if values is not None and (values, len(solved.names)) != (solved.kind, 1):
        return PackingKinds(values, group, head, embedding)
    most = max(solved.names, key=lambda name: kind_of(name).bits, default="bf16")
    return PackingKinds(most, solved.group_size if group is None else group, head, embedding, kinds)


def unpack(
    source: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = silent
) -> UnpackReport:
    """Write the dense checkpoint a packed folder was made from; plain transformers opens it.

    Raises:
        CheckpointError: the folder is not packed, or damaged: names the tensor.
        OutputError: `out` exists or cannot be written.
    """
    started = time.perf_counter()
    folder = resolve(source, progress.say)
    if not is_packed(folder):
        raise CheckpointError(f"{source} is not a packed folder; there is nothing to unpack")
    packed, record = PackedFolder(folder), _record_of(folder)
    with written_at_once(out, source, folder, overwrite=overwrite) as output:
        total = 0
        for part in packed.source:
            name, text, entries = part.file, part.header, part.entries()
            progress.phase(f"unpacking {name}", len(entries), "tensors")
            with writing(output.folder / name), (output.folder / name).open("wb") as file:
                header = text.encode()
                file.write(len(header).to_bytes(8, "little") + header)
                for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
                    file.seek(8 + len(header) + entry["data_offsets"][0])
                    file.write(raw(_dense(packed, key, entry)))
                    total += entry["data_offsets"][1] - entry["data_offsets"][0]
                    progress.step(key)
        if packed.source_index is not None:
            with writing(output.folder / _DENSE_INDEX):
                (output.folder / _DENSE_INDEX).write_bytes(packed.source_index.encode())
        _carry(output, folder, None)
        _card(output, folder, None)
        if record is not None:
            _record(output, record, {}, total, {})
        output.deliver()
    return UnpackReport(
        source=str(source),
        out=str(out),
        bytes=total,
        source_bytes=packed.bytes,
        linears=len(packed.linears),
        exact=all(entry.storage in KINDS[entry.values].exact for entry in packed.linears.values()),
        seconds=time.perf_counter() - started,
    )


def _dense(packed: PackedFolder, key: str, header: dict[str, Any]) -> Tensor:
    dtype = DTYPES[header["dtype"]]
    dense = packed.read_source(key, dtype) if key in packed.made else packed.read(key)
    if list(dense.shape) != header["shape"] or dense.dtype != dtype:
        raise CheckpointError(
            f"{packed.folder}: {key!r} has another shape than the checkpoint that was packed"
        )
    return dense


def _carry(output: CheckpointWriter, folder: Path, method: dict[str, Any] | None) -> None:
    """What lies beside the weights; the configuration says how they are packed."""
    output.carry(folder, _ALSO_CARRIED)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if method is not None:
        config["quantization_config"] = method
    output.write_text("config.json", json.dumps(config, indent=2) + "\n")


def _record_of(folder: Path) -> dict[str, Any] | None:
    """The pruning run's record, where there is one; other programs call their files `run.json` too."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a record of a run ({error}); move it away") from error
    return record if isinstance(record, dict) and "record_version" in record else None


def _record(
    output: CheckpointWriter,
    record: dict[str, Any],
    packed: dict[str, Any],
    total: int,
    rounded: dict[str, Any],
) -> None:
    """The record of a run, with the files that now hold its weights."""
    record["packed"] = {**packed, "ratio": total / max(1, packed["source_bytes"])} if packed else {}
    record["bytes"], record["files"] = total, weight_files(output.folder)
    record["out"], record["rounded"] = str(output.place.out), {**record.get("rounded", {}), **rounded}
    output.write_text("run.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _card(output: CheckpointWriter, folder: Path, note: str | None) -> None:
    """A packed folder's card says how it is opened; the card of the dense one does not."""
    path = folder / "README.md"
    # A mark in front would hide the metadata, and a byte that is not UTF-8 is no reason not to pack.
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    begin, end = text.find("<!-- packed -->"), text.find("<!-- /packed -->\n")
    if begin >= 0 and end >= 0:
        text = text[:begin] + text[end + len("<!-- /packed -->\n") :]
    if note is not None:
        front = text.find("\n---\n", 4) + 5 if text.startswith("---\n") else 0
        text = text[:front] + note + text[front:]
    if text:
        output.write_text("README.md", text)
    elif path.is_file():
        (output.folder / "README.md").unlink(missing_ok=True)
