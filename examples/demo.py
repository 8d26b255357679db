"""Prune a real language model at 50 % and let it talk: `make demo`.

SmolLM2-135M comes from a package, its calibration text (Wikipedia) too; nothing is fetched from a hub. OWL decides
how much each block loses, SparseGPT which weights, and the end is the dense model beside the pruned one.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path

import torch

import tawny
from tawny.console import Console
from tawny.model.source import resolve
from tawny.tables import comparison_table, record_tables

PROMPT = "The owl is a bird that"


def continue_text(folder: Path, prompt: str, tokens: int = 24) -> str:
    """What plain transformers makes of the folder: greedy, so that anyone sees the same words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=1.2,
        )
    return " ".join(tokenizer.decode(written[0], skip_special_tokens=True).split())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("demo-out"))
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--seqlen", type=int, default=1024)
    options.add_argument("--windows", type=int, default=8)
    options.add_argument("--prompt", default=PROMPT)
    chosen = options.parse_args()
    console = Console()
    with console.watching() as watch:
        record = tawny.prune(
            "smollm2",
            chosen.out,
            sparsity=0.5,
            allocator="owl",
            solver="sparsegpt",
            calibration="wiki",
            samples=chosen.samples,
            seqlen=chosen.seqlen,
            overwrite=True,
            watch=watch,
        )
        dense, pruned = (
            tawny.evaluate(model, "wiki", seqlen=chosen.seqlen, windows=chosen.windows, watch=watch).to_dict()
            for model in ("smollm2", chosen.out)
        )
    pruned["sparsity"] = record.sparsity
    console.result(record.to_dict(), lambda shown: [*record_tables(shown), comparison_table(dense, pruned)])
    print(f"\ndense   {continue_text(resolve('smollm2'), chosen.prompt)}")
    print(f"pruned  {continue_text(chosen.out, chosen.prompt)}")
    print(f"\nwritten to {chosen.out}: AutoModelForCausalLM.from_pretrained({str(chosen.out)!r}) opens it")


if __name__ == "__main__":
    try:
        main()
    except tawny.TawnyError as error:
        Console().error(str(error))
        raise SystemExit(error.exit_code) from None
