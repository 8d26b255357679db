"""OWL against its formula, its official mode against what the authors' code does, and its edges."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation import LinearInfo, Owl, Profile, Uniform, measure_outliers
from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError, RecipeError
from tests.reference import official
from tests.reference.allocators import mean_sparsity, model, removed_in_all

Block = dict[str, tuple[torch.Tensor, Statistics | None]]


def block_of(seed: int, tail: float = 3.0, tokens: int = 20) -> Block:
    """Three linears whose inputs have a tail, so that some scores stand out."""
    dice = torch.Generator().manual_seed(seed)
    made: Block = {}
    for name, (out, width) in {"q": (12, 16), "k": (4, 16), "down": (16, 24)}.items():
        squared = (torch.randn(width, generator=dice) * tail).exp()
        made[f"{seed}.{name}"] = (torch.randn(out, width, generator=dice), Statistics(tokens, squared))
    return made


def with_shares(shares: list[float], **kwargs: Any) -> Profile:
    return model(len(shares), measures=[{"outlier_share": {"5": share}} for share in shares], **kwargs)


def test_the_outlier_share_is_what_the_formula_says() -> None:
    block = block_of(0)
    scores = torch.cat(
        [(W.abs().double() * s.squared_norms.sqrt()).flatten() for W, s in block.values() if s]
    )
    measured = measure_outliers(block, (3, 5, 7.5))
    for M, key in ((3, "3"), (5, "5"), (7.5, "7.5")):
        expected = 100 * float((scores > M * scores.mean()).sum()) / len(scores)
        assert measured["outlier_share"][key] == pytest.approx(expected)
    assert 0 < measured["outlier_share"]["7.5"] < measured["outlier_share"]["3"]
    assert measured["parameters"] == len(scores) == 640
    assert measured["mean_score"] == pytest.approx(float(scores.mean()) / math.sqrt(20), rel=1e-5)
    assert measured["max_score"] == pytest.approx(float(scores.max()) / math.sqrt(20), rel=1e-5)


def test_a_measure_is_fit_for_json_and_for_the_allocator() -> None:
    measures = [json.loads(json.dumps(Owl().measure(block_of(seed)))) for seed in range(3)]
    allocation = Owl().allocate(model(3, measures=measures), 0.7)
    assert len(set(allocation.values())) > 1


def test_shares_and_scores_do_not_depend_on_how_much_text_was_read() -> None:
    block = block_of(1)
    longer: Block = {
        n: (W, Statistics(9 * s.tokens, 9 * s.squared_norms)) for n, (W, s) in block.items() if s
    }
    first, second = measure_outliers(block, (5,)), measure_outliers(longer, (5,))
    assert first["outlier_share"] == second["outlier_share"]
    assert first["mean_score"] == pytest.approx(second["mean_score"])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 9)), min_size=1, max_size=12),
    st.floats(0, 0.5),
    st.floats(0, 1),
    st.booleans(),
)
def test_the_budget_is_exact_and_outliers_keep_more(blocks, lam, target, reverse):
    linears = tuple(
        LinearInfo(f"{b}.{i}", (size, 50 + 10 * i), b) for b, (_, size) in enumerate(blocks) for i in range(2)
    )
    profile = Profile(linears, tuple({"outlier_share": {"5": share}} for share, _ in blocks))
    allocation = Owl(lambda_=lam, reverse=reverse).allocate(profile, target)
    assert removed_in_all(allocation, profile) == round(target * sum(profile.sizes.values()))
    assert all(0 <= value <= 1 for value in allocation.values())
    order = sorted(range(len(blocks)), key=lambda b: blocks[b][0], reverse=reverse)
    ratios = [allocation[f"{b}.0"] for b in order]
    assert all(b <= a + 1 / 50 for a, b in itertools.pairwise(ratios))
    for block in range(len(blocks)):
        first, second = (allocation[f"{block}.{i}"] for i in range(2))
        assert abs(first - second) <= 1 / 50 + 1 / 60  # one ratio a block, to a weight


def test_the_band_is_two_lambda_wide_and_centred_on_the_budget() -> None:
    profile = with_shares([0.0, 1.0, 4.0], widths=((100, 100), (50, 200)))
    allocation = Owl(lambda_=0.1).allocate(profile, 0.7)
    ratios = [allocation[f"{block}.0"] for block in range(3)]
    assert ratios[0] - ratios[2] == pytest.approx(0.2, abs=1e-3)
    assert ratios[0] - ratios[1] == pytest.approx(0.05, abs=1e-3)
    assert mean_sparsity(allocation, profile) == pytest.approx(0.7)


def test_larger_blocks_weigh_more() -> None:
    linears = (LinearInfo("a", (90, 100), 0), LinearInfo("b", (10, 100), 1))
    profile = Profile(linears, ({"outlier_share": {"5": 0.0}}, {"outlier_share": {"5": 1.0}}))
    allocation = Owl(lambda_=0.1).allocate(profile, 0.5)
    assert allocation == pytest.approx({"a": 0.52, "b": 0.32})
    unweighted = Owl(lambda_=0.1, compat="official").allocate(profile, 0.5)
    assert unweighted == pytest.approx({"a": 0.6, "b": 0.4})


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("shares", [[2.0, 2.0, 2.0], [0.0], [0.0, 0.0]])
def test_equal_outlier_shares_are_uniform(shares: list[float], compat: Any) -> None:
    uniform = Uniform(compat=compat).allocate(with_shares(shares), 0.7)
    assert Owl(compat=compat).allocate(with_shares(shares), 0.7) == uniform
    if compat is None:  # and so is a band of no width
        unequal = with_shares([share + block for block, share in enumerate(shares)])
        assert Owl(lambda_=0).allocate(unequal, 0.7) == uniform


def test_a_block_that_is_left_out_of_pruning_has_no_say() -> None:
    linears = tuple(linear for linear in model(3).linears if linear.block != 1)
    shares = ({"outlier_share": {"5": 1.0}}, {}, {"outlier_share": {"5": 3.0}})
    allocation = Owl(lambda_=0.1).allocate(Profile(linears, shares), 0.5)
    assert allocation["0.0"] == pytest.approx(0.6, abs=0.01)
    assert allocation["2.0"] == pytest.approx(0.4, abs=0.01)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0, 100, allow_subnormal=False), min_size=2, max_size=40).filter(
        lambda shares: max(shares) - min(shares) > 1e-300  # nearer to each other, the official code overflows
    ),
    st.floats(0, 0.5),
    st.floats(0, 0.99),
)
def test_official_ratios_are_reproduced_to_the_bit(shares: list[float], lam: float, target: float) -> None:
    allocation = Owl(lambda_=lam, compat="official").allocate(with_shares(shares), target)
    expected = official.owl_sparsity(shares, lam, target)
    assert [allocation[f"{block}.0"] for block in range(len(shares))] == [min(s, 1.0) for s in expected]


def test_shares_too_close_to_divide_by_their_distance_are_equal() -> None:
    for spread in (0.0, 5e-324, 2e-309):
        allocation = Owl(compat="official").allocate(with_shares([0.0, spread]), 0.6)
        assert set(allocation.values()) == {0.6}


@pytest.mark.parametrize("M", [2.0, 3.0, 5.0])
def test_official_outlier_shares_are_reproduced_to_the_bit(M: float) -> None:
    for seed in range(20):
        block = block_of(seed)
        expected = official.outlier_share([(W, s.squared_norms) for W, s in block.values() if s], M)
        measured = Owl(M=M, compat="official").measure(block)["outlier_share"]
        assert measured == {f"{M:g}": expected}


def test_official_turns_a_ratio_that_is_not_positive_into_one_percent() -> None:
    allocation = Owl(lambda_=0.5, compat="official").allocate(with_shares([0.0, 0.0, 1.0]), 0.3)
    assert allocation["2.0"] == 0.01


def test_a_share_that_is_not_there_or_not_a_number_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"M = 5; expected 7"):
        Owl(M=7).allocate(with_shares([1.0, 2.0]), 0.7)
    with pytest.raises(NumericalError, match="block 1"):
        Owl().allocate(with_shares([1.0, math.nan]), 0.7)


@pytest.mark.parametrize("where", ["weight", "input"])
def test_a_block_with_a_number_that_is_not_finite_is_an_error_with_its_linear(where: str) -> None:
    block = block_of(0)
    W, statistics = block["0.k"]
    (W[1] if where == "weight" else statistics.squared_norms)[2] = math.nan
    with pytest.raises(NumericalError, match=r"0\.k \[4, 16\]"):
        Owl().measure(block)


def test_a_block_of_zeros_has_no_outliers() -> None:
    zeros: Block = {"q": (torch.zeros(4, 8), Statistics(0, torch.zeros(8)))}
    assert measure_outliers(zeros, (5,))["outlier_share"] == {"5": 0.0}
    assert measure_outliers({}, (5,)) == {
        "outlier_share": {"5": 0.0},
        "mean_score": 0.0,
        "max_score": 0.0,
        "parameters": 0,
    }


def test_the_official_code_knows_one_granularity() -> None:
    with pytest.raises(RecipeError, match="granularity"):
        Owl(compat="official", granularity="linear")


def test_a_measure_leaves_weights_and_statistics_alone() -> None:
    block = block_of(3)
    before = {n: (W.clone(), s.squared_norms.clone()) for n, (W, s) in block.items() if s}
    Owl().measure(block)
    for name, (W, statistics) in block.items():
        assert torch.equal(W, before[name][0]) and torch.equal(statistics.squared_norms, before[name][1])


@pytest.mark.parametrize("granularity", ["module", "linear"])
def test_finer_units_have_their_own_mean_and_their_own_ratio(granularity) -> None:
    infos, measures, shares = [], [], {}
    owl = Owl(M=2, lambda_=0.1, granularity=granularity)
    for block in range(2):
        linears = {
            f"{block}.{'mlp' if part.endswith('down') else 'attn'}.{part}": inputs
            for part, inputs in block_of(block).items()
        }
        measures.append(json.loads(json.dumps(owl.measure(linears))))
        units: dict[str, list[torch.Tensor]] = {}
        for name, (W, statistics) in linears.items():
            infos.append(LinearInfo(name, (W.shape[0], W.shape[1]), block))
            unit = name if granularity == "linear" else name.rsplit(".", 2)[0]
            units.setdefault(unit, []).append((W.abs() * statistics.squared_norms.sqrt()).flatten())
        for unit, parts in units.items():
            scores = torch.cat(parts)
            shares[unit] = float((scores > 2 * scores.mean()).double().mean())
    allocation = owl.allocate(Profile(tuple(infos), tuple(measures)), 0.7)
    low, high = min(shares.values()), max(shares.values())
    wish = {
        info.name: -0.2 * (next(v for u, v in shares.items() if info.name.startswith(u)) - low) / (high - low)
        for info in infos
    }
    total = sum(info.numel for info in infos)
    shift = 0.7 - sum(wish[info.name] * info.numel for info in infos) / total
    for info in infos:
        assert abs(allocation[info.name] - wish[info.name] - shift) <= 2 / info.numel
