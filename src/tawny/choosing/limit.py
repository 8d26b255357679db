"""What a fit is asked for: bytes, bits a weight, or tokens a second; and what may be spent on it."""

from __future__ import annotations

__all__ = ["Room", "Target", "check_target", "room_for"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tawny.choosing.pace import Pace, ReadPerToken, check_kernels
from tawny.choosing.sizes import Limit, Sizes
from tawny.errors import RecipeError
from tawny.pruning.prepare import Job
from tawny.run.memory import parse_size
from tawny.words import size as size_words


@dataclass(frozen=True)
class Target:
    """One of the three.

    Attributes:
        bytes: of the weight files and their index.
        bits: the same for each weight of the model.
        speed: tokens a second of one sequence on this machine.
    """

    bytes: int | None = None
    bits: float | None = None
    speed: float | None = None

    @classmethod
    def of(cls, size: str | int | None, bits: float | None, speed: float | None) -> Target:
        """
        Raises:
            RecipeError: none or several are given, or one that cannot be.
        """
        given = {"size": size, "bits": bits, "speed": speed}
        named = [f"{name} {value}" for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise RecipeError(
                "say what the model may take: either size (such as 700MB), bits a weight (such as 4.25), or speed (tokens a second)"
                + (f"; {' and '.join(named)} are several" if named else "")
            )
        if bits is not None and not 0 < float(bits) <= 32:
            raise RecipeError(f"bits {bits} is not possible; expected bits a weight in (0, 32], such as 4.25")
        if speed is not None and not 0 < float(speed) < math.inf:
            raise RecipeError(f"speed {speed} is not possible; expected tokens a second above 0, such as 20")
        return cls(
            parse_size(size, "size"),
            None if bits is None else float(bits),
            None if speed is None else float(speed),
        )


@dataclass(frozen=True)
class Room:
    """What may be spent.

    Attributes:
        budget: bytes of files; of a speed, bytes that a token reads at the pace of memory.
        pace: of a speed.
    """

    sizes: Sizes
    budget: float
    pace: Pace | None = None

    @cached_property
    def limit(self) -> Limit:
        """What linears, head and embedding take of the budget."""
        return self.sizes if self.pace is None else ReadPerToken(self.sizes, self.pace)

    @property
    def file_bytes(self) -> int | None:
        """That were asked for; None where a speed was."""
        return int(self.budget) if self.pace is None else None


def room_for(job: Job, target: Target, sizes: Sizes, pace: Callable[[], Pace]) -> Room:
    """
    Args:
        sizes: of what is written.
        pace: measures the machine, where a speed is asked for.

    Raises:
        RecipeError: nothing is that small or that fast; says what is.
    """
    if target.speed is None:
        return Room(sizes, _bytes(job, sizes, target))
    measured = pace()
    room = Room(sizes, measured.budget(target.speed), measured)
    fastest = measured.bandwidth / smallest(job, room.limit, sizes)
    if target.speed > fastest:
        raise RecipeError(
            f"{job.source} cannot write {target.speed:g} tokens a second on this machine: with the quickest kind in every linear "
            f"it writes at most {_down(fastest)}; give --speed {_down(fastest)}, or less"
        )
    return room


def check_target(target: Target, sizes: Callable[[Job], Sizes | None], job: Job) -> None:
    """Refuse what needs no measuring to be refused; raises as `room_for` and `sizes` do."""
    known = sizes(job)
    if known is None:  # they are told by a file that is yet to be made
        return
    if target.speed is None:
        _bytes(job, known, target)
    else:
        check_kernels()


def _bytes(job: Job, sizes: Sizes, target: Target) -> int:
    asked = target.bytes if target.bits is None else int(target.bits * job.parameters / 8)
    assert asked is not None
    least = smallest(job, sizes, sizes)
    if asked < least:
        raise RecipeError(
            f"{job.source} cannot be made as small as {size_words(asked)}: linears, head and what stays as it is "
            f"take at least {size_words(int(least))}; give --size {int(least)} (or --bits {_up(8 * least / job.parameters)}), "
            "or more"
        )
    return asked


def smallest(job: Job, limit: Limit, sizes: Sizes) -> float:
    """The least that a model of these linears takes."""
    ends = (limit.of_head, limit.of_embedding)
    least = limit.rest + sum(min(of(kind) for kind in (None, *sizes.ends)) for of in ends)
    return least + sum(min(limit.linear(x, level) for level in sizes.levels) for x in job.linears)


def _up(bits: float) -> str:
    """Not less than it is, for a person who is going to ask for it."""
    return f"{math.ceil(1000 * bits) / 1000:.3f}"


def _down(speed: float) -> str:
    """Not more than it is."""
    digits = max(0, 2 - math.floor(math.log10(speed)))
    return f"{math.floor(speed * 10**digits) / 10**digits:g}"
