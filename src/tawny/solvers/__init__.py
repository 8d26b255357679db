"""One file a solver; each is a pure function of tensors, readable beside its paper."""

from __future__ import annotations

from tawny.solvers.alps import Alps
from tawny.solvers.base import Needs, Solution, Solver, energy, reconstruction_error
from tawny.solvers.grid import Grid
from tawny.solvers.magnitude import Magnitude
from tawny.solvers.ria import RIA
from tawny.solvers.sparsegpt import SparseGPT
from tawny.solvers.wanda import Wanda

__all__ = [
    "RIA",
    "SOLVERS",
    "Alps",
    "Grid",
    "Magnitude",
    "Needs",
    "Solution",
    "Solver",
    "SparseGPT",
    "Wanda",
    "energy",
    "reconstruction_error",
]

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "sparsegpt": SparseGPT,
    "alps": Alps,
}
