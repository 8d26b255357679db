"""One real model of 1.5 billion weights, all that can be done with it, and llama.cpp's files of it.

    python benchmarks/evidence.py --model FILE.gguf --text PATH.txt --seqlen 512 --eval-seqlen 1024 --work DIR
    python benchmarks/evidence.py … --cells dense fast:0.5 fast:0.5:int8         # some cells; the same command goes on
    python benchmarks/evidence.py … --speed                                      # only speeds, of the models in DIR
    python benchmarks/evidence.py … --tasks 100 --cells dense best:0.5           # seven zero-shot tasks of finished cells

A cell is `RECIPE:SPARSITY`, that packed as `:KIND` (head in int8), `int4:GROUP` (no zeros, solved on the grid),
`recovered:MINUTES` of the refined model (`best:0.5`), that packed as `:int8`, or `llama:TYPE`, made by llama.cpp's own quantiser (`make
llama`) from the dequantised model and judged dequantised, by the same evaluator. Recipes are those of recipes/, `default`, `sparsegpt`
(uniform) and `2:4`. Every model is made in DIR and stays there.

Texts: `wiki`, the given text, the English of `pydoc_data.topics`, and every tenth module of the standard library by name.
Calibration reads half `wiki` and half the other modules. The model is a GGUF file of few bits: what is lost against it
is not what would be lost against the published weights.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from harness import begun, keep, measured, parser_of
from llama_tools import quantise
from turns import speeds_of

import tawny
from tawny.model.checkpoint import file_bytes
from tawny.model.source import resolve

CELLS = [
    "dense",
    *(f"{recipe}:0.5" for recipe in ("default", "fast", "official-owl-sparsegpt-70", "sparsegpt", "best")),
    *(f"{recipe}:0.6" for recipe in ("fast", "official-owl-sparsegpt-70", "sparsegpt")),
    "2:4",
    "fast:0.5:bf16",
    "fast:0.5:int8",
    "fast:0.5:int4",
    "int4:32",
    "int4:128",
    "int3:64",
    "recovered:60",
    "recovered:60:int8",
    *(f"llama:{kind}" for kind in ("Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K")),
]
PROMPT, TOKENS, ROUNDS = 512, 24, 3
REFINED = ["-c", "fast", "-a", "blend", "-o", "of=atp,owl", "-o", "repeat=0.25", "-o", "refine.epochs=3"]


def main() -> None:
    parser = parser_of(__doc__, "evidence.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tasks", type=int, help="documents a task")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    keys = ("samples", "seqlen", "eval_seqlen", "windows")
    setting = {key: getattr(args, key) for key in keys}
    setting |= {"model": Path(args.model).name.removesuffix(".gguf"), "text": Path(args.text).name}
    results = begun(args.results, setting, cells={})

    def add(name: str, found: dict[str, Any]) -> None:
        about = measured(threads=args.threads)
        results["cells"].setdefault(name, {}).update(found)
        results["cells"][name].setdefault("measured", {}).update(dict.fromkeys(found, about))
        keep(args.results, results)
        print(name, json.dumps(found), flush=True)

    texts = write_texts(args)
    if args.speed:
        models = {name: place(args, name) for name in results["cells"]}
        models = {name: path for name, path in models.items() if path.exists()}
        made = speeds_of(models, PROMPT, TOKENS, ROUNDS, args.threads)
        for name, found in made.items():
            add(name, found | {"dense_decode": made["dense"]["decode_tokens_per_second"]})
        return
    for name in args.cells:
        if "texts" not in results["cells"].get(name, {}):
            add(name, cell(args, name, texts))
        if args.tasks and "tasks" not in results["cells"][name]:
            folder = str(place(args, name))
            found = tawny.evaluate_tasks(folder, "owl7", limit=args.tasks)
            told = found.to_dict()
            add(name, {key: told[key] for key in ("tasks", "mean", "limit")} | {"mean_stderr": found.stderr})


def write_texts(args: argparse.Namespace) -> dict[str, str]:
    """The texts to measure on, by name; the code to calibrate with lies beside them."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = {"docs": "\n\n".join(pydoc_data.topics.topics.values())}
    for name, chosen in (
        ("code", modules[::10]),
        ("code-calibration", [m for m in modules if m not in modules[::10]]),
    ):
        parts[name] = "\n\n".join(module.read_text(encoding="utf-8") for module in chosen)
    for name, text in parts.items():
        (args.work / f"{name}.txt").write_text(text, encoding="utf-8")
    return {
        "wiki": "wiki",
        Path(args.text).name: args.text,
        **{name: str(args.work / f"{name}.txt") for name in ("docs", "code")},
    }


def place(args: argparse.Namespace, name: str) -> Path:
    if name == "dense":
        return resolve(args.model)
    folder: Path = args.work / name.replace(":", "-")
    return folder.with_name(f"{name[6:]}.gguf") if name.startswith("llama:") else folder


def cell(args: argparse.Namespace, name: str, texts: dict[str, str]) -> dict[str, Any]:
    """Make a model, unless it is there, and measure it on every text."""
    folder = place(args, name)
    begin = time.perf_counter()
    if not folder.exists():
        make(args, name, folder)
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - begin, 1), "texts": {}}
    found["bytes"] = folder.stat().st_size if folder.is_file() else file_bytes(folder)
    for text, path in texts.items():
        keys = {"seqlen": args.eval_seqlen, "windows": args.windows, "compute": "float32"}
        if name == "dense":
            made = tawny.evaluate(folder, path, **keys)
            found["texts"][text] = {"perplexity": made.perplexity, "stderr": made.stderr}
            continue
        against = tawny.agreement(folder, args.model, path, **keys)
        found["texts"][text] = {
            "perplexity": against.perplexity.perplexity,
            "stderr": against.perplexity.stderr,
            "kl": against.kl,
            "kl_stderr": against.kl_stderr,
            "top1": against.top1,
        }
    # A recovery keeps the record of its pruning, with another peak; what is packed keeps both, and its own is not known.
    kept = ("sparsity",) if name.count(":") == 2 else ("sparsity", "peak_memory")
    for record in ("run.json", "recover.json"):
        if (folder / record).is_file():
            told = json.loads((folder / record).read_text(encoding="utf-8"))
            found |= {key: told[key] for key in kept}
    return found


def make(args: argparse.Namespace, name: str, folder: Path) -> None:
    """By the command line, in a process of its own, whose peak memory is its own."""
    calibration = ["--calibration", "wiki=0.5", "--calibration", f"{args.work / 'code-calibration.txt'}=0.5"]
    calibration += ["--samples", str(args.samples), "--seqlen", str(args.seqlen)]
    head, _, rest = name.partition(":")
    if head == "llama":
        return quantise(args.model, folder, rest)
    if name.count(":") == 2:  # a finished model, packed
        base, kind = name.rsplit(":", 1)
        dense = place(args, base)
        if kind.startswith("int") and kind != "int8":
            recipe, sparsity = base.split(":")
            return few_bits(args, folder, {"kind": kind}, recipe=recipe, sparsity=float(sparsity))
        if not dense.exists():
            make(args, base, dense)
        tawny.pack(dense, folder, kind, head="int8")
    elif head == "recovered":
        base = place(args, "best:0.5")
        if not base.exists():
            make(args, "best:0.5", base)
        code = args.work / "code-calibration.txt"
        texts = ["--text", "wiki=0.4", "--text", f"{code}=0.4", "--text", "self=0.2"]
        # An hour is few tokens: steps of one window make the most of them (docs/log/learning-rate.md).
        less = ["-o", "checkpointing=true", "-o", "batch=1"]
        tawny_("recover", base, "--teacher", args.model, "--out", folder, *texts, *less, "--minutes", rest)
    elif head.startswith("int"):
        values = {"kind": head, "group_size": int(rest)}
        few_bits(args, folder, values, sparsity=0.0, allocator="uniform")
    elif name == "2:4":
        tawny_("prune", args.model, "--out", folder, "-p", "2:4", "-a", "uniform", *calibration)
    elif head == "sparsegpt":
        tawny_(
            "prune", args.model, "--out", folder, "-s", rest, "-a", "uniform", "-m", "sparsegpt", *calibration
        )
    else:
        recipe = {"best": REFINED, "default": []}.get(head, ["-c", head])
        tawny_("prune", args.model, "--out", folder, *recipe, "-s", rest, *calibration)


# The command line packs such a model at once, and leaves the head as it is.
FEW_BITS = """
import json, sys, tawny
from tawny.recipe.merge import resolve_recipe
keys = json.loads(sys.argv[1])
recipe = resolve_recipe(keys.pop("recipe"), keys.pop("options"))
tawny.prune(recipe=recipe, **keys)
"""


def few_bits(args: argparse.Namespace, folder: Path, values: dict[str, Any], **options: Any) -> None:
    """Solved on the grid, packed with a head in int8; the dense folder goes."""
    dense = folder.with_name(f"{folder.name}.dense")
    texts = ["wiki=0.5", f"{args.work / 'code-calibration.txt'}=0.5"]
    recipe = options.pop("recipe", None)
    options |= {"values": values, "calibration.text": texts}
    options |= {"calibration.samples": args.samples, "calibration.seqlen": args.seqlen}
    keys = {"source": args.model, "out": str(dense), "recipe": recipe, "options": options}
    if not dense.exists():
        subprocess.run([sys.executable, "-c", FEW_BITS, json.dumps(keys)], check=True)
    tawny.pack(dense, folder, head="int8")
    shutil.rmtree(dense)


def tawny_(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "tawny", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
