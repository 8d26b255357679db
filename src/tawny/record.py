"""`run.json`: everything a number can be traced to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RECORD_VERSION = 1


@dataclass
class LinearRecord:
    """What became of one linear.

    `error` is `tr(ΔHΔᵀ)/tr(WHWᵀ)` when a Hessian was known (`error_kind` "hessian"), the same with only H's diagonal
    ("norms"), or with the identity ("weights"). `outliers_before` and `outliers_after` count weights whose score is
    above `Record.outlier_M` times the block's mean; None where nothing was known of the inputs. `zeros` of a linear that is
    rounded to a kind counts what was removed, and not what was rounded to 0. Where the output was asked, `notes` hold what it
    feels of the change (`felt`, nats a token to second order) and the mean of the linear's factor (`output`).
    """

    name: str
    shape: tuple[int, int]
    block: int
    stage: int
    target: float
    zeros: int
    sparsity: float
    pattern: str
    error: float
    error_kind: str
    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)
    outliers_before: int | None = None
    outliers_after: int | None = None

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> LinearRecord:
        return cls(**{**plain, "shape": tuple(plain["shape"])})


@dataclass
class Record:
    """The result of one run; `to_dict` is what `run.json` holds.

    Attributes:
        revision: the commit of a hub model, empty for a local folder.
        date: when the run began, in UTC.
        seconds: wall time by phase.
        evaluation: `{"dense": …, "pruned": …}` where both were measured.
        outlier_M: M of the linears' outlier counts.
        generated: `{"prompt", "dense", "pruned"}` texts, where both models were asked to continue some.
        loops: how many continuations of both models repeat themselves, where whole experts left and `--eval` asked.
        experts: what became of the mixture of each block, where whole experts left: `kept` and `removed` by number, how often each was
            `chosen` before, their `scores`, and what the output `felt` of it all where it was asked.
        refined: what training did to each block, where the recipe asks for it; `also` names the norms and biases
            that it changed, beside the pruned linears.
        resumed: how often the run was taken up again.
        memory: the budget, the estimate and its parts, beside which `peak_memory` was measured.
        values: the kind that each linear was solved for, where the recipe asks for kinds.
        files: bytes and SHA-256 of every weight file written.
        packed: kinds and bytes, where the weights were packed afterwards; a `format` where that is another runtime's.
        rounded: what packing rounded, and unpacking does not give back: kinds of linears (`values`), `head`, `embedding`.
        fit: what `tawny fit` compared and chose, in short.
        recovery: what `tawny recover` did to the weights afterwards, in short.
        opens: classes of transformers that open the folder, the model's first.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    revision: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    out: str | None = None
    text: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    compute: str = ""
    storage: str = ""
    sparsity: float = 0.0
    zeros: int = 0
    prunable: int = 0
    parameters: int = 0
    linears: list[LinearRecord] = field(default_factory=list)
    allocation: dict[str, float] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    profile: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    memory_before: int = 0
    bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    outlier_M: float | None = None
    refined: list[dict[str, Any]] = field(default_factory=list)
    experts: list[dict[str, Any]] = field(default_factory=list)
    generated: list[dict[str, str]] = field(default_factory=list)
    loops: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    resumed: int = 0
    packed: dict[str, Any] = field(default_factory=dict)
    rounded: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    opens: list[str] = field(default_factory=lambda: ["AutoModelForCausalLM", "AutoTokenizer"])

    def to_dict(self) -> dict[str, Any]:
        return {"record_version": RECORD_VERSION, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Record:
        """From a `run.json` that this version wrote."""
        plain = json.loads(path.read_text(encoding="utf-8"))
        del plain["record_version"]
        return cls(**{**plain, "linears": [LinearRecord.from_dict(entry) for entry in plain["linears"]]})


def record_in(folder: Path) -> dict[str, Any]:
    """The `run.json` of a folder; empty where there is none, or one of another program, which may call its files so too."""
    try:
        plain = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plain if isinstance(plain, dict) and "record_version" in plain else {}


def finite(value: Any) -> Any:
    """The same with infinity and NaN as None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def measured_numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record read from `run.json` with the measurements that were not finite as infinity, so that pages can show them."""

    def known(plain: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        return {**plain, **{key: math.inf for key in keys if key in plain and plain[key] is None}}

    return {
        **record,
        "linears": [known(linear, "error") for linear in record["linears"]],
        "evaluation": {
            name: known(measured, "perplexity", "stderr") if isinstance(measured, Mapping) else measured
            for name, measured in record["evaluation"].items()
        },
    }


def weight_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every safetensors file in a folder."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return files
