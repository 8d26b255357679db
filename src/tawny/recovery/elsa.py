"""ELSA (2510.01650): the true loss under an exact sparsity budget, by ADMM. The mask moves, the budget does not.

    min f(x)  s.t.  ‖x‖₀ ≤ k:      Adam on f(x) + λ/2 ‖x − z + u‖²,
    every few steps      z ← the k largest of v·(x + u)², u ← u + x − z

with v Adam's second moment, which stands for the curvature: what is dropped is what the loss misses least. x stays dense
meanwhile and is measured by its projection. The penalty acts on the gradient before Adam, as the paper has it. z and
the duals u are kept in bfloat16. After the last projection x becomes its projection and the rest of the run trains the
survivors of a mask that no longer moves, so that what is written was trained as it is.
"""

from __future__ import annotations

__all__ = ["Elsa"]

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tawny.patterns import removed_count
from tawny.recovery.coordinates import Survivors
from tawny.recovery.settings import Recovery
from tawny.recovery.student import Student


class Elsa:
    """The constraint, its duals and the mask of the moment.

    Args:
        student: with every linear's weights whole under coordinates.
        optimiser: whose second moments weigh the projection.
    """

    def __init__(self, student: Student, settings: Recovery, optimiser: torch.optim.Optimizer) -> None:
        self.settings, self.optimiser = settings, optimiser
        keys = {linear.key for linear in student.linears}
        self.parts = [c for c in student.coordinates if isinstance(c, Survivors) and c.name in keys]
        self.settled = False
        # Every linear's survivors: what pruning left, or fewer, where a higher sparsity is asked for.
        kept = {
            linear.name: linear.numel
            - max(student.zeros[linear.name], removed_count(linear.numel, settings.sparsity or 0.0))
            for linear in student.linears
        }
        self._slices: dict[str, tuple[Survivors, slice, int]] = {}
        block_of: dict[str, int] = {}
        for index in range(len(student.stack)):
            block_of |= {linear.name: index for linear in student.stack.linears(index)}
        by_name = {part.name: part for part in self.parts}
        self._groups: dict[object, list[str]] = {}
        for linear in student.linears:
            start = 0 if linear.expert is None else linear.expert * linear.numel
            place = slice(start, start + linear.numel)
            self._slices[linear.name] = (by_name[linear.key], place, kept[linear.name])
            group = {"linear": linear.name, "block": block_of[linear.name], "global": 0}[settings.budget]
            self._groups.setdefault(group, []).append(linear.name)
        half = torch.bfloat16
        self._z = {p.name: p.vector.detach().to(half) for p in self.parts}
        self._u = {p.name: torch.zeros_like(p.vector, dtype=half) for p in self.parts}
        self._kept = {p.name: torch.ones_like(p.vector, dtype=torch.bool) for p in self.parts}
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Choose the mask anew: exactly the budget of each group, by Adam-weighted magnitude."""
        for names in self._groups.values():
            scores, budget = [], 0
            for name in names:
                part, place, kept = self._slices[name]
                moments = self.optimiser.state.get(part.vector)
                sum_ = part.vector.detach()[place] + self._u[part.name][place].float()
                score = sum_.square_()
                if moments:
                    score.mul_(moments["exp_avg_sq"][place])
                scores.append(score)
                budget += kept
            joined = torch.cat(scores) if len(scores) > 1 else scores[0]
            mask = torch.zeros_like(joined, dtype=torch.bool)
            mask[joined.topk(budget).indices] = True
            for name, part_mask in zip(names, torch.split(mask, [len(s) for s in scores]), strict=True):
                part, place, _ = self._slices[name]
                self._kept[part.name][place] = part_mask
        for part in self.parts:
            x, u = part.vector.detach(), self._u[part.name]
            target = (x + u.float()).mul_(self._kept[part.name])
            self._z[part.name].copy_(target)
            u.copy_(u.float().add_(x).sub_(target))

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the penalty's gradient; once settled, keep the gradient to the survivors."""
        for part in self.parts:
            gradient = part.vector.grad
            if gradient is None:
                continue
            if self.settled:
                gradient.mul_(self._kept[part.name])
            else:
                distance = part.vector.detach() - self._z[part.name].float() + self._u[part.name].float()
                gradient.add_(distance, alpha=self.settings.penalty)

    @torch.no_grad()
    def after_step(self, step: int, share: float) -> None:
        """Project when it is time; settle when the run's last part begins."""
        if self.settled:
            for part in self.parts:
                part.vector.mul_(self._kept[part.name])
        elif share >= 1.0 - self.settings.settle:
            self.project()
            self.settle()
        elif step % self.settings.interval == 0:
            self.project()

    @torch.no_grad()
    def settle(self) -> None:
        self.settled = True
        for part in self.parts:
            part.vector.mul_(self._kept[part.name])
            if state := self.optimiser.state.get(part.vector):
                state["exp_avg"].mul_(self._kept[part.name])
        self._u.clear()
        self._z.clear()

    @contextmanager
    def projected(self) -> Iterator[None]:
        """The model as it would be written now."""
        with torch.no_grad():
            for part in self.parts:
                part.parameter.data.view(-1).mul_(self._kept[part.name])
        try:
            yield
        finally:
            for part in self.parts:
                part.write()

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        kinds = {"kept": self._kept, "u": self._u, "z": self._z}
        return {f"{name}|{kind}": tensor for kind, of in kinds.items() for name, tensor in of.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.settled = not any(name.endswith("|u") for name in tensors)
        if self.settled:
            self._u.clear()
            self._z.clear()
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
