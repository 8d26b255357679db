"""How much quality comes back: one-shot, recovered after so many minutes, and what else the same minutes buy.

    python benchmarks/recovery.py --other PATH.txt --recipe recipes/fast.yaml --samples 64      # 50/60/70 %, 10/30/60 minutes
    python benchmarks/recovery.py … --only 1                                # one more cell, then stop
    python benchmarks/recovery.py … --sparsity 0.5 --minutes 60 --kind recovered

A cell is one model: `one-shot` (pruned), `reconstructed` (with three epochs a block), `recovered` (masked distillation for
M minutes, the teacher's forwards and all measurements included), and the `control` (the dense model trained for M minutes like
the pruned ones, because training on a text also adapts to it). Each is measured on every text: perplexity, KL and first choices
against the dense model; and packed: size and decoding speed. Finished cells are not repeated, a stopped recovery goes on
where it was, so a run can be stopped at any time. `--speeds` measures size and speed of the dense model and of every model
that `--keep` left, one after the other, on a machine that does nothing else: ratios between rows of other runs say little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from harness import keep, parser_of

import tawny
from tawny.progress import Silent

KINDS = ("one-shot", "reconstructed", "recovered", "control")
SHIPPED = ("one-shot", "reconstructed", "recovered")  # with their zeros: size and speed are of these
EPOCHS = 3  # of block reconstruction


class Say(Silent):
    def say(self, text: str) -> None:
        print(f"    {text}", flush=True)


# --- one model -------------------------------------------------------------------------------------------------------


def measure(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on every text, and KL and first choices against the dense model where it is not the dense one."""
    made: dict[str, Any] = {}
    keys = {"seqlen": args.eval_seqlen, "windows": args.windows}
    for text in args.texts:
        entry = {}
        if folder == args.model:
            result = tawny.evaluate(folder, text, **keys)
        else:
            against = tawny.agreement(folder, args.model, text, **keys)
            result, entry = against.perplexity, {"kl": against.kl, "top1": against.top1}
        names = ("perplexity", "stderr", "windows", "seqlen", "text_sha256")
        made[Path(text).name] = {key: getattr(result, key) for key in names} | entry
    return made


def packed(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Size and decoding speed of the model, packed unless it is dense."""
    with_zeros = tawny.inspect(folder).sparsity > 0.1
    target = args.scratch / "packed"
    shutil.rmtree(target, ignore_errors=True)
    if with_zeros:
        tawny.pack(folder, target)
        folder = str(target)
    speed = tawny.bench(folder, rounds=args.rounds, prompt_tokens=args.prompt_tokens).to_dict()
    shutil.rmtree(target, ignore_errors=True)
    keys = ("file_bytes", "decode_tokens_per_second", "resident_bytes", "threads", "kernel")
    return {key: speed.get(key) for key in keys}


def prune(source: str, out: Path, sparsity: float, args: argparse.Namespace, epochs: int = 0) -> float:
    """Seconds of pruning; nothing if it is there."""
    if out.exists():
        return float(json.loads((out / "run.json").read_text())["seconds"]["total"])
    keys: dict[str, Any] = {"sparsity": sparsity, "calibration": args.text}
    keys |= {"calibration.samples": args.samples, "calibration.seqlen": args.seqlen}
    if epochs:
        keys["refine.epochs"] = epochs
    record = tawny.prune(source, out, recipe=args.recipe, **keys)
    return record.seconds["total"]


def recover(source: str, out: Path, minutes: float, args: argparse.Namespace, **keys: Any) -> dict[str, Any]:
    if not out.exists():
        given = dict(item.split("=", 1) for item in args.option)
        settings = {"text": args.text, "minutes": minutes, "tokens": "1000M", **given, **keys}
        tawny.recover(source, args.model, out, settings=settings, progress=Say())
    record = json.loads((out / "recover.json").read_text())
    kept = (
        "steps",
        "tokens",
        "tokens_per_second",
        "teacher_tokens",
        "seconds",
        "sparsity",
        "zeros",
        "zeros_before",
    )
    return {key: record[key] for key in (*kept, "settings", "stopped", "start", "best", "measured")}


# --- all of it -----------------------------------------------------------------------------------------------------


def wanted(args: argparse.Namespace) -> list[dict[str, Any]]:
    cells = [{"kind": k, "sparsity": s, "minutes": 0} for k in KINDS[:2] for s in args.sparsity]
    # Long runs last: what is there after an hour should say something about every sparsity.
    for minutes, kind in itertools.product(args.minutes, ("recovered", "control")):
        sparsities = [0.0] if kind == "control" else args.sparsity
        cells += [{"kind": kind, "sparsity": s, "minutes": minutes} for s in sparsities]
    return [cell for cell in cells if cell["kind"] in args.kind]


def place(cell: dict[str, Any], args: argparse.Namespace) -> Path:
    """Folder of a cell's model."""
    name = f"{cell['kind']}-{cell['sparsity']:g}"
    return args.scratch / (name if cell["kind"] == "one-shot" else f"{name}-{cell['minutes']:g}")


def make(cell: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    sparsity, minutes, kind = cell["sparsity"], cell["minutes"], cell["kind"]
    one_shot = args.scratch / f"one-shot-{sparsity:g}"
    out = place(cell, args)
    more: dict[str, Any] = {}
    if kind == "control":
        more["recovery"] = recover(args.model, out, minutes, args, control=True)
    elif kind == "reconstructed":
        more["prune_seconds"] = prune(args.model, out, sparsity, args, EPOCHS)
    else:
        more["prune_seconds"] = prune(args.model, one_shot, sparsity, args)
        if kind == "recovered":
            more["recovery"] = recover(str(one_shot), out, minutes, args)
    made = {
        **cell,
        **more,
        "evaluation": measure(str(out), args),
        "sparsity_found": tawny.inspect(out).sparsity,
    }
    if kind in SHIPPED and args.rounds:
        made["packed"] = packed(str(out), args)
    if kind != "one-shot" and not args.keep:
        shutil.rmtree(out)
    return made


def main() -> None:
    parser = parser_of(__doc__, "recovery.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--text", default="wiki", help="to calibrate and train on; its other part is measured on"
    )
    parser.add_argument(
        "--other", action="append", default=[], help="a text of another domain to measure on too"
    )
    parser.add_argument(
        "--recipe", default=None, help="YAML file for the one-shot model; default: Tawny's own"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 30, 60])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "-o", "--option", action="append", default=[], help="setting of the recovery, KEY=VALUE"
    )
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="of the decoding speed; 0 leaves it out")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="in front of what is decoded")
    parser.add_argument(
        "--scratch", type=Path, default=Path("recovery-bench"), help="pruned models and states"
    )
    parser.add_argument("--keep", action="store_true", help="keep recovered models in --scratch")
    parser.add_argument("--speeds", action="store_true", help="measure sizes and speeds again, and stop")
    parser.add_argument("--only", type=int, default=None, help="stop after so many new cells")
    args = parser.parse_args()
    args.texts = [args.text, *args.other]
    args.scratch.mkdir(parents=True, exist_ok=True)
    setting = {
        "model": args.model,
        "recipe": Path(args.recipe).name if args.recipe else None,
        "calibration": {"text": args.text, "samples": args.samples, "seqlen": args.seqlen},
        "evaluation": {
            "texts": [Path(t).name for t in args.texts],
            "seqlen": args.eval_seqlen,
            "windows": args.windows,
        },
        "options": args.option,
    }
    results: dict[str, Any] = {**setting, "dense": None, "cells": []}
    if args.results.exists():
        results = json.loads(args.results.read_text(encoding="utf-8"))
    if any(results[key] != value for key, value in setting.items()):
        raise SystemExit(f"{args.results} holds another setting; give another --results")
    if results["dense"] is None:
        print("dense", flush=True)
        results["dense"] = {"evaluation": measure(args.model, args)}
        if args.rounds:
            results["dense"]["packed"] = packed(args.model, args)
        keep(args.results, results)
    if args.speeds:
        results["dense"]["packed"] = packed(args.model, args)
        for cell in results["cells"]:
            if cell["kind"] in SHIPPED and place(cell, args).exists():
                cell["packed"] = packed(str(place(cell, args)), args)
        keep(args.results, results)
        return
    done = {(cell["kind"], cell["sparsity"], cell["minutes"]) for cell in results["cells"]}
    left = [c for c in wanted(args) if (c["kind"], c["sparsity"], c["minutes"]) not in done]
    for cell in left[: args.only]:
        print(f"{cell['kind']} {cell['sparsity']:.0%} {cell['minutes']:g} min", flush=True)
        results["cells"].append(make(cell, args))
        keep(args.results, results)
        for text, value in results["cells"][-1]["evaluation"].items():
            print(
                f"  {text}: perplexity {value['perplexity']:.2f}, KL {value['kl']:.3f}, top-1 {value['top1']:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
