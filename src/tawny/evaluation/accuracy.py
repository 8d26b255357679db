"""How often a classifier of pictures is right: top-1 on pictures whose class is known, alone or beside its dense model.

Pictures are prepared by the model's own image processor alone (a resize, a centre crop, whatever it does), and shown in the
order of their names. They are read and walked block by block in parts, so that memory does not grow with their number.
± is sd over pictures / √pictures. That of a difference is of each picture's own, since both models see the same ones.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.calibration.inputs import processor_for, skipped
from tawny.calibration.mixture import Texts, in_words
from tawny.calibration.pictures import BrokenPicture, pixels_of, whole
from tawny.errors import ModelError, RecipeError, TextError
from tawny.evaluation.hidden_states import stream_through
from tawny.evaluation.labels import Labelled, read_labels
from tawny.evaluation.sources import name_of, open_stack_of
from tawny.machine import peak_memory
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.model.structure import PIXELS, evaluating, input_of
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent

PART = 128  # pictures in memory at once


@dataclass(frozen=True)
class Accuracy:
    """Shares of the pictures whose likeliest class is the labelled one.

    Attributes:
        dense, difference: accuracy of the dense model, and how much more the model has; None without one.
        skipped: pictures that cannot be read, and why.
        unlabelled: pictures in the folder that have no label and were left out.
        sha256: of the pixels and the labels.
    """

    accuracy: float
    stderr: float
    dense: float | None
    difference: float | None
    samples: int
    classes: int
    data: str
    labels: str
    sha256: str
    against: str | None
    compute: str
    seconds: float
    peak_memory: int
    dense_stderr: float = 0.0
    difference_stderr: float = 0.0
    unlabelled: int = 0
    skipped: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
@opens_models
def accuracy(
    source: str | Path | nn.Module,
    data: Texts,
    labels: str | Path,
    *,
    dense: str | Path | nn.Module | None = None,
    samples: int | None = None,
    strict: bool = False,
    tokenizer: Any = None,
    compute: str = "auto",
    device: str = "cpu",
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Accuracy:
    """Top-1 accuracy of a classifier of pictures.

    Args:
        data: `images:DIR`.
        labels: `folder` (DIR/CLASS/picture), or a FILE.csv of names relative to DIR and classes. A class is a name in the
            model's `id2label`, or its number.
        dense: a model to show the same pictures.
        samples: pictures from the start of the folder; all if None.
        strict: refuse the first picture that cannot be read, instead of skipping it.
        tokenizer: the image processor of a live module.
        compute: dtype of forwards: auto, float32, bfloat16 or float16.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError: a model has no classes, takes no pictures, or has other classes than the dense one.
        TextError: labels that fit no picture or no class, or no picture that can be read.
    """
    start = time.perf_counter()
    if samples is not None and samples < 1:
        raise RecipeError(f"{samples} pictures were asked for; expected 1 or more")
    models = (source,) if dense is None else (source, dense)
    opened = [open_stack_of(model, compute, device, progress.say) for model in models]
    stacks, folder = [stack for stack, _ in opened], opened[0][1]
    names = _classes_of_all(stacks)
    processor = processor_for(stacks[0], folder, data, tokenizer)
    known = read_labels(labels, data, names)
    if known.unlabelled:
        progress.say(f"{known.unlabelled:,} pictures have no label and are left out")
    if samples is not None:
        known = Labelled(known.files[:samples], known.classes[:samples], known.unlabelled)
    shown = _Shown(known, processor, strict)
    right: list[list[Tensor]] = [[] for _ in stacks]
    progress.phase("showing pictures", -(-len(known.files) // PART), f"parts of {PART}")
    for pixels, truth in shown.parts():
        for kept, stack in zip(right, stacks, strict=True):
            with evaluating(stack.model):
                kept.append(_likeliest(stack, pixels, len(names)).eq(truth))
        progress.step(f"{shown.count} pictures")
    if shown.broken:
        progress.say(skipped(shown.broken))
    return Accuracy(
        **_shares([torch.cat(kept).double() for kept in right]),
        samples=shown.count,
        classes=len(names),
        data=in_words(data),
        labels=str(labels),
        sha256=shown.digest.hexdigest(),
        against=None if dense is None else name_of(dense),
        compute=str(stacks[0].compute).removeprefix("torch."),
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(),
        unlabelled=known.unlabelled,
        skipped=shown.broken,
    )


def _shares(hits: list[Tensor]) -> dict[str, Any]:
    """Means over pictures, `[pictures]` float64 each, and their standard errors: of a model, and of its dense one."""
    (mine, error), (theirs, their_error) = _mean(hits[0]), _mean(hits[-1])
    shares: dict[str, Any] = {"accuracy": mine, "stderr": error, "dense": None, "difference": None}
    if len(hits) > 1:
        apart, apart_error = _mean(hits[0] - hits[1])
        shares |= {"dense": theirs, "dense_stderr": their_error}
        shares |= {"difference": apart, "difference_stderr": apart_error}
    return shares


def _classes_of_all(stacks: Sequence[Stack]) -> Mapping[int, str]:
    """The classes of one model, or of two that have the same.

    Raises:
        ModelError: one takes no pictures or has no classes, or they differ.
    """
    for stack in stacks:
        if (taken := input_of(stack.model)) != PIXELS:
            raise ModelError(
                f"labels are of pictures, and {type(stack.model).__name__} takes {taken}: leave them out"
            )
    first, last = _classes(stacks[0]), _classes(stacks[-1])
    if first != last:
        raise ModelError(
            f"the dense model has {len(last)} classes and the other {len(first)}, or others: give the model it was made from"
        )
    return first


def _classes(stack: Stack) -> Mapping[int, str]:
    """The names of a classifier's classes.

    Raises:
        ModelError: the model has no head, or says of no classes.
    """
    names: dict[int, str] = getattr(stack.config, "id2label", None) or {}
    if stack.model.base_model is stack.model or not names:
        raise ModelError(
            f"{type(stack.model).__name__} has no classes, so labels do not apply to it: leave them out, or give a classifier"
        )
    return {int(number): str(name) for number, name in names.items()}


class _Shown:
    """Pictures with their labels, a part at a time; counts those that could be read, and names the others."""

    def __init__(self, known: Labelled, processor: Any, strict: bool) -> None:
        self.known, self.processor, self.strict = known, processor, strict
        self.count = 0
        self.broken: list[str] = []
        self.digest = hashlib.sha256()

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels `[pictures, channels, height, width]` float32 and classes `[pictures]` int64."""
        files, classes = self.known.files, self.known.classes
        for start in range(0, len(files), PART):
            rows: list[tuple[Tensor, int]] = []
            for path, number in zip(files[start : start + PART], classes[start : start + PART], strict=True):
                try:
                    rows.append((pixels_of(whole(path), self.processor), number))
                except BrokenPicture as error:
                    if self.strict:
                        raise
                    self.broken.append(f"{path}: {error.why}")
            if not rows:
                continue
            _check_alike([row for row, _ in rows])
            pixels, truth = (
                torch.stack([row for row, _ in rows]),
                torch.tensor([number for _, number in rows]),
            )
            self.count += len(rows)
            for part in (pixels, truth):
                self.digest.update(part.contiguous().numpy().tobytes())
            yield pixels, truth
        if not self.count:
            raise TextError(f"no picture with a label can be read, first {self.broken[0]}")


def _check_alike(pixels: list[Tensor]) -> None:
    odd = next((x for x in pixels if x.shape != pixels[0].shape), None)
    if odd is not None:
        raise TextError(
            f"the model's image processor makes pictures of several sizes, {list(pixels[0].shape)} and {list(odd.shape)}: "
            "set do_center_crop in its preprocessor_config.json"
        )


def _likeliest(stack: Stack, pixels: Tensor, classes: int) -> Tensor:
    """The class `[pictures]` with the largest logit."""
    samples = Samples({PIXELS: pixels}, seqlen=stack.positions({PIXELS: pixels}))
    stream = stream_through(stack, samples, silent, "")
    likeliest = []
    for part, hidden in zip(stream.slices, stream.hidden, strict=True):
        logits = stack.output({PIXELS: pixels[part]}, hidden).get("logits")
        if logits is None or logits.shape != (len(hidden), classes):
            raise ModelError(
                f"{type(stack.model).__name__} gives no logits of its {classes} classes for a picture: give a classifier"
            )
        likeliest.append(logits.float().argmax(-1).cpu())
    return torch.cat(likeliest)


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    spread = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), spread
