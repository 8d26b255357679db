"""The saved state of a recovery: its progress and its tensors, so that it can go on after it was stopped."""

from __future__ import annotations

__all__ = ["Shelf", "Standing"]

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tawny.errors import OutputError
from tawny.model.resumable import WorkFolder
from tawny.recovery.coordinates import Coordinates
from tawny.recovery.elsa import Elsa
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
    """The tensors in `OUT.recovery`: the state to go on from and the best weights so far.

    Args:
        work: None keeps the best weights in memory and nothing else.
        parts: the processes, where each keeps a part of its own.
    """

    def __init__(self, work: WorkFolder | None, parts: Processes | None = None) -> None:
        self.work, self.parts = work, parts
        self._tag = "" if parts is None else f"-{parts.rank}"
        self._best: dict[str, torch.Tensor] = {}

    def load(
        self, coordinates: Sequence[Coordinates], optimiser: torch.optim.Optimizer, more: Elsa | None
    ) -> Standing | None:
        """Put tensors, moments and whatever `more` holds back; None if there is no state."""
        path = self._state()
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                found = dict(file.metadata() or {})
                names = set(file.keys())
                _put_back(coordinates, file.get_tensor)
                for name, tensor in _tensors(coordinates).items():
                    if f"{name}|exp_avg" in names:
                        moments = {m: file.get_tensor(f"{name}|{m}").to(tensor.device) for m in _MOMENTS}
                        steps = torch.tensor(float(found["optimiser_steps"]))
                        optimiser.state[tensor] = {"step": steps, **moments}
                if more is not None:
                    more.load({key[5:]: file.get_tensor(key) for key in names if key.startswith("more|")})
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{path} cannot be read ({error}): pass --overwrite to start anew") from error
        return Standing(**json.loads(found["standing"]))

    def save(
        self,
        standing: Standing,
        coordinates: Sequence[Coordinates],
        optimiser: torch.optim.Optimizer,
        more: Elsa | None,
    ) -> None:
        if self.work is None:
            return
        tensors: dict[str, torch.Tensor] = dict(_tensors(coordinates))
        steps = 0.0
        for name, tensor in _tensors(coordinates).items():
            if state := optimiser.state.get(tensor):
                tensors |= {f"{name}|{moment}": state[moment] for moment in _MOMENTS}
                steps = float(state["step"])
        if more is not None:
            tensors |= {f"more|{name}": tensor for name, tensor in more.tensors().items()}
        metadata = {"standing": json.dumps(asdict(standing)), "optimiser_steps": str(steps)}
        if self.parts is None:
            self.work.write_tensors("state.safetensors", tensors, metadata)
            return
        before = self._states()
        self.work.write_tensors(name := f"state{self._tag}-{standing.step}.safetensors", tensors, metadata)
        self.parts.wait()  # an older part goes when every newer one is there
        for path in before:
            if path.name != name:
                path.unlink()

    def _state(self) -> Path | None:
        """The file to go on from. Of parts the newest that every process has, for a crash may come between two writes."""
        if self.work is None:
            return None
        if self.parts is None:
            path = self.work.path / "state.safetensors"
            return path if path.exists() else None
        mine = {int(path.stem.rpartition("-")[2]): path for path in self._states()}
        common = set.intersection(*map(set, self.parts.all_of(sorted(mine))))
        return mine[max(common)] if common else None

    def _states(self) -> list[Path]:
        assert self.work is not None
        return list(self.work.path.glob(f"state{self._tag}-*.safetensors"))

    def join(self, coordinates: Sequence[Coordinates]) -> Callable[[str], torch.Tensor]:
        """From the parts of all processes the whole vector of a name, for the first process to write."""
        assert self.work is not None and self.parts is not None
        self.work.write_tensors(
            f"last{self._tag}.safetensors", _tensors([one for one in coordinates if one.sharded])
        )
        ranks = self.parts.all_of(self.parts.rank)
        paths = [self.work.path / f"last-{rank}.safetensors" for rank in ranks]

        def whole(name: str) -> torch.Tensor:
            pieces = []
            for path in paths:
                with safe_open(path, framework="pt") as file:
                    pieces.append(file.get_tensor(name))
            return torch.cat(pieces)

        return whole

    def keep_best(self, coordinates: Sequence[Coordinates]) -> None:
        tensors = _tensors(coordinates)
        if self.work is None:
            self._best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        else:
            self.work.write_tensors(f"best{self._tag}.safetensors", tensors)

    def restore_best(self, coordinates: Sequence[Coordinates]) -> None:
        if self.work is None:
            _put_back(coordinates, self._best.__getitem__)
        else:
            with safe_open(self.work.path / f"best{self._tag}.safetensors", framework="pt") as file:
                _put_back(coordinates, file.get_tensor)


def _tensors(coordinates: Sequence[Coordinates]) -> dict[str, torch.Tensor]:
    return {name: tensor for one in coordinates for name, tensor in one.tensors.items()}


@torch.no_grad()
def _put_back(coordinates: Sequence[Coordinates], kept: Callable[[str], torch.Tensor]) -> None:
    for name, tensor in _tensors(coordinates).items():
        tensor.copy_(kept(name))
    for one in coordinates:
        one.write()
