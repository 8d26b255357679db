"""Which token comes next: the likeliest, or one that is drawn from the likeliest.

The same settings and seed draw the same tokens from the same logits. Probabilities are taken in float64. In this order:
what is added to logits or forbidden, the temperature, then `top_k`, `top_p` and `min_p`, each of what the one before has
left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tawny.errors import NumericalError, RecipeError

_LIKELIEST = 512  # tokens that nearly always reach top_p


class Constraint(Protocol):
    """What a text may be, such as JSON of a schema."""

    @property
    def over(self) -> bool:
        """Whether nothing may come any more but the end."""

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool `[vocabulary]`; at least one may."""

    def take(self, token: int) -> None:
        """This token has been taken."""


class Sampler:
    """The choice of one sequence's tokens.

    Args:
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draw only from the likeliest tokens whose probabilities reach this sum.
        seed: chooses the draws.
        top_k: draw only from so many of the likeliest tokens; 0 for all.
        min_p: draw only tokens that are at least this share as likely as the likeliest.
        presence_penalty: taken from the logit of each token that the text has made.
        frequency_penalty: the same, for each time it was made.
        repetition_penalty: divides positive logits of the tokens in prompt and text, multiplies negative ones
            (Keskar et al. 2019, CTRL, section 4.1).
        logit_bias: added to the logits of these tokens.
        constraint: forbids tokens.
        prompt: tokens `[tokens]` that `repetition_penalty` counts as well.

    Raises:
        RecipeError: a number outside its range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        constraint: Constraint | None = None,
        prompt: Tensor | None = None,
    ) -> None:
        for name, value, possible, expected in (
            ("temperature", temperature, math.isfinite(temperature) and temperature >= 0, "0 or more"),
            ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1"),
            ("top_k", top_k, top_k >= 0, "0 or more"),
            ("min_p", min_p, 0 <= min_p <= 1, "0 to 1"),
            ("presence_penalty", presence_penalty, math.isfinite(presence_penalty), "a finite number"),
            ("frequency_penalty", frequency_penalty, math.isfinite(frequency_penalty), "a finite number"),
            ("repetition_penalty", repetition_penalty, 0.01 <= repetition_penalty < math.inf, "0.01 or more"),
        ):
            if not possible:
                raise RecipeError(f"{name} {value} is not possible; give {expected}")
        self.temperature, self.top_p, self.top_k, self.min_p = temperature, top_p, top_k, min_p
        self.presence_penalty, self.frequency_penalty = presence_penalty, frequency_penalty
        self.repetition_penalty, self.constraint = repetition_penalty, constraint
        self._biased = torch.tensor(sorted(logit_bias or {}), dtype=torch.long)
        self._biases = torch.tensor([v for _, v in sorted((logit_bias or {}).items())], dtype=torch.float64)
        if not self._biases.isfinite().all():
            raise RecipeError("logit_bias holds a number that is not finite; give finite ones")
        self._made: dict[int, int] = {}
        self._repeated = set() if prompt is None else set(prompt.tolist())
        self._changes = bool(presence_penalty or frequency_penalty or len(self._biased))
        self._changes |= repetition_penalty != 1 or constraint is not None
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """The token after these logits `[vocabulary]`, which counts as made.

        Raises:
            NumericalError: the logits hold NaN or infinity.
        """
        highest = float(logits.max())
        if not math.isfinite(highest):
            raise NumericalError(
                f"the model's logits hold {highest}; check its weights, or open it in another dtype"
            )
        if self._changes:
            logits = self._changed(logits)
            highest = float(logits.max())
        token = int(logits.argmax()) if self.temperature == 0 else self._drawn(logits, highest)
        if self._changes:
            self._made[token] = self._made.get(token, 0) + 1
            self._repeated.add(token)
            if self.constraint is not None:
                self.constraint.take(token)
        return token

    @property
    def over(self) -> bool:
        """Whether the constraint allows nothing more."""
        return self.constraint is not None and self.constraint.over

    def _changed(self, logits: Tensor) -> Tensor:
        """Logits in float64 after penalties and biases, -infinity where a token is forbidden."""
        logits = logits.to("cpu", torch.float64, copy=True)
        if self.repetition_penalty != 1 and self._repeated:
            at = torch.tensor(sorted(self._repeated))
            held = logits[at]
            logits[at] = torch.where(held > 0, held / self.repetition_penalty, held * self.repetition_penalty)
        if self._made and (self.presence_penalty or self.frequency_penalty):
            counts = torch.tensor(list(self._made.values()), dtype=torch.float64)
            logits[torch.tensor(list(self._made))] -= self.presence_penalty + self.frequency_penalty * counts
        if len(self._biased):
            logits[self._biased] += self._biases
        if self.constraint is not None:
            logits[~self.constraint.allowed()] = -math.inf
        return logits

    def _drawn(self, logits: Tensor, highest: float) -> int:
        # Below zero, so that a tiny temperature sends all but the likeliest to -infinity.
        below = logits.double().cpu() - highest
        shares = torch.softmax(below / self.temperature, -1)
        if self.top_p == 1 and not self.top_k and not self.min_p:
            return int(torch.multinomial(shares, 1, generator=self.generator))
        sorted_, order = self._nucleus(shares) or self._cut(*shares.sort(descending=True))
        return int(order[torch.multinomial(sorted_, 1, generator=self.generator)])

    def _cut(self, sorted_: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Falling shares with 0 for tokens that must not be drawn, and the tokens they belong to."""
        if self.top_k:
            sorted_[self.top_k :] = 0
            sorted_ /= sorted_.sum()
        if self.top_p < 1:
            # The token that crosses the sum still counts, so that at least one is left.
            sorted_[sorted_.cumsum(0) - sorted_ >= self.top_p] = 0
        sorted_[sorted_ < self.min_p * sorted_[0]] = 0
        return sorted_, order

    def _nucleus(self, shares: Tensor) -> tuple[Tensor, Tensor] | None:
        """The same without sorting a whole vocabulary, which takes longer than a small model's step.

        None where the likeliest few are not enough, or where equal shares would leave their order open.
        """
        if len(shares) <= _LIKELIEST or self.top_k > _LIKELIEST:
            return None
        best, order = shares.topk(_LIKELIEST)
        cut, _ = self._cut(best.clone(), order)
        count = int(cut.count_nonzero())
        if count == _LIKELIEST or bool((best[:count] == best[1 : count + 1]).any()):
            return None
        # As long as the vocabulary, because a draw takes a random number for each share.
        whole = shares.new_zeros(len(shares))
        whole[:_LIKELIEST] = cut
        return whole, order


@dataclass(frozen=True)
class Likelihood:
    """How likely the model itself found a token, before any sampling setting.

    logprob: its natural logarithm. top: the likeliest tokens and theirs, from the likeliest down.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def likelihood(logits: Tensor, token: int, count: int) -> Likelihood:
    """Of a token after logits `[vocabulary]`, with `count` of the likeliest."""
    logs = torch.log_softmax(logits.float(), -1)
    best = logs.topk(min(count, len(logs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Likelihood(float(logs[token]), top)
