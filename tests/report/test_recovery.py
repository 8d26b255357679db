"""The page of a recovery: from its record alone, with everything that was measured, and safe to open."""

from __future__ import annotations

import json
import re

import pytest

import tawny
from tawny.report.recovery import curve_figure, render_recovery, write_recovery
from tests.recovery.models import dense_and_pruned
from tests.tiny import tokens


@pytest.fixture(scope="module")
def record():
    dense, pruned = dense_and_pruned("llama")
    made = tawny.recover(pruned, dense, text=tokens(24), tokens=24 * 4 * 6, eval_every=2, lr=1e-2, batch=4)
    return json.loads(made.to_json())


def test_every_measurement_is_in_the_table_and_the_best_is_marked(record):
    page = render_recovery(record)
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    for entry in record["measured"]:
        assert f"<td>{entry['perplexity']:,.2f}</td>" in table and f"<td>{entry['kl']:.4f}</td>" in table
    assert table.count("best") == 1 and len(re.findall("<tr>", table)) == len(record["measured"])
    assert f"{record['zeros']:,} zeros are still there" in page


def test_the_picture_has_a_panel_for_each_loss_and_none_for_a_teacher_that_was_not_there(record):
    with_teacher = curve_figure(record, width=960, prefix="wide")
    assert "KL to the dense model" in with_teacher and "Held-out perplexity" in with_teacher
    alone = json.loads(json.dumps(record))
    alone["teacher"] = None
    for entry in alone["measured"] + [alone["best"], alone["start"]]:
        entry.pop("kl", None), entry.pop("top1", None)
    assert "KL" not in curve_figure(alone, width=960, prefix="wide")
    assert "same next word" not in render_recovery(alone)
    assert with_teacher == curve_figure(record, width=960, prefix="wide")


def test_a_loss_that_was_not_finite_is_null_in_the_file_and_no_obstacle_to_the_page(record):
    broken = json.loads(json.dumps(record))
    broken["start"]["perplexity"] = broken["measured"][0]["perplexity"] = broken["curve"][0]["loss"] = None
    assert "nan" in render_recovery(broken)


def test_a_long_curve_is_thinned_to_what_a_picture_can_show(record):
    long = json.loads(json.dumps(record))
    long["curve"] = [{**record["curve"][0], "tokens": 96 * step} for step in range(5000)]
    assert len(curve_figure(long, width=960, prefix="wide")) < 60_000


def test_the_page_loads_nothing_and_escapes_names(record, tmp_path):
    hostile = {**record, "source": "<script>alert(1)</script>", "warnings": ["<b>"]}
    page = write_recovery(hostile, tmp_path).read_text()
    assert "<script" not in page and "&lt;b&gt;" in page and "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:,|#)', page)
