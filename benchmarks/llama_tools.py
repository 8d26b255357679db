"""llama.cpp's own programs, as `make llama` builds them: its files of a type, its importance matrix, its judgement, its `llama-bench`."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROOT
from torch import Tensor

import tawny
from tawny.calibration.mixture import load_texts
from tawny.calibration.windows import sample_windows, tokenise
from tawny.model.source import load_tokenizer

THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


def program(name: str) -> Path:
    """One of the programs.

    Raises:
        SystemExit: it is not built.
    """
    path = ROOT / "build" / "llama" / "bin" / f"llama-{name}"
    if not path.exists():
        raise SystemExit("llama.cpp's programs are not built here: make llama")
    return path


def run(name: str, *options: object) -> str:
    """What a program prints, its complaints included.

    Raises:
        SystemExit: it is not built, or fails.
    """
    count = [THREADS] if name == "quantize" else ["--threads", THREADS]
    words = [str(word) for word in (program(name), *options, *count)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{' '.join(words)} failed (exit code {done.returncode})")
    return done.stdout


def whole(model: str | Path, folder: Path) -> Path:
    """The GGUF file of a model as it is stored, made once in `folder`."""
    path = folder / "source.gguf"
    if not path.exists():
        tawny.export(model, path, to="gguf")
    return path


def quantise(model: str | Path, out: Path, kind: str, matrix: Path | None = None) -> None:
    """llama.cpp's file of a type, with an importance matrix if there is one; `source.gguf`, the whole model, lies beside it."""
    unfinished = out.with_suffix(".partial")
    weighted = [] if matrix is None else ["--imatrix", matrix]
    run("quantize", *weighted, whole(model, out.parent), unfinished, kind)
    unfinished.rename(out)


def importance(model: Path, calibration: Mapping[str, Any], seed: int, out: Path) -> Path:
    """llama.cpp's importance matrix of a model, made once at `out`, from the windows that a fit with this `calibration`
    (`text`, `samples`, `seqlen`) and seed reads; llama.cpp reads them as text, one after another."""
    if not out.exists():
        tokenizer = load_tokenizer(model)
        tokens = tokenise(load_texts(calibration["text"], "calibration", tokenizer), tokenizer)
        windows = sample_windows(tokens, calibration["samples"], calibration["seqlen"], seed)
        unfinished, text = out.with_suffix(".partial.gguf"), out.with_suffix(".txt")
        text.write_text("".join(tokenizer.decode(row) for row in windows), encoding="utf-8")
        source = whole(model, out.parent)
        run("imatrix", "-m", source, "-f", text, "-c", windows.shape[1], "-o", unfinished, "--no-ppl")
        unfinished.rename(out)
    return out


class Judge:
    """`llama-perplexity` on the first windows of a text, of which it scores the second halves.

    Args:
        source: the whole model's GGUF file, whose probabilities are kept in `base`, 2 bytes each.
        text: holds the windows `[windows, seqlen]` one after another, from its beginning.

    Raises:
        SystemExit: llama.cpp reads the text as other tokens.
    """

    def __init__(self, source: Path, text: str, windows: Tensor, base: Path) -> None:
        self.windows, self.base, self.seqlen = windows, base, int(windows.shape[1])
        if not base.exists():
            written, unfinished = base.with_suffix(".txt"), base.with_suffix(".partial")
            written.write_text(text, encoding="utf-8")
            chunks = ["--chunks", len(windows), "--save-all-logits", unfinished]
            run("perplexity", "-m", source, "-f", written, *self.context, *chunks)
            unfinished.rename(base)
        with base.open("rb") as file:
            *_, chunks = struct.unpack("8siii", file.read(20))
            tokens = np.frombuffer(file.read(4 * chunks * self.seqlen), np.int32).reshape(chunks, -1)
        if not np.array_equal(tokens, windows.numpy()):
            raise SystemExit(f"llama.cpp reads other tokens in {base.with_suffix('.txt')} than Tawny")

    @property
    def context(self) -> tuple[object, ...]:
        return ("-c", self.seqlen, "-b", self.seqlen)

    def kl(self, file: Path) -> dict[str, float]:
        """KL(whole ‖ file) and its standard error over tokens, and top-1 agreement, as llama.cpp computes them."""
        said = run(
            "perplexity", "-m", file, "--kl-divergence", "--kl-divergence-base", self.base, *self.context
        )
        values = {}
        for key, pattern in (("kl", r"Mean +KLD"), ("top1", "Same top p"), ("perplexity", r"Mean PPL\(Q\)")):
            mean, error = map(float, re.search(rf"{pattern} *: *([\d.]+) ± *([\d.]+)", said).groups())
            values |= {key: mean, f"{key}_stderr": error}
        return values | {"top1": values["top1"] / 100, "top1_stderr": values["top1_stderr"] / 100}

    def ours(self, file: Path, dense: Path) -> dict[str, float]:
        """The same by Tawny's evaluator, at the same positions: of whole windows less what is before their second halves."""
        first = self.seqlen // 2 + 1
        sums = torch.zeros(2, dtype=torch.float64)
        for windows, sign in ((self.windows, 1), (self.windows[:, :first], -1)):
            found = tawny.agreement(file, dense, windows, compute="float32")
            sums += sign * (windows.shape[1] - 1) * torch.tensor([found.kl, found.top1])
        kl, top1 = (sums / (self.seqlen - first)).tolist()
        return {"kl": kl, "top1": top1}
