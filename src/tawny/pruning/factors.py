"""The factors G of a model's linears (calibration/output.py), in a file for each block until the block is pruned."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
from torch import Tensor

from tawny.calibration.output import Factor, OutputFactor
from tawny.model.tensorfile import natural, read_tensors


@final
class OutputFactors:
    """The factors of a model's linears, in a file for each block; of none where nothing was asked.

    Args:
        folder: where they are; None: nothing was asked.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def of(self, block: int, device: torch.device, factor: Factor) -> dict[str, OutputFactor]:
        """By linear name, those of one block; of what is there no more than `factor`."""
        if self._folder is None or factor == "none":
            return {}
        parts_of_linears: dict[str, dict[str, Tensor]] = {}
        for key, value in read_tensors(file_of(self._folder, block)).items():
            name, _, part = key.rpartition("/")
            if factor == "whole" or not part.isdigit():
                parts_of_linears.setdefault(name, {})[part] = value.to(device)
        return {name: factor_of(parts) for name, parts in parts_of_linears.items()}


def file_of(folder: Path, block: int) -> Path:
    return folder / f"{block:05d}.safetensors"


def parts_of(factor: OutputFactor) -> dict[str, Tensor]:
    blocks = {str(place): G_RR for place, G_RR in enumerate(factor.blocks)}
    return {"tokens": torch.tensor(factor.tokens), "diagonal": factor.diagonal, **blocks}


def factor_of(parts: dict[str, Tensor]) -> OutputFactor:
    tokens, diagonal = int(parts.pop("tokens")), parts.pop("diagonal")
    return OutputFactor(tokens, diagonal, tuple(parts[key] for key in sorted(parts, key=natural)))
