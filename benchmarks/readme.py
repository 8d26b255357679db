"""Put the committed benchmark results into the pages of docs/results/ and the others with tables. No number in a table is typed.

    python benchmarks/readme.py            writes the tables
    python benchmarks/readme.py --check    fails if they are stale

A table stands between `<!-- NAME: … -->` and `<!-- /NAME -->`. NAME is a results file or a name in SOURCES. The modules in
tables/ make the tables.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tables.encoders import encoder_speed, encoders, vision_study
from tables.evidence import evidence
from tables.experts import experts
from tables.frontier import frontier
from tables.gguf import gguf_files
from tables.glance import glance, owl
from tables.models import families
from tables.pruning import block, large, lsa, prune_speed, ranks, scale, scaling_model
from tables.quality import (
    allocators,
    few_bits,
    mixed_bits,
    owl_study,
    recipes,
    recovery,
    recovery_texts,
    solvers,
    structured,
    tasks,
)
from tables.runtimes import runtimes
from tables.speed import decode, few_bits_speed, kernels, peers, recovery_step, serving, sizes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


TABLES: dict[str, dict[str, Callable[..., str]]] = {
    "README.md": {"glance": glance, "owl": owl},
    "docs/encoders.md": {"encoders": encoders},
    "docs/experts.md": {"experts": experts},
    "docs/log/gguf.md": {"gguf_qwen": gguf_files, "gguf_smollm2": gguf_files},
    "docs/models.md": {"families": families},
    "docs/other-runtimes.md": {"runtimes": runtimes},
    "docs/results/recipes.md": {"recipes": recipes, "recipes_gemma": recipes},
    "docs/results/qwen.md": {"evidence": evidence},
    "docs/results/recovery.md": {
        "recovery": recovery,
        "recovery_texts": recovery_texts,
        "recovery_step": recovery_step,
    },
    "docs/results/allocators.md": {"allocators": allocators, "allocators_gemma": allocators},
    "docs/results/solvers.md": {"solvers": solvers},
    "docs/results/owl.md": {"owl_study": owl_study},
    "docs/results/structured.md": {"structured": structured, "structured_qwen": structured},
    "docs/results/tasks.md": {"tasks": tasks},
    "docs/results/few-bits.md": {
        "few_bits": few_bits,
        "few_bits_qwen": few_bits,
        "few_bits_gpu_qwen": few_bits,
        "mixed_bits": mixed_bits,
    },
    "docs/results/frontier.md": {"frontier": frontier, "frontier_qwen": frontier},
    "docs/results/decoding.md": {"decode": decode, "sizes": sizes},
    "docs/results/one-linear.md": {"kernels": kernels},
    "docs/results/llama-cpp.md": {"few_bits_speed": few_bits_speed, "peers": peers},
    "docs/results/serving.md": {"serving": serving},
    "docs/results/encoders.md": {"vision_study": vision_study, "encoder_speed": encoder_speed},
    "docs/results/cost.md": {
        "prune_speed": prune_speed,
        "large": large,
        "scale": scale,
        "block": block,
        "lsa": lsa,
        "ranks": ranks,
        "scaling_model": scaling_model,
    },
}
# Tables that are not made from the one results file of their name.
SOURCES = {"glance": ("frontier_qwen", "evidence"), "owl": ("evidence",)}


def render(page: str, name_of_page: str) -> str:
    """The page with every table made again. A table without results says which benchmark makes them."""
    for name, table in TABLES[name_of_page].items():
        sources = SOURCES.get(name, (name,))
        paths = [RESULTS / f"{source}.json" for source in sources]
        if all(path.is_file() for path in paths):
            made = table(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))
        else:
            made = f"Not measured yet (`benchmarks/{name}.py`).\n"
        files = ", ".join(f"benchmarks/results/{source}.json" for source in sources)
        head = f"<!-- {name}: made by benchmarks/readme.py from {files} -->"
        block = f"{head}\n\n{made}\n<!-- /{name} -->"
        pattern = rf"<!-- {name}:.*?<!-- /{name} -->"
        page, count = re.subn(pattern, lambda _, block=block: block, page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{name_of_page} has {count} places for {name}, expected one")
    return page


def main() -> int:
    stale = []
    for name in TABLES:
        page = (ROOT / name).read_text(encoding="utf-8")
        made = render(page, name)
        if made != page:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                (ROOT / name).write_text(made, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        print(f"the tables of {' and '.join(stale)} are stale: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
