"""Recover a dense folder or a live model: check everything that can be checked before work, train, write, clean up."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tawny.calibration.inputs import processor_for
from tawny.calibration.mixture import in_words
from tawny.calibration.text import Text
from tawny.calibration.windows import SEED_APART
from tawny.decoding.author import author_of
from tawny.errors import Interrupted, ModelError, RecipeError
from tawny.machine import free_memory, peak_memory
from tawny.model.context import check_context, check_ids
from tawny.model.source import load_tokenizer, resolve
from tawny.model.stack import Stack, live_stack
from tawny.model.streams import Samples
from tawny.model.structure import PIXELS, TOKENS, evaluating, input_of, predicts_tokens
from tawny.packed.convert import solved_for
from tawny.packed.opening import open_stack
from tawny.precision import compute_dtype
from tawny.progress import Progress, silent
from tawny.recovery.crops import crops_of
from tawny.recovery.data import Reading, check_given, read, read_given, written_tokens
from tawny.recovery.record import RecoveryRecord
from tawny.recovery.settings import SEEING_RATE, Recovery
from tawny.recovery.student import LEAST_SPARSITY, Student
from tawny.recovery.teacher import check_not_own_teacher, check_teacher, check_tokenizers, is_own_teacher
from tawny.recovery.training import Training
from tawny.run.place import Workplace, models_read, unfinished
from tawny.run.run import Clock
from tawny.run.writer import check_savable
from tawny.words import size

_STEP_BYTES = 12  # of a trained number, from the first step on: its gradient and two moments


@dataclass(frozen=True)
class RecoveryRequest:
    """What is recovered, against what, into what, and how; see `recover`."""

    source: str | Path | nn.Module
    teacher: str | Path | nn.Module | None
    out: Path | None
    settings: Recovery
    progress: Progress = silent
    overwrite: bool = False
    tokenizer: Any = None
    text: Tensor | Mapping[str, Tensor] | None = None
    held_out: Tensor | Mapping[str, Tensor] | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)  # of each linear, where it was solved for several


def recover_dense(request: RecoveryRequest) -> RecoveryRecord:
    """`recover` for what is not packed; of a loss that became NaN the record knows, once a better model is written."""
    before = peak_memory()
    check_wanted(request)
    if request.out is None and not isinstance(request.source, nn.Module):
        raise RecipeError(
            f"recovering {request.source} needs a folder to write to: give out=… (or --out DIR)"
        )
    with ExitStack() as ending:
        try:
            training = _open(request, ending)
            training.record.memory_before = before
            training.train()
            record = training.finish()
        except KeyboardInterrupt as error:
            left = "this training has saved no state yet, and the same command begins it anew"
            if request.out is not None and any((unfinished(request.out) / "steps").glob("training/state*")):
                left = "the same command goes on from the last state it saved"
            if isinstance(request.source, nn.Module):
                left = "the model has the best weights measured so far, and the same call begins anew"
            raise Interrupted(f"stopped by Ctrl-C; {left}") from error
    return record


def _open(request: RecoveryRequest, ending: ExitStack) -> Training:
    """Check and open all that a training works on; `ending` cleans up, whatever happens after."""
    source, teacher, out, settings = request.source, request.teacher, request.out, request.settings
    folder = None if isinstance(source, nn.Module) else resolve(source, request.progress.say)
    place = None if out is None else Workplace(out)
    if place is not None:
        if folder is None:
            check_savable(source)
        ending.enter_context(place)
        reads = models_read(model=source, teacher=teacher)
        # A live model's run leaves nothing to go on from.
        place.claim(overwrite=request.overwrite, reads=reads, continues=folder is not None)
    stack, teacher_stack = open_models(request, folder)
    # Dropout would make the curve depend on more than its settings.
    ending.enter_context(evaluating(stack.model))
    if teacher_stack is not None:
        ending.enter_context(evaluating(teacher_stack.model))
    dense = None if teacher is None or isinstance(teacher, nn.Module) else resolve(teacher)
    reader = _reader(request, stack, folder, dense)
    clock = Clock()
    with clock("text"):
        reading = _reading(request, stack, teacher_stack, dense, reader)
    settings = settled(settings, stack, reading.seqlen)
    student = student_of(request, settings, stack, teacher_stack)
    ending.callback(student.close)
    _tell_memory(student, settings, request.progress)
    training = Training(settings, student, teacher_stack, reading, place, folder, request.progress, clock)
    training.record.source = str(source) if folder else type(source).__name__
    if teacher is not None:
        training.record.teacher = str(teacher) if dense is not None else type(teacher).__name__
    training.shelve()
    ending.push(lambda _, error, __: training.give_up(error))
    return training


def open_models(request: RecoveryRequest, folder: Path | None) -> tuple[Stack, Stack | None]:
    """Both models, checked against each other."""
    settings = request.settings
    rounded = settings.values is not None and not (folder and solved_for(folder)[0].names)
    check_not_own_teacher(is_own_teacher(folder, request.teacher) and not (settings.control or rounded))
    stack, teacher = _stacks(request, folder)
    if teacher is not None:
        check_teacher(stack, teacher)
    if not predicts_tokens(stack.model):
        _check_encoder(stack, teacher)
    return stack, teacher


def settled(settings: Recovery, stack: Stack, seqlen: int) -> Recovery:
    """The settings with what the model decides: its rate, and how long samples are that are not made of tokens."""
    slow = settings.lr is None and settings.method.weights == "trained" and input_of(stack.model) == PIXELS
    width = next((linear.shape[1] for i in range(len(stack)) for linear in stack.linears(i)), 0)
    return Recovery.make(settings, seqlen=seqlen, lr=SEEING_RATE if slow else settings.rate_for(width))


def student_of(
    request: RecoveryRequest, settings: Recovery, stack: Stack, teacher: Stack | None, *, counts: bool = False
) -> Student:
    """What is trained, or only counted."""
    # Whole experts may have left, and no zero with them.
    smaller = teacher is not None and _weights(stack) < _weights(teacher)
    how: dict[str, Any] = {"smaller": smaller, "counts": counts, "progress": request.progress}
    student = Student(stack, settings, request.kinds, **how)
    folder = None if isinstance(request.source, nn.Module) else resolve(request.source)
    check_not_own_teacher(is_own_teacher(folder, request.teacher) and student.sparsity >= LEAST_SPARSITY)
    return student


def _weights(stack: Stack) -> int:
    return sum(parameter.numel() for parameter in stack.model.parameters())


def _tell_memory(student: Student, settings: Recovery, progress: Progress) -> None:
    """Say before any forward if gradients and moments do not fit: the first step makes them, after the teacher's walk."""
    free = free_memory(student.stack.device)
    if free is None:
        return
    needed = _STEP_BYTES * student.trained
    if needed > free:
        less = "; -o checkpointing=true takes less of what comes beside them"
        if settings.method.weights == "trained" and not settings.values:
            less = "; -o train=lora or -o train=norms takes less"
        progress.say(
            f"gradients and moments will take {size(needed)}, and {size(free)} of memory are free{less}"
        )


def _reader(request: RecoveryRequest, stack: Stack, folder: Path | None, dense: Path | None) -> Any:
    """The tokenizer of a model that reads, or the image processor of one that sees; None where tensors were given."""
    if request.text is not None:
        return request.tokenizer
    if input_of(stack.model) != TOKENS:
        return processor_for(stack, folder, request.settings.text, request.tokenizer)
    tokenizer = request.tokenizer
    if tokenizer is None:
        if folder is None:
            raise ModelError(
                "a live model needs tokens to train on: give text=tokens [windows, seqlen] or tokenizer=…"
            )
        tokenizer = load_tokenizer(folder)
    if dense is not None and folder is not None:
        check_tokenizers(tokenizer, load_tokenizer(dense))
    return tokenizer


def _reading(
    request: RecoveryRequest,
    stack: Stack,
    teacher: Stack | None,
    dense: Path | None,
    reader: Any,
) -> Reading:
    """What is trained on and measured on, checked against what the model takes."""
    settings, say = request.settings, request.progress.say
    predicts, taken = predicts_tokens(stack.model), input_of(stack.model)
    if isinstance(request.text, Mapping):
        if predicts:
            raise ModelError(
                f"{type(stack.model).__name__} is trained on tokens alone: give text=tokens [windows, seqlen]"
            )
        say(f"reading {', '.join(request.text)}")
        held = request.held_out
        reading = read_given(
            settings,
            _samples("text", request.text, stack),
            None if held is None else _samples("held_out", held, stack),
        )
    elif request.text is None and taken != TOKENS:
        if request.held_out is not None:
            raise ModelError(
                "held_out goes with tensors, and of pictures some files are held out: leave it out"
            )
        say(f"reading pictures {in_words(settings.text)}")
        return crops_of(settings, reader, lambda pixels: stack.positions({taken: pixels}), say)
    else:
        if isinstance(request.held_out, Mapping) or taken != TOKENS:
            raise ModelError(
                f"{type(stack.model).__name__} takes {taken}: give text={{{taken!r}: tensor}}, and held_out alike"
            )
        say(f"reading {'tokens' if request.text is not None else f'text {in_words(settings.text)}'}")
        if not predicts:
            check_context(stack.model, settings.seqlen)

        def written(share: float) -> Text:
            assert teacher is not None
            model, say = dense or teacher.model, request.progress
            # Calibration has the same seed as a rule, and windows that it read say nothing when held out.
            seed = settings.seed + SEED_APART + SEED_APART // 2  # and not what is measured on
            author = author_of(model, reader, seed, teacher.compute, settings.device, progress=say)
            return author.write(written_tokens(settings, share))

        own = None if teacher is None else written
        reading = read(settings, reader, request.text, request.held_out, own, around=not predicts)
    if TOKENS in reading.samples.inputs:
        check_context(stack.model, reading.seqlen)
        check_ids(stack.model, reading.samples.tokens)
    return reading


def _samples(name: str, given: Tensor | Mapping[str, Tensor], stack: Stack) -> Samples:
    """Tensors by name; raises a ModelError where what the model takes is not among them."""
    named = given if isinstance(given, Mapping) else {TOKENS: given}
    if (taken := input_of(stack.model)) not in named:
        raise ModelError(
            f"{type(stack.model).__name__} takes {taken}, and {', '.join(named)} was given: give {{{taken!r}: tensor}}"
        )
    if TOKENS in named:
        check_given(name, named[TOKENS])
    return Samples(named, seqlen=None if TOKENS in named else stack.positions(named))


def _check_encoder(stack: Stack, teacher: Stack | None) -> None:
    """Raise a ModelError for an encoder without a dense model to learn from."""
    if len(stack.structure.starts) > 1:
        raise ModelError(
            f"{type(stack.model).__name__} is a model of several stacks, which is not trained here: train it in a loop of your own "
            "within tawny.keep_sparsity"
        )
    if teacher is None:
        raise ModelError(
            f"{type(stack.model).__name__} predicts no next token and so learns from the dense model alone: give --teacher DENSE, and "
            "leave kl at more than 0"
        )


def check_wanted(request: RecoveryRequest) -> None:
    """Refuse what cannot be done, before anything is opened."""
    if request.teacher is None and request.settings.kl > 0:
        raise RecipeError(
            "recovery learns from the dense model: give --teacher DENSE, or -o kl=0 to learn from the text alone"
        )


def _stacks(request: RecoveryRequest, folder: Path | None) -> tuple[Stack, Stack | None]:
    """Both models; of a teacher on disk only what lies outside its blocks is read."""
    source, teacher, settings = request.source, request.teacher, request.settings
    compute = compute_dtype(settings.compute, settings.device)
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
