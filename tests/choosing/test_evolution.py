"""The search is a pure function: here what it evaluates is a made-up function of the levels."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation.profile import LinearInfo
from tawny.choosing.evolution import Proposal, evolve
from tawny.choosing.space import make_space
from tawny.patterns import NM, Unstructured


def linears(blocks: int = 4, shapes=((8, 8), (8, 8), (4, 8), (24, 8))) -> tuple[LinearInfo, ...]:
    return tuple(LinearInfo(f"b{b}.l{i}", shape, b) for b in range(blocks) for i, shape in enumerate(shapes))


def towards(goal, noise=0.0):
    """Divergence grows with the distance from `goal`; windows differ by noise that is theirs."""

    def evaluate(candidates, windows):
        evaluate.calls.append((list(candidates), list(windows)))
        made = []
        for levels in candidates:
            distance = sum((a - b) ** 2 for a, b in zip(levels, goal, strict=True)) / len(goal)
            drawn = [random.Random(f"{levels} {w}").random() for w in windows]
            made.append(1 + distance + noise * sum(drawn) / len(drawn))
        return made

    evaluate.calls = []
    return evaluate


@pytest.fixture
def space():
    return make_space(linears(), Unstructured(), 0.5, 11)


def tilted(space):
    """An allocation that takes more from later blocks."""
    return {x.name: 0.35 + 0.1 * x.block for x in space.linears}


OPTIONS = {"trials": 200, "offspring": 8, "windows": range(8), "deciding": range(8, 16)}


def evolved(space, evaluate, offers=(), **options):
    """What comes of a search in which these allocations are proposed, by name."""
    proposals = (Proposal(name, wish) for name, wish in offers)
    return evolve(space, proposals, evaluate, **{**OPTIONS, **options})


def excess_of(space, levels):
    """Weights that are removed beyond the budget."""
    return sum(level * step for level, step in zip(levels, space.steps, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.floats(0.05, 0.95),
    st.integers(0, 10**6),
)
def test_rounding_and_switching_keep_the_budget(units, target, seed):
    chance = random.Random(seed)
    infos = linears(3, tuple((64 * a, 32 * b) for a, b in units))
    space = make_space(infos, Unstructured(), target, 11)
    wish = {x.name: min(1.0, max(0.0, target + chance.uniform(-0.2, 0.2))) for x in infos}
    total = sum(x.numel for x in infos)
    shift = target - sum(wish[x.name] * x.numel for x in infos) / total
    levels = space.nearest({name: value + shift for name, value in wish.items()})
    assert abs(excess_of(space, levels)) <= max(space.steps)
    excess = excess_of(space, levels)
    for _ in range(10):
        levels = space.mutated(levels, chance)
        assert excess_of(space, levels) == excess
        assert all(space.low <= level <= space.high for level in levels)
    allocation = space.allocation(levels)
    removed = sum(round(allocation[x.name] * x.numel) for x in infos)
    assert removed == round(target * total)


def test_a_block_between_two_levels_gets_some_of_each():
    infos = linears(2, ((8, 8),) * 4)
    space = make_space(infos, Unstructured(), 0.5, 5)
    up = 1 / 16  # half a level
    wish = {x.name: 0.5 + (up if x.block == 0 else -up) for x in infos}
    levels = space.nearest(wish)
    assert sum(levels[:4]) == 2 and sum(levels[4:]) == -2 and excess_of(space, levels) == 0


def test_levels_stay_inside_what_a_weight_can_lose():
    for target, count in ((0.02, 11), (0.97, 11), (0.5, 3), (0.0, 5)):
        space = make_space(linears(), Unstructured(), target, count)
        for i in range(len(space.linears)):
            for level in space.levels:
                assert 0 <= target + level * space.steps[i] / space.linears[i].numel < 1
    space = make_space(linears(), NM(2, 4), 0.5, 11)
    assert [space.sparsity(0, level) for level in space.levels] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("pattern", "target"),
    [
        (Unstructured(), 0.995),
        (NM(1, 4), 0.75),
        (NM(4, 4), 0),
    ],
)
def test_levels_that_nothing_can_be_exchanged_for_are_left_out(pattern, target):
    assert list(make_space(linears(), pattern, target, 11).levels) == [0]


def test_the_search_walks_to_the_goal_and_repeats_itself(space):
    chance = random.Random(3)
    goal = space.uniform
    for _ in range(12):
        goal = space.mutated(goal, chance)
    found = [evolved(space, towards(goal)) for _ in range(2)]
    first = found[0]
    assert first == found[1]
    start = towards(goal)([space.uniform], [0])[0]
    assert first.winner.verdict < 1 + 0.3 * (start - 1)
    assert first.generations == sorted(first.generations, reverse=True)
    assert len(first.trials) <= OPTIONS["trials"] and first.cut_short == ""
    assert first != evolved(space, towards(goal), seed=1)


def test_uniform_wins_where_nothing_is_better_and_is_scored_as_finely(space):
    evaluate = towards(space.uniform)
    found = evolved(space, evaluate, [("tilted", tilted(space))])
    assert found.winner is found.uniform and found.margin == 0
    assert found.uniform.windows == 8 and evaluate.calls[-1][1] == list(range(8, 16))
    assert space.uniform in evaluate.calls[-1][0]


def test_a_proposal_that_is_already_best_is_kept_as_it_was_given(space):
    wish = tilted(space)
    found = evolved(space, towards(space.nearest(wish)), [("tilted", wish), ("again", wish)], trials=40)
    assert found.winner.name == "tilted" and found.winner.allocation == wish and found.margin > 0
    assert [trial.name for trial in found.trials].count("tilted") == 1
    assert "again" not in {trial.name for trial in found.trials}


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_no_more_is_tried_than_was_asked_for(trials, space):
    offers = [(f"p{i}", {x.name: 0.35 + 0.01 * i for x in space.linears}) for i in range(9)]
    found = evolved(space, towards(space.uniform), offers, trials=trials)
    assert len(found.trials) <= trials


def test_an_allocation_is_held_where_there_are_solutions_for_it(space):
    low, high = space.sparsity(0, space.low), space.sparsity(0, space.high)
    gentle = {x.name: 0.3 + 0.4 * (x.block > 1) for x in space.linears}
    assert space.within(gentle) == gentle
    steep = {x.name: (0.05, 0.4, 0.6, 0.95)[x.block] for x in space.linears}
    held = space.within(steep)
    assert min(held.values()) >= low > 0.05 and max(held.values()) <= high < 0.95
    assert sum(held[x.name] * x.numel for x in space.linears) == 0.5 * sum(x.numel for x in space.linears)
    assert held["b0.l0"] < held["b1.l0"] < held["b2.l0"] < held["b3.l0"]
    mixed = make_space(linears(), NM(2, 4), 0.5, 3)
    assert set(mixed.within(steep).values()) <= {0.25, 0.5, 0.75}


def test_a_margin_is_a_number_when_a_model_has_broken_down(space):
    wish = tilted(space)

    def evaluate(candidates, windows):
        return [1.0 if levels == space.nearest(wish) else float("inf") for levels in candidates]

    found = evolved(space, evaluate, [("tilted", wish)], trials=2)
    assert found.winner.name == "tilted" and found.margin == 1.0
    assert evolved(space, lambda some, _: [float("nan")] * len(some), trials=2).margin == 0


def test_few_tokens_come_first_and_only_the_best_see_all_of_them(space):
    evaluate = towards(space.mutated(space.uniform, random.Random(1)), noise=0.1)
    evolved(space, evaluate)
    seen = {2: 0, 4: 0, 8: 0}
    for candidates, windows in evaluate.calls:
        seen[len(windows)] += len(candidates)
    assert seen[2] > seen[4] > 0 and seen[2] > 3 * seen[8]


def test_time_that_runs_out_is_said_and_still_gives_the_best_so_far(space):
    wish = tilted(space)
    offers = [(f"p{i}", wish) for i in range(100)]
    found = evolved(space, towards(space.nearest(wish)), offers, stopped=lambda: "out of time")
    assert found.cut_short.startswith("out of time after 2 of 200")
    assert found.winner.name == "p0" and found.generations == []


def test_a_broken_model_loses_to_every_other(space):
    def evaluate(candidates, windows):
        return [1.0 if levels == space.uniform else float("nan") for levels in candidates]

    found = evolved(space, evaluate, trials=30)
    assert found.winner is found.uniform


@pytest.mark.parametrize("shapes", [((8, 8),), ((8, 8), (4, 8), (16, 8))])
def test_a_model_in_which_nothing_can_be_switched_ends_with_uniform(shapes):
    space = make_space(linears(1, shapes), Unstructured(), 0.5, 11)
    found = evolved(space, towards(space.uniform))
    assert found.winner is found.uniform


def proving(scores, seen):
    """Prunes in earnest: made-up divergences, one when it is asked for."""

    def prove(allocations, windows):
        for allocation, score in zip(allocations, scores, strict=False):
            seen.append((allocation, list(windows)))
            yield score

    return prove


def search_for_tilted(space, scores, stopped=lambda seen: ""):
    """Uniform and the proposal that is best by `evaluate`, both pruned in earnest; what was found, and what was asked."""
    wish, seen = tilted(space), []
    keys = {"stopped": lambda: stopped(seen), "prove": proving(scores, seen), "finalists": 3}
    return evolved(space, towards(space.nearest(wish)), [("tilted", wish)], trials=2, **keys), seen


@pytest.mark.parametrize(
    ("scores", "winner"), [([2.0, 1.0], "tilted"), ([1.0, 2.0], "uniform"), ([1.0, float("nan")], "uniform")]
)
def test_what_was_pruned_in_earnest_has_the_last_word(scores, winner, space):
    found, seen = search_for_tilted(space, scores)
    assert [w for _, w in seen] == [list(range(8, 16))] * 2 and seen[1][0] == tilted(space)
    assert seen[0][0] == space.allocation(space.uniform)
    assert found.winner.name == winner and found.uniform.proof == scores[0]
    assert found.margin == pytest.approx(
        max(0.0, scores[0] - scores[1]) / scores[0] if winner == "tilted" else 0
    )


@pytest.mark.parametrize(("finalists", "proven"), [(0, 0), (1, 2), (2, 3), (9, 5)])
def test_as_many_are_pruned_in_earnest_as_asked_for_and_uniform(finalists, proven, space):
    goal = space.nearest(tilted(space))
    chance = random.Random(7)
    for _ in range(30):  # away from all that is proposed, so that switches find something better
        goal = space.mutated(goal, chance)
    offers = [(f"p{i}", {x.name: 0.5 + (x.block - 1.5) * i / 50 for x in space.linears}) for i in range(6)]
    seen: list = []
    prove = proving(range(9, 0, -1), seen)
    found = evolved(space, towards(goal), offers, prove=prove, finalists=finalists)
    assert len(seen) == proven
    told = [trial for trial in found.trials if trial.proof is not None]
    assert len(told) == proven
    if told:  # the last that was proven is the best of these made-up proofs, however bad its verdict
        assert found.winner.proof == min(trial.proof for trial in told)
        others = [t.verdict for t in found.trials if t.verdict is not None and t.proof is None]
        assert all(t.verdict <= min(others, default=t.verdict) for t in told if t is not found.uniform)


@pytest.mark.parametrize("finalists", [0, 2])
def test_what_will_be_pruned_in_earnest_is_chosen_on_some_of_the_windows_that_decide(finalists, space):
    evaluate, seen = towards(space.nearest(tilted(space))), []
    keys = {"trials": 2, "deciding": range(8, 40), "prove": proving([2.0, 1.0], seen), "finalists": finalists}
    evolved(space, evaluate, [("tilted", tilted(space))], **keys)
    assert evaluate.calls[-1][1] == list(range(8, 16 if finalists else 40))
    assert [w for _, w in seen] == [list(range(8, 40))] * finalists


def test_a_search_that_was_cut_short_is_decided_on_all_windows_that_decide(space):
    evaluate = towards(space.nearest(tilted(space)))
    keys = {"deciding": range(8, 40), "prove": proving([], []), "finalists": 3}
    evolved(space, evaluate, [("tilted", tilted(space))], stopped=lambda: "out of time", **keys)
    assert evaluate.calls[-1][1] == list(range(8, 40))


def test_finalists_that_there_is_no_time_for_are_decided_on_solutions(space):
    found, seen = search_for_tilted(space, [1.0, 2.0], stopped=lambda seen: "out of time" if seen else "")
    assert len(seen) == 1 and all(trial.proof is None for trial in found.trials)
    assert found.winner.name == "tilted" and "before its finalists" in found.cut_short
