"""Few bits against llama.cpp: tokens a second of whole models of random weights, in turn in one run.

    python benchmarks/few_bits_speed.py --llama PATH/python              # 1.1b and 7b
    python benchmarks/few_bits_speed.py --llama PATH/python --shape 1.1b
    python benchmarks/few_bits_speed.py --llama PATH/python --quick      # a tiny shape, nothing kept

`--llama` is the interpreter of an environment that has llama-cpp-python and gguf. Every model lives in a process of its own
and waits for its turn, so that a change of clock falls on all of them. Ours are solved for no data: speed does not depend on
values. K-quants are blocks of random bytes with small scales, in the mixture that llama.cpp's own quantiser chooses. The file
holds the last run of each shape on each CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import keep, measured, parser_of
from shapes import SHAPES, write_gguf
from turns import answer, in_turn, of_gguf, of_model, rates

OURS = ["int4:32:0", "int4:128:0", "int4:64:0.5", "int3:64:0"]
THEIRS = ["Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M"]
EFFORT = {"1.1b": (512, 24, 5), "7b": (512, 8, 3), "quick": (16, 4, 2)}  # prompt, tokens, rounds


def theirs(kind: str, shape: str, threads: int) -> Iterator[tuple[float, float]]:
    """Bytes of the file first, then seconds of a prompt and of the tokens after it, a round at a time."""
    prompt, tokens, _ = EFFORT[shape]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, SHAPES[shape], kind)
        yield path.stat().st_size, 0.0
        yield from of_gguf(path, prompt, tokens, threads)


def ours(kind: str, shape: str, threads: int) -> Iterator[tuple[float, float]]:
    import torch
    from decode import Cell, random_model, tensor_bytes

    torch.set_num_threads(threads)
    prompt, tokens, _ = EFFORT[shape]
    values, group, sparsity = kind.split(":")
    model = random_model(
        SHAPES[shape].settings, Cell(kind, float(sparsity), "bf16", values, "int8", int(group))
    )
    yield tensor_bytes(model), 0.0
    yield from of_model(model, prompt, tokens)


def compare(names: list[str], shape: str, threads: int, llama: str) -> list[dict[str, Any]]:
    """All of `names`, in turn."""
    prompt, tokens, rounds = EFFORT[shape]
    own = ("--shape", shape, "--threads", str(threads))
    commands = {
        name: [llama if name in THEIRS else sys.executable, __file__, "--child", name, *own] for name in names
    }
    sizes, seconds = in_turn(commands, rounds)
    rows = []
    for name, (size, _) in sizes.items():
        row: dict[str, Any] = {"name": name, "shape": shape, "threads": threads, "bytes": int(size)}
        row |= rates(seconds[name], prompt, tokens)
        print(
            f"{shape} {name}: {row['bytes'] / 1e9:.2f} GB, decode {row['decode_tokens_per_second']:.2f}, "
            f"prefill {row['prefill_tokens_per_second']:.1f} tokens/s",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = parser_of(__doc__, "few_bits_speed.json")
    parser.add_argument("--llama", help="interpreter with llama-cpp-python")
    parser.add_argument("--shape", action="append", choices=list(EFFORT))
    parser.add_argument("--names", nargs="+", default=[*THEIRS, *OURS])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a tiny shape; nothing is kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run = theirs if args.child in THEIRS else ours
        return answer(run(args.child, args.shape[0], args.threads))
    from tawny.kernels.native import kernel_name
    from tawny.machine import cpu_name

    cpu = f"{cpu_name()}, kernels {kernel_name()}"
    for shape in ["quick"] if args.quick else args.shape or ["1.1b", "7b"]:
        rows = compare(args.names, shape, args.threads, args.llama)
        if args.quick:
            continue
        kept = json.loads(args.results.read_text()) if args.results.exists() else {"rows": []}
        kept["rows"] = [row for row in kept["rows"] if (row["cpu"], row["shape"]) != (cpu, shape)]
        about = measured(threads=args.threads, cpu=cpu)
        keep(args.results, {"rows": kept["rows"] + [row | about for row in rows]})


if __name__ == "__main__":
    main()
