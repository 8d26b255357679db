"""One loaded block while it is pruned: observed stage by stage, and solved linear by linear.

visitors.py says in which order a run does this. This file says what each step does and what of it is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from tawny.calibration.observe import Observation, Stage, observe
from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError
from tawny.kinds import Kind, kind_of
from tawny.model.couplings import Coupling
from tawny.model.linears import Linear
from tawny.patterns import NM, Pattern, Rank
from tawny.precision import native_dtype
from tawny.pruning.outliers import OutlierCount
from tawny.pruning.session import Session
from tawny.record import LinearRecord
from tawny.run.walk import Block
from tawny.solvers.base import Solution, reconstruction_error
from tawny.solvers.grid import Grid
from tawny.solvers.output import damped
from tawny.solvers.refit import refit

# The samples of a walk that prunes: after pruned blocks, and after dense ones.
PRUNED, DENSE = "pruned", "dense"


@final
class PrunedBlock:
    """One loaded block while it is pruned.

    Attributes:
        stream: the samples in front of it; None where nothing is observed.
        solved: new weights `[out, in]` in float32, by linear; None where nobody asks for more than is stored.
        factors: what the output feels of each linear, by name, where it was asked.
        stage: number of the stage that is being solved.
        warned: warnings in the record before the block, or before what its last stage added.
    """

    def __init__(
        self, session: Session, block: Block, allocation: Mapping[str, float], *, keep: bool = False
    ) -> None:
        self.session, self.block, self.allocation = session, block, allocation
        self.job, self.index = session.job, block.index
        self.linears = self.job.by_block[self.index]
        self.stream = block.streams.get(PRUNED)
        self.outliers = OutlierCount(self.job.allocator.outlier_M, self.job.stack.look)
        self.solved: dict[str, Tensor] | None = {} if keep else None
        self.encoded: dict[str, Tensor] = {}
        self.factors = session.factors.of(
            block.index, self.job.stack.device, self.job.recipe.output.factor or "none"
        )
        self.stage = 0
        self.warned = len(session.record.warnings)
        self._prepared: tuple[Statistics, Any] | None = None

    @property
    def leaves(self) -> bool:
        """Whether it leaves as a whole."""
        if not self.job.removes_blocks or not self.linears:
            return False
        return all(self.allocation[linear.name] == 1 for linear in self.linears)

    def stages(self) -> Iterator[tuple[Stage, Mapping[str, Statistics]]]:
        """The stages and what they saw of the dense block."""
        if self.job.couplings:
            yield from self._couplings(self.job.couplings[self.index])
            return
        if self.stream is None or self.job.removes_blocks:
            yield Stage(list(self.linears)), {}
            return
        seen = self._observe(self.linears)
        with self.session.run.clock("outliers"):
            self.outliers.see(self.linears, seen.statistics)
        for self.stage, stage in enumerate(seen.stages):
            given = {x.name: seen.statistics.pop(x.name) for x in stage.linears if x.name in seen.statistics}
            yield stage, given
            # Solved; a Hessian nobody needs any more may be the largest thing in memory.
            self._prepared = None
            given.clear()

    def _couplings(self, couplings: Sequence[Coupling]) -> Iterator[tuple[Stage, Mapping[str, Statistics]]]:
        """The couplings as stages; only what the solver looks at is observed."""
        job = self.job
        watched = {
            c.name: list(c.linears) if job.member_solver.looks_at_rows else [c.consumer] for c in couplings
        }
        together = [linear for linears in watched.values() for linear in linears]
        seen = self._observe(together).statistics if self.stream is not None else {}
        self.outliers.see(self.linears, seen)
        for self.stage, coupling in enumerate(couplings):
            given = {x.name: seen.pop(x.name) for x in watched[coupling.name] if x.name in seen}
            yield Stage(list(coupling.linears), coupling), given
            given.clear()

    def _observe(self, linears: Sequence[Linear]) -> Observation:
        assert self.stream is not None
        total = len(self.stream)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.session.run.progress.detail("observing", done, total)

        with self.session.run.clock("observe"):
            several = self.session.run.ranks.several
            seen = observe(self.stream, self.index, linears, self.job.needs, exact=several, step=step)
        with self.session.run.clock("exchange"):
            self.session.run.ranks.add(seen.statistics)
        return seen

    def solution(
        self, linear: Linear, W_OI: Tensor, statistics: Statistics | None, target: float
    ) -> tuple[Solution, tuple[float, str] | None, dict[str, Any]]:
        """The linear solved at sparsity `target`, refitted where the recipe wants it and the error falls.

        Returns:
            The solution; its relative error and what that was measured by, if it had to be known; notes for the record.
        """
        job, session, notes, measured = self.job, self.session, {}, None
        grid, factor = self.grid(linear), self.factors.get(linear.name)
        try:
            with session.run.clock("solve"):
                solution: Solution = job.weight_solver.solve(
                    W_OI,
                    statistics,
                    pattern_at(job.pattern, target),
                    target,
                    prepared=self._prepare(statistics),
                    grid=None if grid is None else grid.suiting(W_OI),
                    output=factor,
                )
            if job.recipe.refit:
                measured = self.measure(W_OI, solution.weight, statistics, solution.lost)
            if measured is not None and measured[0] > 0:
                assert statistics is not None and statistics.hessian is not None
                notes["before_refit"] = measured[0]
                H_II, G = statistics.hessian, None if factor is None else damped(factor)
                with session.run.clock("refit"):
                    refitted, left = refit(W_OI, solution.mask, H_II, start=solution.weight, output=G)
                better = self.measure(W_OI, refitted, statistics, left)
                # Its damped objective is not quite what is judged here.
                if factor is None:
                    falls = better[0] < measured[0]
                else:
                    before, after = (
                        factor.felt(W_OI - x_OI, H_II, statistics.tokens)
                        for x_OI in (solution.weight, refitted)
                    )
                    falls = after < before
                if falls:
                    solution.weight, measured = refitted, better
        except NumericalError as error:
            raise NumericalError(f"{linear.name} {list(linear.shape)}: {error}") from error
        return solution, measured, notes

    def solve(self, linear: Linear, statistics: Statistics | None) -> None:
        """Prune one linear and record what became of it."""
        job, session, start = self.job, self.session, time.perf_counter()
        target = self.allocation[linear.name]
        pattern = pattern_at(job.pattern, target)
        W_OI = job.stack.weight(linear)
        notes: dict[str, Any] = {}
        known = self.known(linear, statistics)
        if known is not statistics:
            notes["tokens"] = 0
        session.run.progress.detail(
            f"solving {linear.name.removeprefix(job.stack.name(self.index) + '.')}", 0, 0
        )
        solution, measured, more = self.solution(linear, W_OI, known, target)
        lost, kind = measured or self.measure(W_OI, solution.weight, known, solution.lost)
        notes |= self.felt(linear, W_OI, solution.weight, statistics)
        low = isinstance(job.budget_pattern, Rank)
        words = f"{pattern.n}:{pattern.m}" if isinstance(pattern, NM) else "rank" if low else "unstructured"
        seconds = time.perf_counter() - start
        # On a grid 0 may be a level, which says nothing of what was removed.
        removed = None if self.grid(linear) is None else linear.numel - int(solution.mask.sum())
        noted = {**solution.notes, **notes, **more}
        self.put(linear, solution.weight, words, (lost, kind), seconds, noted, removed)
        if solution.state is not None and (grid := self.grid(linear)) is not None:
            encoded = grid.encoded(solution.weight, solution.state)
            if encoded is not None:
                self.encoded[f"{linear.name}.{self._kind(linear)}"] = encoded

    def put(
        self,
        linear: Linear,
        weight_OI: Tensor,
        pattern: str,
        error: tuple[float, str],
        seconds: float,
        notes: dict[str, Any],
        removed: int | None = None,
    ) -> None:
        """Give a linear its new weight, and record what became of it; `removed` of None are all zeros."""
        stored = self.job.stack.set_weight(linear, weight_OI)
        if self.solved is not None:
            self.solved[linear.name] = weight_OI
        zeros = int((stored == 0).sum()) if removed is None else removed
        self.session.record.linears.append(
            LinearRecord(
                name=linear.name,
                shape=linear.shape,
                block=self.index,
                stage=self.stage,
                target=self.allocation[linear.name],
                zeros=zeros,
                sparsity=zeros / linear.numel,
                pattern=pattern,
                error=error[0],
                error_kind=error[1],
                seconds=round(seconds, 4),
                notes=notes,
            )
        )

    def note_outliers(self) -> None:
        """Note in the record how many outliers every linear had and has."""
        with self.session.run.clock("outliers"):
            before, after = self.outliers.before, self.outliers.after(self.linears)
        for entry in self.session.record.linears:
            if entry.name in after:
                entry.outliers_before, entry.outliers_after = before.get(entry.name), after[entry.name]

    def _kind(self, linear: Linear) -> str | None:
        return self.session.record.values.get(linear.name, self.job.recipe.values.kind)

    def grid(self, linear: Linear) -> Grid | None:
        """What the survivors of a linear are rounded to; None where they stay as they are."""
        kind = self._kind(linear)
        return None if kind is None else self.job.recipe.values.grid(kind, linear.shape[1])

    def few_bits(self) -> dict[str, tuple[Kind, int | None]]:
        """The kinds that a training keeps to. int8 loses next to nothing when it is rounded afterwards."""
        group, named = self.job.recipe.values.group_size, {x.name: self._kind(x) for x in self.linears}
        kinds = {name: kind_of(kind) for name, kind in named.items() if kind is not None}
        return {name: (kind, group) for name, kind in kinds.items() if kind.bits < 8}

    def known(
        self, linear: Linear, statistics: Statistics | None, so: str | None = "; its weights alone decided"
    ) -> Statistics | None:
        """What a solve goes by: the statistics, or blind ones for an expert that no token was routed to.

        Args:
            so: how the warning of blind ones ends; None: there is none.
        """
        if statistics is not None and statistics.tokens == 0:
            if so is not None:
                self.session.record.warnings.append(f"{linear.name} saw no calibration token{so}")
            return blind_statistics(linear.shape[1], self.job.needs, self.job.stack.look(linear).device)
        return statistics

    def measure(
        self, W_OI: Tensor, pruned_OI: Tensor, statistics: Statistics | None, lost: float | None = None
    ) -> tuple[float, str]:
        with self.session.run.clock("error"):
            return relative_error(W_OI, pruned_OI, statistics, lost)

    def felt(
        self, linear: Linear, W_OI: Tensor, pruned_OI: Tensor, statistics: Statistics | None
    ) -> dict[str, float]:
        """For the record, where the output was asked: what it feels of this change, and of the linear's outputs in the mean."""
        factor, samples = self.factors.get(linear.name), self.session.samples
        if factor is None or statistics is None or samples is None:
            return {}
        H = statistics.squared_norms.float() if statistics.hessian is None else statistics.hessian
        with self.session.run.clock("error"):
            felt = factor.felt(W_OI - pruned_OI, H, len(samples) * samples.seqlen)
        return {"felt": felt, "output": factor.mean}

    def _prepare(self, statistics: Statistics | None) -> Any:
        """What the solver can compute once for linears that share an input; dropped with the stage."""
        if statistics is None:
            return None
        if self._prepared is None or self._prepared[0] is not statistics:
            self._prepared = None
            self._prepared = (statistics, self.job.weight_solver.prepare(statistics))
        return self._prepared[1]


def pattern_at(pattern: Pattern, sparsity: float) -> Pattern:
    """The n:m that one linear gets from its own share of a mixed budget; other patterns stay as they are."""
    if isinstance(pattern, NM):
        return NM(round((1.0 - sparsity) * pattern.m), pattern.m)
    return pattern


def blind_statistics(width: int, needs: Any, device: torch.device) -> Statistics:
    """Statistics that prefer no input over another."""
    hessian = torch.eye(width, device=device) if needs == "hessian" else None
    sums = torch.zeros(width, device=device, dtype=torch.float64)
    return Statistics(0, torch.ones(width, device=device, dtype=torch.float64), hessian, sums)


def relative_error(
    W_OI: Tensor, pruned_OI: Tensor, statistics: Statistics | None, lost: float | None = None
) -> tuple[float, str]:
    """The share of the output's energy that pruning destroyed, as exactly as the statistics allow, and how exactly.

    `lost` is the energy itself, where the solver knows it.
    """
    if statistics is not None and statistics.hessian is not None:
        dtype = native_dtype() if W_OI.device.type == "cpu" else torch.bfloat16
        return reconstruction_error(W_OI, pruned_OI, statistics.hessian, lost=lost, dtype=dtype), "hessian"
    if statistics is not None:
        weights, kind = statistics.squared_norms.float(), "norms"
    else:
        weights, kind = torch.ones(W_OI.shape[1], device=W_OI.device), "weights"
    total = float((W_OI.square() @ weights).sum())
    lost = float(((W_OI - pruned_OI).square() @ weights).sum())
    return (lost / total if total > 0 else 0.0), kind
