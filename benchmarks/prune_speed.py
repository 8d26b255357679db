"""How fast, how small: Tawny beside a straightforward transcription of the official OWL flow, in one run.

    python benchmarks/prune_speed.py                      # smollm2, wiki, 32 samples × 1024

Both prune the same model on the same tokens with the same threads and the same dtype; each measurement is a process of
its own, so that its peak memory is its own, and the two take turns `--repeats` times. Memory is peak resident bytes
above a process that has only imported what both import.

The transcription keeps what costs the official flow its time and memory: the whole model in memory; one pass over all
blocks for the outlier ratios and a second to prune, each running every block twice (once to observe, once for the
outputs); one sample a forward; one set of statistics per linear, shared inputs or not; Wanda by a full stable sort of
every row, SparseGPT by the column loop with a threshold from a full sort of each 128-column group. Weights and forwards have
the dtype; statistics and solves are in float32, as theirs are.
It is written from the paper and the public description of the flow; no line of it is anybody else's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import harness

PEAK_SIZE = 2048


# --- the official flow, transcribed -----------------------------------------------------------------------------


def official(folder: str, ids: Any, solver: str, sparsity: float, dtype: str, out: str) -> None:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    blocks = model.model.layers
    M, lam = 5, 0.08

    class Catcher(nn.Module):
        def __init__(self, inner: nn.Module, caught: list[Any]) -> None:
            super().__init__()
            self.inner, self.caught = inner, caught

        def forward(self, hidden: Any, **kwargs: Any) -> Any:
            self.caught.append((hidden, kwargs))
            raise ValueError

    def first_inputs() -> tuple[Any, dict[str, Any]]:
        caught: list[Any] = []
        blocks[0] = Catcher(blocks[0], caught)
        for row in ids:
            with contextlib.suppress(ValueError):
                model(row[None], use_cache=False)
        blocks[0] = blocks[0].inner
        return torch.cat([hidden for hidden, _ in caught]), caught[0][1]

    def linears(block: Any) -> dict[str, Any]:
        return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}

    def progress(block: Any, inputs: Any, kwargs: dict[str, Any], hessian: bool) -> dict[str, Any]:
        stats: dict[str, Any] = {}
        count: dict[str, int] = {}

        def hook(name: str) -> Any:
            def add(module: Any, args: Any, output: Any) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                seen = count.get(name, 0)
                if hessian:
                    old = stats.get(name, torch.zeros(x.shape[1], x.shape[1]))
                    x = x * (2 / (seen + 1)) ** 0.5
                    stats[name] = old * (seen / (seen + 1)) + x.T.matmul(x)
                else:
                    old = stats.get(name, torch.zeros(x.shape[1]))
                    stats[name] = old * (seen / (seen + 1)) + torch.norm(x, p=2, dim=0) ** 2 / (seen + 1)
                count[name] = seen + 1

            return add

        handles = [m.register_forward_hook(hook(name)) for name, m in linears(block).items()]
        for j in range(len(inputs)):
            block(inputs[j : j + 1], **kwargs)
        for handle in handles:
            handle.remove()
        return stats

    def outputs(block: Any, inputs: Any, made: Any, kwargs: dict[str, Any]) -> None:
        for j in range(len(inputs)):
            made[j : j + 1] = block(inputs[j : j + 1], **kwargs)

    def sparsegpt(W: Any, H: Any, ratio: float) -> Any:
        dead = torch.diag(H) == 0
        H[dead, dead] = 1
        W[:, dead] = 0
        H[range(len(H)), range(len(H))] += 0.01 * torch.mean(torch.diag(H))
        Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        for start in range(0, W.shape[1], 128):
            stop = min(start + 128, W.shape[1])
            W1, Err, U = (
                W[:, start:stop].clone(),
                torch.zeros(W.shape[0], stop - start),
                Hinv[start:stop, start:stop],
            )
            Q1 = torch.zeros_like(W1)
            scores = W1**2 / torch.diag(U).reshape(1, -1) ** 2
            threshold = torch.sort(scores.flatten())[0][int(scores.numel() * ratio)]
            mask = scores <= threshold
            for i in range(stop - start):
                w, d = W1[:, i], U[i, i]
                q = w.clone()
                q[mask[:, i]] = 0
                Q1[:, i] = q
                error = (w - q) / d
                W1[:, i:] -= error.unsqueeze(1).matmul(U[i, i:].unsqueeze(0))
                Err[:, i] = error
            W[:, start:stop] = Q1
            W[:, stop:] -= Err.matmul(Hinv[start:stop, stop:])
        return W

    with torch.no_grad():
        shares = []
        inputs, kwargs = first_inputs()
        made = torch.zeros_like(inputs)
        for block in blocks:
            norms = progress(block, inputs, kwargs, hessian=False)
            outputs(block, inputs, made, kwargs)
            scores = torch.cat(
                [(m.weight.abs() * norms[n].sqrt()).flatten() for n, m in linears(block).items()]
            )
            shares.append(float((scores > scores.mean() * M).sum()) / scores.numel() * 100)
            inputs, made = made, inputs
        low, high = min(shares), max(shares)
        density = [(d - low) / (high - low) * lam * 2 for d in shares]
        shift = (1 - sparsity) - sum(density) / len(density)
        ratios = [1 - (d + shift) for d in density]

        inputs, kwargs = first_inputs()
        made = torch.zeros_like(inputs)
        for block, ratio in zip(blocks, ratios, strict=True):
            stats = progress(block, inputs, kwargs, hessian=solver == "sparsegpt")
            for name, module in linears(block).items():
                W = module.weight.data
                if solver == "wanda":
                    order = torch.sort(W.abs() * stats[name].sqrt()[None], dim=-1, stable=True)[1]
                    W.scatter_(1, order[:, : int(W.shape[1] * ratio)], 0)
                else:
                    module.weight.data = sparsegpt(W.float(), stats[name], ratio).to(W.dtype)
            outputs(block, inputs, made, kwargs)
            inputs, made = made, inputs
    model.save_pretrained(out)


# --- one measurement, one process --------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    import torch
    import transformers  # noqa: F401 - both sides import it; it belongs to the baseline
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import tawny.model.stack
    import tawny.pruning.run  # both sides import it; it belongs to the baseline
    from tawny.machine import peak_memory
    from tawny.model.source import resolve

    torch.set_num_threads(args.threads)
    idle = peak_memory()
    ids = torch.load(args.ids, weights_only=True)
    folder = str(resolve(args.model))
    start = time.perf_counter()
    phases: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if args.child == "official":
            official(folder, ids, args.solver, args.sparsity, args.dtype, f"{scratch}/out")
        else:
            record = tawny.prune(
                folder,
                f"{scratch}/out",
                sparsity=args.sparsity,
                allocator="owl",
                solver=args.solver,
                calibration=ids,
                compute=args.dtype,
            )
            phases = record.seconds
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "memory": peak_memory() - idle, "idle": idle, "phases": phases}))


def measure(args: argparse.Namespace, who: str, solver: str, dtype: str, ids: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", who, "--solver", solver, "--dtype", dtype, "--ids", ids]
    command += ["--model", args.model, "--sparsity", args.sparsity, "--threads", args.threads]
    made: dict[str, Any] = harness.child(command)
    print(
        f"{who:9} {solver:10} {dtype:9} {made['seconds']:7.1f} s  {made['memory'] / 1e6:7.0f} MB above idle",
        flush=True,
    )
    return made


def floor(args: argparse.Namespace, dtype: str, tokens: int) -> dict[str, float]:
    """Matrix products no such method can avoid, at the speed this machine shows on a large one just now."""
    import torch

    from tawny.model.source import resolve
    from tawny.packed.opening import open_stack
    from tawny.precision import rounds_products
    from tawny.pruning.prepare import PROFILE_TOKENS
    from tawny.run.memory import sharing_inputs

    torch.set_num_threads(args.threads)

    def peak(dtype: torch.dtype) -> float:
        a = torch.randn(PEAK_SIZE, PEAK_SIZE).to(dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return 2 * PEAK_SIZE**3 / min(times)

    stack = open_stack(resolve(args.model))
    last = {x.name: x.numel for x in stack.linears(0)}
    per_token = 2 * sum(p.numel() for p in stack.blocks[0].parameters() if p.dim() == 2)
    down = 2 * list(last.values())[-1]
    blocks = len(stack)
    forwards = blocks * ((tokens + min(tokens, PROFILE_TOKENS)) * per_token + tokens * (per_token - down))
    width = sum(group[0].shape[1] ** 2 for group in sharing_inputs(stack.linears(0)))
    chosen, single = peak(getattr(torch, dtype)), peak(torch.float32)
    return {
        "peak_flops_forward": chosen,
        "peak_flops_float32": single,
        "forward_seconds": forwards / chosen,
        # Half of the symmetric product is enough. Hessians of bfloat16 inputs lose nothing in bfloat16.
        "hessian_seconds": blocks * tokens * width / (chosen if rounds_products() else single),
    }


def profile_subset(args: argparse.Namespace, windows: Any) -> dict[str, float]:
    """How far the block sparsities from the default subset of the samples are from those of all samples."""
    import tawny
    from tawny.pruning.prepare import PROFILE_TOKENS

    few = -(-PROFILE_TOKENS // args.seqlen)
    made = [
        tawny.profile(
            args.model, calibration=windows, Ms=[5], sparsity=args.sparsity, profile_samples=count
        ).allocations["owl M=5"]
        for count in (few, args.samples)
    ]
    return {
        "samples": few,
        "of": args.samples,
        "largest_difference": max(abs(a - b) for a, b in zip(*made, strict=True)),
    }


def main() -> None:
    parser = harness.parser_of(__doc__, "prune_speed.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="wiki")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--solvers", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--child", choices=["official", "tawny"], help=argparse.SUPPRESS)
    parser.add_argument("--solver", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--ids", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    import torch

    from tawny.calibration.text import load_text
    from tawny.calibration.windows import sample_windows, tokenise
    from tawny.model.source import load_tokenizer, resolve

    text = load_text(args.text, "calibration")
    windows = sample_windows(
        tokenise(text, load_tokenizer(resolve(args.model))), args.samples, args.seqlen, 0
    )
    results: dict[str, Any] = {
        "setting": {
            k: getattr(args, k)
            for k in ("model", "text", "samples", "seqlen", "sparsity", "threads", "repeats")
        },
        "floor": {dtype: floor(args, dtype, args.samples * args.seqlen) for dtype in args.dtypes},
        "profile_subset": profile_subset(args, windows),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        ids = f"{scratch}/ids.pt"
        torch.save(windows, ids)
        for dtype, solver in itertools.product(args.dtypes, args.solvers):
            runs: dict[str, list[dict[str, Any]]] = {"official": [], "tawny": []}
            for _ in range(args.repeats):
                for who, collected in runs.items():
                    collected.append(measure(args, who, solver, dtype, ids))
            median = {
                who: {key: statistics.median(run[key] for run in made) for key in ("seconds", "memory")}
                for who, made in runs.items()
            }
            least = results["floor"][dtype]
            unavoidable = least["forward_seconds"] + (
                least["hessian_seconds"] if solver == "sparsegpt" else 0
            )
            row = {
                "solver": solver,
                "dtype": dtype,
                **{who: {"median": median[who], "runs": made} for who, made in runs.items()},
                "times_faster": median["official"]["seconds"] / median["tawny"]["seconds"],
                "memory_ratio": median["tawny"]["memory"] / median["official"]["memory"],
                "unavoidable_share": unavoidable / median["tawny"]["seconds"],
            }
            results["rows"].append(row)
            print(
                f"{solver}, {dtype}: {row['times_faster']:.2f} × faster, {row['memory_ratio']:.2f} × the memory, "
                f"{row['unavoidable_share']:.0%} of the time is unavoidable matrix products",
                flush=True,
            )
    harness.keep(args.results, results)


if __name__ == "__main__":
    main()
