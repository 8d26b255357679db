"""A text → tokens → calibration samples and evaluation windows.

What this file promises:

- A text is tokenised once, whole, so that a window's tokens do not depend on where the text was cut.
- Where the tokenizer puts BOS before a text, every window begins with it, as everything else does that the model was
  trained on and is used for: without it Gemma is another, far worse model. The papers' scripts leave it out of all
  windows but the first; `bos=False` does as they do.
- Calibration samples are seeded random windows, as in the papers; evaluation takes the first N windows, which do
  not overlap unless a stride says so, and drops the tail.
- Too little text is one `TextError` that says how much is missing.
"""

from __future__ import annotations

__all__ = [
    "TokenisedText",
    "check_windows",
    "evaluation_windows",
    "held_out_windows",
    "sample_windows",
    "tokenise",
]

from dataclasses import dataclass
from typing import Any

import torch

from tawny.calibration.text import Text
from tawny.errors import RecipeError, TextError


@dataclass(frozen=True)
class TokenisedText:
    """The tokens of a whole text, `[tokens]` int64, and the token that every window of them begins with, if any.

    `name` is what messages call the text.
    """

    ids: torch.Tensor
    bos: int | None = None
    name: str = "the text"

    def __len__(self) -> int:
        return self.ids.numel()

    def of_text(self, seqlen: int) -> int:
        """How many tokens of a window of `seqlen` are the text's own."""
        return seqlen - (self.bos is not None)

    def windows(self, starts: torch.Tensor, seqlen: int) -> torch.Tensor:
        """Windows of `seqlen` tokens, `[starts, seqlen]`, from these places of the text on."""
        return self.begun(self.ids[starts[:, None] + torch.arange(self.of_text(seqlen))])

    def begun(self, windows: torch.Tensor) -> torch.Tensor:
        """Pieces of the text, `[windows, of_text(seqlen)]`, as windows, `[windows, seqlen]`."""
        if self.bos is None:
            return windows
        return torch.cat([windows.new_full((len(windows), 1), self.bos), windows], dim=1)


def tokenise(text: Text | str, tokenizer: Any, bos: bool | None = None) -> TokenisedText:
    """The whole text, tokenised once.

    Args:
        bos: whether its windows begin with BOS; without a word, where the tokenizer puts it before a text. Where they do
            not, the text has the tokenizer's special tokens, once.

    Raises:
        RecipeError: `bos` asks for what the tokenizer does not have.
    """
    whole, name = (text.text, f"text {text.name!r}") if isinstance(text, Text) else (text, "the text")
    first = _first_token(tokenizer, bos)
    bare = {} if first is None else {"add_special_tokens": False}
    # verbose=False: a corpus is longer than the model's context, and the warning about it means nothing here.
    encoded = tokenizer(whole, return_attention_mask=False, verbose=False, **bare)
    return TokenisedText(torch.tensor(encoded["input_ids"], dtype=torch.int64), first, name)


def _first_token(tokenizer: Any, bos: bool | None) -> int | None:
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos and token is None:
        raise RecipeError("bos: true given, but this tokenizer has no BOS: leave it out")
    if token is None or bos is False:
        return None
    if bos is None and tokenizer("a", return_attention_mask=False, verbose=False)["input_ids"][:1] != [token]:
        return None
    return int(token)


def sample_windows(text: TokenisedText, samples: int, seqlen: int, seed: int) -> torch.Tensor:
    """`samples` random windows of `seqlen` tokens, `[samples, seqlen]`; the same for the same seed.

    Raises:
        TextError: the text has fewer places to start than there are samples.
    """
    length = text.of_text(seqlen)
    if len(text) - length + 1 < samples:  # windows would repeat
        needed = length + samples - 1
        raise TextError(
            f"{text.name} has {len(text):,} tokens, but {samples} samples of {seqlen} need at least {needed:,} "
            f"({needed - len(text):,} short): give a longer text, or fewer or shorter samples (--samples, --seqlen, or calibration in a recipe)"
        )
    return text.windows(_starts(text, samples, seqlen, seed), seqlen)


def _starts(text: TokenisedText, samples: int, seqlen: int, seed: int) -> torch.Tensor:
    places = len(text) - text.of_text(seqlen) + 1
    return torch.randint(places, (samples,), generator=torch.Generator().manual_seed(seed))


def held_out_windows(
    text: TokenisedText, samples: int, seqlen: int, seed: int, length: int, count: int
) -> torch.Tensor:
    """At most `count` windows of `length` tokens that overlap none of `sample_windows(text, samples, seqlen, seed)`.

    They come in an order of chance, so that the first few are from all of the text, too.

    Raises:
        TextError: the samples leave fewer than two.
    """
    of_sample, of_window = text.of_text(seqlen), text.of_text(length)
    first = _starts(text, samples, seqlen, seed)
    taken = sorted((start, start + of_sample) for start in set(first.tolist()))
    free: list[int] = []
    end = 0
    for start, stop in [*taken, (len(text), len(text))]:
        free += range(end, start - of_window + 1, of_window)
        end = max(end, stop)
    if len(free) < 2:
        raise TextError(
            f"{samples} samples of {seqlen} tokens leave no {2 * of_window} of {len(text):,} tokens to compare models on: "
            "give a longer text, or fewer or shorter samples (--samples, --seqlen, or calibration in a recipe)"
        )
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed + 1))[:count]
    return text.windows(torch.tensor(free)[order], length)


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
    available = (len(text) - length) // step + 1 if len(text) >= length else 0
    wanted = max(available, 1) if windows is None else windows
    if available < wanted:
        needed = (wanted - 1) * step + length
        raise TextError(
            f"{text.name} has {len(text):,} tokens, but {wanted} window{'s' * (wanted > 1)} of {seqlen} "
            f"need {needed:,} ({needed - len(text):,} short): give a longer text, or a smaller --windows "
            f"or --seqlen"
        )
    return text.begun(text.ids.unfold(0, length, step)[:wanted])
