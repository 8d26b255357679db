"""Prune a real language model at 50 %, pack it, let it talk, and put all three side by side: `make demo`.

SmolLM2-135M comes from a package, its calibration text (Wikipedia) too; nothing is fetched from a hub. OWL decides
how much each block loses, SparseGPT which weights. The end is what `tawny compare` says of the dense, the pruned and
the packed model: size, memory, quality and speed.
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
from tawny.report.comparison import to_html, write
from tawny.tables import compare_tables, record_tables

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
    options.add_argument("--model", default="smollm2")
    options.add_argument("--out", type=Path, default=Path("demo-out"))
    options.add_argument("--text", default="wiki", help="calibrates and evaluates")
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--seqlen", type=int, default=1024)
    options.add_argument("--windows", type=int, default=8)
    options.add_argument("--prompt", default=PROMPT)
    chosen = options.parse_args()
    packed = chosen.out.with_name(chosen.out.name + "-packed")
    console = Console()
    with console.watching() as watch:
        record = tawny.prune(
            chosen.model,
            chosen.out,
            sparsity=0.5,
            allocator="owl",
            solver="sparsegpt",
            calibration=chosen.text,
            samples=chosen.samples,
            seqlen=chosen.seqlen,
            overwrite=True,
            watch=watch,
        )
    console.result(record.to_dict(), record_tables)
    with console.watching() as watch:
        tawny.pack(chosen.out, packed, overwrite=True, watch=watch)
        compared = tawny.compare(
            [chosen.model, chosen.out, packed],
            text=chosen.text,
            seqlen=chosen.seqlen,
            windows=chosen.windows,
            prompt_tokens=min(128, chosen.seqlen // 2),
            watch=watch,
        ).to_dict()
    page = chosen.out / "compare.html"
    write(compared, page, to_html)
    print(f"\ndense   {continue_text(resolve(chosen.model), chosen.prompt)}")
    print(f"pruned  {continue_text(chosen.out, chosen.prompt)}\n")
    console.result(compared, compare_tables)
    print(f"\nwritten to {chosen.out}: AutoModelForCausalLM.from_pretrained({str(chosen.out)!r}) opens it")
    print(f"packed to {packed}: tawny.load({str(packed)!r}) opens it")
    print(f"look at {page}")


if __name__ == "__main__":
    try:
        main()
    except tawny.TawnyError as error:
        Console().error(str(error))
        raise SystemExit(error.exit_code) from None
