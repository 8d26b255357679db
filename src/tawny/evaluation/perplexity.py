"""Perplexity over non-overlapping windows, walked block by block: one block's weights are in memory at a time.

The text is joined and tokenised once; the first N windows of `seqlen` tokens are taken and the tail is dropped. In
each window every token but the first is predicted; losses are taken in float32 and averaged over all windows.
`stderr` is perplexity × sd(mean loss of a window) / √N: how far another N windows of such text might move it.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.calibration.text import evaluation_windows, load_text, tokenise
from tawny.errors import ModelError
from tawny.model.blocks import Stack, live_stack, native_dtype, open_stack
from tawny.model.source import load_tokenizer, resolve
from tawny.model.streams import Samples, Stream
from tawny.record import peak_memory
from tawny.watch import Watch, silent

# Logits are [tokens, vocabulary] in float32; so many tokens at once keep them near 100 MB for a large vocabulary.
_LOGIT_BYTES = 100_000_000


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean loss over all predicted tokens.
        stderr: its standard error over windows (0 for a single window).
        loss: mean loss in nats.
        tokens: predicted tokens.
        peak_memory: bytes, of the whole process so far.
        bits_per_byte: total loss in bits over the UTF-8 bytes of the windows' text; 0 when only tokens were given.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def window_losses(stack: Stack, windows: Tensor, watch: Watch = silent) -> Tensor:
    """Mean loss `[windows]` (float64, nats) of each window of tokens `[windows, seqlen]`."""
    stream = Stream(stack, Samples(windows))
    watch.phase("evaluating", len(stack))
    for index in range(len(stack)):
        with stack.block(index):
            stream.advance(index)
        watch.step(stack.name(index))
    losses = torch.zeros(len(windows), dtype=torch.float64)
    vocabulary = int(stack.config.get_text_config().vocab_size)
    step = max(16, _LOGIT_BYTES // (4 * vocabulary))
    total = windows.shape[1]
    for part, hidden in zip(stream.slices, stream.hidden, strict=True):
        for row, number in enumerate(range(part.start, part.stop)):
            ids = windows[number : number + 1]
            for start in range(0, total - 1, step):
                stop = min(start + step, total - 1)
                logits = stack.logits(ids[:, start:stop], hidden[row : row + 1, start:stop])[0].float()
                target = ids[0, start + 1 : stop + 1].to(logits.device)
                losses[number] += nn.functional.cross_entropy(logits, target, reduction="sum").double().cpu()
    return losses / (total - 1)


def evaluate(
    source: str | Path | nn.Module,
    text: str | Tensor = "wikitext2",
    *,
    seqlen: int = 2048,
    windows: int | None = None,
    tokenizer: Any = None,
    compute: str = "auto",
    device: str = "cpu",
    watch: Watch = silent,
) -> Perplexity:
    """Perplexity of a model on a text.

    Args:
        source: a folder, hub id, `.gguf` file, `smollm2`, or a live module.
        text: name or path of a text, or tokens `[windows, seqlen]`.
        seqlen: tokens a window.
        windows: how many from the start of the text; all that fit if None.
        tokenizer: needed for a live module and a text.
        compute: dtype of forwards: auto, float32, bfloat16 or float16.
        watch: told about progress.

    Raises:
        TextError: the text does not hold one window, or not as many as asked for.
        ModelError: not a decoder; or a live module without tokenizer.
    """
    start = time.perf_counter()
    if isinstance(source, nn.Module):
        folder, stack = None, live_stack(source)
    else:
        folder = resolve(source, watch.say)
        stack = open_stack(folder, native_dtype() if compute == "auto" else getattr(torch, compute), device)
    name, sha, size = "tokens", "", 0
    if isinstance(text, Tensor):
        ids = text if windows is None else text[:windows]
        ids = Samples(ids).tokens
    else:
        if tokenizer is None:
            if folder is None:
                raise ModelError(
                    "a live model needs tokenizer=… to read a text, or text=tokens [windows, seqlen]"
                )
            tokenizer = load_tokenizer(folder)
        loaded = load_text(text, "evaluation")
        ids = evaluation_windows(tokenise(loaded, tokenizer), seqlen, windows, f"text {loaded.name!r}")
        name, sha = loaded.name, loaded.sha256
        size = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in ids.tolist())
    losses = window_losses(stack, ids, watch)
    mean = float(losses.mean())
    # exp overflows past 709 nats; a model that bad is broken, and infinity says so.
    perplexity = math.exp(mean) if mean < 700 else math.inf
    deviation = float(losses.std()) if len(losses) > 1 else 0.0
    predicted = len(losses) * (ids.shape[1] - 1)
    return Perplexity(
        perplexity=perplexity,
        stderr=perplexity * deviation / math.sqrt(len(losses)) if len(losses) > 1 else 0.0,
        loss=mean,
        windows=len(losses),
        seqlen=int(ids.shape[1]),
        tokens=predicted,
        seconds=time.perf_counter() - start,
        text=name,
        text_sha256=sha,
        compute=str(stack.compute).removeprefix("torch."),
        peak_memory=peak_memory(),
        bits_per_byte=mean * predicted / math.log(2) / size if size else 0.0,
    )
