"""GGUF files of `tawny fit --to gguf` beside llama.cpp's of the same bytes, which have an importance matrix of the same tokens.

    python benchmarks/gguf_files.py --model M --text wiki --text PATH.txt --seqlen 1024 --eval-seqlen 512 --work DIR
    python benchmarks/gguf_files.py … --calibration wiki=0.5,CODE.txt=0.5 --samples 20 --cells llama:Q3_K_M fit:Q3_K_M
    python benchmarks/gguf_files.py … --tasks 200 --cells dense fit:Q3_K_M      # seven zero-shot tasks of finished cells
    python benchmarks/gguf_files.py … --speed                                   # llama-bench of the files in DIR, in turn

Needs `make llama`. All start from one model, whose channels were scaled so that nobody meets a grid again (fair_start.py):
`DIR/source`, and `DIR/source.gguf` for llama.cpp. A cell is `llama:TYPE`, or `fit:TYPE`, our file of at most the bytes of that
one; `@SEED` behind it draws other windows of the calibration for both. One measuring serves all fits of a seed.

Each file is judged dequantised by `tawny.agreement`; KL by windows is kept, so that two cells can be compared in pairs. On the
first `--judged` windows `llama-perplexity --kl-divergence` judges it, too: it scores the second half of each window, and
`tawny` beside `llama` is ours at the same positions. It rounds activations to 8 bits as its kernels do, ours computes in float32.
A tiny run: `--samples 4 --seqlen 128 --eval-seqlen 128 --windows 4 --judged 2 --cells llama:Q4_0`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from cells import parser_for
from frontier import fill, judged, write_source
from harness import begun, keep, measured
from llama_tools import Judge, importance, quantise, whole
from turns import speeds_of

import tawny
from tawny.evaluation.perplexity import windows_of
from tawny.model.source import load_tokenizer

SAME_BYTES = ["Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K"]
CELLS = [f"{who}:{kind}" for kind in SAME_BYTES for who in ("llama", "fit")]
CELLS += [f"llama:{kind}" for kind in ("IQ3_XXS", "IQ2_M", "Q4_0", "Q5_K_M")]
PROMPT, TOKENS, ROUNDS = 512, 24, 3


class Study:
    """The cells of one model: their files, made in `work` unless they are there, and what is measured of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.source = args, args.work, args.work / "source"
        self.texts: list[str] = args.calibration.split(",")
        if not self.source.exists():
            write_source(args.model, self.source)
        self.tokenizer = load_tokenizer(self.source)

    def place(self, name: str) -> Path:
        return self.source if name == "dense" else self.work / f"{name.replace(':', '-')}.gguf"

    def cell(self, name: str) -> dict[str, Any]:
        file, begin = self.place(name), time.perf_counter()
        if not file.exists():
            self.make(name, file)
        return {
            "bytes": file.stat().st_size,
            "seconds": time.perf_counter() - begin,
            "measured": measured(),
            "texts": judged(file, self.source, self.args, by_window=True),
            "judges": {Path(text).name: self.by_both(file, text) for text in self.args.text},
        }

    def make(self, name: str, file: Path) -> None:
        who, _, rest = name.partition(":")
        kind, _, seed = rest.partition("@")
        if who == "llama":
            return quantise(self.source, file, kind, self.matrix(int(seed or 0)))
        theirs = self.place(f"llama:{rest}")
        if not theirs.exists():
            self.make(f"llama:{rest}", theirs)
        mine = [path for path in self.work.glob("fit-*.gguf") if path.stem.partition("@")[2] == seed]
        keys = {"calibration.text": self.texts, "seed": int(seed or 0)}
        keys |= {f"calibration.{key}": getattr(self.args, key) for key in ("samples", "seqlen")}
        size = theirs.stat().st_size
        own = {"solver": self.args.solver, "fit.windows": self.args.asked, "fit.deciding": self.args.deciding}
        tawny.fit(self.source, file, size=size, to="gguf", measured=min(mine, default=None), **keys, **own)

    def matrix(self, seed: int) -> Path:
        """llama.cpp's importance matrix of the windows that a fit of this seed is calibrated on."""
        calibration = {"text": self.texts} | {key: getattr(self.args, key) for key in ("samples", "seqlen")}
        return importance(self.source, calibration, seed, self.work / f"imatrix@{seed}.gguf")

    def by_both(self, file: Path, text: str) -> dict[str, Any]:
        """KL and top-1 of the second halves of the first windows, by llama.cpp and by Tawny."""
        seqlen, count = self.args.eval_seqlen, self.args.judged
        read = windows_of(text, seqlen, count, None, self.tokenizer)
        assert read.text is not None
        enough = read.text.texts[0].text[: 2 * len(self.tokenizer.decode(read.ids.flatten()))]
        base = self.work / f"{Path(text).name}.{count}x{seqlen}.base"
        judge = Judge(whole(self.source, self.work), enough, read.ids, base)
        return {"windows": count, "llama": judge.kl(file), "tawny": judge.ours(file, self.source)}


def main() -> None:
    parser = parser_for(__doc__, "gguf.json")
    parser.add_argument("--work", type=Path, required=True, help="folder to keep the files in")
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--solver", default="sparsegpt", help="of fits")
    parser.add_argument("--asked", type=int, default=8, help="windows that a fit measures reactions on")
    parser.add_argument("--deciding", type=int, default=32, help="windows that a fit decides on")
    parser.add_argument("--judged", type=int, default=2, help="windows of each text for llama-perplexity")
    parser.add_argument("--tasks", type=int, help="documents a task, of --cells that are finished, or dense")
    parser.add_argument("--speed", action="store_true", help="only measure speeds of files in --work")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of --speed")
    parser.set_defaults(samples=20, windows=32)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    keys = ("samples", "seqlen", "eval_seqlen", "windows", "solver", "asked", "deciding")
    setting = {key: getattr(args, key) for key in keys}
    setting |= {"model": Path(args.model).name, "texts": [Path(text).name for text in args.text]}
    setting |= {"calibration": [Path(text).name for text in args.calibration.split(",")]}
    setting |= {"channels": "scaled, log-normal 0.1, seed 0"}
    results = begun(args.results, setting, cells={}, tasks={})
    study = Study(args)
    if args.speed:
        files = {"source": study.work / "source.gguf"}
        files |= {name: study.place(name) for name in results["cells"]}
        files = {name: path for name, path in files.items() if path.exists()}
        about = measured(threads=args.threads)
        found = speeds_of(files, PROMPT, TOKENS, ROUNDS, args.threads)
        results["speeds"] = {"cells": found, "prompt": PROMPT, "tokens": TOKENS, **about}
        keep(args.results, results)
    elif args.tasks:
        for name in (name for name in args.cells if name not in results["tasks"]):
            found = tawny.evaluate_tasks(str(study.place(name)), "owl7", limit=args.tasks)
            told = {key: found.to_dict()[key] for key in ("tasks", "mean", "limit")}
            results["tasks"][name] = told | {"mean_stderr": found.stderr, "measured": measured()}
            keep(args.results, results)
            print(name, json.dumps(results["tasks"][name]["mean"]), flush=True)
    else:
        fill(args, results, args.cells, study.cell)


if __name__ == "__main__":
    main()
