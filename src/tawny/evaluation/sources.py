"""What every measurement needs to know of a model: how to open it whole, and a fingerprint of its bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from tawny.errors import CheckpointError, ModelError

# Written beside the weights, and no part of what the model computes.
_NOT_THE_MODEL = {"run.json", "journal.json", "report.json"}
_PART_OF_THE_MODEL = (".safetensors", ".json", ".model", ".txt", ".jinja")


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights, configuration and tokenizer in a folder: same fingerprint, same model."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _PART_OF_THE_MODEL or path.name in _NOT_THE_MODEL or not path.is_file():
            continue
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def open_model(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The whole model in a folder, dense or packed, for forwards in `dtype`.

    Raises:
        ModelError: transformers does not know it as a causal language model.
        CheckpointError: files are missing, truncated or do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (KeyError, ValueError) as error:
        raise ModelError(f"{folder}: {(str(error).strip() or 'unknown model').splitlines()[0]}") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be opened: {(str(error).strip()).splitlines()[0]}") from error
    return model.to(device).eval()
