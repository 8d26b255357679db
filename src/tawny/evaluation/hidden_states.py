"""Windows on their way through a model, kept after the last block so that the next measurement need not walk it again.

A dense model is walked for its perplexity, and once for each model that is compared with it. So what it makes of windows is kept
under everything that this depends on: the model's files, the windows, dtype, device, code and machine. The files take at most
2 GB together; those that were not read for the longest time go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from torch import Tensor

from tawny.errors import CheckpointError, OutputError
from tawny.machine import cache_folder, device_name, machine
from tawny.model.checkpoint import is_packed
from tawny.model.identity import code_identity, model_identity, tensor_digest
from tawny.model.stack import Stack
from tawny.model.streams import Samples, Stream
from tawny.progress import Progress
from tawny.run.run import Run
from tawny.run.walk import Advance, walk

KEPT_BYTES = 2 * 10**9
_WORTH = 3.0  # seconds of a walk that is worth a file


def stream_through(stack: Stack, samples: Samples, progress: Progress, phase: str) -> Stream:
    """Samples after the last block."""
    given = {"samples": samples}
    return walk(Run.unkept(progress), stack, given, [Advance("samples")], phase=phase, ends=given)["samples"]


def kept_stream(stack: Stack, folder: Path | None, ids: Tensor, progress: Progress, phase: str) -> Stream:
    """Windows `[windows, tokens]` after the last block, from an earlier walk where there was one.

    Args:
        folder: of the model; None, as for a live one, where nothing is to be kept. Nothing is kept of a packed one either.
    """
    kept = None if folder is None or is_packed(folder) else _place(stack, folder, ids)
    if kept is None:
        return stream_through(stack, Samples(ids), progress, phase)
    with contextlib.suppress(CheckpointError, KeyError, OSError):  # none there, or a damaged one
        stored = Stream(stack, Samples(ids), depth=len(stack), saved=kept)
        with contextlib.suppress(OSError):  # it may be another user's
            kept.touch()
        progress.say(f"{phase}: hidden states kept from before")
        return stored
    began = time.perf_counter()
    stream = stream_through(stack, Samples(ids), progress, phase)
    if time.perf_counter() - began >= _WORTH:
        _keep(stream, kept)
    return stream


def _place(stack: Stack, folder: Path, ids: Tensor) -> Path | None:
    """Under everything that the hidden states depend on; None where a process has no home to keep anything in."""
    here = machine()
    known = {
        "model": model_identity(folder),
        # A copy may have the sizes, times and headers of another model. No tool sets the time of a file's last change.
        "place": str(folder.resolve()),
        "changed": [path.stat().st_ctime_ns for path in sorted(folder.glob("*.safetensors"))],
        "windows": tensor_digest(ids).hexdigest(),
        "compute": [str(stack.compute), device_name(stack.device)],
        "code": code_identity(),
        "machine": [here["cpu"], here["threads"]],
    }
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    with contextlib.suppress(RuntimeError):
        return cache_folder() / "hidden" / f"{name}.safetensors"
    return None


def _keep(stream: Stream, kept: Path) -> None:
    """Write a file and make room for it. What cannot be written costs time later, never the result now."""
    if sum(hidden.nbytes for hidden in stream.hidden) > KEPT_BYTES:
        return
    with contextlib.suppress(OSError, OutputError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        mine = kept.with_name(f"{kept.name}.{os.getpid()}")  # another process may keep the same
        stream.save(mine)
        mine.replace(kept)
        total = 0
        for path in sorted(
            kept.parent.glob(f"{'[0-9a-f]' * 32}.safetensors*"),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        ):
            total += path.stat().st_size
            if total > KEPT_BYTES:
                path.unlink()
