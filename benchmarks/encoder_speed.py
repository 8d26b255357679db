"""How long an encoder takes for a few tokens and for many: packed beside dense, the models in turns in one process.

    python benchmarks/encoder_speed.py --model minilm=FOLDER --model vit-small=FOLDER        # on a quiet machine

Each model is dense in float32 and bfloat16, and packed at 50 % with bf16 and int8 values and without zeros with int4. What is
packed computes in the type of its checkpoint, and with int8 values in bfloat16, too. Zeros are those of `magnitude`: speed asks
how many there are, not which. A text encoder reads one sentence of so many tokens, a vision transformer one picture. Medians
over rounds, one round of all models behind the other. A tiny run: `--rounds 2 --tokens 8 --results FILE`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import keep, parser_of

import tawny
from tawny.evaluation.latency import inputs_for
from tawny.model.structure import TOKENS, evaluating, input_of

PACKED: dict[str, dict[str, Any]] = {
    "50 %, bf16": {"sparsity": 0.5, "pack": "bf16"},
    "50 %, int8": {"sparsity": 0.5, "pack": "int8"},
    "int4": {"sparsity": 0.0, "values": "int4"},
}


def main() -> None:
    parser = parser_of(__doc__, "encoder_speed.json")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 32, 128, 196, 512])
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    results: dict[str, Any] = {"rounds": args.rounds, "models": {}}
    for named in args.model:
        name, _, folder = named.partition("=")
        with tempfile.TemporaryDirectory(prefix="tawny-speed-") as work:
            results["models"][name] = measure(name, folder, Path(work), args)
    keep(args.results, results)


def measure(name: str, folder: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each model for each number of tokens, and the bytes of its files."""
    models = {dtype: tawny.load(folder, dtype=dtype) for dtype in ("float32", "bfloat16")}
    dense = models["float32"]
    reads = input_of(dense) == TOKENS
    head = "int8" if reads else None  # of text encoders the embedding, most of a small one
    sizes = {}
    for kind, keys in PACKED.items():
        made = work / kind.replace(" ", "")
        how = {key: value for key, value in keys.items() if key != "pack"}
        tawny.prune(folder, made, solver="magnitude", allocator="uniform", **how)
        report = tawny.pack(made, made.with_suffix(".packed"), keys.get("pack"), head=head)
        sizes[kind] = report.file_bytes
        models[kind] = tawny.load(made.with_suffix(".packed"))
        if keys.get("pack") == "int8":
            models[f"{kind} in bfloat16"] = tawny.load(made.with_suffix(".packed"), dtype="bfloat16")
    rows = []
    for tokens in args.tokens if reads else [None]:
        taken: dict[str, list[float]] = {kind: [] for kind in models}
        for number in range(args.rounds + 2):
            for kind, model in models.items():
                inputs = inputs_for(model, 1, tokens or 1)
                with evaluating(model), torch.inference_mode():
                    start = time.perf_counter()
                    model(**inputs)
                    if number > 1:
                        taken[kind].append(time.perf_counter() - start)
        row = {kind: statistics.median(seconds) for kind, seconds in taken.items()}
        rows.append({"tokens": tokens, "seconds": row, "all": taken})
        shown = ", ".join(f"{kind} {1000 * seconds:.2f} ms" for kind, seconds in row.items())
        print(f"{name}, {tokens or 'a picture'}: {shown}", flush=True)
    weights = sum(parameter.numel() for parameter in dense.parameters())
    return {"weights": weights, "bytes": sizes, "threads": torch.get_num_threads(), "rows": rows}


if __name__ == "__main__":
    main()
