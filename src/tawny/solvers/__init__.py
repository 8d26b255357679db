"""One file a solver; each is a pure function of tensors, readable beside its paper."""

from __future__ import annotations

from tawny.solvers.alps import Alps
from tawny.solvers.base import Needs, Solution, Solver, energy, reconstruction_error
from tawny.solvers.flap import Flap
from tawny.solvers.grid import Grid
from tawny.solvers.magnitude import Magnitude
from tawny.solvers.members import MemberSolver
from tawny.solvers.obs import Obs
from tawny.solvers.ria import RIA
from tawny.solvers.sparsegpt import SparseGPT
from tawny.solvers.wanda import Wanda

__all__ = [
    "MEMBER_SOLVERS",
    "RIA",
    "SOLVERS",
    "Alps",
    "Flap",
    "Grid",
    "Magnitude",
    "MemberSolver",
    "Needs",
    "Obs",
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

# Of whole channels and heads; some of them know single weights, too.
MEMBER_SOLVERS: dict[str, type[MemberSolver]] = {
    "obs": Obs,
    "flap": Flap,
    "wanda": Wanda,
    "magnitude": Magnitude,
}
