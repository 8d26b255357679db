"""How fast a model answers a batch of samples on this machine: for encoders, which do not decode.

It takes a folder, dense or packed, or a live model, and runs its own forward, with packed linears where there are some. Each
round answers one batch of random tokens or pixels; a first one warms up and is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.decoding import opening
from tawny.errors import RecipeError
from tawny.evaluation.bench import quartiles
from tawny.kernels.native import kernel_name
from tawny.model.context import hard_context_of, words_of
from tawny.model.source import resolve, stored_bytes
from tawny.model.structure import evaluating, input_of, pixels_for
from tawny.model.trust import opens_models
from tawny.packed.linear import PackedLinear
from tawny.progress import Progress, silent

TOKENS = 16  # of a short sentence


@dataclass(frozen=True)
class Latency:
    """Medians over rounds, with quartiles, of one model on this machine.

    `seconds` is of a batch. `tokens` is None for a model that takes none. `file_bytes` and `resident_bytes` as in `Speed`.
    """

    seconds: float
    seconds_quartiles: tuple[float, float]
    samples_per_second: float
    batch: int
    tokens: int | None
    rounds: int
    resident_bytes: int
    file_bytes: int | None
    threads: int
    kernel: str
    dtype: str
    packed: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@opens_models
def latency(
    source: str | Path | nn.Module,
    *,
    batch: int = 1,
    tokens: int = TOKENS,
    rounds: int = 5,
    threads: int | None = None,
    dtype: str | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Latency:
    """Seconds that a batch of `batch` samples takes, of `tokens` tokens each where the model reads text.

    Args:
        dtype: of everything that is not packed; the checkpoint's own if None.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        RecipeError: a number below 1, or more tokens than the model has positions for.
        ModelError: the model takes neither tokens nor pixels.
    """
    for name, value in (("batch", batch), ("tokens", tokens), ("rounds", rounds)):
        if value < 1:
            raise RecipeError(f"{name} {value} is not possible; give 1 or more")
    with opening.threads(threads) as used:
        size = None
        if not isinstance(source, nn.Module):
            folder = resolve(source, progress.say)
            size, source = stored_bytes(source), folder
        opened = opening.open_model(source, dtype)
        model = opened.model
        inputs = inputs_for(model, batch, tokens)
        progress.phase("measuring", rounds + 1, "rounds")
        taken = []
        with evaluating(model), torch.inference_mode():
            for number in range(rounds + 1):
                start = time.perf_counter()
                model(**inputs)
                taken.append(time.perf_counter() - start)
                progress.step(f"round {number}")
        resident = opened.added()
    median = statistics.median(taken[1:])
    return Latency(
        seconds=median,
        seconds_quartiles=quartiles(taken[1:]),
        samples_per_second=batch / median,
        batch=batch,
        tokens=tokens if "input_ids" in inputs else None,
        rounds=rounds,
        resident_bytes=resident,
        file_bytes=size,
        threads=used,
        kernel=kernel_name(),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        packed=dict(Counter(m.kind for m in model.modules() if isinstance(m, PackedLinear))),
    )


def inputs_for(model: Any, batch: int, tokens: int) -> dict[str, Tensor]:
    """Random numbers in the shape that the model takes."""
    generator, name = torch.Generator().manual_seed(0), input_of(model)
    if name == "input_ids":
        limit = hard_context_of(model)
        if limit is not None and tokens > limit:
            raise RecipeError(f"{tokens} tokens are more than the model's {limit} positions; ask for fewer")
        return {name: torch.randint(0, words_of(model), (batch, tokens), generator=generator)}
    return pixels_for(model, batch)
