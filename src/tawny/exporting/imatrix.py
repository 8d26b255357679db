"""Importance matrices as llama.cpp keeps them: the mean square of each input of every linear, under the names of a GGUF file.

`tawny export --to imatrix` measures one with Tawny's own calibration, for `llama-quantize --imatrix`; `read_imatrix` reads one
that anybody made. For each tensor a file holds sums of squares, `NAME.in_sum2`, and tokens, `NAME.counts`; of fused experts one
row an expert.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tawny.calibration.observe import observe
from tawny.calibration.statistics import Statistics
from tawny.errors import CheckpointError, ModelError
from tawny.exporting.files import check_apart, check_out
from tawny.model import durable
from tawny.model.gguf_header import open_gguf
from tawny.model.linears import Linear
from tawny.model.source import gguf_behind
from tawny.progress import Progress, silent
from tawny.pruning.prepare import Job
from tawny.pruning.session import Purpose, open_session, text_or_tokens
from tawny.recipe.merge import resolve_recipe
from tawny.run.walk import Block, Visitor, walk

_SUMS, _COUNTS = ".in_sum2", ".counts"
_SAMPLES = "samples"


@dataclass(frozen=True)
class ImatrixReport:
    """What an export of an importance matrix wrote.

    Attributes:
        tensors: how many tensors of a GGUF file it weighs.
        unseen: experts that no token reached, whose inputs count alike.
        text: the calibration, as a record has it.
    """

    source: str
    out: str
    to: str
    tensors: int
    unseen: int
    text: dict[str, Any]
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@final
class _Energies(Visitor):
    """Adds up the squares of what the linears of each block receive; experts of a tensor stand in their order."""

    def __init__(self, by_block: Sequence[Sequence[Linear]]) -> None:
        self.by_block = by_block
        self.names = [[tensor_names(x, block) for x in linears] for block, linears in enumerate(by_block)]
        self.seen: dict[str, list[Statistics]] = {}

    def visit(self, block: Block) -> None:
        linears, stream = self.by_block[block.index], block.streams[_SAMPLES]
        with block.run.clock("measure"):
            advance = _SAMPLES in block.wanted
            statistics = observe(stream, block.index, linears, "norms", advance=advance).statistics
        for linear, names in zip(linears, self.names[block.index], strict=True):
            for name in names:
                self.seen.setdefault(name, []).append(statistics[linear.name])


def tensor_names(linear: Linear, block: int) -> list[str]:
    """The tensors of a GGUF file that hold a linear of a block: one, or more where a file may keep gates and ups apart.

    No architecture is asked. Where a path has two meanings, llama.cpp's list has first the one that transformers' models have.

    Raises:
        ModelError: llama.cpp has no name for it.
    """
    path = linear.name if linear.expert is None else linear.key
    templates = _templates(path.replace(f".{block}.", ".{bid}.", 1))
    if not templates:
        raise ModelError(
            f"{linear.name!r} has no name in llama.cpp, so an importance matrix cannot hold its inputs"
        )
    return [f"{template.format(bid=block)}.weight" for template in templates]


@functools.cache
def _templates(path: str) -> list[str]:
    """llama.cpp's names for a module of any block, `{bid}`."""
    from gguf import MODEL_TENSOR, TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    known = (tensor for tensor, paths in TensorNameMap.block_mappings_cfg.items() if path in paths)
    tensors = sorted(tensor for tensor in known if not tensor.name.endswith("NORM"))[:1]
    if tensors and tensors[0].name == "FFN_GATE_UP_EXP":
        tensors += [MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP]
    return [TENSOR_NAMES[tensor] for tensor in tensors]


def export_imatrix(
    source: str | Path,
    out: Path,
    *,
    calibration: Any = None,
    samples: int | None = None,
    seqlen: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ImatrixReport:
    """`export` to an importance matrix."""
    started = time.perf_counter()
    check_out(out, overwrite, gguf_behind(source))
    named, given = text_or_tokens(calibration)
    keys: dict[str, Any] = {"calibration.samples": samples, "calibration.seqlen": seqlen}
    recipe = resolve_recipe(sparsity=0.0, **named, **keys)

    def check(job: Job) -> None:
        assert job.folder is not None
        check_apart(out, job.folder)
        _Energies(job.by_block)  # has a name for every linear, or refuses it

    purpose = Purpose(samples=True, changes=False, check=check)
    with open_session(recipe, source, purpose, progress, calibration=given, alone=True) as session:
        assert session.samples is not None
        energies = _Energies(session.job.by_block)
        shown = {_SAMPLES: session.samples}
        walk(session.run, session.job.stack, shown, [energies], phase="measuring", drop_outside=True)
    with durable.writing(out), durable.beside(out) as temporary:
        _write(temporary, energies.seen, session.record.text)
    return ImatrixReport(
        source=str(source),
        out=str(out),
        to="imatrix",
        tensors=len(energies.seen),
        unseen=len({id(x) for rows in energies.seen.values() for x in rows if not x.tokens}),
        text=session.record.text,
        bytes=out.stat().st_size,
        seconds=time.perf_counter() - started,
    )


def _write(path: Path, seen: Mapping[str, Sequence[Statistics]], text: Mapping[str, Any]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "")  # of no architecture, as llama.cpp's
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text["name"]])
    writer.add_uint32("imatrix.chunk_count", text["samples"])
    writer.add_uint32("imatrix.chunk_size", text["seqlen"])
    for name, rows in seen.items():
        writer.add_tensor(name + _SUMS, torch.stack([x.squared_norms for x in rows]).float().cpu().numpy())
        writer.add_tensor(name + _COUNTS, np.array([[x.tokens] for x in rows], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: str | Path) -> dict[str, Tensor]:
    """The mean squares of a file's importance matrix, by the names of tensors: `[in]`, or `[experts, in]`, float32.

    They are 1 for an expert that no token reached.

    Raises:
        CheckpointError: the file cannot be read, or holds no importance matrix in GGUF form.
    """
    held = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in open_gguf(Path(path)).tensors}
    means = {}
    for key, sums in held.items():
        name = key.removesuffix(_SUMS)
        counts = held.get(name + _COUNTS)
        if name == key:
            continue
        if (
            counts is None
            or counts.numel() == 0
            or sums.numel() % counts.numel()
            or not sums.is_floating_point()
        ):
            raise CheckpointError(
                f"{path} does not say how many tokens {name!r} received; make the importance matrix again"
            )
        tokens = counts.reshape(-1, 1)
        mean = torch.where(tokens > 0, sums.reshape(len(tokens), -1) / tokens.clamp(min=1), 1.0)
        if not bool(torch.isfinite(mean).all()) or bool((mean < 0).any()):
            raise CheckpointError(
                f"{path} holds numbers for {name!r} that are not mean squares; make the importance matrix again"
            )
        means[name] = mean[0] if len(mean) == 1 else mean
    if not means:
        raise CheckpointError(
            f"{path} holds no importance matrix; expected a GGUF file of `tawny export --to imatrix` or of llama-imatrix"
        )
    return means
