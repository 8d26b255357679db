"""How fast one linear is: packed weights beside every dense and sparse product there is to compare with, in one run.

    python benchmarks/kernel_speed.py                                     # everything that is not in the results yet
    python benchmarks/kernel_speed.py --quick                             # small shapes, few rounds, nothing kept
    python benchmarks/kernel_speed.py --shapes 4096x4096 --threads 1 --columns 1    # a piece; results are merged

Variants: packed bf16, int8 (a scale a row, and one for 128 columns), int4 and int3 (one for 32 columns; without zeros they
have no masks) and f32; our best dense kernel in bf16 and f32 (the
honest baseline); torch's `F.linear` in bf16 and f32; torch CSR (MKL) in f32; and the streaming limit, one core or more
adding up an array and doing nothing else. All variants of a case take turns in every round, so that a change of clock
or a noisy neighbour falls on all of them. Every variant walks over copies of its weight whose bytes together exceed
four times the last-level cache for one column, and the cache itself for many. A time is the median over rounds of the
mean over copies; quartiles stand beside it. `columns` is the number of activation vectors (tokens).

Past so many columns as `dense_direct()` our dense kernel hands over to torch's product, so `torch bf16` is the only dense
variant there. The results are written after each case, and a case that is in them is not measured again unless
`--again` says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, keep, parser_of, spread
from torch import Tensor

from tawny.kernels import native
from tawny.kernels.ops import dense_direct
from tawny.packed.format import PackedTensor, pack
from tawny.packed.linear import DenseLinear, PackedLinear

SHAPES = ["4096x4096", "11008x4096", "2048x5632", "576x1536"]
SPARSITIES = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
MANY_SPARSITIES = [0.0, 0.5, 0.7, 0.8]  # for more than one column
RARE_SPARSITIES = [0.5, 0.6, 0.7, 0.8, 0.9]  # for kinds of values that few choose
COLUMNS = [1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512]
PACKED = {
    "packed bf16": ("bf16", None),
    "packed int8": ("int8", None),
    "packed int8/128": ("int8", 128),
    "packed int4": ("int4", 32),
    "packed int3": ("int3", 32),
    "packed f32": ("f32", None),
}
FEW = {"packed int4": (0.0, 0.5), "packed int3": (0.0,)}  # sparsities, for any number of columns


def cache_bytes() -> int:
    """The last-level cache, or 32 MB where the system does not say."""
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text.rstrip("KM")) * (1024 if text.endswith("K") else 2**20))
    return max(found, default=32 * 2**20)


Call = Callable[[Tensor], Any]


class Variant:
    """One way to multiply, over as many copies of its weight as it takes to leave the cache."""

    def __init__(
        self, name: str, sparsity: float | None, bytes_: int, make: Callable[[], Call], x: Tensor, copies: int
    ):
        self.name, self.sparsity, self.bytes = name, sparsity, bytes_
        self.calls = [make() for _ in range(copies)]
        self.x = x
        self.times: list[float] = []

    def round(self) -> None:
        begin = time.perf_counter()
        for call in self.calls:
            call(self.x)
        self.times.append((time.perf_counter() - begin) / len(self.calls))


@cache
def packed_weight(shape: tuple[int, int], sparsity: float, values: str, group: int | None) -> PackedTensor:
    whole = sparsity == 0 and values.startswith("int")
    return pack(pruned(shape, sparsity), values, group, whole)


@cache
def pruned(shape: tuple[int, int], sparsity: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    W_OI = torch.randn(shape, generator=generator)
    W_OI[torch.rand(shape, generator=generator) < sparsity] = 0
    return W_OI


def variants(
    shape: tuple[int, int], columns: int, sparsities: list[float], keep: set[str] | None
) -> list[Variant]:
    wanted_bytes = cache_bytes() * (4 if columns == 1 else 1)
    x = torch.randn(columns, shape[1], generator=torch.Generator().manual_seed(2))
    x_bf16 = x.bfloat16()
    found: list[Variant] = []

    def add(
        name: str, sparsity: float | None, size: int, make: Callable[[], Call], activations: Tensor
    ) -> None:
        if keep is None or name in keep:
            copies = max(2, -(-wanted_bytes // size))
            found.append(Variant(name, sparsity, size, make, activations, copies))

    numel = shape[0] * shape[1]
    W_OI = pruned(shape, 0.0)
    W_bf16 = W_OI.bfloat16()

    def torch_linear(weight: Tensor) -> Callable[[], Call]:
        def make() -> Call:
            mine = weight.clone()
            return lambda x: torch.nn.functional.linear(x, mine)

        return make

    if columns <= dense_direct():
        add("dense bf16", None, 2 * numel, lambda: DenseLinear(W_bf16.clone()), x_bf16)
        add("dense f32", None, 4 * numel, lambda: DenseLinear(W_OI.clone()), x)
    add("torch bf16", None, 2 * numel, torch_linear(W_bf16), x_bf16)
    add("torch f32", None, 4 * numel, torch_linear(W_OI), x)
    for sparsity in sparsities:
        for name, (values, group) in PACKED.items():
            if keep is not None and name not in keep:
                continue
            rare = () if columns > 1 else RARE_SPARSITIES
            if sparsity not in FEW.get(name, sparsities if name in ("packed bf16", "packed int8") else rare):
                continue
            packed = packed_weight(shape, sparsity, values, group)

            def make(packed: PackedTensor = packed) -> Call:
                tensors = {key: tensor.clone() for key, tensor in packed.tensors.items()}
                return PackedLinear(PackedTensor(tensors, packed.shape, packed.values, packed.group))

            add(name, sparsity, packed.nbytes, make, x if values == "f32" else x_bf16)
        if columns <= 32 and sparsity >= 0.5 and (keep is None or "torch CSR f32" in keep):
            add("torch CSR f32", sparsity, *_csr(shape, sparsity, x))
    return found


@cache
def csr_weight(shape: tuple[int, int], sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR a beta
        csr = pruned(shape, sparsity).to_sparse_csr()
    return csr.crow_indices().int(), csr.col_indices().int(), csr.values()


def _csr(shape: tuple[int, int], sparsity: float, x: Tensor) -> tuple[int, Callable[[], Call], Tensor]:
    crow, col, values = csr_weight(shape, sparsity)

    def make() -> Call:
        parts = crow.clone(), col.clone(), values.clone()
        mine = torch.sparse_csr_tensor(*parts, shape, check_invariants=False)
        return lambda x: torch.mm(mine, x)

    return 4 * crow.numel() + 8 * values.numel(), make, x.T.contiguous()


def measure(
    shape: tuple[int, int],
    threads: int,
    columns: int,
    sparsities: list[float],
    rounds: int,
    keep: set[str] | None,
) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    streamed = torch.zeros(8 * cache_bytes() // 4)
    stream_times: list[float] = []
    chosen = variants(shape, columns, sparsities, keep)
    for warm in (True, False):
        for _ in range(1 if warm else rounds):
            begin = time.perf_counter()
            native.stream(streamed, threads)
            stream_times.append(time.perf_counter() - begin)
            for variant in chosen:
                variant.round()
        if warm:
            stream_times.clear()
            for variant in chosen:
                variant.times.clear()
    key = {"shape": list(shape), "threads": threads, "columns": columns}
    size = streamed.numel() * 4
    rows = [_row(key, "stream", None, size, stream_times)]
    return rows + [_row(key, v.name, v.sparsity, v.bytes, v.times) for v in chosen]


def _row(
    key: dict[str, Any], name: str, sparsity: float | None, size: int, times: list[float]
) -> dict[str, Any]:
    middle, quartiles = spread([1e6 * time for time in times], 2)
    return key | {
        "variant": name,
        "sparsity": sparsity,
        "bytes": size,
        "microseconds": middle,
        "quartiles": quartiles,
        "rounds": len(times),
        "gigabytes_per_second": round(size / middle / 1e3, 2),
    }


def print_case(rows: list[dict[str, Any]]) -> None:
    by_name = {row["variant"]: row for row in rows if row["sparsity"] is None}
    first = rows[0]
    limit = by_name["stream"]["gigabytes_per_second"]
    print(
        f"\n{first['shape'][0]}x{first['shape'][1]}  threads {first['threads']}  columns {first['columns']}  stream {limit} GB/s"
    )
    baseline, torch_bf16 = by_name.get("dense bf16"), by_name.get("torch bf16")
    for row in rows[1:]:
        line = f"  {row['variant']:16s} {'' if row['sparsity'] is None else format(row['sparsity'], '.0%'):>4s} {row['microseconds']:10.1f} us"
        for name, other in (("dense bf16", baseline), ("torch bf16", torch_bf16)):
            if other:
                line += f"   {other['microseconds'] / row['microseconds']:5.2f}x {name}"
        if first["columns"] == 1:
            line += f"   {row['gigabytes_per_second'] / limit:4.0%} of stream"
        print(line)


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to the file; a case measured again replaces what it measured before."""
    old = json.loads(path.read_text()) if path.exists() else {"measurements": []}

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return (*row["shape"], row["threads"], row["columns"], row["variant"], row["sparsity"])

    fresh = {identity(row) for row in rows}
    kept = [row for row in old["measurements"] if identity(row) not in fresh]
    measurements = sorted(
        kept + rows,
        key=lambda r: (
            *map(str, identity(r)[:2]),
            r["threads"],
            r["columns"],
            r["variant"],
            r["sparsity"] or 0,
        ),
    )
    keep(path, {"measurements": measurements}, last_level_cache=cache_bytes(), torch=torch.__version__)


def measured(path: Path | None) -> dict[tuple[Any, ...], set[float]]:
    """The sparsities that are in the results, by shape, threads and columns."""
    found: dict[tuple[Any, ...], set[float]] = {}
    for row in json.loads(path.read_text())["measurements"] if path and path.exists() else []:
        if row["variant"] == "packed bf16":
            found.setdefault((*row["shape"], row["threads"], row["columns"]), set()).add(row["sparsity"])
    return found


def rounds_for(columns: int, most: int) -> int:
    """A product with many columns takes long and varies little."""
    return most if columns <= 8 else max(3, most * 2 // 3) if columns <= 32 else max(3, most // 2)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--columns", default=",".join(map(str, COLUMNS)))
    parser.add_argument("--sparsities", help="default: 0-0.9 for one column, 0, 0.5, 0.7 and 0.8 for more")
    parser.add_argument("--variants", help="only these, comma separated")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--again", action="store_true", help="measure what is in the results, too")
    parser.add_argument(
        "--quick", action="store_true", help="two small shapes, 1, 16 and 64 columns, 3 rounds"
    )
    parser.add_argument("--results", type=Path, help="default: results/kernels.json; none with --quick")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.columns, options.rounds = "576x1536,130x70", "1,16,64", 3
        options.sparsities = "0.1,0.5,0.7"
    path = options.results or (None if options.quick else RESULTS / "kernels.json")
    keep = set(options.variants.split(",")) if options.variants else None
    begin = time.perf_counter()
    for text in options.shapes.split(","):
        out, columns_in = map(int, text.split("x"))
        for threads in map(int, options.threads.split(",")):
            for columns in map(int, options.columns.split(",")):
                default = SPARSITIES if columns == 1 else MANY_SPARSITIES
                sparsities = (
                    [float(s) for s in options.sparsities.split(",")] if options.sparsities else default
                )
                there = measured(path).get((out, columns_in, threads, columns), set())
                if set(sparsities) <= there and not (keep or options.again):
                    continue
                rounds = rounds_for(columns, options.rounds)
                rows = measure((out, columns_in), threads, columns, sparsities, rounds, keep)
                print_case(rows)
                print(f"  ({time.perf_counter() - begin:.0f} s so far)", flush=True)
                if path:
                    merge(path, rows)
        for kept in (packed_weight, pruned, csr_weight):  # gigabytes that the next shape does not need
            kept.cache_clear()


if __name__ == "__main__":
    main()
