"""One file a solver; each is a pure function of tensors, readable beside its paper.

A new solver is a file and an entry below, in the registry of what it removes: weights, members, blocks, experts or ranks.
recipe/catalogue.py lists those that remove whole parts.
"""

from __future__ import annotations

from tawny.calibration.statistics import Needs
from tawny.solvers.alps import Alps
from tawny.solvers.base import BlockSolver, Solution, Solver, energy, reconstruction_error
from tawny.solvers.divergence import Divergence
from tawny.solvers.experts import ExpertSolver, Fisher, Frequency, Reap
from tawny.solvers.flap import Flap
from tawny.solvers.grid import Grid
from tawny.solvers.influence import Influence
from tawny.solvers.magnitude import Magnitude
from tawny.solvers.members import MemberSolver
from tawny.solvers.obs import Obs
from tawny.solvers.ria import RIA
from tawny.solvers.sparsegpt import SparseGPT
from tawny.solvers.svd import Svd
from tawny.solvers.wanda import Wanda

__all__ = [
    "BLOCK_SOLVERS",
    "EXPERT_SOLVERS",
    "MEMBER_SOLVERS",
    "RANK_SOLVERS",
    "RIA",
    "SOLVERS",
    "Alps",
    "BlockSolver",
    "Divergence",
    "ExpertSolver",
    "Fisher",
    "Flap",
    "Frequency",
    "Grid",
    "Influence",
    "Magnitude",
    "MemberSolver",
    "Needs",
    "Obs",
    "Reap",
    "Solution",
    "Solver",
    "SparseGPT",
    "Svd",
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

# Of whole blocks: which leave.
BLOCK_SOLVERS: dict[str, type[BlockSolver]] = {"divergence": Divergence, "influence": Influence}

# Of whole experts: which leave.
EXPERT_SOLVERS: dict[str, type[ExpertSolver]] = {
    "reap": Reap,
    "fisher": Fisher,
    "frequency": Frequency,
    "magnitude": Magnitude,
}

# Of low rank; studies only, since nothing here stores the two factors.
RANK_SOLVERS: dict[str, type[Solver]] = {"svd": Svd}
