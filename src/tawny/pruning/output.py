"""Ask the output: the backward walk, and the factors G of every linear that it leaves behind for the solvers.

It comes first, on the dense model, from the first tokens of the calibration. The factors of all blocks may be larger than the
model, so each block has a file of them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from tawny.calibration.output import (
    Factor,
    OutputAccumulator,
    gradient_of_drawn_tokens,
    gradient_of_features,
    watch_gradients,
)
from tawny.model import durable
from tawny.model.streams import Samples, Stream
from tawny.model.structure import predicts_tokens
from tawny.model.tensorfile import write_tensors
from tawny.pruning.factors import OutputFactors, file_of, parts_of
from tawny.pruning.prepare import Job, output_count
from tawny.pruning.session import Session
from tawny.run.memory import LOGIT_BYTES
from tawny.run.ranks import Ranks
from tawny.run.walk import Block, Visitor, walk_back

_NAME = "output"


@contextmanager
def asking_output(session: Session, factor: Factor) -> Iterator[Session]:
    """The session with factors of every linear, if any are asked for; they are there until the end of the context."""
    run = session.run
    if factor == "none" or session.samples is None:
        yield session
        return
    with contextlib.ExitStack() as leaving:
        folder = run.journal.steps(leaving) / _NAME
        if run.ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
        samples = session.samples
        count = output_count(session.job.recipe, len(samples), samples.seqlen)
        asked = samples.first(max(run.ranks.size, count))
        visitor = _Factors(session.job, factor, folder)
        walk_back(
            run,
            session.job.stack,
            asked,
            [visitor],
            end=End(session, asked),
            name=_NAME,
            phase="asking the output",
        )
        yield replace(session, factors=OutputFactors(folder))


@final
class _Factors(Visitor):
    """Writes the factors of every block to a file."""

    def __init__(self, job: Job, factor: Factor, folder: Path) -> None:
        self.job, self.factor, self.folder = job, factor, folder
        self.seen: Mapping[str, OutputAccumulator] = {}

    @contextmanager
    def around(self, block: Block) -> Iterator[None]:
        linears, stream = self.job.by_block[block.index], block.streams[_NAME]
        self.seen = {x.name: OutputAccumulator(x.shape[0], self.factor, block.stack.device) for x in linears}
        with watch_gradients(linears, {name: each.add for name, each in self.seen.items()}, stream):
            yield
        self.seen = {}

    def visit(self, block: Block) -> None:
        ranks = block.run.ranks
        for accumulator in self.seen.values():
            _add_up(accumulator, ranks)
        if not ranks.first:
            return
        parts = {
            f"{name}/{part}": value.cpu()
            for name, accumulator in self.seen.items()
            for part, value in parts_of(accumulator.finish()).items()
        }
        path = file_of(self.folder, block.index)
        with durable.writing(path), durable.beside(path) as temporary:
            write_tensors(temporary, parts)


def _add_up(accumulator: OutputAccumulator, ranks: Ranks) -> None:
    if ranks.several:
        tokens = torch.tensor(accumulator.tokens)
        ranks.sum([tokens, *accumulator.sums])
        accumulator.tokens = int(tokens)


@final
class End:
    """What the output says: tokens drawn from what the model predicts, or noise on its features."""

    def __init__(self, session: Session, samples: Samples) -> None:
        self.job, self.seed = session.job, session.job.recipe.seed
        self.first = session.run.ranks.here(samples).start

    def __call__(self, stream: Stream, chunk: int) -> Tensor:
        stack, part = stream.stack, stream.slices[chunk]
        seeds = [_seed(self.seed, self.first + sample) for sample in range(part.start, part.stop)]
        if not predicts_tokens(stack.model):
            return gradient_of_features(stack, stream, chunk, seeds)
        vocabulary = int(stack.config.get_text_config().vocab_size)
        rows = max(16, LOGIT_BYTES // (4 * vocabulary))
        return gradient_of_drawn_tokens(stack, stream, chunk, seeds, rows)


def _seed(seed: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"output {seed} {sample}".encode()).digest()[:7])
