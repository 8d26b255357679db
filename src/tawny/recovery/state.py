"""The saved state of a recovery: its progress and its tensors, so that it can go on after it was stopped."""

from __future__ import annotations

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

_MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_EACH = ("step", *_MOMENTS)  # an expert without a token in some step has made fewer than the others


@dataclass
class Standing:
    """Everything about a run but its tensors.

    Attributes:
        step: optimiser steps done.
        seconds: of all runs that worked on it.
        phases: the same by phase.
        step_seconds: of the last step, without the teacher.
        curve: one entry a step: step, tokens, lr, loss, kl, norm.
        measured: one entry a measurement on the held-out windows.
        best: the entry of `measured` with the lowest KL from the teacher, or without one the lowest loss.
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
    """

    def __init__(
        self,
        folder: Path | None,
        coordinates: Sequence[Coordinates],
        optimiser: torch.optim.Optimizer,
    ) -> None:
        self.folder, self.coordinates = folder, coordinates
        self.optimiser = optimiser
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
        self._write(name := f"state-{standing.step}.safetensors", tensors, metadata)
        best = f"best-{(standing.best or {}).get('step', 0):.0f}.safetensors"
        for path in [*before, *self._kept("best")]:
            if path.name not in (name, best):
                path.unlink()

    def _state(self) -> Path | None:
        """The newest file: a crash may come before an older one is deleted."""
        if self.folder is None:
            return None
        return max(self._kept("state"), key=lambda path: int(path.stem.rpartition("-")[2]), default=None)

    def _kept(self, what: str) -> list[Path]:
        assert self.folder is not None
        return list(self.folder.glob(f"{what}-*.safetensors"))

    def keep_best(self, step: int) -> None:
        """The weights of this step; an older file goes when a state names this one."""
        tensors = self._tensors()
        if self.folder is None:
            self._best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        else:
            self._write(f"best-{step}.safetensors", tensors)

    def restore_best(self, step: int) -> None:
        if self.folder is None:
            self._put_back(self._best.__getitem__)
        else:
            with safe_open(self.folder / f"best-{step}.safetensors", framework="pt") as file:
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
