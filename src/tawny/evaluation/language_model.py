"""lm-eval's model class over an opened model, with batches that suit this machine and progress reports."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tawny.errors import MissingFeature
from tawny.evaluation.task_config import INSTALL, quiet
from tawny.machine import free_memory, total_memory
from tawny.model.source import load_tokenizer
from tawny.packed.opening import load_quietly
from tawny.progress import Progress, silent

_BATCH_TOKENS = 2048  # full-speed matrix products whose activations still fit the last-level cache
_UNKNOWN_MEMORY = 4_000_000_000  # taken as free where the system says nothing


def language_model(
    source: Any,
    folder: Path | None,
    dtype: torch.dtype,
    device: str,
    tokenizer: Any,
    batch_tokens: int | None,
) -> Any:
    """lm-eval's model class over the opened model, with batches by tokens and progress reports."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingFeature(f"zero-shot tasks need lm-eval's model class ({error}): {INSTALL}") from None
    model = source if folder is None else load_quietly(folder, dtype, device)

    class ProgressLM(HFLM):  # type: ignore[misc]
        progress: Progress = silent
        label = ""
        tokens = 0

        def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
            """Size of the batch that request `pos` falls into; requests come longest first."""
            if pos == 0:
                self._sizes = batch_sizes(
                    [len(a) + len(b) - 1 for _, a, b in n_reordered_requests], self.tokens
                )
                count, at = 0, 0
                while at < len(self._sizes):
                    count, at = count + 1, at + self._sizes[at]
                self.progress.phase(self.label, count, "batches")
            return self._sizes[pos]

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self.progress.step(f"{inps.shape[0]} × {inps.shape[1]} tokens")
            return logits

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.batch_size_per_gpu = 1
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.batch_size_per_gpu = 1
            return super().generate_until(requests, disable_tqdm=True)

    if tokenizer is None and folder is not None:
        tokenizer = load_tokenizer(folder)
    keys = {"backend": "causal", "batch_size": "auto", "softmax_dtype": torch.float32}
    # lm-eval ties head and embedding, whatever is stored, and gives the tokenizer a padding token.
    tied, model.tie_weights = vars(model).get("tie_weights"), lambda *_, **__: None
    try:
        with quiet():
            lm = ProgressLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), **keys)
    finally:
        del model.tie_weights
        if tied is not None:
            model.tie_weights = tied
    lm.tokens = batch_tokens or _affordable_tokens(model)
    return lm


def batch_sizes(lengths: Sequence[int], tokens: int) -> list[int]:
    """For each of `lengths` (falling), the size of the batch it is in: as many as `tokens` holds, padding included."""
    sizes: list[int] = []
    while len(sizes) < len(lengths):
        size = min(max(1, tokens // max(1, lengths[len(sizes)])), len(lengths) - len(sizes))
        sizes += [size] * size
    return sizes


def _affordable_tokens(model: Any) -> int:
    """Tokens of one forward: logits twice in float32 and activations within a quarter of the free memory."""
    config = model.config.get_text_config()
    each = 12 * int(config.vocab_size) + 80 * int(config.hidden_size)
    device = next(model.parameters()).device
    if device.type == "cuda":
        free, wanted = torch.cuda.mem_get_info(device)[0], 8 * _BATCH_TOKENS
    else:
        free, wanted = free_memory() or total_memory() // 2 or _UNKNOWN_MEMORY, _BATCH_TOKENS
    return max(1, min(wanted, free // 4 // each))


def ask(lm: Any, loaded: Any, limit: int | None) -> Any:
    from lm_eval.evaluator import evaluate

    lm.batch_size_per_gpu = "auto"
    with quiet():
        return evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
