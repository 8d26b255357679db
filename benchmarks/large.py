"""Larger than memory: prune a 7B-shaped checkpoint within a budget, and measure what it really took.

    python benchmarks/large.py                                   # 32 blocks, OWL-Wanda and OWL-SparseGPT, 6GB
    python benchmarks/large.py --blocks 2                        # the same, shorter, to try
    python benchmarks/large.py --shape 70b --blocks 1 --memory 24GB --plan

The checkpoint has the shapes of LLaMA and random weights, the same on every machine, written a block at a time into
`--work` (kept there for the next run). Each pruning is a process of its own, so that its peak is its own. With
`--plan` the plan of the whole model (every block, whatever `--blocks` says) is made too, from a checkpoint that is all
headers and holes and takes no room on the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import harness
from shapes import SHAPES


def write_checkpoint(folder: Path, shape: str, blocks: int | None = None, *, holes: bool = False) -> Path:
    """A LLaMA checkpoint of random bfloat16 weights; with `holes` no weights, only their places."""
    import torch
    from transformers import LlamaConfig

    from tawny.model.checkpoint import INDEX
    from tawny.model.shards import index_of, shard_names
    from tawny.model.tensorfile import TensorWriter

    sizes = SHAPES[shape]
    hidden, vocabulary, count = sizes.hidden, sizes.vocabulary, blocks or sizes.blocks
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    linears = {
        f"{'mlp' if name in ('gate', 'up', 'down') else 'self_attn'}.{name}_proj": size
        for name, size in sizes.linears.items()
    }
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)},
        *(
            {f"model.layers.{i}.{name}.weight": size for name, size in linears.items()}
            | {f"model.layers.{i}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
            for i in range(count)
        ),
        {"lm_head.weight": (vocabulary, hidden)},
    ]
    names = shard_names(len(shards))
    total = 0
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        with TensorWriter(folder / name, {k: (torch.bfloat16, s) for k, s in shard.items()}) as writer:
            for place, (key, size) in enumerate(shard.items()):
                total += 2 * int(torch.Size(size).numel())
                if holes:
                    continue
                generator = torch.Generator().manual_seed(1000 * number + place)
                if len(size) == 1:
                    value = torch.ones(size, dtype=torch.bfloat16)
                else:
                    # A tenth of the inputs matter much more, so that there are outliers to find.
                    value = torch.randn(size, generator=generator, dtype=torch.float32).mul_(size[1] ** -0.5)
                    value[:, :: max(1, size[1] // 40)] *= 4
                writer.write(key, value.to(torch.bfloat16))
    (folder / INDEX).write_bytes(index_of({n: list(s) for n, s in zip(names, shards, strict=True)}, total))
    LlamaConfig(
        **{**sizes.settings, "num_hidden_layers": count},
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def prune_once(arguments: argparse.Namespace, model: Path, out: Path, solver: str) -> dict[str, Any]:
    """One pruning in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--child", model, out, solver]
    command += ["--memory", arguments.memory, "--sparsity", arguments.sparsity]
    command += ["--samples", arguments.samples, "--seqlen", arguments.seqlen]
    start = time.perf_counter()
    result: dict[str, Any] = harness.child(command)
    result["wall"] = round(time.perf_counter() - start, 1)
    result["written"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out, ignore_errors=True)
    return result


def child(arguments: argparse.Namespace) -> None:
    import torch

    import tawny
    from tawny.cli.console import Console

    model, out, solver = arguments.child
    generator = torch.Generator().manual_seed(0)
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(3, vocabulary, (arguments.samples, arguments.seqlen), generator=generator)
    with Console().progress() as progress:
        record = tawny.prune(
            model,
            out,
            sparsity=arguments.sparsity,
            allocator="owl",
            solver=solver,
            calibration=tokens,
            memory=arguments.memory,
            overwrite=True,
            progress=progress,
        )
    kept = record.to_dict()
    wanted = (
        "sparsity",
        "zeros",
        "prunable",
        "seconds",
        "peak_memory",
        "memory",
        "machine",
        "versions",
        "compute",
    )
    print(json.dumps({key: kept[key] for key in wanted}))


def plan_of(arguments: argparse.Namespace, solver: str) -> dict[str, Any]:
    """What the plan says of the whole model."""
    import tawny

    holes = write_checkpoint(Path(arguments.work) / f"holes-{arguments.shape}", arguments.shape, holes=True)
    text = Path(arguments.work) / "words.txt"
    text.write_text("word " * 1000, encoding="utf-8")
    made = tawny.plan(
        holes,
        sparsity=arguments.sparsity,
        allocator="owl",
        solver=solver,
        memory=arguments.memory,
        **{
            "calibration.text": str(text),
            "calibration.samples": arguments.samples,
            "calibration.seqlen": arguments.seqlen,
        },
    ).to_dict()
    kept = {
        key: made[key] for key in ("parameters", "prunable", "memory", "hidden_states", "disk", "seconds")
    }
    print(f"plan, {arguments.shape}, owl + {solver}: " + json.dumps(kept))
    return kept


def main() -> None:
    parser = harness.parser_of(__doc__, "large.json")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--solver", action="append", help="default: wanda and sparsegpt")
    parser.add_argument("--memory", default="6GB")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument(
        "--work", default="/tmp/tawny-large", help="for the checkpoint; 14 GB for 7b, and as much to write"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    solvers = arguments.solver or ["wanda", "sparsegpt"]
    key = f"{arguments.shape}-{arguments.blocks or SHAPES[arguments.shape].blocks}"
    path = arguments.results
    results = json.loads(path.read_text()) if path.is_file() else {}
    entry = results.setdefault(key, {})
    model = write_checkpoint(Path(arguments.work) / key, arguments.shape, arguments.blocks)
    for solver in solvers:
        if arguments.plan:
            entry.setdefault("plan", {})[solver] = plan_of(arguments, solver)
        made = prune_once(arguments, model, Path(arguments.work) / f"{key}-out", solver)
        made["arguments"] = {k: getattr(arguments, k) for k in ("memory", "sparsity", "samples", "seqlen")}
        entry[solver] = made | harness.origin()
        print(
            f"{key}, owl + {solver}: {made['seconds']['total']:.0f} s, peak {made['peak_memory'] / 1e9:.2f} GB "
            f"(estimated {made['memory']['estimate'] / 1e9:.2f}, budget {arguments.memory}), {made['sparsity']:.4f}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
