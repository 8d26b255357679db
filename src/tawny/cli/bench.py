"""`tawny bench`: how fast and how small a model is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tawny
from tawny.cli.console import Console
from tawny.cli.options import DATA, Model, Threads, option, path_named
from tawny.cli.root import verb
from tawny.report.frames import Frame, Result, facts, table
from tawny.words import size

_PATHS = {"blocks": "one C++ call a token", "model": "the model's own forward for each token"}


@verb(
    "tawny bench smollm2",
    "tawny bench packed --against model.gguf --llama llama.cpp/build/bin --threads 2",
    "tawny bench encoder --prompt-tokens 16 --batch 8",
)
def bench(
    model: Model,
    console: Console,
    prompt_tokens: int = option(
        "--prompt-tokens N",
        "Tokens of the prompt, or of a sentence for an encoder.",
        DATA,
        default=128,
        min=1,
    ),
    tokens: int | None = option("--tokens N", "Tokens decoded in a round. Default: 32.", DATA, min=1),
    batch: int | None = option(
        "--batch N", "Sentences or pictures at once, for an encoder. Default: 1.", DATA, min=1
    ),
    rounds: int = option("--rounds N", "Measured rounds, after one to warm up.", DATA, default=5, min=1),
    against: Path | None = option(
        "--against FILE", "GGUF file that llama.cpp measures in turns with MODEL.", DATA, parser=path_named
    ),
    llama: Path | None = option(
        "--llama PATH", "llama-bench, or its folder, for --against.", DATA, parser=path_named
    ),
    threads: Threads = None,
) -> None:
    """Measure decoding, prefill, memory and file size of MODEL, dense or packed; of an encoder the time of a batch."""
    from tawny.errors import RecipeError
    from tawny.evaluation.sources import reads_on

    decodes = reads_on(model)
    if tokens is not None and not decodes:
        raise RecipeError(f"{model} is an encoder and decodes nothing: leave --tokens out")
    if batch is not None and decodes:
        raise RecipeError(f"{model} is measured with one text at a time: --batch is for encoders")
    if (against or llama) and not decodes:
        raise RecipeError(
            f"{model} is an encoder, which llama-bench does not measure: leave --against and --llama out"
        )
    keys: dict[str, Any] = {"rounds": rounds, "threads": threads}
    with console.progress() as progress:
        if decodes:
            keys |= {"prompt_tokens": prompt_tokens} | ({"tokens": tokens} if tokens else {})
            keys |= {"against": against, "llama": llama}
            measured = tawny.bench(model, progress=progress, **keys).to_dict()
        else:
            keys |= {"tokens": prompt_tokens, "batch": batch or 1}
            measured = tawny.latency(model, progress=progress, **keys).to_dict()
    console.result(measured, speed_tables if decodes else latency_tables)


def latency_tables(found: Result) -> list[Frame]:
    """Milliseconds of a batch with their spread, and bytes."""
    low, high = found["seconds_quartiles"]
    of = f" of {found['tokens']} tokens" if found["tokens"] else ""
    packed = ", ".join(f"{count} {kind}" for kind, count in found["packed"].items())
    rows = [
        ("a batch", f"{1000 * found['seconds']:,.2f} ms ({1000 * low:,.2f} – {1000 * high:,.2f})"),
        ("samples/s", f"{found['samples_per_second']:,.1f}"),
        ("measured", f"{found['rounds']} rounds of {found['batch']} samples{of}"),
        ("weights", found["dtype"] + (f", packed linears: {packed}" if packed else ", no packed linear")),
        ("memory", size(found["resident_bytes"])),
        ("with", f"{found['threads']} threads, kernel {found['kernel']}"),
    ]
    if found["file_bytes"] is not None:
        rows.insert(4, ("files", size(found["file_bytes"])))
    return [facts(rows)]


def speed_tables(speed: Result) -> list[Frame]:
    """Tokens a second with their spread, and bytes."""
    frame = table("", "tokens/s", "quartiles", "ms a token")
    against = speed["against"]
    for of, rates in (("", speed), (", llama.cpp", against)):
        for key in ("decode", "prefill") if rates else ():
            value, (low, high) = rates[f"{key}_tokens_per_second"], rates[f"{key}_quartiles"]
            frame.add(f"{key}{of}", f"{value:,.1f}", f"{low:,.1f} – {high:,.1f}", f"{1000 / value:,.2f}")
    packed = ", ".join(f"{count} {kind}" for kind, count in speed["packed"].items())
    walks = f"{speed['rounds']} rounds of {speed['prompt_tokens']} tokens in, {speed['decoded_tokens']} out"
    if speed["whole"]:
        packed += f"; {speed['whole']} of them without masks, which is faster here and takes more memory"
    rows = [
        ("measured", walks),
        ("weights", speed["dtype"] + (f", packed linears: {packed}" if packed else ", no packed linear")),
        ("memory", size(speed["resident_bytes"])),
        ("with", f"{speed['threads']} threads, kernel {speed['kernel']}, {_PATHS[speed['path']]}"),
    ]
    if speed["file_bytes"] is not None:
        rows.insert(2, ("files", size(speed["file_bytes"])))
    if against:
        for key in ("decode", "prefill"):
            low, high = against[f"{key}_ratio_quartiles"]
            rows.append(
                (f"{key}, ratio", f"{against[f'{key}_ratio']:.2f} × llama.cpp ({low:.2f} – {high:.2f})")
            )
        rows.append(
            ("llama.cpp", f"{against['type']}, {size(against['file_bytes'])}, in turns, the same threads")
        )
    return [frame, facts(rows)]
