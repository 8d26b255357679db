"""Train a pruned model until it is good again, without losing a zero. This file is the job; read it from `recover` down.

Masked distillation: the survivors learn from next-token loss plus the KL to the dense model over the full vocabulary
(as in PERP, 2312.15230, only the mask is fixed; and as in distillation-aware pruning, the dense model is the teacher). The
teacher's hidden states come from disk (teacher.py), logits exist for a chunk of tokens (objective.py), the optimiser knows
survivors alone (coordinates.py). A run that is stopped goes on from its last state to the same curve (state.py).
"""

from __future__ import annotations

__all__ = ["RecoveryRecord", "recover"]

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.errors import Interrupted, ModelError, NumericalError, RecipeError
from tawny.machine import machine, peak_memory, versions
from tawny.model.blocks import Stack, live_stack, open_stack
from tawny.model.checkpoint import is_packed
from tawny.model.output import OutputFolder
from tawny.model.source import load_tokenizer, resolve
from tawny.model.structure import evaluating
from tawny.precision import native_dtype
from tawny.pruning.journal import model_identity
from tawny.record import Clock, finite
from tawny.recovery.data import Reading, check_ids, read
from tawny.recovery.elsa import Elsa
from tawny.recovery.objective import Losses, chunk_tokens, distil
from tawny.recovery.processes import Processes
from tawny.recovery.settings import Recovery
from tawny.recovery.state import Progress, Shelf
from tawny.recovery.student import LEAST_SPARSITY, Student
from tawny.recovery.teacher import WALK_TOKENS, Teacher, check_teacher, check_tokenizers
from tawny.recovery.workfolder import (
    WorkFolder,
    about_model,
    check_apart,
    check_not_own_teacher,
    is_own_teacher,
)
from tawny.recovery.writing import card, check_no_pruning, tell_run, write
from tawny.watch import Watch, silent

_BETAS = (0.9, 0.95)
_FINAL = 0.02  # of the peak learning rate, at the end of the cosine
# What lies in OUT.recovery: states, the best weights, parts to be joined, the teacher's hidden states and their index.
_SHELVED = (
    "state*.safetensors",
    "best*.safetensors",
    "last*.safetensors",
    "teacher-*.bin",
    "teacher-*.json",
    "teacher-*.new",
)


@dataclass
class RecoveryRecord:
    """What `recover.json` holds; a number that is not finite is null there.

    Attributes:
        sparsity, zeros: after training; never fewer zeros than before.
        start, best: measurements on the held-out windows; `best` is of what was written.
        tokens_per_second: of the training steps alone.
        stopped: why it ended: tokens, minutes, patience, or nan.
        stages: of a gradual recovery, one a sparsity.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    teacher: str | None = None
    out: str | None = None
    text: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    compute: str = ""
    sparsity: float = 0.0
    zeros: int = 0
    zeros_before: int = 0
    prunable: int = 0
    trained: int = 0
    steps: int = 0
    tokens: int = 0
    start: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    measured: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    teacher_tokens: int = 0
    teacher_bytes: int = 0
    processes: int = 1
    peak_memory: int = 0
    memory_before: int = 0
    bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> RecoveryRecord:
        """From a `recover.json`; what is null there is NaN here, since infinity and NaN cannot be told apart."""
        told = cls(**json.loads(path.read_text(encoding="utf-8")))
        for entry in (told.start, told.best, *told.measured, *told.curve):
            entry.update({key: math.nan for key, value in entry.items() if value is None})
        return told


def recover(
    source: str | Path | nn.Module,
    teacher: str | Path | nn.Module | None = None,
    out: str | Path | None = None,
    *,
    settings: Recovery | Mapping[str, Any] | None = None,
    watch: Watch = silent,
    overwrite: bool = False,
    tokenizer: Any = None,
    text: Tensor | str | None = None,
    held_out: Tensor | None = None,
    **keys: Any,
) -> RecoveryRecord:
    """Train what pruning left, on a text and against the dense model, with every zero staying zero.

    Args:
        source: a pruned folder, dense or packed (then so is `out`); or a live module, which is trained in place.
        teacher: the dense model, as a folder, hub id, `.gguf` file, `smollm2` or live module; None only with `kl=0`.
        out: folder to write; needed for a path, optional for a live module.
        settings: how; `keys` override single entries (`minutes=30, lr=2e-4, train="lora"`).
        watch: told about progress.
        overwrite: replace an existing `out` once the new one is complete, and discard an unfinished run, unless it is
            this same one, which goes on.
        tokenizer: for a live module and a text.
        text: name or path of a text, or tokens `[windows, seqlen]`.
        held_out: tokens `[windows, seqlen]` to measure on, with tokens to train on.

    Raises:
        UserError: something asked for cannot be done; one line says what can.
        NumericalError: the loss became NaN; the best model so far is written, if any was better than the start.
        Interrupted: the user pressed Ctrl-C; the same command goes on.
    """
    if isinstance(text, str):
        keys["text"] = text
    chosen = Recovery.make(settings, **keys)
    given = text if isinstance(text, Tensor) else None
    if given is not None and given.dim() == 2:
        chosen = Recovery.make(chosen, seqlen=int(given.shape[1]))
    if (
        out is not None
        and not isinstance(source, nn.Module)
        and is_packed(folder := resolve(source, watch.say))
    ):
        from tawny.recovery.packed import recover_packed

        return recover_packed(source, folder, teacher, Path(out), chosen, watch, overwrite, given, held_out)
    with _open_run(chosen, source, teacher, out, watch, overwrite, tokenizer, given, held_out) as run:
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
    watch: Watch,
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
        folder = None if isinstance(source, nn.Module) else resolve(source, watch.say)
        if out is not None:
            work = WorkFolder(Path(out), "recovery", _SHELVED, kept=("state*.safetensors",))
            check_apart(Path(out), [work], {"model": source, "teacher": teacher})
            if folder is None:  # a live model's run leaves nothing to go on from
                work = None
        own = is_own_teacher(folder, teacher)
        brought = settings.method == "elsa" and settings.sparsity is not None
        check_not_own_teacher(own and not settings.control and not brought)
        stack, teacher_stack = _stacks(settings, source, folder, teacher, watch)
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
        watch.say(f"reading {'tokens' if text is not None else f'text {settings.text}'}")
        reading = read(settings, tokenizer, text, held_out)
        check_ids(reading, int(stack.config.get_text_config().vocab_size))
        student = Student(stack, settings, processes)
        check_not_own_teacher(own and student.sparsity >= LEAST_SPARSITY)
        run = Run(settings, student, teacher_stack, reading, processes, output, watch)
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
    watch: Watch,
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
    return stack, open_stack(resolve(teacher, watch.say), compute, str(stack.device))


def _reserve(out: Path, overwrite: bool, folder: Path | None, work: WorkFolder | None) -> OutputFolder:
    """The folder to write to, ours until the end."""
    check_no_pruning(out, overwrite)
    if work is not None:
        work.check()
        overwrite = overwrite or work.consent
    return OutputFolder(out, overwrite=overwrite, source=folder)


class Run:
    """One recovery: what it works on, and where it stands."""

    def __init__(
        self,
        settings: Recovery,
        student: Student,
        teacher: Stack | None,
        reading: Reading,
        processes: Processes,
        output: OutputFolder | None,
        watch: Watch,
    ) -> None:
        self.settings, self.student, self.reading = settings, student, reading
        self.processes, self.output, self.watch = processes, output, watch
        self._teacher_stack = teacher
        self.teacher: Teacher | None = None
        self.shelf = Shelf(None, "")
        self._work: WorkFolder | None = None
        self.source = ""
        self.folder: Path | None = None
        self.clock = Clock()
        self.progress = Progress()
        self.steps = settings.steps
        self._begun = time.perf_counter()
        self._resumed = 0
        vocabulary = int(student.stack.config.get_text_config().vocab_size)
        self.chunk = chunk_tokens(vocabulary, settings.chunk)
        decayed = [t for c in student.coordinates if c.decays for t in c.tensors.values()]
        others = [t for c in student.coordinates if not c.decays for t in c.tensors.values()]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        fused = student.stack.device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=_BETAS,
            fused=fused,
        )
        self.tensors = decayed + others
        self._parts = [t for c in student.coordinates if c.sharded for t in c.tensors.values()]
        self._whole = [t for c in student.coordinates if not c.sharded for t in c.tensors.values()]
        self.elsa = Elsa(student, settings, self.optimiser) if settings.method == "elsa" else None
        self.record = RecoveryRecord(
            settings=settings.to_mapping(),
            text=reading.about,
            versions=versions(),
            machine=machine(),
            compute=str(student.stack.compute).removeprefix("torch."),
            zeros_before=sum(student.zeros.values()),
            prunable=student.prunable,
            trained=self._count_trained(),
            processes=processes.count,
        )

    def shelve(self, folder: WorkFolder | None, overwrite: bool) -> None:
        """Find the state of an earlier run, and the teacher's hidden states it made."""
        model = None if self.folder is None else model_identity(self.folder)
        teacher = self._teacher_stack
        dense = model_identity(teacher.checkpoint.folder) if teacher and teacher.checkpoint else None
        tokens = self.reading.about["tokens_sha256"]
        self._work = folder
        work = None if folder is None else folder.path
        if folder is not None:
            identity = {
                "settings": self.settings.to_mapping(),
                "model": about_model(self.folder),
                "teacher": about_model(teacher.checkpoint.folder if teacher and teacher.checkpoint else None),
                "text": tokens,
                "processes": self.processes.count,
            }
            self.processes.once(lambda: folder.open(identity, overwrite))
        key = self.settings.fingerprint(model, dense, tokens, self.processes.count)
        self.shelf = Shelf(work, key, self.processes if self.processes.sharded else None)
        if found := self.shelf.load(self.student.coordinates, self.optimiser, self.elsa):
            self.progress, self._resumed = found, found.step
            for one in self.student.coordinates:
                one.write()
            self.watch.say(
                f"going on after step {found.step} of {self.steps}; remove {work} to start over instead"
            )
        if teacher is not None:
            cache = None if work is None else work / f"teacher-{self.processes.rank}.bin"
            name = self.settings.fingerprint(dense, tokens)
            self.teacher = Teacher(teacher, self.reading.windows, cache, name)
            self.teacher.share(self.student.stack)

    # --- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> NumericalError | None:
        """Step until the budget is spent; an error that leaves something worth writing is returned, not raised."""
        timed = self.settings.minutes is not None
        self._ticks = _Ticks(self.watch, 100 if timed else self.steps, "percent" if timed else "steps")
        self._ticks.to(self._share())
        if not self.progress.measured:
            self._measure(0.0)
        with _stopping(self.watch) as stop:
            while (reason := self._over()) is None:
                try:
                    self._step()
                except NumericalError as error:
                    if self.progress.best is None or self.progress.best["step"] == 0:
                        raise
                    self.record.stopped = "nan"
                    self.record.warnings.append(str(error))
                    return error
                at = self.progress.step
                over = self._over()
                if over:
                    self._come_to_rest()
                if at % self.settings.eval_every == 0 or over in ("tokens", "minutes"):
                    self._measure(1.0 if over else self._share())
                if self.processes.agree(float(stop.is_set())):
                    self._save()
                    raise Interrupted(
                        f"stopped by Ctrl-C after step {self.progress.step}; the same command goes on from there"
                    )
                if at % self.settings.eval_every == 0 and not over:
                    self._save()
                self._ticks.to(self._share())
        if self._come_to_rest():  # the minutes ended between two steps
            self._measure(1.0)
        self.record.stopped = reason
        return None

    def _come_to_rest(self) -> bool:
        """Settle a mask that still moves when the budget is spent, since only a model with its zeros can be written."""
        if self.elsa is None or self.elsa.settled:
            return False
        self.elsa.project()
        self.elsa.settle()
        for one in self.student.coordinates:
            one.write()
        if self.settings.settle:
            self.record.warnings.append(
                f"the mask came to rest only at the end, without the last {self.settings.settle:.0%} of training behind it: "
                "give more --tokens or --minutes, or a larger -o settle"
            )
        return True

    def _over(self) -> str | None:
        settings, progress = self.settings, self.progress
        if progress.step >= self.steps:
            return "tokens"
        if settings.minutes is not None and self._elapsed() >= settings.minutes * 60:
            return "minutes"
        moving = self.elsa is not None and not self.elsa.settled
        if settings.patience and progress.stale >= settings.patience and not moving:
            return "patience"
        return None

    def _elapsed(self) -> float:
        return self.processes.agree(self.progress.seconds + time.perf_counter() - self._begun)

    def _share(self, ahead: int = 0) -> float:
        """How much of the run is over, by whichever budget ends first."""
        share = (self.progress.step + ahead) / self.steps
        if self.settings.minutes is not None:
            share = max(share, self._elapsed() / (60 * self.settings.minutes))
        return min(share, 1.0)

    def _rate(self, share: float) -> float:
        """Linear warm-up, then a cosine down to a fiftieth."""
        settings = self.settings
        if share < settings.warmup:
            return settings.learning_rate * share / settings.warmup
        phase = (share - settings.warmup) / max(1e-9, 1.0 - settings.warmup)
        return settings.learning_rate * (_FINAL + (1 - _FINAL) * 0.5 * (1 + math.cos(math.pi * phase)))

    def _step(self) -> None:
        settings, progress = self.settings, self.progress
        self._ask_teacher()
        share = self._share(ahead=1)
        rate = self._rate(share)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with self.clock("train"):
            losses = self._gradients(self.processes.share(self.reading.rows(progress.step)))
            gradients = [t.grad for t in self._whole if t.grad is not None]
            self.processes.add(gradients)
            losses = self.processes.add_losses(losses)
            if self.elsa is not None:
                self.elsa.before_step()
            norm = self.processes.clip(self._whole, self._parts, settings.clip)
            loss = (losses.next_token * (1 - self._kl) + losses.kl * self._kl) / losses.tokens
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NumericalError(
                    f"the loss became {loss} (gradient norm {norm}) at step {progress.step + 1} with a learning rate of "
                    f"{rate:.3g}; {self._kept()}: try a smaller --lr than {settings.learning_rate:g}"
                )
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            progress.step += 1
            if self.elsa is not None:
                self.elsa.after_step(progress.step, share)
            for one in self.student.coordinates:
                one.write()
        entry = {
            "step": progress.step,
            "tokens": progress.step * settings.batch * settings.seqlen,
            "lr": rate,
            "loss": losses.next_token / losses.tokens,
            "kl": losses.kl / losses.tokens,
            "norm": norm,
        }
        progress.curve.append(entry)
        shown = f"loss {entry['loss']:.3f}, KL {entry['kl']:.3f}" if self._kl else f"loss {entry['loss']:.3f}"
        self.watch.detail(shown, 0, 0)

    @property
    def _kl(self) -> float:
        return self.settings.kl if self.teacher is not None else 0.0

    def _kept(self) -> str:
        best = self.progress.best
        if best is None or best["step"] == 0:
            return "nothing better than the start was reached, and nothing is written"
        return f"the best model so far, of step {best['step']:.0f}, is kept"

    def _gradients(self, rows: list[int]) -> Losses:
        """Losses of this process's windows, their gradients left with the coordinates."""
        settings = self.settings
        total = Losses()
        micro = settings.micro_batch or len(rows)
        scale = 1.0 / (settings.batch * (settings.seqlen - 1))
        for start in range(0, len(rows), max(1, micro)):
            some = rows[start : start + micro]
            ids_BT = self.reading.windows[some]
            hidden_BTH = self.student.hidden(ids_BT)
            losses, gradient_BTH = self._distil(ids_BT, hidden_BTH, some, scale)
            total.add(losses)
            if gradient_BTH is not None:
                if self.processes.sharded:  # whose gradients are averaged
                    gradient_BTH *= self.processes.count
                torch.autograd.backward([hidden_BTH], [gradient_BTH])
        return total

    def _distil(
        self, ids_BT: Tensor, hidden_BTH: Tensor, rows: list[int], scale: float | None
    ) -> tuple[Losses, Tensor | None]:
        teacher = self.teacher
        return distil(
            self.student.stack.tail,
            None if teacher is None else teacher.logits,
            ids_BT,
            hidden_BTH,
            None if teacher is None else teacher.hidden(rows),
            kl=self._kl,
            chunk=self.chunk,
            scale=scale,
        )

    def _ask_teacher(self) -> None:
        """Have the hidden states of this step's windows; if any are missing, those of the next steps too."""
        if self.teacher is None:
            return
        now = self.processes.share(self.reading.rows(self.progress.step))
        if not self.processes.any(bool(self.teacher.missing(now))):
            return
        ahead = max(1, WALK_TOKENS // (max(1, len(now)) * self.settings.seqlen))
        ahead = min(ahead, self.steps - self.progress.step, self._steps_left())
        wanted = [
            row
            for step in range(self.progress.step, self.progress.step + ahead)
            for row in self.processes.share(self.reading.rows(step))
        ]
        self._make(wanted)

    def _steps_left(self) -> int:
        """As many as the minutes that are left allow at the speed so far; what is made early changes no result."""
        if self.settings.minutes is None or not self.clock.seconds.get("train"):
            return self.steps
        done = max(1, len(self.progress.curve))
        each = self._elapsed() / done
        return max(1, math.ceil((self.settings.minutes * 60 - self._elapsed()) / each))

    def _make(self, rows: list[int]) -> None:
        assert self.teacher is not None
        before, made = time.perf_counter(), self.teacher.tokens_made
        with self.clock("teacher"):
            self.teacher.make(rows, self.watch)
        self.progress.teacher_seconds += time.perf_counter() - before
        self.progress.teacher_tokens += self.teacher.tokens_made - made

    @torch.no_grad()
    def _measure(self, share: float) -> None:
        """Perplexity, KL and agreement on the held-out windows; the best weights are kept."""
        progress = self.progress
        everything = self.reading.held_out
        rows = self.processes.share(everything)
        if self.teacher is not None:
            self._make(rows)
        with (
            self.clock("measure"),
            self.elsa.projected() if self.elsa is not None and self._moving else nullcontext(),
        ):
            total = Losses()
            size = self.settings.micro_batch or self.settings.batch
            for turn in range(self.processes.rounds(everything, size)):
                some = rows[turn * size : (turn + 1) * size]
                if not some:  # the others' forwards gather this process's rows
                    self.student.hidden(self.reading.windows[everything[:1]])
                    continue
                ids_BT = self.reading.windows[some]
                total.add(self._distil(ids_BT, self.student.hidden(ids_BT), some, None)[0])
            total = self.processes.add_losses(total)
        mean = total.next_token / total.tokens
        entry = {
            "step": float(progress.step),
            "seconds": round(self._elapsed(), 1),
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "loss": mean,
        }
        if self.teacher is not None:
            entry |= {"kl": total.kl / total.tokens, "top1": total.agree / total.tokens}
        progress.measured.append(entry)
        first = progress.measured[0]
        line = f"step {progress.step}: held-out perplexity {entry['perplexity']:.2f}"
        line += f" (from {first['perplexity']:.2f})" if progress.step else ""
        if "kl" in entry:
            line += f", KL {entry['kl']:.3f}, top-1 {entry['top1']:.1%}"
        self.watch.say(line)
        if self._moving:
            return  # a mask that still moves is not a model
        if progress.best is None or entry["perplexity"] < progress.best["perplexity"]:
            progress.best, progress.stale = entry, 0
            if self._keeps:
                self.shelf.keep_best(self.student.coordinates)
        else:
            progress.stale += 1

    @property
    def _moving(self) -> bool:
        return self.elsa is not None and not self.elsa.settled

    def _save(self) -> None:
        self.progress.seconds = self._elapsed()
        self._begun = time.perf_counter()
        if self.processes.first or self.processes.sharded:
            with self.clock("save"):
                self.shelf.save(self.progress, self.student.coordinates, self.optimiser, self.elsa)

    # --- the end -----------------------------------------------------------------------------------------------

    def finish(self, failure: NumericalError | None) -> RecoveryRecord:
        """Go back to the best weights, count the zeros, write."""
        record, progress = self.record, self.progress
        if (
            self._keeps
            and progress.best is not None
            and (failure is not None or progress.best["step"] != progress.step)
        ):
            self.shelf.restore_best(self.student.coordinates)
        if progress.best is not None and progress.best["step"] == 0 and progress.step:
            record.warnings.append(
                f"no measurement was better than the start, so the model is unchanged: try another --lr than "
                f"{self.settings.learning_rate:g}, or more text"
            )
        record.source = self.source
        record.zeros = self.student.count_zeros()
        record.sparsity = record.zeros / record.prunable
        record.steps = progress.step
        record.tokens = progress.step * self.settings.batch * self.settings.seqlen
        record.start = progress.measured[0]
        record.best = progress.best or progress.measured[-1]
        record.measured, record.curve = progress.measured, progress.curve
        record.teacher_tokens = progress.teacher_tokens
        if self.teacher is not None:
            record.teacher_bytes = progress.teacher_tokens * self.teacher.bytes_per_token
        total = self._elapsed()
        whole = self.shelf.join(self.student.coordinates) if self.processes.sharded else None
        if self.output is not None:
            with self.clock("write"):
                record.out = str(self.output.out)
                record.bytes = write(self.output, self.student, self.folder, whole)
        steps = max(1, len(progress.curve))
        here = max(0, steps - self._resumed)
        trained = self.clock.seconds.get("train", 0.0)
        record.tokens_per_second = (
            here * self.settings.batch * self.settings.seqlen / trained if trained else 0.0
        )
        record.seconds = {phase: round(seconds, 3) for phase, seconds in self.clock.seconds.items()}
        record.seconds["total"] = round(total, 3)
        record.peak_memory = peak_memory()
        if self.output is not None:
            self.output.write_text("recover.json", record.to_json())
            tell_run(self.output.partial, record, self._zeros())
            self.output.write_text("README.md", card(record, self.folder, self.output.partial))
            draw(record, self.output.partial, self.watch)
            self.output.finish()
            if self._work is not None:
                self._work.discard()
        return record

    def _zeros(self) -> dict[str, int] | None:
        """Of every linear; where each process has its rows only, they are as many as before."""
        return None if self.processes.sharded else self.student.count_zeros_each()

    @property
    def _keeps(self) -> bool:
        """Whether this process keeps weights of its own: the first one for all, or each its part."""
        return self.processes.first or self.shelf.folder is None or self.processes.sharded

    def _count_trained(self) -> int:
        parts = sum(t.numel() for t in self._parts)
        return sum(t.numel() for t in self._whole) + (self.processes.total(parts) if self._parts else 0)


def draw(record: RecoveryRecord, folder: Path, watch: Watch) -> None:
    """The page, when everything is known. The work is done: one that cannot be drawn is no failed run."""
    from tawny.report.recovery import write_recovery

    try:
        write_recovery(record.to_dict(), folder)
    except Exception as error:
        watch.say(f"report.html could not be made: {type(error).__name__}: {error}")


class _Ticks:
    """A phase told in steps, or in hundredths where the clock decides how many there will be."""

    def __init__(self, watch: Watch, total: int, unit: str) -> None:
        self._watch, self._total, self._done = watch, total, 0
        watch.phase("recovering", total, unit)

    def to(self, share: float) -> None:
        while self._done < math.floor(share * self._total + 1e-9):
            self._done += 1
            self._watch.step("recovering")


@contextmanager
def _stopping(watch: Watch) -> Iterator[threading.Event]:
    """Ctrl-C ends the run behind the step it is in; a second one ends it at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def first(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)
        watch.say("finishing this step; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, first)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
