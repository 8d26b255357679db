"""Where a recovery stands: what it has seen, and the file that lets it go on after it was stopped."""

from __future__ import annotations

__all__ = ["Shelf", "Standing"]

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tawny.errors import OutputError
from tawny.model import durable
from tawny.recovery.coordinates import Coordinates
from tawny.recovery.processes import Processes

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Standing:
    """Everything about a run but its tensors.

    Attributes:
        step: optimiser steps done.
        seconds: of all processes that worked on it.
        curve: one entry a step: step, tokens, lr, loss, kl, norm.
        measured: one entry a measurement on the held-out windows.
        best: the entry of `measured` with the lowest perplexity.
        stale: measurements since then.
    """

    step: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    teacher_tokens: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    measured: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    stale: int = 0


class Shelf:
    """The folder `OUT.recovery`: the state to go on from, the best weights so far, the teacher's hidden states.

    Args:
        folder: None keeps the best weights in memory and nothing else.
        key: names everything that decides the result.
        parts: the processes, where each keeps a part of its own.

    Raises:
        OutputError: the folder holds the state of another run.
    """

    def __init__(self, folder: Path | None, key: str, parts: Processes | None = None) -> None:
        self.folder, self.key, self.parts = folder, key, parts
        self._tag = "" if parts is None else f"-{parts.rank}"
        self._best: dict[str, torch.Tensor] = {}
        if folder is None:
            return
        with durable.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # All of them: other numbers of processes name theirs otherwise.
        if any(_metadata(path).get("key") != key for path in sorted(folder.glob("state*.safetensors"))):
            raise OutputError(
                f"{folder} holds a recovery with other settings, model, teacher or text: repeat that command to go on "
                "with it, choose another --out, or pass --overwrite to discard it"
            )

    def _state(self) -> Path | None:
        """The file to go on from. Of parts the newest that every process has, for a crash may come between two writes."""
        if self.folder is None:
            return None
        if self.parts is None:
            path = self.folder / "state.safetensors"
            return path if path.exists() else None
        mine = {int(path.stem.rpartition("-")[2]): path for path in self._states()}
        common = set.intersection(*map(set, self.parts.all_of(sorted(mine))))
        return mine[max(common)] if common else None

    def _states(self) -> list[Path]:
        assert self.folder is not None
        return list(self.folder.glob(f"state{self._tag}-*.safetensors"))

    def load(
        self, coordinates: Sequence[Coordinates], optimiser: torch.optim.Optimizer, more: Any
    ) -> Standing | None:
        """Put tensors, moments and whatever `more` holds back; None if there is no state."""
        path = self._state()
        if path is None:
            return None
        found = _metadata(path)
        with safe_open(path, framework="pt") as file, torch.no_grad():
            names = set(file.keys())
            for one in coordinates:
                for name, tensor in one.tensors.items():
                    tensor.copy_(file.get_tensor(name))
                    if f"{name}|exp_avg" in names:
                        moments = {m: file.get_tensor(f"{name}|{m}").to(tensor.device) for m in _MOMENTS}
                        steps = torch.tensor(float(found["optimiser_steps"]))
                        optimiser.state[tensor] = {"step": steps, **moments}
            if more is not None:
                more.load({key[5:]: file.get_tensor(key) for key in names if key.startswith("more|")})
        return Standing(**json.loads(found["standing"]))

    def save(
        self,
        standing: Standing,
        coordinates: Sequence[Coordinates],
        optimiser: torch.optim.Optimizer,
        more: Any,
    ) -> None:
        if self.folder is None:
            return
        tensors: dict[str, torch.Tensor] = {}
        steps = 0.0
        for one in coordinates:
            for name, tensor in one.tensors.items():
                tensors[name] = tensor.detach()
                if state := optimiser.state.get(tensor):
                    tensors |= {f"{name}|{moment}": state[moment] for moment in _MOMENTS}
                    steps = float(state["step"])
        if more is not None:
            tensors |= {f"more|{name}": tensor for name, tensor in more.tensors().items()}
        metadata = {"key": self.key, "standing": json.dumps(asdict(standing)), "optimiser_steps": str(steps)}
        if self.parts is None:
            self._write("state.safetensors", tensors, metadata)
            return
        before = self._states()
        self._write(name := f"state{self._tag}-{standing.step}.safetensors", tensors, metadata)
        self.parts.all_of(None)  # an older part goes when every newer one is there
        for path in before:
            if path.name != name:
                path.unlink()

    def join(self, coordinates: Sequence[Coordinates]) -> Callable[[str], torch.Tensor]:
        """From the parts of all processes the whole vector of a name, for the first process to write."""
        assert self.folder is not None and self.parts is not None
        tensors = {name: t.detach() for one in coordinates if one.sharded for name, t in one.tensors.items()}
        self._write(f"last{self._tag}.safetensors", tensors, {"key": self.key})
        paths = [self.folder / f"last-{rank}.safetensors" for rank in self.parts.all_of(self.parts.rank)]

        def whole(name: str) -> torch.Tensor:
            pieces = []
            for path in paths:
                with safe_open(path, framework="pt") as file:
                    pieces.append(file.get_tensor(name))
            return torch.cat(pieces)

        return whole

    def keep_best(self, coordinates: Sequence[Coordinates]) -> None:
        tensors = {name: t.detach() for one in coordinates for name, t in one.tensors.items()}
        if self.folder is None:
            self._best = {name: tensor.clone() for name, tensor in tensors.items()}
        else:
            self._write(f"best{self._tag}.safetensors", tensors, {"key": self.key})

    def restore_best(self, coordinates: Sequence[Coordinates]) -> None:
        with torch.no_grad():
            if self.folder is None:
                for one in coordinates:
                    for name, tensor in one.tensors.items():
                        tensor.copy_(self._best[name])
            else:
                with safe_open(self.folder / f"best{self._tag}.safetensors", framework="pt") as file:
                    for one in coordinates:
                        for name, tensor in one.tensors.items():
                            tensor.copy_(file.get_tensor(name))
            for one in coordinates:
                one.write()

    def _write(self, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        assert self.folder is not None
        path = self.folder / name
        with durable.writing(path), durable.beside(path) as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{path} cannot be read ({error}): pass --overwrite to start anew") from error
