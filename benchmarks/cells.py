"""Cells of a study: a recipe pruned and evaluated once, kept in a JSON file, never done twice.

A results file holds the setting that all its cells share (model, calibration, evaluation) and the cells by the recipe
keys in which they differ. It is written after every cell, so a study can be stopped and taken up again, and two
questions that need the same cell share it. Several processes may fill one file, each with cells of its own (other
seeds, other solvers). `auto` is what `tawny.search` finds; the time of the search counts in it. Times are wall times of
`tawny.prune`, and its own phases; a cell says on which CPU and with how many threads.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import ROOT, keep, measured, parser_of

import tawny
from tawny.evaluation.perplexity import Windows, windows_of
from tawny.model.source import load_tokenizer, resolve
from tawny.recipe.merge import parse_override, resolve_recipe

Keys = dict[str, Any]


def parser_for(description: str | None, results: str) -> argparse.ArgumentParser:
    """The sizes that every study takes as arguments."""
    parser = parser_of(description, results)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="wiki")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--text", action="append", required=True, help="to evaluate on; repeatable")
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", type=int, default=None, help="stop after so many new cells")
    parser.add_argument("--minutes", type=float, default=None, help="begin no cell after so many minutes")
    return parser


class Cells:
    """The cells of one results file.

    Args:
        args: of `parser_for`.

    Raises:
        SystemExit: the file holds another setting.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.made = 0
        setting: dict[str, Any] = {
            "model": Path(args.model).name,
            "calibration": {"text": args.calibration, "samples": args.samples, "seqlen": args.seqlen},
            "evaluation": {
                "texts": [Path(text).name for text in args.text],
                "seqlen": args.eval_seqlen,
                "windows": args.windows,
            },
        }
        if any(windows.bos for windows in self.windows.values()):
            setting["evaluation"]["bos"] = True
        self.results: dict[str, Any] = {**setting, "dense": None, "cells": {}}
        if args.results.exists():
            self.results = json.loads(args.results.read_text(encoding="utf-8"))
            if any(self.results[key] != value for key, value in setting.items()):
                raise SystemExit(f"{args.results} holds another setting; give another --results")
        if self.results["dense"] is None:
            self.results["dense"] = self.dense()
            self.save()

    def save(self) -> None:
        """Write the file, with the cells that others have put there since it was read."""
        path = self.args.results
        with _alone(path):
            if path.exists():
                theirs = json.loads(path.read_text(encoding="utf-8"))
                self.results["cells"] = theirs["cells"] | self.results["cells"]
            keep(path, self.results)

    def dense(self) -> dict[str, Any]:
        return {"evaluation": self.evaluate(self.args.model), "lod": self.lod(self.args.model)}

    def run(self, wanted: Iterable[Keys], *, lod: Callable[[Keys], bool] = lambda keys: False) -> None:
        """Make every cell that is not there yet.

        Args:
            wanted: what to give to `tawny.prune` beside the setting.
            lod: whether the outlier distribution of this cell's pruned model is wanted too.
        """
        for keys in wanted:
            if name_of(keys) in self.results["cells"]:
                continue
            over = self.args.minutes is not None and time.monotonic() - self.started > 60 * self.args.minutes
            if over or (self.args.only is not None and self.made >= self.args.only):
                print("stopped; the same command goes on", flush=True)
                raise SystemExit(0)
            self.results["cells"][name_of(keys)] = self.cell(keys, lod(keys))
            self.made += 1
            self.save()

    def cell(self, keys: Keys, with_lod: bool) -> dict[str, Any]:
        args = self.args
        folder = Path(tempfile.mkdtemp(prefix="tawny-cell-"))
        try:
            start = time.perf_counter()
            options = {
                "calibration.text": args.calibration,
                "calibration.samples": args.samples,
                "calibration.seqlen": args.seqlen,
                **{key: value for key, value in keys.items() if key not in ("recipe", "changes")},
            }
            recipe = None
            if "recipe" in keys:
                path = ROOT / "recipes" / f"{keys['recipe']}.yaml"
                recipe = resolve_recipe(path, options | dict(map(parse_override, keys["changes"])))
                options = {}
            search = None
            if options.get("allocator") == "auto":
                del options["allocator"]
                search = tawny.search(args.model, **options)
                path = folder / "allocation.json"
                path.write_text(json.dumps(search.allocation), encoding="utf-8")
                options = {k: v for k, v in options.items() if not k.startswith("search.")}
                options["allocator"] = str(path)
            record = tawny.prune(args.model, folder / "out", recipe=recipe, **options)
            seconds, phases = time.perf_counter() - start, record.seconds
            if search is not None:
                phases = {**phases, "search": search.seconds["total"]}
            made = {
                **keys,
                "seconds": seconds,
                "threads": record.machine["threads"],
                "cpu": record.machine["cpu"],
                "measured": measured(),
                "phases": phases,
                "bos": bool(record.text.get("bos")),  # of its samples; that of its windows is in the setting
                "achieved": record.sparsity,
                "mean_error": sum(x.error for x in record.linears) / len(record.linears),
                "winner": search.winner if search is not None else None,
                "evaluation": self.evaluate(str(folder / "out")),
            }
            if with_lod:
                made["lod"] = self.lod(str(folder / "out"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        numbers = ", ".join(f"{k} {v['perplexity']:.2f}" for k, v in made["evaluation"].items())
        print(f"{name_of(keys)}: {numbers} ({made['seconds']:.0f} s)", flush=True)
        return made

    def evaluate(self, model: str) -> dict[str, dict[str, Any]]:
        made = {}
        for name, windows in self.windows.items():
            result = tawny.evaluate(model, windows.ids)
            assert windows.text is not None
            made[name] = {
                "perplexity": result.perplexity,
                "stderr": result.stderr,
                "text_sha256": windows.text.sha256,
            }
        return made

    @functools.cached_property
    def windows(self) -> dict[str, Windows]:
        """What every cell is evaluated on, by the text's name; tokenised once."""
        args = self.args
        tokenizer = load_tokenizer(resolve(args.model))
        return {
            Path(text).name: windows_of(text, args.eval_seqlen, args.windows, None, tokenizer)
            for text in args.text
        }

    def lod(self, model: str) -> dict[str, Any]:
        """Outlier shares of every block, in %."""
        args = self.args
        report = tawny.profile(
            model,
            calibration=args.calibration,
            samples=max(1, min(args.samples, 8192 // args.seqlen)),
            seqlen=args.seqlen,
        )
        return {"shares": report.shares, "max_score": report.max_score, "mean_score": report.mean_score}


def name_of(keys: Mapping[str, Any]) -> str:
    """The name of a cell: its keys, in one order."""
    return " ".join(f"{key}={keys[key]}" for key in sorted(keys))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Meanwhile no other process writes results into this file's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
