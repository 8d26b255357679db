"""`tawny.search` through the front door."""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from dataclasses import replace

import pytest
import torch
import yaml

import tawny
from tawny.allocation import ALLOCATORS
from tawny.allocation.profile import Profile
from tawny.calibration.output import OutputFactor
from tawny.choosing import search as module
from tawny.choosing import searched, solving
from tawny.choosing.candidates import _BLENDS, allocators_to_try
from tawny.choosing.divergence import Scorer
from tawny.choosing.settings import FAMILIES, SearchSettings
from tawny.cli.search import search_tables
from tawny.errors import Interrupted, NumericalError, OutputError, RecipeError, TextError
from tawny.model.streams import Samples, repeated_tokens
from tawny.progress import Silent
from tawny.pruning import session as session_module
from tawny.run.journal import Journal
from tawny.run.run import Run
from tawny.run.walk import Advance
from tawny.solvers import SOLVERS
from tests.reference import allocators as reference
from tests.reference.problems import lifelike
from tests.tiny import tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

FEW = {"search.trials": 12, "search.offspring": 4, "search.levels": 3, "search.windows": 2}
FEW |= {"search.candidates": "owl,atp"}
PRUNING = {"sparsity": 0.6, "compute": "float32", "calibration": tokens(8, 24)}


def search(model, out=None, **changes):
    return tawny.search(model, out, **{**PRUNING, **FEW, **changes})


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def dense(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


class Stops(Silent):
    """Ctrl-C at a step of a phase; counts steps, and keeps what is said."""

    def __init__(self, phase="", step=0):
        self.stop, self.name, self.seen, self.said = (phase, step), "", {}, []

    def phase(self, name: str, total: int, unit: str = "blocks") -> None:
        self.name = name

    def step(self, text: str) -> None:
        self.seen[self.name] = self.seen.get(self.name, 0) + 1
        if self.stop == (self.name, self.seen[self.name]):
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        self.said.append(text)


def interrupted(dense, out, phase="solving at each level", step=1, **changes):
    with pytest.raises(Interrupted, match=r"blocks? solved at each level are kept") as stopped:
        search(dense, out, progress=Stops(phase, step), **changes)
    return stopped


@pytest.mark.parametrize(
    ("solver", "pattern"),
    [
        ("magnitude", "matrix"),
        ("wanda", "unstructured"),
        ("wanda", "2:4"),
        ("sparsegpt", "2:4"),
        ("alps", "row"),
    ],
)
def test_an_allocation_for_every_solver_and_pattern_meets_its_budget(solver, pattern):
    assert solver in SOLVERS
    keys = {"solver": solver, "pattern": pattern, "sparsity": 0.5}
    model = tiny_model("llama")
    found = search(model, **keys)
    sizes = {x.name: x.shape[0] * x.shape[1] for x in tawny.prune(model, **{**PRUNING, **keys}).linears}
    removed = sum(found.allocation[name] * size for name, size in sizes.items())
    step = sum(size for name, size in sizes.items() if ".layers.0." in name) / 4 if ":" in pattern else 1
    assert abs(removed - 0.5 * sum(sizes.values())) <= max(step, len(sizes))
    assert found.winner and len(found.trials) <= 12


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma3_text"])
def test_experts_and_odd_families_are_searched_like_any_other(family):
    found = search(tiny_model(family), exclude=["layers.1.*"] if family == "mixtral" else [])
    assert 0.3 < min(found.allocation.values()) <= 0.6 <= max(found.allocation.values())
    assert found.levels["count"] == 3


def test_the_same_search_gives_the_same_and_prune_takes_its_file(drawn, dense, tmp_path):
    options = {"refit": True, "search.candidates": "owl,dlp,atp,lsa", "search.trials": 40}
    first, second = (search(dense, tmp_path / f"{name}.yaml", **options) for name in "ab")
    assert first.allocation == second.allocation and first.trials == second.trials
    for kind in ("yaml", "png", "svg"):
        a, b = ((tmp_path / f"{name}.{kind}").read_bytes() for name in "ab")
        assert a.replace(b"a.yaml", b"b.yaml") == b
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == first.allocation
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["trials"] == first.trials and told["allocation"] == first.allocation
    assert not list(tmp_path.glob("*.partial"))
    keys = {"allocator": "file", "allocator.path": str(tmp_path / "a.yaml"), "refit": True}
    record = tawny.prune(dense, tmp_path / "pruned", **PRUNING, **keys)
    assert record.allocation == first.allocation
    assert abs(record.zeros - 0.6 * record.prunable) <= len(record.linears)


def test_a_mixed_n_of_m_for_each_linear_survives_its_file(dense, tmp_path):
    keys = {"pattern": "3:8", "sparsity": None, "seed": 3}
    found = search(dense, tmp_path / "a.yaml", **keys, **{"search.levels": 5, "search.trials": 60})
    again = {"allocator": "file", "allocator.path": str(tmp_path / "a.yaml")}
    record = tawny.prune(dense, tmp_path / "b", **{**PRUNING, **keys, **again})
    assert {x.pattern for x in record.linears} != {"3:8"}
    assert {x.name: x.target for x in record.linears} == found.allocation


def test_a_live_model_is_searched_like_its_folder_and_stays_as_it_was(dense, tmp_path):
    live = tiny_model("llama")
    before = {name: value.clone() for name, value in live.state_dict().items()}
    assert search(live).allocation == search(dense).allocation
    assert search(live, tmp_path / "live.yaml").allocation == search(dense, tmp_path / "a.yaml").allocation
    assert all(torch.equal(value, before[name]) for name, value in live.state_dict().items())


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize(
    ("phase", "steps"),
    [("solving at each level", 2), ("trying allocations", 3), ("pruning finalists", 5)],
)
def test_a_search_that_was_stopped_goes_on_and_gives_the_same(
    dense, tmp_path, monkeypatch, phase, steps, spilled
):
    options = {"search.candidates": "owl,dlp", "search.trials": 20, "solver": "sparsegpt"}
    if spilled:
        monkeypatch.setattr(session_module, "available", lambda _: 0)
    monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
    scored, measure = [], Scorer._measure
    monkeypatch.setattr(
        Scorer, "_measure", lambda self, some, rows: scored.append(1) or measure(self, some, rows)
    )
    began = time.perf_counter()
    whole = search(dense, tmp_path / "whole.yaml", **options)
    assert whole.memory["hidden_states"] == ("disk" if spilled else "memory")
    assert whole.seconds["search"] <= whole.seconds["total"] <= time.perf_counter() - began
    needed = len(scored)
    interrupted(dense, tmp_path / "out.yaml", phase, steps, **options)
    again = Stops()
    resumed = search(dense, tmp_path / "out.yaml", progress=again, **options)
    assert resumed.trials == whole.trials and resumed.allocation == whole.allocation and resumed.resumed == 1
    assert not (tmp_path / "out.yaml.partial").exists()
    assert (again.seen.get("solving at each level", 0) == 0) == (phase != "solving at each level")
    assert len(scored) == 2 * needed  # nothing twice
    proven = sum(trial["proof"] is not None for trial in whole.trials)
    assert again.seen["pruning finalists"] == 3 * (proven - (phase == "pruning finalists"))


def test_hidden_states_go_to_disk_where_nothing_is_written(dense, monkeypatch):
    options = {"search.candidates": "owl,dlp", "search.trials": 4, "solver": "sparsegpt"}
    plain = search(dense, None, **options)
    made, spill = [], Run.spill
    monkeypatch.setattr(Run, "spill", lambda self, *given: made.append(spill(self, *given)) or made[-1])
    monkeypatch.setattr(session_module, "available", lambda _: 0)
    spilled = search(dense, None, **options)
    assert spilled.memory["hidden_states"] == "disk" and spilled.allocation == plain.allocation
    paths = {path.name: path for path in made if path is not None}  # trials keep theirs in memory
    assert paths.keys() == {"levels.pruned", "levels.profiled", "rehearsal.pruned"}
    assert not any(path.exists() for path in paths.values())


def test_an_unfinished_search_is_gone_on_with_only_by_the_same_one(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
    out = tmp_path / "out.yaml"
    interrupted(dense, out)
    with pytest.raises(OutputError, match="trials was 12, now 13"):
        search(dense, out, **{"search.trials": 13})
    lost = tmp_path / "out.yaml.partial" / "steps" / "levels" / "00000.safetensors"
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(OutputError, match=r"00000.safetensors, which an unfinished search goes on from, is"):
        search(dense, out)
    lost.write_bytes(kept)
    assert search(dense, out).resumed == 2
    with pytest.raises(
        OutputError, match=r"out\.yaml, out\.json, out\.png, out\.svg exist; choose another --out or"
    ):
        search(dense, out)
    assert search(dense, out, overwrite=True).resumed == 0
    interrupted(dense, out, overwrite=True)
    assert search(dense, out, overwrite=True).resumed == 1
    interrupted(dense, out, overwrite=True)
    assert search(dense, out, overwrite=True, **{"search.trials": 13}).resumed == 0


def test_a_live_model_takes_no_unfinished_search_with_it(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
    out = tmp_path / "out.yaml"
    interrupted(dense, out)
    with pytest.raises(OutputError, match="holds an unfinished run: repeat its command"):
        search(tiny_model("llama"), out)
    assert search(dense, out).resumed == 1


def test_what_was_written_after_the_journal_takes_no_room_from_the_rest(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
    out = tmp_path / "out.yaml"
    interrupted(dense, out)
    levels = tmp_path / "out.yaml.partial" / "steps" / "levels"
    stray = levels / f"{len(list(levels.glob('*.safetensors'))):05d}.safetensors"
    stray.write_bytes(b"begun")
    asked = []
    monkeypatch.setattr(solving, "free_bytes", lambda _: asked.append(stray.exists()) or 10**12)
    search(dense, out)
    assert asked == [False]


@pytest.mark.parametrize("kind", ["json", "png", "svg"])
def test_a_file_beside_the_allocation_is_replaced_only_on_demand(dense, tmp_path, kind):
    beside = tmp_path / f"mine.{kind}"
    beside.write_text("mine")
    with pytest.raises(OutputError, match=rf"mine\.{kind} exists; choose another --out or pass --overwrite"):
        search(dense, tmp_path / "mine.yaml")
    assert beside.read_text() == "mine" and not list(tmp_path.glob("*.partial"))
    search(dense, tmp_path / "mine.yaml", overwrite=True)
    assert beside.read_bytes() != b"mine"


def test_no_file_of_the_model_is_ever_replaced(dense, monkeypatch):
    before = (dense / "config.json").read_bytes()
    (dense / "config.yaml").write_text("a: 1")
    for overwrite in (False, True):
        with pytest.raises(
            OutputError, match=r"would replace .*config\.yaml, config\.json of the model; choose another"
        ):
            search(dense, dense / "config.yaml", overwrite=overwrite)
    assert (dense / "config.json").read_bytes() == before
    search(dense, dense / "allocation.yaml")
    search(dense, dense / "allocation.yaml", overwrite=True)  # files of a search are no files of the model


def test_a_search_that_was_killed_between_its_files_goes_on(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(searched, "deliver_allocation", _interrupts)
        search(dense, tmp_path / "a.yaml")
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.png", "a.svg", "a.yaml.partial"]
    assert search(dense, tmp_path / "a.yaml").resumed == 1


def _interrupts(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pattern": "heads", "sparsity": 0.3, "solver": "magnitude"}, "-p heads -m magnitude"),
        ({"pattern": "channels", "sparsity": 0.31, "solver": "wanda"}, "-p channels -m wanda"),
        ({"solver": "magnitude", "values": "int4"}, "-s 0.6 -m magnitude -o compute=float32 --values int4"),
        ({"solver": "alps"}, "-s 0.6 -o compute=float32 -a"),
        (
            {
                "solver": "alps",
                "solver.damp": 0.02,
                "exclude": "*.q_proj",
                "values": "int4",
                "values.group_size": 32,
            },
            "-s 0.6 -o solver.damp=0.02 -o 'exclude=[\"*.q_proj\"]' -o compute=float32 --values int4 -o values.group_size=32",
        ),
        ({"compat": "official", "solver": "alps"}, "-m alps"),
    ],
)
def test_the_command_in_the_file_prunes_by_it(dense, tmp_path, run, monkeypatch, keys, said):
    found = search(dense, tmp_path / "a b.yaml", **keys, **{"search.trials": 2, "search.candidates": "atp"})
    line = (tmp_path / "a b.yaml").read_text().splitlines()[1]
    assert said in line
    monkeypatch.chdir(tmp_path)
    words = shlex.split(
        line.removeprefix("# Use it: tawny ").replace("MODEL", "dense").replace("DIR", "made")
    )
    tiny_tokenizer().save_pretrained(dense)
    (tmp_path / "text.txt").write_text(" ".join(str(n * 7 % 997) for n in range(400)))
    code, _, err = run(*words, "--calibration", "text.txt", "--samples", 4, "--seqlen", 24)
    assert code == 0, err
    assert json.loads((tmp_path / "made" / "run.json").read_text())["allocation"] == found.allocation


def test_a_search_on_other_held_out_text_is_another_one(dense, tmp_path, monkeypatch):
    tiny_tokenizer().save_pretrained(dense)
    text = "\n\n".join(" ".join(str(n * k % 997) for n in range(60)) for k in range(1, 40))
    (tmp_path / "text.txt").write_text(text)
    options = {"calibration": tmp_path / "text.txt", "samples": 4, "seqlen": 24}
    monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
    interrupted(dense, tmp_path / "out.yaml", **options)
    real = module.held_out_windows
    monkeypatch.setattr(module, "held_out_windows", lambda *args: real(*args).roll(1, 0))
    with pytest.raises(OutputError, match="held-out text changed"):
        search(dense, tmp_path / "out.yaml", **options)


@pytest.mark.parametrize("changes", [{}, {"solver": "sparsegpt", "refit": True}])
@pytest.mark.parametrize("placed", ["memory", "disk", "live"])
def test_a_proof_is_the_divergence_of_the_model_that_pruning_makes(
    dense, tmp_path, monkeypatch, changes, placed
):
    """Of the winner: what `prune` writes, whole, by plain transformers."""
    from transformers import AutoModelForCausalLM

    if placed == "disk":
        monkeypatch.setattr(session_module, "available", lambda _: 0)
    given = tokens(8, 24, seed=4)
    source = tiny_model("llama") if placed == "live" else dense
    found = search(source, tmp_path / "a.yaml", calibration=given, **changes)
    assert placed == "live" or found.memory["hidden_states"] == placed
    assert not list(tmp_path.rglob("*.tmp"))
    proofs = [x["proof"] for x in found.trials if x["proof"] is not None]
    # Of 8 samples a quarter is held out; the later of these two decides, and the others calibrate.
    [window] = Samples(given[6:]).repeating(0.125).tokens[1:]
    keys = {"allocator": "file", "allocator.path": str(tmp_path / "a.yaml"), "calibration": given[:6]}
    made = tawny.prune(dense, tmp_path / "again", **{**PRUNING, **keys, **changes})
    assert made.allocation == found.allocation
    models = [AutoModelForCausalLM.from_pretrained(x).double() for x in (dense, tmp_path / "again")]
    with torch.no_grad():
        p, q = (model(window[None]).logits.log_softmax(-1) for model in models)
    assert min(proofs) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert f"{len(proofs)} of them pruned in earnest" in found.says
    assert found.margin_stderr is None  # one window tells nothing of chance
    if found.solver == found.recipe["solver"]["name"]:  # no other one's solutions stood for its own
        # Linears were solved behind uniform blocks: put together from these solutions, uniform is what a run makes.
        assert found.trials[0]["verdict"] == pytest.approx(found.trials[0]["proof"], rel=1e-4)


@pytest.mark.parametrize(("given", "searched", "deciding"), [(40, 2, 8), (20, 2, 3), (8, 1, 1), (2, 1, 0)])
def test_more_windows_decide_than_are_searched_on_where_there_are_enough(given, searched, deciding):
    held_out = search(tiny_model("llama"), calibration=tokens(given, 24, seed=4)).held_out
    assert (held_out["windows"], held_out["deciding"]) == (searched, deciding)


def test_a_live_model_is_dense_again_when_a_finalist_breaks_down_and_uniform_wins(monkeypatch):
    model, seen = tiny_model("llama"), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real = module.rehearse

    def fails(self, block):
        seen.append(any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()))
        raise NumericalError("NaN")

    def breaks(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(Advance, "visit", fails)
            try:
                return real(*args, **kwargs)
            finally:
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    monkeypatch.setattr(module, "rehearse", breaks)
    found = search(model)
    assert len(seen) > 1 and all(seen)  # the first block was pruned when it broke down
    assert found.winner == "uniform" and found.margin == 0
    rows = [
        dict(zip(("name", "verdict", "proof"), row, strict=True))
        for row in search_tables(found.to_dict())[0].rows
    ]
    broken = [trial["name"] for trial in found.trials if trial["broke_down"]]
    shown = {row["name"] for row in rows if row["proof"] == "broke down"}
    assert broken and shown == set(broken)


def test_a_lead_over_uniform_has_an_error_where_several_windows_decide():
    found = search(tiny_model("llama"), calibration=tokens(40, 24), **{"search.trials": 30})
    assert found.winner != "uniform" and found.held_out["deciding"] == 8
    assert found.margin_stderr > 0 and f"{found.margin:.1%} ± {found.margin_stderr:.1%} nearer" in found.says
    unsure = found.margin < 2 * found.margin_stderr
    assert any("do not tell the winner from uniform" in line for line in found.warnings) == unsure


def test_finalists_can_be_left_out():
    found = search(tiny_model("llama"), **{"search.finalists": 0})
    assert all(trial["proof"] is None for trial in found.trials) and "in earnest" not in found.says


def test_a_nan_weight_names_its_linear():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.1"):
        search(model)


# --- what is refused, and what is said ---------------------------------------------------------------------


def test_what_cannot_be_is_said_before_the_work(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "solve_levels", None)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "full.yaml.partial").mkdir()
    (tmp_path / "full.yaml.partial" / "mine").write_text("")
    for out, words in (
        ("allocation.txt", "does not end in .yaml"),
        ("folder.yaml", "exists"),
        ("nowhere/a.yaml", "its folder does not exist"),
        ("full.yaml", "'mine', which no run of Tawny put there"),
    ):
        with pytest.raises(OutputError, match=words):
            search(dense, tmp_path / out)
    with pytest.raises(RecipeError, match="leave the allocator out"):
        search(dense, allocator="owl")
    bits = {"values.mean": 4, "values.of": ["int3", "int5"]}
    with pytest.raises(RecipeError, match="spends the budget in bits"):
        search(dense, sparsity=None, **bits)
    with pytest.raises(TextError, match="at least 2 samples"):
        search(tiny_model("llama"), calibration=tokens(1, 24))
    monkeypatch.setattr(solving, "free_bytes", lambda folder: 1000)
    with pytest.raises(OutputError, match=r"fewer search\.levels"):
        search(dense, tmp_path / "out.yaml")
    with pytest.raises(RecipeError, match=r"cannot hold this run.*at least"):
        search(dense, tmp_path / "out.yaml", memory="1MB")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"budget": "soon"}, "90s, 10m"),
        ({"levels": 4}, "odd"),
        ({"levels": 1}, "greater than or equal to 3"),
        ({"candidates": "owl,dlpp"}, "did you mean 'dlp'"),
        ({"repeat": 0.6}, r"search\.repeat is 0\.6"),
        ({"finalists": 5}, r"search\.finalists is 5"),
        ({"trial": 5}, r"search\.trial is not a known search key.*trials"),
    ],
)
def test_settings_out_of_range_are_refused(keys, words):
    with pytest.raises(RecipeError, match=words):
        SearchSettings.make(**keys)


def test_times_are_read():
    texts = ("90s", "10m", "1.5h", "7", "2 min", 90)
    assert [SearchSettings.make(budget=text).seconds for text in texts] == [90, 600, 5400, 7, 120, 90]
    assert SearchSettings.make().seconds is None


def test_a_budget_of_time_may_cut_the_search_short_and_then_says_so(dense, tmp_path):
    found = search(dense, tmp_path / "a.yaml", **{"search.budget": "0s", "search.trials": 50})
    assert "the budget of 0s ended the search after" in found.cut_short
    assert found.cut_short in found.says and found.says in (tmp_path / "a.yaml").read_text()


@pytest.mark.parametrize(("solver", "used"), [("alps", "sparsegpt"), ("wanda", "wanda")])
def test_a_quick_solver_stands_for_a_slow_one_while_allocations_are_compared(solver, used):
    found = search(tiny_model("llama"), **{"solver": solver, "search.trials": 2})
    assert found.solver == used and found.recipe["solver"]["name"] == solver


@pytest.mark.parametrize("begins", [True, False])
def test_what_a_search_compares_on_begins_as_its_samples_do(tmp_path, dense, monkeypatch, begins):
    (tmp_path / "text.txt").write_text("The owl hunts at night. " * 40)
    seen, split = [], module._split
    monkeypatch.setattr(module, "_split", lambda *args: seen.append(split(*args)) or seen[-1])
    tiny_tokenizer(begins=begins).save_pretrained(dense)
    keys = {"samples": 4, "seqlen": 24, "search.trials": 4, "search.repeat": 0.5, "solver": "wanda"}
    search(dense, calibration=tmp_path / "text.txt", **keys)
    for part in seen.pop():
        assert bool((part.tokens[:, 0] == 1).all()) is begins and not (part.tokens[:, 1:] == 1).any()


def test_a_picture_that_cannot_be_drawn_does_not_fail_the_search(dense, tmp_path, monkeypatch):
    def broken(_, path, **__):
        path.write_text("half")
        raise ValueError("no ink")

    monkeypatch.setattr("tawny.report.plot.plot_allocations", broken)
    progress = Stops()
    search(dense, tmp_path / "a.yaml", progress=progress)
    for kind in ("png", "svg"):
        assert any(re.search(rf"a\.{kind} could not be made: ValueError: no ink", x) for x in progress.said)
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.json", "a.yaml"]


@pytest.mark.parametrize("changes", [{"sparsity": 0.995}, {"pattern": "1:4", "sparsity": None}])
def test_a_sparsity_that_leaves_nothing_to_search_is_said(dense, changes):
    progress = Stops()
    found = search(dense, progress=progress, **changes)
    share = "75.0%" if "pattern" in changes else "99.5%"
    assert found.says == f"uniform: a sparsity of {share} leaves no room for other allocations"
    assert found.levels["count"] == 1 and any("at 1 level from" in text for text in progress.said)


def test_a_record_of_broken_models_is_json(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "__call__", lambda self, some, windows: [math.inf] * len(some))
    monkeypatch.setattr(Scorer, "judge", lambda self, stream, windows: (math.inf, []))
    search(dense, tmp_path / "a.yaml")
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found["margin"] == 0 and found["trials"][0]["divergence"] is None


# --- candidates --------------------------------------------------------------------------------------------


def test_few_trials_see_every_family():
    tried = [family for family, _, _ in allocators_to_try(("owl", "dlp", "atp"), 0.6, 4)]
    assert tried[:6] == ["owl", "dlp", "atp"] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", [0.25, 0.5, 0.6, 0.7, 0.85])
def test_the_first_thing_tried_of_an_allocator_is_what_it_does_by_itself(family, target):
    tried, alone = (
        next(a for name, _, a in allocators_to_try(FAMILIES, target, 4) if name == family),
        (ALLOCATORS[family]()),
    )
    shapes = reference.model(4)
    measures = []
    for block in range(4):
        seen = {}
        for i, x in enumerate(shapes.linears_of(block)):
            weight, statistics = lifelike(*x.shape, seed=7 * block + i)
            felt = OutputFactor(64, 1e-3 * (1 + block) * torch.linspace(1, 2, x.shape[0]))
            seen[x.name] = (weight, replace(statistics, output=felt))
        measures.append(alone.measure(seen))
    profile = Profile(shapes.linears, tuple(measures))
    assert tried.allocate(profile, target) == pytest.approx(alone.allocate(profile, target))


@pytest.mark.parametrize("target", [0.0, 0.999])
def test_candidates_can_be_made_at_any_sparsity(target):
    assert {family for family, _, _ in allocators_to_try(FAMILIES, target, 1)} == set(FAMILIES)


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_curves_are_tried_as_they_are_alone_whether_or_not_the_solver_asks_the_output(solver, monkeypatch):
    options = {"search.candidates": "curves", "search.trials": 9, "search.finalists": 0, "solver": solver}
    kept, real = [], module.allocate

    def noting(*args):
        kept.append(real(*args))
        return kept[-1]

    monkeypatch.setattr(module, "allocate", noting)
    given = tokens(8, 24, seed=4)
    found = search(tiny_model("llama"), calibration=given, **options)
    assert {f"curves strength={value}" for value in ("0.75", "1", "0.5")} <= {
        trial["name"] for trial in found.trials
    }
    keys = {**PRUNING, "solver": solver, "allocator": "curves", "calibration": given[:6]}
    assert kept[0] == pytest.approx(tawny.prune(tiny_model("llama"), **keys).allocation)
    assert len(set(kept[0].values())) > 1


def test_every_blend_that_is_tried_is_what_it_does_by_itself(monkeypatch):
    """One profile serves all of them."""
    options = {"search.candidates": "blend", "search.trials": 12, "search.finalists": 0}
    kept, real = {}, module.allocate

    def noting(allocator, *args):
        kept[allocator.of] = real(allocator, *args)
        return kept[allocator.of]

    monkeypatch.setattr(module, "allocate", noting)
    given = tokens(8, 24, seed=4)
    found = search(tiny_model("llama"), calibration=given, **options)
    assert {f"blend of={of}" for of in _BLENDS} <= {trial["name"] for trial in found.trials}
    for of in _BLENDS:
        keys = {**PRUNING, "allocator": "blend", "allocator.of": of, "calibration": given[:6]}
        assert kept[of] == pytest.approx(tawny.prune(tiny_model("llama"), **keys).allocation), of


@pytest.mark.parametrize("excluded", ["layers.0.*", "layers.2.*"])
def test_depth_is_counted_where_something_is_pruned(excluded):
    options = {"search.candidates": "atp", "search.trials": 2, "exclude": [excluded]}
    tried = search(tiny_model("llama"), solver="magnitude", **options).blocks
    [atp] = [blocks for name, blocks in tried.items() if name.startswith("atp")]
    assert [share for share in atp if share] == pytest.approx([0.5, 0.7], abs=1e-3)


def test_the_allocation_that_is_found_is_one_that_was_scored():
    options = {"search.trials": 8, "search.candidates": "atp", "search.levels": 11}
    found = search(tiny_model("llama", num_hidden_layers=6), sparsity=0.7, **options)
    for name, blocks in found.blocks.items():
        assert max(blocks) <= found.levels["to"] + 0.01, name


def test_calibration_can_repeat_itself(tmp_path, dense):
    given = tokens(4, 24)
    keys = {"sparsity": 0.6, "allocator": "uniform", "solver": "sparsegpt", "compute": "float32"}
    tawny.prune(dense, tmp_path / "plain", calibration=given, **keys)
    tawny.prune(dense, tmp_path / "option", calibration=given, **{"calibration.repeat": 0.25}, **keys)
    tawny.prune(dense, tmp_path / "by-hand", calibration=Samples(given).repeating(0.25), **keys)
    assert weights(tmp_path / "option") == weights(tmp_path / "by-hand") != weights(tmp_path / "plain")
    with pytest.raises(RecipeError, match=r"calibration\.repeat.*0\.5"):
        tawny.prune(dense, calibration=given, **{"calibration.repeat": 0.6}, **keys)


def test_the_last_token_of_an_encoders_sample_stays():
    ids = torch.arange(80).reshape(2, 40)
    made = Samples(ids).repeating(0.25, begun=True, ended=True).tokens
    for before, after in zip(ids.tolist(), made.tolist(), strict=True):
        assert after[:29] == before[:29] and after[-1] == before[-1]
        start = before.index(after[29])
        assert 1 <= start <= 19 and after[29:39] == before[start : start + 10]


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.125, 0.5])
@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_windows_end_with_a_passage_they_held_before(length, share, begun):
    ids = torch.arange(4 * length).reshape(4, length)
    mask = torch.ones_like(ids)
    mask[2, -1] = 0  # padding: such a window stays as it is
    size = min(int(length * share), (length - begun) // 2)
    assert repeated_tokens(length, share, begun=begun) == size
    for told in (None, mask):
        made = Samples(ids, told).repeating(share, begun=begun)
        assert made.mask is told
        for window, (before, after) in enumerate(zip(ids.tolist(), made.tokens.tolist(), strict=True)):
            if told is not None and window == 2:
                assert after == before
                continue
            kept = before[: length - size]
            assert after[: length - size] == kept
            # Tokens are all different, so a passage is where its first token is.
            start = kept.index(after[length - size]) if size else 1
            assert start >= begun  # BOS is said once
            assert after[length - size :] == kept[start : start + size]


def test_a_plan_says_what_the_search_solves_and_keeps(dense, tmp_path, run, monkeypatch):
    monkeypatch.setattr("tawny.pruning.plan.measured_speed", lambda _: 1e6)  # a machine of known speed
    tiny_tokenizer().save_pretrained(dense)
    (tmp_path / "text.txt").write_text("the owl sees a mouse in the dark. " * 300)
    keys = {
        "calibration.text": str(tmp_path / "text.txt"),
        "calibration.samples": 8,
        "calibration.seqlen": 24,
    }
    keys |= {"sparsity": 0.6, "compute": "float32", **FEW}
    before = sorted(tmp_path.rglob("*"))
    plan = tawny.plan_search(dense, **keys)
    assert sorted(tmp_path.rglob("*")) == before
    searched = tawny.search(dense, tmp_path / "a.yaml", **keys)
    assert plan.solver == searched.solver and plan.disk["peak"] == searched.levels["bytes"]
    assert plan.levels == {key: searched.levels[key] for key in ("from", "to", "count")}
    assert plan.held_out == {key: searched.held_out[key] for key in ("windows", "deciding", "tokens")}
    longer = tawny.plan_search(dense, **keys | {"search.trials": 1200})
    assert plan.seconds["trials"] > 0
    assert longer.seconds["trials"] == pytest.approx(100 * plan.seconds["trials"], rel=0.2)
    words = ("plan", "search", dense, "-s", 0.6, "--calibration", tmp_path / "text.txt", "--seqlen", 24)
    code, shown, err = run(*words)
    assert code == 0 and "until it is over" in shown, err
    code, _, err = run(*words, "--allocator", "owl")
    assert code == 2 and "a search chooses" in err and err.count("\n") == 1
