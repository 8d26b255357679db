"""A checkpoint in the format `compressed-tensors`, which vLLM, SGLang and transformers open: integers in words of 32 bits.

What was solved for it (`tawny prune --values w4`) is found again bit for bit. Everything else that is asked for is rounded by
best scales. A weight [O, I] becomes `weight_packed` int32 [O, I·bits/32], the lowest bits first and levels without their sign,
`weight_scale` [O, S] in the type of the weight, and `weight_shape`. The folder is opened again and compared before it is kept.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.errors import CheckpointError, ModelError, UserError
from tawny.exporting.files import ExportReport
from tawny.exporting.template import Matrices
from tawny.kinds import GPU_KINDS, Kind, dividing, names_of, solved_kind
from tawny.model.checkpoint import Checkpoint, file_bytes, is_packed
from tawny.model.couplings import check_fused
from tawny.model.source import resolve
from tawny.model.structure import find_blocks
from tawny.packed.convert import solved_for
from tawny.packed.format import scales_of
from tawny.packed.opening import open_stack
from tawny.progress import Progress
from tawny.pruning.prepare import check_groups
from tawny.record import record_in, weight_files
from tawny.report.publish import refresh
from tawny.run.writer import CheckpointWriter, written_at_once

TARGET = "compressed-tensors"
_FORMAT = "pack-quantized"
Scheme = tuple[Kind, int]  # and the columns of a scale


def export_compressed(
    source: str | Path,
    out: Path,
    *,
    type: str | None = None,
    group: int | None = None,
    overwrite: bool = False,
    progress: Progress,
) -> ExportReport:
    """Write a checkpoint whose linears are integers; see `run.export`."""
    started = time.perf_counter()
    folder = resolve(source, progress.say)
    if is_packed(folder):
        raise ModelError(f"{source} is packed; `tawny unpack` it first and export the dense checkpoint")
    ours = Matrices.of(folder)
    schemes = _schemes(ours, folder, type, group)
    if len(schemes) < len(ours.linears) or len({kind.name for kind, _ in schemes.values()}) > 1:
        check_fused(open_stack(folder), {name: kind.name for name, (kind, _) in schemes.items()})
    keys = {name: _key(ours, name) for name in schemes}
    with written_at_once(out, source, folder, overwrite=overwrite) as output:
        scales, zeros = _write(ours, schemes, keys, output, progress)
        output.carry(folder, () if type else ("run.json", "recipe.yaml", "recover.json"))
        config = json.loads((output.folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = _settings(ours, schemes)
        output.write_text("config.json", json.dumps(config, indent=2) + "\n")
        anew = _compare(ours, Matrices.of(output.folder), schemes, scales, set(keys.values()), progress)
        if anew:
            progress.say(f"{anew} of {len(schemes)} linears were rounded by best scales")
        total = file_bytes(output.folder)
        _retell(output, total, ours.checkpoint.bytes_in(None))
        output.deliver()
    types = Counter(kind.name for kind, _ in schemes.values())
    types["as before"] = len(ours.checkpoint.files) - len(schemes)
    return ExportReport(
        source=str(source),
        out=str(out),
        to=TARGET,
        architecture=str(config.get("model_type")),
        tokenizer=str(folder),
        types=dict(types),
        tensors=len(ours.checkpoint.files),
        bytes=total,
        source_bytes=ours.checkpoint.bytes_in(None),
        zeros=zeros,
        seconds=time.perf_counter() - started,
    )


def _schemes(ours: Matrices, folder: Path, type: str | None, group: int | None) -> dict[str, Scheme]:
    """What each linear becomes: those that were solved for GPUs, or all of the type that was asked for."""
    solved, kinds = solved_for(folder)
    if type is None:
        if solved.kind and not kinds:  # a recovery says it of all linears
            kinds = dict.fromkeys(ours.linears, solved.kind)
        kinds = {name: kind for name, kind in kinds.items() if kind in GPU_KINDS and name in ours.linears}
        group = solved.group_size if group is None else group
    elif type.lower() in GPU_KINDS:
        kinds = dict.fromkeys(ours.linears, type.lower())
    else:
        raise UserError(
            f"--type {type!r} is not a kind for GPUs; choose {names_of(GPU_KINDS.values(), ' or ')}"
        )
    if not kinds:
        raise UserError(
            f"{folder} was not solved for GPUs: prune with --values w4 or w8, or give --type to round by best scales"
        )
    for kind in set(kinds.values()):
        solved_kind(kind, group)
        chosen = [ours.linears[name] for name, own in kinds.items() if own == kind]
        check_groups(chosen, ours.linears.values(), kind, group)
    return {
        name: (GPU_KINDS[kind], dividing(ours.linears[name].shape[1], group)) for name, kind in kinds.items()
    }


def _retell(output: CheckpointWriter, total: int, dense: int) -> None:
    """Record, card and page of what was solved, with the files that hold it now."""
    if record := record_in(output.folder):
        record |= {"out": str(output.place.out), "bytes": total}
        record["packed"] = {"format": TARGET, "source_bytes": dense, "ratio": total / max(1, dense)}
        record["files"] = weight_files(output.folder)
        output.write_text("run.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        refresh(output.folder)


def _key(ours: Matrices, name: str) -> str:
    """The tensor of the file that is a linear's weight."""
    unit = ours.unit(name)
    if unit.converter is not None or len(unit.sources) != 1 or not unit.sources[0].endswith(".weight"):
        raise ModelError(
            f"{name} is not one tensor called .weight in {ours.checkpoint.folder}, but {', '.join(unit.sources)}: leave it out "
            "when pruning (-o exclude=…)"
        )
    return unit.sources[0]


def _write(
    ours: Matrices,
    schemes: dict[str, Scheme],
    keys: dict[str, str],
    output: CheckpointWriter,
    progress: Progress,
) -> tuple[dict[str, Tensor], int]:
    """Write the weights; returns the scales, and the zeros that are left."""
    scales, zeros, parts = dict[str, Tensor](), 0, ["outside"]
    progress.phase("writing", len(schemes), "linears")
    for block in find_blocks(ours.model).names:
        tensors = {}
        for name in (name for name in schemes if name.startswith(f"{block}.")):
            kind, columns = schemes[name]
            W_OI = ours.read(name)
            scales[name] = _scales(W_OI.contiguous(), kind, columns, name)
            q_OI = _levels(W_OI, kind, scales[name])
            zeros += int((q_OI == 0).sum())
            stem = keys[name].removesuffix("weight")
            tensors[f"{stem}weight_packed"] = _words(q_OI, kind.bits)
            tensors[f"{stem}weight_scale"] = scales[name]
            tensors[f"{stem}weight_shape"] = torch.tensor(W_OI.shape)
            progress.step(name)
        if tensors:
            parts.append(block)
            output.write_block(block, tensors)
    left = [key for key in ours.checkpoint.files if key not in {*keys.values()}]
    output.write_outside("outside", ours.checkpoint, left, None, {})
    output.assemble(output.plan_shards(parts))
    return scales, zeros


def _scales(W_OI: Tensor, kind: Kind, columns: int, name: str) -> Tensor:
    """[O, S] in the type of the weight: those that it was solved with, and the best ones elsewhere."""
    if not bool(W_OI.isfinite().all()):
        raise CheckpointError(f"{name!r} holds a number that is not finite; nothing is exported")
    held_OS = scales_of(W_OI, kind, columns, whole=True).to(W_OI.dtype)
    return held_OS.where(held_OS != 0, 1)  # of a group of zeros: a runtime may divide by it


def _levels(W_OI: Tensor, kind: Kind, scales_OS: Tensor) -> Tensor:
    """int16 [O, I]."""
    W_OSJ = W_OI.float().reshape(*scales_OS.shape, -1)
    return kind.round(W_OSJ, scales_OS.float().unsqueeze(2)).flatten(1).to(torch.int16)


def _words(q_OI: Tensor, bits: int) -> Tensor:
    """int32 [O, ceil(I · bits / 32)]: levels from the lowest bits on, counted from the smallest one."""
    codes_OI = (q_OI + (1 << bits - 1)).to(torch.uint8)
    codes_OI = nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % (32 // bits)))
    if bits == 4:
        codes_OI = codes_OI[:, ::2] | codes_OI[:, 1::2] << 4
    return codes_OI.contiguous().view(torch.int32)


def _settings(ours: Matrices, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """`quantization_config`: one group of linears for each kind and number of columns."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, (kind, columns) in schemes.items():
        row = columns not in kind.groups  # the width itself
        groups.setdefault((kind.name, -1 if row else columns), []).append(name)
    staying = [
        name
        for name, module in ours.model.named_modules()
        if isinstance(module, nn.Linear) and name not in schemes
    ]
    return {
        "quant_method": TARGET,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": {
                    "num_bits": GPU_KINDS[kind].bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if columns == -1 else "group",
                    "group_size": None if columns == -1 else columns,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": _FORMAT,
            }
            for number, ((kind, columns), names) in enumerate(groups.items())
        },
        "ignore": staying,
        "kv_cache_scheme": None,
    }


def _compare(
    ours: Matrices,
    theirs: Matrices,
    schemes: dict[str, Scheme],
    scales: dict[str, Tensor],
    packed: set[str],
    progress: Progress,
) -> int:
    """How many linears are not what they were.

    Raises:
        CheckpointError: a tensor of the folder is not what was written.
    """
    anew = 0
    progress.phase("comparing", len(ours.checkpoint.files), "tensors")
    for name, (kind, _) in schemes.items():
        W_OI, read_OI = ours.read(name), theirs.read(name)
        q_OSJ = _levels(W_OI, kind, scales[name]).float().view(*scales[name].shape, -1)
        made_OI = (q_OSJ * scales[name].float().unsqueeze(2)).flatten(1).to(W_OI.dtype)
        if not torch.equal(read_OI, made_OI.to(read_OI.dtype)):
            raise CheckpointError(f"{name!r} reads back as other numbers; nothing was kept: report this")
        anew += not torch.equal(made_OI, W_OI)
        progress.step(name)
    for key in ours.checkpoint.files:
        if key not in packed and not _same(ours.checkpoint, theirs.checkpoint, key):
            raise CheckpointError(f"{key!r} reads back as other numbers; nothing was kept: report this")
        progress.step(key)
    return anew


def _same(ours: Checkpoint, theirs: Checkpoint, key: str) -> bool:
    return torch.equal(
        *(checkpoint.read([key])[key].reshape(-1).view(torch.uint8) for checkpoint in (ours, theirs))
    )
