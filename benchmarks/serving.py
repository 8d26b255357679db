"""How fast a served model is: tokens a second for 1 to 16 requests, time to first token, memory.

    python benchmarks/serving.py                     # both shapes, all variants
    python benchmarks/serving.py --shape smollm2 --rounds 3
    python benchmarks/serving.py --shape 1.1b --llama BUILD/bin/llama-server
    python benchmarks/serving.py --quick             # every path on a tiny shape: nothing kept

Each variant is a server in a process of its own, asked over HTTP from this one. All are open at once and take turns in every
round, so that a noisy neighbour falls on all of them. `served` is what all requests receive together while every one of
them is between its first and its last token. `bare` is the same number of sequences in the same process without HTTP,
scheduler, sampler and text. llama.cpp's own server (`--llama`) serves the 1.1b shape in its types and has the same client.

Time to first token is that of a prompt of `--prompt` tokens, new to the server (`cold`) and then once more (`cached`).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from decode import SHAPES, TINY, Cell, random_model, real_folder
from harness import keep, measured, parser_of, spread
from turns import Child

CELLS = {
    "dense bf16": Cell("dense bf16"),
    "packed bf16": Cell("packed bf16", 0.7, values="bf16"),
    "packed int8": Cell("packed int8", 0.7, values="int8"),
    "int4": Cell("int4", 0.0, values="int4", head="int8", group=32),
    "int3": Cell("int3", 0.0, values="int3", head="int8", group=64),
}
RANDOM = ("int4", "int3")  # only shapes of random weights
PEERS = ("Q8_0", "Q4_0", "Q3_K_M")
COUNTS = (1, 2, 4, 8, 16)
CONTEXT = 3072
SHORT = 16  # tokens of the other prompts


# --- the server's process ----------------------------------------------------------------------------------------------


def word_tokenizer(count: int) -> Any:
    """One that gives every token of a random model a word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")


def serve(shape: str, variant: str, folder: Path, threads: int) -> None:
    """Serve until stdin ends; a number N on a line asks for the speed of N bare sequences, another line for memory."""
    import tawny
    from tawny.machine import resident_memory
    from tawny.model.source import load_tokenizer

    torch.set_num_threads(threads)
    before = resident_memory()
    if shape == "smollm2":
        source = real_folder(CELLS[variant], folder)
        model, tokenizer = tawny.load(source), load_tokenizer(source)
    else:
        settings = TINY if shape == "quick" else SHAPES[shape]
        model, tokenizer = random_model(settings, CELLS[variant]), word_tokenizer(settings["vocab_size"])
    model.generation_config.eos_token_id = model.config.eos_token_id = (
        None  # every text is as long as asked for
    )
    tokenizer.eos_token = None
    with tawny.serve(
        model, tokenizer=tokenizer, name="model", max_sequences=max(COUNTS), context=CONTEXT, threads=threads
    ) as server:
        print(json.dumps({"address": server.address.removeprefix("http://")}), flush=True)
        bare = Bare(model)
        for line in sys.stdin:
            made = bare.speed(*map(int, line.split())) if line.strip() else resident_memory() - before
            print(json.dumps(made), flush=True)


class Bare:
    """Our decoder without a server around it."""

    def __init__(self, model: Any) -> None:
        self.model, self.sequences = model, None

    def speed(self, count: int, tokens: int) -> float:
        """Tokens a second of so many sequences together."""
        from tawny.decoding import opening
        from tawny.decoding.sequences import Sequences

        with opening.ready(self.model) as lock, lock, torch.inference_mode():
            if self.sequences is None:
                self.sequences = Sequences(self.model, CONTEXT, max(COUNTS))
            held = {}
            for number in range(count):
                one = self.sequences.begin(torch.arange(SHORT) + number)
                logits = self.sequences.read(one, SHORT)
                assert logits is not None
                held[one] = int(logits.argmax())
            begin = time.perf_counter()
            for _ in range(tokens):
                held = {one: int(logits.argmax()) for one, logits in self.sequences.step(held).items()}
            seconds = time.perf_counter() - begin
            for one in held:
                self.sequences.end(one)
        return count * tokens / seconds


class Peer:
    """llama.cpp's server of a file."""

    def __init__(self, program: Path, file: Path, threads: int) -> None:
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        slots = ("-np", max(COUNTS), "-c", CONTEXT * max(COUNTS))
        command = [program, "-m", file, "--port", port, "-t", threads, "-ngl", 0, "--ignore-eos", *slots]
        self.process = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while self.status() != 200:
            if self.process.poll() is not None:
                raise RuntimeError(f"{program} ended with exit code {self.process.returncode}")
            time.sleep(0.2)

    def status(self) -> int:
        """What the server says of its health; 0 before it listens."""
        connection = http.client.HTTPConnection(self.address, timeout=10)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/health")
            except OSError:
                return 0
            return connection.getresponse().status

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


# --- the client ----------------------------------------------------------------------------------------------------------


def stream(address: str, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
    """When a request was sent, and when each of its chunks came."""
    connection = http.client.HTTPConnection(address, timeout=600)
    body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    begin, times = time.perf_counter(), []
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    for line in answer:
        if line.startswith(b"data: {") and b'"finish_reason":null' in line:
            times.append(time.perf_counter())
    connection.close()
    return begin, times


def served(address: str, count: int, tokens: int, words: int, chance: random.Random) -> float:
    """Tokens a second that so many requests receive together, while all of them are being answered."""
    found: list[list[float]] = [[] for _ in range(count)]

    def ask(number: int) -> None:
        found[number] = stream(address, prompts[number], tokens)[1]

    prompts = [[chance.randrange(words) for _ in range(SHORT)] for _ in range(count)]
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin, end = max(times[0] for times in found), min(times[-1] for times in found)
    return sum(begin < at <= end for times in found for at in times) / (end - begin)


def first_tokens(address: str, length: int, words: int, chance: random.Random) -> tuple[float, float]:
    """Seconds to the first token of a new prompt, and of the same prompt again."""
    prompt = [chance.randrange(words) for _ in range(length)]
    cold, cached = (stream(address, prompt, 2) for _ in range(2))
    return cold[1][0] - cold[0], cached[1][0] - cached[0]


# --- the run -----------------------------------------------------------------------------------------------------------------


def measure(shape: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    words = {"smollm2": 49152, "quick": TINY["vocab_size"]}.get(shape) or SHAPES[shape]["vocab_size"]
    chance = random.Random(0)
    with contextlib.ExitStack() as stack:
        children = {}
        addresses = {}
        for variant in options.variant or CELLS:
            if shape == "smollm2" and variant in RANDOM:
                continue
            child = Child(sys.executable, __file__, "--child", shape, variant, folder, options.threads)
            children[variant] = stack.enter_context(contextlib.closing(child))
            addresses[variant] = child.first["address"]
        if options.llama and shape == "1.1b":
            from shapes import SHAPES as LLAMAS
            from shapes import write_gguf

            for kind in PEERS:
                path = folder / f"{shape}-{kind}.gguf"
                if not path.exists():
                    write_gguf(path, LLAMAS[shape], kind)
                peer = stack.enter_context(contextlib.closing(Peer(options.llama, path, options.threads)))
                addresses[f"llama.cpp {kind}"] = peer.address
        rows: dict[tuple[str, int], dict[str, list[float]]] = {
            (name, count): {"served": [], "bare": []} for name in addresses for count in options.count
        }
        firsts: dict[str, list[tuple[float, float]]] = {name: [] for name in addresses}
        for number in range(options.rounds + 1):  # the first warms up
            for count in options.count:
                for name, address in addresses.items():
                    row = rows[name, count]
                    row["served"].append(served(address, count, options.tokens, words, chance))
                    if name in children:
                        row["bare"].append(children[name].ask(f"{count} {options.tokens}"))
            for name, address in addresses.items():
                firsts[name].append(first_tokens(address, options.prompt, words, chance))
            print(f"{shape}: round {number} of {options.rounds}", file=sys.stderr, flush=True)
        memory = {name: child.ask("") for name, child in children.items()}
    names = ("threads", "rounds", "tokens", "prompt")
    common = {"shape": shape} | {name: getattr(options, name) for name in names}
    made_rows = []
    for (name, count), row in rows.items():
        found: dict[str, Any] = common | {"variant": name, "requests": count}
        for key, values in row.items():
            if values:
                found[f"{key}_tokens_per_second"], found[f"{key}_quartiles"] = spread(values[1:])
        if count == min(options.count):
            for key, seconds in zip(("cold", "cached"), zip(*firsts[name][1:], strict=True), strict=True):
                middle, quartiles = spread(seconds, 4)
                found |= {f"first_token_{key}_seconds": middle, f"first_token_{key}_quartiles": quartiles}
            if name in memory:
                found["resident_bytes"] = memory[name]
        made_rows.append(found)
    return made_rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        cells = [f"{row['shape']:8s} {row['variant']:15s} {row['requests']:3d} requests"]
        cells += [
            f"{key} {row[f'{key}_tokens_per_second']:8.1f}/s"
            for key in ("served", "bare")
            if f"{key}_quartiles" in row
        ]
        if "first_token_cold_seconds" in row:
            cold, cached = row["first_token_cold_seconds"], row["first_token_cached_seconds"]
            cells.append(f"first token {cold:.3f} s, cached {cached:.3f} s")
        if "resident_bytes" in row:
            cells.append(f"{row['resident_bytes'] / 1e9:.2f} GB")
        print("  ".join(cells))


def main() -> None:
    parser = parser_of(__doc__, "serving.json")
    parser.add_argument(
        "--shape", action="append", choices=["smollm2", "1.1b"], help="repeatable; default: both"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=48, help="that each request asks for")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one to warm up")
    parser.add_argument("--count", type=int, nargs="+", choices=COUNTS, default=COUNTS, help="of requests")
    parser.add_argument("--folder", type=Path, help="where models are kept between runs")
    parser.add_argument("--prompt", type=int, default=512, help="tokens, for the time to the first one")
    parser.add_argument("--variant", action="append", choices=list(CELLS), help="repeatable; default: all")
    parser.add_argument("--llama", type=Path, help="llama.cpp's llama-server")
    parser.add_argument("--quick", action="store_true", help="a tiny shape; nothing is kept")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        shape, variant, folder, threads = options.child
        return serve(shape, variant, Path(folder), int(threads))
    if options.quick:
        options.tokens, options.rounds, options.prompt = 8, 1, 64
    from tawny.kernels.native import kernel_name
    from tawny.machine import cpu_name

    about = measured(threads=options.threads, cpu=f"{cpu_name()}, kernels {kernel_name()}")
    with tempfile.TemporaryDirectory(prefix="tawny-serving-") as temporary:
        folder = options.folder or Path(temporary)
        for shape in ["quick"] if options.quick else options.shape or ["smollm2", "1.1b"]:
            if shape == "smollm2":  # here, so that no measured process has pruned anything
                for name, cell in CELLS.items():
                    if name not in RANDOM:
                        real_folder(cell, folder)
            rows = measure(shape, options, folder)
            show(rows)
            if options.quick:
                continue
            rows = [row | about for row in rows]
            if options.results.exists():  # what was not measured now stays
                keys = ("cpu", "shape", "variant", "requests")
                made = {tuple(row[key] for key in keys) for row in rows}
                kept = json.loads(options.results.read_text())["measurements"]
                rows += [row for row in kept if tuple(row[key] for key in keys) not in made]
            keep(options.results, {"measurements": rows})


if __name__ == "__main__":
    main()
