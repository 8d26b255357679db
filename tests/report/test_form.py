"""What titles, cards and pages say of a model in few bits, pruned or not."""

from __future__ import annotations

import pytest

from tawny.errors import UserError
from tawny.kinds import range_of
from tawny.report.card import front_matter, model_card
from tawny.report.form import form_of
from tawny.report.html import render_report
from tests.report.records import record
from tests.report.test_html import Page


def rounded(kinds: list[str], pruned: bool):
    made = record(measured=False)
    linears = made["linears"]
    made["values"] = {x["name"]: kinds[i % len(kinds)] for i, x in enumerate(linears)}
    asked = {"kind": kinds[0]} if len(kinds) == 1 else {"mean": 5.0, "of": kinds}
    made["recipe"]["values"] |= {**asked, "head": "int6"}
    made["recipe"]["sparsity"] = 0.6 * pruned
    made["packed"] = {"values": kinds[0], "head": "int6", "bytes": 50_000, "source_bytes": 200_000}
    for linear in linears:
        linear["target"] = 0.5 if pruned else 0.0
        linear["zeros"] *= pruned
    made["zeros"] *= pruned
    made["sparsity"] *= pruned
    return made


FIT = {
    "says": "bits by the linear: 5 MB",
    "zeros": "no zeros",
    "speed": None,
    "warnings": [],
} | {
    "winner": "bits by the linear",
    "seconds": {"total": 5400.0},
    "finalists": [
        {"name": "uniform int4", "bytes": 5_000_000, "bits": 4.5, "kl": 0.25, "kl_stderr": 0.01},
        {"name": "bits by the linear", "bytes": 4_900_000, "bits": 4.41, "kl": 0.125, "kl_stderr": 0.01},
    ],
}


ASKED = {"budget": 5_000_000, "held_out": {"reactions": 4, "deciding": 32, "tokens": 256}}


def test_zeros_of_a_model_that_was_pruned_before_are_told():
    made = rounded(["int4"], False)
    for linear in made["linears"]:
        linear["zeros"] = linear["shape"][0] * linear["shape"][1] // 2
    made["sparsity"] = 0.5
    assert form_of(made).title == "50.0 % sparse, int4"


def test_a_range_of_kinds_goes_by_their_bits():
    assert range_of(["int4"]) == range_of(["int4", "int4"]) == "int4"
    assert range_of(["int8", "int3", "bf16", "int5"]) == "int3 to bf16"
    with pytest.raises(UserError, match="'int9' are not known"):
        range_of(["int9"])


@pytest.mark.parametrize(
    ("kinds", "pruned", "title", "tags"),
    [
        ([], True, "60.0 % sparse", ["pruned", "sparse"]),
        (["int4"], False, "int4", ["quantized"]),
        (["int8", "int3"], False, "int3 to int8", ["quantized"]),
        (["int4"], True, "60.0 % sparse, int4", ["pruned", "sparse", "quantized"]),
    ],
)
def test_the_title_names_zeros_and_kinds_where_they_were_asked_for(kinds, pruned, title, tags):
    made = rounded(kinds, pruned) if kinds else record()
    form = form_of(made)
    assert form.tags == tags and form.title == title
    card, page = model_card(made), Page(render_report(made))
    assert front_matter(card)["tags"] == [*tags, "tawny"] and f"# tiny-llama, {title}\n" in card
    assert not page.mistakes and f"tiny-llama, {title}" in page.text


def test_bits_are_a_mean_over_weights_not_over_linears():
    made = rounded(["int8", "int4"], False)
    sizes = [x["shape"][0] * x["shape"][1] for x in made["linears"]]
    wanted = sum(size * (4 if i % 2 else 8) for i, size in enumerate(sizes)) / sum(sizes)
    assert form_of(made).bits == pytest.approx(wanted)


def test_a_model_that_lost_no_weight_is_not_called_sparse():
    made = rounded(["int8", "int3"], False)
    card, page = model_card(made), Page(render_report(made))
    assert "None of " in card and "prunable weights was removed" in card and "are zero" not in card
    assert "on the grid of int3 to int8" in card and "bit mask" not in card
    trained = model_card(made | {"zeros": 9, "recovery": {"settings": {}}}, recovery={"settings": {}})
    assert ", all by rounding" in trained
    assert "prunable weights was removed" in page.text and "were removed" not in page.text
    assert page.all("table", id="heat-bits") and not page.all("table", id="heat-sparsity")
    pruned = Page(render_report(rounded(["int4"], True)))
    assert "were removed" in pruned.text and "solved the others on the grid of int4" in pruned.text
    assert pruned.all("table", id="heat-sparsity") and not pruned.all("table", id="heat-bits")


def test_the_page_of_a_fit_shows_what_was_compared_and_the_time_of_all():
    made = rounded(["int8", "int3"], False) | {"fit": FIT}
    page = Page(render_report(made))
    assert not page.mistakes and "Nothing was measured" not in page.text
    assert "KL from dense 0.1250 ± 0.0100" in page.text and "uniform int4 5 MB 4.500 0.2500" in page.text
    assert "1 h 30 min" in page.text and "Not measured" not in model_card(made)
    resumed = Page(render_report(made | {"fit": FIT | {"resumed": 1}}))
    assert "1 h 30 min" not in resumed.text and "to solve what was chosen" in resumed.text
    told = Page(render_report(made | {"fit": FIT | {"warnings": ["packing took 9 MB"], **ASKED}}))
    assert "packing took 9 MB" in told.text and "asked for 5 MB" in told.text
    assert "judged on 32 windows of 256 tokens" in told.text
    assert "judged on: 32 windows of 256 tokens" in model_card(made | {"fit": FIT | ASKED})
    assert "time: 1 h 30 min" in model_card(made)
    del made["fit"]["winner"], made["fit"]["seconds"]  # a folder of an earlier version
    assert "KL from dense 0.1250" in Page(render_report(made)).text
