"""Prune a real language model at 30 %, train it for two minutes, pack it and let it talk: `make demo`.

SmolLM2-135M comes from a package, its text (Wikipedia) too; nothing is fetched from a hub. The model's output says what each
linear can lose, and SparseGPT which weights go and which 6-bit numbers the others become (`tawny prune -c quick`). Two minutes of `tawny recover` then teach the rest through
the rounding of the packed file. The end is what `tawny compare` says of the dense, the pruned and the packed model (size,
memory, quality and speed), an answer of the dense and of the packed one to the same question, and a page about the run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path

import tawny
from tawny.cli.compare import compare_tables
from tawny.cli.console import Console
from tawny.cli.prune import record_tables
from tawny.evaluation.samples import text_samples
from tawny.report.comparison import to_html, write
from tawny.report.publish import publish

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
VALUES = "int6"
PROMPT = "The owl is a bird that"
QUESTION = "What is an owl?"


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another encoding shows what it can
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="smollm2")
    options.add_argument("--out", type=Path, default=Path("demo-out"))
    options.add_argument("--text", default="wiki", help="calibrates and evaluates")
    options.add_argument("--samples", type=int, default=16)
    options.add_argument("--seqlen", type=int, default=1024)
    options.add_argument("--windows", type=int, default=4)
    options.add_argument("--minutes", type=float, default=2.0, help="of training")
    options.add_argument("--prompt", default=PROMPT)
    options.add_argument("--question", default=QUESTION)
    chosen = options.parse_args()
    recovered, packed = (
        chosen.out.with_name(f"{chosen.out.name}-{name}") for name in ("recovered", "packed")
    )
    console = Console()
    with console.progress() as progress:
        record = tawny.prune(
            chosen.model,
            chosen.out,
            sparsity=0.3,
            solver="sparsegpt",
            output="rows",
            values=VALUES,
            calibration=chosen.text,
            samples=chosen.samples,
            seqlen=chosen.seqlen,
            overwrite=True,
            progress=progress,
        )
    console.result(record.to_dict(), record_tables)
    with console.progress() as progress:
        tawny.recover(
            chosen.out,
            chosen.model,
            recovered,
            text=chosen.text,
            minutes=chosen.minutes,
            seqlen=min(512, chosen.seqlen),
            overwrite=True,
            progress=progress,
        )
        tawny.pack(recovered, packed, VALUES, head=VALUES, overwrite=True, progress=progress)
        compared = tawny.compare(
            [chosen.model, chosen.out, packed],
            text=chosen.text,
            seqlen=chosen.seqlen,
            windows=chosen.windows,
            prompt_tokens=min(128, chosen.seqlen // 2),
            progress=progress,
        ).to_dict()
        record.generated = text_samples(chosen.model, chosen.out, [chosen.prompt], progress=progress)
    dense, pruned, _ = (model["perplexity"] for model in compared["models"])
    record.evaluation = {"dense": dense, "pruned": {**pruned, "sparsity": record.sparsity}}
    report = publish(record, chosen.out)
    page = chosen.out / "compare.html"
    write(compared, page, to_html)
    console.result(compared, compare_tables)
    for sample in record.generated:
        for name in ("dense", "pruned"):
            print(f"\n{name:<7} {sample['prompt']} {sample[name]}")
    print(f"\n{chosen.question}")
    for name, model in (("dense", chosen.model), ("packed", packed)):
        answer = tawny.generate(model, chosen.question, max_tokens=60).text
        print(f"{name:<7} {' '.join(answer.split())}")
    print(f"\n{measured()}")
    print(f"\nwritten to {chosen.out}: AutoModelForCausalLM.from_pretrained({str(chosen.out)!r}) opens it")
    print(f"packed to {packed}: tawny.load({str(packed)!r}) opens it")
    print(f"read about the run in {report}, compare in {page}")


def measured() -> str:
    """What is known of this model without zeros, and of a larger one."""
    small, large, sizes = (
        json.loads((RESULTS / f"{name}.json").read_text())["cells"]
        for name in ("few_bits", "few_bits_qwen", "frontier")
    )
    bits = sizes["int4:32:0"]
    three, larger = (cells["int3:64:0 alps 0"]["texts"]["wiki"]["kl"] for cells in (small, large))
    return (
        f"in a file this small, bits alone lose less: four bits without zeros are {bits['bytes'] / 1e6:.0f} MB and "
        f"{bits['texts']['wiki']['kl']:.2f} nats a token from the dense model (docs/results/frontier.md)\n"
        f"larger models lose less, too: at three bits SmolLM2 (135 million weights) is {three:.2f} nats from its dense model,\n"
        f"and Qwen2.5-Coder (1.5 billion) is {larger:.2f} (docs/results/few-bits.md)"
    )


if __name__ == "__main__":
    try:
        main()
    except tawny.TawnyError as error:
        Console().error(str(error))
        raise SystemExit(error.exit_code) from None
