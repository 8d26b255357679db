"""The header of a GGUF file, which may say anything: its lengths are held against the file before `gguf` reads it.

`gguf` believes a header. It makes an object for every item of every list, past the end of the file, too: 2⁶² items take all
memory that a machine has.
"""

from __future__ import annotations

import mmap
import struct
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tawny.errors import CheckpointError, in_one_line

# Each takes about 300 bytes in `gguf`. The largest tokenizers list 1.3 million words, scores, kinds and merges.
_MOST_ITEMS = 1 << 23
# Bytes of a number, by the type that a header gives it; strings and lists say their length.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _LIST = 8, 9
_LEAST_TENSOR = 24  # bytes of the description of a tensor without a name and dimensions
_VERSIONS = (2, 3)


def refusing(what: str) -> AbstractContextManager[None]:
    """The readers of GGUF files were written for whole ones."""
    return in_one_line(
        CheckpointError, lambda said: f"{what} ({said}); fetch it again, or give a safetensors folder"
    )


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of the file.

    Raises:
        CheckpointError: it is not a GGUF file, or its header asks for more than the file holds.
    """
    from gguf import GGUFReader

    with refusing(f"{path} cannot be opened as a GGUF model"):
        _check_header(path)
        return GGUFReader(str(path))


def _check_header(path: Path) -> None:
    """Raise a ValueError where a length in the header is beyond the end of the file, or lists are far too long."""
    if path.is_dir():
        raise ValueError("it is a folder")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if len(data) < 24:
            return  # `gguf` says so
        order = "<" if struct.unpack_from("<I", data, 4)[0] & 0xFFFF else ">"
        version, tensors, keys = struct.unpack_from(f"{order}IQQ", data, 4)
        if version in _VERSIONS:
            header = _Header(data, order, at=24)
            for _ in range(keys):
                header.skip_string()
                header.skip_value(header.number("I"))
            header.check(tensors, _LEAST_TENSOR, "tensors")


class _Header:
    """A place in a header."""

    def __init__(self, data: mmap.mmap, order: str, at: int) -> None:
        self.data, self.order, self.at = data, order, at
        self.items = 0  # of all lists so far

    def number(self, kind: str) -> int:
        self.check(1, struct.calcsize(kind), "numbers")
        value: int = struct.unpack_from(self.order + kind, self.data, self.at)[0]
        self.at += struct.calcsize(kind)
        return value

    def skip_string(self) -> None:
        length = self.number("Q")
        self.check(length, 1, "characters")
        self.at += length

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip_string()
        elif kind == _LIST:
            each, count = self.number("I"), self.number("Q")
            self.check(count, _WIDTHS.get(each, 8), "items")
            self.items += count
            if self.items > _MOST_ITEMS:
                raise ValueError(f"its lists hold {self.items:,} items; expected at most {_MOST_ITEMS:,}")
            if each in _WIDTHS:
                self.at += count * _WIDTHS[each]
            else:
                for _ in range(count):
                    self.skip_value(each)
        elif kind in _WIDTHS:
            self.at += _WIDTHS[kind]
        else:
            raise ValueError(f"it holds a value of the unknown type {kind}")

    def check(self, count: int, width: int, what: str) -> None:
        if count * width > (left := len(self.data) - self.at):
            raise ValueError(f"its header asks for {count:,} {what}, and {max(left, 0):,} bytes are left")
