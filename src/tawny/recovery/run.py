"""Train a pruned model until it is good again, without losing a zero: what is asked for, checked and opened.

Masked distillation: the survivors learn from next-token loss plus the KL to the dense model over the full vocabulary
(as in PERP, 2312.15230, only the mask is fixed; and as in distillation-aware pruning, the dense model is the teacher). The
teacher's hidden states come from disk (teacher.py), logits exist for a chunk of tokens (objective.py), the optimiser knows
survivors alone (coordinates.py). The loop is in training.py; a run that is stopped goes on from its last state to the same
curve (state.py).
"""

from __future__ import annotations

__all__ = ["recover"]

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.calibration.context import check_ids
from tawny.errors import Interrupted, ModelError, RecipeError, TextError
from tawny.machine import peak_memory
from tawny.model.checkpoint import is_packed
from tawny.model.output import OutputFolder, check_savable
from tawny.model.source import load_tokenizer, resolve
from tawny.model.stack import Stack, live_stack, open_stack
from tawny.model.structure import evaluating
from tawny.model.trust import opens_models
from tawny.precision import native_dtype
from tawny.progress import Progress, silent
from tawny.recovery.data import read
from tawny.recovery.processes import Processes
from tawny.recovery.record import RecoveryRecord
from tawny.recovery.settings import Recovery
from tawny.recovery.student import LEAST_SPARSITY, Student
from tawny.recovery.teacher import check_teacher, check_tokenizers
from tawny.recovery.training import Run
from tawny.recovery.workfolder import (
    WorkFolder,
    check_apart,
    check_not_own_teacher,
    is_own_teacher,
)
from tawny.recovery.writing import check_no_pruning

# What lies in OUT.recovery: states, the best weights, parts to be joined, the teacher's hidden states and their index.
_SHELVED = (
    "state*.safetensors",
    "best*.safetensors",
    "last*.safetensors",
    "teacher-*.bin",
    "teacher-*.json",
    "teacher-*.new",
)


@opens_models
def recover(
    source: str | Path | nn.Module,
    teacher: str | Path | nn.Module | None = None,
    out: str | Path | None = None,
    *,
    settings: Recovery | Mapping[str, Any] | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
    tokenizer: Any = None,
    text: Tensor | str | Path | None = None,
    held_out: Tensor | None = None,
    trust_remote_code: bool = False,
    **keys: Any,
) -> RecoveryRecord:
    """Train what pruning left, on a text and against the dense model, with every zero staying zero.

    Args:
        source: a pruned folder, dense or packed (then so is `out`); or a live module, which is trained in place.
        teacher: the dense model, as a folder, hub id, `.gguf` file, `smollm2` or live module; None only with `kl=0`.
        out: folder to write; needed for a path, optional for a live module.
        settings: how; `keys` override single entries (`minutes=30, lr=2e-4, train="lora"`).
        progress: told how far the work is.
        overwrite: replace an existing `out` once the new one is complete, and discard an unfinished run, unless it is
            this same one, which goes on.
        tokenizer: for a live module and a text.
        text: name or path of a text, or tokens `[windows, seqlen]`.
        held_out: tokens `[windows, seqlen]` to measure on, instead of a part of the text.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        UserError: something asked for cannot be done; one line says what can.
        NumericalError: the loss became NaN; the best model so far is written, if any was better than the start.
        Interrupted: the user pressed Ctrl-C; the same command goes on.
    """
    if isinstance(text, str | Path):
        keys["text"] = str(text)
    elif text is not None and not isinstance(text, Tensor):
        raise TextError(
            f"text is a {type(text).__name__}; expected a name, a path, or a torch tensor [windows, seqlen]"
        )
    chosen = Recovery.make(settings, **keys)
    given = text if isinstance(text, Tensor) else None
    if given is not None and given.dim() == 2:
        chosen = Recovery.make(chosen, seqlen=int(given.shape[1]))
    if (
        out is not None
        and not isinstance(source, nn.Module)
        and is_packed(folder := resolve(source, progress.say))
    ):
        from tawny.recovery.packed import recover_packed

        return recover_packed(
            source, folder, teacher, Path(out), chosen, progress, overwrite, given, held_out
        )
    with _open_run(chosen, source, teacher, out, progress, overwrite, tokenizer, given, held_out) as run:
        failure = run.train()
        record = run.finish(failure)
    if failure is not None:
        raise failure
    return record


@contextmanager
def _open_run(
    settings: Recovery,
    source: str | Path | nn.Module,
    teacher: str | Path | nn.Module | None,
    out: str | Path | None,
    progress: Progress,
    overwrite: bool,
    tokenizer: Any,
    text: Tensor | None,
    held_out: Tensor | None,
) -> Iterator[Run]:
    """Check everything that can be checked before work, and clean up whatever happens after."""
    before = peak_memory()
    _check_wanted(settings, source, teacher, out)
    processes = Processes(settings.device, shard=settings.shard)
    output: OutputFolder | None = None
    student: Student | None = None
    work: WorkFolder | None = None
    modes = ExitStack()
    try:
        if processes.sharded and settings.batch % processes.count:
            raise RecipeError(
                f"batch={settings.batch} among {processes.count} processes with shard=true: expected a multiple, "
                "because all of them take part in every forward"
            )
        folder = None if isinstance(source, nn.Module) else resolve(source, progress.say)
        if out is not None:
            work = WorkFolder(Path(out), "recovery", _SHELVED, kept=("state*.safetensors",))
            check_apart(Path(out), [work], {"model": source, "teacher": teacher})
            if folder is None:  # a live model's run leaves nothing to go on from
                work = None
                check_savable(source)
        own = is_own_teacher(folder, teacher)
        brought = settings.method == "elsa" and settings.sparsity is not None
        check_not_own_teacher(own and not settings.control and not brought)
        stack, teacher_stack = _stacks(settings, source, folder, teacher, progress)
        # Dropout would make the curve depend on more than its settings.
        modes.enter_context(evaluating(stack.model))
        if teacher_stack is not None:
            check_teacher(stack, teacher_stack)
            modes.enter_context(evaluating(teacher_stack.model))
        if tokenizer is None and text is None:
            if folder is None:
                raise ModelError(
                    "a live model needs tokens to train on: give text=tokens [windows, seqlen] or tokenizer=…"
                )
            tokenizer = load_tokenizer(folder)
        if teacher is not None and not isinstance(teacher, nn.Module) and folder is not None and text is None:
            check_tokenizers(tokenizer, load_tokenizer(resolve(teacher)))
        if out is not None and processes.first:
            output = _reserve(Path(out), overwrite, folder, work)
        progress.say(f"reading {'tokens' if text is not None else f'text {settings.text}'}")
        reading = read(settings, tokenizer, text, held_out)
        check_ids(stack.model, reading.windows)
        student = Student(stack, settings, processes)
        check_not_own_teacher(own and student.sparsity >= LEAST_SPARSITY)
        run = Run(settings, student, teacher_stack, reading, processes, output, progress)
        run.source, run.folder = (str(source), folder) if folder else (type(source).__name__, None)
        if teacher is not None:
            run.record.teacher = type(teacher).__name__ if isinstance(teacher, nn.Module) else str(teacher)
        run.record.memory_before = before
        run.shelve(work, overwrite)
        yield run
    except KeyboardInterrupt as error:
        raise Interrupted(
            "stopped by Ctrl-C; the same command goes on from the last state it saved"
        ) from error
    finally:
        if output is not None:
            output.discard()
        if student is not None:
            student.close()
        modes.close()
        processes.close()


def _check_wanted(
    settings: Recovery,
    source: str | Path | nn.Module,
    teacher: str | Path | nn.Module | None,
    out: str | Path | None,
) -> None:
    """Refuse what cannot be done, before anything is opened."""
    live = isinstance(source, nn.Module)
    if teacher is None and settings.kl > 0:
        raise RecipeError(
            "recovery learns from the dense model: give --teacher DENSE, or -o kl=0 to learn from the text alone"
        )
    if out is None and not live:
        raise RecipeError(f"recovering {source} needs a folder to write to: give out=… (or --out DIR)")
    if settings.shard and live:
        raise RecipeError("shard=true reads a model part by part: give a folder instead of a live module")


def _stacks(
    settings: Recovery,
    source: str | Path | nn.Module,
    folder: Path | None,
    teacher: str | Path | nn.Module | None,
    progress: Progress,
) -> tuple[Stack, Stack | None]:
    """Both models; of a teacher on disk only what lies outside its blocks is read."""
    compute = native_dtype() if settings.compute == "auto" else getattr(torch, settings.compute)
    if isinstance(source, nn.Module):
        stack = live_stack(source)
        compute = stack.compute
    else:
        assert folder is not None
        stack = open_stack(folder, compute, settings.device)
    if teacher is None or settings.kl == 0:
        return stack, None
    if isinstance(teacher, nn.Module):
        check_not_own_teacher(teacher is source)
        return stack, live_stack(teacher)
    return stack, open_stack(resolve(teacher, progress.say), compute, str(stack.device))


def _reserve(out: Path, overwrite: bool, folder: Path | None, work: WorkFolder | None) -> OutputFolder:
    """The folder to write to, ours until the end."""
    check_no_pruning(out, overwrite)
    if work is not None:
        work.check()
        overwrite = overwrite or work.consent
    return OutputFolder(out, overwrite=overwrite, source=folder)
