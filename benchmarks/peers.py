"""What a user would run instead: llama.cpp with quantised weights, and DeepSparse with sparse ones, on the same shapes.

    python benchmarks/peers.py                      # both peers; results are merged into results/peers.json
    python benchmarks/peers.py --peer llama.cpp --shape 1.1b
    python benchmarks/peers.py --quick              # tiny shapes, nothing kept

Each peer lives in an environment of its own (`--environments`, made on the first run) and is never a dependency. One
that cannot be installed or run leaves the exact error in the results instead of numbers.

llama.cpp (through llama-cpp-python) decodes a whole model of random weights in Q8_0 and Q4_0, written here as GGUF; it
has no sparse weights. DeepSparse 1.8.0 (the last there is, float32) runs a graph of the linears of some blocks at batch
1, without attention and head, and torch, our dense and our packed float32 linears run the same chain beside it. Speeds
are medians over rounds, with quartiles, one peer after another in processes of their own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "peers.json"
SHAPES = {
    "1.1b": {"blocks": 22, "hidden": 2048, "inner": 5632, "heads": 32, "kv": 4, "vocabulary": 32000},
    "7b": {"blocks": 32, "hidden": 4096, "inner": 11008, "heads": 32, "kv": 32, "vocabulary": 32000},
    "quick": {"blocks": 2, "hidden": 256, "inner": 512, "heads": 4, "kv": 2, "vocabulary": 512},
}
PACKAGES = {"llama.cpp": "llama-cpp-python", "deepsparse": "deepsparse==1.8.0"}
IMPORTS = {"llama.cpp": "llama_cpp", "deepsparse": "deepsparse"}
CHAINED = 4  # blocks of the DeepSparse graph: many times the cache, and under the 2 GB of an ONNX file
SPARSITIES = [0.0, 0.5, 0.7, 0.8]
MINUTES = 20  # for one installation
# Bytes of 256 weights, and where among them the float16 scales lie.
K_QUANTS = {"Q3_K": (110, (108,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}


def spread(values: list[float]) -> tuple[float, list[float]]:
    if len(values) < 2:
        return values[0], [values[0]] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), [low, high]


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def mixture(kind: str, name: str, block: int, blocks: int) -> str:
    """The type that llama.cpp gives a tensor of a model quantised to `kind`."""
    more = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    if kind == "Q8_0":
        return kind
    if name == "output":
        return "Q6_K"
    if kind == "Q4_0":
        return kind
    if kind == "Q4_K_M":
        return "Q6_K" if more and name in ("attn_v", "ffn_down") else "Q4_K"
    if name == "attn_v":
        return "Q5_K" if block < 2 else "Q4_K"
    if name == "ffn_down":
        return "Q5_K" if block < blocks // 16 else "Q4_K" if more else "Q3_K"
    return "Q4_K" if name == "attn_output" else "Q3_K"


def write_gguf(path: Path, shape: dict[str, int], kind: str) -> None:
    """A LLaMA of random weights: each matrix made once for all blocks. K-quants are random bytes with small scales."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(shape["blocks"])
    writer.add_feed_forward_length(shape["inner"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv"])
    writer.add_rope_dimension_count(shape["hidden"] // shape["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocabulary"])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [f"▁w{i}" for i in range(shape["vocabulary"] - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)
    made: dict[tuple[str, int, int], Any] = {}

    def add(name: str, own: str, rows: int, cols: int) -> None:
        kept = made.get((own, rows, cols))
        if kept is None:
            if own in K_QUANTS:
                size, scales = K_QUANTS[own]
                kept = generator.integers(0, 256, (rows, cols // 256, size), dtype=np.uint8)
                for at in scales:
                    kept[..., at : at + 2] = np.frombuffer(np.float16(1e-4).tobytes(), dtype=np.uint8)
                kept = kept.reshape(rows, -1)
            else:
                values = generator.standard_normal((rows, cols), dtype=np.float32) * cols**-0.5
                kept = gguf.quants.quantize(values, gguf.GGMLQuantizationType[own])
            made[own, rows, cols] = kept
        writer.add_tensor(f"{name}.weight", kept, raw_dtype=gguf.GGMLQuantizationType[own])

    hidden, inner, keys = shape["hidden"], shape["inner"], shape["hidden"] // shape["heads"] * shape["kv"]
    sizes = {
        "attn_q": (hidden, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    ones = np.ones(hidden, dtype=np.float32)
    add("token_embd", mixture(kind, "attn_q", 0, shape["blocks"]), shape["vocabulary"], hidden)
    add("output", mixture(kind, "output", 0, shape["blocks"]), shape["vocabulary"], hidden)
    writer.add_tensor("output_norm.weight", ones)
    for block in range(shape["blocks"]):
        for name, (rows, cols) in sizes.items():
            add(f"blk.{block}.{name}", mixture(kind, name, block, shape["blocks"]), rows, cols)
        writer.add_tensor(f"blk.{block}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{block}.ffn_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_worker(path: str, threads: int, prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = [300 + i % 200 for i in range(prompt)]
    prefill, decode = [], []
    for number in range(rounds + 1):
        model.reset()
        begin = time.perf_counter()
        model.eval(ids)
        filled = time.perf_counter()
        for i in range(tokens):
            model.eval([300 + i])
        end = time.perf_counter()
        if number:
            prefill.append(prompt / (filled - begin))
            decode.append(tokens / (end - filled))
    made: dict[str, Any] = {"version": llama_cpp.__version__}
    for name, values in (("decode", decode), ("prefill", prefill)):
        made[f"{name}_tokens_per_second"], made[f"{name}_quartiles"] = spread(values)
    return made


# --- DeepSparse, and the same chain here -------------------------------------------------------------------------------


def chain_weights(shape: dict[str, int], sparsity: float) -> list[tuple[str, Any]]:
    """Name and weight `[out, in]` of one block's linears, normal, the smallest gone."""
    import numpy as np

    generator = np.random.default_rng(0)
    hidden, inner, keys = shape["hidden"], shape["inner"], shape["hidden"] // shape["heads"] * shape["kv"]
    sizes = {
        "q": (hidden, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, hidden),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    made = []
    for name, (rows, cols) in sizes.items():
        values = generator.standard_normal((rows, cols), dtype=np.float32)
        if sparsity:
            magnitude = np.abs(values)
            values[magnitude < np.quantile(magnitude.ravel()[: 1 << 20], sparsity)] = 0
        made.append((name, values * np.float32(0.7 / math.sqrt(cols * (1 - sparsity)))))
    return made


def deepsparse_worker(shape: str, threads: int, rounds: int, sparsity: float) -> dict[str, Any]:
    import deepsparse
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    settings = SHAPES[shape]
    nodes, weights, outputs = [], [], []
    state = "x"
    for block in range(CHAINED):
        named = {name: f"{name}{block}" for name, _ in chain_weights(SHAPES["quick"], 0.0)}
        for name, values in chain_weights(settings, sparsity):
            weights.append(numpy_helper.from_array(np.ascontiguousarray(values.T), f"w_{named[name]}"))
        put = lambda kind, inputs, output: nodes.append(helper.make_node(kind, inputs, [output]))  # noqa: E731
        for name in ("q", "k", "v"):
            put("MatMul", [state, f"w_{named[name]}"], named[name])
        outputs += [named["k"], named["v"]]  # where a cache would take them
        put("MatMul", [named["q"], f"w_{named['o']}"], named["o"])
        put("Add", [state, named["o"]], f"mid{block}")
        for name in ("gate", "up"):
            put("MatMul", [f"mid{block}", f"w_{named[name]}"], named[name])
        put("Sigmoid", [named["gate"]], f"sigmoid{block}")
        put("Mul", [named["gate"], f"sigmoid{block}"], f"swish{block}")
        put("Mul", [f"swish{block}", named["up"]], f"gated{block}")
        put("MatMul", [f"gated{block}", f"w_{named['down']}"], named["down"])
        put("Add", [f"mid{block}", named["down"]], f"out{block}")
        state = f"out{block}"
    hidden, keys = settings["hidden"], settings["hidden"] // settings["heads"] * settings["kv"]
    value = lambda name, size: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])  # noqa: E731
    graph = helper.make_graph(
        nodes,
        "blocks",
        [value("x", hidden)],
        [value(state, hidden), *(value(name, keys) for name in outputs)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/blocks.onnx"
        onnx.save(model, path)
        del model, graph, weights
        engine = deepsparse.Engine(model=path, batch_size=1, num_cores=threads)
        x = [np.random.default_rng(1).standard_normal((1, hidden), dtype=np.float32)]
        times = []
        for _ in range(rounds + 2):
            begin = time.perf_counter()
            engine.run(x)
            times.append((time.perf_counter() - begin) * 1e3)
    middle, between = spread(times[2:])
    return {"version": deepsparse.__version__, "milliseconds": middle, "quartiles": between}


def chain_worker(shape: str, threads: int, rounds: int, sparsity: float) -> dict[str, Any]:
    """The same chain with torch, our dense and our packed float32 linears, in turns."""
    import torch

    from tawny.kernels.native import kernel_name
    from tawny.packed.format import PackedTensor, pack
    from tawny.packed.linear import DenseLinear, PackedLinear

    torch.set_num_threads(threads)
    made = [
        (name, torch.from_numpy(values).contiguous())
        for name, values in chain_weights(SHAPES[shape], sparsity)
    ]

    def packed(weight: Any) -> Any:
        found = pack(weight, "f32")
        return lambda: PackedLinear(
            PackedTensor({k: t.clone() for k, t in found.tensors.items()}, found.shape, "f32")
        )

    def torchs(weight: Any) -> Any:
        mine = weight.clone()
        return lambda x: torch.nn.functional.linear(x, mine)

    kinds: dict[str, list[dict[str, Any]]] = {}
    makers = {name: packed(weight) for name, weight in made}
    kinds["torch f32"] = [{name: torchs(w) for name, w in made} for _ in range(CHAINED)]
    kinds["dense f32"] = [{name: DenseLinear(w.clone()) for name, w in made} for _ in range(CHAINED)]
    kinds["packed f32"] = [{name: makers[name]() for name, _ in made} for _ in range(CHAINED)]

    def run(blocks: list[dict[str, Any]], x: Any) -> Any:
        for block in blocks:
            block["k"](x), block["v"](x)
            x = x + block["o"](block["q"](x))
            x = x + block["down"](torch.nn.functional.silu(block["gate"](x)) * block["up"](x))
        return x

    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    x = torch.randn(1, SHAPES[shape]["hidden"], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for number in range(rounds + 2):
            for kind, blocks in kinds.items():
                begin = time.perf_counter()
                run(blocks, x)
                if number >= 2:
                    times[kind].append((time.perf_counter() - begin) * 1e3)
    return {"version": f"torch {torch.__version__}, {kernel_name()}"} | {
        kind: dict(zip(("milliseconds", "quartiles"), spread(values), strict=True))
        for kind, values in times.items()
    }


# --- environments ------------------------------------------------------------------------------------------------------


def tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def environment(peer: str, folder: Path) -> Path:
    """The interpreter of the peer's environment, made if it is not there. Raises RuntimeError with what went wrong."""
    python = folder / peer / "bin" / "python"
    check = [str(python), "-c", f"import {IMPORTS[peer]}"]
    if python.exists() and subprocess.run(check, capture_output=True).returncode == 0:
        return python
    print(f"{peer}: installing {PACKAGES[peer]} into {python.parent.parent}", file=sys.stderr)
    base = os.environ.get("PEER_PYTHON", sys.executable)
    # One job: a compiler on every core would take the machine from whoever else measures on it.
    jobs = {"CMAKE_BUILD_PARALLEL_LEVEL": "1", "MAKEFLAGS": "-j1"}
    nice = ["nice", "-n", "19"]
    for command in (
        [base, "-m", "venv", str(python.parent.parent)],
        [*nice, str(python), "-m", "pip", "install", "--disable-pip-version-check", PACKAGES[peer]],
        check,
    ):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | jobs, timeout=60 * MINUTES
            )
        except (subprocess.TimeoutExpired, OSError) as error:
            raise RuntimeError(f"{' '.join(command)}: {error}") from None
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: exit code {done.returncode}\n{tail(done.stdout + done.stderr)}"
            )
    return python


def work(python: Path | str, *arguments: object) -> dict[str, Any]:
    """Run one worker of this file under an interpreter; its last line is the result."""
    command = [str(python), str(Path(__file__).resolve()), "--worker", *map(str, arguments)]
    quiet = {"NM_DISABLE_ANALYTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n{tail(done.stdout + done.stderr)}")
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


WORKERS = {"llama.cpp": llama_worker, "deepsparse": deepsparse_worker, "chain": chain_worker}


def run_worker(name: str, *arguments: str) -> None:
    values: list[Any] = []
    for text in arguments:
        try:
            values.append(json.loads(text))
        except json.JSONDecodeError:
            values.append(text)
    print(json.dumps(WORKERS[name](*values)))


# --- the run -----------------------------------------------------------------------------------------------------------


def measure_llama(python: Path, shapes: list[str], threads: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in shapes:
        for kind in ("Q8_0", "Q4_0"):
            with tempfile.TemporaryDirectory(prefix="tawny-peers-") as folder:
                path = Path(folder) / "model.gguf"
                write_gguf(path, SHAPES["quick" if quick else shape], kind)
                made = work(python, "llama.cpp", path, threads, *((8, 4, 2) if quick else (128, 16, 5)))
                rows.append(
                    {"peer": "llama.cpp", "shape": shape, "threads": threads, "kind": kind}
                    | {"file_bytes": path.stat().st_size}
                    | made
                )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_deepsparse(python: Path, shapes: list[str], threads: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    shape = "quick" if quick else "1.1b"
    for sparsity in SPARSITIES:
        arguments = (json.dumps(shape), threads, 3 if quick else 21, sparsity)
        common = {"shape": shape, "threads": threads, "sparsity": sparsity, "blocks": CHAINED}
        rows.append({"peer": "deepsparse", "kind": "f32"} | common | work(python, "deepsparse", *arguments))
        print(json.dumps(rows[-1]), flush=True)
        ours = work(sys.executable, "chain", *arguments)
        for kind in ("torch f32", "dense f32", "packed f32"):
            rows.append({"peer": "here", "kind": kind} | common | {"version": ours["version"]} | ours[kind])
            print(json.dumps(rows[-1]), flush=True)
    return rows


MEASURES = {"llama.cpp": measure_llama, "deepsparse": measure_deepsparse}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return run_worker(*sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", action="append", choices=list(MEASURES), help="repeatable; default: both")
    parser.add_argument(
        "--shape", action="append", choices=["1.1b", "7b"], help="for llama.cpp; default: both"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "tawny" / "peers")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; nothing is kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    from tawny.machine import machine, versions

    result = {"measurements": [], "errors": []}
    if options.results.exists() and not options.quick:
        result = json.loads(options.results.read_text())
    for peer in options.peer or list(MEASURES):
        try:
            python = environment(peer, options.environments)
            rows = MEASURES[peer](python, options.shape or ["1.1b", "7b"], options.threads, options.quick)
        except RuntimeError as error:
            print(f"{peer}: {error}", file=sys.stderr)
            rows = []
            result["errors"] = [e for e in result["errors"] if e["peer"] != peer]
            result["errors"].append({"peer": peer, "package": PACKAGES[peer], "error": str(error)})
        else:
            result["errors"] = [e for e in result["errors"] if e["peer"] != peer]
        if options.quick:
            continue
        fresh = {(row["peer"], row.get("shape")) for row in rows}
        kept = [r for r in result["measurements"] if (r["peer"], r.get("shape")) not in fresh]
        result["measurements"] = kept + rows
        result |= {
            "machine": machine(),
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        }
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
