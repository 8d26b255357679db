"""Divergence from the dense model against the bytes of the files: one kind for all, zeros and bits, `tawny fit`, other tools.

    python benchmarks/frontier.py --text wiki --text PATH.txt --seqlen 512 --eval-seqlen 512
    python benchmarks/frontier.py … --work DIR --cells fit:3.5      # keeps the models, and goes on
    python benchmarks/frontier.py … --cells llama:Q4_K_M llama:Q3_K_M      # needs `make llama`
    python benchmarks/frontier.py … --work DIR --speed      # tokens a second of what is in DIR, in turn

All start from the same model, whose channels were scaled so that no side meets a grid again (fair_start.py). A cell is
`KIND:GROUP:SPARSITY` (by `--solver`, head in int8), `fit:BITS`, or `llama:TYPE`, which llama.cpp's own quantiser makes of that
model with an importance matrix of the same tokens; its file is judged dequantised, by the same evaluator.
`llama-bench` measures the speeds of these files. `CELL+MINUTES` is one of ours after so many minutes of `tawny recover` on the
calibration text. With `--work`
the scaled model is `DIR/source`, each model stays in `DIR/CELL`, and the same command goes on inside a fit that was stopped.
A tiny run:
`--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --cells int4:64:0 fit:4`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cells import parser_for
from fair_start import scale_channels
from gguf import GGUFReader
from harness import begun, keep, measured
from llama_tools import importance, quantise
from turns import speeds_of

import tawny
from tawny.kinds import kind_of
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.model.checkpoint import Checkpoint, file_bytes
from tawny.model.source import load_tokenizer, resolve
from tawny.packed.opening import load_quietly

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
THEIR = "llama:"
THEIRS = [
    f"{THEIR}{kind}"
    for kind in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_XS", "IQ3_XXS")
]
ZEROS = [f"{kind}:{share}" for share in (0.3, 0.5, 0.6) for kind in ("bf16:", "int8:", "int4:32", "int3:32")]
PROMPT, TOKENS, ROUNDS = 512, 24, 3
CELLS = ["fit:2.5", "fit:3", "fit:3.5", "fit:4", "fit:4.5", "fit:6", *UNIFORM, *ZEROS]


def main() -> None:
    parser = parser_for(__doc__, "frontier.json")
    parser.add_argument("--work", type=Path, help="folder to keep the models in; default: none is kept")
    parser.add_argument("--solver", default="alps")
    parser.add_argument(
        "--cells", nargs="*", default=[*CELLS, *THEIRS], help="default: ours, and llama.cpp's"
    )
    parser.add_argument("--speed", action="store_true", help="only measure speeds of models in --work")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of --speed")
    parser.set_defaults(samples=16)
    args = parser.parse_args()
    keys = ("calibration", "samples", "seqlen", "eval_seqlen", "windows", "solver")
    setting = {key: getattr(args, key) for key in keys}
    setting |= {"model": Path(args.model).name, "texts": [Path(text).name for text in args.text]}
    setting |= {"channels": "scaled, log-normal 0.1, seed 0"}
    results = begun(args.results, setting, cells={})
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tawny-frontier-")))
        if args.speed:
            measure_speeds(args, results)
            return
        source = work / "source"
        if not source.exists():
            write_source(args.model, source)

        def make(name: str) -> dict[str, Any]:
            folder = place(work, name)
            made = cell(args, source, name, folder)
            if args.work is None and folder.is_dir():
                shutil.rmtree(folder)
            return made

        fill(args, results, args.cells, make)


def fill(
    args: Any, results: dict[str, Any], names: Iterable[str], make: Callable[[str], dict[str, Any]]
) -> None:
    """Make the cells that the results lack, and keep them after each."""
    for name in names:
        if name in results["cells"]:
            continue
        results["cells"][name] = made = make(name)
        if args.results.exists():  # another run may have added cells meanwhile
            theirs = json.loads(args.results.read_text(encoding="utf-8"))["cells"]
            results["cells"] = theirs | results["cells"]
        keep(args.results, results)
        shown = ", ".join(f"{k} KL {v['kl']:.4f} ppl {v['perplexity']:.2f}" for k, v in made["texts"].items())
        print(f"{name}: {made['bytes'] / 1e6:.1f} MB, {made['seconds']:.0f} s, {shown}", flush=True)


def judged(model: Path, source: Path, args: Any, *, by_window: bool = False) -> dict[str, Any]:
    """A model beside its source on every text; `by_window` with the KL of each window, for differences in pairs."""
    texts = {}
    for text in args.text:
        keys = {"seqlen": args.eval_seqlen, "windows": args.windows, "compute": "float32"}
        found = tawny.agreement(model, source, text, **keys)
        texts[Path(text).name] = {
            "kl": found.kl,
            "kl_stderr": found.kl_stderr,
            "top1": found.top1,
            "perplexity": found.perplexity.perplexity,
            "dense": found.dense.perplexity,
            **({"kl_by_window": [round(kl, 6) for kl in found.kl_by_window]} if by_window else {}),
        }
    return texts


def place(work: Path, name: str) -> Path:
    """The folder or the file of a cell."""
    return work / (f"{name.removeprefix(THEIR)}.gguf" if name.startswith(THEIR) else name)


def measure_speeds(args: Any, results: dict[str, Any]) -> None:
    """Of the cells whose models are there; the results say when and where, which may differ from the cells'."""
    models = {name: place(args.work, name) for name in results["cells"]}
    models = {name: path for name, path in models.items() if path.exists()}
    found = speeds_of(models, PROMPT, TOKENS, ROUNDS, args.threads)
    about = measured(threads=args.threads)
    results["speeds"] = {"cells": found, "prompt": PROMPT, "tokens": TOKENS, **about}
    keep(args.results, results)
    for name, speeds in found.items():
        print(f"{name}: {speeds['decode_tokens_per_second']:.1f} tokens/s", flush=True)


def write_source(model: str, source: Path) -> None:
    """The scaled model, in the type of the checkpoint."""
    folder = resolve(model)
    dtypes = {Checkpoint(folder).dtype_of(key) for key in Checkpoint(folder).files}
    live = load_quietly(folder, max(dtypes, key=lambda dtype: dtype.itemsize))
    scale_channels(live)
    live.save_pretrained(source)
    load_tokenizer(folder).save_pretrained(source)


def cell(args: Any, source: Path, name: str, folder: Path) -> dict[str, Any]:
    """One row: the model is made in `folder`, unless it is there."""
    calibration = {"text": args.calibration, "samples": args.samples, "seqlen": args.seqlen}
    keys: dict[str, Any] = {f"calibration.{key}": value for key, value in calibration.items()}
    more: dict[str, Any] = {}
    base, recovered, minutes = name.partition("+")
    if recovered:
        start = place(folder.parent, base)
        if not start.exists():
            cell(args, source, base, start)
        if not folder.exists():
            tawny.recover(start, source, folder, text=args.calibration, minutes=float(minutes))
        seconds = 60 * float(minutes)
    elif name.startswith("fit:"):
        if not folder.exists():
            earlier = next(iter(folder.parent.glob("fit:*/measured.json")), None)
            measured = earlier and earlier.parent
            tawny.fit(source, folder, bits=float(name[4:]), solver=args.solver, measured=measured, **keys)
        fitted = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
        seconds = fitted["seconds"]["total"]
        more = {key: fitted[key] for key in ("winner", "zeros", "lead", "lead_stderr", "finalists")}
    elif name.startswith(THEIR):
        start = time.perf_counter()
        if not folder.exists():
            matrix = importance(source, calibration, 0, folder.with_name("imatrix@0.gguf"))
            quantise(source, folder, name.removeprefix(THEIR), matrix)
        more = {"matrix": True}
        seconds = time.perf_counter() - start
    else:
        kind, group, sparsity = name.split(":")
        rounded = {"kind": kind, "group_size": int(group) if group else None} if kind_of(kind).scaled else {}
        dense = folder.with_name(f"{folder.name}.dense")
        if not folder.exists():
            if not dense.exists():
                tawny.prune(
                    source, dense, values=rounded, sparsity=float(sparsity), solver=args.solver, **keys
                )
            tawny.pack(dense, folder, head="int8")
            shutil.rmtree(dense)
        seconds = json.loads((folder / "run.json").read_text(encoding="utf-8"))["seconds"]["total"]
    if folder.is_file():  # a GGUF file begins with its tokenizer, which is a file of its own beside ours
        size = folder.stat().st_size - GGUFReader(folder).data_offset
    else:
        size = file_bytes(folder) + (folder / INDEX).stat().st_size
    return {"bytes": size, "seconds": seconds, "texts": judged(folder, source, args), **more}


if __name__ == "__main__":
    main()
