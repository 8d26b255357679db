"""Whether llama.cpp says what our decoder says: a pruned model, exported to GGUF, with greedy tokens compared.

    python benchmarks/runtimes.py                 # smollm2 at 50 %, minutes; needs llama-cpp-python

For each type of the file and each prompt, llama.cpp and our decoder continue the same text greedily. Texts are compared
token by token until they differ. The two best logits of our model at that place say whether it was a tie that rounding may
decide (`margin`). The prompts are tokenised by both, so the exported tokenizer is compared, too. Our model computes in
float32; llama.cpp rounds the inputs of products to the type of the weights. Which weights go does not matter here, so a
quick solver prunes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import keep, parser_of

import tawny
from tawny.calibration.text import load_text
from tawny.evaluation.samples import prompts_from
from tawny.model.source import load_tokenizer

TIE = 0.05


def greedy(llama: Any, ids: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """llama.cpp's likeliest tokens, and its logits `[count, words]` before each."""
    llama.reset()
    llama.eval(ids)
    tokens, logits = [], []
    while len(tokens) < count:
        logits.append(torch.from_numpy(llama.scores[llama.n_tokens - 1].copy()))
        tokens.append(int(logits[-1].argmax()))
        llama.eval(tokens[-1:])
    return tokens, torch.stack(logits)


def compare(model: Any, tokenizer: Any, llama: Any, prompt: str, count: int) -> dict[str, Any]:
    ids = tokenizer(prompt)["input_ids"]
    made = tawny.generate(model, torch.tensor(ids), max_tokens=count)
    theirs, logits = greedy(llama, ids, len(made.tokens))
    with torch.no_grad():
        ours = model(torch.tensor([ids + made.tokens])).logits[0, len(ids) - 1 : -1]
    equal = next((i for i, (a, b) in enumerate(zip(made.tokens, theirs, strict=True)) if a != b), len(theirs))
    at = min(equal, len(ours) - 1)
    best = ours[at].topk(2).values
    return {
        "prompt": prompt,
        "text": tokenizer.decode(made.tokens),
        "path": made.path,
        "tokens": len(made.tokens),
        "equal": equal,
        "margin": None if equal == len(theirs) else float(best[0] - best[1]),
        "largest_difference": float((ours[: at + 1] - logits[: at + 1]).abs().max()),
        "same_tokens_of_prompt": llama.tokenize(prompt.encode(), add_bos=False, special=False) == ids,
    }


def measure(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """What is known after each type."""
    import llama_cpp

    torch.set_num_threads(args.threads)
    pruned = work / "pruned"
    keys = {"solver": args.solver, "sparsity": args.sparsity, "calibration": "wiki"}
    seen = {"calibration.samples": args.samples, "calibration.seqlen": args.seqlen}
    if not pruned.exists():
        tawny.prune(args.model, pruned, **keys, **seen)
    record = json.loads((pruned / "run.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(pruned)
    model = tawny.load(pruned, dtype=torch.float32)
    prompts = prompts_from(load_text("wiki", "evaluation"), args.prompts)
    rows: list[dict[str, Any]] = []
    for kind in args.types:
        report = tawny.export(pruned, work / f"{kind}.gguf", type=kind, overwrite=True)
        llama = llama_cpp.Llama(report.out, n_ctx=256, logits_all=True, verbose=False, n_threads=args.threads)
        found = [compare(model, tokenizer, llama, prompt, args.tokens) for prompt in prompts]
        llama.close()
        rows.append({"type": kind, "bytes": report.bytes, "zeros": report.zeros, "prompts": found})
        print(kind, [(row["equal"], row["margin"]) for row in found], flush=True)
        yield {
            "model": args.model,
            "sparsity": record["sparsity"],
            "recipe": record["recipe"],
            "tie": TIE,
            "rows": rows,
            "llama_cpp_python": llama_cpp.__version__,
        }


def main() -> None:
    parser = parser_of(__doc__, "runtimes.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--solver", default="wanda")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--types", nargs="+", default=["F16", "BF16", "Q8_0", "Q4_0"])
    parser.add_argument("--work", type=Path, help="folder to keep the pruned model in, for another run")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for result in measure(args, args.work or Path(work)):
            keep(args.results, result, threads=args.threads)


if __name__ == "__main__":
    main()
