"""The loop of a recovery: losses against text and teacher, steps, measurements, states, and what is written at the end."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.errors import Interrupted, NumericalError
from tawny.machine import machine, peak_memory, versions
from tawny.model.context import hard_context_of
from tawny.model.identity import source_identity
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.model.structure import predicts_tokens
from tawny.precision import measured_speed
from tawny.progress import Progress
from tawny.recovery.data import Reading
from tawny.recovery.objective import Losses, chunk_tokens, distil, match
from tawny.recovery.record import NAN, RecoveryRecord, draw
from tawny.recovery.settings import Recovery
from tawny.recovery.state import Shelf, Standing
from tawny.recovery.student import Student
from tawny.recovery.teacher import WALK_TOKENS, Teacher
from tawny.recovery.writing import card, tell_run, write
from tawny.run.place import Workplace
from tawny.run.run import Clock
from tawny.run.writer import CheckpointWriter
from tawny.words import counted, quality_text

_BETAS = (0.9, 0.95)
_RISING = 8  # steps in which the rate rises at least
_FINAL = 0.02  # of the peak learning rate, at the end of the cosine
_TELLING = 10.0  # seconds of steps from which on their speed says something
_MEASURING = 0.1  # of the minutes given, the most that measuring takes
# Of what is read once, a walk of the teacher: a run that ends early has made few in vain.
_PASSING_TOKENS = 8192
_STEP_FORWARDS = 4  # the teacher's and the student's, and two for the gradients
_STEP = ("train_forward", "train_loss", "train_backward", "optimiser")  # phases of a step
_SAVING = 600  # seconds after which a state is saved, measured or not


class Training:
    """One recovery: what it works on, and where it stands."""

    def __init__(
        self,
        settings: Recovery,
        student: Student,
        teacher: Stack | None,
        reading: Reading,
        place: Workplace | None,
        folder: Path | None,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self.settings, self.student, self.reading = settings, student, reading
        self.place, self.progress = place, progress
        self._teacher_stack, self.folder = teacher, folder
        self.teacher: Teacher | None = None
        self.clock = clock
        self.standing = Standing()
        self.steps = settings.steps
        self._begun = time.perf_counter()
        self._saved = 0  # the step of the newest state
        self.predicts = predicts_tokens(student.stack.model)
        vocabulary = int(student.stack.config.get_text_config().vocab_size) if self.predicts else 1
        # A chunk goes through the model's own forward as one sequence.
        longest = hard_context_of(student.stack.model) if self.predicts else None
        self.chunk = min(chunk_tokens(vocabulary, settings.chunk), longest or sys.maxsize)
        self.tensors = [t for c in student.coordinates for t in c.tensors.values()]
        decayed = [t for c in student.coordinates for t in c.decayed]
        known = set(map(id, decayed))
        others = [t for t in self.tensors if id(t) not in known]
        groups = ((decayed, settings.weight_decay), (others, 0.0))
        self.optimiser = torch.optim.AdamW(
            [{"params": tensors, "weight_decay": decay} for tensors, decay in groups if tensors],
            lr=settings.learning_rate,
            betas=_BETAS,
            fused=student.stack.device.type in ("cpu", "cuda"),
        )
        self.record = RecoveryRecord(
            settings=settings.to_mapping(),
            text=reading.about,
            versions=versions(),
            machine=machine(),
            compute=str(student.stack.compute).removeprefix("torch."),
            zeros_before=sum(student.zeros.values()),
            prunable=student.prunable,
            trained=student.trained,
        )
        if student.unmasked:
            self.record.warnings.append(
                f"{student.unmasked:,} zeros lie in linears with too few of them for a mask beside {settings.values}: they are "
                "levels now, which training may change; prune more to keep them"
            )

    def shelve(self) -> None:
        """Find the state of an earlier run, and the teacher's hidden states it made. A live model's run leaves none."""
        teacher, place = self._teacher_stack, None if self.folder is None else self.place
        folder = None if place is None else place.steps / "training"
        if place is not None and folder is not None:
            known: Path | nn.Module | None = None
            if teacher is not None:
                known = teacher.checkpoint.folder if teacher.checkpoint else teacher.model
            identity = {
                "settings": self.settings.to_mapping(),
                "model": source_identity(self.folder),
                "teacher": source_identity(known),
                "text": self.reading.about["tokens_sha256"],
            }
            place.require(verb="recover", **identity)
            place.begin()
            folder.mkdir(exist_ok=True)
        self.shelf = Shelf(folder, self.student.coordinates, self.optimiser)
        if standing := self.shelf.load():
            self.standing, self._saved = standing, standing.step
            text = self.clock.seconds["text"]
            self.clock.go_on(standing.phases)
            self.clock.seconds["text"] = text + standing.phases.get("text", 0.0)
            self.progress.say(
                f"going on after step {standing.step} of {self.steps}; remove {place and place.path} to start over instead"
            )
        if teacher is not None:
            cache = None if folder is None else folder / "teacher.bin"
            self.teacher = Teacher(teacher, self.reading, cache)
            self.teacher.share(self.student.stack)

    # --- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Step until the budget is spent; an error that leaves something worth writing is recorded, not raised."""
        if not self.standing.measured:
            what = counted(self.reading.about)[0]
            self.progress.phase("measuring", len(self.reading.held_out), f"held-out {what}")
            self._measure()
        timed = self.settings.minutes is not None
        self.progress.phase("recovering", 100 if timed else self.steps, "percent" if timed else "steps")
        if timed:
            self._tell()
        with _stopping(self.progress) as stop:
            while (reason := self._over()) is None:
                try:
                    self._step()
                except NumericalError as error:
                    if self.standing.best is None or self.standing.best["step"] == 0:
                        raise
                    self.record.stopped = "nan"
                    self.record.warnings.append(str(error))
                    return
                at = self.standing.step
                over = self._over()
                due = at % self.settings.eval_every == 0 and self._affords_measuring()
                if due or over in ("tokens", "minutes"):
                    self._measure()
                if stop.is_set():
                    self._save()
                    raise Interrupted(f"stopped by Ctrl-C after step {at}; {self._left()}")
                late = self._elapsed() - self.standing.seconds >= _SAVING
                if (at % self.settings.eval_every == 0 or late) and not over:
                    self._save()
                self._tell()
        if (
            self.standing.measured[-1]["step"] != self.standing.step
        ):  # stopped just before the end, and resumed
            self._measure()
        if self.standing.step > self._saved:  # what writes the result may be killed, or fill the disk
            self._save()
        if reason == "minutes":
            self.progress.at(100, 0.0)
        self.record.stopped = reason
        return None

    def _over(self) -> str | None:
        settings, standing = self.settings, self.standing
        if standing.step >= self.steps:
            return "tokens"
        if self._ends and standing.step and self._elapsed() + self._ahead() + standing.cost >= self._ends:
            return "minutes"
        if settings.patience and standing.stale >= settings.patience:
            return "patience"
        return None

    def _ahead(self) -> float:
        """Seconds of one more step, if it takes as long as the last one, and of the teacher's forwards for it."""
        standing, settings = self.standing, self.settings
        taught = self._a_token() * settings.batch * settings.seqlen
        return standing.step_seconds + (taught if self._unseen() else 0.0)

    @property
    def _ends(self) -> float | None:
        """Seconds until the run ends whatever it has read, its last measurement included."""
        return None if self.settings.minutes is None else 60 * self.settings.minutes

    def _tell(self) -> None:
        """How far it is and how long it will still take; the minutes know, and else the speed of what was done."""
        standing, settings = self.standing, self.settings
        ends = math.inf if self._ends is None else self._ends - self._elapsed()
        far = standing.step if self._ends is None else math.floor(100 * self._share())
        if not standing.step:
            if self._ends is not None:
                self.progress.at(far, ends)
            return
        steps = self.steps - standing.step
        left = steps * self._trained / standing.step
        left += standing.cost * (steps // settings.eval_every + 1)
        if self.teacher is not None:
            missing = steps * settings.batch
            if not self.reading.passes:
                missing = min(missing, len(self.teacher.missing(range(self.reading.training))))
            a_token = standing.teacher_seconds / max(1, standing.teacher_tokens)
            left += a_token * missing * settings.seqlen
        self.progress.at(far, min(left, ends))

    def _elapsed(self) -> float:
        return self.standing.seconds + time.perf_counter() - self._begun

    def _share(self, ahead: int = 0) -> float:
        """How much of the run is over, by whichever budget ends first."""
        share = (self.standing.step + ahead) / self.steps
        if self._ends is not None:
            share = max(share, self._elapsed() / self._ends)
        return min(share, 1.0)

    def _rate(self, share: float, step: int) -> float:
        """Linear warm-up, then a cosine down to a fiftieth. `step` counts from 1.

        AdamW's first steps move every weight by the whole rate. Of a run of few steps, one may pass the share that warms up.
        """
        settings = self.settings
        rise = min(share / settings.warmup, step / _RISING) if settings.warmup else 1.0
        phase = max(0.0, share - settings.warmup) / max(1e-9, 1.0 - settings.warmup)
        fall = _FINAL + (1 - _FINAL) * 0.5 * (1 + math.cos(math.pi * phase))
        return settings.learning_rate * min(rise, fall)

    def _step(self) -> None:
        settings, standing = self.settings, self.standing
        self._ask_teacher()
        begun = self._elapsed()
        share = self._share(ahead=1)
        rate = self._rate(share, standing.step + 1)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        losses = self._gradients(self.reading.rows(standing.step))
        with self.clock("optimiser"):
            norm = float(nn.utils.clip_grad_norm_(self.tensors, settings.clip))
            loss = (losses.next_token * (1 - self._kl) + losses.kl * self._kl) / losses.tokens
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NumericalError(
                    f"{NAN} {loss} (gradient norm {norm}) at step {standing.step + 1} with a learning rate of "
                    f"{rate:.3g}; {self._kept()}: try a smaller --lr than {settings.learning_rate:g}"
                )
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            standing.step += 1
            for one in self.student.coordinates:
                one.write()
        entry = {
            "step": standing.step,
            "tokens": standing.step * settings.batch * settings.seqlen,
            "lr": rate,
            "loss": losses.next_token / losses.tokens,
            "kl": losses.kl / losses.tokens,
            "norm": norm,
        }
        standing.curve.append(entry)
        standing.step_seconds = self._elapsed() - begun
        kl = f", KL {entry['kl']:.3f}" if self._kl else ""
        self.progress.detail(f"loss {entry['loss']:.3f}{kl}", 0, 0)

    @property
    def _trained(self) -> float:
        """Seconds of all steps, without the teacher and measuring."""
        return sum(self.clock.seconds.get(part, 0.0) for part in _STEP)

    @property
    def _kl(self) -> float:
        return self.settings.kl if self.teacher is not None and self.predicts else 0.0

    def _left(self) -> str:
        """What a run that is stopped leaves."""
        best = self.standing.best
        if self.shelf.folder is not None:
            return "the same command goes on from there"
        assert best is not None
        return f"the model has the best weights measured, of step {best['step']:.0f}, and the same call begins anew"

    def _kept(self) -> str:
        best = self.standing.best
        if best is None or best["step"] == 0:
            live = ", and the model is as it was there" if self.shelf.folder is None else ""
            return f"nothing better than the start was reached, and nothing is written{live}"
        return f"the best model so far, of step {best['step']:.0f}, is kept"

    def _gradients(self, rows: list[int]) -> Losses:
        """Losses of some windows, their gradients left with the coordinates."""
        settings = self.settings
        total = Losses()
        micro = settings.micro_batch or len(rows)
        scale = 1.0 / self._counted(rows)
        for start in range(0, len(rows), max(1, micro)):
            some = rows[start : start + micro]
            samples = self.reading.take(some)
            with self.clock("train_forward"):
                hidden_BTH = self.student.hidden(samples.inputs)
            with self.clock("train_loss"):
                losses, gradient_BTH = self._distil(samples, hidden_BTH, some, scale)
            total.add(losses)
            if gradient_BTH is not None:
                with self.clock("train_backward"):
                    torch.autograd.backward([hidden_BTH], [gradient_BTH])
        return total

    def _counted(self, rows: list[int]) -> int:
        """Losses that a step's loss is the mean of."""
        settings = self.settings
        if self.predicts:
            return settings.batch * (settings.seqlen - 1)
        mask = self.reading.take(rows).mask
        return len(rows) * settings.seqlen if mask is None else int(mask.sum())

    def _distil(
        self, samples: Samples, hidden_BTH: Tensor, rows: list[int], scale: float | None
    ) -> tuple[Losses, Tensor | None]:
        teacher = self.teacher
        if not self.predicts:
            assert teacher is not None
            return match(
                self.student.stack.features,
                teacher.stack.features,
                samples.inputs,
                hidden_BTH,
                teacher.hidden(rows),
                scale=scale,
                mask_BT=samples.mask,
            )
        return distil(
            self.student.stack.tail,
            None if teacher is None else teacher.stack.logits,
            samples.tokens,
            hidden_BTH,
            None if teacher is None else teacher.hidden(rows),
            kl=torch.tensor([1.0 if self.reading.own(row) else self._kl for row in rows]),
            chunk=self.chunk,
            scale=scale,
        )

    def _ask_teacher(self) -> None:
        """Have the hidden states of this step's windows; if any are missing, those of the next steps too."""
        if not self._unseen():
            return
        rows = self.reading.rows
        first, last = self._walked_with(len(rows(self.standing.step)) * self.settings.seqlen)
        self._make([row for step in range(first, min(last, self.steps)) for row in rows(step)])

    def _unseen(self) -> bool:
        """Whether the teacher has yet to see windows of the next step."""
        return self.teacher is not None and bool(self.teacher.missing(self.reading.rows(self.standing.step)))

    def _walked_with(self, tokens: int) -> tuple[int, int]:
        """The steps, of so many tokens each, whose hidden states are made in one walk with those of this one.

        What is not kept is made again after a stop. It is walked in the same company as before, to the same bytes.
        """
        step = self.standing.step
        if self.reading.passes:
            size = max(1, _PASSING_TOKENS // tokens)
            return step - step % size, step - step % size + size
        return step, step + min(max(1, WALK_TOKENS // tokens), self._steps_left())

    def _steps_left(self) -> int:
        """As many as the minutes that are left allow at the speed so far; what is made early changes no result.

        Before the first step that speed is guessed from the teacher's forwards of the held-out windows.
        """
        settings, standing = self.settings, self.standing
        if self._ends is None:
            return self.steps
        if self._trained:
            each = self._elapsed() / max(1, len(standing.curve))
        else:
            each = _STEP_FORWARDS * self._a_token() * settings.batch * settings.seqlen
        if not each:  # gone on with before the first step: one is walked, which says how long they take
            return 1
        return max(1, math.ceil((self._ends - self._elapsed()) / each))

    def _a_token(self) -> float:
        """Seconds that the teacher takes for one."""
        standing = self.standing
        return standing.teacher_seconds / max(1, standing.teacher_tokens)

    def _make(self, rows: list[int]) -> None:
        assert self.teacher is not None
        before, tokens = time.perf_counter(), self.teacher.tokens_made
        with self.clock("teacher"):
            self.teacher.make(rows, self.progress)
        self.standing.teacher_seconds += time.perf_counter() - before
        self.standing.teacher_tokens += self.teacher.tokens_made - tokens

    def _affords_measuring(self) -> bool:
        """Whether one more measurement and the last one stay within their share of the minutes, now and at the end."""
        standing = self.standing
        if self._ends is None:
            return True
        most = min(_MEASURING * self._elapsed(), _MEASURING * self._ends - standing.cost)
        return standing.measuring + standing.cost <= most

    @torch.no_grad()
    def _measure(self) -> None:
        """Perplexity, KL and agreement on the held-out windows; the best weights are kept."""
        standing = self.standing
        begun, taught = self._elapsed(), standing.teacher_seconds
        total = self._held_out_losses()
        taken = self._elapsed() - begun
        standing.measuring += taken
        standing.cost = max(0.0, taken - (standing.teacher_seconds - taught))
        mean = total.next_token / total.tokens
        entry = {
            "step": float(standing.step),
            "seconds": round(self._elapsed(), 1),
            "loss": mean,
        }
        if self.predicts:
            entry["perplexity"] = math.exp(mean) if mean < 700 else math.inf
        if self.teacher is not None and self.predicts:
            entry |= {"kl": total.kl / total.tokens, "top1": total.agree / total.tokens}
        standing.measured.append(entry)
        name, said = quality_text(entry)
        line = f"step {standing.step}: held-out {name} {said}"
        line += f" (from {quality_text(standing.measured[0])[1]})" if standing.step else ""
        if "kl" in entry:
            line += f", KL {entry['kl']:.3f}, top-1 {entry['top1']:.1%}"
        self.progress.say(line)
        # A loss can fall while the model moves away from the dense one, on other texts too.
        decides = "kl" if "kl" in entry else "loss"
        best = standing.best
        if best is None or (math.isfinite(entry[decides]) and not best[decides] <= entry[decides]):
            self.shelf.keep_best(standing.step)
            standing.best, standing.stale = entry, 0  # once it is kept: Ctrl-C may come between
        else:
            standing.stale += 1

    def _held_out_losses(self) -> Losses:
        """Of the windows of every measurement. The first one finds out how many the minutes have room for."""
        standing, everything = self.standing, self.reading.held_out
        if standing.held_out or self._ends is None:
            standing.held_out = standing.held_out or len(everything)
            return self._losses(everything[: standing.held_out])
        total, count, begun = Losses(), min(1, len(everything)), self._elapsed()
        while count:
            start = self._elapsed()
            total.add(self._losses(everything[standing.held_out : standing.held_out + count]))
            standing.held_out += count
            # What is read once for all windows of a walk is counted for each: never too long, and less off each time.
            each = (self._elapsed() - start) / count
            room = _MEASURING / 2 * self._ends - (self._elapsed() - begun)
            left = len(everything) - standing.held_out
            count = max(0, min(left, math.floor(room / max(each, 1e-9))))
            self.progress.at(standing.held_out, count * each)
        return total

    def _losses(self, rows: list[int]) -> Losses:
        phased = not self.standing.measured and self._ends is None  # a phase of its own
        if self.teacher is not None:
            self._make(rows)
        begun = time.perf_counter()
        with self.clock("measure"):
            total = Losses()
            size = self.settings.micro_batch or self.settings.batch
            for start in range(0, len(rows), size):
                some = rows[start : start + size]
                samples = self.reading.take(some)
                total.add(self._distil(samples, self.student.hidden(samples.inputs), some, None)[0])
                if phased:
                    done = start + len(some)
                    self.progress.at(done, (time.perf_counter() - begun) / done * (len(rows) - done))
            return total

    def _save(self) -> None:
        self.standing.seconds, self.standing.phases = self._elapsed(), dict(self.clock.seconds)
        self._begun = time.perf_counter()
        with self.clock("save"):
            self.shelf.save(self.standing)
        self._saved = self.standing.step

    def _products_per_second(self) -> float:
        """Tokens a second that the matrix products of a step would allow: of each weight one forwards and two backwards, of
        the head, which is not trained, two of the student and one of the teacher."""
        stack = self.student.stack
        head = stack.model.get_output_embeddings().weight.numel()
        return measured_speed(stack.compute) / float(6 * (self.record.prunable + head))

    # --- the end -----------------------------------------------------------------------------------------------

    def give_up(self, error: object) -> None:
        """After an error, leave a live model with its best weights: no folder has better ones."""
        if error is not None and self.shelf.folder is None and self.standing.best is not None:
            self.shelf.restore_best(int(self.standing.best["step"]))

    def finish(self) -> RecoveryRecord:
        """Go back to the best weights, count the zeros, write."""
        record, standing, settings = self.record, self.standing, self.settings
        best = standing.best
        if best is not None and (record.failure is not None or best["step"] != standing.step):
            self.shelf.restore_best(int(best["step"]))
        if best is not None and best["step"] == 0 and standing.step:
            record.warnings.append(
                f"no measurement was better than the start, so the model is unchanged: try another --lr than "
                f"{settings.learning_rate:g}, or more text"
            )
        if standing.step == 1 and self._ends is not None and self._elapsed() > self._ends:
            record.warnings.append(
                f"{settings.minutes:g} minutes are too few for one step, which took {self._elapsed() / 60:.2g} with what "
                "comes before it: give more, or a smaller -o batch"
            )
        zeros = self.student.count_zeros()
        record.zeros = sum(zeros.values())
        record.sparsity = record.zeros / record.prunable
        record.steps = standing.step
        record.tokens = standing.step * settings.batch * settings.seqlen
        record.start, record.best = standing.measured[0], best or standing.measured[-1]
        record.measured, record.curve = standing.measured, standing.curve
        record.text["held_out"] = standing.held_out
        record.teacher_tokens = standing.teacher_tokens
        if self.teacher is not None:
            record.teacher_bytes = standing.teacher_tokens * self.teacher.bytes_per_token
        output = None
        if self.place is not None:
            output = CheckpointWriter(self.place, anew=True)
            with self.clock("write"):
                record.out = str(self.place.out)
                record.bytes = write(output, self.student, self.folder)
        if trained := self._trained:
            record.tokens_per_second = record.tokens / trained
            if self.predicts and trained > _TELLING and settings.device == "cpu":
                record.products_per_second = self._products_per_second()
        record.seconds = {phase: round(seconds, 3) for phase, seconds in self.clock.seconds.items()}
        record.seconds["total"] = round(self._elapsed() + self.clock.seconds["text"], 3)
        record.peak_memory = peak_memory()
        if output is not None:
            output.write_text("recover.json", record.to_json())
            off_grid = settings.method.weights != "kept" and not (settings.values or self.student.kinds)
            tell_run(output.folder, record, zeros, off_grid=off_grid)
            output.write_text("README.md", card(record, self.folder, output.folder))
            draw(record, output.folder, self.progress)
            output.deliver()
        return record


@contextmanager
def _stopping(progress: Progress) -> Iterator[threading.Event]:
    """Ctrl-C ends the run after the step it is in; a second one ends it at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def first(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)
        progress.say("finishing this step; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, first)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
