"""Weights that have broken kernels before, or could."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import Tensor

from tawny.kinds import KINDS as TABLE

SHAPES = [(1, 1), (1, 64), (64, 1), (3, 5), (4, 64), (5, 65), (17, 130), (7, 200), (66, 576), (33, 1537)]
SPARSITIES = [0.0, 0.5, 0.7, 0.9, 1.0]
# Every kind with every group of columns that its scales may cover.
EVERY = [(kind.name, group) for kind in TABLE.values() for group in kind.groups]
# Every kind with its usual group of columns; two kinds with every group that their scales may cover.
KINDS = [(name, group) for name, group in EVERY if name in ("int8", "int4") or group == TABLE[name].groups[0]]


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def weight(shape: tuple[int, int], sparsity: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    W[torch.rand(shape, generator=generator) < sparsity] = 0
    return W


def uneven(shape: tuple[int, int]) -> Tensor:
    """Empty and full rows, an empty and a full run of columns: groups of very different sizes."""
    W = weight(shape, 0.6, 1)
    W[::3] = 0
    W[1::5] = weight(shape, 0.0, 2)[1::5]
    W[:, 64:140] = 0
    W[2:, 140:150] = 1.5
    return W
