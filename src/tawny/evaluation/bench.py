"""How fast and how small a model is on this machine, and how sure that is.

It takes a folder, dense or packed, or a live model, and decodes with decoding/decoder.py. Memory is what the model
added to this process: resident memory afterwards minus before it was opened, interpreter and imports not counted.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tawny.decoding import opening
from tawny.decoding.decoder import Decoder
from tawny.decoding.whole import exchanged
from tawny.errors import RecipeError
from tawny.evaluation.llama import LlamaBench, Turn
from tawny.kernels.native import kernel_name
from tawny.model.context import longest_text
from tawny.model.source import resolve, stored_bytes
from tawny.model.trust import opens_models
from tawny.packed.linear import PackedLinear
from tawny.progress import Progress, silent


@dataclass(frozen=True)
class Against:
    """What `llama-bench` says of a GGUF file, in medians over rounds that took turns with ours, with quartiles.

    A ratio is our tokens a second by theirs in the same round. `type` is llama.cpp's word for the model and its type.
    """

    file: str
    type: str
    file_bytes: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    decode_quartiles: tuple[float, float]
    prefill_quartiles: tuple[float, float]
    decode_ratio: float
    prefill_ratio: float
    decode_ratio_quartiles: tuple[float, float]
    prefill_ratio_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Speed:
    """Medians over rounds, with quartiles, of one model on this machine.

    file_bytes: all weight files, None for a live model. resident_bytes: what the model added to the process.
    against: the same of a GGUF file that llama.cpp measured in turns with it, and ratios of ours to it (`decode_ratio` …).
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
    whole: int  # packed linears that ran without their masks, because that is faster on this machine
    path: str
    against: Against | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    against: str | Path | None = None,
    llama: str | Path | None = None,
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
        against: a GGUF file that llama.cpp measures in turns with the model: the same tokens, rounds and threads, on the CPU.
        llama: `llama-bench`, or the folder that holds it; for `against`.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        RecipeError: a number out of its range; only one of `against` and `llama`.
        ModelError: the model decodes nothing.
        CheckpointError: `against` is not a GGUF file.
        MissingFeature: `llama` is not a program.
        UserError: `llama-bench` failed.
    """
    if (against is None) != (llama is None):
        raise RecipeError("against (a GGUF file) and llama (llama-bench) go together: give both, or none")
    rival = None if against is None or llama is None else LlamaBench(Path(llama), Path(against))
    for name, value in (("prompt_tokens", prompt_tokens), ("tokens", tokens), ("rounds", rounds)):
        if not 1 <= value <= _MOST:
            raise RecipeError(f"{name} {value} is not possible; give 1 to {_MOST:,}")
    with opening.threads(threads) as used:
        size = None
        if not isinstance(source, nn.Module):
            folder = resolve(source, progress.say)
            size, source = stored_bytes(source), folder
        opened = opening.open_model(source)
        opening.check_predicts(opened.model)
        limit = longest_text(opened.model)
        if limit is not None and prompt_tokens + _UNTIMED + tokens > limit:
            raise RecipeError(
                f"{prompt_tokens} + {_UNTIMED} (not timed) + {tokens} tokens are more than the model's context of "
                f"{limit}; ask for fewer"
            )
        theirs: list[Turn] = []

        def others() -> None:
            if rival is not None:
                theirs.append(rival.turn(prompt_tokens, tokens, used))

        ours, path = _rounds(opened.model, prompt_tokens, tokens, rounds, seed, quick, others, progress)
        resident = opened.added()
    packed = Counter(module.kind for module in opened.model.modules() if isinstance(module, PackedLinear))
    return Speed(
        **_rates(ours),
        resident_bytes=resident,
        file_bytes=size,
        threads=used,
        kernel=kernel_name(),
        prompt_tokens=prompt_tokens,
        decoded_tokens=tokens,
        rounds=rounds,
        dtype=str(next(opened.model.parameters()).dtype).removeprefix("torch."),
        packed=dict(packed),
        whole=len(exchanged(opened.model)),
        path=path,
        against=None if rival is None else _against(rival, ours, theirs),
    )


def _against(rival: LlamaBench, ours: Sequence[Turn], theirs: Sequence[Turn]) -> Against:
    ratios: dict[str, Any] = {}
    for key, own, other in zip(Turn._fields, zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        values = [mine / its for mine, its in zip(own, other, strict=True)]
        ratios |= {f"{key}_ratio": statistics.median(values), f"{key}_ratio_quartiles": quartiles(values)}
    return Against(str(rival.file), rival.type, rival.file.stat().st_size, **_rates(theirs), **ratios)


def _rates(turns: Sequence[Turn]) -> dict[str, Any]:
    """Medians and quartiles of both speeds, by their names in `Speed`."""
    rates: dict[str, Any] = {}
    for key, values in zip(Turn._fields, zip(*turns, strict=True), strict=True):
        rates |= {
            f"{key}_tokens_per_second": statistics.median(values),
            f"{key}_quartiles": quartiles(values),
        }
    return rates


def _rounds(
    model: Any,
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    seed: int,
    quick: bool | None,
    others: Callable[[], None],
    progress: Progress,
) -> tuple[list[Turn], str]:
    """Our turns, with `others` called after each, and the path that decoding took."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (prompt_tokens,), generator=generator)
    turns, path = [], "model"
    progress.phase("measuring", rounds + 1, "rounds")
    with opening.ready(model) as lock, lock, torch.inference_mode():
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
                turns.append(Turn(prompt_tokens / (filled - begin), tokens / (end - start)))
                others()
            path = decoder.path
            progress.step(f"round {number}")
    return turns, path


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; a single value is both."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
