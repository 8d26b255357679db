"""Put a finished folder on the Hugging Face hub, after checking that it is what its card says it is."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tawny.errors import CheckpointError, MissingFeature, OutputError, first_line
from tawny.model.checkpoint import INDEX, is_packed, weight_paths
from tawny.model.companions import check_inside
from tawny.packed.folder import PackedFolder
from tawny.progress import Progress, silent
from tawny.record import record_in, weight_files
from tawny.report.card import CARD, front_matter

_LEFT_OUT = (".partial", ".new", ".tmp", ".old", ".lock")
_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class PushReport:
    """What was, or would be, uploaded.

    Attributes:
        files: bytes by name.
        notes: what a person should know before others see the model.
        url: where it is; empty after a dry run.
    """

    repo: str
    files: dict[str, int]
    bytes: int
    private: bool
    dry_run: bool
    notes: list[str]
    url: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    progress: Progress = silent,
) -> PushReport:
    """Upload a folder or a GGUF file that Tawny finished.

    Args:
        folder: a folder written by `prune` or `pack`; or the file of a `fit` to GGUF, whose card goes with it.
        repo: `owner/name` on the hub; made if it does not exist.
        dry_run: check and list, without network.

    Raises:
        CheckpointError: the folder is unfinished, not Tawny's, or not what its run.json says, or holds links that lead out of it.
        OutputError: the repository's name is not valid, or the hub refuses.
    """
    folder = Path(folder)
    _check_repo(repo)
    progress.say(f"checking {folder}")
    if folder.suffix == ".gguf":
        return _push_file(folder, repo, private, dry_run, message, progress)
    record = check_folder(folder)
    metadata = _check_card(folder / CARD)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(_LEFT_OUT) and not _hidden(path.relative_to(folder))
    }
    for name in files:
        check_inside(folder / name, folder)
    notes = _missing(metadata)
    if not {"dense", "pruned"} <= set(record.get("evaluation", {})):
        notes.append("the card has no quality numbers: prune with --eval TEXT to measure both models")
    report = PushReport(repo, files, sum(files.values()), private, dry_run, notes)
    if dry_run:
        return report
    url = _upload(folder, repo, list(files), private, message or "Upload a model pruned by Tawny", progress)
    return replace(report, url=url)


def _push_file(
    file: Path, repo: str, private: bool, dry_run: bool, message: str | None, progress: Progress
) -> PushReport:
    """A GGUF file, and its card as that of the repository."""
    card = file.with_name(f"{file.name}.md")
    try:
        facts = json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))
        with file.open("rb") as opened:
            same = hashlib.file_digest(opened, "sha256").hexdigest() == facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{file} is not a GGUF file with its .json beside it; only what `tawny fit --to gguf` wrote can be pushed"
        ) from None
    if not same:
        raise CheckpointError(
            f"{file} is not the file that its .json describes; fit again, or push one that was not changed"
        )
    files = {file.name: file.stat().st_size, CARD: card.stat().st_size if card.is_file() else 0}
    report = PushReport(repo, files, sum(files.values()), private, dry_run, _missing(_check_card(card)))
    if dry_run:
        return report
    said = message or "Upload a GGUF file made by Tawny"
    url = _upload(file.parent, repo, [file.name], private, said, progress, card=card)
    return replace(report, url=url)


def _missing(metadata: dict[str, Any]) -> list[str]:
    if metadata.get("license"):
        return []
    return [f"{CARD} names no license: the base model's holds; add `license:` to the card's first lines"]


def _hidden(path: Path) -> bool:
    """Whether a file, or a folder that it lies in, is hidden: `.git` and `.cache` are not part of a model."""
    return any(part.startswith(".") for part in path.parts)


def check_folder(folder: Path) -> dict[str, Any]:
    """The run.json of a folder whose weights are those it describes.

    Raises:
        CheckpointError: it is not, or there is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give one that `tawny prune` or `tawny pack` wrote")
    if folder.name.endswith(".partial") or (folder / "journal.json").exists():
        raise CheckpointError(
            f"{folder} is unfinished; run the same `tawny prune` again to complete it first"
        )
    record = record_in(folder)
    if not record:
        raise CheckpointError(
            f"{folder} has no run.json of Tawny; only what `tawny prune` wrote can be pushed"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so nobody could open it as a model")
    hashed = weight_files(folder)
    if not hashed:
        raise CheckpointError(f"{folder} holds no *.safetensors file; the weights are missing")
    recorded = record.get("files", {})
    for name in sorted(set(recorded) | set(hashed)) if recorded else []:
        if hashed.get(name) != recorded.get(name):
            what = "is missing" if name not in hashed else "is not the file that run.json describes"
            raise CheckpointError(
                f"{folder / name} {what}; prune again, or push a folder that was not changed"
            )
    _check_index(folder, hashed)
    return record


def _check_index(folder: Path, found: Collection[str]) -> None:
    """Refuse weights that nobody could open, since what says where they lie is missing or wrong."""
    if is_packed(folder):
        PackedFolder(folder)
    elif "model.safetensors" not in found and not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds neither model.safetensors nor the {INDEX} of several files, so nobody could open it; "
            "prune again, or push a folder that was not changed"
        )
    else:
        weight_paths(folder)  # which refuses an index that names a missing file


def _check_card(path: Path) -> dict[str, Any]:
    """The card's metadata, as the hub would read it."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; the model card is missing")
    try:
        text = path.read_text(encoding="utf-8")
        ModelCard(text)
    except (ValueError, TypeError) as error:
        reason = (str(error).strip() or "unreadable").splitlines()[0]
        raise CheckpointError(f"{path} has metadata the hub would refuse: {reason}") from error
    metadata = front_matter(text)
    if not metadata:
        raise CheckpointError(f"{path} has no metadata between --- lines at its top; the hub needs them")
    return metadata


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(f"{repo!r} is not a name for a repository; give OWNER/NAME") from error
    if repo.count("/") != 1:
        raise OutputError(f"{repo!r} names no owner; give OWNER/NAME")


def _upload(
    folder: Path,
    repo: str,
    files: list[str],
    private: bool,
    message: str,
    progress: Progress,
    card: Path | None = None,
) -> str:
    """
    Args:
        card: of files that other weights may lie beside.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    progress.say(f"uploading {len(files)} files to {repo}")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise OutputError(
                f"{repo} is there and public; make it private on the hub, or leave --private out"
            )
        # Weights of another layout would be read before those that are uploaded.
        old = [
            x
            for x in api.list_repo_files(repo)
            if card is None and "/" not in x and x.endswith(_WEIGHTS) and x not in files
        ]
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=[glob.escape(name) for name in old],
            commit_message=message,
        )
        if card is not None:
            api.upload_file(
                path_or_fileobj=str(card), path_in_repo=CARD, repo_id=repo, commit_message=message
            )
    except LocalTokenNotFoundError as error:
        raise MissingFeature("the hub does not know who you are: run `hf auth login` first") from error
    except OutputError:
        raise
    except Exception as error:  # what an unreachable hub raises depends on its client's version
        reason = first_line(error)
        raise OutputError(f"{repo} cannot be uploaded to: {reason}") from error
    return str(url)
