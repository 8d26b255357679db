"""How often a model repeats itself: greedy continuations of a text that end in one passage, again and again.

A pruned model may predict text nearly as well as before, and still fall into a loop as soon as it writes by itself.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tawny.calibration.mixture import Texts
from tawny.errors import ModelError, RecipeError
from tawny.evaluation.perplexity import windows_of
from tawny.evaluation.sources import reads_on, shared_tokenizer
from tawny.model.context import check_context
from tawny.model.source import resolve
from tawny.model.structure import plain_head
from tawny.model.trust import opens_models
from tawny.packed.opening import load_quietly
from tawny.precision import compute_dtype
from tawny.progress import Progress, silent

START = 32  # tokens of the text that a continuation goes on from
ENDS, PASSAGE = 64, 32  # a loop: so many last tokens are a passage of at most so many, again and again
_AT_ONCE = 16  # continuations


@dataclass(frozen=True)
class Loops:
    """How many continuations repeat themselves.

    Attributes:
        prompts: continuations, each of up to `tokens` tokens; those that ended before 64 are no loops.
        looped: of the model; `dense` of the model that it is compared with, None without one.
        passages: of the first loops of the model, what is repeated.
    """

    text: str
    prompts: int
    tokens: int
    looped: int
    dense: int | None
    against: str | None
    passages: list[str]
    compute: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def repeated(tokens: list[int]) -> list[int]:
    """The shortest passage that the last `ENDS` tokens repeat, at most `PASSAGE` long; empty where they repeat none."""
    last = tokens[-ENDS:]
    if len(last) < ENDS:
        return []
    for period in range(1, PASSAGE + 1):
        if last[period:] == last[:-period]:
            return last[:period]
    return []


@opens_models
@torch.no_grad()
def loops(
    source: str | Path,
    text: Texts,
    *,
    against: str | Path | None = None,
    prompts: int = 64,
    tokens: int = 256,
    compute: str = "auto",
    device: str = "cpu",
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Loops:
    """Let a model continue the beginnings of windows of a text, always by its most likely token, and count loops.

    Args:
        source: a folder, dense or packed, hub id, `.gguf` file or `smollm2`.
        text: each window of 32 tokens is a beginning.
        against: the dense model, which continues the same.
        prompts, tokens: how many continuations, and tokens of each.
        compute: `auto`, `float32`, `bfloat16` or `float16`.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        RecipeError: too few tokens to tell a loop, or more than the model has positions.
        TextError: the text is too short.
        ModelError: a model that predicts no next token, or two with different tokenizers.
    """
    if tokens < ENDS or prompts < 1:
        raise RecipeError(f"{prompts} continuations of {tokens} tokens: expected 1 of {ENDS}, or more")
    for each in (source, against):
        if each is not None and not reads_on(each):
            raise ModelError(f"{each} predicts no next token, so it continues no text: give a language model")
    begun = time.perf_counter()
    folders = [resolve(each, progress.say) for each in (source, against) if each is not None]
    tokenizer, dtype = shared_tokenizer(folders), compute_dtype(compute, device)
    windows = windows_of(text, START, prompts, None, tokenizer)
    written = []
    for folder in folders:
        model = load_quietly(folder, dtype, device)
        check_context(model, START + tokens)
        progress.phase(f"continuing with {folder.name}", len(windows.ids), "texts")
        written.append(_continued(model, windows.ids.to(device), tokens, progress))
        del model
    passages = [[passage for each in one if (passage := repeated(each))] for one in written]
    return Loops(
        text=str(text),
        prompts=len(windows.ids),
        tokens=tokens,
        looped=len(passages[0]),
        dense=len(passages[1]) if against is not None else None,
        against=None if against is None else str(against),
        passages=[tokenizer.decode(each) for each in passages[0][:3]],
        compute=str(dtype).removeprefix("torch."),
        seconds=round(time.perf_counter() - begun, 3),
    )


def _continued(model: Any, starts: Tensor, tokens: int, progress: Progress) -> list[list[int]]:
    """What follows each start, up to an end token."""
    from transformers import GenerationConfig

    usual = model.generation_config
    ends, fill = usual.eos_token_id, usual.pad_token_id
    ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=ends or None, pad_token_id=fill or 0
    )
    # `generate` fills what is left open from the model's own settings, such as a penalty of what repeats.
    model.generation_config = plain
    continued = []
    for first in range(0, len(starts), _AT_ONCE):
        part = starts[first : first + _AT_ONCE]
        with plain_head(model):
            written = model.generate(part, attention_mask=torch.ones_like(part))
        for row in written[:, part.shape[1] :].tolist():
            end = min((row.index(token) for token in ends if token in row), default=len(row))
            continued.append(row[:end])
            progress.step("continued")
    return continued
