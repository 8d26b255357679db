"""A GGUF file measured by `llama-bench`, llama.cpp's own program, so that its rounds can take turns with ours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from tawny.errors import CheckpointError, MissingFeature, UserError, short

PROGRAM = "llama-bench"


class Turn(NamedTuple):
    """Tokens a second of one round."""

    prefill: float
    decode: float


class LlamaBench:
    """`llama-bench` of one file, on the CPU. After a turn `type` is llama.cpp's word for the model and its type.

    Args:
        program: `llama-bench`, or the folder that holds it.

    Raises:
        MissingFeature: there is no such program.
        CheckpointError: the file is not a GGUF file.
    """

    def __init__(self, program: Path, file: Path) -> None:
        self.program = program / PROGRAM if program.is_dir() else program
        self.file, self.type = file, ""
        if not (self.program.is_file() and os.access(self.program, os.X_OK)):
            raise MissingFeature(
                f"{self.program} is not a program; give llama.cpp's {PROGRAM}, or the folder that holds it"
            )
        try:
            with file.open("rb") as opened:
                begins = opened.read(4)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}; expected a GGUF file") from None
        if begins != b"GGUF":
            raise CheckpointError(f"{file} is not a GGUF file; give one that {PROGRAM} can open")

    def turn(self, prompt: int, tokens: int, threads: int) -> Turn:
        """One round: a prompt, and tokens decoded behind a prompt of that length.

        Raises:
            UserError: the program failed.
        """
        prefill = self._measured("-p", prompt, "-n", 0, "-t", threads)
        return Turn(prefill, self._measured("-p", 0, "-n", tokens, "-d", prompt, "-t", threads))

    def _measured(self, *options: object) -> float:
        """Tokens a second of one test, after the program's own warming up."""
        on_cpu = ("-ngl", 0, "-nopo", 1)  # programs built for a GPU would use it for prompts
        command = [self.program, "-m", self.file, "-r", 1, "-o", "json", *on_cpu, *options]
        try:
            done = subprocess.run(
                list(map(str, command)), capture_output=True, encoding="utf-8", errors="replace"
            )
        except OSError as error:
            raise UserError(f"{self.program} cannot be run: {error.strerror}") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            reason = next((line for line in lines if "error" in line.lower()), lines[-1])
            raise UserError(
                f"{self.program} failed on {self.file} (exit code {done.returncode}): {short(reason)}"
            )
        try:
            (test,) = json.loads(done.stdout)
            self.type = str(test["model_type"])
            return float(test["avg_ts"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.program} printed no result of {PROGRAM}; is it another program?"
            ) from None
