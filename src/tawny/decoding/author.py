"""Text that the dense model writes itself: calibration and training for whoever has nothing but the model (2410.17170).

It is sampled from the model's whole distribution, many texts at once, by `generate`, which runs every model that
transformers can let write. A text begins with BOS or with the chat template's start of a question, by turns where there are
both. The temperature falls from 1.5 to 1 over the first four tokens: early ones spread the texts, later ones read like the
model. (From 2 over ten tokens SmolLM2 wanders off: by its own measure 4.25 nats a token after them, against 3.65.) A passage
of six tokens never comes twice in a text, which keeps small models out of loops. An end token does not end a text: what
follows it is what the model was trained to see there, and every forward stays full.

What this file promises: the text is written once for a model, its settings and a seed, and kept in the cache, so that the
next run reads the same. Written anew on the same machine it is the same again. Each batch of texts is kept as soon as it is
written, so that a run that is stopped goes on with the next one.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.calibration.mixture import OWN, rendered
from tawny.calibration.text import Text, joined, load_text
from tawny.errors import RecipeError, TextError
from tawny.machine import cache_folder
from tawny.model import durable
from tawny.model.checkpoint import Checkpoint, file_bytes, is_packed
from tawny.model.context import longest_text
from tawny.model.identity import fingerprint
from tawny.model.structure import evaluating, plain_head, predicts_tokens
from tawny.packed.opening import load_quietly
from tawny.process_group import ProcessGroup
from tawny.progress import Progress, silent
from tawny.words import size

LENGTH = 512  # tokens of a text, at most
SHORTEST = 128  # where more texts at once cost no more than a longer one
TEXTS = 32  # written at once
HOTTEST, COOLED = 1.5, 4  # the temperature of the first token, and the token from which on it is 1
PASSAGE = 6  # tokens that never come twice
_ELSEWHERE = "set TAWNY_CACHE to another folder"
_BATCH_SEED = 1_000_003  # apart from the seeds that a user gives one after another
_MARK = "\ue000"  # no template has it, or trims it


@dataclass(frozen=True)
class Author:
    """A dense model that can be asked for text.

    Args:
        opened: the whole model, ready for forwards.
        tokenizer: of the model.
        identity: tells the model's files from others; None where there are none to know it by, so that nothing is kept.
        bytes_: of the whole model in memory.
        memory: peak bytes that were promised, if any.
        group: processes that all need the text; the first one writes it.
    """

    opened: Callable[[], Any]
    tokenizer: Any
    identity: Callable[[], str] | None
    bytes_: int
    seed: int
    memory: int | None = None
    group: ProcessGroup | None = None
    progress: Progress = silent

    def write(self, tokens: int) -> Text:
        """About `tokens` tokens of its own text.

        Raises:
            RecipeError: the model does not fit into the memory that was promised.
            TextError: nothing to begin with, or the model writes nothing but its end token.
        """
        rows = min(TEXTS, max(1, math.ceil(tokens / SHORTEST)))
        settings: dict[str, float] = {"tokens": tokens, "length": LENGTH, "texts": rows, "seed": self.seed}
        settings |= {"hottest": HOTTEST, "cooled": COOLED, "passage": PASSAGE}
        if self.identity is None:
            return joined(OWN, self._documents(tokens, rows), written=settings)
        known = {"model": self.identity(), "starts": self._starts(), "seeds": "of each batch", **settings}
        key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
        kept = cache_folder() / "texts" / f"{key}.jsonl"

        def keep() -> None:
            if not kept.exists():
                with durable.writing(kept, _ELSEWHERE):
                    kept.parent.mkdir(parents=True, exist_ok=True)
                made = self._documents(tokens, rows, kept)
                lines = [json.dumps({"text": text}, ensure_ascii=False) for text in made]
                with durable.writing(kept, _ELSEWHERE):
                    durable.write(kept, ("\n".join(lines) + "\n").encode())
            for part in kept.parent.glob(f"{kept.stem}.*.part"):
                part.unlink(missing_ok=True)

        keep() if self.group is None else self.group.once(keep)
        kept_text = load_text(kept)
        return Text(
            OWN, kept_text.text, kept_text.documents, kept_text.sha256, kept_text.separator, written=settings
        )

    def _documents(self, tokens: int, rows: int, kept: Path | None = None) -> list[str]:
        """The texts; each batch stays beside `kept` until all of them are there."""
        self.check_memory()
        starts = self._starts()
        model = self.opened()
        if not predicts_tokens(model):
            raise TextError(
                "text 'self' is written by a language model, and this one predicts no next token: give a text"
            )
        longest = max(len(start) for start in starts)
        most = min(LENGTH, longest_text(model) or LENGTH) - longest
        length = max(PASSAGE + 1, min(most, math.ceil(tokens / rows)))
        batches = math.ceil(tokens / (rows * length))
        parts = [None if kept is None else kept.with_suffix(f".{batch}.part") for batch in range(batches)]
        missing = sum(part is None or not part.exists() for part in parts)
        self.progress.phase("writing", missing * length, f"tokens of {rows} texts")
        documents: list[str] = []
        ends = _end_tokens(model, self.tokenizer)
        gpus = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), torch.no_grad(), evaluating(model):
            for batch, part in enumerate(parts):
                if part is not None and part.exists():
                    documents += json.loads(part.read_text(encoding="utf-8"))
                    continue
                torch.manual_seed(self.seed + _BATCH_SEED * batch)
                start = starts[batch % len(starts)]
                written_RT = _sampled(model, torch.tensor([start] * rows), length, self.progress)
                if bool(torch.isin(written_RT[:, : PASSAGE - 1], torch.tensor(ends)).all()):
                    raise TextError(
                        "text 'self': the model writes nothing but its end token; give another text, such as wiki or a .txt file"
                    )
                # The start is not part of the text, but of a chat it is: the model only knows what follows it.
                whole_RT = (
                    torch.cat([torch.tensor([start] * rows), written_RT], dim=1)
                    if len(start) > 1
                    else written_RT
                )
                texts = self.tokenizer.batch_decode(whole_RT.tolist(), clean_up_tokenization_spaces=False)
                documents += texts
                if part is not None:
                    with durable.writing(part, _ELSEWHERE):
                        durable.write(part, json.dumps(texts).encode())
        del model
        gc.collect()  # a model refers to itself, and whatever comes next needs the memory
        return documents

    def check_memory(self) -> None:
        """Raise a RecipeError if the whole model does not fit into the memory that was promised."""
        if self.memory is not None and self.bytes_ > self.memory:
            raise RecipeError(
                f"text 'self' is written by the whole model, which takes {size(self.bytes_)} and the memory is "
                f"{size(self.memory)}: give another text, or write it on a larger machine and take its cache along"
            )

    def _starts(self) -> list[list[int]]:
        """The tokens that texts begin with: BOS, and a conversation up to its first question."""
        tokenizer, starts = self.tokenizer, []
        if tokenizer.bos_token_id is not None:
            starts.append([int(tokenizer.bos_token_id)])
        if getattr(tokenizer, "chat_template", None):
            asked = [{"role": "user", "content": _MARK}]
            before, mark, _ = rendered(tokenizer, asked).partition(_MARK)
            if mark and (ids := tokenizer(before, add_special_tokens=False)["input_ids"]):
                starts.append(list(ids))
        if not starts:
            raise TextError(
                "text 'self' begins with BOS or with the chat template's start, and this tokenizer has neither: give another text"
            )
        return starts


def author_of(
    model: Path | nn.Module,
    tokenizer: Any,
    seed: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    memory: int | None = None,
    group: ProcessGroup | None = None,
    progress: Progress = silent,
) -> Author:
    """Who writes the text `self`: the model in a folder, opened when it is asked, or a live one."""
    if isinstance(model, nn.Module):
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        return Author(lambda: model, tokenizer, None, held, seed, memory, group, progress)
    size = file_bytes(model) if is_packed(model) else Checkpoint(model).bytes_in(dtype)
    opened = partial(load_quietly, model, dtype, device)
    return Author(
        opened, tokenizer, lambda: f"{fingerprint(model)} {dtype}", size, seed, memory, group, progress
    )


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    return [int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None]


def _sampled(model: Any, start_RT: Tensor, length: int, progress: Progress) -> Tensor:
    """`length` tokens after each start, `[texts, length]`."""
    from transformers import GenerationConfig, LogitsProcessorList

    first = start_RT.shape[1]
    passages: list[dict[tuple[int, ...], list[int]]] = [{} for _ in start_RT]

    def shaped(ids_RT: Tensor, scores_RV: Tensor) -> Tensor:
        at = ids_RT.shape[1] - first
        scores_RV = scores_RV.float() / (1 + (HOTTEST - 1) * max(0.0, 1 - at / COOLED))
        for row, (seen, ids) in enumerate(zip(passages, ids_RT[:, -PASSAGE:].tolist(), strict=True)):
            if len(ids) == PASSAGE:
                seen.setdefault(tuple(ids[:-1]), []).append(ids[-1])
            scores_RV[row, seen.get(tuple(ids[1 - PASSAGE :]), [])] = -math.inf
        progress.step("writing")
        return _drawn(scores_RV)

    plain = GenerationConfig(do_sample=False, max_new_tokens=length, use_cache=True)
    # `generate` fills what a configuration leaves open from the model's own, whose end token would end a text.
    usual, model.generation_config = model.generation_config, plain
    try:
        with _heads_grouped(), plain_head(model):
            sampled: Tensor = model.generate(
                start_RT.to(model.device),
                attention_mask=torch.ones_like(start_RT).to(model.device),
                logits_processor=LogitsProcessorList([shaped]),
            )
    finally:
        model.generation_config = usual
    return sampled.cpu()[:, first:]


@contextmanager
def _heads_grouped() -> Iterator[None]:
    """Attention of single tokens on a CPU by plain products, as long as this lasts.

    torch's own kernel for them is slow in bfloat16: with 32 texts of up to 288 tokens, a small model's step took twice the time.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **keys: Any,
    ) -> tuple[
        Tensor, None
    ]:  # by the names that models call it with: [B, H, Q, D], twice [B, K, T, D], [B, 1, Q, T]
        count, heads, queries, width = query.shape
        each_head = attention_mask is not None and attention_mask.shape[1] > 1
        more = each_head or any(keys.get(name) is not None for name in ("position_bias", "softcap"))
        if queries > 1 or query.device.type != "cpu" or more:
            return usual(module, query, key, value, attention_mask, **keys)  # type: ignore[no-any-return]
        query_BKGD = query.reshape(count, key.shape[1], -1, width)
        scores_BKGT = (query_BKGD @ key.transpose(-1, -2)).float() * (keys.get("scaling") or width**-0.5)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            scores_BKGT = scores_BKGT.masked_fill(~attention_mask, -math.inf)
        elif attention_mask is not None:
            scores_BKGT = scores_BKGT + attention_mask
        return (scores_BKGT.softmax(-1).to(value.dtype) @ value).reshape(count, 1, heads, -1), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


def _drawn(scores_RV: Tensor) -> Tensor:
    """Scores that are 0 at one word of each row, drawn by its probability, and −∞ elsewhere.

    One random number a row: torch's own way draws one for each word of the vocabulary, a third of a small model's step.
    """
    up_to_RV = scores_RV.softmax(-1).cumsum(-1)
    total_R1 = up_to_RV[:, -1:]
    drawn_R1 = torch.searchsorted(up_to_RV, torch.rand_like(total_R1) * total_R1, right=True)
    nothing_RV = torch.full_like(scores_RV, -math.inf)
    return nothing_RV.scatter(1, drawn_R1.clamp(max=scores_RV.shape[1] - 1), 0.0)
