"""What a training saves and when, how it keeps to its minutes, and what it keeps on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tawny
from tawny.errors import OutputError, RecipeError
from tawny.model.resumable import WorkFolder
from tawny.packed.folder import INDEX
from tawny.recovery import training
from tawny.recovery.state import Shelf, Standing
from tawny.recovery.teacher import Teacher
from tawny.recovery.training import Training
from tests.recovery.models import RECIPE, dense_and_pruned, recover_live, recover_pair, stopped
from tests.tiny import tokens


@pytest.fixture
def slowly(monkeypatch):
    """Let steps take so many seconds of a clock that stands still else, and the teacher's forwards of a window so many."""

    def slow(step, window=0.0):
        gradients, make, now = Training._gradients, Teacher.make, [0.0]

        def trained(self, rows):
            now[0] += step
            return gradients(self, rows)

        def taught(self, rows, progress):
            now[0] += window * len(self.missing(rows))
            make(self, rows, progress)

        clock = SimpleNamespace(perf_counter=lambda: now[0])
        monkeypatch.setattr(Training, "_gradients", trained)
        monkeypatch.setattr(Teacher, "make", taught)
        monkeypatch.setattr(training, "time", clock)
        monkeypatch.setattr("tawny.record.time", clock)
        return now

    return slow


def test_slow_steps_are_saved_every_ten_minutes_and_at_the_end(slowly, monkeypatch):
    slowly(60)
    saved = []
    monkeypatch.setattr(Shelf, "save", lambda self, standing: saved.append(standing.step))
    dense, pruned = dense_and_pruned()
    recover_live(pruned, dense, minutes=24.5, tokens="1M", eval_every=50)
    assert saved == [10, 20, 24]


def test_a_result_that_cannot_be_written_loses_no_step(pair, tmp_path, monkeypatch):
    whole = recover_pair(pair, tmp_path / "whole", eval_every=50)

    def full(*_):
        raise OutputError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(training, "write", full)
        with pytest.raises(OutputError, match="full"):
            recover_pair(pair, tmp_path / "parts", eval_every=50)
    monkeypatch.setattr(Training, "_step", lambda self: pytest.fail("a step was made again"))
    record = recover_pair(pair, tmp_path / "parts", eval_every=50)
    assert record.curve == whole.curve and record.best["loss"] == whole.best["loss"]
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert same[0] == same[1] and not (tmp_path / "parts.recovery").exists()


def test_steps_that_nothing_measured_before_the_minutes_were_over_are_measured(pair, tmp_path, monkeypatch):
    keys = {"minutes": 1, "tokens": "1M", "eval_every": 50}
    stopped(monkeypatch, lambda: recover_pair(pair, tmp_path / "out", **keys), 4)
    load = Shelf.load

    def late(self):
        found = load(self)
        found.seconds = 60.0
        return found

    monkeypatch.setattr(Shelf, "load", late)
    record = recover_pair(pair, tmp_path / "out", **keys)
    assert (record.steps, record.stopped) == (4, "minutes")
    assert [entry["step"] for entry in record.measured] == [0, 4] and record.best["step"] == 4


@pytest.mark.parametrize("ahead", [1, 10**6], ids=["each step asks the teacher", "one walk for all"])
def test_no_step_is_begun_that_the_minutes_have_no_room_for(slowly, monkeypatch, ahead):
    now = slowly(60, window=5)
    monkeypatch.setattr(training, "WALK_TOKENS", ahead)
    dense, pruned = dense_and_pruned()
    text = tokens(200)
    record = recover_live(pruned, dense, text=text, held_out=tokens(1, seed=1), minutes=10, tokens="1M")
    assert record.steps >= 7 and 600 - 2 * 80 < now[0] <= 600
    assert record.measured[-1]["step"] == record.steps and record.measured[-1]["seconds"] <= 600


def test_the_seconds_of_a_run_that_was_stopped_add_up(pair, tmp_path, slowly, monkeypatch):
    slowly(10)
    stopped(monkeypatch, lambda: recover_pair(pair, tmp_path / "out"), 5)
    record = recover_pair(pair, tmp_path / "out")
    assert record.seconds["train"] == record.seconds["total"] == 90
    assert record.tokens_per_second == pytest.approx(record.tokens / 90)


class One:
    """Coordinates of some tensors, and nothing behind them."""

    def __init__(self, device):
        self.tensors = {name: nn.Parameter(torch.zeros(3, device=device)) for name in "ab"}

    def write(self):
        pass


def test_each_tensor_gets_its_own_count_of_steps_back_where_its_optimiser_wants_it(tmp_path):
    work = WorkFolder(tmp_path / "out", "recovery", ("state*.safetensors",))
    work.open({}, overwrite=False)

    def shelf(device):
        one = One(device)
        optimiser = torch.optim.AdamW(one.tensors.values(), fused=True)
        return one, optimiser, Shelf(work, [one], optimiser, None)

    one, optimiser, kept = shelf("cpu")
    for names in ("ab", "b"):
        for name in names:
            one.tensors[name].grad = torch.ones(3)
        optimiser.step()
        optimiser.zero_grad()
    kept.save(Standing(step=2))
    for device in ("cpu", "meta"):  # as on any device that is not the processor
        two, other, found = shelf(device)
        assert found.load() == Standing(step=2)
        steps = [other.state[two.tensors[name]]["step"] for name in "ab"]
        assert [step.device.type for step in steps] == [device, device]
        assert device == "meta" or steps == [1.0, 2.0]


# --- what cannot be trained, and cannot be kept ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["solved", "packed", "several"])
def test_factors_that_would_leave_a_grid_of_few_bits_are_refused_before_any_work(pair, tmp_path, form):
    source = tmp_path / "source"
    if form == "packed":
        tawny.pack(pair[1], source, "int4")
    else:
        values = {"kind": "int4"} if form == "solved" else {"mean": 3.5, "of": ["int3", "int4"]}
        solved_for(pair, source, values)
    said = r"train=lora would move .*source off the grid of .*int4: expected train=survivors.*train=norms"
    with pytest.raises(RecipeError, match=said):
        recover_pair(pair, tmp_path / "out", source=source, train="lora")
    with pytest.raises(RecipeError, match="train=lora would move what each step prunes off the grid of int4"):
        tawny.recover_gradually(
            pair[0],
            pair[0],
            tmp_path / "out",
            [0.3],
            recipe={**RECIPE, "values": "int4"},
            settings={"train": "lora"},
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def solved_for(pair, out, values):
    recipe = {**RECIPE, "solver": "sparsegpt", "values": values}
    recipe["sparsity"] = 0 if "mean" in values else 0.5
    recipe["calibration"] = {"text": pair[2], "samples": 4, "seqlen": 24}
    tawny.prune(pair[0], out, recipe=recipe)


def test_a_folder_packed_in_several_kinds_keeps_each_when_norms_are_trained(pair, tmp_path):
    solved_for(pair, tmp_path / "solved", {"mean": 3.5, "of": ["int3", "int4"]})
    tawny.pack(tmp_path / "solved", tmp_path / "packed")
    recover_pair(pair, tmp_path / "out", source=tmp_path / "packed", train="norms")
    indices = [json.loads((tmp_path / name / INDEX).read_text())["linears"] for name in ("packed", "out")]
    assert indices[0] == indices[1] and len({one["values"] for one in indices[0].values()}) == 2


def test_int8_is_still_trained_by_factors(pair, tmp_path):
    tawny.pack(pair[1], tmp_path / "packed", "int8")
    record = recover_pair(pair, tmp_path / "out", source=tmp_path / "packed", train="lora")
    assert record.best["perplexity"] < record.start["perplexity"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_a_full_disk_under_the_teachers_hidden_states_is_told_in_a_line(pair, tmp_path, monkeypatch):
    walk = Teacher._walk

    def full(self, rows, progress):
        self.cache.unlink()
        self.cache.symlink_to("/dev/full")
        walk(self, rows, progress)

    monkeypatch.setattr(Teacher, "_walk", full)
    with pytest.raises(OutputError, match="disk is full"):
        recover_pair(pair, tmp_path / "out")
