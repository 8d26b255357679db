"""A folder beside OUT for what an unfinished recovery needs, and proof that Tawny made it.

`identity.json` is written before anything else is and goes last. It says what decides the result of the run, so that
another run is never gone on with by mistake, and whether replacing OUT was agreed to, so that it need not be again. A
folder without it, or with anything in it that Tawny never names so, is the user's: it is refused, never cleared.
"""

from __future__ import annotations

__all__ = [
    "WorkFolder",
    "about_model",
    "about_text",
    "about_tokens",
    "check_apart",
    "check_not_own_teacher",
    "is_own_teacher",
]

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.errors import ModelError, OutputError, TawnyError
from tawny.model import durable
from tawny.model.durable import writing
from tawny.model.output import named, spare, unfinished
from tawny.model.source import resolve
from tawny.pruning.journal import differences, model_identity, tensor_digest

IDENTITY = "identity.json"
_VERSION = 2  # 1: windows of text did not begin with BOS
# Parts of whatever is being made under one of our names, which a process that died may have left.
_BESIDE = ("", ".tmp", ".partial", ".recovery")


class WorkFolder:
    """`OUT.KIND`; nothing is touched before `open`.

    Args:
        ours: patterns of the names that Tawny makes in it.
        kept: patterns of what is too good to throw away unasked when another run finds it.
    """

    def __init__(self, out: Path, kind: str, ours: Sequence[str], kept: Sequence[str] = ("*",)) -> None:
        self.out = named(out)
        self.kind = kind
        self.path = self.out.with_name(f"{self.out.name}.{kind}")
        self._ours = [pattern + more for pattern in ours for more in _BESIDE]
        self._kept = kept

    @property
    def consent(self) -> bool:
        """Whether the run that is unfinished here may replace OUT."""
        found = self._read()
        return found is not None and bool(found["overwrite"])

    def check(self) -> None:
        """Refuse a folder that Tawny did not make.

        Raises:
            OutputError: something in it is not Tawny's.
        """
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise OutputError(f"{self.path} exists and is not a folder; move it away or choose another --out")
        names = self._names()
        foreign = [name for name in names if not self._is_ours(name)]
        if foreign:
            raise OutputError(
                f"{self.path} holds {foreign[0]!r}, which no run of Tawny put there; move it away or choose another --out"
            )
        if names and not (self.path / IDENTITY).exists():
            raise OutputError(
                f"{self.path} holds {names[0]!r} but no {IDENTITY}, so this Tawny did not make it; move it away or choose "
                "another --out"
            )

    def open(self, identity: Mapping[str, Any], overwrite: bool) -> None:
        """Go on with what is there, or begin; `overwrite` discards another run, and one that began without it.

        Of another run that made nothing worth keeping nothing is left either: this one must not build on it.

        Args:
            identity: what decides the result, in JSON types; models from `about_model`.

        Raises:
            OutputError: another run is unfinished here, or the folder is not Tawny's.
        """
        self.check()
        now = json.loads(json.dumps(identity))
        found = self._read()
        differing = [] if found is None else list(_differing(found["identity"], now))
        # Begun with --overwrite, the same command has it again: it goes on, as its interruption promised.
        if found is not None and not differing and (found["overwrite"] or not overwrite):
            return
        if differing and not overwrite and self._worth_keeping():
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise OutputError(
                f"{self.path} holds an unfinished run that differs ({'; '.join(differing[:3])}{more}): repeat that command "
                "to go on with it, choose another --out, or pass --overwrite to discard it"
            )
        if self.out.exists() and not overwrite:  # what the other run was allowed, this one is not
            raise OutputError(f"{self.out} exists; choose another --out or pass --overwrite")
        if found is not None and (overwrite or differing):
            self.discard()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            told = {"tawny": self.kind, "version": _VERSION, "overwrite": overwrite, "identity": now}
            text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
            durable.write(self.path / IDENTITY, text.encode())

    @contextmanager
    def unless_empty(self) -> Iterator[None]:
        """Inside, behind `open`: a run that is refused before it made anything worth keeping leaves nothing behind."""
        try:
            yield
        except TawnyError:
            if self.path.is_dir() and not self._worth_keeping():
                self.discard()
            raise

    def discard(self) -> None:
        """Remove what Tawny made; what came in since it was checked stays."""
        if not (self.path / IDENTITY).exists():
            return
        for name in self._names():
            path = self.path / name
            if name == IDENTITY or not self._is_ours(name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        durable.remove(self.path / IDENTITY)
        with suppress(OSError):
            self.path.rmdir()

    def _names(self) -> list[str]:
        """Everything in it but an identity that was never finished."""
        return sorted(path.name for path in self.path.iterdir() if path.name != f"{IDENTITY}.tmp")

    def _is_ours(self, name: str) -> bool:
        return name == IDENTITY or any(fnmatch(name, pattern) for pattern in self._ours)

    def _worth_keeping(self) -> bool:
        return any(
            fnmatch(name, pattern) for name in self._names() if name != IDENTITY for pattern in self._kept
        )

    def _read(self) -> dict[str, Any] | None:
        path = self.path / IDENTITY
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["tawny"] != self.kind or found["version"] != _VERSION:
                raise ValueError("it is of another kind or version")
            found["overwrite"], found["identity"].items()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} is no identity that this Tawny wrote ({error}); move its folder away or choose another --out"
            ) from error
        return found


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Where two identities differ, in words; a model that was only moved is the same one."""
    for what, value in now.items():
        other = before.get(what)
        if isinstance(value, dict) and isinstance(other, dict) and "files" in value and "files" in other:
            if value["files"] != other["files"] and value["folder"] != other["folder"]:
                yield f"{what} was {other['folder']}, now {value['folder']}"
            else:
                yield from differences(other["files"], value["files"], what)
        else:
            yield from differences(other, value, what)


# --- what a run is of ------------------------------------------------------------------------------------------------


def about_model(model: str | Path | nn.Module | None) -> dict[str, Any] | None:
    """A model in an identity: where it is and what its files are; of a live one its class and what its tensors hold."""
    if model is None:
        return None
    if isinstance(model, nn.Module):
        return {"folder": type(model).__name__, "files": _tensors_sha256(model)}
    folder = resolve(model)
    return {"folder": str(folder.resolve()), "files": model_identity(folder)}


def _tensors_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def about_text(name: str, tokens: Tensor | None = None) -> str:
    """A text in an identity: what the tokens or the file hold; of one that Tawny knows the name says that."""
    if tokens is not None:
        return about_tokens(tokens)
    path = Path(name).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name


def about_tokens(tokens: Tensor) -> str:
    return tensor_digest(tokens).hexdigest()


# --- what must not be lost -------------------------------------------------------------------------------------------


def check_apart(
    out: Path, work: Sequence[WorkFolder], models: Mapping[str, str | Path | nn.Module | None]
) -> None:
    """Refuse places to write whose replacement, or whose clearing, would take a model with it.

    Args:
        models: what is read, each named as the refusal calls it.

    Raises:
        OutputError: a place is one of them or holds it.
    """
    places = [named(out), unfinished(out), *(folder.path for folder in work)]
    for what, model in models.items():
        if model is None or isinstance(model, nn.Module):
            continue
        given = Path(str(model)).expanduser()
        # A .gguf file is spared as much as the folder that was made of it.
        for read in [given, resolve(model)] if given.exists() else [resolve(model)]:
            spare(places, read, what)


def is_own_teacher(folder: Path | None, teacher: str | Path | nn.Module | None) -> bool:
    if folder is None or teacher is None or isinstance(teacher, nn.Module):
        return False
    return folder.resolve() == resolve(teacher).resolve()


def check_not_own_teacher(own: bool) -> None:
    """Refuse a pruned model as its own teacher, from which there is nothing to learn.

    Raises:
        ModelError: it is.
    """
    if own:
        raise ModelError(
            "the teacher is the model that is trained; expected the dense model it was pruned from"
        )
