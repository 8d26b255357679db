"""What a recovery reads: a text cut into windows without padding, an order that a step number decides, and windows held out.

Documents are joined, tokenised once and cut into windows that do not overlap, so every token of a batch is text. Each
epoch has its own seeded order. What is read at a step depends on the step alone, so that a resumed run reads what an
uninterrupted one would have.
"""

from __future__ import annotations

__all__ = ["Reading", "read"]

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tawny.calibration.text import NAMED_TEXTS, load_text
from tawny.calibration.windows import TokenisedText, evaluation_windows, tokenise
from tawny.errors import TextError
from tawny.model.streams import Samples
from tawny.recovery.settings import Recovery

# Of a text that has no part of its own to be measured on.
_HELD_OUT = 0.05


@dataclass
class Reading:
    """Windows to train on and, behind them, windows held out; a row names one of either.

    Attributes:
        windows: `[training + held out, seqlen]`.
        training: how many of them are trained on.
        about: name, hash and sizes, for the record.
    """

    windows: Tensor
    training: int
    batch: int
    seed: int
    about: dict[str, Any]
    _orders: dict[int, list[int]] = field(default_factory=dict)

    @property
    def held_out(self) -> list[int]:
        return list(range(self.training, len(self.windows)))

    def rows(self, step: int) -> list[int]:
        """Training windows of one step, over all processes."""
        first = step * self.batch
        return [self._row(position) for position in range(first, first + self.batch)]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.training)
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.training, generator=generator).tolist()
            self._orders = {epoch - 1: self._orders.get(epoch - 1, []), epoch: order}
        return self._orders[epoch][place]


def read(
    settings: Recovery, tokenizer: Any, text: Tensor | None = None, held_out: Tensor | None = None
) -> Reading:
    """The windows of a text or of given tokens `[windows, seqlen]`.

    Raises:
        TextError: it holds less than one batch beside what is held out, or the two have windows of other widths.
    """
    if text is not None:
        windows = Samples(text).tokens
        about: dict[str, Any] = {"name": "tokens"}
        name = "the tokens given"
    else:
        loaded = load_text(settings.text, "calibration")
        tokens = tokenise(loaded, tokenizer, settings.bos)
        name = tokens.name
        windows = _windows(tokens, settings)
        about = {"name": loaded.name, "sha256": loaded.sha256, "tokens": len(tokens)}
        about["bos"] = tokens.bos is not None
        if held_out is None and loaded.name in NAMED_TEXTS:
            measured = load_text(settings.text, "evaluation")
            unseen = replace(tokenise(measured, tokenizer, settings.bos), name=f"{name} held out")
            # Evaluations read it from its beginning, and must not have been chosen by.
            held_out = evaluation_windows(unseen, settings.seqlen)[-settings.eval_windows :]
    if held_out is None:
        count = min(settings.eval_windows, max(1, round(len(windows) * _HELD_OUT)))
        windows, held_out = windows[:-count], windows[-count:]
    _check_held_out(held_out, int(windows.shape[1]))
    held_out = held_out[: settings.eval_windows]
    if len(windows) < settings.batch:
        raise TextError(
            f"{name} gives {len(windows)} windows of {windows.shape[1]} tokens to train on and a batch takes "
            f"{settings.batch}: give a longer text, or a smaller -o batch or --seqlen"
        )
    about |= {"windows": len(windows), "seqlen": int(windows.shape[1]), "held_out": len(held_out)}
    # Longer texts than the budget need not be cached or hashed whole.
    windows = windows[: max(settings.batch, settings.steps * settings.batch)]
    both = torch.cat([windows, held_out])
    about["tokens_sha256"] = hashlib.sha256(both.contiguous().numpy().tobytes()).hexdigest()
    return Reading(both, len(windows), settings.batch, settings.seed, about)


def _check_held_out(held_out: Tensor, seqlen: int) -> None:
    shape = list(held_out.shape)
    if held_out.dim() != 2 or shape[0] == 0 or shape[1] != seqlen or held_out.is_floating_point():
        raise TextError(
            f"held_out has shape {shape} {str(held_out.dtype).removeprefix('torch.')}; expected integer tokens "
            f"[windows, {seqlen}], in windows as long as those that are trained on"
        )


def _windows(text: TokenisedText, settings: Recovery) -> Tensor:
    try:
        return evaluation_windows(text, settings.seqlen)
    except TextError:
        needed = (settings.batch + 1) * text.of_text(settings.seqlen)
        raise TextError(
            f"{text.name} has {len(text):,} tokens; a batch of {settings.batch} × {settings.seqlen} and a window to measure "
            f"on need {needed:,}: give a longer text, or a smaller -o batch or --seqlen"
        ) from None
