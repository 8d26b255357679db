"""Recover a dense folder or a live model: check everything that can be checked before work, train, write, clean up."""

from __future__ import annotations

__all__ = ["Request", "recover_dense"]

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.calibration.context import check_context, check_ids
from tawny.calibration.mixture import in_words
from tawny.calibration.text import Text
from tawny.errors import Interrupted, ModelError, RecipeError
from tawny.evaluation.sources import author_of
from tawny.machine import peak_memory
from tawny.model.output import OutputFolder, check_savable
from tawny.model.resumable import WorkFolder
from tawny.model.source import load_tokenizer, resolve
from tawny.model.stack import TOKENS, Stack, live_stack
from tawny.model.structure import evaluating, input_of, predicts_tokens
from tawny.packed.convert import solved_for
from tawny.packed.opening import open_stack
from tawny.precision import native_dtype
from tawny.progress import Progress, silent
from tawny.recovery.data import read, written_tokens
from tawny.recovery.processes import Processes
from tawny.recovery.record import RecoveryRecord
from tawny.recovery.settings import Recovery
from tawny.recovery.student import LEAST_SPARSITY, Student
from tawny.recovery.teacher import check_not_own_teacher, check_teacher, check_tokenizers, is_own_teacher
from tawny.recovery.training import Training
from tawny.recovery.writing import check_apart, check_no_pruning

# What lies in OUT.recovery: states, the best weights, parts to be joined, the teacher's hidden states and their index.
_SHELVED = (
    "state*.safetensors",
    "best*.safetensors",
    "last*.safetensors",
    "teacher-*.bin",
    "teacher-*.json",
)


@dataclass(frozen=True)
class Request:
    """What is recovered, against what, into what, and how; see `recover`."""

    source: str | Path | nn.Module
    teacher: str | Path | nn.Module | None
    out: Path | None
    settings: Recovery
    progress: Progress = silent
    overwrite: bool = False
    tokenizer: Any = None
    text: Tensor | None = None
    held_out: Tensor | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)  # of each linear, where it was solved for several


def recover_dense(request: Request) -> RecoveryRecord:
    """`recover` for what is not packed."""
    before = peak_memory()
    _check_wanted(request)
    settings = request.settings
    with Processes(settings.device, shard=settings.shard) as processes, ExitStack() as ending:
        try:
            training = _open(request, processes, ending)
            training.record.memory_before = before
            failure = training.train()
            record = training.finish(failure)
        except KeyboardInterrupt as error:
            raise Interrupted(
                "stopped by Ctrl-C; the same command goes on from the last state it saved"
            ) from error
    if failure is not None:
        raise failure
    return record


def _open(request: Request, processes: Processes, ending: ExitStack) -> Training:
    """Check and open all that a training works on; `ending` cleans up, whatever happens after."""
    source, teacher, out, settings = request.source, request.teacher, request.out, request.settings
    if processes.sharded and settings.batch % processes.size:
        raise RecipeError(
            f"batch={settings.batch} among {processes.size} processes with shard=true: expected a multiple, "
            "because all of them take part in every forward"
        )
    folder = None if isinstance(source, nn.Module) else resolve(source, request.progress.say)
    work: WorkFolder | None = None
    if out is not None:
        work = WorkFolder(out, "recovery", _SHELVED, kept=("state*.safetensors",))
        check_apart(work, {"model": source, "teacher": teacher})
        if folder is None:  # a live model's run leaves nothing to go on from
            work = None
            check_savable(source)
    own = is_own_teacher(folder, teacher)
    brought = settings.method == "elsa" and settings.sparsity is not None
    rounded = settings.values is not None and not (folder and solved_for(folder)[0].names)
    check_not_own_teacher(own and not (settings.control or brought or rounded))
    stack, teacher_stack = _stacks(request, folder)
    # Dropout would make the curve depend on more than its settings.
    ending.enter_context(evaluating(stack.model))
    if teacher_stack is not None:
        check_teacher(stack, teacher_stack)
        ending.enter_context(evaluating(teacher_stack.model))
    tokenizer = request.tokenizer
    if tokenizer is None and request.text is None:
        if folder is None:
            raise ModelError(
                "a live model needs tokens to train on: give text=tokens [windows, seqlen] or tokenizer=…"
            )
        tokenizer = load_tokenizer(folder)
    dense = None if teacher is None or isinstance(teacher, nn.Module) else resolve(teacher)
    if dense is not None and folder is not None and request.text is None:
        check_tokenizers(tokenizer, load_tokenizer(dense))
    output: OutputFolder | None = None
    if out is not None and processes.first:
        check_no_pruning(out, request.overwrite)
        if work is not None:
            work.check()
        consent = request.overwrite or (work is not None and work.consent)
        output = OutputFolder(out, overwrite=consent, source=folder)
        ending.callback(output.discard)
    request.progress.say(
        f"reading {'tokens' if request.text is not None else f'text {in_words(settings.text)}'}"
    )

    def written(share: float) -> Text:
        assert teacher_stack is not None
        author = author_of(
            dense or teacher_stack.model,
            tokenizer,
            settings.seed,
            teacher_stack.compute,
            settings.device,
            group=processes,
            progress=request.progress,
        )
        return author.write(written_tokens(settings, share))

    predicts = predicts_tokens(stack.model)
    if not predicts:
        _check_encoder(stack, teacher_stack, settings)
    own_text = None if teacher_stack is None else written
    reading = read(settings, tokenizer, request.text, request.held_out, own_text, around=not predicts)
    check_ids(stack.model, reading.windows)
    student = Student(stack, settings, processes, request.kinds)
    ending.callback(student.close)
    check_not_own_teacher(own and student.sparsity >= LEAST_SPARSITY)
    training = Training(
        settings, student, teacher_stack, reading, processes, output, folder, request.progress
    )
    training.record.source = str(source) if folder else type(source).__name__
    if teacher is not None:
        training.record.teacher = str(teacher) if dense is not None else type(teacher).__name__
    training.shelve(work, request.overwrite)
    return training


def _check_encoder(stack: Stack, teacher: Stack | None, settings: Recovery) -> None:
    """Refuse what an encoder cannot be trained on or from.

    Raises:
        ModelError: it takes no tokens, or there is no dense model to learn from.
        RecipeError: windows are longer than it has positions.
    """
    if input_of(stack.model) != TOKENS:
        raise ModelError(
            f"recovery reads text, and {type(stack.model).__name__} takes {input_of(stack.model)}"
        )
    if teacher is None:
        raise ModelError(
            f"{type(stack.model).__name__} predicts no next token and so learns from the dense model alone: give --teacher DENSE, and "
            "leave kl at more than 0"
        )
    check_context(stack.model, settings.seqlen)


def _check_wanted(request: Request) -> None:
    """Refuse what cannot be done, before anything is opened."""
    live = isinstance(request.source, nn.Module)
    if request.teacher is None and request.settings.kl > 0:
        raise RecipeError(
            "recovery learns from the dense model: give --teacher DENSE, or -o kl=0 to learn from the text alone"
        )
    if request.out is None and not live:
        raise RecipeError(
            f"recovering {request.source} needs a folder to write to: give out=… (or --out DIR)"
        )
    if request.settings.shard and live:
        raise RecipeError("shard=true reads a model part by part: give a folder instead of a live module")


def _stacks(request: Request, folder: Path | None) -> tuple[Stack, Stack | None]:
    """Both models; of a teacher on disk only what lies outside its blocks is read."""
    source, teacher, settings = request.source, request.teacher, request.settings
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
    return stack, open_stack(resolve(teacher, request.progress.say), compute, str(stack.device))
