"""Divergence from the dense model against the bytes of the files: one kind for all, zeros and bits, `tawny fit`, other tools.

    python benchmarks/frontier.py --text wiki --text PATH.txt
    python benchmarks/frontier.py --text wiki --source scaled --cells          # writes the model that all start from
    python benchmarks/frontier.py --text wiki --gguf scaled-Q4_K_M.gguf scaled-Q3_K_M.gguf

All start from the same model, whose channels were scaled so that no side meets a grid again (fair_start.py). A cell is
`KIND:GROUP:SPARSITY` (pruned by ALPS, head in int8), `fit:BITS`, or a `.gguf` file that another tool made of `--source`; the
last is judged dequantised, by the same evaluator. The same command goes on where a run was stopped. A tiny run:
`--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --cells int4:64:0 fit:4`.
"""

from __future__ import annotations

import datetime
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cells import parser_for
from fair_start import scale_channels

import tawny
from tawny.machine import machine, versions
from tawny.model.durable import write

UNIFORM = [
    "int8::0",
    "int6:64:0",
    "int5:64:0",
    "int4:32:0",
    "int4:64:0",
    "int4:128:0",
    "int3:32:0",
    "int3:64:0",
]
CELLS = [*UNIFORM, "int8::0.5", "int4:64:0.5", "int3:64:0.5", "fit:3", "fit:3.5", "fit:4", "fit:4.5"]


def main() -> None:
    parser = parser_for(__doc__, "frontier.json")
    parser.add_argument("--source", type=Path, help="folder of the scaled model; default: made for the run")
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument(
        "--gguf", nargs="*", default=[], type=Path, help="files made of --source by another tool"
    )
    parser.set_defaults(samples=16)
    args = parser.parse_args()
    setting = {
        key: getattr(args, key) for key in ("calibration", "samples", "seqlen", "eval_seqlen", "windows")
    }
    setting |= {"model": Path(args.model).name, "texts": [Path(text).name for text in args.text]}
    setting |= {"channels": "scaled, log-normal 0.1, seed 0"}
    results: dict[str, Any] = {"setting": setting, "cells": {}}
    if args.results.exists():
        results = json.loads(args.results.read_text(encoding="utf-8"))
        if results["setting"] != setting:
            raise SystemExit(f"{args.results} holds another setting; give another --results")
    work = Path(tempfile.mkdtemp(prefix="tawny-frontier-"))
    try:
        source = args.source or work / "source"
        if not source.exists():
            write_source(args.model, source)
        for name in [*args.cells, *map(str, args.gguf)]:
            key = Path(name).name
            if key in results["cells"]:
                continue
            results["cells"][key] = made = cell(args, source, name, work / "cell")
            shutil.rmtree(work / "cell", ignore_errors=True)
            results |= {"machine": machine(), "versions": versions(), "date": str(datetime.date.today())}
            args.results.parent.mkdir(parents=True, exist_ok=True)
            write(args.results, (json.dumps(results, indent=1) + "\n").encode())
            shown = ", ".join(
                f"{k} KL {v['kl']:.4f} ppl {v['perplexity']:.2f}" for k, v in made["texts"].items()
            )
            print(f"{key}: {made['bytes'] / 1e6:.1f} MB, {made['seconds']:.0f} s, {shown}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_source(model: str, source: Path) -> None:
    """The scaled model, in the type of the checkpoint."""
    from tawny.evaluation.sources import load_tokenizer, open_model, resolve
    from tawny.model.checkpoint import Checkpoint

    folder = resolve(model)
    dtypes = {Checkpoint(folder).dtype_of(key) for key in Checkpoint(folder).files}
    live = open_model(folder, max(dtypes, key=lambda dtype: dtype.itemsize))
    scale_channels(live)
    live.save_pretrained(source)
    load_tokenizer(folder).save_pretrained(source)


def cell(args: Any, source: Path, name: str, folder: Path) -> dict[str, Any]:
    calibration = {"text": args.calibration, "samples": args.samples, "seqlen": args.seqlen}
    keys: dict[str, Any] = {f"calibration.{key}": value for key, value in calibration.items()}
    more: dict[str, Any] = {}
    if name.startswith("fit:"):
        fitted = tawny.fit(source, folder / "packed", bits=float(name[4:]), **keys)
        made, size, seconds = folder / "packed", fitted.bytes, fitted.seconds["total"]
        more = {
            "winner": fitted.winner,
            "zeros": fitted.zeros,
            "lead": fitted.lead,
            "finalists": fitted.finalists,
        }
    elif name.endswith(".gguf"):
        made, size, seconds = Path(name), Path(name).stat().st_size, 0.0
    else:
        kind, group, sparsity = name.split(":")
        values = {"kind": kind, "group_size": int(group) if group else None}
        record = tawny.prune(source, folder / "dense", values=values, sparsity=float(sparsity), **keys)
        report = tawny.pack(folder / "dense", folder / "packed", head="int8")
        made, size, seconds = folder / "packed", report.file_bytes, record.seconds["total"]
    texts = {}
    for text in args.text:
        found = tawny.agreement(made, source, text, seqlen=args.eval_seqlen, windows=args.windows)
        texts[Path(text).name] = {
            "kl": found.kl,
            "kl_stderr": found.kl_stderr,
            "top1": found.top1,
            "perplexity": found.perplexity.perplexity,
            "dense": found.dense.perplexity,
        }
    return {"bytes": size, "seconds": seconds, "texts": texts, **more}


if __name__ == "__main__":
    main()
