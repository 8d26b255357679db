"""What a fit writes: a packed folder, one GGUF file, or a compressed-tensors checkpoint.

Each is made, weighed and delivered here; a new one is an entry of FORMATS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol, final

from tawny.choosing.compressed_size import CompressedSize, kinds_of
from tawny.choosing.fitted import Fitted
from tawny.choosing.fitted import deliver as deliver_packed
from tawny.choosing.gguf_card import gguf_card
from tawny.choosing.gguf_size import GGUFSize, fit_widths, kinds_named
from tawny.choosing.limit import Target
from tawny.choosing.packed_size import PackedSize
from tawny.choosing.settings import FitSettings
from tawny.choosing.sizes import Sizes
from tawny.errors import CheckpointError, ModelError, OutputError, RecipeError
from tawny.exporting.architectures import CONVERTER
from tawny.exporting.compressed import TARGET, export_compressed
from tawny.exporting.gguf import export_gguf
from tawny.exporting.template import Matrices, Template
from tawny.exporting.through import export_through
from tawny.gguf_kinds import GGUF_KINDS
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.model.checkpoint import file_bytes
from tawny.model.couplings import fused
from tawny.model.source import gguf_behind
from tawny.packed import format
from tawny.progress import Progress
from tawny.pruning.packing import prune_and_pack
from tawny.pruning.prepare import Job, off_tiles
from tawny.pruning.run import prune
from tawny.pruning.session import Session
from tawny.record import finite
from tawny.report.pages import write_beside
from tawny.run.place import accepts_checkpoint


class Format(Protocol):
    """The interface; what a format leaves as it is here is that of a folder.

    Attributes:
        version: what measures belong to, beside model, recipe and text.
    """

    version: ClassVar[Mapping[str, Any]]

    def accepts(self, out: Path, overwrite: bool, continued: bool) -> None:
        """Raise an OutputError unless `out` is free, or may be replaced."""
        accepts_checkpoint(out, overwrite, continued)

    def known(self, settings: FitSettings, job: Job) -> Sizes | None:
        """What is known of sizes before any work; None where a file tells them that is yet to be made.

        Raises:
            UserError: what the settings ask for cannot be.
        """
        ...

    def sizes(self, job: Job, settings: FitSettings, work: Path | None, progress: Progress) -> Sizes:
        """What models take.

        Args:
            work: folder for a file that is made to know it; None where nothing may be written.

        Raises:
            ModelError: it takes such a file.
        """
        sizes = self.known(settings, job)
        assert sizes is not None
        return sizes

    def make(self, source: Path, sizes: Sizes, folder: Path, progress: Progress, **keys: Any) -> int:
        """Prune the source, unless that is done; returns the bytes of the files that it becomes.

        Args:
            folder: what it is compared by.
            keys: of `prune`.
        """
        ...

    def deliver(self, session: Session, fitted: Fitted, folder: Path, measured: Mapping[str, Any]) -> None:
        """Make what was made in a folder the output."""
        deliver_packed(session, fitted, folder, measured)


@final
class Packed(Format):
    """A folder for Tawny's own decoder."""

    version = {"packed format": format.VERSION}

    def known(self, settings: FitSettings, job: Job) -> Sizes | None:
        return PackedSize(job)

    def make(self, source: Path, sizes: Sizes, folder: Path, progress: Progress, **keys: Any) -> int:
        if not folder.exists():
            prune_and_pack(source, folder, progress=progress, **keys)
        return file_bytes(folder) + (folder / INDEX).stat().st_size


@final
class GGUF(Format):
    """One file for llama.cpp, Ollama and LM Studio."""

    version = {"format": "gguf"}

    def accepts(self, out: Path, overwrite: bool, continued: bool) -> None:
        if out.suffix != ".gguf":
            raise OutputError(f"{out} is no name of a GGUF file; give --out a name such as {out}.gguf")
        if out.is_dir():
            raise OutputError(f"{out} is a folder, and a GGUF file is one file: choose another --out")
        for path in (out, *_beside(out)):
            if path.exists() and not overwrite:
                raise OutputError(f"{path} exists; choose another --out or pass --overwrite")

    def known(self, settings: FitSettings, job: Job) -> Sizes | None:
        _types_named(settings)
        _template_named(settings)
        fit_widths(job)
        return None

    def sizes(self, job: Job, settings: FitSettings, work: Path | None, progress: Progress) -> Sizes:
        return GGUFSize(job, _template(job, settings, work, progress), _types_named(settings))

    def make(self, source: Path, sizes: Sizes, folder: Path, progress: Progress, **keys: Any) -> int:
        assert isinstance(sizes, GGUFSize)
        if not folder.exists():
            prune(source, folder, progress=progress, **keys)
        file = folder.with_suffix(".gguf")
        if not file.exists():
            export_through(folder, file, template=sizes.template, progress=progress)
        return file.stat().st_size

    def deliver(self, session: Session, fitted: Fitted, folder: Path, measured: Mapping[str, Any]) -> None:
        place = session.place
        assert place is not None
        facts, made = finite(fitted.to_dict()), folder.with_suffix(".gguf")
        with made.open("rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        text = json.dumps(facts | dict(measured), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        place.deliver(made)
        for path, told in zip(_beside(place.out), (text, gguf_card(facts)), strict=True):
            write_beside(path, told)


@final
class CompressedTensors(Format):
    """A folder for vLLM, SGLang and transformers."""

    version = {"format": TARGET}

    def known(self, settings: FitSettings, job: Job) -> Sizes | None:
        kinds = kinds_named(settings.kinds, kinds_of(job), "kinds for GPUs, and that of the weights,")
        return CompressedSize(job, kinds, fused(job.stack))

    def sizes(self, job: Job, settings: FitSettings, work: Path | None, progress: Progress) -> Sizes:
        for line in off_tiles(job):
            progress.say(line)
        return super().sizes(job, settings, work, progress)

    def make(self, source: Path, sizes: Sizes, folder: Path, progress: Progress, **keys: Any) -> int:
        if not folder.exists():
            prune(source, folder, progress=progress, **keys)
        made = folder.with_suffix(".tensors")
        if not made.exists():
            export_compressed(folder, made, progress=progress)
        return file_bytes(made)

    def deliver(self, session: Session, fitted: Fitted, folder: Path, measured: Mapping[str, Any]) -> None:
        super().deliver(session, fitted, folder.with_suffix(".tensors"), measured)


def check_aim(settings: FitSettings, target: Target) -> None:
    """Refuse a speed or a memory of a format that Tawny's decoder does not read."""
    if settings.to == TARGET and (target.speed or target.ram):
        raise RecipeError(
            "speed and ram are those of Tawny's own decoder: give --size or --bits with --to compressed-tensors"
        )


FORMATS: dict[str, Format] = {"packed": Packed(), "gguf": GGUF(), TARGET: CompressedTensors()}


def _beside(out: Path) -> tuple[Path, Path]:
    """What was measured, and the card."""
    return out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.md")


def _types_named(settings: FitSettings) -> tuple[str, ...]:
    return kinds_named(settings.kinds, [*GGUF_KINDS], "types of GGUF files")


def _template_named(settings: FitSettings) -> Path | None:
    given = None if settings.template is None else gguf_behind(settings.template)
    if given is None and settings.template is not None:
        raise RecipeError(f"--template {settings.template}: expected a GGUF file")
    return given


def _template(job: Job, settings: FitSettings, work: Path | None, progress: Progress) -> Template:
    """The file whose keys are kept: the one that was named, the source itself, or one that is made of it."""
    assert job.folder is not None
    matrices, named = Matrices.of(job.folder), _template_named(settings)

    def found(path: Path) -> Template:
        return Template.of(path, matrices.checkpoint, matrices.model, matrices.names, progress)

    if named is not None:
        return found(named)
    own = gguf_behind(job.source)
    if own is not None:
        with suppress(ModelError):  # it is quantised itself
            return found(own)
    if work is None:
        raise ModelError(
            "what a GGUF file takes is read from a whole one of the model: give --template with it"
        )
    made = work / "template.gguf"
    if not made.exists():
        try:
            export_gguf(job.source, made, progress=progress)
        except (ModelError, CheckpointError) as error:
            why = str(error).partition(";")[0]
            raise ModelError(
                f"{why}: give --template with a whole GGUF file of the model, as {CONVERTER} makes it"
            ) from error
    return found(made)
