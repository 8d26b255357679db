"""On which text should a model be calibrated and trained, so that it holds on texts that nothing saw?

    python benchmarks/recovery_texts.py --mix wiki=wiki --mix self=self --mix 'mixed=wiki=0.5 code.txt=0.3 self=0.2' --text wiki --text PATH.txt

A mix is NAME=TEXT[=SHARE] … as `tawny recover --text` takes them. Each mix calibrates the pruned model (`one-shot`), and then trains it
on so many tokens (`distill`). `--kl` are weights of the divergence in the loss; 1 leaves the next token out. Tokens are counted
and not minutes, which say little on a busy machine. A sparsity of 0 is the `control`: the dense model itself, trained alike.
Each is measured on every `--text`. Finished cells are not repeated. A tiny run: `--samples 4 --seqlen 128 --tokens 4096 --windows 2 --eval-seqlen 128`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import tawny
from tawny.machine import machine, versions
from tawny.model.durable import write

RESULTS = Path(__file__).parent / "results" / "recovery_texts.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--mix", action="append", required=True, metavar="NAME=TEXTS")
    parser.add_argument("--text", action="append", required=True, help="to measure on; repeatable")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    parser.add_argument("--kl", type=float, nargs="+", default=[0.5])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[200_000], help="to train on; none: only prune"
    )
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--scratch", type=Path, default=Path("recovery-texts"), help="models and states")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    setting = {k: getattr(args, k) for k in ("model", "samples", "seqlen", "eval_seqlen", "windows")}
    setting |= {"texts": [Path(text).name for text in args.text]}
    results: dict[str, Any] = {"setting": setting, "mixes": {}, "cells": {}}
    if args.results.exists():
        results = json.loads(args.results.read_text(encoding="utf-8"))
        if results["setting"] != setting:
            raise SystemExit(f"{args.results} holds another setting; give another --results")
    args.scratch.mkdir(parents=True, exist_ok=True)
    mixes = {name: texts.split() for name, _, texts in (mix.partition("=") for mix in args.mix)}
    for sparsity, (name, texts) in itertools.product(args.sparsity, mixes.items()):
        named = [Path(text).name for text in texts]
        if results["mixes"].setdefault(name, named) != named:
            raise SystemExit(
                f"{args.results} holds another mix that is called {name}; call this one otherwise"
            )
        start: Any = args.model
        if sparsity:
            start = args.scratch / f"one-shot {name} {sparsity:g}"
            if not start.exists():
                calibration = {"text": texts, "samples": args.samples, "seqlen": args.seqlen}
                keys = {f"calibration.{key}": value for key, value in calibration.items()}
                tawny.prune(args.model, start, sparsity=sparsity, **keys)
        wanted: list[tuple[str, float, int]] = [("one-shot", 0.0, 0)] if sparsity else []
        method = "distill" if sparsity else "control"
        wanted += [(method, kl, tokens) for kl, tokens in itertools.product(args.kl, args.tokens)]
        for method, kl, tokens in wanted:
            key = f"{name} {sparsity:g} {method} {kl:g} {tokens}"
            if key in results["cells"]:
                continue
            found = {
                "mix": name,
                "sparsity": sparsity,
                "method": method,
                "kl": kl,
                "tokens": tokens,
                "seconds": 0.0,
            }
            folder = start
            if method != "one-shot":
                folder = args.scratch / key
                settings = {"text": texts, "tokens": tokens, "kl": kl, "control": not sparsity}
                if not folder.exists():
                    tawny.recover(start, args.model, folder, settings=settings)
                found["seconds"] = json.loads((folder / "recover.json").read_text())["seconds"]["total"]
            found["texts"] = {Path(text).name: measure(folder, args, text) for text in args.text}
            results["cells"][key] = found
            results |= {"machine": machine(), "versions": versions(), "date": str(datetime.date.today())}
            write(args.results, (json.dumps(results, indent=1) + "\n").encode())
            shown = ", ".join(f"{k} {v['perplexity'] / v['dense']:.3f} ×" for k, v in found["texts"].items())
            print(f"{key}: {found['seconds']:.0f} s, {shown}", flush=True)


def measure(folder: Path, args: argparse.Namespace, text: str) -> dict[str, float]:
    """Perplexity beside the dense model's, and the divergence from it."""
    found = tawny.agreement(folder, args.model, text, seqlen=args.eval_seqlen, windows=args.windows)
    return {
        "perplexity": found.perplexity.perplexity,
        "stderr": found.perplexity.stderr,
        "dense": found.dense.perplexity,
        "kl": found.kl,
        "kl_stderr": found.kl_stderr,
    }


if __name__ == "__main__":
    main()
