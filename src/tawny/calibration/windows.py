"""A text → tokens → calibration samples and evaluation windows.

What this file promises:

- A text is tokenised once, whole, so that a window's tokens do not depend on where the text was cut.
- Where the tokenizer puts BOS before a text, every window begins with it, as everything else does that the model was
  trained on and is used for: without it Gemma is another, far worse model. The papers' scripts leave it out of all
  windows but the first; `bos=False` does as they do.
- Calibration samples are seeded random windows, as in the papers; evaluation takes the first N windows, which do
  not overlap unless a stride says so, and drops the tail.
- Of several texts windows come from each by its share, exactly, and none reaches from one into another.
- Too little text is one `TextError` that says how much is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tawny.calibration.mixture import TextMixture, first_token
from tawny.calibration.text import Text
from tawny.errors import RecipeError, TextError

# Seeds of what is measured on begin here, far from those that runs calibrate and train with. torch's generator on a CPU reads
# 32 bits of a seed, so that 2**40 would be 0.
SEED_APART = 1 << 31


@dataclass(frozen=True)
class Part:
    """Where the tokens of one text of several lie, and the share of all windows that are taken from it."""

    name: str
    start: int
    stop: int
    share: float = 1.0

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class TokenisedText:
    """The tokens of a whole text, `[tokens]` int64, and the tokens that every window of them begins and ends with, if any.

    `name` is what messages call the text. `parts` lie one after the other where it is made of several.
    """

    ids: torch.Tensor
    bos: int | None = None
    name: str = "the text"
    parts: tuple[Part, ...] = ()
    end: int | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", (Part(self.name, 0, len(self)),))

    def __len__(self) -> int:
        return self.ids.numel()

    def of_text(self, seqlen: int) -> int:
        """How many tokens of a window of `seqlen` are the text's own."""
        return seqlen - (self.bos is not None) - (self.end is not None)

    def windows(self, starts: torch.Tensor, seqlen: int) -> torch.Tensor:
        """Windows of `seqlen` tokens, `[starts, seqlen]`, from these places of the text on."""
        return self.begun(self.ids[starts[:, None] + torch.arange(self.of_text(seqlen))])

    def begun(self, windows: torch.Tensor) -> torch.Tensor:
        """Pieces of the text, `[windows, of_text(seqlen)]`, as windows, `[windows, seqlen]`."""
        around = [
            [windows.new_full((len(windows), 1), x)] if x is not None else [] for x in (self.bos, self.end)
        ]
        parts = [*around[0], windows, *around[1]]
        return windows if len(parts) == 1 else torch.cat(parts, dim=1)


def tokenise(
    text: TextMixture | Text | str, tokenizer: Any, bos: bool | None = None, *, around: bool = False
) -> TokenisedText:
    """The whole text, tokenised once; of several each for itself.

    Args:
        around: windows begin and end with what the tokenizer puts around a text, such as [CLS] and [SEP]; encoders are
            never shown anything else.
        bos: whether its windows begin with BOS; without a word, where the tokenizer puts it before a text. Where they do
            not, the text has the tokenizer's special tokens, once.

    Raises:
        RecipeError: `bos` asks for what the tokenizer does not have.
    """
    if isinstance(text, TextMixture):
        whole = [tokenise(one, tokenizer, bos, around=around) for one in text.texts]
        if len(whole) == 1:
            return whole[0]
        ends = torch.tensor([len(one) for one in whole]).cumsum(0).tolist()
        each = zip(whole, ends, text.shares, strict=True)
        parts = tuple(Part(one.name, end - len(one), end, share) for one, end, share in each)
        return TokenisedText(
            torch.cat([one.ids for one in whole]), whole[0].bos, f"text {text.name!r}", parts, whole[0].end
        )
    words, name = (text.text, f"text {text.name!r}") if isinstance(text, Text) else (text, "the text")
    first, last = _around(tokenizer) if around else (first_token(tokenizer, bos), None)
    bare = {} if first is None and not around else {"add_special_tokens": False}
    # verbose=False: a corpus is longer than the model's context, and the warning about it means nothing here.
    encoded = tokenizer(words, return_attention_mask=False, verbose=False, **bare)
    return TokenisedText(torch.tensor(encoded["input_ids"], dtype=torch.int64), first, name, end=last)


def _around(tokenizer: Any) -> tuple[int | None, int | None]:
    """The first and the last token that a tokenizer adds to a text."""
    whole, bare = (tokenizer("a", verbose=False, add_special_tokens=x)["input_ids"] for x in (True, False))
    added = len(whole) - len(bare)
    before = next(i for i in range(added + 1) if whole[i : i + len(bare)] == bare)
    return (int(whole[0]) if before else None), (int(whole[-1]) if before < added else None)


def shared_out(count: int, shares: Sequence[float]) -> list[int]:
    """`count` in whole numbers by shares; what rounding leaves goes to the largest remainders."""
    exact = [count * share / sum(shares) for share in shares]
    counts = [math.floor(x + 1e-9) for x in exact]
    for index in sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])[: count - sum(counts)]:
        counts[index] += 1
    return counts


def interleaved(counts: Sequence[int]) -> list[int]:
    """An order of things that lie one kind after the other, in which any stretch holds about the same mixture."""
    places = [((i + 0.5) / count, kind, i) for kind, count in enumerate(counts) for i in range(count)]
    first = [sum(counts[:kind]) for kind in range(len(counts))]
    return [first[kind] + i for _, kind, i in sorted(places)]


def texts_of(text: TokenisedText, count: int) -> list[int]:
    """The number of the text that each of `count` windows is of, in the order of `evaluation_windows`."""
    counts = _counts(text, count)
    owners = [number for number, some in enumerate(counts) for _ in range(some)]
    return [owners[row] for row in interleaved(counts)]


def sample_windows(text: TokenisedText, samples: int, seqlen: int, seed: int) -> torch.Tensor:
    """`samples` random windows of `seqlen` tokens, `[samples, seqlen]`; the same for the same seed.

    Raises:
        TextError: the text, or one of several, has fewer places to start than there are samples of it.
    """
    length = text.of_text(seqlen)
    for part, count in zip(text.parts, _counts(text, samples), strict=True):
        if not count:
            raise TextError(
                f"{part.name} gets none of {samples} samples by its share of {part.share:.2g}: give more samples, "
                "it a larger share, or leave it out"
            )
        if len(part) - length + 1 < count:  # windows would repeat
            needed = length + count - 1
            raise TextError(
                f"{part.name} has {len(part):,} tokens, but {count} samples of {seqlen} need at least {needed:,} "
                f"({needed - len(part):,} short): give a longer text{_or_less(text)}, or fewer or shorter samples (--samples, --seqlen, or calibration in a recipe)"
            )
    return text.windows(_starts(text, samples, seqlen, seed), seqlen)


def _or_less(text: TokenisedText) -> str:
    return ", or it a smaller share" if len(text.parts) > 1 else ""


def _counts(text: TokenisedText, count: int) -> list[int]:
    return shared_out(count, [part.share for part in text.parts])


def _starts(text: TokenisedText, samples: int, seqlen: int, seed: int) -> torch.Tensor:
    generator, length = torch.Generator().manual_seed(seed), text.of_text(seqlen)
    counts = _counts(text, samples)
    starts = [
        part.start + torch.randint(len(part) - length + 1, (count,), generator=generator)
        for part, count in zip(text.parts, counts, strict=True)
        if count
    ]
    return torch.cat(starts)[interleaved(counts)]


def held_out_windows(
    text: TokenisedText, samples: int, seqlen: int, seed: int, length: int, count: int
) -> torch.Tensor:
    """At most `count` windows of `length` tokens that overlap none of `sample_windows(text, samples, seqlen, seed)`.

    They come in random order, so that the first few are from all of the text, too.

    Raises:
        TextError: the samples leave fewer than two.
    """
    of_sample, of_window = text.of_text(seqlen), text.of_text(length)
    first = _starts(text, samples, seqlen, seed)
    taken = sorted((start, start + of_sample) for start in set(first.tolist()))
    generator = torch.Generator().manual_seed(seed + 1)
    kept: list[torch.Tensor] = []
    for part, most in zip(text.parts, _counts(text, count), strict=True):
        inside = [(start, stop) for start, stop in taken if part.start <= start < part.stop]
        free: list[int] = []
        end = part.start
        for start, stop in [*inside, (part.stop, part.stop)]:
            free += range(end, start - of_window + 1, of_window)
            end = max(end, stop)
        if len(free) < (2 if len(text.parts) == 1 else min(most, 1)):
            raise TextError(
                f"{samples} samples of {seqlen} tokens leave no {2 * of_window} of {len(part):,} tokens of {part.name} to compare models on: "
                "give a longer text, or fewer or shorter samples (--samples, --seqlen, or calibration in a recipe)"
            )
        # With a dtype, since an empty list would be floats, and they would turn the places of all texts into floats.
        kept.append(
            torch.tensor(free, dtype=torch.int64)[torch.randperm(len(free), generator=generator)[:most]]
        )
    return text.windows(torch.cat(kept)[interleaved([len(one) for one in kept])], length)


def check_windows(seqlen: int, windows: int | None = None) -> None:
    """Refuse less than one window, and windows of less than two tokens, with a `RecipeError`."""
    if seqlen < 2:
        raise RecipeError(
            f"seqlen {seqlen} is not possible: a window's first token is not predicted; give 2 or more"
        )
    if windows is not None and windows < 1:
        raise RecipeError(f"windows {windows} is not possible; give 1 or more")


def evaluation_windows(
    text: TokenisedText, seqlen: int, windows: int | None = None, stride: int | None = None
) -> torch.Tensor:
    """The first `windows` (default: all) windows, `[windows, seqlen]`, each `stride` tokens of the text after the one before.

    Without a stride they do not overlap. A stride that is longer than what a window holds of the text counts as that:
    none of the text is left out.

    Raises:
        TextError: the tokens do not hold one window, or not as many as asked for.
        RecipeError: numbers that `check_windows` refuses.
    """
    check_windows(seqlen, windows)
    length = text.of_text(seqlen)
    step = length if stride is None else min(stride, length)
    available = [max(0, (len(part) - length) // step + 1) for part in text.parts]
    wanted = windows
    if wanted is None:  # all, or as many as the scarcest text has the share of
        wanted = max(
            1, min(math.floor(n / part.share + 1e-9) for n, part in zip(available, text.parts, strict=True))
        )
    counts = _counts(text, wanted)
    for part, share, there in zip(text.parts, counts, available, strict=True):
        count = max(share, 1)  # a text of several that holds no window is not left out without a word
        if there < count:
            needed = (count - 1) * step + length
            raise TextError(
                f"{part.name} has {len(part):,} tokens, but {count} window{'s' * (count > 1)} of {seqlen} "
                f"need {needed:,} ({needed - len(part):,} short): give a longer text{_or_less(text)}, or a smaller --windows "
                f"or --seqlen"
            )
        if not share:
            raise TextError(
                f"{part.name} gets none of {wanted} window{'s' * (wanted > 1)} by its share of {part.share:.2g}: give a larger "
                "--windows, it a larger share, or leave it out"
            )
    first = [
        text.ids[part.start : part.stop].unfold(0, length, step)[:count]
        for part, count in zip(text.parts, counts, strict=True)
        if count
    ]
    whole = first[0] if len(first) == 1 else torch.cat(first)[interleaved(counts)]
    return text.begun(whole)
