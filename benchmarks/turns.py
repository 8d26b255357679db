"""Several processes that each hold a model and wait for their turn, so that a change of clock falls on all of them.

A child prints one line of JSON when it is ready, and one for each line it reads. This file is itself a child:

    python benchmarks/turns.py MODEL PROMPT TOKENS THREADS
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import spread
from llama_tools import program

import tawny
from tawny.decoding.decoder import Decoder
from tawny.decoding.swapped import kernels
from tawny.evaluation.llama import LlamaBench


class Child:
    """A process that answers lines with JSON; `first` is what it says when it is ready."""

    def __init__(self, *command: object) -> None:
        words = list(map(str, command))
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first = self._read()

    def ask(self, line: str = "go") -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def in_turn(models: Mapping[str, Callable[[], Sequence[float]]], rounds: int) -> dict[str, dict[str, Any]]:
    """Prefill and decode of models, tokens a second with quartiles: medians of `rounds` turns after one that warms up."""
    turns = [{name: turn() for name, turn in models.items()} for _ in range(rounds + 1)][1:]
    found: dict[str, dict[str, Any]] = {}
    for name in models:
        found[name] = {}
        for column, what in enumerate(("prefill", "decode")):
            median, quartiles = spread([rates[name][column] for rates in turns])
            found[name] |= {f"{what}_tokens_per_second": median, f"{what}_quartiles": quartiles}
    return found


def speeds_of(
    models: Mapping[str, Path], prompt: int, tokens: int, rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    """`in_turn` of finished models: `.gguf` files by `llama-bench`, others by Tawny, each in a process of its own."""
    turns: dict[str, Callable[[], Sequence[float]]] = {}
    with contextlib.ExitStack() as stack:
        for name, model in models.items():
            if model.suffix == ".gguf":
                turns[name] = partial(LlamaBench(program("bench"), model).turn, prompt, tokens, threads)
            else:
                child = Child(sys.executable, __file__, model, prompt, tokens, threads)
                turns[name] = stack.enter_context(contextlib.closing(child)).ask
        return in_turn(turns, rounds)


def answer(lines: Iterator[Any]) -> None:
    """The child's side: a line now, and one for each turn."""
    for line in lines:
        print(json.dumps(line), flush=True)
        if not sys.stdin.readline():
            return  # whoever asked is gone


def of_model(model: Any, prompt: int, tokens: int) -> Iterator[tuple[float, float]]:
    """Tokens a second of a prompt and of the tokens behind it by our decoder, a turn at a time."""
    vocabulary = model.config.vocab_size
    with torch.inference_mode(), kernels(model):
        while True:
            decoder = Decoder(model, prompt + tokens + 2)
            begin = time.perf_counter()
            decoder.prefill(torch.arange(300, 300 + prompt) % vocabulary)
            filled = time.perf_counter()
            decoder.step(300)  # the quick path is decided here
            start = time.perf_counter()
            for i in range(tokens):
                decoder.step(300 + i)
            assert decoder.path == "blocks"
            yield prompt / (filled - begin), tokens / (time.perf_counter() - start)


def main() -> None:
    model, *numbers = sys.argv[1:]
    prompt, tokens, threads = map(int, numbers)

    def lines() -> Iterator[Any]:
        yield "ready"
        torch.set_num_threads(threads)
        yield from of_model(tawny.load(model), prompt, tokens)

    answer(lines())


if __name__ == "__main__":
    main()
