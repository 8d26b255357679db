"""`tawny slim`: cut out the channels, heads and blocks that are zero, and write a smaller dense checkpoint.

Blocks are read, cut and written one at a time. The rows and columns of a member go together (model/couplings.py), biases of the
rows too; what is left keeps its numbers and its order, so the result computes what the source does. That is proven at
the end, by what both compute of the same input. A block whose linears are all zero, and that passes on what it receives, is left
out, and later ones take its number. Where all blocks have the same widths the result is an ordinary checkpoint; where
they differ, its config.json says so block by block.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tawny.errors import ModelError, RecipeError, UserError
from tawny.model.checkpoint import file_bytes, is_packed
from tawny.model.couplings import Coupling, find_couplings, probe_of
from tawny.model.linears import Linear
from tawny.model.own_blocks import KEY
from tawny.model.source import resolve
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.model.structure import TOKENS, evaluating
from tawny.model.trust import opens_models
from tawny.packed.convert import solved_for
from tawny.packed.opening import open_stack
from tawny.progress import Progress, silent
from tawny.run.run import Run
from tawny.run.walk import Advance, Block, Visitor, walk
from tawny.run.writer import CheckpointWriter, written_at_once
from tawny.slimming.depth import renumbered
from tawny.slimming.widths import config_of_block, described, key_of_text, settings_of_block
from tawny.words import size

# transformers multiplies experts together only where a row is whole times 16 bytes: 8 numbers of two bytes.
_ALIGNED = 8
_CLOSE = 1e-3  # of what the models compute: sums of fewer numbers are added up in another order


@dataclass(frozen=True)
class Slimmed:
    """What became smaller.

    Attributes:
        widths: of each block that is left, what config.json calls each width.
        dropped: blocks of the source that were left out.
        same_widths: all blocks have the same, so that the result is an ordinary checkpoint.
        apart: ‖output − output of the source‖ / ‖output of the source‖, in float32; logits where there are some.
    """

    source: str
    out: str
    parameters: int
    source_parameters: int
    bytes: int
    source_bytes: int
    widths: list[dict[str, int]]
    dropped: list[int]
    same_widths: bool
    apart: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@opens_models
def slim(
    source: str | Path,
    out: str | Path,
    *,
    multiple: int = 1,
    overwrite: bool = False,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Slimmed:
    """Cut the zero channels, heads and blocks out of a checkpoint, and write the smaller dense one.

    Args:
        source: a folder that `tawny prune -p channels+heads` or `-p blocks` wrote, or another checkpoint with whole zero members.
        out: folder to write.
        multiple: of channels that each block keeps, such as 64 for the kernels of GPUs; some that are zero stay for it.
        overwrite: replace an existing `out`, once the new one is complete.
        progress: told how far the work is.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError: nothing whole is zero, a width cannot be said in config.json, or a parameter would have to shrink that no
            coupling knows.
        OutputError: `out` exists or cannot be written.
        RecipeError: `multiple` is less than 1.
    """
    if multiple < 1:
        raise RecipeError(f"--multiple is {multiple}; expected a number of channels such as 64")
    started = time.perf_counter()
    folder = resolve(source, progress.say)
    if is_packed(folder):
        raise ModelError(f"{source} is packed; `tawny unpack` it first and slim the dense checkpoint")
    stack = open_stack(folder, torch.float32)
    if len(stack.structure.starts) > 1:
        raise ModelError(
            f"{source} is a model of several stacks, whose config.json cannot say the widths or blocks that are left; `tawny pack` "
            "makes it smaller instead"
        )
    with written_at_once(out, source, folder, overwrite=overwrite) as output:
        with torch.no_grad(), evaluating(stack.model):
            cut, expected = _cut(stack, output, str(source), multiple, progress)
            blocks = [f"{index:05d}" for index in range(len(stack)) if index not in cut.dropped]
            total = output.assemble(output.plan_shards(["outside", *blocks]))
            output.carry(folder)
            raw = json.loads((output.folder / "config.json").read_text(encoding="utf-8"))
            key = key_of_text(stack.config, raw)
            said = described(
                stack.config.get_text_config(), raw[key] if key else raw, cut.widths, cut.dropped
            )
            config = {**raw, key: said} if key else said
            if not cut.aligned:  # transformers passes on what the top says of it, to every nested part
                config["experts_implementation"] = "eager"
            output.write_text("config.json", json.dumps(config, indent=2) + "\n")
            parameters, apart = _opened(output.folder, expected, str(source))
        report = Slimmed(
            source=str(source),
            out=str(out),
            parameters=parameters,
            source_parameters=sum(p.numel() for p in stack.model.parameters()),
            bytes=total,
            source_bytes=file_bytes(folder),
            widths=cut.widths,
            dropped=cut.dropped,
            same_widths=KEY not in said,
            apart=apart,
            seconds=round(time.perf_counter() - started, 3),
        )
        output.write_text("slim.json", json.dumps(report.to_dict(), indent=2) + "\n")
        output.write_text("README.md", _card(folder, report))
        if kinds := solved_for(folder)[0].names:
            progress.say(
                f"{source} was solved for {', '.join(kinds)}: give `tawny pack` that as --values, it reads no record here"
            )
        output.deliver()
    return report


def _card(folder: Path, report: Slimmed) -> str:
    """What was cut, behind the metadata of the source's card: its licence and its base model are those of the result."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    metadata = re.match(r"---[ \t]*\n.*?\n---[ \t]*(?=\n|\Z)", text, re.DOTALL)
    front = f"{metadata[0]}\n" if metadata else ""
    blocks = f", {len(report.dropped)} blocks among them" if report.dropped else ""
    opens = "Plain transformers" if report.same_widths else "`tawny.load`"
    return (
        f"{front}\n# {Path(report.out).name}\n\n"
        f"`tawny slim` cut out what was zero in {Path(report.source).name}{blocks}: {report.parameters:,} of "
        f"{report.source_parameters:,} parameters are left ({size(report.bytes)} of {size(report.source_bytes)}). "
        f"{opens} opens it. `slim.json` holds the widths.\n"
    ).lstrip("\n")


def _cut(
    stack: Stack, output: CheckpointWriter, source: str, multiple: int, progress: Progress
) -> tuple[_Cut, Tensor]:
    """Write the tensors of every block without its zero members, and the rest.

    Returns:
        What was cut, and what the source computes of a probe.
    """
    checkpoint = stack.checkpoint
    assert checkpoint is not None
    cut = _Cut(stack, output, multiple)
    computed = _computed(stack, cut, progress, "cutting")
    if not cut.removed and not cut.dropped and multiple > 1:
        raise ModelError(
            f"{source} has no block that a multiple of {multiple} channels makes smaller: give a smaller --multiple, or prune more of it"
        )
    if not cut.removed and not cut.dropped:
        raise ModelError(
            f"{source} holds no channel, head or block that is zero as a whole ({cut.zeros:,} of its weights are zero, one by one): "
            "prune with -p channels+heads or -p blocks first, or `tawny pack` it"
        )
    outside = [key for key in checkpoint.files if key not in cut.inside]
    output.write_outside("outside", checkpoint, outside, None, {})
    return cut, computed


def _computed(stack: Stack, visitor: Visitor, progress: Progress, phase: str) -> Tensor:
    """What a model computes of a probe that the visitor takes through the blocks."""
    probe = probe_of(stack)
    given = {"probe": Samples(probe, seqlen=None if TOKENS in probe else stack.positions(probe))}
    streams = walk(Run.unkept(progress), stack, given, [visitor], phase=phase, ends=given)
    computed: Tensor = stack.output(probe, streams["probe"].hidden[0])[0]
    return computed


@final
class _Cut(Visitor):
    """Writes each block without its zero members; leaves out one whose linears are all zero and that passes on the probe.

    Attributes:
        widths: of the blocks that are left.
        dropped: numbers of those that are not.
        aligned: transformers can multiply all experts of a block together.
        inside: names of the tensors of all blocks in the source.
        removed, zeros: members that were cut out, and zero weights of the blocks that are left.
    """

    def __init__(self, stack: Stack, output: CheckpointWriter, multiple: int) -> None:
        self.couplings, self.output, self.multiple = find_couplings(stack), output, multiple
        self.widths: list[dict[str, int]] = []
        self.dropped: list[int] = []
        self.aligned = True
        self.inside: set[str] = set()
        self.removed = self.zeros = 0

    def visit(self, block: Block) -> None:
        stack, index, couplings = block.stack, block.index, self.couplings[block.index]
        checkpoint, probe = stack.checkpoint, block.streams["probe"]
        assert checkpoint is not None
        units = checkpoint.units_of(block.name)
        self.inside.update(key for unit in units for key in unit.sources)
        entering = probe.hidden[0].clone()  # some blocks change what they are given
        probe.advance(index)
        weights = [stack.look(linear) for linear in stack.linears(index)]
        if torch.equal(entering, probe.hidden[0]) and not any(bool(weight.any()) for weight in weights):
            self.dropped.append(index)
            return
        parameters = dict(stack.stored)
        kept = [_kept(stack, coupling, self.multiple) for coupling in couplings]
        _cut_block(stack, couplings, kept, parameters)
        counts = [int(keep.sum()) for keep in kept]
        self.zeros += sum(int((weight == 0).sum()) for weight in weights)
        experts = [n for x, n in zip(couplings, counts, strict=True) if x.consumer.expert is not None]
        self.aligned = self.aligned and not any(count % _ALIGNED for count in experts)
        self.removed += sum(len(keep) - count for keep, count in zip(kept, counts, strict=True))
        config = config_of_block(stack.config.get_text_config(), index)
        self.widths.append(settings_of_block(config, couplings, counts))
        tensors: dict[str, Tensor] = {}
        for unit in units:
            tensors |= checkpoint.store(unit, {k: parameters[k] for k in unit.targets}, stack.model)
        if self.dropped:
            tensors = {renumbered(key, index, index - len(self.dropped)): x for key, x in tensors.items()}
        self.output.write_block(f"{index:05d}", tensors)


def _kept(stack: Stack, coupling: Coupling, multiple: int) -> Tensor:
    """[G] bool: members that the consumer reads, and of channels the first others up to a multiple.

    Raises:
        ModelError: it reads none.
    """
    read_I = (stack.look(coupling.consumer) != 0).any(0).cpu()
    keep_G = read_I[coupling.columns_GC].any(1)
    if not bool(keep_G.any()):
        raise ModelError(
            f"{coupling.name} reads none of its {coupling.members} {coupling.kind}: a block keeps one of them at least; "
            "prune less of it"
        )
    if coupling.kind == "channels":
        keep_G[(~keep_G).nonzero()[: -int(keep_G.sum()) % multiple, 0]] = True
    return keep_G


def _cut_block(
    stack: Stack, couplings: Sequence[Coupling], kept: Sequence[Tensor], parameters: dict[str, Tensor]
) -> None:
    """Leave in `parameters`, by name, what is kept of each member's rows and columns."""
    parts: dict[str, dict[int, Tensor]] = {}  # of fused experts, put together at the end

    def replace(linear: Linear, dim: int, index: Tensor) -> None:
        whole = linear.view(stack.stored[linear.key])
        # One linear can lose rows to one coupling and columns to another.
        before = parts.get(linear.key, {}).get(linear.expert or 0, whole)
        cut = before.index_select(dim, index.to(before.device))
        parts.setdefault(linear.key, {})[linear.expert or 0] = cut
        bias = f"{linear.name}.bias"
        if dim == 0 and linear.expert is None and bias in parameters:
            parameters[bias] = parameters[bias].index_select(0, index.to(before.device))

    by_key: dict[str, Linear] = {}
    for coupling, keep_G in zip(couplings, kept, strict=True):
        for rows in coupling.producers:
            replace(rows.linear, 0, rows.index_GR[keep_G].flatten().sort().values)
        replace(coupling.consumer, 1, coupling.columns_GC[keep_G].flatten())
        by_key |= {linear.key: linear for linear in coupling.linears}
    for key, cut in parts.items():
        cut_parts = [part.T if by_key[key].transposed else part for _, part in sorted(cut.items())]
        if by_key[key].expert is None:
            parameters[key] = cut_parts[0].contiguous()
            continue
        if len({part.shape for part in cut_parts}) > 1:
            raise ModelError(
                f"experts of {key} lost different numbers of channels, and one tensor holds them all: prune with -a uniform"
            )
        parameters[key] = torch.stack(cut_parts)


def _opened(folder: Path, expected: Tensor, source: str) -> tuple[int, float]:
    """Open what was written and compare what it computes; its parameters, and how far they are apart.

    Raises:
        ModelError: it does not open, or computes something else.
    """
    try:
        stack = open_stack(folder, torch.float32)
    except UserError as error:
        raise ModelError(
            f"config.json cannot say the widths or the blocks that {source} would have ({error}); prune channels only, or to another sparsity"
        ) from error
    computed = _computed(stack, Advance("probe"), silent, "")
    apart = float((computed - expected).norm() / expected.norm())
    if not apart <= _CLOSE:
        raise ModelError(
            f"the slim model computes something else than {source} (its output is {apart:.2g} away): a part of it depends on how many "
            "heads, channels or blocks there are; leave it as it is"
        )
    return sum(p.numel() for p in stack.model.parameters()), apart
