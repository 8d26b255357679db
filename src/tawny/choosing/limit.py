"""What a fit is asked for: bytes, bits a weight, tokens a second, or a machine's memory; and what may be spent on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from tawny.choosing.pace import Pace, ReadPerToken, check_kernels
from tawny.choosing.sizes import Limit, Sizes
from tawny.decoding.sequences import bytes_of_text
from tawny.errors import RecipeError
from tawny.kinds import solved_kind
from tawny.model.context import check_context
from tawny.pruning.prepare import Job
from tawny.run.memory import parse_size
from tawny.words import size as size_words

CONTEXT = 4096  # tokens of a text, where nobody says
_PROGRAM = 500_000_000  # 427 MB of interpreter and libraries were measured, and a token's forward takes some


@dataclass(frozen=True)
class Target:
    """One of the four.

    Attributes:
        bytes: of the weight files and their index.
        bits: the same for each weight of the model.
        speed: tokens a second of one sequence on this machine.
        ram: of the machine that decodes: weights, keys and values of `context` tokens, and the program itself.
    """

    bytes: int | None = None
    bits: float | None = None
    speed: float | None = None
    ram: int | None = None
    context: int = CONTEXT

    @classmethod
    def of(
        cls,
        size: str | int | None,
        bits: float | None,
        speed: float | None,
        ram: str | int | None = None,
        context: int | None = None,
    ) -> Target:
        """
        Raises:
            RecipeError: none or several are given, or one that cannot be.
        """
        given = {"size": size, "bits": bits, "speed": speed, "ram": ram}
        named = [f"{name} {value}" for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise RecipeError(
                "say what the model may take: either size (such as 700MB), bits a weight (such as 4.25), speed (tokens a second), or ram "
                "(such as 8GB)" + (f"; {' and '.join(named)} are several" if named else "")
            )
        if bits is not None and not 0 < float(bits) <= 32:
            raise RecipeError(f"bits {bits} is not possible; expected bits a weight in (0, 32], such as 4.25")
        if speed is not None and not 0 < float(speed) < math.inf:
            raise RecipeError(f"speed {speed} is not possible; expected tokens a second above 0, such as 20")
        if context is not None and ram is None:
            raise RecipeError(f"context {context} belongs to ram: give --ram with it, or leave it out")
        if context is not None and context < 1:
            raise RecipeError(f"context {context} is not possible; expected a number of tokens above 0")
        return cls(
            parse_size(size, "size"),
            None if bits is None else float(bits),
            None if speed is None else float(speed),
            parse_size(ram, "ram"),
            context or CONTEXT,
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
    if target.ram is not None:
        asked = target.ram - _beside_weights(job, target.context)
    elif target.bits is not None:
        asked = int(target.bits * job.parameters / 8)
    else:
        assert target.bytes is not None
        asked = target.bytes
    least = smallest(job, sizes, sizes)
    if asked < least:
        if target.ram is not None:
            needed = target.ram - asked + int(least)
            raise RecipeError(
                f"{job.source} does not fit into {size_words(target.ram)}: its weights take at least {size_words(int(least))}, and "
                f"{target.context:,} tokens and the program {size_words(target.ram - asked)}; give --ram {needed}, or a smaller --context"
            )
        raise RecipeError(
            f"{job.source} cannot be made as small as {size_words(asked)}: linears, head and what stays as it is "
            f"take at least {int(least):,} bytes; give --size {int(least)} (or --bits {_up(8 * least / job.parameters)}), "
            "or more"
        )
    whole = _unrounded(job, sizes)
    if whole is not None and asked >= whole:
        raise RecipeError(
            f"{job.source} takes {int(whole):,} bytes with nothing rounded, which {size_words(asked)} allow: ask for less, or name the "
            "kinds to round to with --kinds"
        )
    return asked


def _beside_weights(job: Job, context: int) -> int:
    """What decoding takes beside the weights: keys and values of a text, and the program."""
    from tawny.model.skeleton import open_skeleton

    assert job.folder is not None
    check_context(job.stack.model, context)
    return _PROGRAM + bytes_of_text(open_skeleton(job.folder, torch.bfloat16).to("meta"), context)


def _unrounded(job: Job, sizes: Sizes) -> float | None:
    """What a model takes of which every linear stays as it is; None where none may."""
    floats = [level for level in sizes.levels if not solved_kind(level.kind).scaled]
    if not floats:
        return None
    return (
        sizes.rest
        + sizes.of_head(None)
        + sizes.of_embedding(None)
        + sum(sizes.linear(x, floats[0]) for x in job.linears)
    )


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
