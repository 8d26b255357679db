"""Solutions of every linear at every level, kept on disk, and how far a model put together from them is from the dense one.

One walk through the dense model takes the statistics once, solves each linear at each level with the recipe's solver
or what stands in for it, and remembers what an allocator wants to know and the dense model's last hidden states. After that a candidate
costs one forward of the held-out windows: its weights are read from the disk block by block, and candidates that agree
on the first blocks go through them together. Memory is that of pruning: one block, its statistics, hidden states.
"""

from __future__ import annotations

__all__ = ["LevelStore", "Reference", "Scorer", "solve_levels", "store_bytes"]

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from tawny.allocation.profile import LinearInfo, Profile
from tawny.calibration.observe import observe
from tawny.calibration.statistics import Needs, Statistics, most
from tawny.errors import NumericalError, OutputError, TawnyError
from tawny.model.blocks import Stack
from tawny.model.durable import writing
from tawny.model.linears import Linear
from tawny.model.streams import Samples, Stream
from tawny.model.tensorfile import Entry, TensorWriter, entries, free_bytes, raw, read_tensor
from tawny.pruning.block import blind_statistics, pattern_at
from tawny.pruning.memory import LOGIT_BYTES
from tawny.pruning.profiling import LazyWeights
from tawny.pruning.space import Levels, Space
from tawny.recipe import Recipe
from tawny.solvers.base import energy
from tawny.solvers.refit import refit
from tawny.watch import Watch

_CACHED_BYTES = 8_000_000  # of float32 logits that softmax and product read again before they leave the cache
HIDDEN_BYTES = 1_000_000_000  # of hidden states of candidates that go through the model together


def store_bytes(space: Space, dtype: torch.dtype) -> int:
    """Bytes that the solutions of all levels take; a level that removes nothing takes none."""
    return sum(
        x.numel * dtype.itemsize
        for i, x in enumerate(space.linears)
        for level in space.levels
        if space.sparsity(i, level) > 0
    )


class LevelStore:
    """One file a block in `folder`, which is removed by `close`.

    Raises:
        OutputError: the disk has not enough room.
    """

    def __init__(self, folder: Path, space: Space, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.bytes = store_bytes(space, dtype)
        shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
            folder.mkdir(parents=True)
        free = free_bytes(folder)
        if free < self.bytes:
            self.close()
            raise OutputError(
                f"the solutions a search compares take {self.bytes / 1e9:.1f} GB, and {folder.parent} has "
                f"{free / 1e9:.1f} GB free: choose fewer allocator.levels, or another place"
            )
        self._file: IO[bytes] | None = None
        self._entries: dict[str, Entry] = {}

    def path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def open(self, index: int) -> None:
        """Turn to the file of one block."""
        self._turn()
        if self.path(index).is_file():
            self._entries = entries(self.path(index))
            self._file = self.path(index).open("rb")

    def read(self, linear: Linear, level: int) -> Tensor | None:
        """`[out, in]`, or None where the level removes nothing."""
        entry = self._entries.get(key_of(linear, level))
        return None if entry is None or self._file is None else read_tensor(self._file, entry)

    def _turn(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._entries = None, {}

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._turn()
        shutil.rmtree(self.folder, ignore_errors=True)


def key_of(linear: Linear, level: int) -> str:
    return f"{linear.name}@{level}"


@dataclass
class Solved:
    """What the walk leaves behind beside the store.

    Attributes:
        profile: measures of every block, for the allocators.
        hidden: `[windows, tokens, hidden]` of the dense model behind its last block.
        weights: SHA-256 of all weights that were solved.
        warnings: linears that saw no token.
    """

    profile: Profile
    hidden: Tensor
    weights: str
    warnings: list[str]


def solve_levels(
    stack: Stack,
    by_block: Sequence[Sequence[Linear]],
    space: Space,
    store: LevelStore,
    *,
    recipe: Recipe,
    solver: Any,
    measuring: Any,
    samples: Samples,
    held_out: Samples,
    watch: Watch,
) -> Solved:
    """Walk through the dense model once.

    Args:
        space: the levels to solve each linear at; its linears are those of `by_block`, in order.
        solver: of the recipe, or a cheaper one.
        measuring: something with `needs` and `measure`, as an allocator.
        samples: calibration tokens for statistics.
        held_out: windows to compare models on.

    Raises:
        NumericalError: a weight or an activation is not finite; names the linear.
    """
    needs = most([solver.needs, measuring.needs, "hessian" if recipe.refit else "none"])
    stream, dense = Stream(stack, samples), Stream(stack, held_out)
    stages: dict[str, str] = {}
    measures: list[dict[str, Any]] = []
    warnings: list[str] = []
    digest = hashlib.sha256()
    first = 0
    watch.phase("solving at each level", len(stack))
    for index, linears in enumerate(by_block):
        with torch.no_grad(), stack.block(index):
            seen = observe(stream, index, linears, needs, advance=index < len(stack) - 1)
            dense.advance(index)
            stages.update({x.name: str(n) for n, stage in enumerate(seen.stages) for x in stage.linears})
            inputs = LazyWeights(stack, linears, seen.statistics)
            for weight in inputs.finite():
                digest.update(raw(weight))
                del weight  # before the next one is made
            try:
                measures.append(json.loads(json.dumps(measuring.measure(inputs))))
            except TawnyError as error:
                raise type(error)(f"block {stack.name(index)}: {error}") from error
            places = {x.name: first + i for i, x in enumerate(linears)}
            by_name = {x.name: x for x in linears}
            order = [x for stage in seen.stages for x in stage.linears] or list(linears)
            _solve_block(
                [by_name[x.name] for x in order],
                places,
                inputs,
                space,
                store,
                index,
                recipe=recipe,
                solver=solver,
                needs=needs,
                watch=watch,
                warnings=warnings,
            )
            first += len(linears)
            del inputs, seen
        watch.step(stack.name(index))
    infos = tuple(LinearInfo(x.name, x.shape, x.block, stages.get(x.name, "")) for x in space.linears)
    return Solved(
        Profile(infos, tuple(measures)), torch.cat(list(dense.hidden)), digest.hexdigest(), warnings
    )


def _solve_block(
    linears: Sequence[Linear],
    places: Mapping[str, int],
    inputs: Mapping[str, tuple[Tensor, Statistics | None]],
    space: Space,
    store: LevelStore,
    index: int,
    *,
    recipe: Recipe,
    solver: Any,
    needs: Needs,
    watch: Watch,
    warnings: list[str],
) -> None:
    """Every linear of one block at every level that removes something, a tensor at a time onto the disk."""
    wanted = [
        (linear, [level for level in space.levels if space.sparsity(places[linear.name], level) > 0])
        for linear in linears
    ]
    specs = {key_of(x, level): (store.dtype, x.shape) for x, levels in wanted for level in levels}
    prepared: tuple[Statistics, Any] | None = None
    done = 0
    with writing(store.path(index)), TensorWriter(store.path(index), specs) as writer:
        for linear, levels in wanted:
            W_OI, known = inputs[linear.name]
            if known is not None and known.tokens == 0:
                warnings.append(f"{linear.name} saw no calibration token while allocations were tried")
                known = blind_statistics(linear.shape[1], needs, W_OI.device)
            if known is not None and (prepared is None or prepared[0] is not known):
                prepared = (known, solver.prepare(known))
            for level in levels:
                watch.detail("solving", done, len(specs))
                sparsity = space.sparsity(places[linear.name], level)
                try:
                    solution = solver.solve(
                        W_OI,
                        known,
                        pattern_at(space.pattern, sparsity),
                        sparsity,
                        prepared=None if known is None or prepared is None else prepared[1],
                    )
                    weight_OI = solution.weight
                    if recipe.refit and known is not None and known.hessian is not None:
                        before = solution.lost
                        if before is None:
                            before = energy(W_OI - weight_OI, known.hessian)
                        refitted, after = refit(W_OI, solution.mask, known.hessian, start=weight_OI)
                        weight_OI = refitted if after < before else weight_OI
                except NumericalError as error:
                    raise NumericalError(f"{linear.name} {list(linear.shape)}: {error}") from error
                writer.write(key_of(linear, level), weight_OI.to(store.dtype).cpu())
                done += 1


class Reference:
    """The dense model's next-token distributions, which many models are compared with.

    Args:
        logits_TV: `[tokens, vocabulary]`.
    """

    def __init__(self, logits_TV: Tensor) -> None:
        log_p = nn.functional.log_softmax(logits_TV.float(), dim=-1)
        self.p = log_p.exp()
        self.negative_entropy: Tensor = torch.linalg.vecdot(self.p, log_p)

    def divergence(self, logits_TV: Tensor) -> Tensor:
        """`[tokens]`: the Kullback–Leibler divergence Σ p·(log p − log q) of a model from the dense one, in nats."""
        count, size = logits_TV.shape
        made: Tensor = self.negative_entropy.clone()
        rows = max(1, _CACHED_BYTES // (4 * size))
        for some in (slice(start, start + rows) for start in range(0, count, rows)):
            log_q = nn.functional.log_softmax(logits_TV[some].float(), dim=-1)
            made[some] -= torch.linalg.vecdot(self.p[some], log_q)
        return made


@dataclass
class _Part:
    """Candidates that have agreed on all blocks so far, and their hidden states, one tensor a chunk."""

    members: list[int]
    hidden: list[Tensor]


class Scorer:
    """`evaluate` of a search: the mean divergence from the dense model, a token, on held-out windows.

    Args:
        hidden: `[windows, tokens, hidden]` behind the dense model's last block.
    """

    def __init__(
        self,
        stack: Stack,
        by_block: Sequence[Sequence[Linear]],
        store: LevelStore,
        held_out: Samples,
        hidden: Tensor,
        watch: Watch,
    ) -> None:
        self.stack, self.by_block, self.store, self.watch = stack, by_block, store, watch
        self.held_out, self.hidden = held_out, hidden
        self.tokens = 0  # that went through the model so far, for the record
        vocabulary = int(stack.config.get_text_config().vocab_size)
        self._tokens_at_once = max(16, LOGIT_BYTES // (4 * vocabulary))

    @torch.no_grad()
    def __call__(self, candidates: Sequence[Levels], windows: Sequence[int]) -> list[float]:
        """The score of each candidate on the numbered windows; infinite where a model has broken down."""
        rows = list(windows)
        mask = None if self.held_out.mask is None else self.held_out.mask[rows]
        samples = Samples(self.held_out.tokens[rows], mask)
        size = len(rows) * samples.seqlen * self.stack.hidden_bytes
        at_once = max(1, HIDDEN_BYTES // (2 * size))
        # Neighbours in this order agree on the most blocks.
        order = sorted(range(len(candidates)), key=lambda i: candidates[i])
        scores = [math.inf] * len(candidates)
        for start in range(0, len(order), at_once):
            some = order[start : start + at_once]
            stream = Stream(self.stack, samples)
            parts = self._walk(stream, {i: candidates[i] for i in some})
            for i, score in self._compare(stream, rows, parts).items():
                scores[i] = score
        return scores

    def _walk(self, stream: Stream, candidates: Mapping[int, Levels]) -> list[_Part]:
        """Hidden states of all candidates behind the last block."""
        parts = [_Part(list(candidates), list(stream.hidden))]
        first = 0
        for index, linears in enumerate(self.by_block):
            here = slice(first, first + len(linears))
            first += len(linears)
            by_levels: dict[Levels, list[tuple[_Part, list[int]]]] = {}
            for part in parts:
                split: dict[Levels, list[int]] = {}
                for i in part.members:
                    split.setdefault(candidates[i][here], []).append(i)
                for levels, members in split.items():
                    by_levels.setdefault(levels, []).append((part, members))
            parts = []
            done, total = 0, sum(map(len, by_levels.values()))
            with self.stack.block(index), _Assembled(self.stack, self.store, index, linears) as block:
                for levels, some in by_levels.items():
                    block.set(levels)
                    for part, members in some:
                        made = [
                            self.stack.forward(index, hidden, stream.call(index, chunk))
                            for chunk, hidden in enumerate(part.hidden)
                        ]
                        parts.append(_Part(members, made))
                        self.tokens += stream.samples.tokens.numel()
                        done += 1
                        self.watch.detail(f"block {index}", done, total)
        return parts

    def _compare(self, stream: Stream, rows: Sequence[int], parts: Sequence[_Part]) -> dict[int, float]:
        """Mean divergence of each candidate; the dense logits of some tokens are made once for all of them."""
        sums = torch.zeros(len(parts), dtype=torch.float64)
        count = 0
        tokens = stream.samples.tokens
        for chunk, window in enumerate(stream.slices):
            for row in range(window.start, window.stop):
                valid = None if stream.samples.mask is None else stream.samples.mask[row].bool()
                count += tokens.shape[1] if valid is None else int(valid.sum())
                for start in range(0, tokens.shape[1], self._tokens_at_once):
                    some = slice(start, start + self._tokens_at_once)
                    ids = tokens[row : row + 1, some]
                    dense = Reference(self.stack.logits(ids, self.hidden[rows[row], some][None])[0])
                    for number, part in enumerate(parts):
                        hidden = part.hidden[chunk][row - window.start, some][None]
                        lost = dense.divergence(self.stack.logits(ids, hidden)[0])
                        kept = lost if valid is None else lost[valid[some].to(lost.device)]
                        sums[number] += float(kept.sum(dtype=torch.float64))
        means = (sums / max(1, count)).tolist()
        return {
            i: float(mean) if math.isfinite(mean) else math.inf
            for part, mean in zip(parts, means, strict=True)
            for i in part.members
        }


class _Assembled:
    """A loaded block whose linears are set to the solutions of some levels, and dense again afterwards."""

    def __init__(self, stack: Stack, store: LevelStore, index: int, linears: Sequence[Linear]) -> None:
        self.stack, self.store, self.index, self.linears = stack, store, index, linears
        self.now: list[int | None] = [None] * len(linears)
        self.dense: list[Tensor] = []

    def __enter__(self) -> _Assembled:
        self.store.open(self.index)
        self.dense = [self._view(linear).clone() for linear in self.linears]
        return self

    def _view(self, linear: Linear) -> Tensor:
        return linear.view(getattr(linear.module, linear.parameter).data)

    def set(self, levels: Levels) -> None:
        for place, (linear, level) in enumerate(zip(self.linears, levels, strict=True)):
            if self.now[place] != level:
                solved = self.store.read(linear, level)
                self._view(linear).copy_(self.dense[place] if solved is None else solved)
                self.now[place] = level

    def __exit__(self, *_: object) -> None:
        if self.stack.checkpoint is None:  # a live model goes on being used
            for linear, dense in zip(self.linears, self.dense, strict=True):
                self._view(linear).copy_(dense)
        self.dense = []
