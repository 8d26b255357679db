"""Perplexity over windows of a text, walked block by block: one block's weights are in memory at a time.

The text is joined and tokenised once; the first N windows of `seqlen` tokens are taken and the tail is dropped. Where
the tokenizer puts BOS before a text, each window begins with it. In each window every token but the first is predicted.
With a stride below what a window holds of the text windows overlap, and of each but the first only its last `stride`
tokens count, so that every one of them has at least `seqlen - stride` before it.
Losses are taken in float32 and averaged over all tokens that count.
`stderr` is perplexity × sd(mean loss of a window) / √N: how far another N windows of such text might move it.

This is how the papers measure: WikiText-2's test split joined by blank lines, PTB's by spaces, the first 256 windows
of 1,100 documents of C4's validation split joined by spaces, all with windows of 2048 that do not overlap and, whatever
the tokenizer, no BOS in windows but the first (`bos=False`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.calibration.mixture import TextMixture, Texts, load_texts
from tawny.calibration.text import Text
from tawny.calibration.windows import SEED_APART, check_windows, evaluation_windows, texts_of, tokenise
from tawny.decoding.author import author_of
from tawny.errors import ModelError, RecipeError
from tawny.evaluation.hidden_states import kept_stream
from tawny.evaluation.sources import open_stack_of, shared_tokenizer
from tawny.machine import peak_memory
from tawny.model.context import check_context, check_ids
from tawny.model.stack import Stack
from tawny.model.streams import Samples, Stream
from tawny.model.structure import evaluating, predicts_tokens
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent

# Logits are [tokens, vocabulary] in float32; so many tokens at once keep them near 100 MB for a large vocabulary.
_LOGIT_BYTES = 100_000_000
# Of text that the dense model writes, where nothing says how many are read.
_WRITTEN_WINDOWS = 20


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean loss over all predicted tokens.
        stderr: its standard error over windows (0 for a single window).
        loss: mean loss in nats.
        tokens: predicted tokens.
        peak_memory: bytes, of the whole process so far.
        bits_per_byte: total loss in bits over the UTF-8 bytes of what is predicted, special tokens included, which compares
            models with different tokenizers; 0 when only tokens were given.
        stride: tokens of the text from one window's start to the next's.
        bos: whether each window begins with BOS, which is not part of the text; False for tokens that were given.
        recipe: all of the above in words.
    """

    perplexity: float
    stderr: float
    loss: float
    windows: int
    seqlen: int
    tokens: int
    seconds: float
    text: str
    text_sha256: str
    compute: str
    peak_memory: int
    bits_per_byte: float = 0.0
    stride: int = 0
    bos: bool = False
    recipe: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- windows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Tokens to predict, `[windows, seqlen]`, and where they came from."""

    ids: Tensor
    stride: int
    text: TextMixture | None = None
    size: int = 0  # UTF-8 bytes of what is predicted; 0 when only tokens were given
    bos: bool = False  # the first token of each is not part of the text
    of: tuple[int, ...] = ()  # the text that each window is of, by number; empty where all are of one

    def first(self, index: int) -> int:
        """Position of the first token of a window that counts."""
        return 1 if index == 0 else max(1, int(self.ids.shape[1]) - self.stride)

    def counts(self) -> Tensor:
        """How many tokens of each window count, `[windows]` float64."""
        seqlen = int(self.ids.shape[1])
        return torch.tensor([seqlen - self.first(i) for i in range(len(self.ids))], dtype=torch.float64)

    def stderr(self, means: Tensor) -> float:
        """Standard error of the mean over all tokens that count, from the mean `[windows]` of each window; 0 for one window.

        How many windows each text has is fixed, so that only differences within a text count. A text of one window
        shows none: all windows are then taken as of one text.
        """
        counts = self.counts()
        share = counts / counts.sum()
        of = torch.tensor(self.of or (0,) * len(counts))
        if int(of.bincount().min()) < 2:
            of = torch.zeros_like(of)
        if len(of) < 2:
            return 0.0
        variance = 0.0
        for text in range(int(of.max()) + 1):
            w, values = share[of == text], means[of == text]
            middle = (w * values).sum() / w.sum()
            variance += float((w * (values - middle)).square().sum()) * len(w) / (len(w) - 1)
        return math.sqrt(variance)

    def recipe(self) -> str:
        """What was predicted, in words."""
        count, seqlen = self.ids.shape
        joined = ""
        texts = () if self.text is None else self.text.texts
        if len(texts) > 1:
            joined = f"{len(texts)} texts, each tokenised once, by turns and by shares; "
        elif texts and texts[0].documents > 1:
            by = {" ": "a space", "\n\n": "a blank line"}[texts[0].separator]
            joined = f"{texts[0].documents:,} documents joined by {by}, tokenised once; "
        overlaps = self.stride < seqlen - self.bos and count > 1
        overlap = f", {self.stride} apart, all of the first and the last {self.stride} of each other counted"
        # Of a window that overlaps the one before, the first token is never among the last that count.
        whose = "the first" if overlaps else "a"
        return (
            f"{joined}{'the first ' * (count > 1)}{count} window{'s' * (count > 1)} of {seqlen} tokens"
            f"{(', each begun with BOS' if count > 1 else ' begun with BOS') * self.bos}{overlap * overlaps}, {whose} window's first token not predicted, loss in float32"
        )


def windows_of(
    text: Texts | Tensor,
    seqlen: int,
    windows: int | None,
    stride: int | None,
    tokenizer: Any,
    bos: bool | None = None,
    opened: Sequence[tuple[Stack, Path | None]] = (),
    dense: tuple[Stack, Path | None] | None = None,
    progress: Progress = silent,
) -> Windows:
    """Windows of a text, or of tokens that are windows already.

    Args:
        tokenizer: reads the text; None for that of the folders.
        opened: models that must be able to read the windows, and their folders.
        dense: the one of them that writes the text `self`.

    Raises:
        TextError: the text does not hold one window, or not as many as asked for, or it holds a token unknown to a model.
        RecipeError: a stride outside 1…seqlen, no window, windows too short to predict anything or longer than a model's
            table of positions, or a BOS that the tokenizer does not have.
        ModelError: a model that predicts no next token; no tokenizer, or folders with different ones.
    """
    if isinstance(text, Tensor):
        seqlen = Samples(text).seqlen
    for stack, _ in opened:
        if not predicts_tokens(stack.model):
            raise ModelError(
                f"{type(stack.model).__name__} predicts no next token and so has no perplexity: compare its features with the "
                "dense model's (tawny eval MODEL --against DENSE, tawny.features)"
            )
        check_context(stack.model, seqlen)
    check_windows(seqlen, windows)
    if isinstance(text, Tensor):
        chosen = Windows(Samples(text if windows is None else text[:windows]).tokens, seqlen)
    else:
        if tokenizer is None:
            tokenizer = shared_tokenizer([folder for _, folder in opened if folder is not None])

        def own(share: float) -> Text:
            assert dense is not None
            stack, folder = dense
            author = author_of(
                folder or stack.model,
                tokenizer,
                SEED_APART,
                stack.compute,
                str(stack.device),
                progress=progress,
            )
            # One more: read again, a text may have fewer tokens than were written.
            return author.write(math.ceil((share * (windows or _WRITTEN_WINDOWS) + 1) * seqlen))

        loaded = load_texts(text, "evaluation", tokenizer, own if dense is not None else None)
        chosen = _windows_of_text(loaded, seqlen, windows, stride, tokenizer, bos)
    for stack, _ in opened:
        check_ids(stack.model, chosen.ids)
    return chosen


def _windows_of_text(
    text: TextMixture, seqlen: int, windows: int | None, stride: int | None, tokenizer: Any, bos: bool | None
) -> Windows:
    if stride is not None and not 1 <= stride <= seqlen:
        raise RecipeError(
            f"--stride {stride} is outside 1…{seqlen}: windows would leave out or repeat tokens"
        )
    if stride is not None and len(text.texts) > 1:
        raise RecipeError(
            "windows with a --stride overlap the one before, and those of several texts come by turns: give one text"
        )
    tokens = tokenise(text, tokenizer, bos)
    ids = evaluation_windows(tokens, seqlen, windows, stride)
    if windows is None and len(text.texts) == 1:
        (one,) = text.texts  # a model writes more than it was asked for
        ids = ids[: _WRITTEN_WINDOWS if one.written else one.most_windows]
    step = min(stride or seqlen, tokens.of_text(seqlen))
    of = tuple(texts_of(tokens, len(ids))) if len(tokens.parts) > 1 else ()
    chosen = Windows(ids, step, text, bos=tokens.bos is not None, of=of)
    predicted = [row[chosen.first(i) :] for i, row in enumerate(ids)]
    # Short pieces of one text, decoded alone, would lose spaces and cut characters.
    if step < tokens.of_text(seqlen):
        predicted = [torch.cat(predicted)]
    return replace(chosen, size=sum(len(tokenizer.decode(row.tolist()).encode()) for row in predicted))


def count_windows(
    text: Texts, seqlen: int, windows: int | None, tokenizer: Any, bos: bool | None = None, *, most: int
) -> int:
    """How many windows of a text are read: `windows`, or at most `most`. It raises what `windows_of` raises.

    It is asked before work that a short text should not cost.
    """
    loaded = load_texts(text, "evaluation", tokenizer)
    count = evaluation_windows(tokenise(loaded, tokenizer, bos), seqlen, windows)
    return len(count) if windows is not None else min(most, len(count))


# --- losses ------------------------------------------------------------------------------------------------


def pieces(windows: Windows, index: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """`(inputs, targets)` of a window's tokens that count, so many at once that their logits stay small."""
    step, last = max(16, _LOGIT_BYTES // (4 * vocabulary)), int(windows.ids.shape[1]) - 1
    for start in range(windows.first(index) - 1, last, step):
        stop = min(start + step, last)
        yield slice(start, stop), slice(start + 1, stop + 1)


def vocabulary_of(stack: Stack) -> int:
    return int(stack.config.get_text_config().vocab_size)


def logits_of(stack: Stack, stream: Stream, index: int, inputs: slice) -> Tensor:
    """Logits `[tokens, vocabulary]` in float32 of a part of window `index`."""
    chunk = next(i for i, part in enumerate(stream.slices) if part.start <= index < part.stop)
    row = index - stream.slices[chunk].start
    hidden = stream.hidden[chunk][row : row + 1, inputs]
    return stack.logits(stream.samples.tokens[index : index + 1, inputs], hidden)[0].float()


@torch.no_grad()
def window_losses(stack: Stack, stream: Stream, windows: Windows, progress: Progress = silent) -> Tensor:
    """Mean loss `[windows]` (float64, nats) of each window, which the stream holds after the last block."""
    losses = torch.zeros(len(windows.ids), dtype=torch.float64)
    progress.phase("predicting", len(losses), "windows")
    for index in range(len(losses)):
        for inputs, targets in pieces(windows, index, vocabulary_of(stack)):
            logits = logits_of(stack, stream, index, inputs)
            target = windows.ids[index, targets].to(logits.device)
            losses[index] += nn.functional.cross_entropy(logits, target, reduction="sum").double().cpu()
        progress.step(f"window {index}")
    return losses / windows.counts()


def summarise(windows: Windows, losses: Tensor, stack: Stack, seconds: float) -> Perplexity:
    """From the mean loss of every window to a perplexity."""
    counts = windows.counts()
    predicted = int(counts.sum())
    mean = float((losses * counts).sum() / counts.sum())
    # exp overflows past 709 nats; a model that bad is broken, and infinity says so.
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(
        perplexity=perplexity,
        stderr=perplexity * windows.stderr(losses),
        loss=mean,
        windows=len(losses),
        seqlen=int(windows.ids.shape[1]),
        tokens=predicted,
        seconds=seconds,
        text=windows.text.name if windows.text else "tokens",
        text_sha256=windows.text.sha256 if windows.text else "",
        compute=str(stack.compute).removeprefix("torch."),
        peak_memory=peak_memory(),
        bits_per_byte=mean * predicted / math.log(2) / windows.size if windows.size else 0.0,
        stride=windows.stride,
        bos=windows.bos,
        recipe=windows.recipe(),
    )


@opens_models
def evaluate(
    source: str | Path | nn.Module,
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
) -> Perplexity:
    """Perplexity of a model on a text.

    Args:
        source: a folder (dense or packed), hub id, `.gguf` file, `smollm2`, or a live module.
        text: name or path of a text, or several with shares, or tokens `[windows, seqlen]`.
        seqlen: tokens a window.
        windows: how many from the start of the text; all that fit if None.
        stride: tokens from one window's start to the next's; what a window holds of the text if None, which is also the most.
        bos: begin each window with BOS, or none but the first, as the papers do; as the tokenizer begins a text if None.
            Tokens are taken as they are.
        tokenizer: needed for a live module and a text.
        compute: dtype of forwards: auto, float32, bfloat16 or float16.
        cache: keep and reuse what a dense model in a folder makes of these windows.
        progress: told how far the work is.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        TextError: the text does not hold one window, or not as many as asked for.
        RecipeError: windows longer than the model's table of positions, or another number out of its range.
        ModelError: not a decoder; or a live module without tokenizer.
    """
    start = time.perf_counter()
    stack, folder = open_stack_of(source, compute, device, progress.say)
    read = windows_of(text, seqlen, windows, stride, tokenizer, bos, [(stack, folder)])
    with evaluating(stack.model):
        stream = kept_stream(stack, folder if cache else None, read.ids, progress, "evaluating")
        losses = window_losses(stack, stream, read, progress)
    return summarise(read, losses, stack, time.perf_counter() - start)
