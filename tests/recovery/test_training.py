"""What a training saves and when, how it keeps to its minutes, and what it keeps on the disk."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tawny
from tawny.errors import Interrupted, NumericalError, OutputError, RecipeError
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.model.streams import Samples
from tawny.recovery import training
from tawny.recovery.data import ReadingOrder, TrainingWindows
from tawny.recovery.state import Shelf, Standing
from tawny.recovery.teacher import Teacher
from tawny.recovery.training import Training
from tawny.report.view import training_speed
from tests.recovery.models import (
    RECIPE,
    dense_and_pruned,
    explode,
    recover_live,
    recover_pair,
    stopped,
)
from tests.tiny import tokens


@pytest.fixture
def slowly(monkeypatch):
    """Let steps take so many seconds of a clock that stands still else, and the teacher's forwards of a window so many."""

    def slow(step, window=0.0):
        distil, make, now = Training._distil, Teacher.make, [0.0]

        def trained(self, samples, hidden, rows, scale):
            now[0] += 0.0 if scale is None else step  # it only measures
            return distil(self, samples, hidden, rows, scale)

        def taught(self, rows, progress):
            now[0] += window * len(self.missing(rows))
            make(self, rows, progress)

        clock = SimpleNamespace(perf_counter=lambda: now[0])
        monkeypatch.setattr(Training, "_distil", trained)
        monkeypatch.setattr(Teacher, "make", taught)
        monkeypatch.setattr(training, "time", clock)
        monkeypatch.setattr("tawny.run.run.time", clock)
        return now

    return slow


def test_slow_steps_are_saved_every_ten_minutes_and_at_the_end(slowly, monkeypatch):
    slowly(60)
    saved = []
    monkeypatch.setattr(Shelf, "save", lambda self, standing: saved.append(standing.step))
    dense, pruned = dense_and_pruned()
    recover_live(pruned, dense, minutes=24.5, tokens="1M", eval_every=50)
    assert saved == [10, 20, 24]


@pytest.mark.parametrize("minutes, few", [(0.5, True), (4, False)])
def test_minutes_too_few_for_a_step_say_how_many_it_took(slowly, minutes, few):
    slowly(60)
    dense, pruned = dense_and_pruned()
    record = recover_live(pruned, dense, minutes=minutes, tokens="1M")
    said = [warning for warning in record.warnings if "too few for one step, which took 1 with" in warning]
    assert (record.steps == 1) is few and bool(said) is few


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
    assert same[0] == same[1] and not (tmp_path / "parts.partial").exists()


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
    parts = [key for key in record.seconds if key.startswith("train_") or key == "optimiser"]
    assert len(parts) == 4 and sum(record.seconds[key] for key in parts) == record.seconds["total"] == 90
    assert record.tokens_per_second == pytest.approx(record.tokens / 90)


def test_a_slow_training_says_what_plain_products_would_allow(slowly, monkeypatch):
    slowly(10)
    monkeypatch.setattr(training, "measured_speed", lambda dtype: 6e9)
    dense, pruned = dense_and_pruned()
    record = recover_live(pruned, dense)
    head = pruned.get_output_embeddings().weight.numel()
    assert record.products_per_second == pytest.approx(1e9 / (record.prunable + head))
    bound = f"; plain matrix products would allow {record.products_per_second:,.0f}"
    assert training_speed(record.to_dict()).endswith(f"while training{bound}")
    slowly(0)
    assert recover_live(*reversed(dense_and_pruned())).products_per_second == 0


class One:
    """Coordinates of some tensors, and nothing behind them."""

    def __init__(self, device):
        self.tensors = {name: nn.Parameter(torch.zeros(3, device=device)) for name in "ab"}

    def write(self):
        pass


def test_each_tensor_gets_its_own_count_of_steps_back_where_its_optimiser_wants_it(tmp_path):

    def shelf(device):
        one = One(device)
        optimiser = torch.optim.AdamW(one.tensors.values(), fused=True)
        return one, optimiser, Shelf(tmp_path, [one], optimiser)

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


def test_the_best_weights_are_those_that_the_state_names(tmp_path):
    one = One("cpu")
    kept = Shelf(tmp_path, [one], torch.optim.AdamW(one.tensors.values()))

    def best(step, saves=True):
        with torch.no_grad():
            one.tensors["a"].fill_(step)
        kept.keep_best(step)
        if saves:
            kept.save(Standing(step=step, best={"step": float(step)}))

    best(3)
    best(5, saves=False)  # the disk was full before the state was there
    kept.restore_best(int(kept.load().best["step"]))
    assert one.tensors["a"].tolist() == [3.0] * 3
    best(5)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "best-5.safetensors",
        "state-5.safetensors",
    ]


def test_the_state_that_a_run_goes_on_from_is_no_part_of_memory(tmp_path):
    one = One("cpu")
    optimiser = torch.optim.AdamW(one.tensors.values())
    for tensor in one.tensors.values():
        tensor.grad = torch.ones(3)
    optimiser.step()
    kept = Shelf(tmp_path, [one], optimiser)
    kept.save(Standing(step=1))
    kept.load()
    state = (tmp_path / "state-1.safetensors").resolve()
    assert str(state) not in Path("/proc/self/maps").read_text()


# --- what is left of live models, and after a loss that became NaN ----------------------------------------------------


def test_a_live_teacher_shares_no_memory_with_what_was_trained():
    dense, pruned = dense_and_pruned()
    recover_live(pruned, dense)
    places = [{p.data_ptr() for p in model.parameters()} for model in (dense, pruned)]
    assert places[0].isdisjoint(places[1])


def unchanged(model, start):
    return all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("train", ["survivors", "lora", "norms"])
def test_a_live_model_is_as_it_was_after_a_loss_that_became_nan(monkeypatch, train):
    dense, pruned = dense_and_pruned()
    start = copy.deepcopy(pruned.state_dict())
    explode(monkeypatch, at=2)
    with pytest.raises(NumericalError, match=r"nothing is written, and the model is as it was there: try"):
        recover_live(pruned, dense, train=train, eval_every=50)
    assert unchanged(pruned, start)


@pytest.mark.parametrize("at_once", [False, True])
def test_ctrl_c_leaves_a_live_model_with_its_best_weights_and_says_so(monkeypatch, at_once):
    dense, pruned = dense_and_pruned()
    start = copy.deepcopy(pruned.state_dict())
    step = Training._step

    def stopping(self):
        step(self)
        if self.standing.step == 2 and at_once:
            raise KeyboardInterrupt
        if self.standing.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Training, "_step", stopping)
    said = "best weights measured so far" if at_once else "after step 2.*best weights measured, of step 0"
    with pytest.raises(Interrupted, match=f"{said}, and the same call begins anew"):
        recover_live(pruned, dense, eval_every=50)
    assert unchanged(pruned, start)


def test_a_packed_folder_is_written_before_a_loss_that_became_nan_is_told(pair, tmp_path, monkeypatch):
    tawny.pack(pair[1], tmp_path / "packed", "int8")
    explode(monkeypatch, at=5)

    def call():
        recover_pair(pair, tmp_path / "out", source=tmp_path / "packed")

    with monkeypatch.context() as patched:  # the process ends between training and packing
        patched.setattr("tawny.recovery.packed.pack", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call()
    monkeypatch.setattr(Training, "_step", lambda self: pytest.fail("a step was made again"))
    with pytest.raises(NumericalError, match=r"^the loss became nan.*of step 3, is kept"):
        call()
    told = json.loads((tmp_path / "out" / "recover.json").read_text())
    assert told["stopped"] == "nan" and told["best"]["step"] == 3
    assert (tmp_path / "out" / INDEX).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]


def test_only_weights_decay_and_not_their_scales(monkeypatch):
    seen, train = [], Training.train
    monkeypatch.setattr(Training, "train", lambda self: (seen.append(self), train(self))[1])
    dense, pruned = dense_and_pruned()
    recover_live(pruned, dense, values="int4", weight_decay=0.1)
    decayed, others = (group["params"] for group in seen[0].optimiser.param_groups)
    named = {id(t): name for one in seen[0].student.coordinates for name, t in one.tensors.items()}
    assert all(named[id(tensor)].endswith("_proj.weight") for tensor in decayed)
    assert sum(named[id(tensor)].endswith(".ends") for tensor in others) == len(decayed) > 0


def test_zeros_that_few_bits_store_no_mask_for_are_told_once_they_become_levels():
    def told(pruned, dense):
        record = recover_live(pruned, dense, values="int4")
        said = f"{record.zeros_before:,} zeros lie in linears with too few of them for a mask"
        return any(line.startswith(said) for line in record.warnings)

    dense, pruned = dense_and_pruned(sparsity=0.2)
    assert told(pruned, dense)
    assert not told(pruned, dense), "it lies on the grid"
    dense, pruned = dense_and_pruned(sparsity=0.5)
    assert not told(pruned, dense)


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


@pytest.mark.parametrize(
    ("packed", "asked", "has"),
    [
        (("int8", None), {"values": "int4", "group_size": 64}, "int8"),
        (("int4", 32), {"values": "int4", "group_size": 64}, "int4 in groups of 32"),
        (("int8", 32), {"values": "int8"}, "int8 in groups of 32"),
        (("f32", None), {"values": "int8"}, "f32"),
    ],
)
def test_values_that_a_packed_folder_does_not_have_are_refused(pair, tmp_path, packed, asked, has):
    tawny.pack(pair[1], tmp_path / "packed", *packed)
    said = rf"values {asked['values']}.* asked for, and .*packed is packed as {has}: unpack it first .*leave values out"
    with pytest.raises(RecipeError, match=said):
        recover_pair(pair, tmp_path / "out", source=tmp_path / "packed", **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_values_that_a_packed_folder_has_may_be_named(pair, tmp_path):
    tawny.pack(pair[1], tmp_path / "packed", "int4", 64)
    record = recover_pair(pair, tmp_path / "out", source=tmp_path / "packed", values="int4", tokens=24 * 4)
    assert (record.settings["values"], record.settings["group_size"]) == ("int4", 64)


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


def values_of(folder):
    return {one["values"] for one in json.loads((folder / INDEX).read_text())["linears"].values()}


def test_norms_keep_the_grid_that_a_recovery_before_trained_for(pair, tmp_path):
    recover_pair(pair, tmp_path / "int4", values="int4", tokens=24 * 4)
    recover_pair(pair, tmp_path / "norms", source=tmp_path / "int4", train="norms", tokens=24 * 4)
    recover_pair(pair, tmp_path / "again", source=tmp_path / "norms", train="norms", tokens=24 * 4)
    tawny.pack(tmp_path / "again", tmp_path / "packed")
    assert values_of(tmp_path / "packed") == {"int4"}
    with pytest.raises(RecipeError, match="off the grid of int4"):
        recover_pair(pair, tmp_path / "lora", source=tmp_path / "again", train="lora")


def test_head_and_kind_of_a_recipe_outlive_a_recovery_of_the_dense_folder(pair, tmp_path):
    solved_for(pair, tmp_path / "solved", {"kind": "int4", "head": "int8"})
    recover_pair(pair, tmp_path / "out", source=tmp_path / "solved", tokens=24 * 4)
    tawny.pack(tmp_path / "out", tmp_path / "packed")
    index = json.loads((tmp_path / "packed" / INDEX).read_text())["linears"]
    kinds = {("layers" in name, one["values"]) for name, one in index.items()}
    assert kinds == {(True, "int4"), (False, "int8")}


def test_the_record_of_another_kind_names_the_kind_that_was_trained(pair, tmp_path):
    solved_for(pair, tmp_path / "solved", {"kind": "int4"})
    recover_pair(pair, tmp_path / "out", source=tmp_path / "solved", values="int6", tokens=24 * 4)
    assert set(json.loads((tmp_path / "out" / "run.json").read_text())["values"].values()) == {"int6"}
    assert "int6" in (tmp_path / "out" / "README.md").read_text().partition("# ")[2].partition("\n")[0]


def test_a_folder_packed_in_another_kind_than_its_own_several_keeps_that_one(pair, tmp_path):
    solved_for(pair, tmp_path / "solved", {"mean": 3.5, "of": ["int3", "int4"]})
    tawny.pack(tmp_path / "solved", tmp_path / "packed", "int8")
    recover_pair(pair, tmp_path / "out", source=tmp_path / "packed", tokens=24 * 4)
    assert values_of(tmp_path / "out") == {"int8"}


def test_text_that_the_dense_model_wrote_learns_from_its_probabilities_alone(monkeypatch):
    def trained(**keys):
        dense, pruned = dense_and_pruned()
        recover_live(pruned, dense, **keys)
        return pruned.state_dict()

    given, alone = trained(kl=0.5), trained(kl=1.0)
    monkeypatch.setattr(TrainingWindows, "own", lambda self, row: True)
    written = trained(kl=0.5)
    assert all(torch.equal(written[name], alone[name]) for name in written)
    assert not all(torch.equal(written[name], given[name]) for name in written)


def test_which_windows_the_dense_model_wrote_is_known_by_their_text():
    samples, order = Samples(torch.zeros(7, 4, dtype=torch.int64)), ReadingOrder([3, 2], [0.5, 0.5], 0)
    reading = TrainingWindows(samples, order, 1, {}, [False, True])
    assert [reading.own(row) for row in range(7)] == [False] * 3 + [True] * 2 + [False] * 2
