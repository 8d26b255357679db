"""A dense tiny model with a tokenizer of letters, and a pruned one cut out of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tawny
from tawny.errors import Interrupted
from tawny.recovery.training import Training
from tests.tiny import VOCABULARY, tiny_model, tokens

RECIPE = {"sparsity": 0.5, "allocator": "uniform", "solver": "magnitude"}
SHORT: dict[str, Any] = {"tokens": 24 * 4 * 6, "eval_every": 3, "lr": 1e-2, "batch": 4}


def folder_keys(pair: tuple[str, str, str], **more: Any) -> dict[str, Any]:
    """Settings for the folders and the text of the fixture `pair`."""
    return {"text": pair[2], "seqlen": 24, "compute": "float32", **SHORT, "tokens": 24 * 4 * 9, **more}


def recover_pair(
    pair: tuple[str, str, str], out: Any, source: Any = None, teacher: Any = None, **more: Any
) -> tawny.RecoveryRecord:
    """Recover the pruned folder of the fixture `pair` against its dense one, or another instead of either."""
    return tawny.recover(source or pair[1], teacher or pair[0], out, **folder_keys(pair, **more))


def recover_live(pruned: Any, dense: Any, **more: Any) -> tawny.RecoveryRecord:
    """A short training of a live model on random tokens."""
    return tawny.recover(pruned, dense, **{"text": tokens(24), **SHORT, **more})


def save_letters(folder: Path, shift: int = 32) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(WordLevel({chr(i + shift): i for i in range(VOCABULARY)}, unk_token=chr(shift)))
    letters.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token=chr(shift)).save_pretrained(folder)


def dense_and_pruned(family: str = "llama", sparsity: float = 0.5, **keys: Any) -> tuple[Any, Any]:
    """Live models."""
    dense = tiny_model(family, **keys)
    pruned = copy.deepcopy(dense)
    tawny.prune(pruned, recipe={**RECIPE, "sparsity": sparsity})
    return dense, pruned


def save_pair(folder: Path) -> tuple[str, str, str]:
    """The same as folders `dense` and `pruned`, and a text."""
    tiny_model("llama").save_pretrained(folder / "dense")
    save_letters(folder / "dense")
    tawny.prune(folder / "dense", folder / "pruned", recipe=RECIPE)
    (folder / "text.txt").write_text(prose(), encoding="utf-8")
    return str(folder / "dense"), str(folder / "pruned"), str(folder / "text.txt")


def prose(letters: int = 3000) -> str:
    """Text with some order in it, so that there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    words = ["the owl ", "sees a mouse ", "in the dark, ", "and the mouse ", "does not. "]
    picks = torch.randint(len(words), (letters // 8,), generator=generator).tolist()
    return "".join(words[pick] for pick in picks)[:letters]


def explode(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the loss become NaN after so many steps of any training."""
    gradients = Training._gradients

    def nan(self: Training, rows: list[int]) -> Any:
        losses = gradients(self, rows)
        if self.standing.step == at:
            losses.next_token = float("nan")
        return losses

    monkeypatch.setattr(Training, "_gradients", nan)


def stopped(monkeypatch: pytest.MonkeyPatch, call: Any, after: int = 3) -> None:
    """Run `call` until Ctrl-C comes after so many steps of one training."""
    step = Training._step

    def stopping(self: Training) -> None:
        if self.standing.step == after:
            self._save()
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_step", stopping)
        with pytest.raises(Interrupted, match="goes on"):
            call()
