"""`tawny plan recover`: what a recovery would train, and what it would take.

What is trained is counted block by block, as the run itself would cover it. Memory is added up from shapes, and times are
multiplied out from matrix products: both are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tawny.calibration.inputs import read_inputs
from tawny.model.checkpoint import file_bytes, is_packed
from tawny.model.source import resolve
from tawny.model.structure import TOKENS, input_of, predicts_tokens
from tawny.model.trust import opens_models
from tawny.precision import measured_speed
from tawny.progress import Progress, silent
from tawny.pruning.plan import Planned, TextsAhead, forward_seconds, rounded_seconds, texts_ahead
from tawny.recovery.data import written_tokens
from tawny.recovery.dense import RecoveryRequest, check_wanted, open_models, settled, student_of
from tawny.recovery.objective import chunk_tokens
from tawny.recovery.packed import check_grid, on_its_grid
from tawny.recovery.settings import Recovery
from tawny.recovery.student import Student
from tawny.recovery.teacher import WALK_TOKENS
from tawny.run.memory import TOKENISING, base_of, peak
from tawny.words import size

# Of one token, in forwards of pruning: a step, without the head, and what the dense model writes (SmolLM2, 512 tokens a step).
_STEP, _WRITING = 9.0, 9.0
# Seconds a number: of the optimiser, and of writing it back.
_NUMBER = 3.6e-9
_MEASURING = 0.1  # of the minutes
_A_TOKEN = 4  # characters of text, about


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan(Planned):
    """What a recovery would train and take.

    Attributes:
        prunable, zeros: weights of the pruned linears, and how many of them are zero.
        trained: numbers.
        tokens, steps: that are read; about, where the minutes end it.
        written: tokens that the dense model writes first.
        memory, seconds: peak bytes of the whole process with their parts, and seconds by phase, estimated.
        disk: bytes at the peak, of the finished folder, and of the teacher's hidden states.
    """

    teacher: str | None
    settings: dict[str, Any]
    prunable: int
    zeros: int
    trained: int
    tokens: int
    steps: int
    written: int


@opens_models
def plan_recovery(
    source: str | Path,
    teacher: str | Path | None = None,
    *,
    settings: Recovery | Mapping[str, Any] | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    **keys: Any,
) -> RecoveryPlan:
    """What `recover` would do with the same arguments.

    Args:
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        UserError: as `recover` would, for everything that can be known without a step.
    """
    chosen = Recovery.make(settings, **keys)
    folder = resolve(source, progress.say)
    check_grid(chosen, folder)
    chosen, kinds = on_its_grid(chosen, folder, progress)
    request = RecoveryRequest(folder, teacher, None, chosen, progress, kinds=kinds)
    check_wanted(request)
    stack, dense = open_models(request, folder)
    seqlen = chosen.seqlen
    if input_of(stack.model) != TOKENS:
        one, _ = read_inputs(stack, folder, chosen.text, 1, chosen.seed, strict=chosen.strict)
        seqlen = one.seqlen
        ahead = TextsAhead(fetched=chosen.text)
    else:
        author = None if dense is None or teacher is None else resolve(teacher)
        ahead = texts_ahead(chosen.text, folder, author, chosen.seed, stack.compute)
    chosen = settled(chosen, stack, seqlen)
    student = student_of(request, chosen, stack, dense, counts=True)
    work = _Work(student, ahead, teaches=dense is not None)
    most, parts = peak(work, spill=False)
    checkpoint = stack.checkpoint
    assert checkpoint is not None
    dense_bytes = checkpoint.bytes_in(None)
    out = file_bytes(folder) if is_packed(folder) else dense_bytes
    states = 2 * work.read * stack.hidden_bytes // stack.compute.itemsize if work.teaches else 0
    # The state to go on from and the best weights, and the next ones before these are deleted.
    meanwhile = states + 4 * 4 * student.trained + out
    notes = ahead.notes
    if is_packed(folder):
        meanwhile += 2 * dense_bytes
        notes.append(f"it is unpacked first, and packed again at the end: twice {size(dense_bytes)} of disk")
    return RecoveryPlan(
        source=str(source),
        teacher=None if teacher is None else str(teacher),
        settings=chosen.to_mapping(),
        parameters=sum(p.numel() for p in stack.model.parameters()),
        prunable=student.prunable,
        zeros=sum(student.zeros.values()),
        trained=student.trained,
        tokens=work.tokens,
        steps=work.steps,
        written=work.written,
        memory={"peak": most, **parts},
        disk={"peak": meanwhile, "checkpoint": out, "hidden_states": states},
        seconds=work.seconds(),
        notes=notes,
    )


class _Work:
    """A recovery as far as time and memory are concerned."""

    def __init__(self, student: Student, ahead: TextsAhead, *, teaches: bool) -> None:
        self.student, self.stack, self.settings = student, student.stack, student.settings
        self.ahead, self.teaches = ahead, teaches
        settings, stack = self.settings, self.stack
        self.forward = forward_seconds(stack)
        self.vocabulary = 0
        if predicts_tokens(stack.model):
            self.vocabulary = int(stack.config.get_text_config().vocab_size)
        width = stack.hidden_bytes // stack.compute.itemsize
        self.head = 2.0 * self.vocabulary * width / measured_speed(stack.compute)
        self.written = written_tokens(settings, ahead.written) if ahead.author else 0
        self.tokens = settings.steps * settings.batch * settings.seqlen
        here = math.inf if ahead.fetched else self.written + ahead.characters / _A_TOKEN
        if settings.minutes is not None:
            # What is read again was seen by the teacher before.
            room = (1 - _MEASURING) * 60 * settings.minutes
            taught = self.forward * self.teaches
            once = room / (self._a_token + taught)
            again = (room - here * taught) / self._a_token if once > here else 0.0
            self.tokens = min(self.tokens, math.floor(max(min(once, here), again)))
        a_step = settings.batch * settings.seqlen
        self.steps = max(1, round(self.tokens / a_step))
        self.tokens = self.steps * a_step
        self.read = math.floor(min(self.tokens, max(here, a_step)))

    @property
    def _a_token(self) -> float:
        """Seconds of a step for one of its tokens."""
        settings = self.settings
        products = (_STEP + settings.checkpointing) * self.forward + (2 + self.teaches) * self.head
        return products + self.student.trained * _NUMBER / (settings.batch * settings.seqlen)

    def seconds(self) -> dict[str, float]:
        settings = self.settings
        measured = 1 + self.steps // settings.eval_every
        measuring = settings.eval_windows * settings.seqlen * measured * 2 * (self.forward + self.head)
        if settings.minutes is not None:
            measuring = min(measuring, _MEASURING * 60 * settings.minutes)
        return rounded_seconds(
            {
                "writing": self.written * _WRITING * self.forward,
                "teacher": self.read * self.forward * self.teaches,
                "training": self.tokens * self._a_token,
                "measuring": measuring,
            }
        )

    def phases(self, *, spill: bool) -> dict[str, dict[str, int]]:
        """Bytes by part; `spill` changes nothing: hidden states of the teacher are on disk."""
        stack, settings, student = self.stack, self.settings, self.student
        base, itemsize = base_of(stack), stack.compute.itemsize
        blocks = [sum(p.numel() for p in block.parameters()) for block in stack.blocks]
        weights = itemsize * sum(blocks)
        values = student.held_bytes - 12 * student.trained  # gradients and moments come with the first step
        walked = min(WALK_TOKENS, max(self.read, settings.eval_windows * settings.seqlen))
        a_forward = (settings.micro_batch or settings.batch) * settings.seqlen
        # Every linear keeps its input and gives an output, and about as much again is kept between them.
        kept = [
            2
            * a_forward
            * stack.positions_at(i)
            * sum(stack.routed(x) * sum(x.shape) for x in stack.linears(i))
            for i in range(len(stack))
        ]
        activations = math.ceil(itemsize * (max(kept) if settings.checkpointing else sum(kept)))
        if settings.checkpointing:
            activations += len(stack) * a_forward * stack.hidden_bytes
        chunk = min(a_forward, chunk_tokens(self.vocabulary, settings.chunk)) if self.vocabulary else 0
        phases = {
            "text": {**base, "text": self.ahead.characters * TOKENISING},
            "step": {
                **base,
                "model": weights,
                "head": stack.late_bytes,
                "trained": student.held_bytes,
                "activations": activations,
                "logits": 3 * chunk * self.vocabulary * itemsize,
            },
        }
        if self.ahead.author:
            phases["writing"] = {**base, "author": self.ahead.author}
        if self.teaches:
            phases["teacher"] = {
                **base,
                "model": weights,
                "trained": values,
                "block": 2 * itemsize * max(blocks),
                "hidden_states": walked * stack.hidden_bytes,
            }
        return phases
