"""What `tawny recover` may train: a row for each method, which says all that the rest has to know of it.

To add a method, write what it makes of the linears of a block (a `Cover`) and its row. What is trained is a class of coordinates.py;
writing.py has a case for a class that is neither of those there. Norms and biases are always trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tawny.model.linears import Linear
from tawny.recovery.coordinates import Coordinates, Factors, Survivors


@dataclass(frozen=True)
class Covering:
    """What a method may look at, beside the linears.

    Attributes:
        stored: the parameters as the checkpoint has them, by name.
        values: the kind that the forwards see of each linear that has one.
        group: columns that share a scale of few bits; None is the kind's usual number.
        rank: of factors.
        seed: of this block's first factors.
    """

    stored: Mapping[str, Tensor]
    values: Mapping[str, str]
    group: int | None
    rank: int
    seed: int


Cover = Callable[[Sequence[Linear], Covering], Sequence[Coordinates]]


@dataclass(frozen=True)
class Method:
    """One way to train what pruning left.

    Attributes:
        rate: the highest learning rate where none is given; low-rank factors and norms are few and bear more.
        weights: whether surviving weights are trained where they are, get a product added, or are kept as they are.
        cover: what is trained of the linears of a block.
    """

    rate: float
    weights: Literal["trained", "added to", "kept"]
    cover: Cover


def _survivors(linears: Sequence[Linear], of: Covering) -> list[Coordinates]:
    """The surviving weights of each parameter."""
    covered: list[Coordinates] = []
    for key in dict.fromkeys(linear.key for linear in linears):
        members = [linear for linear in linears if linear.key == key]
        parameter = getattr(members[0].module, members[0].parameter)
        values = {x.name: of.values[x.name] for x in members if x.name in of.values}
        one = Survivors(
            key, parameter, of.stored[key], masked=True, linears=members, values=values, group=of.group
        )
        if values:
            one.write()
        covered.append(one)
    return covered


def _factors(linears: Sequence[Linear], of: Covering) -> list[Coordinates]:
    """A product of two thin factors for each linear, masked by its zeros."""
    return [
        Factors(x, getattr(x.module, x.parameter), of.stored[x.key], of.rank, of.seed + number)
        for number, x in enumerate(linears)
    ]


def _nothing(linears: Sequence[Linear], of: Covering) -> list[Coordinates]:
    return []


METHODS = {
    "survivors": Method(rate=3e-4, weights="trained", cover=_survivors),
    "norms": Method(rate=2e-3, weights="kept", cover=_nothing),
    "lora": Method(rate=1e-3, weights="added to", cover=_factors),
}
