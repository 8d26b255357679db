"""How small: files of a pruned model, dense and packed, and the memory it takes once it is loaded.

    python benchmarks/sizes.py                            # smollm2 at 70 %, about a minute

Which weights go does not matter to a size, only how many, so the quickest solver prunes. `expected` is what the format
promises for the packed weights alone: density times the bytes of a value, plus an eighth for the mask. `resident` is
what loading adds to a process that has loaded a small packed model already, that is, with all imports made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KINDS: list[tuple[str, int | None, str | None]] = [
    ("bf16", None, None),
    ("int8", None, None),
    ("int8", None, "int8"),
    ("int8", 128, "int8"),
]
VALUE_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "int8": 1}
LOAD = """
import gc, sys, tawny
from tawny.machine import resident_memory
tawny.load(sys.argv[1])
gc.collect()
before = resident_memory()
model = tawny.load(sys.argv[2])
gc.collect()
print(resident_memory() - before)
"""


def folder_bytes(folder: Path) -> int:
    """Weights and, where there is one, the index that is needed to read them."""
    return sum(
        p.stat().st_size for pattern in ("*.safetensors", "*.index.json") for p in folder.glob(pattern)
    )


def small_packed(folder: Path) -> Path:
    """A tiny packed model, whose loading makes every import."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tawny

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "small-dense")
    tawny.pack(folder / "small-dense", folder / "small", "int8")
    return folder / "small"


def measure(model: str, sparsity: float, work: Path) -> dict[str, Any]:
    import tawny
    from tawny.machine import machine, versions

    dense = work / "dense"
    tawny.prune(model, dense, sparsity=sparsity, allocator="uniform", solver="magnitude")
    whole = folder_bytes(dense)
    small = small_packed(work)
    rows = []
    for values, group, head in KINDS:
        out = work / f"{values}-{group}-{head}"
        report = tawny.pack(dense, out, values, group, head)  # type: ignore[arg-type]
        linears = [form for form in report.linears if form.form == "packed" and form.name != "lm_head"]
        expected = sum(
            form.shape[0] * form.shape[1] * ((1 - form.sparsity) * VALUE_BYTES[values] + 1 / 8)
            for form in linears
        )
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, str(small), str(out)], capture_output=True, text=True, check=True
        )
        rows.append(
            {
                "values": values,
                "group": group,
                "head": head,
                "bytes": folder_bytes(out),
                "ratio": folder_bytes(out) / whole,
                "packed_bytes": sum(form.bytes for form in linears),
                "expected": expected,
                "resident": int(loaded.stdout.split()[-1]),
            }
        )
    return {
        "model": model,
        "sparsity": sparsity,
        "dense_bytes": whole,
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "sizes.json")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = measure(chosen.model, chosen.sparsity, Path(work))
    chosen.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print(
            f"{row['values']:>5} head {row['head'] or '-':>4} group {row['group'] or '-':>4}: "
            f"{row['bytes'] / 1e6:7.1f} MB {row['ratio']:6.1%}  packed weights {row['packed_bytes'] / row['expected']:.4f} "
            f"of what the format promises, resident {row['resident'] / row['bytes']:.2f} of the file"
        )


if __name__ == "__main__":
    main()
