"""Who should share bits among linears? One mean, one solver, several allocators: the appendix of OWL (2310.05175), with controls.

    python benchmarks/mixed_bits.py --text wiki --text PATH.txt

Each cell gives linears `int3`, `int4` or `int8` at one mean, solved by SparseGPT's column loop. `owl`, `atp`, `dlp` and `alpha`
are the allocators of the package. The controls are `uniform` (linears are alike, so the first ones get more bits until none are
left), `random`, `l1` (linears whose rounding to int3 loses most of Σ|W| get more) and `error` (those in which the column loop
loses most of ‖XWᵀ‖² at int3). A model that was itself dequantised from few bits flatters rounding: give `--model` a source of
frontier.py, which lies on no grid.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from cells import parser_for
from few_bits import begun, cell, keep
from safetensors import safe_open

import tawny
from tawny.model.source import resolve

OF = ["int3", "int4", "int8"]
BAND = 0.15  # sparsity asked for, between the linear that should keep most and the one that should keep least
MEASURED = ("random", "l1", "error")


def main() -> None:
    parser = parser_for(__doc__, "mixed_bits.json")
    parser.add_argument("--mean", type=float, default=3.5)
    parser.add_argument("--by", nargs="+", default=["uniform", *MEASURED, "owl", "atp", "dlp", "alpha"])
    parser.add_argument("--name", help="what to call the model; default: its folder")
    parser.set_defaults(samples=16, seqlen=512, eval_seqlen=512, work=None)
    args = parser.parse_args()
    results = begun(args, "mean")
    for by in args.by:
        for seed in args.seeds:
            name = f"{by} {seed}"
            if name in results["cells"]:
                continue
            values = {"mean": args.mean, "of": OF, "group_size": 32}
            with tempfile.TemporaryDirectory(prefix="tawny-mixed-") as folder:
                allocator = shared(args, by, seed, Path(folder)) if by in MEASURED else by
                made = cell(args, "int3:32:0", "sparsegpt", seed, values=values, allocator=allocator)
            results["cells"][name] = made
            keep(args, results)
            shown = ", ".join(f"{k} KL {v['kl']:.3f}" for k, v in made["texts"].items())
            print(f"{name}: {made['bits']:.2f} bits, {made['seconds']:.0f} s, {shown}", flush=True)


def shared(args: Any, by: str, seed: int, folder: Path) -> str:
    """An allocation file of sparsities around the mean: the more a linear scores, the less, by its rank."""
    solver = "sparsegpt" if by == "error" else "magnitude"
    record = tawny.prune(
        args.model,
        folder / "int3",
        values={"kind": "int3", "group_size": 32},
        sparsity=0.0,
        solver=solver,
        seed=seed,
        **{
            f"calibration.{k}": v
            for k, v in (("text", args.calibration), ("samples", args.samples), ("seqlen", args.seqlen))
        },
    )
    sizes = {x.name: x.shape[0] * x.shape[1] for x in record.linears}
    if by == "random":
        order = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
        score = dict(zip(sizes, order, strict=True))
    elif by == "error":
        score = {x.name: x.error for x in record.linears}
    else:
        score = {name: lost(resolve(args.model), folder / "int3", name) for name in sizes}
    shutil.rmtree(folder / "int3")
    rank = {name: place / (len(score) - 1) for place, name in enumerate(sorted(score, key=score.__getitem__))}
    middle = sum(rank[name] * size for name, size in sizes.items()) / sum(sizes.values())
    target = 1 - args.mean / 8
    path = folder / "allocation.json"
    path.write_text(json.dumps({name: target - BAND * (rank[name] - middle) for name in sizes}))
    return str(path)


def lost(source: Path, made: Path, name: str) -> float:
    """Σ|W − Ŵ| / Σ|W| of a linear."""
    W, found = (weight(folder, f"{name}.weight") for folder in (source, made))
    return float((W - found).abs().sum() / W.abs().sum())


def weight(folder: Path, name: str) -> torch.Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a mapping
                return file.get_tensor(name).float()
    raise SystemExit(f"{folder} holds no {name}; --model must be a folder of safetensors")


if __name__ == "__main__":
    main()
