"""Several processes that each hold a model and wait for their turn, so that a change of clock falls on all of them.

A child prints one line of JSON when it is ready, and one for each line it reads. This file is itself a child, which any
interpreter that has the runtime can be:

    python benchmarks/turns.py tawny|llama MODEL PROMPT TOKENS THREADS
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import spread


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


def in_turn(
    commands: Mapping[str, Sequence[object]], rounds: int
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What each child said first, and in `rounds` turns after one that warms up."""
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(contextlib.closing(Child(*command)))
            for name, command in commands.items()
        }
        said: dict[str, list[Any]] = {name: [] for name in commands}
        for _ in range(rounds + 1):
            for name, process in running.items():
                said[name].append(process.ask())
        return {name: process.first for name, process in running.items()}, {
            name: lines[1:] for name, lines in said.items()
        }


def rates(seconds: Sequence[Sequence[float]], prompt: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of the turns of one model, with quartiles."""
    found: dict[str, Any] = {}
    for what, count, column in (("prefill", prompt, 0), ("decode", tokens, 1)):
        median, quartiles = spread([count / turn[column] for turn in seconds])
        found |= {f"{what}_tokens_per_second": median, f"{what}_quartiles": quartiles}
    return found


def speeds_of(
    models: Mapping[str, Path], llama: str | None, prompt: int, tokens: int, rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Decode and prefill of finished models, in turn: `.gguf` files by llama.cpp in its environment, others by Tawny.

    Args:
        llama: the interpreter of that environment; without one its files are left out.
    """
    commands = {}
    for name, model in models.items():
        theirs = model.suffix == ".gguf"
        if theirs and llama is None:
            continue
        runtime = [llama, __file__, "llama"] if theirs else [sys.executable, __file__, "tawny"]
        commands[name] = [*runtime, model, prompt, tokens, threads]
    _, seconds = in_turn(commands, rounds)
    return {name: rates(turns, prompt, tokens) for name, turns in seconds.items()}


def answer(lines: Iterator[Any]) -> None:
    """The child's side: a line now, and one for each turn."""
    for line in lines:
        print(json.dumps(line), flush=True)
        if not sys.stdin.readline():
            return  # whoever asked is gone


def of_model(model: Any, prompt: int, tokens: int) -> Iterator[tuple[float, float]]:
    """Seconds of a prompt and of the tokens behind it by our decoder, a turn at a time."""
    import torch

    from tawny.decoding.decoder import Decoder
    from tawny.decoding.swapped import kernels

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
            yield filled - begin, time.perf_counter() - start


def of_gguf(path: Path, prompt: int, tokens: int, threads: int) -> Iterator[tuple[float, float]]:
    """The same by llama.cpp; runs in the environment that has it."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    while True:
        model.reset()
        begin = time.perf_counter()
        model.eval([300 + i % 200 for i in range(prompt)])
        filled = time.perf_counter()
        model.eval([300])  # untimed, as ours
        start = time.perf_counter()
        for i in range(tokens):
            model.eval([300 + i])
        yield filled - begin, time.perf_counter() - start


def main() -> None:
    runtime, model, *numbers = sys.argv[1:]
    prompt, tokens, threads = map(int, numbers)

    def lines() -> Iterator[Any]:
        yield "ready"
        if runtime == "llama":
            yield from of_gguf(Path(model), prompt, tokens, threads)
        import torch

        import tawny

        torch.set_num_threads(threads)
        yield from of_model(tawny.load(model), prompt, tokens)

    answer(lines())


if __name__ == "__main__":
    main()
