"""How fast and how small: `generate` writes text and says what it took, `bench` measures and says how sure it is.

Both take a folder, dense or packed, or a live model, and decode with decoding/decoder.py. Memory is what the model
added to this process: resident memory afterwards minus before it was opened, interpreter and imports not counted.
"""

from __future__ import annotations

__all__ = ["Generation", "Speed", "bench", "generate"]

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tawny.calibration.context import check_ids, context_of
from tawny.decoding.decoder import Decoder, kernels
from tawny.errors import CheckpointError, NumericalError, RecipeError, TextError, UserError
from tawny.kernels.native import kernel_name
from tawny.machine import peak_memory, resident_memory
from tawny.model.checkpoint import file_bytes
from tawny.model.source import load_tokenizer, resolve
from tawny.model.streams import holds_integers
from tawny.model.structure import evaluating
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


@dataclass(frozen=True)
class Speed:
    """Medians over rounds, with quartiles, of one model on this machine.

    file_bytes: all weight files, None for a live model. resident_bytes: what the model added to the process.
    """

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    resident_bytes: int
    file_bytes: int | None
    threads: int
    kernel: str
    decode_quartiles: tuple[float, float]
    prefill_quartiles: tuple[float, float]
    prompt_tokens: int
    decoded_tokens: int
    rounds: int
    dtype: str
    packed: dict[str, int]
    path: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise RecipeError(f"threads {count} is not possible; give 1 or more")
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _prepare(folder: Path) -> None:
    """Import what opening the model will import, so that memory measured afterwards is the model's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging

    from tawny.model.skeleton import read_config

    logging.disable_progress_bar()  # it would run through the text
    with contextlib.suppress(Exception):  # whatever is wrong with the folder, opening it says so better
        MODEL_FOR_CAUSAL_LM_MAPPING[type(read_config(folder))]


def _open(folder: Path) -> Any:
    """A transformers model of a dense or packed folder, in its own dtype, ready to be decoded."""
    from tawny.packed.opening import load

    return load(folder)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text: what the model's generation settings say, else its configuration, else the tokenizer."""
    owners = (getattr(model, "generation_config", None), model.config, tokenizer)
    found = next((e for o in owners if (e := getattr(o, "eos_token_id", None)) is not None), None)
    return set() if found is None else {found} if isinstance(found, int) else set(found)


# --- generate --------------------------------------------------------------------------------------------


@opens_models
def generate(
    model: str | Path | nn.Module,
    prompt: str | Tensor,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    tokenizer: Any = None,
    threads: int | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Generation:
    """Continue a prompt.

    Args:
        model: a folder (dense or packed), hub id, `.gguf` file, `smollm2`, or a live causal model.
        prompt: text, or tokens `[tokens]` or `[1, tokens]`.
        max_tokens: most tokens to make; fewer if the model ends its text or its context is full.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draw only from the likeliest tokens whose probabilities reach this sum.
        seed: chooses the draws.
        chat: put the prompt into the model's chat template; None does so when it has one.
        tokenizer: needed for a live model and a text.
        threads: torch's threads meanwhile.
        on_text: called with each piece of text as it comes.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError, CheckpointError: no model there.
        TextError: an empty prompt, several at once, one longer than the model's context, or tokens that the model has not.
        NumericalError: the model gives NaN.
    """
    if isinstance(prompt, str):
        _check_text(prompt)
    if max_tokens < 1:
        raise RecipeError(f"max_tokens {max_tokens} is not possible; give 1 or more")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise RecipeError(f"temperature {temperature} is not possible; give 0 or more")
    if not 0 < top_p <= 1:
        raise RecipeError(f"top_p {top_p} is not possible; give more than 0 and at most 1")
    with _threads(threads) as used:
        if isinstance(model, nn.Module):
            live: Any = model
            before = resident_memory()
        else:
            folder = resolve(model, progress.say)
            tokenizer = tokenizer or load_tokenizer(folder)
            _prepare(folder)
            before = resident_memory()
            live = _open(folder)
        ids, chat = _tokens(prompt, tokenizer, chat)
        limit = context_of(live)
        if limit is not None and len(ids) >= limit:
            raise TextError(
                f"the prompt has {len(ids)} tokens and the model's context is {limit}; shorten it"
            )
        check_ids(live, ids)
        room = max_tokens if limit is None else min(max_tokens, limit - len(ids))
        with _alone(live), torch.inference_mode(), evaluating(live), kernels(live):
            made = _continue(live, ids, room, _Choice(temperature, top_p, seed), tokenizer, on_text)
        if made["finish"] == "length" and room < max_tokens:
            made["finish"] = "context"
        return Generation(
            **made,
            prompt_tokens=len(ids),
            chat=chat,
            resident_bytes=max(0, resident_memory() - before),
            peak_bytes=peak_memory(),
            threads=used,
            kernel=kernel_name(),
        )


def _tokens(prompt: str | Tensor, tokenizer: Any, chat: bool | None) -> tuple[Tensor, bool]:
    if isinstance(prompt, Tensor):
        if prompt.dim() not in (1, 2) or (prompt.dim() == 2 and len(prompt) != 1):
            raise TextError(
                f"the prompt is a tensor of shape {list(prompt.shape)}; give one prompt, [tokens] or [1, tokens]"
            )
        if not holds_integers(prompt):
            raise TextError(f"the prompt is a tensor of {prompt.dtype}; give token ids, torch.long")
        ids, chat = prompt.reshape(-1).long(), False
    else:
        if tokenizer is None:
            raise UserError("a live model needs tokenizer=… to read a text, or a prompt of tokens")
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            raise CheckpointError("the tokenizer has no chat template; leave chat out")
        chat = has_template if chat is None else chat
        if chat:
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            listed = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            listed = tokenizer(prompt)["input_ids"]
        ids = torch.tensor(listed, dtype=torch.long)
    if not len(ids):
        raise TextError("the prompt holds no token; give at least one word")
    return ids, chat


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"the prompt is not valid UTF-8 (at character {error.start + 1}); encode it anew"
        ) from None


@contextlib.contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """One text a model at a time: its modules are exchanged, and hooked while the quick path is proved."""
    with _locking:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


_locking = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


class _Choice:
    """Which token comes next."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        highest = float(logits.max())
        if not math.isfinite(highest):
            raise NumericalError(
                f"the model's logits hold {highest}; check its weights, or open it in another dtype"
            )
        if self.temperature == 0:
            return int(logits.argmax())
        # In float64 and below zero: divided by a tiny temperature they go to -infinity, and the likeliest stays.
        below = logits.double().cpu() - highest
        shares = torch.softmax(below / self.temperature, -1)
        if self.top_p == 1:
            return int(torch.multinomial(shares, 1, generator=self.generator))
        sorted_, order = shares.sort(descending=True)
        # The token that crosses the sum still counts, so that at least one is left.
        sorted_[sorted_.cumsum(0) - sorted_ >= self.top_p] = 0
        return int(order[torch.multinomial(sorted_, 1, generator=self.generator)])


class _Text:
    """Text of tokens that come one at a time; a piece is given out once its last character is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.said, self.start = "", 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.on_text is not None and self.tokenizer is not None:
            whole = self._decode(self.ids[self.start :])
            if not whole.endswith("�"):
                self._say(whole)
            # Decoding starts again at a line's end, or a long text would cost its square. It starts with the last
            # token of that line, because some decoders drop a space from the front of whatever they are given.
            if whole.endswith("\n") and (last := self._decode(self.ids[-1:])).endswith("\n"):
                self.start, self.said = len(self.ids) - 1, last

    def finish(self) -> str:
        if self.tokenizer is None:
            return ""
        if self.on_text is not None:
            self._say(self._decode(self.ids[self.start :]))
        return self._decode(self.ids)

    def _say(self, whole: str) -> None:
        if self.on_text is not None and len(whole) > len(self.said):
            self.on_text(whole[len(self.said) :])
            self.said = whole

    def _decode(self, ids: list[int]) -> str:
        # Tidied up, a text would change behind what has been given out.
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _continue(
    model: Any,
    ids: Tensor,
    room: int,
    choose: _Choice,
    tokenizer: Any,
    on_text: Callable[[str], None] | None,
) -> dict[str, Any]:
    ends, text = _ends(model, tokenizer), _Text(tokenizer, on_text)
    decoder = Decoder(model, len(ids) + room, reserve=len(ids) + _RESERVE)
    start = time.perf_counter()
    token = choose(decoder.prefill(ids))
    first = time.perf_counter() - start
    finish, times = "length", []
    while True:
        if token in ends:
            finish = "stop"
            break
        text.add(token)
        if len(text.ids) == room:
            break
        begin = time.perf_counter()
        token = choose(decoder.step(token))
        times.append(time.perf_counter() - begin)
    # The first step may have proved the quick path, which costs a few tokens' time once.
    steady = times[1:] if len(times) > 1 else times
    return {
        "text": text.finish(),
        "tokens": text.ids,
        "finish": finish,
        "first_token_seconds": first,
        "prefill_tokens_per_second": len(ids) / first,
        "decode_tokens_per_second": len(steady) / sum(steady) if steady else None,
        "path": decoder.path,
    }


_RESERVE = 1024  # tokens a text has memory for at first; few texts are as long as they may be


# --- bench -----------------------------------------------------------------------------------------------

_MOST = 10_000_000
_UNTIMED = 1  # token decoded before the timed ones in each round: it finds out which path is taken


@opens_models
def bench(
    source: str | Path | nn.Module,
    *,
    prompt_tokens: int = 128,
    tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    seed: int = 0,
    quick: bool | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Speed:
    """Tokens a second of a model on this machine, decoding one sequence of random tokens.

    Every round fills a prompt and then decodes greedily; a first round warms up and is not counted.

    Args:
        source: a folder (dense or packed), hub id, `.gguf` file, `smollm2`, or a live causal model.
        prompt_tokens: length of the prompt.
        tokens: tokens decoded after it, in each round.
        rounds: measured rounds; medians are over them.
        threads: torch's threads meanwhile.
        quick: False decodes with the model's own forward only.
        trust_remote_code: let code that lies in a model's folder run.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("tokens", tokens), ("rounds", rounds)):
        if not 1 <= value <= _MOST:
            raise RecipeError(f"{name} {value} is not possible; give 1 to {_MOST:,}")
    with _threads(threads) as used:
        before, size = resident_memory(), None
        if isinstance(source, nn.Module):
            model: Any = source
        else:
            folder = resolve(source, progress.say)
            size = file_bytes(folder)
            _prepare(folder)
            before = resident_memory()
            model = _open(folder)
        limit = context_of(model)
        if limit is not None and prompt_tokens + _UNTIMED + tokens > limit:
            raise RecipeError(
                f"{prompt_tokens} + {_UNTIMED} (not timed) + {tokens} tokens are more than the model's context of "
                f"{limit}; ask for fewer"
            )
        prefill, decode, path = _rounds(model, prompt_tokens, tokens, rounds, seed, quick, progress)
        resident = max(0, resident_memory() - before)
    return Speed(
        decode_tokens_per_second=statistics.median(decode),
        prefill_tokens_per_second=statistics.median(prefill),
        resident_bytes=resident,
        file_bytes=size,
        threads=used,
        kernel=kernel_name(),
        decode_quartiles=_quartiles(decode),
        prefill_quartiles=_quartiles(prefill),
        prompt_tokens=prompt_tokens,
        decoded_tokens=tokens,
        rounds=rounds,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        packed=_packed_kinds(model),
        path=path,
    )


def _rounds(
    model: Any,
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    seed: int,
    quick: bool | None,
    progress: Progress,
) -> tuple[list[float], list[float], str]:
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (prompt_tokens,), generator=generator)
    prefill, decode, path = [], [], "model"
    progress.phase("measuring", rounds + 1)
    with _alone(model), torch.inference_mode(), evaluating(model), kernels(model):
        for number in range(rounds + 1):
            decoder = Decoder(model, prompt_tokens + _UNTIMED + tokens, quick)
            begin = time.perf_counter()
            token = int(decoder.prefill(ids).argmax())
            filled = time.perf_counter()
            token = int(decoder.step(token).argmax())
            start = time.perf_counter()
            for _ in range(tokens):
                token = int(decoder.step(token).argmax())
            end = time.perf_counter()
            if number:
                prefill.append(prompt_tokens / (filled - begin))
                decode.append(tokens / (end - start))
            path = decoder.path
            progress.step(f"round {number}")
    return prefill, decode, path


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _packed_kinds(model: nn.Module) -> dict[str, int]:
    """How many linears are packed, by kind of value."""
    from tawny.packed.linear import PackedLinear

    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            found[module.kind] = found.get(module.kind, 0) + 1
    return found
