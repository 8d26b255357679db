"""Pictures say what they were given, and the same numbers give the same picture."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tawny.report.plot import plot_allocations, plot_fit, plot_profile

SCRIPT = Path(__file__).parents[2] / "scripts" / "docs_images.py"

ALLOCATIONS = {"uniform": [0.7] * 4, "owl": [0.6, 0.7, 0.7, 0.8], "dlp": [0.5, 0.7, 0.8, 0.8]}
REPORT = {
    "source": "a model",
    "shares": {"3": [2.0, 1.0, 1.0, 0.5], "5": [1.0, 0.5, 0.0, 0.1]},
    "allocations": ALLOCATIONS,
    "sparsity": 0.7,
}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_numbers_give_the_same_bytes(suffix, tmp_path):
    made = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}{suffix}"
        plot_allocations(ALLOCATIONS, path, sparsity=0.7, outliers=[1.0, 0.5, 0.2, 0.1], M="5", title="m")
        made.append(path.read_bytes())
    assert made[0] == made[1] and len(made[0]) > 5000


def test_more_allocators_than_colours_and_no_outliers_are_drawn(tmp_path):
    many = {f"owl {i}": [0.5 + i / 100, 0.5 - i / 100] for i in range(11)}
    plot_allocations(many, tmp_path / "many.svg", sparsity=0.5)
    assert (tmp_path / "many.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_dollars_in_names_are_no_formula(suffix, tmp_path):
    name = r"/models/$x^$/\frac{"
    allocations = {"uniform": [0.7] * 4, f"owl {name}": ALLOCATIONS["owl"]}
    plot_allocations(allocations, tmp_path / f"a{suffix}", sparsity=0.7, title=name)
    plot_profile({**REPORT, "source": name, "allocations": allocations}, tmp_path / f"p{suffix}")
    assert (tmp_path / f"a{suffix}").stat().st_size > 5000 < (tmp_path / f"p{suffix}").stat().st_size


def test_a_profile_without_outliers_somewhere_is_drawn(tmp_path):
    plot_profile(REPORT, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def images():
    return runpy.run_path(str(SCRIPT))


def test_models_of_different_depth_share_one_axis(images, tmp_path):
    images["plot_outliers"]({"two $x^$": [1.0, 2.0], "four": [0.5, 0.4, 0.3, 0.2]}, tmp_path / "o.svg")
    drawn = (tmp_path / "o.svg").read_text(encoding="utf-8")
    assert "two $x^$, 2 blocks" in drawn and "four, 4 blocks" in drawn


def test_notes_stand_beside_the_points_of_a_frontier(images, tmp_path):
    lines = {"ours $x^$": [(700.0, 0.1, 0.01), (900.0, 0.04, 0.01)], "theirs": [(750.0, 0.4, 0.02)]}
    notes = {"ours $x^$": ["smaller", "larger"], "theirs": ["other"]}
    images["plot_frontier"](lines, tmp_path / "n.svg", text="wiki", title="m", notes=notes)
    drawn = (tmp_path / "n.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {word} -->" in drawn for word in ("smaller", "larger", "other", "0.1", "ours $x^$"))
    images["plot_frontier"](lines, tmp_path / "p.svg", text="wiki", title="m", apart=list(lines))
    assert "smaller" not in (tmp_path / "p.svg").read_text(encoding="utf-8")


def test_a_fit_is_drawn_linear_by_linear(tmp_path):
    finalists = [{"name": "bits $x^$", "bytes": 4_900_000, "kl": 0.125, "kl_stderr": 0.01}]
    roles = {
        "mlp.up_proj": {"bits": [4, 6, 16], "sparsity": [0.0, 0.5, 0.0]},
        "mlp.experts.*.down_proj": {"bits": [None, 3.25, 4], "sparsity": [None, 0.0, 0.0]},
    }
    told = {"source": "a model", "winner": "bits $x^$", "roles": roles, "finalists": finalists}
    for name, budget in (("a.svg", 5_000_000), ("b.svg", None)):
        plot_fit(told | {"curve": [(4_000_000, 0.2), (6_000_000, 0.1)], "budget": budget}, tmp_path / name)
        drawn = (tmp_path / name).read_text(encoding="utf-8")
        texts = ("<!-- 3.25 -->", "<!-- −50% -->", "<!-- up_proj -->", "<!-- 16 -->")
        assert all(text in drawn for text in texts) and ("<!-- asked for -->" in drawn) == bool(budget)
