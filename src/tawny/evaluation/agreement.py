"""How far a pruned model has moved from its dense one, token by token: KL divergence and top-1 agreement.

Perplexity reads only the probability of the token that the text holds, and a model may lose much of what it knew while
that stays. `KL(dense ‖ pruned)` compares whole distributions, so it shows damage earlier and with less noise. Top-1
agreement is how often both models would say the same next token.

Both models see the same windows (perplexity.py) and are walked block by block, one after the other; then logits are
made a few hundred tokens at a time. Divergences are taken in float32 and added up in float64, in nats a token.
± is sd(mean of a window) / √windows.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.calibration.mixture import Texts
from tawny.errors import ModelError
from tawny.evaluation.hidden_states import kept_stream, stream_through
from tawny.evaluation.perplexity import (
    Perplexity,
    Windows,
    logits_of,
    pieces,
    summarise,
    vocabulary_of,
    windows_of,
)
from tawny.evaluation.sources import name_of, open_stack_of
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.model.structure import evaluating
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent
from tawny.solvers.divergence import kl


@dataclass(frozen=True)
class Agreement:
    """A model beside its dense one on the same windows.

    Attributes:
        kl: mean KL(dense ‖ model) in nats a token.
        top1: share of tokens whose likeliest successor is the same in both.
        perplexity: of the model.
        dense: perplexity of the dense model.
        against: what the dense model is called.
        kl_by_window: mean of each window, which says how sure a difference between two models is.
        kl_by_position: `(position, mean KL)`, of tokens with that many before them and more, up to the next: 0, 1,024, 2,048, 4,096, …
    """

    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    perplexity: Perplexity
    dense: Perplexity
    against: str
    seconds: float
    kl_by_window: tuple[float, ...] = ()
    kl_by_position: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def under_perplexity(self) -> dict[str, Any]:
        """The model's perplexity as `Perplexity.to_dict` gives it, and all else under `agreement`."""
        facts = self.to_dict()
        return {**facts.pop("perplexity"), "agreement": facts}


@torch.no_grad()
@opens_models
def agreement(
    source: str | Path | nn.Module,
    dense: str | Path | nn.Module,
    text: Texts | Tensor = "wikitext2",
    *,
    seqlen: int = 2048,
    windows: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    tokenizer: Any = None,
    compute: str = "auto",
    device: str = "cpu",
    cache: bool = True,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Agreement:
    """Compare a model with its dense one on a text; arguments are those of `tawny.evaluate`.

    Args:
        cache: keep and reuse what the dense model in a folder makes of these windows.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError: tokenizers or vocabularies differ, so that tokens are not the same events.
        TextError: the text does not hold one window, or not as many as asked for.
    """
    start = time.perf_counter()
    opened = [open_stack_of(model, compute, device, progress.say) for model in (dense, source)]
    dense_stack, stack = (each for each, _ in opened)
    called, own = name_of(dense), name_of(source)
    if vocabulary_of(stack) != vocabulary_of(dense_stack):
        raise ModelError(
            f"{called} knows {vocabulary_of(dense_stack):,} tokens and {own} {vocabulary_of(stack):,}: "
            "only models with the same tokenizer agree or disagree; compare their bits per byte instead"
        )
    read = windows_of(text, seqlen, windows, stride, tokenizer, bos, opened, opened[0], progress)
    with evaluating(dense_stack.model), evaluating(stack.model):
        streams = [
            kept_stream(dense_stack, opened[0][1] if cache else None, read.ids, progress, "dense model"),
            stream_through(stack, Samples(read.ids), progress, "pruned model"),
        ]
        sums, kl_by_position = _compare(read, (dense_stack, stack), streams, progress)
    means = sums / read.counts()
    weights = read.counts() / read.counts().sum()
    kl, top1 = (float((row * weights).sum()) for row in means[:2])
    seconds = time.perf_counter() - start
    return Agreement(
        kl=kl,
        kl_stderr=read.stderr(means[0]),
        top1=top1,
        top1_stderr=read.stderr(means[1]),
        perplexity=summarise(read, means[3], stack, seconds),
        dense=summarise(read, means[2], dense_stack, seconds),
        against=called,
        seconds=seconds,
        kl_by_window=tuple(means[0].tolist()),
        kl_by_position=kl_by_position,
    )


def _compare(
    made: Windows, stacks: tuple[Stack, Stack], streams: list[Any], progress: Progress
) -> tuple[Tensor, tuple[tuple[int, float], ...]]:
    """Sums over each window's tokens, `[4, windows]` float64 (KL, equal top-1, dense loss, loss); and the mean KL by position."""
    sums = torch.zeros(4, len(made.ids), dtype=torch.float64)
    by_position = torch.zeros(2, made.ids.shape[1], dtype=torch.float64)
    # Twice the logits of a perplexity are held at once, and their difference.
    vocabulary = 3 * vocabulary_of(stacks[0])
    progress.phase("comparing", len(made.ids), "windows")
    for index in range(len(made.ids)):
        for inputs, targets in pieces(made, index, vocabulary):
            p, q = (
                logits_of(stack, stream, index, inputs).log_softmax(-1)
                for stack, stream in zip(stacks, streams, strict=True)
            )
            target = made.ids[index, targets].to(p.device)[:, None]
            kl_T = kl(p, q).double().cpu()
            sums[0, index] += kl_T.sum()
            by_position[:, inputs] += torch.stack([kl_T, torch.ones_like(kl_T)])
            sums[1, index] += (p.argmax(-1) == q.argmax(-1)).sum().double().cpu()
            sums[2, index] -= p.gather(1, target).double().sum().cpu()
            sums[3, index] -= q.gather(1, target).double().sum().cpu()
        progress.step(f"window {index}")
    return sums, _ranges(*by_position)


def _ranges(sum_T: Tensor, count_T: Tensor, first: int = 1024) -> tuple[tuple[int, float], ...]:
    """Means of positions up to `first`, from there to twice as far, and so on, where any token was read."""
    starts, stop = [0], first
    while stop < len(count_T):
        starts.append(stop)
        stop *= 2
    ends = [*starts[1:], len(count_T)]
    return tuple(
        (start, float(sum_T[start:end].sum() / count_T[start:end].sum()))
        for start, end in zip(starts, ends, strict=True)
        if count_T[start:end].any()
    )
