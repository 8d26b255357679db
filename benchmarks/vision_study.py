"""OWL's puzzle on a vision transformer and a text encoder: does sparsity that differs by block beat uniform sparsity there?

    python benchmarks/vision_study.py --model minilm=FOLDER:wiki --model vit-small=FOLDER:images:DIR --samples 32 --seqlen 64

A model is NAME=FOLDER:DATA, with data as `tawny prune --calibration` takes them. benchmarks/vit_small.py makes a folder of a real
ViT-S. Every cell prunes the model from its dense weights, once for each allocator × solver × sparsity × seed, and compares its
features with the dense model's on other samples (evaluation/features.py says how). Cells are kept in a JSON file as they are
made: a run that was stopped goes on where it was. The outlier shares of each dense model are kept beside its cells.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import tawny
from tawny.calibration.inputs import read_inputs
from tawny.calibration.mixture import load_texts
from tawny.calibration.windows import evaluation_windows, sample_windows, tokenise
from tawny.machine import machine, versions
from tawny.model.durable import write
from tawny.model.source import load_tokenizer
from tawny.model.stack import TOKENS, live_stack
from tawny.model.streams import Samples
from tawny.model.structure import input_of

RESULTS = Path(__file__).parent / "results" / "vision_study.json"
ALLOCATORS = ["uniform", "er", "er-plus", "global", "owl", "alpha", "atp"]
SOLVERS = ["magnitude", "wanda", "sparsegpt", "alps"]


class Study:
    """One dense model, what it is calibrated and measured on, and its cells."""

    def __init__(self, named: str, args: argparse.Namespace) -> None:
        self.name, _, rest = named.partition("=")
        folder, _, self.data = rest.partition(":")
        self.folder, self.args = Path(folder), args
        self.dense = tawny.load(self.folder, dtype="float32")
        self.stack = live_stack(self.dense)
        self.measured = self._measured()

    @functools.cache  # noqa: B019 - a study lives as long as the process
    def calibration(self, seed: int) -> Samples:
        args = self.args
        if input_of(self.dense) != TOKENS:
            return read_inputs(self.stack, self.folder, self.data, args.samples, seed)[0]
        text = tokenise(load_texts(self.data), load_tokenizer(self.folder), around=True)
        return Samples(sample_windows(text, args.samples, args.seqlen, seed))

    def _measured(self) -> Samples:
        args = self.args
        if input_of(self.dense) != TOKENS:
            return read_inputs(self.stack, self.folder, self.data, args.windows, 1000)[0]
        text = tokenise(load_texts(self.data, "evaluation"), load_tokenizer(self.folder), around=True)
        return Samples(evaluation_windows(text, args.seqlen, args.windows))

    def lod(self) -> list[float]:
        """Shares of weights above 5 times the mean, in % of every block."""
        samples = self.calibration(0)
        return list(tawny.profile(copy.deepcopy(self.dense), calibration=samples).shares["5"])

    def cell(self, allocator: str, solver: str, sparsity: float, seed: int) -> dict[str, Any]:
        model, start = copy.deepcopy(self.dense), time.perf_counter()
        keys = {"allocator": allocator, "solver": solver, "sparsity": sparsity, "seed": seed}
        record = tawny.prune(model, calibration=self.calibration(seed), **keys)
        seconds = time.perf_counter() - start
        found = tawny.features(model, self.dense, self.measured)
        kept = ("error", "error_stderr", "cosine", "neighbours", "neighbours_stderr")
        return {
            **keys,
            "achieved": record.sparsity,
            "seconds": seconds,
            **{k: getattr(found, k) for k in kept},
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER:DATA")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--windows", type=int, default=200, help="samples to measure on")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--allocator", nargs="+", default=ALLOCATORS)
    parser.add_argument("--solver", nargs="+", default=SOLVERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=None, help="begin no cell after so many minutes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    setting = {"samples": args.samples, "seqlen": args.seqlen, "windows": args.windows}
    results: dict[str, Any] = {"setting": setting, "models": {}}
    if args.results.is_file():
        results = json.loads(args.results.read_text(encoding="utf-8"))
        if results["setting"] != setting:
            raise SystemExit(f"{args.results} holds another setting; give another --results")
    started = time.monotonic()

    def save() -> None:
        results.update(machine=machine(), versions=versions(), date=datetime.date.today().isoformat())
        write(args.results, (json.dumps(results, indent=1) + "\n").encode())

    for named in args.model:
        study = Study(named, args)
        fresh = {"class": type(study.dense).__name__, "data": study.data.partition(":")[0], "cells": {}}
        kept = results["models"].setdefault(study.name, {**fresh, "lod": study.lod()})
        for seed, sparsity, solver, allocator in itertools.product(
            args.seeds, args.sparsity, args.solver, args.allocator
        ):
            key = f"{allocator} {solver} {sparsity} {seed}"
            if key in kept["cells"]:
                continue
            if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
                print("stopped; the same command goes on", flush=True)
                return
            kept["cells"][key] = made = study.cell(allocator, solver, sparsity, seed)
            save()
            print(
                f"{study.name} {key}: error {made['error']:.4f}, neighbours {made['neighbours']:.3f} "
                f"({made['seconds']:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
