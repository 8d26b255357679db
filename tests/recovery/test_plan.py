"""`tawny plan recover`: what it says against what the same run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tawny
from tawny.errors import ModelError, RecipeError
from tests.recovery.models import RECIPE, folder_keys, recover_pair, save_letters
from tests.tiny import tiny_model

GRIDS = {"int8": None, "int4": 32}


def plan_pair(pair, source=None, teacher=None, **more):
    return tawny.plan_recovery(source or pair[1], teacher or pair[0], **folder_keys(pair, **more))


@pytest.mark.parametrize(
    "how",
    [
        {"train": "survivors"},
        {"train": "norms"},
        {"train": "lora", "rank": 3},
        {"values": "int8"},
        {"values": "int4", "group_size": 32},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_a_plan_counts_what_the_run_trains(pair, tmp_path, how):
    plan, record = plan_pair(pair, **how), recover_pair(pair, tmp_path / "out", **how)
    assert (plan.trained, plan.prunable, plan.zeros) == (record.trained, record.prunable, record.zeros_before)
    assert (plan.steps, plan.tokens) == (record.steps, record.tokens)
    assert plan.settings["train"] == record.settings["train"] and plan.written == 0
    assert plan.memory["peak"] >= sum(plan.memory.values()) - plan.memory["peak"] > 0
    assert plan.seconds["total"] == pytest.approx(sum(plan.seconds.values()) / 2, abs=0.01)
    assert plan.disk["checkpoint"] == record.bytes


@pytest.mark.parametrize("values", sorted(GRIDS))
def test_a_plan_of_a_packed_folder_is_of_training_through_its_grid(pair, tmp_path, values):
    packed = tmp_path / "packed"
    tawny.pack(pair[1], packed, values, GRIDS[values])
    before = sorted(tmp_path.rglob("*"))
    plan = plan_pair(pair, source=packed)
    assert sorted(tmp_path.rglob("*")) == before
    record = recover_pair(pair, tmp_path / "out", source=packed)
    assert plan.settings["values"] == record.settings["values"] == values
    assert plan.trained == record.trained and any("unpacked first" in note for note in plan.notes)


def test_checkpointing_and_fewer_windows_at_once_take_less_memory(pair):
    usual = plan_pair(pair).memory["activations"]
    assert plan_pair(pair, checkpointing=True).memory["activations"] < usual
    assert plan_pair(pair, micro_batch=1).memory["activations"] == usual // 4


@pytest.fixture
def slow(monkeypatch):
    """A machine of known speed."""
    for room in ("recovery", "pruning"):
        monkeypatch.setattr(f"tawny.{room}.plan.measured_speed", lambda _: 1e8)


def test_minutes_bound_what_is_read(pair, slow):
    short, long = (plan_pair(pair, minutes=minutes, tokens="500M") for minutes in (1, 10))
    assert 0 < short.tokens < 500_000_000
    assert long.tokens == pytest.approx(10 * short.tokens, rel=0.05)
    assert long.steps * 4 * 24 == long.tokens
    assert 500 < long.seconds["total"] <= 600


def test_a_plan_writes_for_the_share_of_the_text_that_is_the_models_own(pair, slow):
    keys = {"tokens": 24 * 4 * 400}
    whole, half = (plan_pair(pair, text=text, **keys) for text in ("self", ["self=0.5", f"{pair[2]}=0.5"]))
    assert half.written * 2 == whole.written == 24 * 4 * 400
    assert half.seconds["writing"] == pytest.approx(whole.seconds["writing"] / 2, abs=0.1) and half.memory


def test_a_plan_has_the_rate_of_the_run(pair, tmp_path):
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    tiny_model("llama", hidden_size=640).save_pretrained(dense)
    save_letters(dense)
    tawny.prune(dense, pruned, recipe=RECIPE)
    keys = {"source": pruned, "teacher": dense, "lr": None, "tokens": 96}
    plan, record = plan_pair(pair, **keys), recover_pair(pair, tmp_path / "out", **keys)
    assert plan.settings == record.settings and plan.settings["lr"] < 3e-4


def test_who_has_no_text_is_told_what_the_dense_model_writes(pair, tmp_path):
    dense = Path(pair[0])
    plan = plan_pair(pair, text="self")
    assert plan.written > 0
    assert any("writes its text first" in note for note in plan.notes)
    assert not list(dense.parent.glob("*.partial"))


def test_a_plan_refuses_what_the_run_refuses(pair, run):
    with pytest.raises(RecipeError, match="give --teacher DENSE"):
        tawny.plan_recovery(pair[1], **folder_keys(pair))
    with pytest.raises(ModelError, match="the teacher is the model that is trained"):
        plan_pair(pair, teacher=pair[1])
    with pytest.raises(ModelError, match="no sparsity to keep"):
        plan_pair(pair, source=pair[0], teacher=pair[1])
    code, _, err = run("plan", "recover", pair[1], "--teacher", pair[0], "--text", "absent.txt")
    assert code == 2 and "absent.txt" in err and err.count("\n") == 1


def test_the_verb_tells_what_it_takes(pair, run):
    words = ("plan", "recover", pair[1], "--teacher", pair[0], "--text", pair[2], "--seqlen", 24)
    code, shown, err = run(*words, "--minutes", 1)
    assert code == 0 and "peak memory" in shown and "values (survivors) on about" in shown, err
    code, shown, err = run(*words, "--json")
    assert code == 0 and json.loads(shown)["steps"] == 2_000_000 // (4 * 24) + 1, err
