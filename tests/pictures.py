"""Pictures of a few colours, and an image processor beside a tiny model that sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.encoders import tiny_encoder


def save_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Pictures of coarse noise, each of its own tint."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    paths = [folder / f"{number:02d}.png" for number in range(count)]
    for path in paths:
        coarse = draw.integers(0, 128, (5, 6, 3)) + draw.integers(0, 128, 3)
        Image.fromarray(coarse.astype(np.uint8)).resize((60, 50)).save(path)
    return paths


def save_seeing(folder: Path, name: str = "vit", model: Any = None) -> Path:
    """A tiny model that sees, with its processor."""
    (model or tiny_encoder(name)).save_pretrained(folder)
    config = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder
