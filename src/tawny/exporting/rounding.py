"""What the matrices of a checkpoint become in a GGUF file: their types, and their bytes.

What was solved for GGUF (`gguf.blocks`) is copied while the weights still are what it says. Everything else is rounded by the
best scales of its type, weighted by an importance matrix where there is one. As llama.cpp's own tools do, the embedding and
the head get at least Q6_K, and a width that a type does not take gets another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from tawny.errors import CheckpointError, ModelError, UserError, nearest
from tawny.exporting.imatrix import read_imatrix
from tawny.exporting.template import Matrices, Payload, Rows, Template
from tawny.gguf_kinds import ENCODED, GGUF_KINDS, GGUFKind, fitting
from tawny.model.tensorfile import entries, read_tensor
from tawny.progress import Progress
from tawny.record import record_in
from tawny.solvers.block_grid import rounded

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = (*FLOATS, *(kind.type for kind in GGUF_KINDS.values()))
_LEAST = GGUF_KINDS["q6_k"]  # of the embedding and the head
_LOST = 0.01  # of the weights may be zeros that become other numbers
_ROWS = 4096  # rounded at a time


def known_type(type: str | None) -> str | None:
    """The type, in capitals.

    Raises:
        UserError: it is none of those that are written.
    """
    kind = None if type is None else type.upper()
    if kind is not None and kind not in TYPES:
        raise UserError(
            f"type {kind!r} is not written{nearest(kind, TYPES)}; choose one of {', '.join(TYPES)}"
        )
    return kind


def floats(values: Tensor, name: str, type: str) -> Rows:
    """Numbers as the bytes of a type of `FLOATS`, `[rows, bytes]`.

    Raises:
        CheckpointError: one is not finite.
        ModelError: F16 does not hold one.
    """
    largest = _largest(values, name)
    if type == "F16" and largest > torch.finfo(torch.float16).max:
        raise ModelError(f"{name!r} holds numbers too large for F16; give another --type, such as BF16")
    rows: Rows = values.to(FLOATS[type]).contiguous().view(torch.uint8).numpy()
    return rows


def _largest(values: Tensor, name: str) -> float:
    largest = float(values.abs().max())
    if not math.isfinite(largest):
        raise CheckpointError(f"{name!r} holds a number that is not finite; nothing is exported")
    return largest


@final
class Rounding:
    """How the matrices of a folder are rounded.

    Args:
        ours: of the folder.
        type: of all matrices; None: what was solved, and else the type of the template.
        imatrix: file that says how much the error of each input counts.

    Raises:
        UserError: an importance matrix where nothing is rounded.
        CheckpointError: `gguf.blocks` or the importance matrix is damaged.
    """

    def __init__(self, ours: Matrices, type: str | None, imatrix: str | Path | None = None) -> None:
        self.ours, self.type = ours, type
        self.blocks = ours.checkpoint.folder / ENCODED
        self._entries = entries(self.blocks) if self.blocks.exists() else {}
        self._solved = {
            name: GGUF_KINDS[kind].type
            for name, _, kind in (key.rpartition(".") for key in self._entries)
            if name in ours.names and kind in GGUF_KINDS
        }
        if len(self._solved) < len(self._entries):
            raise CheckpointError(f"{self.blocks} is not of the model beside it; prune again, or remove it")
        self.ends = [end for end in (ours.embedding, ours.head) if end is not None]
        if imatrix is not None and not self.rounds:
            raise UserError("--imatrix weighs what rounding loses: give --type too, such as Q4_K")
        self._energies = read_imatrix(imatrix) if imatrix is not None else {}
        self._imatrix = imatrix

    @property
    def rounds(self) -> bool:
        """Whether there is anything to round or copy."""
        return self.type not in FLOATS if self.type else bool(self._solved)

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Those matrices whose type is not the template's, whatever they hold."""
        given = set(self._solved).union(self.ends if self._solved else ())
        return [name for name in names if self.type or name in given]

    def fill(
        self, template: Template, out: Path, changed: set[str], progress: Progress
    ) -> tuple[dict[str, int], int]:
        """Write a template with the matrices of the folder.

        Args:
            changed: matrices that are not as in the template.

        Returns:
            How many tensors have each type, and how many zeros of the matrices the file keeps.

        Raises:
            UserError: a type without a zero for a model with many.
            CheckpointError: what was solved or the importance matrix is of another model.
        """
        types = self._types(template, progress)
        weights = self._weights(template, types)
        copied, zeros = self._look(types, progress)
        lost = self._lost(types, copied, zeros)
        replaced = {
            name for name in types if name in changed | copied or types[name] != template.kind_of(name)
        }
        for together in template.alike:
            if replaced.intersection(together):
                replaced.update(together)

        def rows(name: str) -> Callable[[], Rows]:
            if name in copied:
                return lambda: self._read(name)
            return lambda: self._rounded(name, types[name], weights.get(name))

        payloads = {name: Payload(types[name], rows(name)) for name in types if name in replaced}
        return template.fill(out, payloads, progress), sum(zeros.values()) - lost

    def _types(self, template: Template, progress: Progress) -> dict[str, str]:
        """The type of every matrix that has a tensor."""
        types, others, ends = {}, Counter[tuple[str, str]](), self._of_ends()
        for name, places in template.places.items():
            if not places:
                continue
            wanted = ends.get(name) or self.type or self._solved.get(name) or str(template.kind_of(name))
            types[name] = _fitting(wanted, self.ours.shape(name)[1])
            others[wanted, types[name]] += wanted != types[name]
        for (wanted, other), count in others.items():
            if count:
                progress.say(
                    f"{count} of the matrices get {other}: {wanted} has blocks of {_kind(wanted).block} columns, which do not divide "
                    "their width"
                )
        return types

    def _of_ends(self) -> dict[str, str]:
        """The types of the embedding and the head."""
        if not self.rounds:
            return {}
        asked = {} if self.type else _asked(self.ours.checkpoint.folder)
        most = self.type or Counter(self._solved.values()).most_common(1)[0][0]
        least = max(_kind(most), _LEAST, key=lambda kind: kind.bits)
        types = {}
        for name in self.ends:
            own = asked.get("embedding") if name == self.ours.embedding and self.ours.head else None
            kind = GGUF_KINDS.get(own or asked.get("head") or "")
            width = self.ours.shape(name)[1]
            types[name] = kind.type if kind else _fitting(least.type, width)
        return types

    def _look(self, types: Mapping[str, str], progress: Progress) -> tuple[set[str], dict[str, int]]:
        """Matrices whose weights are what was solved, and the zeros of every one."""
        copied, anew, zeros = set(), 0, {}
        progress.phase("looking", len(self.ours.names), "matrices")
        for name in self.ours.names:
            values = self.ours.read(name)
            zeros[name] = int((values == 0).sum())
            if name in self._solved and types.get(name) == self._solved[name]:
                if torch.equal(_decoded(self._read(name), types[name]).to(values.dtype), values):
                    copied.add(name)
                else:
                    anew += 1
            progress.step(name)
        if anew:
            progress.say(
                f"{anew} of the matrices changed since they were solved for GGUF, and are rounded anew by best scales"
            )
        return copied, zeros

    def _read(self, name: str) -> Rows:
        kind = _kind(self._solved[name])
        entry = self._entries[f"{name}.{kind.name}"]
        height, width = self.ours.shape(name)
        if entry.dtype != "U8" or entry.shape != (height, width // kind.block * kind.bytes):
            raise CheckpointError(
                f"{self.blocks} holds {entry.dtype} {list(entry.shape)} of {name!r}; expected U8 "
                f"{[height, width // kind.block * kind.bytes]}: prune again, or remove it"
            )
        with self.blocks.open("rb") as file:
            rows: Rows = read_tensor(file, entry).numpy()
        return rows

    def _lost(self, types: Mapping[str, str], copied: set[str], zeros: Mapping[str, int]) -> int:
        """Zeros that become other numbers; the report counts those that stay.

        Raises:
            UserError: they are many.
        """
        without = [name for name in types if name not in copied and not _keeps_zeros(types[name])]
        lost = sum(zeros[name] for name in without)
        if not lost:
            return 0
        share = lost / sum(math.prod(self.ours.shape(name)) for name in without)
        kind = Counter(types[name] for name in without).most_common(1)[0][0]
        if share > _LOST:
            keeping = ", ".join(type for type in TYPES if _keeps_zeros(type))
            raise UserError(
                f"{share:.0%} of the weights are zeros, which {kind} does not hold; give a --type that does: {keeping}"
            )
        return lost

    def _weights(self, template: Template, types: Mapping[str, str]) -> dict[str, Tensor]:
        """What the importance matrix says of the inputs of each matrix, `[in]`; 1 on average."""
        weights = {}
        for name in types:
            tensor, index = template.places[name][0].slot
            energies = self._energies.get(tensor)
            if energies is None:
                continue
            if energies.dim() > 1 and index < len(energies):
                energies = energies[index]
            if energies.shape != (self.ours.shape(name)[1],):
                raise CheckpointError(
                    f"{self._imatrix} has numbers {list(energies.shape)} for {tensor!r}, which has {self.ours.shape(name)[1]} inputs; "
                    "expected an importance matrix of the same model"
                )
            # An input that was never seen counts a little, so that its scale is one.
            mean = energies.double().mean().clamp(min=1e-30)
            weights[name] = (energies / mean).clamp(min=1e-4).float()
        if self._energies and not weights:
            raise CheckpointError(
                f"{self._imatrix} names no tensor of the file, first {next(iter(self._energies))!r}; expected an importance matrix of the "
                "same model"
            )
        return weights

    def _rounded(self, name: str, type: str, weights_I: Tensor | None) -> Rows:
        pieces = []
        for piece in torch.split(self.ours.read(name), _ROWS):
            W_OI = piece.float().contiguous()
            if type in FLOATS:
                pieces.append(floats(W_OI, name, type))
                continue
            _largest(W_OI, name)
            made_OI, encoded = rounded(W_OI, _kind(type).name, weights_I)
            rows: Rows = encoded.numpy()
            if not torch.equal(_decoded(rows, type), made_OI) or (
                _keeps_zeros(type) and bool(made_OI[W_OI == 0].any())
            ):
                raise CheckpointError(
                    f"{name!r} as {type} is not what it was rounded to; nothing was kept: report this"
                )
            pieces.append(rows)
        return np.concatenate(pieces)


def _kind(type: str) -> GGUFKind:
    return GGUF_KINDS[type.lower()]


def _keeps_zeros(type: str) -> bool:
    return type in FLOATS or _kind(type).zero


def _fitting(type: str, width: int) -> str:
    """The type of a matrix of this width where `type` is asked for: F16 where none in blocks takes it."""
    if type in FLOATS:
        return type
    name = fitting(type.lower(), width)
    return GGUF_KINDS[name].type if name else "F16"


def _decoded(rows: Rows, type: str) -> Tensor:
    """float32, as the `gguf` package reads them."""
    import gguf

    return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[type]).copy())


def _asked(folder: Path) -> dict[str, str]:
    """The kinds of the embedding and the head that a pruned folder's recipe names."""
    values = (record_in(folder).get("recipe") or {}).get("values") or {}
    return {end: str(values[end]) for end in ("embedding", "head") if values.get(end) is not None}
