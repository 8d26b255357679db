"""Few bits by three ways of solving: KL to the dense model, perplexity, bits a weight and seconds.

    python benchmarks/few_bits.py --text wiki --text PATH.txt --windows 4

A cell is a kind, a group size, a sparsity and a solver: `magnitude` rounds by the best scale, `sparsegpt` rounds in its
column loop (with nothing removed that is GPTQ), `alps` solves on the grid by ADMM. Each is pruned, packed with a head in
int8, and the packed folder is evaluated; w4 and w8 are exported for GPUs instead, with the head as it is. The same command goes on where a run was stopped, with `--work DIR` inside a cell.
There the models that `alps` makes stay, where frontier.py finds them. A model that was itself dequantised from few bits
flatters plain rounding: `frontier.py --work DIR --cells` writes `DIR/source`, which lies on no grid (fair_start.py).
A tiny run: `--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --kinds int4:64:0`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from cells import parser_for
from harness import begun, keep, measured
from safetensors import safe_open

import tawny
from tawny.kinds import GPU_KINDS

KINDS = ["int4:32:0", "int4:64:0", "int4:128:0", "int3:64:0", "int4:64:0.5", "int3:64:0.5"]


def main() -> None:
    parser = parser_for(__doc__, "few_bits.json")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="KIND:GROUP:SPARSITY")
    parser.add_argument("--name", help="what to call the model; default: its folder")
    parser.add_argument("--solvers", nargs="+", default=["magnitude", "sparsegpt", "alps"])
    parser.add_argument("--work", type=Path, help="folder to work and to keep models in")
    parser.set_defaults(samples=16)
    args = parser.parse_args()
    keys = ("calibration", "samples", "seqlen", "eval_seqlen", "windows")
    setting = {key: getattr(args, key) for key in keys}
    setting["calibration"] = ",".join(Path(text).name for text in args.calibration.split(","))
    setting |= {"model": args.name or Path(args.model).name, "texts": [Path(text).name for text in args.text]}
    if all(kind.split(":")[0] in GPU_KINDS for kind in args.kinds):
        setting["head"] = "as it is"
    results = begun(args.results, setting, cells={})
    for kind in args.kinds:
        for solver in args.solvers:
            for seed in args.seeds:
                name = f"{kind} {solver} {seed}"
                if name not in results["cells"]:
                    results["cells"][name] = made = cell(args, kind, solver, seed)
                    keep(args.results, results)
                    shown = ", ".join(
                        f"{k} KL {v['kl']:.3f} ppl {v['perplexity']:.2f}" for k, v in made["texts"].items()
                    )
                    print(f"{name}: {made['bits']:.2f} bits, {made['seconds']:.0f} s, {shown}", flush=True)


def cell(args: Any, kind: str, solver: str, seed: int) -> dict[str, Any]:
    values, group, sparsity = kind.split(":")
    folder = Path(tempfile.mkdtemp(prefix="tawny-bits-"))
    dense = folder / "dense" if args.work is None else args.work / f"{kind} {solver} {seed}"  # may be stopped
    try:
        record = tawny.prune(
            args.model,
            dense,
            values={"kind": values, "group_size": int(group)},
            sparsity=float(sparsity),
            solver=solver,
            seed=seed,
            overwrite=True,  # what a stopped run left finished
            **{
                f"calibration.{k}": v
                for k, v in (
                    ("text", args.calibration.split(",")),
                    ("samples", args.samples),
                    ("seqlen", args.seqlen),
                )
            },
        )
        if values in GPU_KINDS:
            size = tawny.export(dense, folder / "packed", to="compressed-tensors").bytes
            bits = stored_bits(folder / "packed", [linear.name for linear in record.linears])
        else:
            report = tawny.pack(dense, folder / "packed", head="int8")
            packed = [linear for linear in report.linears if linear.name in record.allocation]
            size = report.file_bytes
            bits = 8 * sum(x.bytes for x in packed) / sum(x.shape[0] * x.shape[1] for x in packed)
        texts = {}
        for text in args.text:
            found = tawny.agreement(
                folder / "packed",
                args.model,
                text,
                seqlen=args.eval_seqlen,
                windows=args.windows,
                compute="float32",
            )
            texts[Path(text).name] = {
                "kl": found.kl,
                "kl_stderr": found.kl_stderr,
                "perplexity": found.perplexity.perplexity,
                "dense": found.dense.perplexity,
            }
        if args.work is not None and solver == "alps" and not (args.work / kind).exists():
            shutil.move(folder / "packed", args.work / kind)
        shutil.rmtree(dense)
        return {
            "bits": bits,
            "bytes": size,
            "seconds": record.seconds["total"],
            "solve_seconds": record.seconds.get("solve", 0.0),
            **measured(),
            "mean_error": sum(x.error for x in record.linears) / len(record.linears),
            "texts": texts,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stored_bits(folder: Path, names: list[str]) -> float:
    """Bits a weight that linears take in a folder of compressed-tensors, scales and shapes included."""
    stored = weights = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                for part in ("weight_packed", "weight_scale", "weight_shape"):
                    if f"{name}.{part}" in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                        tensor = tensors.get_tensor(f"{name}.{part}")
                        stored += tensor.nbytes
                        weights += int(tensor.prod()) if part == "weight_shape" else 0
    return 8 * stored / weights


if __name__ == "__main__":
    main()
