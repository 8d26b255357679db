"""What the tests of recipes share."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from tawny.allocation import ALLOCATORS
from tawny.errors import UserError
from tawny.recipe.merge import resolve_recipe

# Classes with an option that must be given cannot be named alone.
ALLOCATORS_ALONE = sorted(
    name
    for name, kind in ALLOCATORS.items()
    if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(kind))
)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides: str, **keys: object) -> str:
    with pytest.raises(UserError) as caught:
        resolve_recipe({"sparsity": 0.6}, overrides, **keys)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message
