from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tawny
from tawny.calibration.mixture import TextMixture
from tawny.calibration.text import Text
from tawny.calibration.windows import TokenisedText
from tawny.errors import ModelError, NumericalError, OutputError, RecipeError, TextError, UserError
from tawny.progress import Silent
from tawny.record import weight_files
from tawny.recovery import dense as dense_module
from tawny.recovery import training
from tawny.recovery.data import read, written_tokens
from tawny.recovery.record import RecoveryRecord
from tawny.recovery.teacher import Teacher
from tawny.recovery.training import Training
from tawny.report.publish import refresh
from tawny.report.push import push
from tests.recovery.models import (
    RECIPE,
    SHORT,
    dense_and_pruned,
    explode,
    folder_keys,
    recover_live,
    recover_pair,
    save_letters,
    stopped,
)
from tests.reference import distil as reference
from tests.tiny import FAMILIES, tiny_model, tokens
from tests.tokenizer import tiny_tokenizer


def zeros(model):
    found = {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}
    return {name: zero for name, zero in found.items() if zero.float().mean() > 0.3}


def kept(before, model):
    after = dict(model.named_parameters())
    return all(bool((after[name] == 0)[zero].all()) for name, zero in before.items())


def test_a_chunk_is_no_longer_than_the_model_has_positions():
    dense, pruned = dense_and_pruned("gpt2", n_positions=32)
    record = recover_live(pruned, dense, text=tokens(24, 24))
    assert record.steps == 6


def test_gradients_of_an_earlier_loop_move_nothing():
    made = []
    for left in (False, True):
        dense, pruned = dense_and_pruned("llama")
        if left:
            for parameter in pruned.parameters():
                parameter.grad = torch.full_like(parameter, 1e3)
        recover_live(pruned, dense)
        made.append(pruned.state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gets_better_and_keeps_its_zeros(family):
    dense, pruned = dense_and_pruned(family)
    before = zeros(pruned)
    record = recover_live(pruned, dense, kl=1, held_out=tokens(24)[:4])  # noise has nothing else to learn
    assert record.zeros == record.zeros_before == sum(int(zero.sum()) for zero in before.values())
    assert kept(before, pruned)
    assert record.best["kl"] < record.start["kl"]
    assert record.best["step"] > 0 and len(record.curve) == record.steps == 6


@settings(deadline=None, max_examples=14)
@given(
    how=st.sampled_from(
        [
            {},
            {"train": "norms"},
            {"train": "lora", "rank": 3},
            {"values": "int8"},
            {"checkpointing": True, "micro_batch": 3},
            {"kl": 0},
            {"kl": 1, "weight_decay": 0.1},
        ]
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sparsity=st.sampled_from([0.3, 0.5, 0.8]),
)
def test_no_way_of_training_loses_a_zero(how, dtype, sparsity):
    dense, pruned = dense_and_pruned(sparsity=sparsity, dtype=dtype)
    before, start = zeros(pruned) or {}, copy.deepcopy(pruned.state_dict())
    record = recover_live(pruned, dense, text=tokens(16), **{"tokens": 24 * 4 * 3, **how})
    assert kept(before, pruned)
    # rounding to int8 may add zeros, nothing else may
    assert record.zeros == record.zeros_before or (how.get("values") and record.zeros > record.zeros_before)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(pruned.state_dict()[embedding], start[embedding])


def test_compact_training_is_dense_training_behind_a_mask():
    # Without a teacher, whose hidden states are rounded to bfloat16; the loss has tests of its own.
    _, pruned = dense_and_pruned()
    twin = copy.deepcopy(pruned)
    windows = tokens(24)
    keys = {**SHORT, "eval_every": 6, "lr": 1e-3, "kl": 0}
    record = tawny.recover(pruned, text=windows[:20], held_out=windows[20:], **keys)
    reading = read(tawny.Recovery.make(**keys, seqlen=24), None, windows[:20], windows[20:])
    batches = [reading.windows[reading.rows(step)] for step in range(6)]
    reference.train(twin, batches, [entry["lr"] for entry in record.curve], clip=1.0)
    assert record.best["step"] == 6
    torch.testing.assert_close(pruned.state_dict(), twin.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_slow_teacher_is_asked_for_no_more_than_the_minutes_have_room_for(monkeypatch):
    dense, pruned = dense_and_pruned()
    make, asked, seconds = Teacher.make, [], [0.0]

    def slowly(self, rows, progress):
        asked.append(self.missing(rows))
        seconds[0] += 0.05 * len(asked[-1])
        make(self, rows, progress)

    def clock():
        seconds[0] += 0.03  # students take time, too
        return seconds[0]

    monkeypatch.setattr(Teacher, "make", slowly)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=clock))
    longer = 40 * SHORT["tokens"]
    record = recover_live(pruned, dense, text=tokens(64), minutes=0.06, tokens=longer)
    assert record.stopped == "minutes"
    # At 0.05 s a window a step of 4 takes 0.8 s with all its forwards: 3.6 s have room for five, of sixteen in all.
    held_out, ahead = asked[: record.text["held_out"]], asked[record.text["held_out"]]
    assert all(len(rows) == 1 for rows in held_out) and 0 < len(ahead) <= 5 * 4


class Timed(Silent):
    """A clock whose every step takes 0.5 s, and what the last phase was told: when it is, and how long it takes still."""

    def __init__(self, monkeypatch):
        self.now, self.told, distil = 0.0, [], Training._distil

        def trained(training, samples, hidden, rows, scale):
            self.now += 0.0 if scale is None else 0.5  # it only measures
            return distil(training, samples, hidden, rows, scale)

        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(Training, "_distil", trained)
        monkeypatch.setattr(training, "time", clock)
        monkeypatch.setattr("tawny.run.run.time", clock)

    def phase(self, name, total, unit="blocks"):
        self.told.clear()

    def at(self, done, left):
        self.told.append((self.now, left))


@pytest.mark.parametrize("seconds", [0.6, 6.0, 60.0])
def test_time_given_is_time_trained_and_a_tenth_measures(monkeypatch, seconds):
    """Forwards of a window take 0.1 s: 64 held-out windows would take all of the shorter times."""
    dense, pruned = dense_and_pruned()
    timed, losses = Timed(monkeypatch), Training._losses

    def measured(self, windows):
        timed.now += 0.1 * len(windows)
        return losses(self, windows)

    monkeypatch.setattr(Training, "_losses", measured)
    keys = {"minutes": seconds / 60, "tokens": "1M", "eval_windows": 64, "eval_every": 2, "progress": timed}
    record = recover_live(pruned, dense, text=tokens(24), held_out=tokens(64, seed=1), **keys)
    measuring = timed.now - 0.5 * record.steps
    assert record.stopped == "minutes" and timed.now <= max(seconds, 0.7) + 1e-6
    assert 0.5 * record.steps >= 0.8 * seconds - 0.5 and record.steps >= 1
    assert measuring <= max(0.1 * seconds, 0.2) + 1e-6, "one window at the start and at the end is the least"
    assert all(when + left == pytest.approx(seconds) for when, left in timed.told[:-1])


def test_the_time_left_of_a_run_by_tokens_is_right_from_the_first_step(monkeypatch):
    dense, pruned = dense_and_pruned()
    timed, make = Timed(monkeypatch), Teacher.make

    def asked(self, rows, progress):
        timed.now += 0.1 * len(self.missing(rows))
        make(self, rows, progress)

    monkeypatch.setattr(Teacher, "make", asked)
    recover_live(pruned, dense, text=tokens(24), held_out=tokens(4, seed=1), progress=timed)
    assert len(timed.told) == 6
    assert [when + left for when, left in timed.told] == pytest.approx([timed.now] * 6)


def test_minutes_that_outlast_the_tokens_promise_no_longer_run(monkeypatch):
    dense, pruned = dense_and_pruned()
    timed = Timed(monkeypatch)
    recover_live(pruned, dense, text=tokens(24), held_out=tokens(4, seed=1), minutes=600, progress=timed)
    (_, first), *later = timed.told
    assert first == 36_000 and max(left for _, left in later) < 60


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_recovered_into_a_folder_that_transformers_opens(pair, tmp_path):
    dense, pruned, _ = pair
    out = tmp_path / "out"
    record = recover_pair(pair, out)
    made = AutoModelForCausalLM.from_pretrained(out)
    source = AutoModelForCausalLM.from_pretrained(pruned)
    assert kept(zeros(source), made)
    assert torch.equal(made.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert not torch.equal(made.model.norm.weight, source.model.norm.weight)
    told = json.loads((out / "recover.json").read_text())
    assert "How it came back" in (out / "report.html").read_text()
    assert told["best"] == record.best and len(told["curve"]) == 9 and told["teacher"] == dense
    assert (out / "run.json").is_file() and "## Recovered" in (out / "README.md").read_text()
    assert tawny.inspect(out).sparsity == pytest.approx(record.sparsity)
    assert not (tmp_path / "out.partial").exists()
    # what was measured in memory is what the folder gives
    reading = read(tawny.Recovery.make(**folder_keys(pair)), AutoTokenizer.from_pretrained(dense))
    measured = tawny.evaluate(out, reading.windows[reading.held_out], compute="float32")
    assert measured.loss == pytest.approx(record.best["loss"], rel=1e-4)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_weights(folder, other):
    ones, others = weights(folder), weights(other)
    return all(torch.equal(one, others[name]) for name, one in ones.items())


@pytest.mark.parametrize("how", [{}, {"train": "lora"}])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_curve_and_bytes(pair, tmp_path, monkeypatch, how):
    whole = recover_pair(pair, tmp_path / "whole", **how)
    for after in (2, 5):
        stopped(monkeypatch, lambda: recover_pair(pair, tmp_path / "parts", **how), after)
        assert not (tmp_path / "parts").exists()
    assert recover_pair(pair, tmp_path / "parts", **how).curve == whole.curve
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_the_teacher_sees_a_window_once_over_epochs_and_interruptions(pair, tmp_path, monkeypatch):
    def call():
        return recover_pair(pair, tmp_path / "out", tokens=24 * 4 * 40)

    stopped(monkeypatch, call, 20)
    record = call()
    windows = record.text["windows"] + record.text["held_out"]
    assert record.tokens > record.text["windows"] * 24 and record.teacher_tokens <= windows * 24


def test_the_state_of_other_settings_is_refused_and_overwritten_on_request(pair, tmp_path, monkeypatch):
    stopped(monkeypatch, lambda: recover_pair(pair, tmp_path / "out"), 0)
    with pytest.raises(OutputError, match=r"lr was 0\.01, now 0\.001"):
        recover_pair(pair, tmp_path / "out", lr=1e-3)
    recover_pair(pair, tmp_path / "out", overwrite=True, lr=1e-3)


def test_a_recovered_folder_is_what_its_run_json_says(pair, tmp_path):
    record = recover_pair(pair, tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["files"] == weight_files(tmp_path / "out")
    assert run["out"] == str(tmp_path / "out") and run["source"] == pair[0]
    assert run["bytes"] == record.bytes
    told = run["recovery"]
    assert (told["source"], told["teacher"]) == (pair[1], pair[0])
    assert (told["best"], told["zeros"]) == (record.best, record.zeros)
    assert {x.name: x.zeros for x in tawny.inspect(tmp_path / "out").linears} == {
        entry["name"]: entry["zeros"] for entry in run["linears"]
    }
    assert run["zeros"] == sum(entry["zeros"] for entry in run["linears"]) == record.zeros
    assert push(tmp_path / "out", "owner/name", dry_run=True).dry_run
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("## Recovered") == 1 and "behind its mask" not in card
    assert all(file["sha256"] in card for file in run["files"].values())


def test_a_card_that_a_person_wrote_is_kept(pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "pruned")
    with (tmp_path / "pruned" / "README.md").open("a") as card:
        card.write("\nFor owls.\n")
    recover_pair(pair, tmp_path / "out", source=tmp_path / "pruned")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "For owls.\n\n## Recovered\n\nTrained with its zeros kept" in text


def test_a_card_that_is_not_utf8_ends_no_training(pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "pruned")
    (tmp_path / "pruned" / "README.md").write_bytes("# Eule für alle".encode("latin-1"))
    recover_pair(pair, tmp_path / "out", source=tmp_path / "pruned")
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8").startswith("# Eule f\ufffdr alle")


def test_what_is_not_finite_is_null_in_what_is_written(pair, tmp_path, monkeypatch):
    measure = Training._measure

    def diverged(self):
        measure(self)
        if self.standing.step == 0:
            self.standing.measured[0] |= {"perplexity": float("inf"), "kl": float("nan")}

    monkeypatch.setattr(Training, "_measure", diverged)
    recover_pair(pair, tmp_path / "out")
    for name in ("recover.json", "run.json"):
        text = (tmp_path / "out" / name).read_text()
        told = json.loads(text, parse_constant=pytest.fail)
    assert told["recovery"]["start"]["perplexity"] is None
    record = RecoveryRecord.read(tmp_path / "out" / "recover.json")
    assert math.isnan(record.start["perplexity"]) and record.best["perplexity"] > 0


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_model_without_zeros_is_refused_unless_it_is_a_control():
    dense = tiny_model("llama")
    student = copy.deepcopy(dense)
    with pytest.raises(ModelError, match="no sparsity to keep"):
        recover_live(student, dense)
    assert recover_live(student, dense, control=True).sparsity == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 300}, "words 300"),
        ({"hidden_size": 64}, "hidden size 64"),
        ({"num_hidden_layers": 2}, "absent"),
        ({"intermediate_size": 40}, r"\(40, 32\)"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(changes, words):
    _, pruned = dense_and_pruned()
    with pytest.raises(ModelError, match=words):
        recover_live(pruned, tiny_model("llama", **changes))


def test_a_teacher_with_another_tokenizer_is_refused(pair, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "other")
    save_letters(tmp_path / "other", shift=40)
    with pytest.raises(ModelError, match="expected the same tokenizer"):
        recover_pair(pair, tmp_path / "out", teacher=tmp_path / "other")


def test_a_text_shorter_than_a_batch_is_refused(pair, tmp_path):
    (tmp_path / "short.txt").write_text("an owl sees a mouse in the dark and the mouse")
    with pytest.raises(TextError, match="give a longer text, or a smaller"):
        recover_pair(pair, tmp_path / "out", text=str(tmp_path / "short.txt"), seqlen=20)
    (tmp_path / "shorter.txt").write_text("an owl")
    with pytest.raises(TextError, match="has 6 tokens"):
        recover_pair(pair, tmp_path / "out", text=str(tmp_path / "shorter.txt"))


def test_a_loss_that_becomes_nan_names_the_learning_rate_and_leaves_the_last_good_model(
    pair, tmp_path, monkeypatch
):
    explode(monkeypatch, at=5)
    said = r"nan.*step 6.*the best model so far, of step 3, is kept.*--lr than 0.01"
    with pytest.raises(NumericalError, match=said):
        recover_pair(pair, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "recover.json").read_text())
    assert record["stopped"] == "nan" and record["best"]["step"] == 3
    source, made = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair[1], tmp_path / "out"))
    assert kept(zeros(source), made)


def test_a_loss_that_is_nan_from_the_start_writes_nothing(pair, tmp_path, monkeypatch):
    explode(monkeypatch, at=0)
    with pytest.raises(NumericalError, match="nothing is written"):
        recover_pair(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_model_whose_loss_falls_while_its_kl_rises_is_not_the_best(pair, tmp_path, monkeypatch):
    losses = Training._held_out_losses

    def farther(self):
        total = losses(self)
        step = self.standing.step
        return replace(total, next_token=total.tokens * (9.0 - step / 10), kl=total.tokens * (1.0 + step))

    monkeypatch.setattr(Training, "_held_out_losses", farther)
    record = recover_pair(pair, tmp_path / "out")
    assert record.best["step"] == 0 and record.measured[-1]["loss"] < record.start["loss"]
    assert "no measurement was better than the start" in record.warnings[0]
    assert same_weights(tmp_path / "out", Path(pair[1]))


def test_a_run_that_gets_no_better_leaves_the_model_unchanged(pair, tmp_path):
    record = recover_pair(pair, tmp_path / "out", lr=1e-12, patience=2)
    assert record.best["step"] == 0 and "another --lr" in record.warnings[0] and record.stopped == "patience"
    assert same_weights(tmp_path / "out", Path(pair[1]))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tokns": 3}, "did you mean 'tokens'"),
        ({"tokens": "many"}, "tokens is 'many'"),
        ({"train": "all"}, "'survivors'"),
        ({"values": "int8", "train": "norms"}, "goes with train=survivors"),
        ({"micro_batch": 9}, "more than batch"),
        ({"minutes": float("inf")}, "minutes is inf; expected a finite number"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"clip": float("inf")}, "clip is inf; expected a finite number"),
        ({"kl": 0, "text": ["wiki=0.5", "self=0.5"]}, "kl=0 opens no dense model.*give another text, or kl"),
        ({"weight_decay": 0.1, "train": "lora"}, "weight_decay=0.1 is of surviving weights.*train=lora"),
        ({"weight_decay": 0.1, "train": "norms"}, "weight_decay=0.1 is of surviving weights.*train=norms"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keys, words):
    with pytest.raises(RecipeError, match=words):
        tawny.Recovery.make(**keys)


@pytest.mark.parametrize(
    "keys, windows",
    [
        ({"tokens": 204_799}, 1),
        ({"tokens": 204_800}, 4),
        ({}, 4),
        ({"minutes": 49}, 1),
        ({"minutes": 50}, 4),
        ({"minutes": 10, "seqlen": 32}, 4),
        ({"minutes": 10, "batch": 4}, 4),
        ({"minutes": 10, "micro_batch": 2}, 2),
        ({"minutes": 10, "text": "images:photos"}, 4),
    ],
)
def test_a_run_of_few_steps_reads_one_window_in_each(keys, windows):
    settings = tawny.Recovery.make(**keys)
    assert settings.batch == windows and tawny.Recovery.make(settings, tokens="9M").batch == windows


def test_a_teacher_writes_no_more_than_the_minutes_read_and_enough_for_a_batch():
    def written(share, **keys):
        return written_tokens(tawny.Recovery.make(text=["wiki", "self"], **keys), share)

    assert written(0.5) == 65_536 and written(0.5, minutes=600) == 65_536
    assert written(0.5, minutes=10) == 20_480 and written(0.5, tokens=30_000, minutes=10) == 15_000
    # A batch, windows to measure on, and a tenth more
    assert written(0.25, minutes=0.1, batch=4) == 7 * 512 and written(0.25, minutes=0.1, batch=32) == 44 * 512


@pytest.mark.parametrize("written, held_out", [({}, 5), ({"seed": 0}, 16)])
def test_more_of_a_text_that_the_dense_model_writes_is_held_out(pair, monkeypatch, written, held_out):
    text = Text("self", " ".join(["text"] * 500), 1, "", written=written)
    loaded = TextMixture((text,))
    monkeypatch.setattr("tawny.recovery.data.load_texts", lambda *_: loaded)
    settings = tawny.Recovery.make(text="self", seqlen=24, batch=4, tokens=2400)
    reading = read(settings, AutoTokenizer.from_pretrained(pair[0]))
    assert len(reading.held_out) == held_out
    assert {reading.own(row) for row in range(reading.training)} == {bool(written)}


def test_of_a_long_text_windows_from_all_of_it_are_read():
    windows = torch.arange(1000)[:, None].repeat(1, 24)
    reading = read(tawny.Recovery.make(seqlen=24, tokens=24 * 100, batch=4), None, windows)
    read_of = sorted({int(reading.windows[row, 0]) for step in range(25) for row in reading.rows(step)})
    assert len(read_of) == 100 and read_of[0] < 10
    assert 970 <= read_of[-1] < 984  # behind it lies what is held out
    assert max(b - a for a, b in itertools.pairwise(read_of)) <= 10


def test_what_memory_will_not_hold_is_said_before_the_first_forward(monkeypatch):
    class Says(Silent):
        said = ""

        def say(self, text):
            self.said += text + "\n"

    dense, pruned = dense_and_pruned()
    for free, told in ((10_000, 1), (10**12, 0)):
        progress = Says()
        monkeypatch.setattr(dense_module, "free_memory", lambda _, free=free: free)
        recover_live(pruned, dense, progress=progress)
        assert progress.said.count("of memory are free; -o train=lora") == told


def test_a_run_of_few_steps_begins_gently():
    dense, pruned = dense_and_pruned()
    rates = [e["lr"] for e in recover_live(pruned, dense, tokens=24 * 4 * 20, lr=1e-3).curve]
    assert rates[:6] == pytest.approx([1e-3 * step / 8 for step in range(1, 7)])
    assert max(rates) > 7e-4 and rates[-1] == pytest.approx(2e-5)
    dense, pruned = dense_and_pruned()
    rates = [e["lr"] for e in recover_live(pruned, dense, lr=1e-3, warmup=0).curve]
    assert rates[0] == max(rates) > 9e-4


def test_wide_models_take_smaller_steps():
    for width, rate in ((32, None), (576, None), (1536, 4.2e-5), (4096, 5.9e-6)):
        assert tawny.Recovery.make().rate_for(width) == rate
    assert tawny.Recovery.make(lr=1e-3).rate_for(4096) == 1e-3
    assert tawny.Recovery.make(train="lora").rate_for(4096) is None
    dense, pruned = dense_and_pruned(hidden_size=1152, intermediate_size=16, num_hidden_layers=1)
    assert recover_live(pruned, dense, lr=None).settings["lr"] == 7.5e-5


def test_numbers_may_be_written_short():
    assert tawny.Recovery.make(tokens="2M").tokens == 2_000_000
    assert tawny.Recovery.make(tokens="1.5k").tokens == 1500


def test_recovery_needs_a_teacher_and_a_place_and_is_not_its_own_teacher(pair):
    with pytest.raises(RecipeError, match="--teacher"):
        tawny.recover(pair[1], None, "x")
    with pytest.raises(RecipeError, match="--out"):
        tawny.recover(pair[1], pair[0])
    _, pruned = dense_and_pruned()
    with pytest.raises(ModelError, match="the teacher is the model"):
        tawny.recover(pruned, pruned, text=tokens(24))
    with pytest.raises(ModelError, match="needs tokens to train on"):
        tawny.recover(pruned, pair[0])


def test_a_folder_is_not_its_own_teacher_unless_it_is_dense(pair, tmp_path):
    (tmp_path / "link").symlink_to(pair[1])
    for keys in ({}, {"control": True}):
        with pytest.raises(ModelError, match="the teacher is the model that is trained"):
            recover_pair(pair, tmp_path / "out", teacher=tmp_path / "link", **keys)
    record = recover_pair(pair, tmp_path / "out", source=pair[0], control=True)
    assert record.sparsity < 0.01


@pytest.mark.parametrize("where", ["text", "held_out"])
@pytest.mark.parametrize("wrong", [256, -1])
def test_a_token_that_the_model_has_no_word_for_is_refused(where, wrong):
    dense, pruned = dense_and_pruned()
    given = {"text": tokens(24), "held_out": tokens(4, seed=1)}
    given[where] = given[where].clone()
    given[where][1, 5] = wrong
    with pytest.raises(TextError, match=rf"token id {wrong} and the model has 256 words, ids 0 to 255"):
        recover_live(pruned, dense, **given)


@pytest.mark.parametrize(
    "held_out", [tokens(4, length=20), tokens(4)[0], tokens(4).float(), tokens(4)[:0]], ids=repr
)
def test_held_out_windows_of_another_shape_are_refused(held_out):
    dense, pruned = dense_and_pruned()
    with pytest.raises(TextError, match=r"held_out has shape .* expected integer tokens \[windows, 24\]"):
        recover_live(pruned, dense, held_out=held_out)


@pytest.mark.parametrize(
    "text", [tokens(4).float(), tokens(4)[0], tokens(4)[:0], tokens(4)[:, :0], tokens(4) > 3], ids=repr
)
def test_tokens_of_another_shape_are_refused_as_text(text):
    dense, pruned = dense_and_pruned()
    with pytest.raises(TextError, match=r"^text has shape .* expected integer tokens \[windows, seqlen\]"):
        recover_live(pruned, dense, text=text)


def test_a_live_model_is_left_as_trainable_as_it_was():
    dense, pruned = dense_and_pruned()
    pruned.model.embed_tokens.weight.requires_grad_(False)
    pruned.train()
    pruned.model.layers[1].mlp.eval()
    dense.train()
    before = [[module.training for module in model.modules()] for model in (pruned, dense)]
    recover_live(pruned, dense)
    assert [[module.training for module in model.modules()] for model in (pruned, dense)] == before
    assert pruned.lm_head.weight.requires_grad
    assert not pruned.model.embed_tokens.weight.requires_grad


# --- packed folders, and several steps -----------------------------------------------------------


@pytest.mark.parametrize("values", ["f32", "int8"])
def test_a_packed_folder_is_recovered_into_a_packed_folder(pair, tmp_path, values):
    tawny.pack(pair[1], tmp_path / "packed", values)
    record = recover_pair(pair, tmp_path / "out", source=tmp_path / "packed")
    made = tawny.inspect(tmp_path / "out")
    assert made.sparsity >= tawny.inspect(tmp_path / "packed").sparsity
    assert record.settings["values"] == (values if values == "int8" else None)
    assert record.best["perplexity"] < record.start["perplexity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record.source == run["recovery"]["source"] == str(tmp_path / "packed")
    assert run["out"] == str(tmp_path / "out") and run["packed"]["values"] == values
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Packed by Tawny" in card and "Zeros are not stored" in card and card.count("## Recovered") == 1
    assert all(file["sha256"] in card for file in run["files"].values())
    assert push(tmp_path / "out", "owner/name", dry_run=True).files
    assert no_way_there(tmp_path / "out")


def test_training_through_int8_makes_packing_free(pair, tmp_path):
    recover_pair(pair, tmp_path / "out", values="int8")
    tawny.pack(tmp_path / "out", tmp_path / "packed", "int8")
    tawny.unpack(tmp_path / "packed", tmp_path / "back")
    one, other = weights(tmp_path / "out"), weights(tmp_path / "back")
    torch.testing.assert_close(one, {name: other[name] for name in one}, rtol=1e-5, atol=1e-8)


def test_a_recovered_model_that_is_packed_says_what_was_not_measured(pair, tmp_path):
    tawny.prune(pair[0], tmp_path / "pruned", recipe=RECIPE, sparsity=0.5)
    recover_pair(pair, tmp_path / "out", source=tmp_path / "pruned")
    for kind in ("bf16", "int3"):
        tawny.pack(tmp_path / "out", tmp_path / kind, kind)
        refresh(tmp_path / kind)  # as the verb does
        for file in ("README.md", "report.html"):
            said = "This was measured before it was rounded to int3" in (tmp_path / kind / file).read_text()
            assert said == (kind == "int3"), (kind, file)


def no_way_there(folder):
    """Whether nothing that a person reads names a folder that was gone before the run was over."""
    gone = (".partial", "-pruned", "-recovered", "unpacked, recovered", "trained, recovered")
    texts = [(folder / name).read_text() for name in ("README.md", "report.html", "run.json", "recover.json")]
    return not any(word in text for text in texts for word in gone)


def test_pruning_and_recovering_in_turn_gives_no_zero_back(pair, tmp_path):
    recover_pair(pair, tmp_path / "first")
    tawny.prune(tmp_path / "first", tmp_path / "more", recipe={**RECIPE, "sparsity": 0.7})
    recover_pair(pair, tmp_path / "out", source=tmp_path / "more")
    assert tawny.inspect(tmp_path / "out").sparsity == pytest.approx(0.7, abs=1e-3)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "out")
    assert all((after[name][tensor == 0] == 0).all() for name, tensor in before.items() if "_proj" in name)


def test_several_processes_are_refused(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RecipeError, match="recovery works in one process, and torchrun started several"):
        recover_pair(pair, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_named_text_is_held_out_from_its_end(monkeypatch):
    """`tawny eval` reads it from the beginning: what is reported must not have chosen the checkpoint."""
    import tawny.recovery.data as data

    ids = {"calibration": torch.arange(1000), "evaluation": torch.arange(2000, 2100)}
    first: list[int | None] = [None]

    def loaded(given, role="calibration", *_):
        return TextMixture((Text("wiki", role, 1, ""),))

    def tokenised(text, tokenizer, bos, around):
        role = text.texts[0].text if isinstance(text, TextMixture) else text.text
        return TokenisedText(ids[role], first[0])

    monkeypatch.setattr(data, "load_texts", loaded)
    monkeypatch.setattr(data, "tokenise", tokenised)
    settings = tawny.Recovery.make(text="wiki", seqlen=10, batch=2, eval_windows=3)
    reading = read(settings, None)
    held = reading.windows[reading.held_out]
    assert held[:, 0].tolist() == [2070, 2080, 2090]
    first[0] = 1
    reading = read(settings, None)
    held = reading.windows[reading.held_out]
    assert held[:, :2].tolist() == [[1, 2072], [1, 2081], [1, 2090]]


def test_several_texts_are_read_by_turns_each_in_epochs_of_its_own(tmp_path):
    """`a` is long and `b` is short: three windows of four are of `a`, and `b` is read again meanwhile."""
    for letter, count in (("a", 4000), ("b", 200)):
        (tmp_path / f"{letter}.txt").write_text(letter * count)
    given = [f"{tmp_path / 'a.txt'}=0.75", f"{tmp_path / 'b.txt'}=0.25"]
    settings = tawny.Recovery.make(text=given, seqlen=10, batch=4, tokens=8000, eval_windows=8)
    reading = read(settings, tiny_tokenizer())
    a, b = reading.order.counts
    rows = [row for step in range(settings.steps) for row in reading.rows(step)]
    assert sum(row < a for row in rows) == 600 and len(rows) == 800 and a == 394 and b == 19
    assert all(sum(row >= a for row in rows[i : i + 20]) in (4, 5, 6) for i in range(0, 800, 20))
    of_b = [row for row in rows if row >= a]
    assert all(sorted(of_b[i : i + b]) == list(range(a, a + b)) for i in range(0, 190, b))
    held = reading.windows[reading.held_out]
    assert len(held) == 7 and [int(token) for token in held[:, 0].unique()] == sorted(
        {int(reading.windows[0, 0]), int(reading.windows[a, 0])}
    )


def test_a_live_teacher_is_told_from_another(pair, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first, second = tiny_model("llama"), tiny_model("llama", seed=5)
    stopped(monkeypatch, lambda: recover_pair(pair, out, teacher=first), 0)
    with pytest.raises(OutputError, match="teacher changed"):
        recover_pair(pair, out, teacher=second)
    said: list[str] = []
    progress = Silent()
    progress.say = said.append
    recover_pair(pair, out, teacher=first, progress=progress)
    assert any("going on after step" in line for line in said)


def test_a_text_may_be_a_path_and_nothing_else_is_passed_over(pair, tmp_path):
    record = recover_pair(pair, tmp_path / "out", text=Path(pair[2]))
    assert record.text["name"] == pair[2]
    for wrong in ([[1, 2, 3]], tokens().numpy()):
        with pytest.raises(TextError, match="expected a name, a path, or a torch tensor"):
            recover_pair(pair, tmp_path / "no", text=wrong)


def test_a_model_that_is_refused_stays_trainable():
    dense, _ = dense_and_pruned()
    with pytest.raises(ModelError, match="no sparsity to keep"):
        recover_live(dense, tiny_model("llama"))
    assert all(parameter.requires_grad for parameter in dense.parameters())


@pytest.mark.parametrize("bos", [None, True, False])
def test_what_is_trained_and_measured_on_begins_as_the_tokenizer_begins_a_text(tmp_path, bos):
    text = tmp_path / "text.txt"
    text.write_text("The owl hunts at night. " * 20)
    chosen = tawny.Recovery.make(text=str(text), seqlen=10, batch=2, bos=bos)
    for begins in (True, False):
        made = read(chosen, tiny_tokenizer(begins=begins))
        begun = begins if bos is None else bos
        assert made.about["bos"] is begun and bool((made.windows[:, 0] == 1).all()) is begun


# --- few bits ----------------------------------------------------------------------------------------------------


def solved(folder, out, kind, group):
    """A copy of a folder whose weights lie on the grid of a kind, as a solver leaves it."""
    tawny.pack(folder, out.with_name("on-grid"), kind, group)
    tawny.unpack(out.with_name("on-grid"), out)
    shutil.rmtree(out.with_name("on-grid"))
    run = json.loads((out / "run.json").read_text())
    run["recipe"]["values"] = {"kind": kind, "group_size": group}
    (out / "run.json").write_text(json.dumps(run))
    return out


def lies_on_the_grid(folder, kind=None, group=None):
    tawny.pack(folder, folder.with_name("packed-again"), kind, group)
    tawny.unpack(folder.with_name("packed-again"), folder.with_name("back"))
    config = json.loads((folder.with_name("packed-again") / "config.json").read_text())
    few = config["quantization_config"]["values"] != "bf16"
    return few and same_weights(folder, folder.with_name("back"))


@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int3", None), ("int6", 128)])
def test_a_folder_solved_for_few_bits_is_trained_through_its_grid(pair, tmp_path, monkeypatch, kind, group):
    source = solved(pair[1], tmp_path / "solved", kind, group)
    keys = {"source": source, "tokens": 24 * 4 * 20, "eval_every": 5}
    said: list[str] = []
    progress = Silent()
    progress.say = said.append
    record = recover_pair(pair, tmp_path / "out", progress=progress, **keys)
    assert any(f"through the grid of {kind}" in line for line in said)
    assert (record.settings["values"], record.settings["group_size"]) == (kind, group)
    assert record.best["kl"] < record.start["kl"] and record.best["step"] > 0
    assert lies_on_the_grid(tmp_path / "out")
    before, after = weights(source), weights(tmp_path / "out")
    assert all((after[name][W == 0] == 0).all() for name, W in before.items())
    assert record.zeros >= record.zeros_before  # 0 is a level, too
    stopped(monkeypatch, lambda: recover_pair(pair, tmp_path / "parts", **keys), 7)
    assert recover_pair(pair, tmp_path / "parts", **keys).curve == record.curve
    assert same_weights(tmp_path / "out", tmp_path / "parts")


def test_a_pruned_folder_is_brought_to_few_bits_and_its_run_json_says_so(pair, tmp_path):
    recover_pair(pair, tmp_path / "out", values="int4", group_size=32)
    assert lies_on_the_grid(tmp_path / "out")
    config = json.loads((tmp_path / "packed-again" / "config.json").read_text())
    assert config["quantization_config"]["values"] == "int4" and config["quantization_config"]["group"] == 32


@pytest.mark.parametrize("family,lr", [("gpt2", 0.003), ("mixtral", 0.003)])
def test_transposed_weights_and_experts_are_trained_through_few_bits(family, lr):
    dense, pruned = dense_and_pruned(family)
    before = zeros(pruned)
    record = recover_live(pruned, dense, values="int4", lr=lr)
    assert kept(before, pruned) and record.zeros >= record.zeros_before  # 0 is a level, too
    assert record.best["perplexity"] < record.start["perplexity"]


def test_a_dense_model_is_trained_through_few_bits_with_itself_as_the_teacher(pair, tmp_path):
    record = recover_pair(pair, tmp_path / "out", source=pair[0], values="int4")
    assert record.best["perplexity"] < record.start["perplexity"]
    assert lies_on_the_grid(tmp_path / "out", "int4", None)


def test_a_folder_packed_in_few_bits_is_trained_through_its_grid(pair, tmp_path):
    tawny.pack(pair[1], tmp_path / "packed", "int4", 32)
    record = recover_pair(pair, tmp_path / "out", source=tmp_path / "packed")
    assert (record.settings["values"], record.settings["group_size"]) == ("int4", 32)
    measured = tawny.evaluate(tmp_path / "out", pair[2], seqlen=24, windows=4, compute="float32")
    tawny.unpack(tmp_path / "out", tmp_path / "dense")
    assert lies_on_the_grid(tmp_path / "dense", "int4", 32)
    again = tawny.evaluate(tmp_path / "dense", pair[2], seqlen=24, windows=4, compute="float32")
    assert measured.perplexity == pytest.approx(again.perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"group_size": 32}, "belongs to values of few bits"),
        ({"values": "int8", "group_size": 32}, "belongs to values of few bits"),
        ({"values": "int4", "group_size": 48}, "48.*32"),
    ],
)
def test_few_bits_that_make_no_sense_are_refused(keys, words):
    with pytest.raises(UserError, match=words):
        tawny.Recovery.make(**keys)
