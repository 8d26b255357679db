"""Few bits against llama.cpp: tokens a second of whole models of random weights, in turn in one run.

    python benchmarks/few_bits_speed.py              # 1.1b and 7b
    python benchmarks/few_bits_speed.py --shape 1.1b
    python benchmarks/few_bits_speed.py --quick      # a tiny shape, nothing kept
    TAWNY_CPU=kernel=avx2 python benchmarks/few_bits_speed.py --llama AVX2/bin/llama-bench

Needs `make llama`. A lesser CPU is imitated by TAWNY_CPU and by a llama-bench built for it. Prompts need torch kept from
what that CPU lacks, too: ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and MKL_ENABLE_INSTRUCTIONS=AVX2.

Every model lives in a process of its own and waits for its turn, so that a change of clock falls on all of them. Ours are
solved for no data: speed does not depend on values. K-quants are blocks of random bytes with small scales, in the mixture
that llama.cpp's own quantiser chooses. The file holds the last run of each shape on each CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import keep, measured, parser_of
from llama_tools import program
from shapes import SHAPES, write_gguf
from turns import Child, answer, in_turn, of_model

from tawny.evaluation.llama import LlamaBench

OURS = ["int4:32:0", "int4:128:0", "int4:64:0.5", "int3:64:0"]
THEIRS = ["Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M"]
EFFORT = {"1.1b": (512, 24, 5), "7b": (512, 8, 3), "quick": (16, 4, 2)}  # prompt, tokens, rounds


def ours(kind: str, shape: str, threads: int) -> Iterator[Any]:
    """Bytes of the model first, then tokens a second of a prompt and of the tokens after it, a round at a time."""
    import torch
    from decode import Cell, random_model, tensor_bytes

    torch.set_num_threads(threads)
    prompt, tokens, _ = EFFORT[shape]
    values, group, sparsity = kind.split(":")
    model = random_model(
        SHAPES[shape].settings, Cell(kind, float(sparsity), "bf16", values, "int8", int(group))
    )
    yield tensor_bytes(model)
    yield from of_model(model, prompt, tokens)


def compare(names: list[str], shape: str, threads: int, llama: Path) -> list[dict[str, Any]]:
    """All of `names`, in turn."""
    prompt, tokens, rounds = EFFORT[shape]
    turns: dict[str, Callable[[], Sequence[float]]] = {}
    sizes = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in names:
            if name in THEIRS:
                path = folder / f"{name}.gguf"
                write_gguf(path, SHAPES[shape], name)
                turns[name] = partial(LlamaBench(llama, path).turn, prompt, tokens, threads)
                sizes[name] = path.stat().st_size
            else:
                own = ("--child", name, "--shape", shape, "--threads", threads)
                child = stack.enter_context(contextlib.closing(Child(sys.executable, __file__, *own)))
                turns[name], sizes[name] = child.ask, child.first
        speeds = in_turn(turns, rounds)
    rows = []
    for name, size in sizes.items():
        row = {"name": name, "shape": shape, "threads": threads, "bytes": size} | speeds[name]
        print(
            f"{shape} {name}: {row['bytes'] / 1e9:.2f} GB, decode {row['decode_tokens_per_second']:.2f}, "
            f"prefill {row['prefill_tokens_per_second']:.1f} tokens/s",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = parser_of(__doc__, "few_bits_speed.json")
    parser.add_argument("--shape", action="append", choices=list(EFFORT))
    parser.add_argument("--names", nargs="+", default=[*THEIRS, *OURS])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--llama", type=Path, help="llama-bench for the instructions that TAWNY_CPU leaves")
    parser.add_argument("--quick", action="store_true", help="a tiny shape; nothing is kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return answer(ours(args.child, args.shape[0], args.threads))
    from tawny.kernels.native import kernel_name
    from tawny.machine import cpu_name

    cpu = f"{cpu_name()}, kernels {kernel_name()}"
    for shape in ["quick"] if args.quick else args.shape or ["1.1b", "7b"]:
        rows = compare(args.names, shape, args.threads, args.llama or program("bench"))
        if args.quick:
            continue
        kept = json.loads(args.results.read_text()) if args.results.exists() else {"rows": []}
        kept["rows"] = [row for row in kept["rows"] if (row["cpu"], row["shape"]) != (cpu, shape)]
        about = measured(threads=args.threads, cpu=cpu)
        keep(args.results, {"rows": kept["rows"] + [row | about for row in rows]})


if __name__ == "__main__":
    main()
