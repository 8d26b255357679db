"""What a recovery reads: texts cut into windows without padding, an order that a step number decides, and windows held out.

Documents are joined, tokenised once and cut into windows that do not overlap, so every token of a batch is text. Of
several texts windows come by turns, as their shares say. Each text has its own epochs, and each epoch its own seeded order: a
short text is read again while a long one goes on. What is read at a step depends on the step alone, so that a resumed run
reads what an uninterrupted one would have.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tawny.calibration.mixture import TextMixture, load_texts
from tawny.calibration.text import NAMED_TEXTS, Text
from tawny.calibration.windows import (
    TokenisedText,
    evaluation_windows,
    interleaved,
    shared_out,
    tokenise,
)
from tawny.errors import TextError
from tawny.model.identity import tokens_identity
from tawny.model.streams import Samples, holds_integers
from tawny.recovery.settings import READ_A_MINUTE, Recovery

# Of a text that has no part of its own to be measured on, and of one that the dense model writes. A window's KL rises or falls by
# 0.03 where the mean of all falls by 0.006, so that four of them do not tell which model is nearer (docs/log/recovery-minutes.md).
_HELD_OUT, _OWN_HELD_OUT = 0.05, 0.2
# Tokens that the dense model writes at most, beside those that the minutes read. Writing for a minute of training takes a small
# model about a quarter of a minute.
_MOST_WRITTEN = 131_072
# Windows of several texts come in turns of so many, in which shares are exact to one.
_TURN = 100


class Reading(Protocol):
    """What a recovery is shown: rows to train on and, after them, rows held out.

    Attributes:
        passes: each row that is trained on is read once and never again.
        seqlen: hidden states of a row.
        about: names, hashes and sizes, for the record.
    """

    about: dict[str, Any]

    def own(self, row: int) -> bool:
        """Whether the dense model wrote what is read there."""
        ...

    @property
    def passes(self) -> bool: ...

    @property
    def training(self) -> int: ...

    @property
    def seqlen(self) -> int: ...

    @property
    def held_out(self) -> list[int]: ...

    def rows(self, step: int) -> list[int]:
        """Rows of one step."""
        ...

    def take(self, rows: Sequence[int]) -> Samples:
        """What the model takes for some rows."""
        ...


@dataclass
class ReadingOrder:
    """Which of what is trained on comes when: each source in seeded epochs of its own, and all by turns.

    Args:
        counts: how many each source has, one after the other.
        shares: of each source in what is read.
    """

    counts: list[int]
    shares: list[float]
    seed: int
    _orders: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        turns = shared_out(_TURN, self.shares)
        of = [text for text, count in enumerate(turns) for _ in range(count)]
        self._turn = [of[place] for place in interleaved(turns)]

    def row(self, position: int) -> int:
        """What is read at a place of the whole reading."""
        turn, place = divmod(position, _TURN)
        text = self._turn[place]
        read = turn * self._turn.count(text) + self._turn[:place].count(text)
        epoch, place = divmod(read, self.counts[text])
        return sum(self.counts[:text]) + self._order(text, epoch)[place]

    def _order(self, text: int, epoch: int) -> list[int]:
        if (text, epoch) not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + text * 10_007)
            order = torch.randperm(self.counts[text], generator=generator).tolist()
            self._orders.pop((text, epoch - 2), None)
            self._orders[text, epoch] = order
        return self._orders[text, epoch]


@dataclass
class TrainingWindows:
    """Samples to train on and, after them, samples held out; a row names one of either."""

    samples: Samples
    order: ReadingOrder
    batch: int
    about: dict[str, Any]
    written: Sequence[bool]  # which of the order's texts the dense model wrote
    passes: ClassVar[bool] = False

    @property
    def windows(self) -> Tensor:
        """Tokens `[training + held out, seqlen]`."""
        return self.samples.tokens

    @property
    def training(self) -> int:
        return sum(self.order.counts)

    @property
    def seqlen(self) -> int:
        return self.samples.seqlen

    @property
    def held_out(self) -> list[int]:
        return list(range(self.training, len(self.samples)))

    def rows(self, step: int) -> list[int]:
        """Training windows of one step."""
        first = step * self.batch
        return [self.order.row(position) for position in range(first, first + self.batch)]

    def own(self, row: int) -> bool:
        ends = itertools.accumulate(self.order.counts)
        return next((own for end, own in zip(ends, self.written, strict=True) if row < end), False)

    def take(self, rows: Sequence[int]) -> Samples:
        return self.samples.take(rows)


def read(
    settings: Recovery,
    tokenizer: Any,
    text: Tensor | None = None,
    held_out: Tensor | None = None,
    own: Callable[[float], Text] | None = None,
    around: bool = False,
) -> TrainingWindows:
    """The windows of a text, of several or of given tokens `[windows, seqlen]`.

    Args:
        own: lets the dense model write the text of `self` for a share of what is read.
        around: windows begin and end with what the tokenizer puts around a text.

    Raises:
        TextError: there is less than one batch beside what is held out, or the two have windows of other widths.
    """
    if text is not None:
        check_given("text", text)
        about: dict[str, Any] = {"name": "tokens"}
        name, shares, written = "the tokens given", [1.0], [False]
        parts = [_parted(Samples(text).tokens.cpu(), settings.eval_windows, held_out is not None)]
    else:
        loaded = load_texts(settings.text, "calibration", tokenizer, own)
        tokens = [tokenise(one, tokenizer, settings.bos, around=around) for one in loaded.texts]
        shares = list(loaded.shares)
        name = f"text {loaded.name!r}"
        about = loaded.about([len(one) for one in tokens]) | {"bos": tokens[0].bos is not None}
        most = shared_out(settings.eval_windows, shares)
        each_text = zip(loaded.texts, tokens, most, strict=True)
        how: dict[str, Any] = {"given": held_out is not None, "around": around}
        parts = [_windows(*one, settings, tokenizer, **how) for one in each_text]
        written = [bool(one.written) for one in loaded.texts]
        _check_read(loaded, [windows for windows, _ in parts])
    if held_out is None:
        kept = [held for _, held in parts]
        held_out = torch.cat(kept)[interleaved([len(one) for one in kept])]
    each = [windows for windows, _ in parts]
    _check_held_out(held_out, int(each[0].shape[1]))
    held_out = held_out[: settings.eval_windows].cpu()
    count = sum(map(len, each))
    if count < settings.batch:
        raise TextError(
            f"{name} gives {count} windows of {each[0].shape[1]} tokens to train on and a batch takes "
            f"{settings.batch}: give a longer text, or a smaller -o batch or --seqlen"
        )
    about |= {"windows": count, "seqlen": int(each[0].shape[1]), "held_out": len(held_out)}
    # Longer texts than the budget need not be cached or hashed whole.
    read = max(settings.batch, settings.steps * settings.batch)
    turns = -(-read // _TURN) if len(each) > 1 else 1
    most = [read] if len(each) == 1 else [turns * n for n in shared_out(_TURN, shares)]
    each = [_spread(windows, max(1, n)) for windows, n in zip(each, most, strict=True)]
    both = torch.cat([*each, held_out])
    about["tokens_sha256"] = hashlib.sha256(both.contiguous().numpy().tobytes()).hexdigest()
    order = ReadingOrder(list(map(len, each)), shares, settings.seed)
    return TrainingWindows(Samples(both), order, settings.batch, about, written)


def _spread(windows: Tensor, most: int) -> Tensor:
    """At most so many windows, from the whole of the text: its beginning may be of one kind."""
    count = len(windows)
    return windows if count <= most else windows[torch.arange(most) * count // most]


def _check_read(loaded: TextMixture, each: Sequence[Tensor]) -> None:
    """Refuse a text of which nothing would be read."""
    turns = shared_out(_TURN, loaded.shares)
    for text, share, windows, read in zip(loaded.texts, loaded.shares, each, turns, strict=True):
        if not read:
            raise TextError(
                f"text {text.name!r} has a share of {share:.2g}, too small to be read: give at least {1 / _TURN}"
            )
        if not len(windows) and len(each) > 1:
            raise TextError(
                f"text {text.name!r} gives one window of {windows.shape[1]} tokens, which is held out, and none to train on: "
                "give a longer text, or a smaller --seqlen"
            )


def read_given(settings: Recovery, given: Samples, held_out: Samples | None) -> TrainingWindows:
    """Samples that were given by the names of a model's inputs, for models that predict no token.

    Raises:
        TextError: there is less than one batch beside what is held out, or the two are of different inputs or shapes.
    """
    count = len(given)
    if held_out is None:
        kept = min(settings.eval_windows, max(1, round(count * _HELD_OUT)))
        given, held_out = given.first(count - kept), given.take(slice(count - kept, count))
    shapes = [{name: value.shape[1:] for name, value in one.inputs.items()} for one in (given, held_out)]
    if shapes[0] != shapes[1]:
        raise TextError(
            "held_out has other inputs than text, or in another shape: give the same names and as long samples"
        )
    if len(given) < settings.batch:
        raise TextError(
            f"{len(given)} samples are left to train on and a batch takes {settings.batch}: give more, or a smaller -o batch"
        )
    held_out = held_out.first(settings.eval_windows)
    both = Samples(
        {name: torch.cat([value.cpu(), held_out.inputs[name].cpu()]) for name, value in given.inputs.items()},
        seqlen=given.seqlen,
    )
    about = {
        "name": " + ".join(given.inputs),
        "windows": len(given),
        "seqlen": given.seqlen,
        "held_out": len(held_out),
        "tokens_sha256": tokens_identity(both),
        "counted": ["samples", "positions"],
    }
    return TrainingWindows(
        both, ReadingOrder([len(given)], [1.0], settings.seed), settings.batch, about, [False]
    )


def written_tokens(settings: Recovery, share: float) -> int:
    """How many tokens of text `self`, which is `share` of what is read, the dense model writes.

    Enough for a batch beside what is held out; read again, a text may have fewer tokens than were written.
    """
    longest = settings.minutes * READ_A_MINUTE if settings.minutes else math.inf
    held_out = max(1, math.ceil(_OWN_HELD_OUT * settings.batch))
    enough = math.ceil(1.1 * (settings.batch + held_out + 1)) * settings.seqlen
    return max(enough, math.ceil(share * min(settings.tokens, _MOST_WRITTEN, longest)))


def _parted(windows: Tensor, most: int, given: bool, share: float = _HELD_OUT) -> tuple[Tensor, Tensor]:
    """Windows to train on, and those at the end that are held out unless others were given."""
    count = 0 if given else min(most, max(1, round(len(windows) * share)))
    return windows[: len(windows) - count], windows[len(windows) - count :]


def _windows(
    text: Text,
    tokens: TokenisedText,
    most: int,
    settings: Recovery,
    tokenizer: Any,
    *,
    given: bool,
    around: bool,
) -> tuple[Tensor, Tensor]:
    try:
        windows = evaluation_windows(tokens, settings.seqlen)
    except TextError:
        needed = (settings.batch + 1) * tokens.of_text(settings.seqlen)
        raise TextError(
            f"{tokens.name} has {len(tokens):,} tokens; a batch of {settings.batch} × {settings.seqlen} and a window to measure "
            f"on need {needed:,}: give a longer text, or a smaller -o batch or --seqlen"
        ) from None
    if given or text.name not in NAMED_TEXTS:
        return _parted(windows, most, given, _OWN_HELD_OUT if text.written else _HELD_OUT)
    measured = tokenise(load_texts(text.name, "evaluation"), tokenizer, settings.bos, around=around)
    unseen = replace(measured, name=f"{tokens.name} held out", parts=())
    # Evaluations read it from its beginning, and must not have been chosen by.
    return windows, evaluation_windows(unseen, settings.seqlen)[-most:] if most else windows[:0]


def check_given(name: str, tokens: object) -> None:
    """Raise a TextError for tokens that are no windows, by the name they were given under."""
    if not isinstance(tokens, Tensor):
        raise TextError(f"{name} is a {type(tokens).__name__}; expected a torch tensor [windows, seqlen]")
    shape = list(tokens.shape)
    if tokens.dim() != 2 or 0 in shape or not holds_integers(tokens):
        raise TextError(
            f"{name} has shape {shape} {str(tokens.dtype).removeprefix('torch.')}; expected integer tokens [windows, seqlen]"
        )


def _check_held_out(held_out: Tensor, seqlen: int) -> None:
    shape = list(held_out.shape)
    if held_out.dim() != 2 or shape[0] == 0 or shape[1] != seqlen or held_out.is_floating_point():
        raise TextError(
            f"held_out has shape {shape} {str(held_out.dtype).removeprefix('torch.')}; expected integer tokens "
            f"[windows, {seqlen}], in windows as long as those that are trained on"
        )
