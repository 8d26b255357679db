"""Which encoders Tawny prunes and packs: tiny models of the usual families of text, vision and speech encoders, measured.

    python benchmarks/encoders.py                      # all of them, in some minutes
    python benchmarks/encoders.py --only bert vit      # some, only printed; with --json PATH put into that file

Of each family a tiny random model in float32 is made (hidden size 32, three blocks), saved, and taken through three steps, each
of which is checked:

- walked: blocks that run one by one give the features of the model's own forward.
- pruned: `tawny.prune` to 50 % with OWL and SparseGPT; every linear has the zeros that the run records, and plain transformers
  opens the folder with finite features.
- packed: `tawny.pack` in float32 and `tawny.load`: features are those of the pruned model, and `tawny.unpack` gives the same bytes.

What Tawny refuses is recorded with its message; an exception that is not Tawny's own is an error.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from families_tiny import TINY, with_outliers
from harness import RESULTS, keep, parser_of
from torch import Tensor

import tawny
from tawny.errors import TawnyError, first_line
from tawny.model.stack import Stack, live_stack

SPARSITY, TOLERANCE = 0.5, 1e-4

# Family → the module and class of its model in transformers, and what makes it tiny.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = TINY["encoders"]


class Wrong(Exception):
    """A result that is not what it should be."""


def tiny_encoder(family: str) -> Any:
    """A random model whose linears differ enough in scale to have outliers."""
    path, settings = FAMILIES[family]
    module, name = path.split(".")
    kind = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    torch.manual_seed(0)
    return with_outliers(kind(kind.config_class(**settings)).eval())


def inputs_of(model: Any, samples: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the kind that the model takes."""
    generator, name, config = torch.Generator().manual_seed(seed), model.main_input_name, model.config
    if name == "input_ids":
        return {name: torch.randint(3, 256, (samples, 24), generator=generator)}
    size = getattr(config, "image_size", 32)
    shapes = {
        "pixel_values": (samples, 3, *((size, size) if isinstance(size, int) else size)),
        "input_features": (
            samples,
            getattr(config, "num_mel_bins", 8),
            2 * getattr(config, "max_source_positions", 16),
        ),
        "input_values": (samples, 400),
    }
    return {name: torch.randn(shapes[name], generator=generator)}


def features_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first thing that the model gives: features or logits."""
    with torch.no_grad():
        found: Tensor = model(**inputs)[0]
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def walked(stack: Stack, inputs: dict[str, Tensor]) -> None:
    hidden = stack.enter(inputs)
    for index, call in enumerate(stack.calls(inputs)):
        hidden = stack.forward(index, hidden, call)
    with torch.no_grad():
        made, own = stack.output(inputs, hidden)[0], features_of(stack.model, inputs)
    if not distance(made, own) <= TOLERANCE:
        raise Wrong(
            f"blocks run one by one give features {distance(made, own):.3g} away from the model's own"
        )


def tried(family: str, work: Path) -> dict[str, Any]:
    """What became of one family; `refused` and `error` say why a step was not taken."""
    model = tiny_encoder(family)
    inputs = inputs_of(model)
    row: dict[str, Any] = {"family": family, "class": type(model).__name__, "input": model.main_input_name}
    try:
        walked(live_stack(model), inputs)
        model.save_pretrained(work / "dense")
        keys = {"sparsity": SPARSITY, "allocator": "owl", "solver": "sparsegpt", "compute": "float32"}
        record = tawny.prune(work / "dense", work / "pruned", calibration=inputs, **keys)
        if abs(record.zeros - SPARSITY * record.prunable) > len(record.linears):
            raise Wrong(f"{record.zeros:,} of {record.prunable:,} weights are recorded as zeros")
        weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
        row |= {"linears": len(record.linears), "share": record.prunable / weights}
        pruned = type(model).from_pretrained(work / "pruned").eval()
        expected = features_of(pruned, inputs)
        if not bool(expected.isfinite().all()):
            raise Wrong("the pruned model gives NaN")
        report = tawny.pack(work / "pruned", work / "packed", "f32")
        for packed in (tawny.load(work / "packed"), type(model).from_pretrained(work / "packed").eval()):
            if not (far := distance(features_of(packed, inputs), expected)) <= TOLERANCE:
                raise Wrong(f"packed features are {far:.3g} away")
        tawny.unpack(work / "packed", work / "again")
        if any(
            (work / "again" / p.name).read_bytes() != p.read_bytes()
            for p in (work / "pruned").glob("*.safetensors")
        ):
            raise Wrong("unpacking gives other bytes")
        row |= {"pruned": True, "packed": report.packed / max(1, len(record.linears))}
    except TawnyError as error:
        row["refused"] = first_line(error)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {first_line(error)[:200]}"
    return row


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES))
    parser.add_argument("--json", type=Path, help="results file; with --only, other families in it are kept")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    path = args.json or (None if args.only else RESULTS / "encoders.json")
    rows: dict[str, dict[str, Any]] = {}
    if args.only and path is not None and path.exists():
        rows = {row["family"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    for family in args.only or FAMILIES:
        with tempfile.TemporaryDirectory() as work:
            rows[family] = tried(family, Path(work))
        print(json.dumps(rows[family]), flush=True)
    if path is not None:
        keep(path, {"rows": [rows[family] for family in FAMILIES if family in rows]})


if __name__ == "__main__":
    main()
