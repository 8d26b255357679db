"""A step of recovery where the vocabulary is large: today's losses beside those of another commit, by turns in one process.

    python benchmarks/recovery_step.py --model gemma-3-270m.gguf --base COMMIT
    python benchmarks/recovery_step.py --model smollm2 --base COMMIT --batch 4 --rounds 5

The model is pruned by magnitude and trained for one step a round; only `recovery/objective.py` differs between the sides, so that
blocks, optimiser and text are the same. Beside the wall time stands the processor time, which a busy machine disturbs less.
`heads` is the part of the step in `distil`: both heads forward, the student's backward, and the losses. `floor` is what the
matrix products of the heads alone take, measured at the tokens of one chunk.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tawny
from tawny.machine import machine, versions
from tawny.recovery import objective, training
from tawny.recovery.training import Training

RESULTS = Path(__file__).parent / "results" / "recovery_step.json"
FILE = "src/tawny/recovery/objective.py"


class Timed:
    """Wall and processor seconds of every call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.spent = call, []

    def __call__(self, *args: Any, **keys: Any) -> Any:
        begun = time.perf_counter(), time.process_time()
        try:
            return self.call(*args, **keys)
        finally:
            self.spent.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))


def objective_of(commit: str) -> types.ModuleType:
    text = subprocess.run(
        ["git", "show", f"{commit}:{FILE}"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout
    made = sys.modules["objective_of_base"] = types.ModuleType("objective_of_base")
    exec(compile(text, FILE, "exec"), made.__dict__)
    return made


def step(
    side: types.ModuleType, dense: Any, pruned: Any, windows: torch.Tensor, batch: int
) -> dict[str, Any]:
    """One optimiser step with the losses of `side`, on a fresh copy of the pruned weights' values."""
    distil, gradients = Timed(side.distil), Training._gradients
    whole: list[Timed] = []

    def timed(self: Training, rows: list[int]) -> Any:
        distil.spent.clear()
        whole.append(Timed(lambda: gradients(self, rows)))
        return whole[-1]()

    training.distil, training.chunk_tokens, Training._gradients = distil, side.chunk_tokens, timed  # type: ignore[method-assign]
    try:
        keys = {
            "tokens": batch * windows.shape[1],
            "batch": batch,
            "eval_every": 10**6,
            "eval_windows": 1,
            "lr": 1e-9,
        }
        record = tawny.recover(pruned, dense, text=windows[:-1], held_out=windows[-1:, :], **keys)
    finally:
        training.distil, training.chunk_tokens = objective.distil, objective.chunk_tokens
        Training._gradients = gradients  # type: ignore[method-assign]
    heads = [sum(times) for times in zip(*distil.spent[:1], strict=True)]
    wall, cpu = whole[0].spent[0]
    return {
        "wall": wall,
        "cpu": cpu,
        "heads_wall": heads[0],
        "heads_cpu": heads[1],
        "loss": record.curve[0]["loss"],
        "kl": record.curve[0]["kl"],
        "norm": record.curve[0]["norm"],
    }


def floor(head: torch.Tensor, tokens: int) -> float:
    """Processor seconds a token of the three products of the heads, at so many tokens at once."""
    hidden, slope = (
        torch.randn(tokens, head.shape[1]).to(head.dtype),
        torch.randn(tokens, head.shape[0]).to(head.dtype),
    )
    torch.nn.functional.linear(hidden, head)
    begun = time.process_time()
    for _ in range(2):
        torch.nn.functional.linear(hidden, head)
    slope @ head
    return (time.process_time() - begun) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--base", required=True, help="commit whose losses are the other side")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    from tawny.precision import native_dtype

    dense = tawny.load(args.model, dtype=native_dtype())
    pruned = copy.deepcopy(dense)
    tawny.prune(pruned, sparsity=0.5, allocator="uniform", solver="magnitude")
    vocabulary, width = dense.get_output_embeddings().weight.shape
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(100, vocabulary, (args.batch + 1, args.seqlen), generator=generator)
    sides = {"base": objective_of(args.base), "now": objective}
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        rounds.append({name: step(side, dense, pruned, windows, args.batch) for name, side in sides.items()})
        print(json.dumps(rounds[-1]), flush=True)
    tokens = args.batch * args.seqlen
    chunks = {name: min(side.chunk_tokens(vocabulary), tokens) for name, side in sides.items()}
    head = dense.get_output_embeddings().weight.detach()
    cell: dict[str, Any] = {
        "model": Path(args.model).name,
        "vocabulary": vocabulary,
        "hidden": width,
        "tokens": tokens,
        "base": args.base,
        "chunk_tokens": chunks,
        "floor_cpu_seconds": {name: floor(head, count) * tokens for name, count in chunks.items()},
        "rounds": rounds,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    for key in ("wall", "cpu", "heads_cpu"):
        medians = {name: statistics.median(one[name][key] for one in rounds) for name in sides}
        cell[f"{key}_speedup"] = medians["base"] / medians["now"]
        print(
            key,
            {name: f"{tokens / seconds:.1f} tokens/s" for name, seconds in medians.items()},
            f"× {cell[f'{key}_speedup']:.2f}",
        )
    found = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else []
    found = [one for one in found if one["model"] != cell["model"]] + [cell]
    args.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
