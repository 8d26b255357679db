"""How fast whole models decode and prefill, and what they weigh: dense beside packed, at four sparsities.

    python benchmarks/decode.py                       # every shape, one process a group; resumable
    python benchmarks/decode.py --shape 7b --only 1   # a piece; results are merged
    python benchmarks/decode.py --quick               # every path of the script on a tiny shape: seconds, nothing kept

Shapes: `1.1b` (LLaMA-shaped, 22 blocks, 2048/5632, 32 heads over 4, vocabulary 32,000) and `7b` (32 blocks,
4096/11008, 32 heads), both of random weights pruned by magnitude, built block by block; `qwen3-moe`, made so too, two
blocks of a mixture with the widths and experts of Qwen3-30B-A3B and a vocabulary as much smaller; and `smollm2`, the
packaged real model, pruned here with OWL and Wanda. Every block and every expert of a random model has the bytes of its
own that it would have in a real one.

Variants: `transformers` (its own forward, cache and linears), `dense` (our decoder with our best dense kernel, the
honest baseline), and `packed` with bfloat16, int8 or float32 values, embedding and head dense unless the name says
otherwise. All variants of a group live in one process and take turns in every round, so that a change of clock or a
noisy neighbour falls on all of them. A 7B dense model leaves no room for others, so each sparsity of that shape is a
process of its own, with a dense model in it as the baseline whose blocks share the memory of four (`dense shared`): a
block is many times the cache, so it is read from memory all the same, and the dense group shows that both agree.
What memory streams is measured in every group too.

Speeds are medians over rounds, with quartiles. `resident_bytes` is what building and using the variant added to the
process, `file_bytes` the bytes of its tensors (for smollm2 packed by `tawny pack`: of its files).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import keep, parser_of, spread
from shapes import SHAPES as LLAMAS
from torch import Tensor, nn

import tawny
from tawny.decoding.decoder import Decoder
from tawny.decoding.swapped import kernels
from tawny.kernels import native
from tawny.kernels.native import kernel_name
from tawny.machine import cpu_name, resident_memory
from tawny.model.checkpoint import file_bytes
from tawny.model.linears import linears_of
from tawny.model.skeleton import build_skeleton
from tawny.model.structure import find_stack
from tawny.packed.choice import pack_end
from tawny.packed.experts import PackedExperts
from tawny.packed.format import PackedTensor, pack
from tawny.packed.install import install_experts
from tawny.packed.linear import PackedLinear

SPARSITIES = [0.5, 0.6, 0.7, 0.8]
SHARED = 4  # blocks of a `dense shared` model that have memory of their own
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {},
    "1.1b": LLAMAS["1.1b"].settings,
    "7b": LLAMAS["7b"].settings,
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 6336,  # 151,936 · 2 / 48
    },
}
TINY = {
    "num_hidden_layers": 6,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
TINY_EXPERTS = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 32,
}
# tokens of prompt, tokens decoded, rounds
EFFORT = {
    "smollm2": (128, 32, 7),
    "1.1b": (128, 12, 5),
    "7b": (128, 6, 3),
    "qwen3-moe": (128, 64, 5),
    "quick": (8, 3, 2),
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Cell:
    """One variant at one sparsity; `dtype` is the model's, `values` those of its packed linears, in groups of `group`."""

    variant: str
    sparsity: float | None = None
    dtype: str = "bf16"
    values: str | None = None
    head: str | None = None
    group: int | None = None


def cells_of(shape: str) -> list[list[Cell]]:
    """Groups of cells that share a process."""

    def packed(values: str, sparsity: float, head: str | None = None) -> Cell:
        name = f"packed {values}" + (f", {head} head" if head else "")
        return Cell(name, sparsity, "f32" if values == "f32" else "bf16", values, head)

    def plain(name: str, dtype: str = "bf16") -> Cell:
        return Cell(f"{name} {dtype}", None, dtype)

    if shape == "7b":
        return [[plain("transformers"), plain("dense"), plain("dense shared")]] + [
            [
                plain("dense shared"),
                packed("bf16", s),
                packed("int8", s),
                *(
                    [packed("int8", s, "int8")] if s > 0.5 else []
                ),  # at 50 % four of them need more than 24 GB
            ]
            for s in (0.7, 0.5, 0.6, 0.8)
        ]
    both = [packed(values, s) for s in SPARSITIES for values in ("bf16", "int8")]
    both += [packed("int8", s, "int8") for s in SPARSITIES]
    groups = [[plain("transformers"), plain("dense"), *both]]
    if shape == "1.1b":
        floats = [packed("f32", s) for s in SPARSITIES]
        groups.append([plain("transformers", "f32"), plain("dense", "f32"), *floats])
    return groups


# --- models ------------------------------------------------------------------------------------------------------


def magnitude_pruned(shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    """Normal weights without the smallest: those below the quantile of |x| of a normal variable."""
    W_OI = torch.randn(shape, generator=generator)
    if sparsity:
        W_OI[W_OI.abs() < math.sqrt(2) * float(torch.erfinv(torch.tensor(sparsity)))] = 0
    return W_OI.mul_(0.7 / math.sqrt(shape[1] * (1 - sparsity)))


def copied(packed: PackedTensor) -> PackedTensor:
    tensors = {key: tensor.clone() for key, tensor in packed.tensors.items()}
    return PackedTensor(tensors, packed.shape, packed.values, packed.group)


def random_model(settings: dict[str, Any], cell: Cell) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dtype = DTYPES[cell.dtype]
    keys = {"max_position_embeddings": 2048, "tie_word_embeddings": False, **settings}
    model: Any = build_skeleton(CONFIG_MAPPING[keys.pop("model_type", "llama")](**keys), dtype)
    generator = torch.Generator().manual_seed(0)
    blocks = find_stack(model)[1]
    own = SHARED if "shared" in cell.variant else len(blocks)
    linears = linears_of(blocks[0], "")
    for linear in linears:
        if linear.expert:
            continue  # made with the first of its parameter
        key = linear.key.removeprefix(".")
        name, _, leaf = key.rpartition(".")
        W_OI = magnitude_pruned(linear.shape, cell.sparsity or 0.0, generator)
        count = 0 if linear.expert is None else sum(x.key == linear.key for x in linears)
        if cell.values:
            packed = pack(W_OI, cell.values, cell.group, whole=not cell.sparsity)  # type: ignore[arg-type]
            for block in blocks:
                if count:
                    each = [copied(packed) for _ in range(count)]
                    install_experts(block, key, PackedExperts(each, linear.transposed, dtype))
                else:
                    block.set_submodule(name, PackedLinear(copied(packed)))
        else:
            W_OI = (W_OI.T if linear.transposed else W_OI).to(dtype)
            for index, block in enumerate(blocks):
                weight = W_OI.expand(count, *W_OI.shape).contiguous() if count else W_OI.clone()
                if index >= own:
                    weight = getattr(blocks[index % own].get_submodule(name), leaf)
                setattr(block.get_submodule(name), leaf, nn.Parameter(weight, requires_grad=False))
    for path, parameter in model.named_parameters():
        if parameter.is_meta:  # embedding, norms, head
            owner, _, leaf = path.rpartition(".")
            made = torch.ones(parameter.shape, dtype=dtype)
            if parameter.dim() == 2:
                made = magnitude_pruned(tuple(parameter.shape), 0.0, generator).to(dtype)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(made, requires_grad=False))
    if cell.head:
        model.set_submodule(
            "lm_head",
            PackedLinear(pack_end(model.lm_head.weight.data, cell.head, "lm_head")),
        )
    return model


def real_folder(cell: Cell, folder: Path) -> Path:
    """The packaged model as files, dense or pruned and packed; made where it is not there yet."""
    from tawny.model.source import resolve

    if cell.sparsity is None:
        return resolve("smollm2")
    pruned = folder / f"pruned-{cell.sparsity}"
    if not pruned.exists():
        tawny.prune(
            "smollm2",
            pruned,
            sparsity=cell.sparsity,
            allocator="owl",
            solver="wanda",
            **{"calibration.text": "wiki", "calibration.samples": 16, "calibration.seqlen": 512},
        )
    packed = folder / f"packed-{cell.sparsity}-{cell.values}-{cell.head}"
    if not packed.exists():
        tawny.pack(pruned, packed, values=cell.values, head=cell.head)
    return packed


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors a file would hold, one that is used twice counted once unless blocks share it."""
    return sum(
        t.nbytes for t in (*model.parameters(), *(b for n, b in model.named_buffers() if "inv_freq" not in n))
    )


# --- measuring ---------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    cell: Cell
    model: Any
    file_bytes: int
    resident_bytes: int = 0
    path: str = "model"
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def round(self, prompt: Tensor, tokens: int, prefill: bool) -> None:
        from transformers import DynamicCache

        theirs = self.cell.variant.startswith("transformers")
        with torch.inference_mode(), contextlib.nullcontext() if theirs else kernels(self.model):
            decoder = Decoder(self.model, len(prompt) + tokens + 1, quick=False if theirs else None)
            if theirs:
                decoder.cache.layers = DynamicCache(config=self.model.config).layers
            begin = time.perf_counter()
            token = int(decoder.prefill(prompt if prefill else prompt[:16]).argmax())
            filled = time.perf_counter()
            token = int(decoder.step(token).argmax())  # the quick path is decided here
            start = time.perf_counter()
            for _ in range(tokens):
                token = int(decoder.step(token).argmax())
            end = time.perf_counter()
        if prefill:
            self.prefill.append(len(prompt) / (filled - begin))
        self.decode.append(tokens / (end - start))
        self.path = decoder.path

    def row(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "variant": self.cell.variant,
            "sparsity": self.cell.sparsity,
            "resident_bytes": self.resident_bytes,
            "file_bytes": self.file_bytes,
            "path": self.path,
            "rounds": len(self.decode),
        }
        for name, values in (("decode", self.decode), ("prefill", self.prefill)):
            if values:
                made[f"{name}_tokens_per_second"], made[f"{name}_quartiles"] = spread(values)
        return made


def build(shape: str, settings: dict[str, int], cell: Cell, folder: Path) -> Variant:
    source = real_folder(cell, folder) if shape == "smollm2" else None
    before = resident_memory()
    if source is not None:
        model, size = tawny.load(source).eval(), file_bytes(source)
    else:
        model = random_model(settings, cell)
        size = tensor_bytes(model)
    gc.collect()
    return Variant(cell, model, size, resident_memory() - before)


def measure(shape: str, number: int, threads: int, quick: bool, folder: Path) -> list[dict[str, Any]]:
    """All cells of one group, in turns."""
    torch.set_num_threads(threads)
    settings = (TINY | (TINY_EXPERTS if "model_type" in SHAPES[shape] else {})) if quick else SHAPES[shape]
    prompt_tokens, tokens, rounds = EFFORT["quick" if quick else shape]
    group = cells_of(shape)[number]
    # What the first model of a process imports and sets up is not that model's memory.
    build("quick", TINY, Cell("dense bf16"), folder).round(torch.arange(3, 20), 2, True)
    variants: list[Variant] = []
    for cell in group:
        twin = next((v for v in variants if v.cell.variant == f"transformers {cell.dtype}"), None)
        if cell.variant == f"dense {cell.dtype}" and twin:  # the same weights, decoded in another way
            variants.append(Variant(cell, twin.model, twin.file_bytes))
            continue
        begin = time.perf_counter()
        variants.append(build(shape, settings, cell, folder))
        print(
            f"  {cell.variant} {cell.sparsity or ''} built in {time.perf_counter() - begin:.1f} s, "
            f"{variants[-1].resident_bytes / 1e9:.2f} GB resident",
            file=sys.stderr,
            flush=True,
        )
    vocabulary = int(variants[0].model.config.vocab_size)
    prompt = torch.randint(3, vocabulary, (prompt_tokens,), generator=torch.Generator().manual_seed(1))
    streamed = torch.zeros((8 if quick else 256) << 18)
    speeds: list[float] = []
    for number_of_round in range(rounds + 1):
        warm = number_of_round == 0
        for variant in variants:
            before = resident_memory()
            with_prefill = not warm and "shared" not in variant.cell.variant
            variant.round(prompt, min(tokens, 2) if warm else tokens, with_prefill)
            if warm:
                variant.prefill.clear()
                variant.decode.clear()
                variant.resident_bytes += max(0, resident_memory() - before)
            if native.chosen():
                begin = time.perf_counter()
                native.stream(streamed, threads)
                speeds.append(streamed.nbytes / (time.perf_counter() - begin) / 1e9)
    # Two ways to decode the same weights: whoever came first brought them into memory, for both.
    totals: dict[int, int] = {}
    for variant in variants:
        totals[id(variant.model)] = totals.get(id(variant.model), 0) + variant.resident_bytes
    for variant in variants:
        variant.resident_bytes = totals[id(variant.model)]
    common = {
        "shape": shape,
        "threads": threads,
        "group": number,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "cpu": cpu_name(),
        "stream_gigabytes_per_second": round(statistics.median(speeds), 2) if speeds else None,
    }
    return [common | variant.row() for variant in variants]


# --- the file ----------------------------------------------------------------------------------------------------


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["threads"], row["group"], row["variant"], row["sparsity"]


def read(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["measurements"]) if path.exists() else []


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    fresh = {identity(row) for row in rows}
    kept = [row for row in read(path) if identity(row) not in fresh] + rows
    kept.sort(key=lambda r: (list(SHAPES).index(r["shape"]), r["threads"], r["group"]))
    keep(path, {"kernel": kernel_name(), "measurements": kept})


def show(rows: list[dict[str, Any]]) -> None:
    """Every variant beside the dense baseline of its own group."""
    first = rows[0]
    print(
        f"\n{first['shape']}  threads {first['threads']}  stream {first['stream_gigabytes_per_second']} GB/s"
    )
    base = next((r for r in rows if r["variant"].startswith("dense")), None)
    for row in rows:
        speed = row["decode_tokens_per_second"]
        ratio = f"{speed / base['decode_tokens_per_second']:5.2f}x dense" if base else ""
        prefill = row.get("prefill_tokens_per_second")
        print(
            f"  {row['variant']:24s} {'' if row['sparsity'] is None else format(row['sparsity'], '.0%'):>4s}"
            f"  decode {speed:8.2f}/s {ratio}  prefill {prefill or 0:8.1f}/s"
            f"  resident {row['resident_bytes'] / 1e9:6.2f} GB  file {row['file_bytes'] / 1e9:6.2f} GB  {row['path']}"
        )
    sys.stdout.flush()


def main() -> None:
    parser = parser_of(__doc__, "decode.json")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="repeatable; default: all")
    parser.add_argument("--threads", default=str(os.cpu_count() or 1), help="comma separated")
    parser.add_argument("--only", type=int, help="stop after so many new groups")
    parser.add_argument("--again", action="store_true", help="measure what is in the results, too")
    parser.add_argument("--quick", action="store_true", help="a tiny shape in place of each; nothing is kept")
    parser.add_argument("--folder", type=Path, help="where pruned and packed smollm2 are kept between runs")
    parser.add_argument("--group", help=argparse.SUPPRESS)  # a child: shape,number,threads
    options = parser.parse_args()
    if options.group:
        shape, number, threads = options.group.split(",")
        print(json.dumps(measure(shape, int(number), int(threads), options.quick, options.folder)))
        return
    shapes = options.shape or (["1.1b", "7b", "qwen3-moe"] if options.quick else list(SHAPES))
    made = 0
    with tempfile.TemporaryDirectory(prefix="tawny-decode-") as temporary:
        for shape in shapes:
            for threads in map(int, options.threads.split(",")):
                for number, group in enumerate(cells_of(shape)):
                    done = {identity(row) for row in read(options.results)} if not options.quick else set()
                    wanted = {(shape, threads, number, cell.variant, cell.sparsity) for cell in group}
                    if wanted <= done and not options.again:
                        continue
                    if options.only is not None and made >= options.only:
                        return
                    made += 1
                    begin = time.perf_counter()
                    if shape == "smollm2":  # here, so that no measured process has pruned anything
                        for cell in group:
                            real_folder(cell, Path(options.folder or temporary))
                    child = [
                        sys.executable,
                        str(Path(__file__).resolve()),
                        "--group",
                        f"{shape},{number},{threads}",
                        "--folder",
                        str(options.folder or temporary),
                        *(["--quick"] if options.quick else []),
                    ]
                    finished = subprocess.run(child, stdout=subprocess.PIPE, text=True)
                    if finished.returncode:
                        # One group that fails (too little memory, say) must not cost the others.
                        print(f"{shape} group {number} failed with exit code {finished.returncode}")
                        continue
                    rows = json.loads(finished.stdout.splitlines()[-1])
                    show(rows)
                    print(f"  ({time.perf_counter() - begin:.0f} s)", flush=True)
                    if not options.quick:
                        merge(options.results, rows)


if __name__ == "__main__":
    main()
