"""Text from a model: whole, or token by token in a generator that its caller may stop at any time.

    for piece in tawny.stream("packed", "The owl is", max_tokens=40):
        print(piece.text, end="", flush=True)

What this file promises:

- `stream` checks everything and opens the model at once. The prompt is read when the first piece is asked for.
- One piece a token, and a last one without a token, which says why the text ended.
- Closing the generator ends the text at once: its keys and values are freed, and so is a model that was opened for it.
- Any number of streams may share a live model, in one thread or several. Each step has the model to itself.
- Between two pieces neither torch's threads nor its inference mode are changed.
- `generate` reads such a stream to its end and says what it took.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tawny.decoding import opening
from tawny.decoding.decoder import Decoder
from tawny.decoding.sampling import Sampler
from tawny.decoding.text import Prompt, TextPieces, Tokenizer, check_prompt, end_tokens, tokens_of
from tawny.errors import RecipeError, TextError
from tawny.kernels.native import kernel_name
from tawny.machine import peak_memory
from tawny.model.context import check_ids, longest_text
from tawny.model.source import load_tokenizer, resolve
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent

_RESERVE = 1024  # tokens a text has memory for at first; few texts are as long as they may be


@dataclass(frozen=True)
class Piece:
    """One more token, and the text that it made whole.

    text: empty while a character is incomplete, and always where there is no tokenizer.
    token: its id; None in the last piece, whose text is what was still incomplete.
    finish: only in the last piece: `stop` (the model ended the text), `length` (as many tokens as were asked for) or
        `context` (as many as the model has room for).
    """

    text: str
    token: int | None
    finish: str | None = None


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


class _Continuation:
    """One prompt to be continued, and what that has taken so far; arguments are those of `stream`."""

    def __init__(
        self,
        model: str | Path | nn.Module,
        prompt: Prompt,
        choose: Sampler,
        max_tokens: int,
        chat: bool | None,
        tokenizer: Tokenizer | None,
        threads: int | None,
        progress: Progress,
    ) -> None:
        check_prompt(prompt)
        if max_tokens < 1:
            raise RecipeError(f"max_tokens {max_tokens} is not possible; give 1 or more")
        self.choose, self.threads = choose, threads
        with opening.threads(threads):
            if not isinstance(model, nn.Module):
                model = resolve(model, progress.say)
                tokenizer = tokenizer or load_tokenizer(model)
            self.tokenizer = tokenizer
            self.ids, self.chat = tokens_of(prompt, tokenizer, chat)
            self.opened = opening.open_model(model)
        limit = longest_text(self.opened.model)
        if limit is not None and len(self.ids) >= limit:
            raise TextError(
                f"the prompt has {len(self.ids)} tokens and the model's context is {limit}; shorten it"
            )
        check_ids(self.opened.model, self.ids)
        self.room = max_tokens if limit is None else min(max_tokens, limit - len(self.ids))
        self.finish = "length" if self.room == max_tokens else "context"
        self.tokens: list[int] = []
        self.seconds: list[float] = []  # the prompt's, then each step's
        self.path = "model"

    def pieces(self) -> Generator[Piece, None, None]:
        """The text; ask for it once."""
        model = self.opened.model
        ends = end_tokens(model, self.tokenizer)
        text = TextPieces(self.tokenizer, after=[] if self.chat else self.ids.tolist())
        with opening.ready(model) as lock:
            with opening.alone(lock, self.threads):
                decoder = Decoder(model, len(self.ids) + self.room, reserve=len(self.ids) + _RESERVE)
            while len(self.tokens) < self.room:
                with opening.alone(lock, self.threads):
                    begin = time.perf_counter()
                    logits = decoder.step(self.tokens[-1]) if self.tokens else decoder.prefill(self.ids)
                    token = self.choose(logits)
                    self.seconds.append(time.perf_counter() - begin)
                self.path = decoder.path
                if token in ends:
                    self.finish = "stop"
                    break
                self.tokens.append(token)
                yield Piece(text.add(token), token)
        yield Piece(text.rest(), None, self.finish)


@opens_models
def stream(
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
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Generator[Piece, None, None]:
    """Continue a prompt, piece by piece.

    Args:
        model: a folder (dense or packed), hub id, `.gguf` file, `smollm2`, or a live causal model.
        prompt: text, messages of a chat (`[{"role": "user", "content": "…"}]`), or tokens `[tokens]` or `[1, tokens]`.
        max_tokens: most tokens to make; fewer if the model ends its text or its context is full.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draw only from the likeliest tokens whose probabilities reach this sum.
        seed: chooses the draws.
        chat: put a text into the model's chat template; None does so when it has one. Messages always need it.
        tokenizer: needed for a live model and a text.
        threads: torch's threads during a step.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError, CheckpointError: no model there, or no chat template.
        TextError: an empty prompt, several at once, one longer than the model's context, or tokens that the model has not.
        RecipeError: max_tokens, temperature, top_p or threads out of range.
        UserError: a live model, a text, and no tokenizer.
        NumericalError: the model gives NaN; raised by the generator.
    """
    choose = Sampler(temperature, top_p, seed)
    return _Continuation(model, prompt, choose, max_tokens, chat, tokenizer, threads, progress).pieces()


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
        choose = Sampler(temperature, top_p, seed)
        text, said = _Continuation(model, prompt, choose, max_tokens, chat, tokenizer, threads, progress), ""
        with contextlib.closing(text.pieces()) as pieces:
            for piece in pieces:
                said += piece.text
                if on_text is not None and piece.text:
                    on_text(piece.text)
        first, *steps = text.seconds
        # The first step may have proved the quick path, which costs a few tokens' time once.
        steady = steps[1:] if len(steps) > 1 else steps
        return Generation(
            text=said,
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
