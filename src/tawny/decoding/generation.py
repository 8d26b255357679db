"""A whole text at once, and what it took: `stream` read to its end."""

from __future__ import annotations

__all__ = ["Generation", "generate"]

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tawny.decoding import opening
from tawny.decoding.sampling import Sampler
from tawny.decoding.stream import Continuation
from tawny.decoding.text import Prompt, Tokenizer, decode
from tawny.kernels.native import kernel_name
from tawny.machine import peak_memory
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent


@dataclass(frozen=True)
class Generation:
    """A text and what it took.

    finish: `stop` (the model ended it), `length` (as many tokens as were asked for) or `context` (as many as the model
        has room for). Speeds are None where there was nothing to measure.
    path: `blocks` where one C++ call made each token, `model` where the model's own forward did.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish: str
    chat: bool
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    resident_bytes: int
    peak_bytes: int
    threads: int
    kernel: str
    path: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@opens_models
def generate(
    model: str | Path | nn.Module,
    prompt: Prompt,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    tokenizer: Tokenizer | None = None,
    threads: int | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Generation:
    """Continue a prompt to the end; arguments and errors are those of `tawny.stream`.

    Args:
        on_text: called with each piece of text as it comes.
    """
    with opening.threads(threads) as used:
        text = Continuation(
            model,
            prompt,
            Sampler(temperature, top_p, seed),
            max_tokens=max_tokens,
            chat=chat,
            tokenizer=tokenizer,
            threads=threads,
            progress=progress,
        )
        with contextlib.closing(text.pieces()) as pieces:
            for piece in pieces:
                if on_text is not None and piece.text:
                    on_text(piece.text)
        first, *steps = text.seconds
        # The first step may have proved the quick path, which costs a few tokens' time once.
        steady = steps[1:] if len(steps) > 1 else steps
        return Generation(
            text="" if text.tokenizer is None else decode(text.tokenizer, text.tokens),
            tokens=text.tokens,
            prompt_tokens=len(text.ids),
            finish=text.finish,
            chat=text.chat,
            first_token_seconds=first,
            prefill_tokens_per_second=len(text.ids) / first,
            decode_tokens_per_second=len(steady) / sum(steady) if steady else None,
            resident_bytes=text.opened.added(),
            peak_bytes=peak_memory(),
            threads=used,
            kernel=kernel_name(),
            path=text.path,
        )
