"""Writes that survive a power cut: beside, flushed to the disk, renamed, and the rename flushed too.

After `replace` or `write` returns, a file is there whole under its name, whatever happens next; before, what stood
there is still there whole. Nothing in between is ever seen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from tawny.errors import OutputError


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; some file systems cannot do so with a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def or_gone(made: Path) -> Iterator[None]:
    """Take a half-written file away if anything fails inside; it may be what fills the disk."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)
        raise


def replace(made: Path, path: Path) -> None:
    """Give a complete temporary file its name; it goes if that fails."""
    with or_gone(made):
        sync(made)
        made.replace(path)
        sync(path.parent)


def write(path: Path, data: bytes) -> None:
    with beside(path) as unfinished:
        unfinished.write_bytes(data)


def temporary(path: Path) -> Path:
    """Where what will be `path` is written."""
    return path.with_name(path.name + ".tmp")


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` at the end, and goes if anything fails."""
    unfinished = temporary(path)
    with or_gone(unfinished):
        yield unfinished
        replace(unfinished, path)


@contextlib.contextmanager
def writing(what: Path, elsewhere: str = "choose another --out") -> Iterator[None]:
    """Turn a full disk or a read-only place into one clear line; `elsewhere` says how to have another."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code, text = getattr(error, "errno", None), str(error)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text:
            existing = next(path for path in (what, *what.absolute().parents) if path.exists())
            free = shutil.disk_usage(existing).free / 1e9
            said = f"{what}: the disk is full ({free:.1f} GB free); free some space and run again"
        elif code in (errno.EACCES, errno.EROFS, errno.EPERM):
            said = f"{what} cannot be written (read-only or no permission); {elsewhere}"
        else:
            # Of a file that has another name while it is written, the error names that one.
            reason = error.strerror if isinstance(error, OSError) else None
            said = f"{what} cannot be written: {reason or text}"
        raise OutputError(said) from error


def locked(path: Path, out: Path) -> IO[bytes]:
    """A lock that goes with the process, however it ends.

    Where there are no such locks, two runs into one folder are the user's to avoid.
    """
    handle = path.open("ab")
    try:
        import fcntl
    except ImportError:
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        handle.close()
        raise OutputError(f"another process is writing {out}; wait for it or choose another --out") from None
    except OSError:  # the file system has none
        return handle
    return handle
