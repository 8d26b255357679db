"""What a search tries first: each allocator over a grid of its strengths, then where Optuna expects more.

The grid is fixed, starts with what each allocator does when nothing is chosen, and holds the values of the papers; after
it Optuna's TPE (seeded, so the same every time) proposes strengths between and beyond. A study may live in a storage that
several machines share: each takes the next proposal that nobody has taken and tells its score to all, so a grid is done as
many times faster as there are machines, and every machine goes on from the best of the whole study. A study only decides what
is tried: a machine whose storage fails goes on alone.
"""

from __future__ import annotations

__all__ = ["BLENDS", "OWL_MS", "Grid", "families_for"]

import itertools
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from tawny.allocation.alpha import Alpha
from tawny.allocation.atp import Atp, largest_beta
from tawny.allocation.blend import Blend
from tawny.allocation.dlp import Dlp
from tawny.allocation.lsa import Lsa
from tawny.allocation.owl import Owl
from tawny.allocation.profile import Allocation
from tawny.allocation.scores import half_band
from tawny.errors import MissingFeature, RecipeError, TawnyError, first_line
from tawny.search.evolution import Proposal

T = TypeVar("T")
Values = dict[str, Any]
_COUNTING = ("WAITING", "RUNNING", "COMPLETE")
_TRIES = 5  # two machines that make the same tables are in each other's way
OWL_MS = (3.0, 5.0, 7.0, 10.0)
# The default first; half of the slope of depth was better than all of it on text unlike the calibration's.
BLENDS = (Blend.of, "atp,owl", "atp,uniform", "alpha,owl")


@dataclass(frozen=True)
class Family:
    """One allocator and its strengths.

    Attributes:
        make: the allocator for some strengths.
        options: its options that these decide, for its name.
        choices: strengths that are one of a few values.
        ranges: strengths that are numbers within bounds.
        grid: what is tried first, and first of it the strengths that the allocator has when none is given.
    """

    make: Callable[..., Any]
    options: tuple[str, ...]
    choices: Mapping[str, Sequence[Any]]
    ranges: Mapping[str, tuple[float, float]]
    grid: Sequence[Values]


def families_for(names: Sequence[str], target: float, blocks: int) -> dict[str, Family]:
    """Families by name; what strengths make sense depends on the sparsity and the depth."""
    steepest = largest_beta(target, blocks)
    band = half_band(target)  # of ATP and LSA where nobody chooses
    nearest_end = min(target, 1 - target)
    slope = min(1.0, band / nearest_end) if nearest_end > 0 else 0.0
    every = {
        "owl": Family(
            lambda M, strength: Owl(M=M, lambda_=strength),
            ("M", "lambda_"),
            {"M": OWL_MS},
            {"strength": (0.01, 0.25)},
            [{"M": M, "strength": value} for value in (0.08, 0.15, 0.04) for M in (5.0, 7.0, 3.0, 10.0)],
        ),
        "dlp": Family(
            lambda strength: Dlp(alpha=strength),
            ("alpha",),
            {},
            {"strength": (0.02, 0.3)},
            [{"strength": value} for value in (0.15, 0.1, 0.05, 0.2)],
        ),
        "atp": Family(
            lambda strength: Atp(beta=strength * steepest),
            ("beta",),
            {},
            {"strength": (0.0, 1.0)},
            [{"strength": value} for value in dict.fromkeys((slope, 0.5, 0.25, 0.75))],
        ),
        "lsa": Family(
            lambda part, strength: Lsa(alpha=strength, granularity=part),
            ("granularity", "alpha"),
            {"part": ("block", "linear")},
            {"strength": (0.02, 0.3)},
            [
                {"part": part, "strength": value}
                for value in dict.fromkeys((band, 0.15, 0.05))
                for part in ("block", "linear")
            ],
        ),
        "alpha": Family(
            lambda strength: Alpha(epsilon=strength),
            ("epsilon",),
            {},
            {"strength": (0.05, 0.5)},
            [{"strength": value} for value in (0.3, 0.2, 0.1)],
        ),
        "blend": Family(Blend, ("of",), {"of": BLENDS}, {}, [{"of": of} for of in BLENDS]),
    }
    return {name: every[name] for name in names}


def check_study(storage: str | None, *, opened: bool = True) -> None:
    """What a `Grid` will ask of Optuna and of a shared study, before there is work to lose.

    Args:
        opened: whether to see if the storage opens, which makes one of a file that is not there.

    Raises:
        MissingFeature: Optuna is not installed.
        RecipeError: the storage cannot be opened, or names an environment variable that is not set.
    """
    optuna = _optuna()
    if storage is None:
        return
    url = _filled(storage)
    if not opened:
        return
    try:
        _patiently(lambda: optuna.study.get_all_study_names(storage=url))
    except Exception as error:  # each database's driver has exceptions of its own
        raise RecipeError(
            f"allocator.study {storage!r} cannot be opened ({_reason(error)}); expected a storage of Optuna such as "
            "sqlite:///search.db"
        ) from error


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingFeature(
            "the allocator auto needs Optuna: pip install 'tawny[search]' (or choose another, such as -a owl)"
        ) from None
    return optuna


def _patiently(act: Callable[[], T]) -> T:
    """What it gives, tried a few times."""
    for _ in range(_TRIES - 1):
        try:
            return act()
        except Exception:
            time.sleep(random.SystemRandom().uniform(0.02, 0.2))  # the seed of no search is touched
    return act()


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error  # Optuna's own words are about any failure of a database
    return first_line(cause)[:160]


class Grid:
    """The proposals of one search, driven by an Optuna study through ask and tell.

    Args:
        families: by name.
        allocate: the allocation of one allocator, from the one profile that was taken.
        seed: of what comes after the grid.
        extra: how many proposals may come after the grid.
        storage: URL of a shared study, environment variables in it filled in; None keeps it in memory.
        name: of the study: everything that a score depends on, so that only like joins like.
        owner: who asks: what it asked for before and never told, in a run that was stopped, is free again.
        say: told once when the storage fails.

    Attributes:
        failed: why the storage was given up, or "".

    Raises:
        MissingFeature: Optuna is not installed.
        RecipeError: the storage names an environment variable that is not set.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        allocate: Callable[[str, Any], Allocation],
        *,
        seed: int,
        extra: int,
        storage: str | None = None,
        name: str = "tawny",
        owner: str = "",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._optuna = optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.families, self.allocate, self.owner, self.say = families, allocate, owner, say
        self.failed = ""
        rows = [
            [
                {"allocator": family, **{f"{family}.{key}": value for key, value in values.items()}}
                for values in made.grid
            ]
            for family, made in families.items()
        ]
        # In turn, so that few trials see a bit of everything.
        self._fixed = [
            values for turn in itertools.zip_longest(*rows) for values in turn if values is not None
        ]
        self.left = len(self._fixed) + extra if families else 0
        self.shared = storage is not None
        self._asked: list[Any] = []
        self._told: list[tuple[Any, float]] = []
        self._sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=len(self._fixed))
        url = None if storage is None else _filled(storage)
        self._surely(lambda: _patiently(lambda: self._open(url, name)), lambda: None)

    def ask(self, count: int) -> list[Proposal]:
        proposals: list[Proposal] = []
        while self.left > 0 and len(proposals) < count:
            self.left -= 1
            family, values, trial = self._surely(self._next)
            self._asked.append(trial)
            proposals.append(self._proposal(family, values, trial))
        return proposals

    def tell(self, proposal: Proposal, score: float) -> None:
        if proposal.token is not None:
            self._surely(lambda: self._tell(proposal.token, score))
            self._told.append((proposal.token, score))

    def _open(self, url: str | None, name: str) -> None:
        self.study = self._optuna.create_study(
            storage=url, study_name=name, sampler=self._sampler, load_if_exists=True
        )
        self.free()
        held = [_values(trial) for trial in self._trials(_COUNTING)]
        for values in self._fixed:
            if values not in held:
                self.study.enqueue_trial(values)
        if self.shared:
            self._thin()

    def _thin(self) -> None:
        """Of what two machines have enqueued at once, leave what was first."""
        kept: list[Values] = []
        for trial in sorted(self._trials(_COUNTING), key=lambda t: (t.state.name == "WAITING", t.number)):
            if _values(trial) not in kept:
                kept.append(_values(trial))
            elif trial.state.name == "WAITING":
                with suppress(
                    self._optuna.exceptions.UpdateFinishedTrialError
                ):  # the other machine was faster
                    self.study._storage.set_trial_state_values(
                        trial._trial_id, self._optuna.trial.TrialState.FAIL
                    )

    def _surely(self, act: Callable[[], T], alone: Callable[[], T] | None = None) -> T:
        """What it gives; where the shared storage fails, what it gives without that."""
        try:
            return act()
        except Exception as error:  # each database's driver has exceptions of its own
            if not self.shared:
                raise
            self._part(error)
        return (alone or act)()

    def _part(self, error: Exception) -> None:
        """Go on in memory, with what this machine has asked for and told."""
        self.shared, self.failed = False, _reason(error)
        self.say(f"allocator.study cannot be used any more ({self.failed}): the search goes on without it")
        self.study = self._optuna.create_study(sampler=self._sampler)
        for trial, score in self._told:
            self._tell(trial, score)
        tried = [trial.params for trial in self._asked]
        for values in self._fixed:
            if values not in tried:
                self.study.enqueue_trial(values)

    def _next(self) -> tuple[str, Values, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a grid whose values another version had
            trial = self.study.ask()
            if self.shared:
                trial.set_user_attr("owner", self.owner)
            family = trial.suggest_categorical("allocator", list(self.families))
            return family, self._suggest(family, trial), trial

    def _tell(self, trial: Any, score: float) -> None:
        if trial.study is self.study:
            self.study.tell(trial, score, skip_if_finished=True)
        else:  # it was asked for where it can no longer be told
            made = self._optuna.trial.create_trial
            self.study.add_trial(made(params=trial.params, distributions=trial.distributions, value=score))

    def _trials(self, states: Sequence[str]) -> list[Any]:
        return [t for t in self.study.get_trials(deepcopy=False) if t.state.name in states]

    def free(self) -> None:
        """Give up what this owner has asked for and not told, in a run that was stopped."""
        for trial in self._trials(["RUNNING"]):
            if trial.user_attrs.get("owner") == self.owner:
                self.study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def of_others(self) -> list[Proposal]:
        """The best of each family that any machine has told of; empty for a study of one's own."""
        if not self.shared:
            return []
        best: dict[str, tuple[float, Values]] = {}
        for trial in self._surely(lambda: self._trials(["COMPLETE"]), list):
            family = trial.params.get("allocator")
            if family in self.families:
                values = {
                    key.partition(".")[2]: value for key, value in trial.params.items() if key != "allocator"
                }
                told = (float(trial.value), values)
                best[str(family)] = min(best.get(str(family), told), told, key=_first)
        return [self._proposal(family, values, None) for family, (_, values) in best.items()]

    def _suggest(self, family: str, trial: Any) -> Values:
        made = self.families[family]
        values: Values = {
            key: trial.suggest_categorical(f"{family}.{key}", list(options))
            for key, options in made.choices.items()
        }
        for key, (low, high) in made.ranges.items():
            values[key] = trial.suggest_float(f"{family}.{key}", low, high)
        return values

    def _proposal(self, family: str, values: Values, token: Any) -> Proposal:
        made = self.families[family]
        allocator = made.make(**values)
        named = " ".join(f"{key.rstrip('_')}={_shown(getattr(allocator, key))}" for key in made.options)
        try:
            allocation = self.allocate(family, allocator)
        except TawnyError as error:
            raise type(error)(f"while trying {family} {named}: {error}") from error
        return Proposal(f"{family} {named}", allocation, token)


def _values(trial: Any) -> Values:
    found: Values = trial.system_attrs.get("fixed_params", trial.params)
    return found


def _filled(storage: str) -> str:
    """The URL with environment variables in the place of their names."""
    for braced, bare in re.findall(r"\$(?:\{(\w+)\}|(\w+))", storage):
        if (braced or bare) not in os.environ:
            raise RecipeError(
                f"allocator.study {storage!r} names the environment variable {braced or bare}, which is not set"
            )
    return os.path.expandvars(storage)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _first(pair: tuple[float, Values]) -> float:
    return pair[0]
