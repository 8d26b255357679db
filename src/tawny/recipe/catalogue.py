"""What a recipe can name, read from the registries themselves. Patterns have none: `_PATTERNS` lists them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tawny.allocation import ALLOCATORS
from tawny.calibration.text import NAMED_TEXTS
from tawny.checked import option_keys
from tawny.recipe.files import named_recipes
from tawny.recipe.schema import SECTIONS, Recipe
from tawny.solvers import BLOCK_SOLVERS, EXPERT_SOLVERS, MEMBER_SOLVERS, RANK_SOLVERS, SOLVERS

_PATTERNS = {
    "unstructured": "any mask; the budget is kept per row or per matrix, as the solver's paper has it",
    "row": "any mask with the same count in every row",
    "matrix": "any mask with the count of the whole matrix",
    "2:4": "two kept of every four along the input, and so sparsity 0.5; any n:m whose m divides the width",
    "channels": "whole channels of FFNs: `tawny slim` then makes a smaller dense model; solvers obs, flap, wanda, magnitude",
    "heads": "whole key-value groups of attention with their query heads; the same solvers",
    "channels+heads": "both under one budget",
    "blocks": "whole blocks: `tawny slim` then leaves them out; solvers divergence, influence",
    "experts": "whole experts of mixtures, cut out at once; solvers reap, fisher, frequency, magnitude",
    "rank": "low rank instead of zeros, written dense, for studies; solver svd",
}
_FILES = {
    "FILE.txt, FILE.jsonl": "your own; one document, or one a line under 'text' (also .gz)",
    "chat:FILE.jsonl": "conversations, one a line under 'messages', rendered by the model's chat template",
    "self": "text that the dense model writes: nothing but the model is needed",
    "TEXT=SHARE TEXT=SHARE …": "several of these, such as wiki=0.6 code.jsonl=0.4; shares add up to 1",
}
_KEYS = {
    "sparsity": "share of prunable weights to remove, in [0, 1)",
    "allocator": "how blocks share the budget, and its options",
    "solver": "how a linear is pruned, and its options",
    "pattern": "which weights may go together",
    "calibration": "text, samples, seqlen, repeat, bos, strict",
    "seed": "chooses the windows of text",
    "include": "globs of linears to prune, of all",
    "exclude": "globs of linears to leave alone",
    "dtype": "storage of the result; nothing is the checkpoint's own",
    "compute": "of the forwards; auto is bfloat16 where the machine has it",
    "refit": "move the survivors of each mask to their least squares (also solver.refit)",
    "refine": "epochs of training what a pruned block has left to give the dense block's outputs, and how",
    "values": "kinds that survivors are solved for, or bits to share among linears",
    "output": "how much the solver knows of what the model's output feels: none, rows or whole; tokens that are asked",
    "compat": "official: OWL's ratios, Wanda's counts and Alpha's tails as their authors' code has them, but for n:m",
    "profile_samples": "how many samples the profile uses; nothing is enough for a steady one",
    "device": "where blocks run",
    "version": "of the recipe format",
}


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Kinds of choices → their names, one line each, and their options with defaults."""
    return {
        "recipes": [{"name": name, "summary": _told(path)} for name, path in named_recipes().items()],
        "allocators": _registered(ALLOCATORS),
        "solvers": _registered(
            {**SOLVERS, **MEMBER_SOLVERS, **BLOCK_SOLVERS, **EXPERT_SOLVERS, **RANK_SOLVERS}
        ),
        "patterns": _described(_PATTERNS),
        "texts": _described({**NAMED_TEXTS, **_FILES}),
        "keys": [
            {"name": field.name, "summary": _KEYS.get(field.name, ""), "options": _key_default(field)}
            for field in dataclasses.fields(Recipe)
        ],
    }


def _told(path: Path) -> str:
    """The comment that a recipe begins with."""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()
    )
    return " ".join(line.removeprefix("#").strip() for line in lines)


def _registered(registry: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "summary": (kind.__doc__ or "").strip().split("\n", 1)[0],
            "options": _options(kind),
        }
        for name, kind in registry.items()
    ]


def _described(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "summary": summary} for name, summary in texts.items()]


def _options(kind: Any) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    return {key: _default(fields[name]) for key, name in option_keys(kind).items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _key_default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.name in SECTIONS:
        return _options(SECTIONS[field.name])
    return {} if field.default is dataclasses.MISSING else {"default": field.default}
