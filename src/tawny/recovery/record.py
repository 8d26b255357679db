"""`recover.json`: everything a recovery's numbers can be traced to, and the page that shows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tawny.errors import NumericalError
from tawny.progress import Progress
from tawny.record import finite
from tawny.report.html import NAME
from tawny.report.pages import or_say
from tawny.report.recovery import known, write_recovery

# How the error begins that such a record holds among its warnings.
NAN = "the loss became"


@dataclass
class RecoveryRecord:
    """What `recover.json` holds; a number that is not finite is null there.

    Attributes:
        sparsity, zeros: after training; never fewer zeros than before.
        start, best: measurements on the held-out windows; `best` is of what was written.
        seconds: wall time by phase and in all; of a run that was stopped, up to each state it went on from.
        tokens_per_second: of the training steps alone.
        products_per_second: tokens a second that their matrix products alone would allow, as fast as a large plain one is here;
            all experts of a mixture are counted. 0 on another device than the CPU, and where there were few steps to tell.
        stopped: why it ended: tokens, minutes, patience, or nan.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    teacher: str | None = None
    out: str | None = None
    text: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    compute: str = ""
    sparsity: float = 0.0
    zeros: int = 0
    zeros_before: int = 0
    prunable: int = 0
    trained: int = 0
    steps: int = 0
    tokens: int = 0
    start: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    measured: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    products_per_second: float = 0.0
    teacher_tokens: int = 0
    teacher_bytes: int = 0
    peak_memory: int = 0
    memory_before: int = 0
    bytes: int = 0
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False) + "\n"

    @property
    def failure(self) -> NumericalError | None:
        """The error of a training that ended early and left its best model, however often it is asked for."""
        if self.stopped != "nan":
            return None
        said = (line for line in self.warnings if line.startswith(NAN))
        return NumericalError(next(said, f"{NAN} nan"))

    @classmethod
    def read(cls, path: Path) -> RecoveryRecord:
        """From a `recover.json`; what is null there is NaN here, since infinity and NaN cannot be told apart."""
        return cls(**known(json.loads(path.read_text(encoding="utf-8"))))


def draw(record: RecoveryRecord, folder: Path, progress: Progress) -> None:
    """The page, when everything is known."""
    or_say(folder / NAME, lambda: write_recovery(record.to_dict(), folder), progress)
