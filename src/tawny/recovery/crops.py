"""What the recovery of a model that sees is shown: crops of pictures, drawn anew for every step, and pictures held out.

What this file promises:

- A crop depends on its number and the seed alone, so that a resumed run sees what an uninterrupted one would have.
- A picture that is measured on is never trained on. Held-out crops stay the same.
- Each picture comes once before any comes twice. Of several folders crops come by turns, as their shares say.
- A picture that cannot be read is named, and the next one of the folder stands in; with `strict` it is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tawny.calibration.inputs import skipped
from tawny.calibration.mixture import Source, parse_texts
from tawny.calibration.pictures import BrokenPicture, crop, pictures_in, pixels_of
from tawny.calibration.windows import SEED_APART, interleaved, shared_out
from tawny.errors import TextError
from tawny.model.streams import Samples
from tawny.model.structure import PIXELS
from tawny.recovery.data import ReadingOrder
from tawny.recovery.settings import Recovery

_HELD_OUT = 8  # of so many pictures one is held out, as long as there are fewer than crops to measure on


@dataclass
class Crops:
    """Crops to train on and, after them, crops held out; a row names one of either.

    Attributes:
        files: that are trained on, one folder behind the other.
        measured: the picture of each held-out crop.
        training: rows that a whole run reads; each is made once.
        seqlen: hidden states of a crop.
    """

    files: list[Path]
    measured: list[Path]
    order: ReadingOrder
    batch: int
    training: int
    seed: int
    processor: Any
    strict: bool
    seqlen: int
    about: dict[str, Any]
    say: Callable[[str], None]
    passes: ClassVar[bool] = True
    _made: dict[int, Tensor] = field(default_factory=dict)

    @property
    def held_out(self) -> list[int]:
        return list(range(self.training, self.training + len(self.measured)))

    def own(self, row: int) -> bool:
        return False

    def rows(self, step: int) -> list[int]:
        """Crops of one step."""
        return list(range(step * self.batch, (step + 1) * self.batch))

    def take(self, rows: Sequence[int]) -> Samples:
        """The pixels of some rows. Crops that were trained on before them are forgotten."""
        first = min(rows)
        if first < self.training:
            self._made = {row: crop for row, crop in self._made.items() if row >= first}
        for row in rows:
            if row not in self._made:
                self._made[row] = self._pixels(row)
        return Samples({PIXELS: torch.stack([self._made[row] for row in rows])}, seqlen=self.seqlen)

    def _pixels(self, row: int) -> Tensor:
        held = row - self.training
        files = self.files if held < 0 else self.measured
        place, number = (self.order.row(row), row) if held < 0 else (held, SEED_APART + held)
        for further in range(len(files)):
            path = files[(place + further) % len(files)]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            try:
                return pixels_of(crop(path, generator), self.processor)
            except BrokenPicture as error:
                if self.strict:
                    raise
                if (line := f"{path}: {error.why}") not in self.about["skipped"]:
                    self.about["skipped"].append(line)
                    self.say(skipped([line]))
        raise TextError(
            f"{self.about['name']} holds no picture that can be read, first {self.about['skipped'][0]}"
        )


def crops_of(
    settings: Recovery, processor: Any, positions: Callable[[Tensor], int], say: Callable[[str], None]
) -> Crops:
    """The crops of the folders that `settings.text` names.

    Args:
        positions: how many hidden states a sample `[1, channels, height, width]` makes.

    Raises:
        TextError: a folder holds fewer than two pictures, or none that can be read.
    """
    sources = parse_texts(settings.text)
    shares = [source.share for source in sources]
    generator = torch.Generator().manual_seed(settings.seed)
    most = shared_out(settings.eval_windows, shares)
    parts = [_parted(source, count, generator) for source, count in zip(sources, most, strict=True)]
    held = [path for _, some in parts for path in some]
    apart = {path.resolve() for path in held}  # folders may lie in one another
    trained = [[path for path in some if path.resolve() not in apart] for some, _ in parts]
    for source, some in zip(sources, trained, strict=True):
        if not some:
            raise TextError(f"{source.spec!r} has no picture that is not measured on: give more, or it once")
    files = [path for some in trained for path in some]
    digest = hashlib.sha256("\n".join(f"{path} {path.stat().st_size}" for path in [*files, *held]).encode())
    about: dict[str, Any] = {
        "name": " + ".join(source.spec for source in sources),
        "files": len(files),
        "held_out_files": sorted({str(path) for path in held}),
        "skipped": [],
        "tokens_sha256": digest.hexdigest(),
        "counted": ["crops", "positions"],
    }
    crops = Crops(
        files,
        [held[place] for place in interleaved(most)],
        ReadingOrder([len(some) for some in trained], shares, settings.seed),
        settings.batch,
        0,
        settings.seed,
        processor,
        settings.strict,
        1,
        about,
        say,
    )
    crops.seqlen = positions(crops.take(crops.held_out[:1]).inputs[PIXELS])
    crops.training = Recovery.make(settings, seqlen=crops.seqlen).steps * settings.batch
    crops._made.clear()
    about |= {"seqlen": crops.seqlen, "held_out": len(crops.measured)}
    return crops


def _parted(source: Source, most: int, generator: torch.Generator) -> tuple[list[Path], list[Path]]:
    """Pictures of a folder to train on, and the picture of each of `most` held-out crops."""
    files = pictures_in(source)
    if len(files) < 2:
        raise TextError(
            f"{source.spec!r} holds one picture; expected one to measure on beside those that are trained on: give more"
        )
    count = min(most, max(1, len(files) // _HELD_OUT))
    chosen = sorted(torch.randperm(len(files), generator=generator)[:count].tolist())
    held = [files[place] for place in chosen]
    return [path for path in files if path not in set(held)], [held[i % count] for i in range(most)]
