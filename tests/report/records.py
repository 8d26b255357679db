"""Records to make pages of: one of a real (tiny) run, and one whose every text tries to break out of the page."""

from __future__ import annotations

import functools
import json
from typing import Any

import tawny
from tests.tiny import tiny_model, tokens

HOSTILE = "\"><script>alert('x')</script><img src=https://evil.example/x onerror=alert(1)>{{7*7}}"


@functools.cache
def _text(solver: str, allocator: str) -> str:
    recipe = {"sparsity": 0.6, "solver": solver, "allocator": allocator, "compute": "float32"}
    return tawny.prune(tiny_model("llama"), recipe=recipe, calibration=tokens()).to_json()


def record(solver: str = "wanda", allocator: str = "owl", *, measured: bool = True) -> dict[str, Any]:
    """What `run.json` would hold."""
    made: dict[str, Any] = json.loads(_text(solver, allocator))
    made.update(source="tiny-llama", out="out", storage="float32", bytes=123_456)
    made["files"] = {"model.safetensors": {"bytes": 123_456, "sha256": "ab" * 32}}
    if measured:
        common = {"windows": 4, "seqlen": 64, "tokens": 252, "seconds": 1.5, "peak_memory": 10**9}
        common |= {"text": "wiki", "text_sha256": "cd" * 32, "compute": "float32"}
        made["evaluation"] = {
            "dense": {**common, "perplexity": 12.5, "stderr": 0.4, "bits_per_byte": 0.81},
            "pruned": {**common, "perplexity": 31.25, "stderr": 1.5, "bits_per_byte": 1.12},
        }
        texts = {"dense": "a bird of the night.", "pruned": "a bird and a bird."}
        made["generated"] = [{"prompt": "The owl is", **texts}]
    return made


def hostile_record() -> dict[str, Any]:
    made = record()
    made.update(source=f"evil/{HOSTILE}", out=HOSTILE, warnings=[HOSTILE] * 30)
    made["evaluation"]["dense"]["text"] = HOSTILE
    made["generated"] = [{"prompt": HOSTILE, "dense": HOSTILE, "pruned": HOSTILE}]
    made["text"] = {"name": HOSTILE, "sha256": "ef" * 32, "samples": 4, "seqlen": 24}
    made["machine"]["cpu"] = HOSTILE
    made["files"] = {HOSTILE: {"bytes": 1, "sha256": "ab" * 32}}
    for linear in made["linears"]:
        linear["name"] += HOSTILE
    return made
