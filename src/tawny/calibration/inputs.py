"""Samples of what a model takes in the place of tokens: the loader of its batches.

model/structure.py says what a model takes, and this is the one place that reads calibration from files. After it there are
samples. A new kind of input needs a loader as pictures.py is, its prefix in mixture.py, its processor in model/source.py and
its random stand-in in model/structure.py; encoders train on it by recovery/crops.py. It also needs a case here, its reader
in pruning/session.py, a default in evaluation/features.py, and cases in recovery/dense.py and recovery/settings.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tawny.calibration.mixture import Texts, check_texts, in_words, parse_texts
from tawny.calibration.pictures import read_pictures
from tawny.errors import ModelError
from tawny.model.source import load_processor
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.model.structure import PIXELS, input_of


def read_inputs(
    stack: Stack,
    folder: Path | None,
    given: Texts,
    samples: int,
    seed: int,
    processor: Any = None,
    say: Callable[[str], None] = lambda _: None,
    *,
    strict: bool = False,
) -> tuple[Samples, dict[str, Any]]:
    """Samples for a model that takes no tokens, and what a record says of them.

    Args:
        processor: the model's own, where it has no folder.
        strict: refuse the first picture that cannot be read.

    Raises:
        ModelError: the model takes something that no file is read as, or a live one comes without its processor.
        TextError: no picture is named, or none can be read.
    """
    name = input_of(stack.model)
    processor = processor_for(stack, folder, given, processor)
    say(f"reading pictures {in_words(given)}")
    read = read_pictures(parse_texts(given), samples, seed, processor, strict=strict)
    if read.broken:
        say(skipped(read.broken))
    positions = stack.positions({name: read.pixels})
    return Samples({name: read.pixels}, seqlen=positions), {
        **read.about(),
        "samples": len(read.pixels),
        "seqlen": positions,
    }


def processor_for(stack: Stack, folder: Path | None, given: Texts, processor: Any = None) -> Any:
    """The image processor of a model that is to see the pictures of `given`; raises as `read_inputs` does."""
    name = input_of(stack.model)
    if name != PIXELS:
        raise ModelError(
            f"{type(stack.model).__name__} takes {name}, which no file is read as: give tensors from Python, {{{name!r}: tensor}}"
        )
    check_texts(given)
    if processor is not None:
        return processor
    if folder is None:
        raise ModelError("a live model needs its image processor to see pictures: give tokenizer=processor")
    return load_processor(folder)


def skipped(broken: Sequence[str]) -> str:
    """What is said of pictures that cannot be read."""
    many = len(broken) > 1
    return f"{len(broken)} picture{'s' * many} cannot be read and {'are' if many else 'is'} skipped, first {broken[0]}"
