"""Whole experts of a mixture: solvers beside other ways to the same bytes.

    python benchmarks/upcycle.py --out MIXTURE --text wiki
    python benchmarks/experts.py --model MIXTURE --text wiki --text PATH.txt
    python benchmarks/experts.py … --cells reap:0.25:uniform fisher:0.25:search channels:0.25 int8

A cell is `SOLVER:SHARE:ALLOCATOR`, where `search` is what `tawny search` finds; `channels:SHARE` removes channels of all experts by `obs`
and slims the model; `int8` and the like pack it. All are compared with the mixture, window by window, so that tables can
say how sure a difference is. `--seeds 0 1 2` adds cells `…@1` and `…@2`, calibrated on other samples. `--loops N` counts loops
among so many continuations of 128 tokens. `--speed` measures only how fast some of them decode, in turns: give it an
idle machine. The same command goes on.
A tiny run: `--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --cells reap:0.25:uniform`.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from cells import parser_for
from frontier import fill
from harness import begun, keep, measured

import tawny
from tawny.evaluation.perplexity import windows_of
from tawny.model.checkpoint import file_bytes
from tawny.model.source import load_tokenizer

SHARES = [0.25, 0.5, 0.125, 0.375]
SOLVERS = ["reap", "fisher", "frequency", "magnitude"]
CELLS = [
    *(f"{solver}:{share}:uniform" for share, solver in itertools.product(SHARES, SOLVERS)),
    *(f"channels:{share}" for share in SHARES),
    "int8",
]
FAST = ["reap:0.25:uniform", "reap:0.5:uniform", "channels:0.5"]
TOKENS = 128  # of a continuation
# Windows of the calibration text, before those that are calibrated on: models are judged on the first.
SKIP = 64


def main() -> None:
    parser = parser_for(__doc__, "experts.json")
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument(
        "--loops", type=int, default=0, help="continuations; only the shares 0.25 and 0.5 of the first seed"
    )
    parser.add_argument("--speed", action="store_true")
    parser.set_defaults(samples=16, seqlen=512, eval_seqlen=512)
    args = parser.parse_args()
    setting = {
        key: getattr(args, key)
        for key in ("calibration", "samples", "seqlen", "eval_seqlen", "windows", "loops")
    }
    setting |= {"model": "SmolLM2 upcycled", "texts": [Path(text).name for text in args.text]}
    tokenizer = load_tokenizer(Path(args.model))  # texts are tokenised once, not once a cell

    def windows(text: str, seqlen: int, first: int, count: int) -> Any:
        return windows_of(text, seqlen, first + count, None, tokenizer).ids[first:]

    args.ids = {Path(text).name: windows(text, args.eval_seqlen, 0, args.windows) for text in args.text}
    args.calibrated = {
        seed: windows(args.calibration, args.seqlen, SKIP + seed * args.samples, args.samples)
        for seed in args.seeds
    }
    results = begun(args.results, setting, cells={}, source={})
    if not results["source"]:
        results["source"] = {
            "bytes": file_bytes(Path(args.model)),
            "texts": judged(Path(args.model), "smollm2", args),
            "loops": looped(Path(args.model), args),
        }
    if args.speed:
        results["speed"] = speeds(args)
        keep(args.results, results)
        return
    names = [name if seed == 0 else f"{name}@{seed}" for seed in args.seeds for name in args.cells]
    fill(args, results, names, lambda name: cell(args, name))


def made(args: Any, name: str, folder: Path) -> dict[str, Any]:
    """Write the checkpoint of a cell, and say what the run says about it."""
    name, _, seed = name.partition("@")
    what, _, rest = name.partition(":")
    keys: dict[str, Any] = {"calibration": args.calibrated[int(seed or 0)], "seed": int(seed or 0)}
    more: dict[str, Any] = {}
    if not rest:
        tawny.pack(args.model, folder, values=what)
    elif what == "channels":
        pruned = folder.with_name("pruned")
        tawny.prune(
            args.model,
            pruned,
            pattern="channels",
            solver="obs",
            allocator="uniform",
            sparsity=float(rest),
            include=["*.experts.*"],  # not of the shared expert
            **keys,
        )
        tawny.slim(pruned, folder)
        shutil.rmtree(pruned)
    else:
        share, _, allocator = rest.partition(":")
        keys |= {"solver": what, "sparsity": float(share)}
        if allocator == "search":
            allocator = str(folder.with_name("found.yaml"))
            found = tawny.search(args.model, allocator, pattern="experts", **keys)
            more["search"] = {
                "winner": found.winner,
                "says": found.says,
                "seconds": found.seconds["total"],
            }
        keys["allocator"] = allocator
        record = tawny.prune(args.model, folder, pattern="experts", **keys)
        went = [one["chosen"][e] for one in record.experts if one["chosen"] for e in one["removed"]]
        more["choices"] = sum(went) / max(1, sum(sum(one["chosen"]) for one in record.experts))
    return more


def cell(args: Any, name: str) -> dict[str, Any]:
    """One row."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tawny-experts-") as scratch:
        folder = Path(scratch) / "out"
        more = made(args, name, folder)
        seconds = time.perf_counter() - begin
        texts = judged(folder, args.model, args)
        wants_loops = name.split(":")[1:2] in (["0.25"], ["0.5"]) and "@" not in name
        return {
            "bytes": file_bytes(folder),
            "seconds": seconds,
            "texts": texts,
            "loops": looped(folder, args) if wants_loops else None,
            **more,
            **measured(),
        }


def speeds(args: Any) -> dict[str, Any]:
    """Tokens a second of some checkpoints in int8, each measured so many times in turns."""
    with tempfile.TemporaryDirectory(prefix="tawny-experts-") as scratch:
        folders = {"whole": Path(args.model)}
        for name in FAST:
            folders[name] = Path(scratch) / name.replace(":", "-") / "out"
            folders[name].parent.mkdir()
            made(args, name, folders[name])
        packed = {name: Path(scratch) / f"{name.replace(':', '-')}-int8" for name in folders}
        for name, folder in folders.items():
            tawny.pack(folder, packed[name], values="int8")
        rates: dict[str, list[float]] = {name: [] for name in packed}
        for _, name in itertools.product(range(3), packed):
            rates[name].append(tawny.bench(packed[name], tokens=24, rounds=2).decode_tokens_per_second)
        sizes = {name: file_bytes(folder) for name, folder in packed.items()}
        return {"rates": rates, "bytes": sizes, **measured()}


def judged(model: Path, against: str, args: Any) -> dict[str, Any]:
    """A model beside another on every text, with the KL of each window, for differences in pairs."""
    texts = {}
    for text, ids in args.ids.items():
        found = tawny.agreement(model, against, ids)
        texts[text] = {
            "kl": found.kl,
            "kl_stderr": found.kl_stderr,
            "top1": found.top1,
            "perplexity": found.perplexity.perplexity,
            "dense": found.dense.perplexity,
            "kl_by_window": [round(kl, 6) for kl in found.kl_by_window],
        }
    return texts


def looped(folder: Path, args: Any) -> int | None:
    """Continuations of the first text that repeat themselves; None where none are asked for."""
    if not args.loops:
        return None
    return tawny.loops(folder, args.text[0], prompts=args.loops, tokens=TOKENS).looped


if __name__ == "__main__":
    main()
