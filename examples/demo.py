"""Give every part of a real language model the budget that it can bear: `make demo`.

SmolLM2-135M comes from a package, its text (Wikipedia) too; nothing is fetched from a hub.

1. Where are the outliers? A picture of them, block by block, and how allocators answer.
2. Half of all weights go by SparseGPT: with OWL's shares, and by what the model's output feels (`tawny prune -c quick`;
   the default solves by ALPS in as many minutes again: `--recipe default`).
3. A fit to 80 MB, less than a third of the model, gives every linear its own bits instead. It answers a question.

Calibration is tiny, so that two cores need about five minutes. `docs/decision-guide.md` says what to do with your model.
"""

from __future__ import annotations

import argparse
import io
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from functools import partial
from pathlib import Path

import tawny
from tawny.cli.console import Console
from tawny.cli.fit import fit_tables
from tawny.report.plot import plot_allocations
from tawny.words import share_text

SPARSITY = 0.5
QUESTION = "What is the capital of France?"
# OWL asks nothing of the model's output.
OWL = {"allocator": "owl", "solver": "sparsegpt", "output": "none"}


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another encoding shows what it can
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="smollm2")
    options.add_argument("--out", type=Path, default=Path("demo-out"))
    options.add_argument("--text", default="wiki", help="calibrates and evaluates")
    options.add_argument("--samples", type=int, default=8)
    options.add_argument("--seqlen", type=int, default=256)
    options.add_argument("--windows", type=int, default=8, help="of the comparison")
    options.add_argument("--size", default="80MB", help="of the fit")
    options.add_argument(
        "--recipe", default="quick", help="prunes beside OWL; `default` takes minutes longer"
    )
    options.add_argument("--question", default=QUESTION)
    chosen = options.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    owl, felt, fitted = (chosen.out / name for name in ("owl", "felt", "fitted"))
    calibration = {"calibration": chosen.text, "samples": chosen.samples, "seqlen": chosen.seqlen}
    console = Console()

    print(f"1. Where are the outliers of {chosen.model}?", flush=True)
    with console.progress() as progress:
        report = tawny.profile(
            chosen.model,
            sparsity=SPARSITY,
            Ms=(5,),
            allocators=["owl", "atp"],
            progress=progress,
            **calibration,
        ).to_dict()
    picture = chosen.out / "outliers.svg"
    (shares,) = report["shares"].values()
    plot_allocations(
        report["allocations"], picture, sparsity=SPARSITY, outliers=shares, M="5", title=chosen.model
    )
    most, least = (shares.index(end) for end in (max(shares), min(shares)))
    print(f"block {most} has {max(shares):.2f} %, block {least} {min(shares):.2f} %: {picture}\n")

    print(f"2. Without {SPARSITY:.0%} of its weights: by outliers, and by what the output feels", flush=True)
    recipe = None if chosen.recipe == "default" else tawny.load_recipe(chosen.recipe)
    with console.progress() as progress:
        for out, keys in ((owl, OWL), (felt, {"recipe": recipe})):
            tawny.prune(
                chosen.model, out, sparsity=SPARSITY, overwrite=True, progress=progress, **calibration, **keys
            )
        judge = partial(
            tawny.agreement,
            dense=chosen.model,
            text=chosen.text,
            seqlen=chosen.seqlen,
            windows=chosen.windows,
            progress=progress,
        )
        print(beside("OWL and SparseGPT", owl, judge(owl)))
        print(beside("what the output feels", felt, judge(felt)))

    print(f"\n3. Bits instead of zeros: each linear gets what it can bear, {chosen.size} in all", flush=True)
    with console.progress() as progress:
        result = tawny.fit(
            chosen.model,
            fitted,
            size=chosen.size,
            quick=True,
            settings=tawny.FitSettings(windows=2, deciding=8, length=128),
            overwrite=True,
            progress=progress,
            **calibration | {"samples": max(2, chosen.samples // 2)},
        )
        console.result(result.to_dict(), fit_tables)
        print(beside("fitted", fitted, judge(fitted)))

    print(f"\n{chosen.question}")
    for name, model in (("original", chosen.model), ("fitted", fitted)):
        words = tawny.generate(model, chosen.question, max_tokens=60).text.split()
        print(f"{name:<9} {sentences(' '.join(words))}")
    print(f"\ntawny chat {fitted} talks to it, tawny serve {fitted} serves it.")
    print(f"{picture}, {felt / 'report.html'} and {fitted / 'fit.png'} show what was done.")


def beside(name: str, folder: Path, found: tawny.Agreement) -> str:
    """A model beside the original on the same windows, in one line."""
    megabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    return (
        f"{name:<22} {megabytes:4.0f} MB, same next token {share_text(found.top1, found.top1_stderr)} %, "
        f"perplexity {found.perplexity.perplexity:.1f} (original {found.dense.perplexity:.1f})"
    )


def sentences(text: str) -> str:
    """The text up to the end of its last whole sentence, or all of it where none ends."""
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] or text


if __name__ == "__main__":
    try:
        main()
    except tawny.TawnyError as error:
        Console().error(str(error))
        raise SystemExit(error.exit_code) from None
