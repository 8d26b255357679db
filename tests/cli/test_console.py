from __future__ import annotations

import io
import json
import math
import sys

import pytest
from rich.table import Table
from rich.text import Text

from tawny.cli import watching
from tawny.cli.console import Console
from tawny.cli.drawing import drawn
from tawny.cli.eval_ import perplexity_tables
from tawny.cli.inspect import inspection_tables
from tawny.cli.push import push_tables
from tawny.cli.tables_of_pruning import allocation_table
from tawny.evaluation.perplexity import Perplexity
from tawny.report.frames import table
from tawny.report.view import quality


def no_tables(result):
    raise AssertionError("a program that reads JSON needs no tables drawn")


def perplexity(value=20.0, **changes):
    measured = Perplexity(value, 0.5, 3.0, 4, 64, 252, 2.0, "wiki", "ab" * 32, "float32", 10**9)
    return {**measured.to_dict(), **changes}


def test_json_is_one_document_on_stdout_and_nothing_else(capsys):
    console = Console(as_json=True)
    with console.progress() as progress:
        progress.say("reading")
        progress.phase("pruning", 2)
        progress.step("0")
        progress.step("1")
    console.result({"perplexity": math.inf, "nested": [math.nan, 1.5, (1, 2)]}, no_tables)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"perplexity": None, "nested": [None, 1.5, [1, 2]]}
    assert "reading" in err and "pruning: 2 blocks" in err


@pytest.mark.parametrize("colour", [None, "1"])
def test_piped_progress_is_a_few_plain_lines(capsys, monkeypatch, colour):
    if colour is not None:
        monkeypatch.setenv("FORCE_COLOR", colour)
    clock = iter(range(0, 10_000, 2))  # two seconds pass whenever anybody looks
    monkeypatch.setattr(watching.time, "monotonic", lambda: float(next(clock)))
    with Console().progress() as progress:
        progress.phase("pruning", 40)
        for index in range(40):
            progress.detail("solving", index, 3)
            progress.step(str(index))
        progress.phase("evaluating", 1)
        progress.step("0")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\x1b" not in err and "\r" not in err
    assert lines[0] == "pruning: 40 blocks" and lines[-1].startswith("evaluating: 1 blocks in ")
    assert 3 < len(lines) < 40 and any("left" in line for line in lines)


def test_a_phase_of_nobody_knows_how_many_steps_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr("tawny.cli.watching._QUIET_SECONDS", 0.0)
    with Console(False).progress() as progress:
        progress.phase("refining", 0, "rounds")
        progress.step("round 1")
        progress.step("round 2")
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("refining: 2 rounds after ") for line in lines)


def test_a_terminal_gets_a_bar_an_inner_line_and_a_line_for_each_finished_walk(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(watching, "_INSTANT", 0.0)
    with Console().progress() as progress:
        progress.phase("pruning", 2)
        progress.step("0")
        progress.detail("solving mlp.down_proj", 1, 3)
        progress.live.refresh()
        progress.step("1")
    shown = stream.getvalue()
    assert "1/2" in shown and "left" in shown and "solving mlp.down_proj 1/3" in shown
    assert "pruning: 2 blocks in" in shown


def test_an_error_is_one_line_whatever_it_says_and_with_json_the_document(capsys):
    Console().error("bad [bold]value[/]\n  in " + "a long " * 60 + "text", 2)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: bad [bold]value[/] in a long")
    Console(as_json=True).error("no such folder", 2)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "no such folder", "exit_code": 2} and "no such folder" in err


def inspected(name, **changes):
    """What `tawny inspect` found in a model of one linear."""
    linear = {"name": name, "shape": (32, 32), "zeros": 512, "sparsity": 0.5, "pattern": "unstructured"}
    found = {"sparsity": 0.5, "prunable": 9, "blocks": 1, "parameters": 9, "tied_head": False, "bytes": 9}
    found["dense"] = []
    return {"linears": [{**linear, "ties": 511, **changes}], "stored": "bfloat16", **found}


def test_tables_are_plain_when_piped_and_names_stay_whole(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # parallel test workers are given one
    name = "model.layers.29.some.deeply.nested.module.of.a.long.name.self_attn.q_proj"
    found = inspected(name, shape=(576, 576), zeros=10, pattern="2:4")
    Console().result(found, inspection_tables)
    out = capsys.readouterr().out
    assert name in out and "576×576" in out and "50.00 %" in out and "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines()) and "\n\n\n" not in out


def test_dense_and_pruned_stand_side_by_side(capsys):
    pruned = perplexity(30.0, sparsity=0.5)
    Console().result({}, lambda _: [quality({"dense": perplexity(), "pruned": pruned})])
    out = capsys.readouterr().out
    assert "dense" in out and "pruned" in out
    assert "20.00 ± 0.50" in out and "30.00 ± 0.50" in out and "× 1.50" in out and "50.00 %" in out


def test_an_allocation_has_a_row_a_block_weighted_by_size(capsys):
    rows = [
        {"block": 0, "shape": (10, 10), "sparsity": 0.2, "error": 0.1},
        {"block": 0, "shape": (10, 30), "sparsity": 0.6, "error": 0.3},
        {"block": 1, "shape": (10, 10), "sparsity": 1.0, "error": 0.0},
    ]
    Console().result({}, lambda _: [allocation_table(rows)])
    out = capsys.readouterr().out
    assert "50.00 %" in out and "0.2500" in out and "100.00 %" in out


@pytest.mark.parametrize("columns", ["20", "200"])
def test_a_name_cannot_command_the_terminal(capsys, monkeypatch, columns):
    told = "\x1b]0;owned\x07\x1b[2J"
    monkeypatch.setenv("COLUMNS", columns)
    console = Console()
    framed = table(told, "number", title=told)
    framed.add(told, "1")
    console.result({}, lambda _: [framed, told])
    console.note(told)
    console.error(told)
    with console.progress() as progress:
        progress.say(told)
        progress.phase(told, 1)
        progress.step("")
    out, err = capsys.readouterr()
    assert "owned" in out and "owned" in err and not {"\x1b", "\x07"} & set(out + err)


def test_brackets_and_colons_of_a_name_are_letters(capsys):
    console = Console()
    dense = perplexity(text="x[/y].txt")
    console.result({}, lambda _: [quality({"dense": dense, "pruned": perplexity(30.0)})])
    console.result({}, lambda _: perplexity_tables(perplexity(text="[red]t:owl:.txt", seconds=1.0)))
    pushed = {"files": {"[bold]a:owl:.txt": 1}, "bytes": 1, "url": "", "repo": "a/b"}
    console.result({**pushed, "notes": [], "dry_run": True}, push_tables)
    console.note("written to [red]:owl:.html")
    console.error("[/no] such :owl:")
    out, err = capsys.readouterr()
    assert "perplexity on x[/y].txt, 4 windows" in out
    assert "[red]t:owl:.txt" in out and "[bold]a:owl:.txt" in out
    assert err.splitlines() == ["written to [red]:owl:.html", "error: [/no] such :owl:"]


@pytest.mark.parametrize("columns", [40, 50, 60, 66])
def test_a_narrow_window_shows_every_name_and_number_whole(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    name = "model.layers.0.self_attn.q_proj"
    found = inspected(name)
    Console().result(found, inspection_tables)
    out = capsys.readouterr().out
    cells = ("shape 32×32", "zeros 512", "sparsity 50.00 %", "pattern unstructured", "ties 511")
    assert all(words in out for words in (f"linear {name}", *cells))
    assert max(map(len, out.splitlines())) <= columns


def test_a_window_that_is_wide_enough_shows_a_table_with_names_on_a_few_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "67")
    made = inspection_tables(inspected("model.layers.0.self_attn.q_proj"))
    assert isinstance(drawn(made[0], 67), Table) and isinstance(drawn(made[1], 10), Table)
    assert isinstance(drawn(made[0], 66), Text)
    Console().result({}, lambda _: made)
    out = capsys.readouterr().out
    assert "model.layers.0.s" in out and "unstructured" in out and "511" in out


def test_steps_that_an_earlier_run_made_say_nothing_of_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    walk = watching.Walk("trying", 12, "rounds")
    for _ in range(6):
        now[0] += 0.001
        walk.step()
    assert walk.left() == ""
    now[0] += 60
    walk.step()
    assert walk.left() == "about 5 min 00 s left"


def test_json_keeps_every_letter_where_stdout_is_not_unicode(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="replace")
    monkeypatch.setattr(sys, "stdout", stream)
    console = Console(as_json=True)
    console.result({"text": "owl — 梟"}, no_tables)
    stream.flush()
    assert json.loads(stream.buffer.getvalue()) == {"text": "owl — 梟"}
