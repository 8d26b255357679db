"""Whole channels and heads, and whole blocks: solver by allocator by sparsity, the same calibration for all.

    python benchmarks/structured.py --text wiki --text other.txt
    python benchmarks/structured.py --text wiki --text other.txt --pattern blocks --allocator uniform --solver divergence influence
    python benchmarks/structured.py --text wiki --text other.txt --pattern rank --solver svd
    python benchmarks/structured.py --text wiki --text other.txt --speed --samples 32 --seqlen 1024 --results speed.json

Cells are made sparsity by sparsity; the same command goes on (see cells.py). A tiny run:
`--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --sparsity 0.2 --solver flap --allocator uniform`.

`--speed` wants a quiet machine. It slims the model at the last sparsity with one width for all blocks, and times prompts of 512 tokens
and single tokens in plain transformers beside the dense model, in turns. Beside the gain stands what fewer bytes of
weights that a token reads would give alone, and for prompts fewer operations. Then it times one pass of obs beside one of SparseGPT.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cells import Cells, Keys, parser_for
from harness import origin
from transformers import AutoModelForCausalLM, DynamicCache

import tawny

SOLVERS = ["obs", "flap", "wanda", "magnitude"]
ALLOCATORS = ["uniform", "owl"]
PROMPT, TOKENS = 512, 32
PASSES = (("obs", "channels+heads"), ("sparsegpt", "unstructured"))


def main() -> None:
    parser = parser_for(__doc__, "structured.json")
    parser.set_defaults(samples=16, seqlen=512, eval_seqlen=512)
    parser.add_argument("--pattern", nargs="+", default=["channels+heads"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--allocator", nargs="+", default=ALLOCATORS)
    parser.add_argument("--solver", nargs="+", default=SOLVERS)
    parser.add_argument("--speed", action="store_true", help="measure speeds instead, on a quiet machine")
    parser.add_argument(
        "--passes", action=argparse.BooleanOptionalAction, default=True, help="with --speed: time a pass, too"
    )
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    cells = Cells(args)
    if args.speed:
        cells.results["speed"] = speed(args)
        cells.save()
        return
    wanted: list[Keys] = [
        {"pattern": pattern, "sparsity": sparsity, "allocator": allocator, "solver": solver, "seed": seed}
        for seed, pattern, sparsity, allocator, solver in itertools.product(
            args.seeds, args.pattern, args.sparsity, args.allocator, args.solver
        )
    ]
    cells.run(wanted)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "calibration.text": args.calibration,
        "calibration.samples": args.samples,
        "calibration.seqlen": args.seqlen,
    }


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the dense and the slim model in plain transformers, and how long a pass takes."""
    folder = Path(tempfile.mkdtemp(prefix="tawny-speed-"))
    sparsity = args.sparsity[-1]
    try:
        keys: dict[str, Any] = {"sparsity": sparsity, "allocator": "uniform"}
        # Widths are those of any solver, and zeros do not change how fast a dense model is.
        tawny.prune(args.model, folder / "dense", pattern="channels+heads", solver="magnitude", **keys)
        tawny.slim(folder / "dense", folder / "slim")
        found = in_transformers({name: folder / name for name in ("dense", "slim")}, args.rounds)
        keys |= options_of(args)
        passes = {}
        for solver, pattern in PASSES if args.passes else ():
            record = tawny.prune(args.model, folder / solver, pattern=pattern, solver=solver, **keys)
            passes[solver] = record.seconds
            print(f"{solver}: {record.seconds['total']:.0f} s", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "sparsity": sparsity,
        "models": found,
        "passes": passes,
        "samples": args.samples,
        "seqlen": args.seqlen,
        **origin(),
    }


@torch.inference_mode()
def in_transformers(folders: dict[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """Of each model medians of `rounds` rounds, the models in turns; the first round warms up."""
    models = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in folders.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "decode": []} for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            prompt, decode = one_round(model)
            if number:
                times[name]["prompt"].append(PROMPT / prompt)
                times[name]["decode"].append(TOKENS / decode)
    found = {}
    for name, model in models.items():
        head = model.get_output_embeddings().weight
        inside = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p is not head)
        if model.get_input_embeddings().weight is not head:
            inside -= model.get_input_embeddings().weight.numel()
        found[name] = {
            "tokens_per_second": {kind: statistics.median(values) for kind, values in times[name].items()},
            "all": times[name],
            "read_bytes": (inside + head.numel()) * head.element_size(),
            "block_weights": inside,
            "dtype": str(head.dtype).removeprefix("torch."),
        }
    return found


def one_round(model: Any) -> tuple[float, float]:
    """Seconds of one prompt, and of the tokens after it."""
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    begin = time.perf_counter()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    filled = time.perf_counter()
    for _ in range(TOKENS):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return filled - begin, time.perf_counter() - filled


if __name__ == "__main__":
    main()
