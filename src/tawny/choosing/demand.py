"""What a search and a fit will take, known before they start: windows, memory and candidates at once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from tawny.calibration.output import Factor, most_felt
from tawny.calibration.statistics import Needs, most
from tawny.choosing.candidates import surveyed
from tawny.choosing.settings import FitSettings, SearchSettings
from tawny.model.streams import Samples
from tawny.pruning.prepare import Job, demand_of, output_count
from tawny.run.memory import LOGIT_BYTES, Demand, Load, base_of
from tawny.solvers import SOLVERS
from tawny.solvers.base import Solver
from tawny.solvers.experts import ExpertSolver
from tawny.solvers.members import MemberSolver

_HIDDEN_BYTES = 1_000_000_000  # of hidden states of candidates that go through the model together


# Bytes for each weight of a head or an embedding while it is packed, with what comes back of it.
_PACKED_END = 16


def solver_of_levels(job: Job) -> tuple[str, Solver | MemberSolver | ExpertSolver]:
    """What makes the solutions that are compared: the recipe's solver, or the one that it names as quick and alike."""
    own = job.recipe.solver.name
    if job.couplings:
        return own, job.member_solver
    if job.mixtures:
        return own, job.expert_solver
    quick = job.weight_solver.stand_in
    return (quick, SOLVERS[quick]()) if quick else (own, job.weight_solver)


def searched_factor(settings: SearchSettings, job: Job) -> Factor:
    """What is asked of the output: for the solutions, and for what candidates measure."""
    return most_felt([job.recipe.output.factor or "none", surveyed(settings.families).output])


def searched_windows(settings: SearchSettings, held_out: int) -> int:
    """How many of the held-out windows are searched on; a short text leaves no more than half."""
    return min(settings.windows, held_out - held_out // 2)


def held_back(settings: SearchSettings, samples: Samples) -> tuple[int, int]:
    """How many windows of how many tokens are kept back of samples that were given; those with a mask are not cut."""
    length = samples.seqlen if samples.mask is not None else min(settings.length, samples.seqlen)
    return min(settings.held_out, len(samples) // 4) or 1, length


def asked_windows(settings: FitSettings, samples: int, seqlen: int) -> tuple[int, int]:
    """How many windows of how many tokens of the samples a fit asks the output on."""
    length = min(settings.length, seqlen)
    return min(samples * (seqlen // length), 2 * settings.windows), length


def role_of(name: str) -> str:
    """What a linear is, in whichever block: its name without numbers."""
    return re.sub(r"\d+", "*", name)


def candidates_at_once(size: int) -> int:
    """How many candidates with hidden states of so many bytes go through a block together: each before and after it."""
    return max(1, _HIDDEN_BYTES // (2 * size))


@dataclass(frozen=True)
class SearchDemand:
    """A search as far as memory is concerned: solving at each level, comparing, and pruning finalists.

    Attributes:
        levels: the walk that solves them, as a run of its solver on the samples of the search.
        finals: the walk that prunes a finalist; None where none is pruned.
        collected: statistics of the first walk, for solutions and candidates.
        held_out, candidates: bytes of hidden states that models are compared by: the dense model's, and those of the
            models that go through the blocks together.
    """

    levels: Demand
    finals: Demand | None
    collected: Needs
    held_out: int
    candidates: int

    @classmethod
    def of(cls, settings: SearchSettings, job: Job, load: Load) -> SearchDemand:
        count = min(max(1, math.ceil(settings.tokens / max(1, load.seqlen))), load.samples)
        windows, length = settings.held_out, min(settings.length, load.seqlen)
        if load.given is not None:
            windows, length = held_back(settings, load.given)
        survey = surveyed(settings.families)
        solver = solver_of_levels(job)[1]
        finals = replace(demand_of(job, load), samples=count, seqlen=load.seqlen, refining=False)
        needs: Needs = "hessian" if job.recipe.refit else solver.needs
        factor = searched_factor(settings, job)
        asks = factor != "none" and load.samples > 0
        levels = replace(
            finals,
            solver=solver,
            needs=needs,
            measuring=survey,
            characters=load.characters,
            profiled=min(finals.profiled, count),
            factor=factor,
            felt=output_count(job.recipe, load.samples, load.seqlen) if asks else 0,
        )
        size, searched = length * job.stack.hidden_bytes, searched_windows(settings, windows)
        # Many candidates see few windows, the best of them more, and only the last few all (evolution.py).
        rounds = [
            (settings.offspring + len(settings.families), max(1, searched // 4)),
            (max(4, settings.trials // 4), max(1, searched // 2)),
            (max(5, settings.offspring // 8), searched),
            (5, searched if settings.finalists else windows - searched),
        ]
        return cls(
            levels,
            finals if settings.finalists else None,
            most([needs, survey.needs]),
            windows * size,
            max(_hidden_of(candidates, windows * size) for candidates, windows in rounds),
        )

    def phases(self, *, spill: bool) -> dict[str, dict[str, int]]:
        levels, stack = self.levels, self.levels.stack
        base = base_of(stack)
        phases = levels.before_walks(base)
        if not any(levels.by_block):
            return phases
        if levels.felt:
            phases |= levels.feeling_phases(base, base, spill=spill)
        walked = 0 if spill else levels.samples * levels.seqlen * stack.hidden_bytes
        block, profiled = levels.block_bytes(), levels.profiled * levels.seqlen * stack.hidden_bytes
        solving = {**base, "block": block, "hidden_states": walked + profiled + self.held_out}
        work = max(
            levels.solver.workspace(*x.shape, output=levels.factor)
            for linears in levels.by_block
            for x in linears
        )
        phases["levels"] = {
            **solving,
            "statistics": levels.observing(self.collected),
            "solver": max(work, levels.forward_bytes(), levels.measuring_bytes()),
        }
        comparing: dict[str, Any] = {
            **base,
            "head": stack.late_bytes,
            "hidden_states": self.held_out + self.candidates,
        }
        phases["candidates"] = {
            **comparing,
            "block": 2 * block,  # and its dense weights, put back where a level changes nothing
            "forward": levels.forward_bytes(),
        }
        phases["comparison"] = {**comparing, "logits": 4 * LOGIT_BYTES}
        if self.finals is not None:  # most of what was held out goes along
            base = {**base, "head": stack.late_bytes}
            walk = self.finals.walk_phases(base, walked + 2 * self.held_out)
            phases |= {f"finalists, {name}": parts for name, parts in walk.items()}
        return phases


@dataclass(frozen=True)
class FitDemand:
    """A fit as far as memory is concerned.

    Attributes:
        asking: the walk back that asks the output, beside what rounding changed in the linears of a block.
        measuring: the walk that measures what rounding costs, on the windows that are asked on.
        finalist: the prune of a finalist, beside the model that measured, which stays open.
        judged: bytes of the hidden states that a finalist is judged by.
    """

    asking: Demand
    measuring: SearchDemand
    finalist: Demand
    judged: int

    @classmethod
    def of(cls, settings: FitSettings, job: Job, load: Load) -> FitDemand:
        finalist = demand_of(job, load)
        walk = replace(finalist, refining=False)
        asked, length = asked_windows(settings, load.samples, load.seqlen)
        asking = replace(walk, felt=asked, seqlen=length, factor="rows")
        window = length * job.stack.hidden_bytes
        hidden = settings.windows * window
        together = len({role_of(x.name) for x in job.linears})
        levels = replace(walk, samples=asked, seqlen=length)
        measuring = SearchDemand(levels, None, job.needs, hidden, _hidden_of(together, hidden))
        return cls(asking, measuring, finalist, settings.deciding * window)

    def phases(self, *, spill: bool) -> dict[str, dict[str, int]]:
        phases = self.measuring.phases(spill=spill)
        if "text" not in phases:
            return phases
        stack, base = self.finalist.stack, base_of(self.finalist.stack)
        phases |= self.asking.feeling_phases(base, base, spill=spill)
        phases["backward"]["changes"] = self.asking.block_bytes()
        ends = base["embeddings"] + stack.late_bytes
        largest = max(base["embeddings"], stack.late_bytes) // stack.compute.itemsize
        packing = {**base, "head": stack.late_bytes, "packing": _PACKED_END * largest}
        phases["packing head and embedding"] = packing
        for name, parts in self.finalist.phases(spill=spill).items():
            phases[f"finalists, {name}"] = {**parts, "the model that measured": ends}
        # The dense model, and a finalist whose head and embedding are decoded for the walk.
        judging = {"the two models": 2 * ends, "hidden_states": 2 * self.judged, "logits": 4 * LOGIT_BYTES}
        phases["judging"] = {
            **base,
            "head": stack.late_bytes,
            "block": self.finalist.block_bytes(),
            **judging,
        }
        return phases


def _hidden_of(candidates: int, size: int) -> int:
    """Bytes of hidden states while so many candidates are compared, `size` each: theirs, and the embedded tokens."""
    return (2 * min(candidates, candidates_at_once(size)) + 1) * size
