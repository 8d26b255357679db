"""What a fit chooses from: levels for each linear, head and embedding under a number of bytes, and the finalists of a size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from tawny.allocation.knapsack import choose
from tawny.allocation.profile import LinearInfo
from tawny.choosing.kept import Measured
from tawny.choosing.level import Level
from tawny.choosing.limit import Room
from tawny.choosing.sizes import Limit
from tawny.errors import RecipeError
from tawny.kinds import solved_kind
from tawny.pruning.prepare import Job

ZEROS_GAIN = 0.03  # of the expected divergence; less is no more than chance (docs/log/fit.md)
_FAR = 1.25  # times the least expected divergence; what has more never won (docs/log/fit.md)
_DOUBLED = (
    1.28  # times the error of rounding, where twice as many columns share a scale (docs/log/few-bits.md)
)
_CURVE = 24  # sizes that the picture's line of expectations is drawn through


@dataclass(frozen=True)
class Finalist:
    """A model that fits.

    Attributes:
        levels: of each linear.
        group: columns of a scale; None is each kind's usual number.
        head: kind of the head; None leaves it as it is.
        embedding: kind of an embedding that shares no weight with the head; None where there is none, or it stays as it is.
        bytes: at most; packing may find a few integers that are 0.
        takes: of what may be spent: the same bytes, or those that a token reads.
        expected: divergence from the dense model, nats a token, as far as single measurements add up.
    """

    name: str
    levels: Mapping[str, Level]
    group: int | None
    head: str | None
    embedding: str | None
    bytes: int
    takes: float
    expected: float

    @property
    def uniform(self) -> str | None:
        """The kind of all linears, where it is one and nothing is removed."""
        every = set(self.levels.values())
        one = next(iter(every))
        return one.kind if len(every) == 1 and not one.sparsity else None


def _coarser(kind: str, group: int | None) -> float:
    """Times the error that the kind has in its usual groups, which is what was measured."""
    usual = solved_kind(kind).span(None)
    return 1.0 if group is None or usual is None else _DOUBLED ** math.log2(group / usual)


class Table:
    """What each level of each linear costs and takes, and of head and embedding."""

    def __init__(self, job: Job, room: Room, measured: Measured) -> None:
        self.job, self.linears, self.every = job, job.linears, room.sizes.levels
        self.room, self.limit, self.measured = room, room.limit, measured
        leaders = {name: names[0] for names in room.sizes.together for name in names}
        items: dict[str, list[int]] = {}  # by name of the first: linears that get one level
        for i, x in enumerate(self.linears):
            items.setdefault(leaders.get(x.name, x.name), []).append(i)
        self.items = [*items.values()]
        self.costs = [[self.cost(x.name, level) for level in self.every] for x in self.linears]
        self.takes = [[self._takes(self.limit, x, level) for level in self.every] for x in self.linears]
        # By kind what it costs; of None the head stays as it is, and the embedding shares its weight with the head.
        head, table = (
            {kind: lost for kind, lost in end.items() if kind in room.sizes.ends}
            for end in (measured.head, measured.embedding)
        )
        self.heads = dict[str | None, float]([(None, 0.0), *head.items()])
        self.embeddings = dict[str | None, float](table.items()) or {None: 0.0}

    def cost(self, name: str, level: Level) -> float:
        return self.measured.reactions[name] * self.measured.measures[name].relative(level)

    def _takes(self, limit: Limit, x: LinearInfo, level: Level, group: int | None = None) -> float:
        return limit.linear(x, level, group, self.measured.measures[x.name])

    def _ends(self, limit: Limit, head: str | None, embedding: str | None) -> float:
        return limit.of_head(head) + limit.of_embedding(embedding or head)

    def _lost_by_ends(self, head: str | None, embedding: str | None) -> float:
        return self.heads[head] + self.measured.embedding.get(embedding or head or "", 0.0)

    def chosen(self, budget: float, name: str = "", *, zeros: bool) -> Finalist | None:
        """The least cost that fits; None where nothing does."""
        usable = [i for i, level in enumerate(self.every) if zeros or not level.sparsity]
        costs, taken = (
            [[float(sum(each[x][i] for x in item)) for i in usable] for item in self.items]
            for each in (self.costs, self.takes)
        )
        taken.append([float(self.limit.of_head(kind)) for kind in self.heads])
        taken.append([float(self.limit.of_embedding(kind)) for kind in self.embeddings])
        costs += [[*self.heads.values()], [*self.embeddings.values()]]
        picked = choose(costs, taken, budget - self.limit.rest)
        if picked is None:
            return None
        places = {x: p for item, p in zip(self.items, picked, strict=False) for x in item}
        of = {x.name: self.every[usable[places[i]]] for i, x in enumerate(self.linears)}
        return self.finalist(name, of, None, [*self.heads][picked[-2]], [*self.embeddings][picked[-1]])

    def finalist(
        self,
        name: str,
        of: Mapping[str, Level],
        group: int | None,
        head: str | None,
        embedding: str | None = None,
    ) -> Finalist:
        """A model of these levels."""
        expected = math.fsum(
            self.cost(x.name, of[x.name]) * _coarser(of[x.name].kind, group) for x in self.linears
        )
        expected += self._lost_by_ends(head, embedding)
        size, takes = (
            limit.rest
            + self._ends(limit, head, embedding)
            + sum(self._takes(limit, x, of[x.name], group) for x in self.linears)
            for limit in (self.room.sizes, self.limit)
        )
        return Finalist(name, of, group, head, embedding, int(size), takes, expected)

    def uniform(self) -> Finalist | None:
        """One kind for all linears, by expected divergence; of groups the one that fills the size best."""
        fitting = []
        ends = [
            (self._lost_by_ends(*kinds), self._ends(self.limit, *kinds), kinds)
            for kinds in product(self.heads, [None, *filter(None, self.embeddings)])
        ]
        for kind in self.room.sizes.kinds:
            of = dict.fromkeys((x.name for x in self.linears), Level(0.0, kind))
            for group in self.room.sizes.groups(kind) if solved_kind(kind).scaled else ():
                plain = self.finalist("", of, group, None)
                linears = plain.takes - self._ends(self.limit, None, None)
                for lost, takes, kinds in ends:
                    if linears + takes <= self.room.budget:
                        fitting.append((plain.expected + lost, -linears - takes, plain, kinds))
        if not fitting:
            return None
        _, _, plain, (head, embedding) = min(fitting, key=lambda each: each[:2])
        embedding = embedding or (head if self.measured.embedding else None)
        columns = " in rows" if plain.group is None else f" in groups of {plain.group}"
        columns *= len(solved_kind(plain.uniform or "").groups) > 1
        named = f"uniform {plain.uniform}{columns}, head {head or 'as it is'}"
        named += f", embedding {embedding}" if embedding else ""
        return self.finalist(named, plain.levels, plain.group, head, embedding)

    def finalists(self) -> list[Finalist]:
        """Each once, zeros only where they promise enough to be worth a prune, and none that is expected to be far behind.

        Raises:
            RecipeError: nothing fits, which was not known before all was measured.
        """
        budget = self.room.budget
        zeros = self.chosen(budget, "zeros and bits by the linear", zeros=True)
        bits = self.chosen(budget, "bits by the linear", zeros=False)
        uniform = self.uniform()
        if zeros is not None and bits is not None and zeros.expected >= (1 - ZEROS_GAIN) * bits.expected:
            zeros = None
        if bits is not None and bits.uniform is not None and uniform is not None:
            bits = None
        finalists = [each for each in (zeros, bits, uniform) if each is not None]
        if finalists:
            least = min(each.expected for each in finalists)
            return [each for each in finalists if each.expected <= _FAR * least]
        if self.least > budget and self.room.pace is None:
            raise RecipeError(
                f"{self.job.source} cannot be made that small: some of its linears need scales of 16 bits, which only measuring "
                f"tells; give --size {math.ceil(self.least)}, or more"
            )
        raise RecipeError(
            f"{self.job.source} breaks down where its head is small enough for what was asked; give a larger size, or a lower speed"
        )

    @property
    def least(self) -> float:
        """Of what may be spent, what the smallest model takes."""
        least = self.limit.rest + sum(min(x) for x in self.takes)
        least += min(self.limit.of_head(kind) for kind in self.heads)
        return least + min(self.limit.of_embedding(kind) for kind in self.embeddings)

    def curve(self) -> list[tuple[int, float]]:
        """What may be spent, and the least divergence that is expected there."""
        least = self.least
        most = self.limit.rest + sum(max(x) for x in self.takes)
        most += self.limit.of_head(None) + self.limit.of_embedding(None)
        step = (most / least) ** (1 / (_CURVE - 1))
        chosen = (self.chosen(least * step**i, zeros=True) for i in range(_CURVE))
        return [(each.bytes, each.expected) for each in chosen if each is not None]
