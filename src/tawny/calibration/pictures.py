"""Pictures → calibration samples: seeded crops of the files in a folder, through the model's own image processor.

    images:DIR       every file under DIR that Pillow opens, in the order of their names
    sample           the few pictures that scikit-image and scikit-learn carry, for a first try

What this file promises:

- The same files, seed and numbers give the same pixels. Each file comes once before any comes twice.
- A picture that cannot be read is named and skipped, or with `strict` refused. So is a file that is none.
- Of several folders samples come from each by its share, exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tawny.calibration.mixture import SAMPLE, Source
from tawny.calibration.windows import interleaved, shared_out
from tawny.errors import MissingFeature, TextError, first_line
from tawny.machine import in_package
from tawny.model.structure import PIXELS

# A crop's side, as a share of the picture's shorter one.
_SMALLEST = 0.6
# What Pillow gives to another program or to the system to draw, or may hold such a thing, whatever a file is called.
_PROGRAMS = {"EPS", "IPTC", "WMF"}
_SAMPLES = (("skimage", "data"), ("sklearn", "datasets/images"))


class BrokenPicture(TextError):
    """A file that Pillow cannot read; `why` is what it says."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"{path} cannot be read as a picture ({why}): repair it or take it away, or leave strict out to skip it"
        )
        self.why = why


@dataclass(frozen=True)
class Pictures:
    """Crops as a model takes them, and what a record says of them.

    Attributes:
        pixels: `[samples, channels, height, width]` float32.
        broken: what was skipped, and why.
    """

    pixels: Tensor
    name: str
    files: int
    broken: list[str] = field(default_factory=list)

    def about(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.pixels.contiguous().numpy().tobytes()).hexdigest()
        return {"name": self.name, "sha256": digest, "files": self.files, "skipped": self.broken}


def pictures_in(source: Source) -> list[Path]:
    """The files of a source, sorted, of the kinds that Pillow knows.

    Raises:
        TextError: there is none, or the source is a text.
    """
    if source.spec == SAMPLE:
        packaged = [in_package(package, f"{below}/*.[jp][pn]g") for package, below in _SAMPLES]
        folders = [path.parent for path in packaged if path is not None]
        missing = "install scikit-image or scikit-learn: pip install 'tawny[images]', or give images:DIR"
    elif source.pictures is not None:
        folders, missing = [Path(source.pictures).expanduser()], "give a folder that holds some"
    else:
        raise TextError(
            f"{source.spec!r} is a text, and this model sees pictures: give images:DIR, or sample"
        )
    image = _pillow()
    known = {suffix for suffix, kind in image.registered_extensions().items() if kind not in _PROGRAMS}
    files = sorted(
        p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file()
    )
    if not files:
        raise TextError(f"{source.spec!r} holds no pictures: {missing}")
    return files


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingFeature("pictures are read by Pillow: pip install 'tawny[images]'") from None
    return Image


def read_pictures(
    sources: Sequence[Source], samples: int, seed: int, processor: Any, *, strict: bool = False
) -> Pictures:
    """`samples` random square crops, sized and normalised by the model's image processor.

    Args:
        strict: refuse the first picture that cannot be read, of those that are wanted.

    Raises:
        TextError: a folder is no folder, or holds no picture that can be read.
        BrokenPicture: one cannot be read, and `strict` was asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: list[Tensor] = []
    broken: dict[str, str] = {}
    counts, files = shared_out(samples, [source.share for source in sources]), 0
    for source, count in zip(sources, counts, strict=True):
        left = pictures_in(source)
        files += len(left)
        rows: list[Tensor] = []
        while len(rows) < count:
            for place in torch.randperm(len(left), generator=generator).tolist():
                if len(rows) == count:
                    break
                try:
                    square = crop(left[place], generator)
                except BrokenPicture as error:
                    if strict:
                        raise
                    broken[str(left[place])] = error.why
                    continue
                rows.append(pixels_of(square, processor))
            left = [path for path in left if str(path) not in broken]
            if not left:
                path, why = next(iter(broken.items()))
                raise TextError(f"{source.spec!r} holds no picture that can be read, first {path}: {why}")
        tensors += rows
    pixels = torch.stack([tensors[i] for i in interleaved(counts)]).float()
    name = " + ".join(source.spec for source in sources)
    return Pictures(pixels, name, files, [f"{path}: {why}" for path, why in broken.items()])


def whole(path: Path) -> Any:
    """A picture in colours, the way up that its file says.

    Raises:
        BrokenPicture: Pillow cannot read it.
    """
    image = _pillow()
    from PIL import ImageOps

    try:
        image.init()
        with image.open(path, formats=[kind for kind in image.ID if kind not in _PROGRAMS]) as opened:
            opened.getexif()  # read here once; what turns the picture would write it anew, and fail where it is odd
            opened.info.pop("exif", None)
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # sixteen bits, which converting to colours clips at 255
                upright = upright.convert("I").point(lambda value: value * (1 / 256))
            return upright.convert("RGB")
    except MemoryError:  # the picture is sound, and another in its place would be other samples
        raise
    except Exception as error:  # a damaged file makes Pillow's readers raise almost anything
        raise BrokenPicture(path, first_line(error)[:120]) from None


def crop(path: Path, generator: torch.Generator) -> Any:
    """A square of a picture, somewhere in it; raises as `whole` does, before a number is drawn."""
    picture = whole(path)
    scale, across, down = torch.rand(3, generator=generator).tolist()
    side = max(1, round(min(picture.size) * (_SMALLEST + (1 - _SMALLEST) * scale)))
    left, top = (round((length - side) * at) for length, at in zip(picture.size, (across, down), strict=True))
    return picture.crop((left, top, left + side, top + side))


def pixels_of(picture: Any, processor: Any) -> Tensor:
    """A picture as the model takes it, `[channels, height, width]` float32."""
    pixels: Tensor = processor(images=picture, return_tensors="pt")[PIXELS][0]
    return pixels.float()
