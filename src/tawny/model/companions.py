"""What travels with the weights of a model: configuration, tokenizer, licences, code.

A folder of a stranger may hold links. One that leads out of it would put any file that the user can read into a new model, and
with `tawny push` on the hub. So it is refused, before the work. Links to the blobs of the hub's cache are how the cache is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tawny.errors import CheckpointError
from tawny.model.checkpoint import INDEX
from tawny.model.quantised import BESIDE

# Everything that is not weights, except what describes weights of another format.
_CARRIED = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "*.py")
# What sentence-transformers keeps of its modules, such as 1_Pooling/config.json, and a tokenizer of its further templates.
_PARTS = ("[0-9]_*/*.json", "[0-9]_*/*.safetensors", "additional_chat_templates/*.jinja")
_NOT_CARRIED = {INDEX, "run.json", "recipe.yaml", "recover.json", "slim.json", *BESIDE}


def companions(folder: Path, also: Sequence[str] = ()) -> list[Path]:
    """The files, and those of the names `also` that are there, in or one below the folder.

    Raises:
        CheckpointError: one is a link that leads out of the folder.
    """
    names = {p.name for pattern in _CARRIED for p in folder.glob(pattern)} - _NOT_CARRIED
    names = {name for name in names if not name.endswith(".index.json")} | {*also}
    parts = {part for pattern in _PARTS for part in folder.glob(pattern)}
    # A link to nothing, such as a cleaned cache leaves, is no file.
    files = sorted(path for path in {folder / name for name in names} | parts if path.is_file())
    for path in files:
        check_inside(path, folder)
    return files


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file of a model's folder that lies somewhere else.

    Raises:
        CheckpointError: it, or a folder around it, is a link that leads out of `folder`, and not to a blob of the hub's cache.
    """
    target, home = path.resolve(), folder.resolve()
    repository = target.parent.parent
    cached = repository.name.startswith("models--") or repository / "snapshots" == home.parent
    if not (target.is_relative_to(home) or (cached and target.parent.name == "blobs")):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the model's folder; if the file belongs to the model, put a copy in the "
            "place of the link, else remove it"
        )
