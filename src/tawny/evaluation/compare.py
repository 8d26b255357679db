"""Any set of dense, pruned and packed models side by side, each measured in a process of its own.

What this file promises:

- One process a model, and one works at a time: resident memory is that model's, and nobody else's threads are in its
  speed. Speed and memory come first in it, before anything else has touched the process.
- Rounds are timed in turn, so that a change of the clock or another program falls on all models alike. Models that do
  not fit into half of the free memory together are timed in groups.
- All models predict the same windows and answer the same questions. KL divergence is from the first model.
- A failure of one model (a damaged file, another tokenizer, no memory) is said in its column, and the rest goes on.

`bench`, `evaluate`, `agreement` and `evaluate_tasks` measure; this file brings their numbers together.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

from tawny.calibration.mixture import check_texts
from tawny.errors import ModelError, RecipeError, TawnyError
from tawny.evaluation.labels import check_labels
from tawny.machine import free_memory, machine, versions
from tawny.model.checkpoint import file_bytes
from tawny.model.source import load_tokenizer, resolve, stored_bytes
from tawny.model.trust import opens_models, trusted, trusting
from tawny.progress import Progress, Silent, silent

MOST_WINDOWS = 20  # where nobody says how many: enough for a standard error, few enough to wait for


@dataclass(frozen=True)
class Comparison:
    """`models` holds one dictionary a model, `setting` what all of them were asked.

    Keys of a model: `source`, `name`, `kind` (dense, pruned or packed), `sparsity`, `file_bytes`, `resident_bytes`,
    `speed`, `perplexity` (with `agreement` but for the first) or `features` (of encoders, but for the first), `accuracy`,
    `tasks`, and `errors`, which says of each of these parts why it is missing.
    """

    models: list[dict[str, Any]]
    setting: dict[str, Any]
    seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@opens_models
def compare(
    sources: Sequence[str | Path],
    *,
    text: str | None = "wikitext2",
    seqlen: int | None = None,
    windows: int | None = None,
    bos: bool | None = None,
    labels: str | Path | None = None,
    tasks: str | Sequence[str] | None = None,
    task_data: str | Path | None = None,
    limit: int | None = None,
    speed: bool = True,
    threads: int | None = None,
    rounds: int = 5,
    prompt_tokens: int = 128,
    compute: str = "auto",
    device: str = "cpu",
    cache: bool = True,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Comparison:
    """Measure models side by side.

    Args:
        sources: folders (dense or packed), hub ids, `.gguf` files or `smollm2`; the first is what others differ from.
        text: for perplexity and KL divergence; None leaves them out.
        seqlen: tokens a window; 2048 if None, and 128 of encoders.
        windows: how many from the start of the text; at most 20 if None.
        bos: as for `evaluate`; nothing of encoders.
        labels: of the pictures in `text`, for the accuracy of classifiers; as for `accuracy`.
        tasks: as for `evaluate_tasks`; none if None.
        speed: also prefill and decoding speed.
        rounds, prompt_tokens: as for `bench`.
        cache: keep and reuse answers to tasks, and what the first model makes of the text.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError: no model, one that is there twice, or none that could be opened.
        TextError, RecipeError, MissingFeature: what was asked for cannot be asked of any model.
    """
    from tawny.precision import compute_dtype  # not where a process of its own would load it

    start = time.perf_counter()
    named = [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    compute_dtype(compute)
    for key, value in {
        "threads": threads,
        "rounds": rounds,
        "prompt_tokens": prompt_tokens,
        "limit": limit,
    }.items():
        if value is not None and value < 1:
            raise RecipeError(f"{key}={value} is not possible; give 1 or more")
    if not named:
        raise ModelError("nothing to compare: give one or more models")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ModelError(f"{twice[0]} is there twice: give each model once")
    if tasks is not None:
        from tawny.evaluation.tasks import check_tasks

        tasks = check_tasks(tasks, task_data)
    if labels is not None:
        check_labels(labels, text or "none")
    if text is not None and _read_on(named):
        seqlen = seqlen or 2048
        windows = _windows(named, text, seqlen, windows, bos)
    elif text is not None and bos is not None:
        raise RecipeError(f"{named[0]} predicts no next token, so bos does not apply to it: leave it out")
    setting: dict[str, Any] = {
        "text": text,
        "seqlen": seqlen,
        "windows": windows,
        "bos": bos,
        "labels": None if labels is None else str(labels),
        "tasks": tasks,
        "task_data": None if task_data is None else str(task_data),
        "limit": limit,
        "speed": speed,
        "threads": threads,
        "rounds": rounds,
        "prompt_tokens": prompt_tokens,
        "compute": compute,
        "device": device,
        "cache": cache,
    }
    jobs = [
        {"source": name, "against": named[0] if i else None, "setting": setting, "trusted": trusted()}
        for i, name in enumerate(named)
    ]
    called = short_names(named)
    rows = _rows(jobs, called, progress)
    models = [
        {"source": source, "name": name, **row} for source, name, row in zip(named, called, rows, strict=True)
    ]
    for row in models:
        for part, message in row["errors"].items():
            progress.say(f"{row['name']}: no {part}: {message}")
    if all("file_bytes" not in row for row in models):
        raise ModelError(f"none of the models could be opened: {models[0]['errors'].get('model', 'unknown')}")
    return Comparison(models, setting, time.perf_counter() - start, machine(), versions())


def short_names(sources: Sequence[str]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    parts = [Path(source).parts or (source,) for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        shortened = ["/".join(part[-count:]) for part in parts]
        if len(set(shortened)) == len(shortened):
            return shortened
    return list(sources)


def _windows(sources: Sequence[str], text: str, seqlen: int, windows: int | None, bos: bool | None) -> int:
    """How many windows all models are asked; found out before the first of them is measured."""
    from tawny.evaluation.perplexity import count_windows

    check_texts(text)
    failed: list[TawnyError] = []
    for source in sources:
        try:
            tokenizer = load_tokenizer(resolve(source))
        except TawnyError as error:  # its column will say so
            failed.append(error)
            continue
        return count_windows(text, seqlen, windows, tokenizer, bos, most=MOST_WINDOWS)
    raise failed[0]


def _read_on(sources: Sequence[str]) -> bool:
    """Whether the first model that can be opened predicts tokens."""
    from tawny.evaluation.sources import reads_on

    for source in sources:
        with contextlib.suppress(TawnyError):  # its column will say so
            return reads_on(source)
    return True


# --- the parent's side: one process a model -----------------------------------------------------------------


def _rows(jobs: Sequence[dict[str, Any]], names: Sequence[str], progress: Progress) -> list[dict[str, Any]]:
    """What `measure` says of each job: speeds in turn, the rest of each after them."""
    rows: list[dict[str, Any]] = []
    setting = jobs[0]["setting"]
    for group in _groups(jobs, progress):
        with contextlib.ExitStack() as running:
            processes = []
            for job in group:
                noise = running.enter_context(
                    tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
                )
                processes.append(_Process(job, progress, noise))
                running.callback(processes[-1].end)
            if setting["speed"]:
                _time(processes, names[len(rows) :], setting["rounds"] + 1, progress)  # one warms up
            for process in processes:
                progress.say(f"measuring {names[len(rows)]} ({len(rows) + 1} of {len(names)})")
                while process.row is None:
                    process.go_on()
                rows.append(process.row)
    return rows


def _time(processes: Sequence[_Process], names: Sequence[str], rounds: int, progress: Progress) -> None:
    """A round of each in turn, until all speeds are known; who fails earlier leaves the others to it."""
    progress.phase("measuring speeds in turn", rounds * len(processes), "rounds")
    while any(not process.timed for process in processes):
        for process, name in zip(processes, names, strict=False):
            if not process.timed:
                process.go_on()
            if not process.timed:
                progress.step(name)


def _groups(jobs: Sequence[dict[str, Any]], progress: Progress = silent) -> list[list[dict[str, Any]]]:
    """Neighbours that half of the free memory holds together."""
    free = free_memory()
    room = math.inf if free is None else free / 2
    groups: list[list[dict[str, Any]]] = []
    held = 0
    for job in jobs:
        size = 0
        with contextlib.suppress(Exception):  # whatever is wrong with the folder, its column will say
            size = file_bytes(resolve(job["source"], progress.say))
        if not groups or held + size > room:
            groups.append([])
            held = 0
        groups[-1].append(job)
        held += size
    return groups


class _Process:
    """A fresh interpreter that measures one model, stops after each timed round and after the last, and goes on when it is told.

    `timed` says that no round is left, `row` is what it says at its end, whatever becomes of it. `noise` takes what libraries
    print there.
    """

    def __init__(self, job: dict[str, Any], progress: Progress, noise: IO[str]) -> None:
        self.row: dict[str, Any] | None = None
        self.timed = False
        self._job, self._progress, self._noise = job, progress, noise
        self._child: subprocess.Popen[str] | None = None

    def go_on(self) -> None:
        """Let it work up to its next stop, and pass its progress on."""
        if self.row is not None:
            return
        told = ""
        if self._child is None:
            self._child, told = self._start(), json.dumps(self._job)
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(told + "\n")
            self._child.stdin.flush()
        for line in self._child.stdout:
            event, *values = json.loads(line)
            if event == "turn":
                self.timed = values[0]
                return
            if event == "row":
                self.timed, self.row = True, values[0]
                return
            getattr(self._progress, event)(*values)
        self.timed = True
        self.row = {"errors": {"model": f"its process ended early: {self._reason()}"}}

    def end(self) -> None:
        if self._child is not None:
            self._child.kill()
            with contextlib.suppress(BrokenPipeError), self._child:  # it may have gone before it had read
                pass

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.Popen(
            [sys.executable, "-m", "tawny.evaluation.compare"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            encoding="utf-8",
            env=environment,
        )

    def _reason(self) -> str:
        assert self._child is not None
        code = self._child.wait()
        self._noise.seek(0)
        last = [line.strip() for line in self._noise.read().splitlines() if line.strip()][-1:]
        reason = f"killed by signal {-code}" if code < 0 else "".join(last) or "no answer"
        return reason + (" (out of memory?)" if code == -9 else "")


# --- the child's side ---------------------------------------------------------------------------------------


def _tell(out: IO[str], event: str, *values: Any) -> None:
    out.write(json.dumps([event, *values], default=str) + "\n")
    out.flush()


def measure(
    source: str,
    against: str | None,
    setting: dict[str, Any],
    progress: Progress = silent,
    turn: Callable[[bool], None] = lambda over: None,
) -> dict[str, Any]:
    """All numbers of one model; a part that fails leaves its reason under `errors`.

    `turn` is called after each timed round, and once after all of them, with True.
    """
    errors: dict[str, str] = {}
    row: dict[str, Any] = {"errors": errors}

    def part(name: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except TawnyError as error:
            errors[name] = " ".join(str(error).split())
        except MemoryError:
            errors[name] = "out of memory"
        except Exception as error:
            # One part of one model must not take the others' numbers with it.
            errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None

    folder: Path | None = part("model", lambda: resolve(source, progress.say))
    size = folder and part("model", lambda: stored_bytes(source))
    if folder is None or size is None:
        return row
    row["file_bytes"] = size
    row |= part("speed" if setting["speed"] else "memory", lambda: _speed(folder, setting, turn)) or {}
    turn(True)
    row |= part("sparsity", lambda: _sparsity(folder)) or {}
    predicts = True
    with contextlib.suppress(Exception):  # whatever is wrong with the folder, the parts below say
        predicts = _reads_on(folder)
    if setting["text"] is not None and not predicts:
        numbers = against and part("features", lambda: _features(folder, against, setting, progress))
        row |= {"features": numbers} if numbers else {}
    elif setting["text"] is not None:
        numbers = against and part("agreement", lambda: _text(folder, against, setting, progress))
        # The first model, or one whose tokens are others.
        numbers = numbers or part("perplexity", lambda: _text(folder, None, setting, progress))
        row |= {"perplexity": numbers} if numbers else {}
    if setting["labels"] is not None:
        numbers = part("accuracy", lambda: _accuracy(folder, setting, progress))
        row |= {"accuracy": numbers} if numbers else {}
    if setting["tasks"] is not None:
        numbers = part("tasks", lambda: _tasks(folder, setting, progress))
        row |= {"tasks": numbers} if numbers else {}
    return row


def _speed(folder: Path, setting: dict[str, Any], turn: Callable[[bool], None]) -> dict[str, Any]:
    """What `bench` measures; without it, only the memory of an opened model that has worked once."""
    from tawny.evaluation.bench import bench
    from tawny.evaluation.latency import latency

    full = setting["speed"]
    if not _reads_on(folder):
        keys = {"rounds": setting["rounds"] if full else 1, "threads": setting["threads"]}
        latencies = latency(folder, progress=_Rounds(turn) if full else silent, **keys).to_dict()
        return {"resident_bytes": latencies["resident_bytes"], **({"latency": latencies} if full else {})}
    measured = bench(
        folder,
        prompt_tokens=setting["prompt_tokens"],
        tokens=32 if full else 1,
        rounds=setting["rounds"] if full else 1,
        threads=setting["threads"],
        progress=_Rounds(turn) if full else silent,
    ).to_dict()
    row = {"resident_bytes": measured["resident_bytes"]}
    return {**row, "speed": measured} if full else row


def _sparsity(folder: Path) -> dict[str, Any]:
    """Exact zeros over prunable weights, block by block."""
    import torch

    from tawny.evaluation.inspection import count_zeros
    from tawny.model.checkpoint import is_packed
    from tawny.packed.opening import open_stack

    zeros, total = count_zeros(open_stack(folder, torch.float32))
    share = zeros / max(1, total)
    # A few zeros are in any model.
    kind = "packed" if is_packed(folder) else "pruned" if share > 0.01 else "dense"
    return {"sparsity": share, "prunable": total, "kind": kind}


def _text(folder: Path, against: str | None, setting: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Perplexity, and with `against` the distance from that model as well."""
    from tawny.evaluation.agreement import agreement
    from tawny.evaluation.perplexity import evaluate

    keys = {key: setting[key] for key in ("text", "seqlen", "windows", "bos", "compute", "device", "cache")}
    if setting["windows"] is None or setting["seqlen"] is None:  # the first model predicts no next token
        keys["seqlen"] = setting["seqlen"] or 2048
        given = (keys["text"], keys["seqlen"], setting["windows"], keys["bos"])
        keys["windows"] = _windows([str(folder)], *given)
    if against is None:
        return evaluate(folder, progress=progress, **keys).to_dict()
    return agreement(folder, against, progress=progress, **keys).under_perplexity()


def _reads_on(folder: Path) -> bool:
    from tawny.evaluation.sources import reads_on

    return reads_on(folder)


def _features(folder: Path, against: str, setting: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from tawny.evaluation.features import features

    keys = {key: setting[key] for key in ("seqlen", "compute", "device")}
    return features(
        folder, against, setting["text"], samples=setting["windows"], progress=progress, **keys
    ).to_dict()


def _accuracy(folder: Path, setting: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from tawny.evaluation.accuracy import accuracy

    keys = {key: setting[key] for key in ("compute", "device")}
    shown, labels = setting["text"], setting["labels"]
    return accuracy(folder, shown, labels, samples=setting["windows"], progress=progress, **keys).to_dict()


def _tasks(folder: Path, setting: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from tawny.evaluation.tasks import evaluate_tasks

    keys = {key: setting[key] for key in ("tasks", "task_data", "limit", "compute", "device", "cache")}
    return evaluate_tasks(folder, progress=progress, **keys).to_dict()


class _Rounds(Silent):
    """Hears of timed rounds, and lets others have their turn after each."""

    def __init__(self, turn: Callable[[bool], None]) -> None:
        self._turn = turn

    def step(self, *_: Any, **__: Any) -> None:
        self._turn(False)


def main() -> None:
    """One model's numbers: a job as JSON on stdin, events and at last the row as lines of JSON on stdout."""
    # Whatever libraries print must not get between the lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    if job["setting"]["threads"] is not None:
        import torch

        torch.set_num_threads(job["setting"]["threads"])

    def turn(over: bool) -> None:
        _tell(out, "turn", over)
        if not sys.stdin.readline():
            sys.exit(1)  # the parent is gone

    events = ("phase", "step", "detail", "say")
    progress = cast(Progress, SimpleNamespace(**{event: partial(_tell, out, event) for event in events}))
    try:
        with trusting(job["trusted"]):
            _tell(out, "row", measure(job["source"], job["against"], job["setting"], progress, turn))
    except (KeyboardInterrupt, BrokenPipeError):  # the parent has stopped, and says so
        sys.exit(1)


if __name__ == "__main__":
    main()
