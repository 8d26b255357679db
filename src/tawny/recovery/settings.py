"""Everything that decides what a recovery gives: one frozen, validated value.

    Recovery.make(text="wiki", tokens="2M", lr=2e-4)

Like a recipe it refuses an unknown key with its nearest neighbour and spells out its defaults in what it writes down.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from tawny.calibration.mixture import OWN, parse_texts
from tawny.checked import checked
from tawny.errors import RecipeError
from tawny.kinds import GPU_KINDS, scaled_kinds, trained_kind
from tawny.recipe.schema import TextNames
from tawny.recovery.methods import METHODS, Method

# Inputs of a linear up to which survivors bear that rate. Steps of AdamW move all weights alike, so that an output moves by the
# rate times the width (2203.03466), and weights of wide linears are smaller: at 1,536 a third of it did harm
# (docs/log/learning-rate.md).
_WIDTH = 576
# What a small model reads in a minute of training on two cores.
READ_A_MINUTE = 4_096
_WINDOWS, _FEW_STEPS = 4, 100  # of a step, unless a run is so short
# Survivors of models that see: at 3e-5 a ViT-S lost in its first step more than pruning took (docs/encoders.md).
SEEING_RATE = 3e-6


def _count(value: Any) -> Any:
    """`2M`, `500k`, `1.5e6` → an integer."""
    text = str(value).strip().replace("_", "").replace(",", "").lower()
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:], 1)
    try:
        return round(float(text[:-1] if scale > 1 else text) * scale)
    except (ValueError, OverflowError):
        return value


Count = Annotated[int, BeforeValidator(_count)]
# Infinity and NaN are not JSON, and no setting either.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Trained = Annotated[
    str, Field(pattern=f"^({'|'.join(METHODS)})$", description=" or ".join(map(repr, METHODS)))
]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recovery:
    """How a pruned model is trained. `Recovery.make` makes one and says what is wrong in one line.

    Attributes:
        train: all `survivors` with norms and biases, `norms` (and biases) alone, or `lora` factors, masked as the weights are (methods.py).
        text: what is read, one text or several in shares; a named text has a part of its own to be measured on, any other
            gives its end for that. Of pictures some files are held out.
        strict: refuse the first picture that cannot be read, instead of skipping it.
        bos: begin each window with BOS, or none but the first; as the tokenizer begins a text if None.
        tokens: read in all, again and again if the text is shorter; of pictures and sound, positions.
        minutes: ends the run and its schedule earlier, evaluations and the teacher's forwards included.
        seqlen, batch, micro_batch: tokens a window, windows an optimiser step, windows a forward. What is not made of tokens
            is as long as its model makes it. `make` takes one window a step for a run of less than a hundred steps of four.
        lr: the highest; the default depends on `train`, and is lower for wide models and for those that see.
        warmup: share of the run in which it rises, or eight steps if they are more; 0 begins with the highest.
        kl: weight of KL(teacher‖student) in the loss, the rest is next-token loss; 0 needs no teacher. In text `self`, whose
            tokens the teacher drew, it is 1: their loss has the same mean slope, and noise.
        weight_decay: of surviving weights, not of norms, biases or scales.
        clip: largest norm of the gradient.
        eval_every, eval_windows: steps between measurements on held-out windows, and how many.
        patience: stop after so many measurements without a better one; 0 never.
        checkpointing: run each block's forward again in the backward instead of keeping its activations.
        values: train through the rounding of this packed format, so that packing afterwards costs nothing. None is what the
            model was solved for or packed in, if it has few bits.
        group_size: columns that share a scale of few bits; None is the kind's usual number.
        rank: of LoRA factors.
        control: allow a model without zeros, to compare with.
        chunk: tokens whose logits exist at once; None is about 50 MB of them, and at least 256.
    """

    train: Trained = "survivors"
    text: TextNames = "c4"
    bos: bool | None = None
    strict: bool = False
    tokens: Annotated[Count, Field(ge=1)] = 2_000_000
    minutes: Positive | None = None
    seqlen: Annotated[int, Field(ge=2)] = 512
    batch: Annotated[int, Field(ge=1)] = _WINDOWS
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    lr: Positive | None = None
    warmup: Share = 0.05
    kl: Share = 0.5
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clip: Positive = 1.0
    eval_every: Annotated[int, Field(ge=1)] = 50
    eval_windows: Annotated[int, Field(ge=1)] = 16
    patience: Annotated[int, Field(ge=0)] = 0
    checkpointing: bool = False
    values: str | None = None
    group_size: int | None = None
    rank: Annotated[int, Field(ge=1)] = 16
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    control: bool = False
    chunk: Annotated[int, Field(ge=1)] | None = None
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Annotated[str, Field(pattern=r"^[a-z]+(:\d+)?$")] = "cpu"

    @classmethod
    def make(cls, base: Recovery | Mapping[str, Any] | None = None, /, **keys: Any) -> Recovery:
        """The only door; a key that is None is unset.

        Raises:
            RecipeError: an unknown key or a value out of range.
        """
        values = dict(base) if isinstance(base, Mapping) else {} if base is None else dataclasses.asdict(base)
        values.update({key: value for key, value in keys.items() if value is not None})
        settings = checked(cls, values, "recovery key")
        if "batch" not in values:
            settings = dataclasses.replace(settings, batch=settings._usual_batch)
        if settings.values is not None and settings.values not in (
            names := [kind.name for kind in (*scaled_kinds(), *GPU_KINDS.values())]
        ):
            raise RecipeError(f"values: {settings.values!r} given, expected {' or '.join(map(repr, names))}")
        if settings.group_size is not None and (
            settings.values is None or not trained_kind(settings.values).learns
        ):
            raise RecipeError(
                f"group_size={settings.group_size} belongs to values of few bits, such as int4, and {settings.values} was given"
            )
        if settings.values is not None:
            trained_kind(settings.values, settings.group_size)
        method = settings.method
        trained = " or ".join(name for name, one in METHODS.items() if one.weights == "trained")
        if settings.values and method.weights != "trained":
            raise RecipeError(
                f"values={settings.values} rounds surviving weights; it goes with train={trained}"
            )
        if settings.kl == 0 and any(source.spec == OWN for source in parse_texts(settings.text)):
            raise RecipeError(
                "kl=0 opens no dense model, and text 'self' is written by it: give another text, or kl of more than 0"
            )
        if settings.weight_decay and method.weights != "trained":
            raise RecipeError(
                f"weight_decay={settings.weight_decay:g} is of surviving weights, and train={settings.train} trains none of them: leave it "
                f"out, or give train={trained}"
            )
        if (settings.micro_batch or 1) > settings.batch:
            raise RecipeError(f"micro_batch={settings.micro_batch} is more than batch={settings.batch}")
        return settings

    @property
    def method(self) -> Method:
        """What is trained, and how."""
        return METHODS[self.train]

    @property
    def _usual_batch(self) -> int:
        """One window where a few make fewer than a hundred steps: a short run of text gains more from steps than from even ones."""
        if any(source.is_pictures for source in parse_texts(self.text)):
            return _WINDOWS
        tokens = min(self.tokens, READ_A_MINUTE * self.minutes if self.minutes else math.inf)
        few = tokens < _FEW_STEPS * _WINDOWS * self.seqlen
        return (self.micro_batch or 1) if few else _WINDOWS

    def rate_for(self, width: int) -> float | None:
        """The highest rate for a model whose first linear has so many inputs; None is the default as it is."""
        if self.lr is not None or self.method.weights != "trained" or width <= _WIDTH:
            return self.lr
        return float(f"{self.method.rate * (_WIDTH / width) ** 2:.2g}")

    @property
    def learning_rate(self) -> float:
        return self.method.rate if self.lr is None else self.lr

    @property
    def steps(self) -> int:
        """Optimiser steps that read all `tokens`."""
        return max(1, -(-self.tokens // (self.batch * self.seqlen)))

    def to_mapping(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"lr": self.learning_rate}
