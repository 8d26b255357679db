"""How far a model that is put together from levels of its linears is from the dense one.

A candidate costs one forward of the held-out windows: each block is set to its levels (solving.py, expert_levels.py), and candidates
that agree on the first blocks go through them together. Memory is that of pruning: one block and hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor, nn

from tawny.choosing.demand import candidates_at_once
from tawny.choosing.rehearsal import HELD_OUT
from tawny.choosing.scores import Scores, WindowSums, mean
from tawny.choosing.space import Levels
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import Samples, Stream
from tawny.progress import Progress, silent
from tawny.pruning.prepare import Job
from tawny.run.memory import LOGIT_BYTES
from tawny.run.run import Run
from tawny.run.walk import Block, Visitor, walk

_CACHED_BYTES = 8_000_000  # of float32 logits that softmax and product read again before they leave the cache


class Reference:
    """The dense model's next-token distributions, which many models are compared with.

    Args:
        logits_TV: `[tokens, vocabulary]`.
    """

    def __init__(self, logits_TV: Tensor) -> None:
        self.p = torch.empty(logits_TV.shape, dtype=torch.float32, device=logits_TV.device)
        self.negative_entropy: Tensor = self.p.new_empty(len(logits_TV))
        for some in _cached(logits_TV):
            log_p = nn.functional.log_softmax(logits_TV[some].float(), dim=-1)
            torch.exp(log_p, out=self.p[some])
            self.negative_entropy[some] = torch.linalg.vecdot(self.p[some], log_p)

    def divergence(self, logits_TV: Tensor) -> Tensor:
        """`[tokens]`: the Kullback–Leibler divergence Σ p·(log p − log q) of a model from the dense one, in nats."""
        divergence: Tensor = self.negative_entropy.clone()
        for some in _cached(logits_TV):
            log_q = nn.functional.log_softmax(logits_TV[some].float(), dim=-1)
            divergence[some] -= torch.linalg.vecdot(self.p[some], log_q)
        return divergence


def _cached(logits_TV: Tensor) -> list[slice]:
    """Rows that fit the cache together."""
    count, size = logits_TV.shape
    rows = max(1, _CACHED_BYTES // (4 * size))
    return [slice(start, start + rows) for start in range(0, count, rows)]


class Levelled(Protocol):
    """What blocks are at levels of their linears."""

    def of_block(
        self, stack: Stack, index: int, linears: Sequence[Linear]
    ) -> AbstractContextManager[Callable[[Levels], AbstractContextManager[None]]]:
        """Inside, what was given makes the loaded block what it is at such levels, inside its own context."""
        ...


@dataclass
class _Agreeing:
    """Candidates that have agreed on all blocks so far, and their hidden states, one tensor a chunk."""

    members: list[int]
    hidden: list[Tensor]


class Scorer:
    """`evaluate` of a search: the mean divergence from the dense model, a token, on held-out windows.

    Args:
        hidden: `[windows, tokens, hidden]` after the dense model's last block.
        scores: what is known already, and where what is measured is kept.
    """

    def __init__(
        self,
        job: Job,
        store: Levelled,
        held_out: Samples,
        hidden: Tensor,
        progress: Progress,
        scores: Scores | None = None,
    ) -> None:
        self.stack, self.by_block, self.store, self.progress = job.stack, job.by_block, store, progress
        self.held_out, self.hidden = held_out, hidden
        self.scores = scores or Scores()
        vocabulary = int(job.stack.config.get_text_config().vocab_size)
        self._tokens_at_once = max(16, LOGIT_BYTES // (4 * vocabulary))

    @torch.no_grad()
    def __call__(self, candidates: Sequence[Levels], windows: Sequence[int]) -> list[float]:
        """The score of each candidate on the numbered windows; infinite where a model has broken down."""
        lacking: dict[tuple[int, ...], list[Levels]] = {}
        for levels in dict.fromkeys(candidates):
            lacking.setdefault(self.scores.lacking(levels, windows), []).append(levels)
        for rows, some in lacking.items():
            if rows:
                self._measure(some, rows)
        return [self.scores.mean(levels, windows) for levels in candidates]

    def _measure(self, candidates: Sequence[Levels], rows: Sequence[int]) -> None:
        """Each candidate on the numbered windows."""
        samples = self.samples(rows)
        at_once = candidates_at_once(len(rows) * samples.seqlen * self.stack.hidden_bytes)
        # Neighbours in this order agree on the most blocks.
        order = sorted(candidates)
        for start in range(0, len(order), at_once):
            some = order[start : start + at_once]
            trying = _Try(self, some)
            streams = walk(Run.unkept(silent), self.stack, {HELD_OUT: samples}, [trying])
            compared = self._compare(streams[HELD_OUT], rows, trying.parts)
            self.scores.keep({some[i]: dict(zip(rows, sums, strict=True)) for i, sums in compared.items()})

    def judge(self, stream: Stream, windows: Sequence[int]) -> tuple[float, list[float]]:
        """The score of a model that the numbered windows have gone through, and on each: `stream` is after its last block."""
        sums = self._compare(stream, windows, [_Agreeing([0], list(stream.hidden))])[0]
        return mean(sums), [mean([each]) for each in sums]

    def of_hidden(
        self, hidden: Tensor, head: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> float:
        """The score of a model on all windows, from its `[windows, tokens, hidden]`, with another head inside `head()`."""
        windows = range(len(self.held_out))
        return mean(self._window(number, [hidden[number]], head)[0] for number in windows)

    @property
    def _pieces(self) -> list[slice]:
        """The tokens of a window, so many at a time that their logits stay small."""
        step = self._tokens_at_once
        return [slice(start, start + step) for start in range(0, self.held_out.seqlen, step)]

    def samples(self, windows: Sequence[int]) -> Samples:
        """The numbered windows."""
        return self.held_out.take(list(windows))

    def _compare(
        self, stream: Stream, rows: Sequence[int], parts: Sequence[_Agreeing]
    ) -> dict[int, list[WindowSums]]:
        """Divergence of each candidate on each of the numbered windows, which went through the model in this order."""
        sums: list[list[WindowSums]] = [[] for _ in parts]
        for chunk, window in enumerate(stream.slices):
            for row in range(window.start, window.stop):
                hidden = [part.hidden[chunk][row - window.start] for part in parts]
                for own, here in zip(sums, self._window(rows[row], hidden), strict=True):
                    own.append(here)
        return {i: own for part, own in zip(parts, sums, strict=True) for i in part.members}

    def _window(
        self,
        number: int,
        hidden: Sequence[Tensor],
        head: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> list[WindowSums]:
        """Divergence of models on a window, from their `[tokens, hidden]`; dense logits are made once for all of them."""
        tokens, mask = self.held_out.tokens[number], self.held_out.mask
        valid = None if mask is None else mask[number].bool()
        count = len(tokens) if valid is None else int(valid.sum())
        sums: list[list[float]] = [[] for _ in hidden]
        for some in self._pieces:
            ids = tokens[None, some]
            dense = Reference(self.stack.logits(ids, self.hidden[number, some][None])[0])
            for own, states in zip(sums, hidden, strict=True):
                with head():
                    lost = dense.divergence(self.stack.logits(ids, states[some][None])[0])
                kept = lost if valid is None else lost[valid[some].to(lost.device)]
                own.append(float(kept.sum(dtype=torch.float64)))
        return [WindowSums(count, tuple(own)) for own in sums]


@final
class _Try(Visitor):
    """Takes candidates through each block, whose linears are set to their levels; those that agree so far go together.

    Attributes:
        parts: all candidates, by their place in what was given.
    """

    def __init__(self, scorer: Scorer, candidates: Sequence[Levels]) -> None:
        self.scorer, self.candidates = scorer, candidates
        self.parts: list[_Agreeing] = []
        self._first = 0  # place of the first linear of the next block

    def visit(self, block: Block) -> None:
        scorer, stream, index = self.scorer, block.streams[HELD_OUT], block.index
        linears = scorer.by_block[index]
        here = slice(self._first, self._first + len(linears))
        self._first = here.stop
        by_levels: dict[Levels, list[tuple[_Agreeing, list[int]]]] = {}
        for part in self.parts or [_Agreeing(list(range(len(self.candidates))), list(stream.hidden))]:
            split: dict[Levels, list[int]] = {}
            for i in part.members:
                split.setdefault(self.candidates[i][here], []).append(i)
            for levels, members in split.items():
                by_levels.setdefault(levels, []).append((part, members))
        self.parts = []
        done, total = 0, sum(map(len, by_levels.values()))
        with scorer.store.of_block(block.stack, index, linears) as at:
            for levels, some in by_levels.items():
                for part, members in some:
                    with at(levels):
                        hidden = [
                            block.stack.forward(index, one, stream.call(index, chunk))
                            for chunk, one in enumerate(part.hidden)
                        ]
                    self.parts.append(_Agreeing(members, hidden))
                    scorer.scores.tokens += stream.samples.tokens.numel()
                    done += 1
                    scorer.progress.detail(f"block {index}", done, total)
