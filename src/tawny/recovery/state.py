"""The saved state of a recovery: its progress and its tensors, so that it can go on after it was stopped."""

from __future__ import annotations

__all__ = ["Shelf", "Standing"]

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tawny.errors import OutputError
from tawny.model import durable
from tawny.recovery.coordinates import Coordinates
from tawny.recovery.processes import Processes

_MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_EACH = ("step", *_MOMENTS)  # an expert without a token in some step has made fewer than the others


@dataclass
class Standing:
    """Everything about a run but its tensors.

    Attributes:
        step: optimiser steps done.
        seconds: of all processes that worked on it.
        phases: the same by phase.
        step_seconds: of the last step, without the teacher.
        curve: one entry a step: step, tokens, lr, loss, kl, norm.
        measured: one entry a measurement on the held-out windows.
        best: the entry of `measured` with the lowest loss.
        stale: measurements since then.
        held_out: windows that each measurement reads.
        measuring: seconds that measurements took in all, the teacher's forwards of their windows included.
        cost: seconds of the last one, without the teacher.
    """

    step: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    step_seconds: float = 0.0
    teacher_seconds: float = 0.0
    teacher_tokens: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    measured: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    stale: int = 0
    held_out: int = 0
    measuring: float = 0.0
    cost: float = 0.0


class Shelf:
    """The tensors of a training in `OUT.partial`: the state to go on from and the best weights so far.

    Args:
        folder: of the states; None keeps the best weights in memory and nothing else.
        parts: the processes, where each keeps a part of its own.
    """

    def __init__(
        self,
        folder: Path | None,
        coordinates: Sequence[Coordinates],
        optimiser: torch.optim.Optimizer,
        parts: Processes | None,
    ) -> None:
        self.folder, self.parts, self.coordinates = folder, parts, coordinates
        self.optimiser = optimiser
        self._tag = "" if parts is None else f"-{parts.rank}"
        self._best: dict[str, torch.Tensor] = {}

    def load(self) -> Standing | None:
        """Put tensors and moments back; None if there is no state."""
        path = self._state()
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                names = set(file.keys())
                self._put_back(file.get_tensor)
                for name, tensor in self._tensors().items():
                    if f"{name}|exp_avg" in names:
                        # As in torch's own loader, only a fused step counts where its tensor is.
                        moved = _OF_EACH if self.optimiser.defaults["fused"] else _MOMENTS
                        places = {key: tensor.device if key in moved else "cpu" for key in _OF_EACH}
                        # Copies: views of the file would hold its place on the disk after it is deleted.
                        self.optimiser.state[tensor] = {
                            key: file.get_tensor(f"{name}|{key}").to(place, copy=True)
                            for key, place in places.items()
                        }
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{path} cannot be read ({error}): pass --overwrite to start anew") from error
        return Standing(**json.loads(metadata["standing"]))

    def save(self, standing: Standing) -> None:
        if self.folder is None:
            return
        tensors = self._tensors()
        for name, tensor in self._tensors().items():
            if state := self.optimiser.state.get(tensor):
                tensors |= {f"{name}|{key}": state[key] for key in _OF_EACH}
        metadata = {"standing": json.dumps(asdict(standing))}
        before = self._kept("state")
        self._write(name := f"state{self._tag}-{standing.step}.safetensors", tensors, metadata)
        if self.parts is not None:
            self.parts.wait()  # an older part goes when every newer one is there
        best = f"best{self._tag}-{(standing.best or {}).get('step', 0):.0f}.safetensors"
        for path in [*before, *self._kept("best")]:
            if path.name not in (name, best):
                path.unlink()

    def _state(self) -> Path | None:
        """The file to go on from. Of parts the newest that every process has, for a crash may come between two writes."""
        if self.folder is None:
            return None
        mine = {int(path.stem.rpartition("-")[2]): path for path in self._kept("state")}
        everybodys = [list(mine)] if self.parts is None else self.parts.all_of(list(mine))
        common = set.intersection(*map(set, everybodys))
        return mine[max(common)] if common else None

    def _kept(self, what: str) -> list[Path]:
        assert self.folder is not None
        return list(self.folder.glob(f"{what}{self._tag}-*.safetensors"))

    def join(self) -> Callable[[str], torch.Tensor]:
        """From the parts of all processes the whole vector of a name, for the first process to write."""
        assert self.folder is not None and self.parts is not None
        mine = {
            name: tensor for one in self.coordinates if one.sharded for name, tensor in one.tensors.items()
        }
        self._write(f"last{self._tag}.safetensors", mine)
        ranks = self.parts.all_of(self.parts.rank)
        paths = [self.folder / f"last-{rank}.safetensors" for rank in ranks]

        def whole(name: str) -> torch.Tensor:
            pieces = []
            for path in paths:
                with safe_open(path, framework="pt") as file:
                    pieces.append(file.get_tensor(name))
            return torch.cat(pieces)

        return whole

    def keep_best(self, step: int) -> None:
        """The weights of this step; an older file goes when a state names this one."""
        tensors = self._tensors()
        if self.folder is None:
            self._best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        else:
            self._write(f"best{self._tag}-{step}.safetensors", tensors)

    def restore_best(self, step: int) -> None:
        if self.folder is None:
            self._put_back(self._best.__getitem__)
        else:
            with safe_open(self.folder / f"best{self._tag}-{step}.safetensors", framework="pt") as file:
                self._put_back(file.get_tensor)

    def _write(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        assert self.folder is not None
        path = self.folder / name
        with durable.writing(path), durable.beside(path) as temporary:
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, temporary, metadata
            )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for one in self.coordinates for name, tensor in one.tensors.items()}

    @torch.no_grad()
    def _put_back(self, kept: Callable[[str], torch.Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(kept(name))
        for one in self.coordinates:
            one.write()
