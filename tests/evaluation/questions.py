"""A tiny model that can be asked, and tiny tasks to ask it, in the fields and file names of the hub's data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

_WORDS = "owl mouse night forest branch wing feather moon hunts sleeps quiet small grey sees hears silent"


def tiny_folder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random llama with a tokenizer of letters."""
    tiny_model("llama", seed, **{"max_position_embeddings": 512, **changes}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _documents(kind: str, count: int) -> list[dict[str, Any]]:
    chance = random.Random(f"{kind} {count}")

    def words(n: int) -> str:
        return " ".join(chance.choice(_WORDS.split()) for _ in range(n))

    def four() -> dict[str, Any]:
        return {"text": [words(2) for _ in range(4)], "label": ["A", "B", "C", "D"]}

    made: dict[str, Any] = {
        "boolq": lambda i: {"question": words(4), "passage": words(12), "idx": i, "label": i % 2},
        "rte": lambda i: {"sentence1": words(8), "sentence2": words(4), "label": i % 2, "idx": i},
        "hellaswag": lambda i: {
            "ctx_a": words(5) + ".",
            "ctx_b": words(2),
            "activity_label": words(1),
            "endings": [f"{words(3)} [title] {words(1)}" for _ in range(4)],
            "label": str(chance.randrange(4)),
        },
        "winogrande": lambda i: {
            "sentence": f"{words(3)} _ {words(3)}",
            "option1": words(1),
            "option2": words(1),
            "answer": str(1 + i % 2),
        },
        "arc": lambda i: {"question": words(5), "choices": four(), "answerKey": "ABCD"[i % 4]},
        "openbookqa": lambda i: {"question_stem": words(5), "choices": four(), "answerKey": "ABCD"[i % 4]},
        "piqa": lambda i: {"goal": words(4), "sol1": words(5), "sol2": words(6), "label": i % 2},
        "lambada": lambda i: {"text": words(9)},
        "mmlu": lambda i: {"question": words(5), "choices": [words(2) for _ in range(4)], "answer": i % 4},
    }
    return [made[kind](i) for i in range(count)]


# task -> (file, kind of document)
FILES = {
    "boolq": ("boolq.validation.jsonl", "boolq"),
    "rte": ("glue_rte.validation.jsonl", "rte"),
    "hellaswag": ("hellaswag.validation.jsonl", "hellaswag"),
    "winogrande": ("winogrande_winogrande_xl.validation.jsonl", "winogrande"),
    "arc_easy": ("ai2_arc_ARC-Easy.validation.jsonl", "arc"),
    "arc_challenge": ("ai2_arc_ARC-Challenge.validation.jsonl", "arc"),
    "openbookqa": ("openbookqa_main.validation.jsonl", "openbookqa"),
    "piqa": ("piqa_plain_text.validation.jsonl", "piqa"),
    "lambada": ("lambada.test.jsonl", "lambada"),
    "mmlu_anatomy": ("mmlu_anatomy.test.jsonl", "mmlu"),
}


def write_tasks(folder: Path, count: int = 6) -> Path:
    """One file a task, as `--task-data` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in FILES.values():
        lines = [json.dumps(document) for document in _documents(kind, count)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
