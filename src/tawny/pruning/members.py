"""Solve one coupling of a loaded block: who leaves, the consumer's new weight, and zeros where members were."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError
from tawny.model.couplings import Coupling
from tawny.pruning.block import PrunedBlock
from tawny.solvers.base import Seen
from tawny.solvers.members import Chosen, Coupled, Producer


@dataclass(frozen=True)
class Without:
    """A coupling without some of its members.

    Attributes:
        weights: of each linear the dense weight and the new one, float32.
        biases: what takes the place of those that change, float32.
    """

    chosen: Chosen
    weights: Mapping[str, tuple[Tensor, Tensor]]
    biases: Mapping[str, Tensor]

    def set_biases(self, block: PrunedBlock, coupling: Coupling) -> None:
        for linear in coupling.linears:
            if linear.name in self.biases:
                block.job.stack.set_bias(linear, self.biases[linear.name])


def solve_members(block: PrunedBlock, coupling: Coupling, statistics: Mapping[str, Statistics]) -> None:
    """Remove the members that the allocation asks for, and record what became of every linear."""
    session, stack, start = block.session, block.job.stack, time.perf_counter()
    consumer = coupling.consumer
    session.run.progress.detail(f"solving {consumer.name.removeprefix(stack.name(block.index) + '.')}", 0, 0)
    seen = seen_by(block, coupling, statistics)
    removed = round(block.allocation[consumer.name] * coupling.members)
    with session.run.clock("solve"):
        without = without_members(block, coupling, seen, removed)
    without.set_biases(block, coupling)
    if block.job.member_solver.wants_bias and removed and stack.bias(consumer) is None:
        session.record.warnings.append(
            f"{consumer.name} has no bias to compensate with, and {type(stack.model).__name__} no setting that gives it one"
        )
    for linear in coupling.linears:
        dense_OI, pruned_OI = without.weights[linear.name]
        error = block.measure(dense_OI, pruned_OI, seen[linear.name])
        first = linear is consumer
        notes = {"removed": removed, "members": coupling.members, **without.chosen.notes} if first else {}
        notes |= block.felt(linear, dense_OI, pruned_OI, statistics.get(linear.name))
        seconds = time.perf_counter() - start if first else 0.0
        block.put(linear, pruned_OI, coupling.kind, error, seconds, notes)


def seen_by(block: PrunedBlock, coupling: Coupling, statistics: Mapping[str, Statistics]) -> dict[str, Seen]:
    """What a solve goes by, of each linear."""
    return {linear.name: block.known(linear, statistics.get(linear.name)) for linear in coupling.linears}


def without_members(
    block: PrunedBlock, coupling: Coupling, seen: Mapping[str, Seen], removed: int
) -> Without:
    """The coupling without so many members, which the solver chooses; the block stays as it is.

    Raises:
        NumericalError: names the linear.
    """
    stack, consumer = block.job.stack, coupling.consumer
    W_OI, chosen = _choose(block, coupling, seen, removed)
    gone_G = ~chosen.keep.cpu()
    weights, biases = {consumer.name: (W_OI, chosen.weight)}, {}
    for rows in coupling.producers:
        dense_OI = stack.weight(rows.linear)
        gone_R = rows.index_GR[gone_G].flatten().to(dense_OI.device)
        weights[rows.linear.name] = dense_OI, dense_OI.index_fill(0, gone_R, 0.0)
        bias_O = stack.bias(rows.linear)
        if bias_O is not None:
            biases[rows.linear.name] = bias_O.index_fill_(0, gone_R, 0.0)
    bias_O = stack.bias(consumer)
    if bias_O is not None and chosen.shift is not None:
        biases[consumer.name] = bias_O + chosen.shift
    return Without(chosen, weights, biases)


def _choose(
    block: PrunedBlock, coupling: Coupling, seen: Mapping[str, Seen], removed: int
) -> tuple[Tensor, Chosen]:
    """The consumer's dense weight, and the solver's choice."""
    stack, consumer = block.job.stack, coupling.consumer
    W_OI = stack.weight(consumer)
    producers = [
        Producer(stack.weight(x.linear), seen[x.linear.name], x.index_GR.to(W_OI.device))
        for x in coupling.producers
    ]
    coupled = Coupled(
        W_OI,
        seen[consumer.name],
        coupling.columns_GC.to(W_OI.device),
        producers,
        stack.bias(consumer) is not None,
        block.factors.get(consumer.name),
    )
    try:
        return W_OI, block.job.member_solver.choose(coupled, removed)
    except NumericalError as error:
        raise NumericalError(f"{consumer.name} {list(consumer.shape)}: {error}") from error
