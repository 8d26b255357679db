"""The identity of a run: its model, text and code as JSON, so that resuming never continues a different run.

A model is the names, sizes, times and headers of its files. Reading all weights to hash them would cost minutes.
"""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from tawny.machine import versions
from tawny.model.source import resolve
from tawny.model.streams import Samples

# The rooms whose code decides bytes.
_DECIDING = (
    "allocation",
    "calibration",
    "choosing",
    "kernels",
    "kinds.py",
    "model",
    "packed",
    "pruning",
    "solvers",
    "patterns.py",
    "precision.py",
    "recipe",
)
_SOURCES = {".py", ".cpp", ".h"}
# Written beside the weights, and no part of what the model computes.
_NOT_THE_MODEL = {"run.json", "journal.json", "report.json"}
_PART_OF_THE_MODEL = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")


def source_identity(model: str | Path | nn.Module | None) -> dict[str, Any] | None:
    """Where a model is and what its files are; of a live one its class and a hash of its tensors."""
    if model is None:
        return None
    if not isinstance(model, nn.Module):
        folder = resolve(model)
        return {"folder": str(folder.resolve()), "files": model_identity(folder)}
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"folder": type(model).__name__, "files": digest.hexdigest()}


def model_identity(folder: Path) -> dict[str, Any]:
    """Of each weight file its size, time and header; of the other files that matter their contents."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix == ".safetensors" and path.is_file():
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(min(size, 1 << 28))
            stat = path.stat()
            files[path.name] = [stat.st_size, stat.st_mtime_ns, _hash(header)]
        elif path.suffix in (".json", ".model", ".txt", ".jinja", ".py") and path.is_file():
            files[path.name] = _hash(path.read_bytes())
    return files


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights, configuration, tokenizer and code in a folder: same fingerprint, same model."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _PART_OF_THE_MODEL or path.name in _NOT_THE_MODEL or not path.is_file():
            continue
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # goes on with this one
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> hashlib._Hash:
    """SHA-256 of a tensor's bytes and shape."""
    digest = hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(str(list(tensor.shape)).encode())
    return digest


def tokens_identity(samples: Samples | None) -> str | None:
    if samples is None:
        return None
    first, *more = samples.inputs.values()
    digest = tensor_digest(first)
    for value in more:
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def code_identity(*more: str) -> dict[str, str]:
    """Versions of the libraries, and one hash of the sources that compute; `more`: rooms that decide as well."""
    return {**versions(), "sources": _digest_of_sources(*_DECIDING, *more)}


@cache  # a process runs the sources that it began with
def _digest_of_sources(*rooms: str) -> str:
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for name in rooms:
        files = [root / name] if (root / name).is_file() else (root / name).rglob("*")
        for path in sorted(x for x in files if x.suffix in _SOURCES):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def own_code(*parts: object) -> dict[str, str]:
    """A hash of what classes from elsewhere compute, which a notebook may change between two runs; nothing of Tawny's."""
    digest, read = hashlib.sha256(), False
    for cls in (cls for part in parts for cls in type(part).__mro__):
        if cls.__module__.partition(".")[0] in {"tawny", *sys.stdlib_module_names}:
            continue
        for name, value in sorted(vars(cls).items()):
            plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            plain = plain.fget if isinstance(plain, property) else plain
            if isinstance(plain, FunctionType):
                read = True
                digest.update(f"{cls.__qualname__}.{name}\0".encode())
                _add_code(digest, plain.__code__)
    return {"own": digest.hexdigest()} if read else {}


def _add_code(digest: Any, code: CodeType) -> None:
    digest.update(code.co_code + repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(digest, constant)
        else:  # the order of a set is another in each process
            plain = sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
            digest.update(repr(plain).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
