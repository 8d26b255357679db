"""`-a auto` through the front door, and its parts against obvious restatements."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from contextlib import closing

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import tawny
from tawny.allocation import ALLOCATORS
from tawny.allocation.auto import FAMILIES, Auto, seconds_of
from tawny.allocation.profile import LinearInfo, Profile
from tawny.errors import Interrupted, MissingFeature, NumericalError, OutputError, RecipeError, TextError
from tawny.model.stack import live_stack
from tawny.model.streams import Samples, repeated_tokens
from tawny.packed.opening import open_stack
from tawny.patterns import Unstructured
from tawny.progress import Silent
from tawny.pruning import levels as levels_module
from tawny.pruning import run as run_module
from tawny.pruning import scoring as scoring_module
from tawny.pruning import search as search_module
from tawny.pruning.block import BlockRun
from tawny.pruning.demand import demand_of
from tawny.pruning.journal import Journal
from tawny.pruning.profiling import Together
from tawny.pruning.ranks import Ranks
from tawny.pruning.run import Run
from tawny.recipe.schema import resolve_recipe
from tawny.search.cost import needs_of_search, stand_in
from tawny.search.grid import BLENDS, Grid, families_for
from tawny.search.levels import LevelStore, solve_levels
from tawny.search.scores import Scores
from tawny.search.scoring import Reference, Scorer
from tawny.search.space import make_space
from tawny.solvers import SOLVERS
from tests.reference import allocators as reference
from tests.reference.problems import lifelike
from tests.tiny import tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

FEW = {"allocator.trials": 12, "allocator.offspring": 4, "allocator.levels": 3, "allocator.windows": 2}
FEW |= {"allocator.candidates": "owl,atp"}


def prune(model, out=None, **changes):
    options = {"sparsity": 0.6, "allocator": "auto", "compute": "float32", "calibration": tokens(8, 24)}
    return tawny.prune(model, out, **{**options, **FEW, **changes})


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def dense(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


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
def test_every_solver_and_pattern_meets_its_budget(solver, pattern):
    assert solver in SOLVERS
    record = prune(tiny_model("llama"), solver=solver, pattern=pattern, sparsity=0.5)
    total = record.prunable
    step = sum(x.shape[0] * x.shape[1] for x in record.linears if x.block == 0) / 4 if ":" in pattern else 1
    assert abs(record.zeros - 0.5 * total) <= max(step, len(record.linears))
    assert record.search["winner"] and len(record.search["trials"]) <= 12


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma3_text"])
def test_experts_and_odd_families_are_searched_like_any_other(family):
    record = prune(tiny_model(family), exclude=["layers.1.*"] if family == "mixtral" else [])
    assert abs(record.zeros - 0.6 * record.prunable) <= len(record.linears)
    assert record.search["levels"]["count"] == 3


def test_the_same_recipe_gives_the_same_bytes_and_the_allocation_file_gives_them_again(dense, tmp_path):
    options = {"refit": True, "allocator.candidates": "owl,dlp,atp,lsa", "allocator.trials": 40}
    first = prune(dense, tmp_path / "a", **options)
    assert prune(dense, tmp_path / "b", **options).search == first.search
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    for kind in ("png", "svg"):
        picture = [(tmp_path / name / f"allocation.{kind}").read_bytes() for name in "ab"]
        assert picture[0] == picture[1]
    written = yaml.safe_load((tmp_path / "a" / "allocation.yaml").read_text())
    assert written == first.allocation
    again = {"allocator": "file", "allocator.path": str(tmp_path / "a" / "allocation.yaml"), "refit": True}
    tawny.prune(dense, tmp_path / "c", sparsity=0.6, compute="float32", calibration=tokens(8, 24), **again)
    assert weights(tmp_path / "c") == weights(tmp_path / "a")


def test_a_mixed_n_of_m_for_each_linear_survives_its_file(dense, tmp_path):
    options = {"pattern": "3:8", "sparsity": None, "allocator.levels": 5}
    searched = prune(dense, tmp_path / "a", **{**options, "allocator.trials": 60, "seed": 3})
    again = {"allocator": "file", "allocator.path": str(tmp_path / "a" / "allocation.yaml")}
    tawny.prune(
        dense, tmp_path / "b", pattern="3:8", compute="float32", calibration=tokens(8, 24), seed=3, **again
    )
    assert {x.pattern for x in searched.linears} != {"3:8"}
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


def test_the_live_model_is_dense_while_it_is_searched_and_ends_like_its_folder(dense, tmp_path):
    from transformers import AutoModelForCausalLM

    live = tiny_model("llama")
    by_hand = prune(live)
    by_folder = prune(dense, tmp_path / "out")
    assert by_hand.allocation == by_folder.allocation
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, written[name]) for name, value in live.state_dict().items())


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize(
    ("phase", "steps"),
    [("solving at each level", 2), ("trying allocations", 3), ("pruning finalists", 5)],
)
def test_a_search_that_was_stopped_goes_on_and_gives_the_same(
    dense, tmp_path, monkeypatch, phase, steps, spilled
):
    from tawny.errors import Interrupted
    from tawny.progress import Silent

    class Counts(Silent):
        def __init__(self, stop=None):
            self.stop, self.seen, self.name = stop, {}, ""

        def phase(self, name: str, total: int, unit: str = "blocks") -> None:
            self.name = name

        def step(self, text: str) -> None:
            self.seen[self.name] = self.seen.get(self.name, 0) + 1
            if self.stop == (self.name, self.seen[self.name]):
                raise KeyboardInterrupt

    options = {"allocator.candidates": "owl,dlp", "allocator.trials": 20, "solver": "sparsegpt"}
    if spilled:
        monkeypatch.setattr(Run, "spill", _spilled)
    monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
    scored, measure = [], Scorer._measure
    monkeypatch.setattr(
        Scorer, "_measure", lambda self, some, rows: scored.append(1) or measure(self, some, rows)
    )
    began = time.perf_counter()
    whole = prune(dense, tmp_path / "whole", **options)
    assert whole.seconds["search"] <= whole.seconds["total"] <= time.perf_counter() - began
    needed = len(scored)
    with pytest.raises(Interrupted, match=r"blocks? solved at each level are kept"):
        prune(dense, tmp_path / "out", progress=Counts((phase, steps)), **options)
    again = Counts()
    resumed = prune(dense, tmp_path / "out", progress=again, **options)
    assert resumed.search == whole.search and resumed.resumed == 1
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    assert (again.seen.get("solving at each level", 0) == 0) == (phase != "solving at each level")
    assert len(scored) == 2 * needed  # nothing twice
    blocks = (1 + len([t for t in whole.search["trials"] if t["proof"] is not None][1:])) * 3
    assert again.seen["pruning finalists"] == blocks - 3 * (phase == "pruning finalists")


def _spilled(run, walk, stream="pruned"):
    return None if run.journal.folder is None else run.journal.folder / "hidden" / f"{walk}.{stream}"


def test_a_search_on_other_held_out_text_is_another_one(dense, tmp_path, monkeypatch):
    from tawny.errors import Interrupted
    from tawny.progress import Silent

    class Stops(Silent):
        def step(self, text: str) -> None:
            raise KeyboardInterrupt

    tiny_tokenizer().save_pretrained(dense)
    text = "\n\n".join(" ".join(str(n * k % 997) for n in range(60)) for k in range(1, 40))
    path = tmp_path / "text.txt"
    path.write_text(text)
    options = {"calibration": None, "calibration.text": str(path), "calibration.samples": 4}
    options |= {"calibration.seqlen": 24}
    monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
    held = []
    load = Run.load_samples

    def changed(run, *args):
        samples = load(run, *args)
        if held:
            run.held_out = run.held_out.roll(1, 0)
        held.append(1)
        return samples

    monkeypatch.setattr(Run, "load_samples", changed)
    with pytest.raises(Interrupted):
        prune(dense, tmp_path / "out", progress=Stops(), **options)
    with pytest.raises(OutputError, match="held-out text changed"):
        prune(dense, tmp_path / "out", **options)


def test_solutions_that_a_search_goes_on_from_must_be_there(dense, tmp_path, monkeypatch):
    from tawny.errors import Interrupted
    from tawny.progress import Silent

    class Stops(Silent):
        def step(self, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
        prune(dense, tmp_path / "out", progress=Stops())
    lost = tmp_path / "out.partial" / "search" / "00000.safetensors"
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(
        OutputError, match=r"00000.safetensors, which an unfinished search goes on from, is missing"
    ):
        prune(dense, tmp_path / "out")
    lost.write_bytes(kept)
    assert prune(dense, tmp_path / "out").resumed == 2


def test_a_run_that_was_stopped_after_its_search_does_not_search_again(dense, tmp_path, monkeypatch):
    from tawny.errors import Interrupted
    from tawny.progress import Silent
    from tawny.pruning.journal import Journal

    class Stops(Silent):
        name = ""

        def phase(self, name: str, total: int, unit: str = "blocks") -> None:
            self.name = name

        def step(self, text: str) -> None:
            if self.name == "pruning":
                raise KeyboardInterrupt

    whole = prune(dense, tmp_path / "whole")
    monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
    with pytest.raises(Interrupted, match="kept"):
        prune(dense, tmp_path / "out", progress=Stops())
    monkeypatch.setattr(search_module, "solve_levels", None)
    resumed = prune(dense, tmp_path / "out")
    assert resumed.search == whole.search and weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("changes", [{}, {"solver": "sparsegpt", "order": "block", "refit": True}])
@pytest.mark.parametrize("placed", ["memory", "disk", "live"])
def test_a_proof_is_the_divergence_of_the_model_that_pruning_makes(
    dense, tmp_path, monkeypatch, changes, placed
):
    """Of the winner: what the run writes afterwards, whole, by plain transformers."""
    from transformers import AutoModelForCausalLM

    if placed == "disk":
        monkeypatch.setattr(run_module, "available", lambda: 0)
    given = tokens(8, 24, seed=4)
    source = tiny_model("llama") if placed == "live" else dense
    record = prune(source, tmp_path / "out", calibration=given, **changes)
    assert placed == "live" or record.memory["hidden_states"] == placed
    assert not list((tmp_path).rglob("*.tmp"))
    proofs = [x["proof"] for x in record.search["trials"] if x["proof"] is not None]
    # Of 8 samples a quarter is held out; the later of these two decides, and the others calibrate.
    [window] = Samples(given[6:]).repeating(0.125).tokens[1:]
    again = {"allocator": "file", "allocator.path": str(tmp_path / "out" / "allocation.yaml")}
    made = tawny.prune(
        dense, tmp_path / "again", sparsity=0.6, compute="float32", calibration=given[:6], **again, **changes
    )
    assert made.allocation == record.allocation
    models = [AutoModelForCausalLM.from_pretrained(x).double() for x in (dense, tmp_path / "again")]
    with torch.no_grad():
        p, q = (model(window[None]).logits.log_softmax(-1) for model in models)
    assert min(proofs) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert f"{len(proofs)} of them pruned in earnest" in record.search["says"]
    if record.search["solver"] != record.recipe["solver"]["name"]:
        return  # another one's solutions stood for its own
    # Linears were solved behind uniform blocks: put together from these solutions, uniform is what a run makes.
    assert record.search["trials"][0]["verdict"] == pytest.approx(
        record.search["trials"][0]["proof"], rel=1e-4
    )


@pytest.mark.parametrize(("given", "searched", "deciding"), [(40, 2, 8), (20, 2, 3), (8, 1, 1), (2, 1, 0)])
def test_more_windows_decide_than_are_searched_on_where_there_are_enough(given, searched, deciding):
    record = prune(tiny_model("llama"), calibration=tokens(given, 24, seed=4))
    held_out = record.search["held_out"]
    assert (held_out["windows"], held_out["deciding"]) == (searched, deciding)


def test_finalists_that_break_down_lose_and_do_not_end_the_search(dense, tmp_path, monkeypatch):
    real, seen = search_module.rehearse, []

    def breaks(*args, **kwargs):
        seen.append(args)
        if len(seen) > 1:
            raise NumericalError("block gives NaN")
        return real(*args, **kwargs)

    monkeypatch.setattr(search_module, "rehearse", breaks)
    record = prune(dense, tmp_path / "out")
    assert len(seen) > 1 and record.search["winner"] == "uniform"


def test_a_live_model_is_dense_again_when_a_finalist_breaks_down(monkeypatch):
    model, seen = tiny_model("llama"), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real = search_module.rehearse

    def fails(block):
        seen.append(any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()))
        raise NumericalError("NaN")

    def breaks(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(BlockRun, "advance", fails)
            try:
                return real(*args, **kwargs)
            finally:
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    monkeypatch.setattr(search_module, "rehearse", breaks)
    record = prune(model)
    assert len(seen) > 1 and all(seen)  # the first block was pruned when it broke down
    assert record.search["winner"] == "uniform" and record.search["margin"] == 0


def test_finalists_can_be_left_out_and_cost_what_a_plan_says(dense, tmp_path, monkeypatch):
    record = prune(dense, tmp_path / "out", **{"allocator.finalists": 0})
    assert all(trial["proof"] is None for trial in record.search["trials"])
    assert "in earnest" not in record.search["says"]
    options = {"sparsity": 0.6, "allocator": "auto", "solver": "wanda", "calibration": "wiki", **FEW}
    monkeypatch.setattr("tawny.pruning.plan.measured_speed", lambda dtype: 1e7)
    without, with_them = (tawny.plan(dense, **{**options, "allocator.finalists": count}) for count in (0, 3))
    took = without.seconds["total"] - without.seconds["search"]  # of pruning 128 samples; a search sees 16
    assert with_them.seconds["search"] - without.seconds["search"] == pytest.approx(4 * took / 8, rel=0.3)
    assert with_them.seconds["search"] > without.seconds["search"]
    with pytest.raises(RecipeError, match=r"allocator\.finalists"):
        Auto(finalists=-1)
    with pytest.raises(RecipeError, match=r"allocator\.finalists is 5; expected a whole number from 0 to 4"):
        Auto(finalists=5)


# --- the parts ---------------------------------------------------------------------------------------------


def parts(model, tmp_path, count=5):
    stack = live_stack(model)
    by_block = [stack.linears(index) for index in range(len(stack))]
    infos = tuple(LinearInfo(x.name, x.shape, i) for i, some in enumerate(by_block) for x in some)
    space = make_space(infos, Unstructured(), 0.5, count)
    store = LevelStore(tmp_path / "search", space, torch.float32)
    held_out = Samples(tokens(4, 16, seed=9))
    recipe = resolve_recipe(sparsity=0.5, solver="wanda")
    run = Run(recipe, "tiny", None, stack, None, tawny.progress.silent, Journal(None), Ranks(alone=True))
    run.by_block = by_block
    solved = solve_levels(
        run,
        space,
        store,
        solver=recipe.make_solver(),
        measuring=Together({}, (5.0,)),
        samples=Samples(tokens(4, 24)),
        held_out=held_out,
    )
    return stack, by_block, space, store, held_out, solved


def test_a_score_is_the_divergence_of_the_whole_model_put_together_by_hand(tmp_path):
    model = tiny_model("llama")
    stack, by_block, space, store, held_out, solved = parts(model, tmp_path)
    scorer = Scorer(stack, by_block, store, held_out, solved.hidden, tawny.progress.silent)
    levels = tuple((i % 5) - 2 for i in range(len(space.linears)))
    [score] = scorer([levels], [3, 1])
    ids = held_out.tokens[[3, 1]]
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        flat = [linear for some in by_block for linear in some]
        for index, some in enumerate(by_block):
            store.open(index)
            for linear in some:
                solution = store.read(linear, levels[flat.index(linear)])
                share = float((solution == 0).float().mean())
                assert share == pytest.approx(
                    space.sparsity(flat.index(linear), levels[flat.index(linear)]), abs=1e-2
                )
                getattr(linear.module, linear.parameter).data.copy_(solution)
        q = model(ids).logits.double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert score == pytest.approx(expected, rel=1e-4)
    store.close()
    store.remove()
    assert not (tmp_path / "search").exists()


def test_what_is_known_of_a_window_is_not_measured_again(tmp_path):
    stack, by_block, space, store, held_out, solved = parts(tiny_model("llama"), tmp_path)
    path = tmp_path / "scores.jsonl"
    scores = Scores(path)
    scorer = Scorer(stack, by_block, store, held_out, solved.hidden, tawny.progress.silent, scores)
    one, other = space.uniform, (1, -1, *space.uniform[2:])
    scorer([one, other], [1])
    spent = scores.tokens
    found = scorer([one, other], [0, 1, 3])
    assert scores.tokens == 3 * spent
    assert scorer([other], [3, 0]) == scorer([other], [3, 0])
    assert scores.tokens == 3 * spent
    again = Scores(path)
    assert [again.mean(levels, [0, 1, 3]) for levels in (one, other)] == found
    assert again.tokens == scores.tokens and again.lacking(one, [2, 3]) == (2,)
    # A line that was cut off counts for nothing, and what comes after it is read again.
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    cut = Scores(path)
    assert cut.lacking(one, [0, 1, 3]) == (0, 3)
    cut.prove({"a": 0.5}, float("inf"))
    assert Scores(path).proof({"a": 0.5}) == float("inf") and Scores(path).proof({"a": 0.6}) is None
    assert Scores(path).lacking(one, [1]) == ()


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_divergence_is_the_one_of_its_formula_however_many_rows_fit_the_cache(rows, monkeypatch):
    dense, other = torch.randn(7, 50, dtype=torch.float64), torch.randn(7, 50, dtype=torch.float64)
    p, q = dense.softmax(-1), other.softmax(-1)
    monkeypatch.setattr(scoring_module, "_CACHED_BYTES", rows * 4 * 50)
    made = Reference(dense.float()).divergence(other.float())
    torch.testing.assert_close(made, (p * (p / q).log()).sum(-1).float())
    torch.testing.assert_close(Reference(dense.float()).divergence(dense.float()), torch.zeros(7))


def test_candidates_that_share_blocks_score_as_they_would_alone_and_cost_less(tmp_path):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stack, by_block, space, store, held_out, solved = parts(model, tmp_path)
    scorer = Scorer(stack, by_block, store, held_out, solved.hidden, tawny.progress.silent)
    base = space.uniform
    others = [tuple(k + (i == place) for i, k in enumerate(base)) for place in (0, 9, len(base) - 1)]
    together = scorer([base, *others, base], [0, 1, 2])
    spent, scorer.scores = scorer.scores.tokens, Scores()
    assert together == [scorer([one], [0, 1, 2])[0] for one in (base, *others, base)]
    assert spent < scorer.scores.tokens
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_does_not_count_in_a_score(tmp_path):
    model = tiny_model("llama")
    stack, by_block, space, store, held_out, _ = parts(model, tmp_path)
    scores = []
    for filler in (5, 6):
        ids, mask = held_out.tokens.clone(), torch.ones_like(held_out.tokens)
        ids[:, 12:], mask[:, 12:] = filler, 0
        padded = Samples(ids, mask)
        hidden = _dense_hidden(stack, padded)
        scorer = Scorer(stack, by_block, store, padded, hidden, tawny.progress.silent)
        scores.append(scorer([space.uniform], [0, 1])[0])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def _dense_hidden(stack, samples):
    from tawny.model.streams import Stream

    stream = Stream(stack, samples)
    for index in range(len(stack)):
        stream.advance(index)
    return torch.cat(stream.hidden)


def test_a_nan_weight_names_its_linear():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.1"):
        prune(model)


# --- what is refused, and what is said ---------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_said_before_the_work(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(levels_module, "free_bytes", lambda folder: 1000)
    with pytest.raises(OutputError, match="fewer allocator"):
        prune(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_budget_of_time_may_cut_the_search_short_and_then_says_so(dense, tmp_path):
    record = prune(dense, tmp_path / "out", **{"allocator.budget": "0s", "allocator.trials": 50})
    assert "the budget of 0s ended the search after" in record.search["cut_short"]
    assert record.search["cut_short"] in record.search["says"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["search"] == record.search


def test_times_are_read_and_nonsense_is_refused():
    assert [seconds_of(text) for text in ("90s", "10m", "1.5h", "7", "2 min")] == [90, 600, 5400, 7, 120]
    assert (
        resolve_recipe(None, sparsity=0.6, allocator="auto", **{"allocator.budget": 90})
        .make_allocator()
        .budget
        == 90
    )
    for options, words in (
        ({"budget": "soon"}, "90s, 10m"),
        ({"levels": 4}, "odd"),
        ({"levels": 1}, "from 3"),
        ({"candidates": "owl,dlpp"}, "did you mean 'dlp'"),
        ({"proxy": "wandaa"}, "did you mean 'wanda'"),
        ({"step": 0.7}, "share of the weights"),
        ({"repeat": 0.6}, "from 0 to 0.5"),
        ({"study": "postgresql://me:secret@host/db"}, r"\$NAME"),
        ({"study": "postgresql://me:se/cr@t@host/db"}, r"\$NAME"),
        ({"study": "postgresql://me:$SECRET.@host/db"}, r"\$NAME"),
        ({"study": "mysql://host/db?user=me&password=secret"}, r"\$NAME"),
    ):
        with pytest.raises(RecipeError, match=words):
            Auto(**options)
    for study in (
        "postgresql://me:$SECRET@host/db",
        "postgresql://me:${SECRET}@host:5432/db?connect_timeout=10",
        "mysql://host/db?password=$SECRET",
        "sqlite:////home/me/a@b:c.db",
    ):
        Auto(study=study)


@pytest.mark.parametrize(
    ("solver", "given", "used"),
    [("alps", {}, "sparsegpt"), ("alps", {"proxy": "alps"}, "alps"), ("wanda", {}, "wanda")],
)
def test_a_fast_solver_stands_for_a_slow_one_while_allocations_are_compared(
    dense, tmp_path, solver, given, used
):
    keys = {f"allocator.{key}": value for key, value in ({"trials": 2} | given).items()}
    record = prune(dense, tmp_path / "out", solver=solver, **keys)
    assert record.search["solver"] == used
    assert record.recipe["solver"]["name"] == solver


def test_a_solver_that_stands_for_itself_keeps_its_options():
    own = SOLVERS["alps"](iterations=5)
    assert stand_in(Auto(proxy="alps"), "alps", own) == ("alps", own)
    name, other = stand_in(Auto(proxy="wanda"), "alps", own)
    assert name == "wanda" and isinstance(other, SOLVERS["wanda"])


@given(
    length=st.integers(1, 40),
    count=st.integers(1, 5),
    share=st.floats(0, 0.5),
    masked=st.sets(st.integers(0, 4)),
    begun=st.booleans(),
)
def test_windows_end_with_a_passage_they_held_before(length, count, share, masked, begun):
    ids = torch.arange(count * length).reshape(count, length)
    mask = torch.ones_like(ids)
    mask[[window for window in masked if window < count], -1] = 0
    size = min(int(length * share), (length - begun) // 2)
    assert repeated_tokens(length, share, begun=begun) == size
    for told in (None, mask):
        made = Samples(ids, told).repeating(share, begun=begun)
        assert made.mask is told
        for window, (before, after) in enumerate(zip(ids.tolist(), made.tokens.tolist(), strict=True)):
            if told is not None and window in masked:
                assert after == before
                continue
            kept = before[: length - size]
            assert after[: length - size] == kept
            # Tokens are all different, so a passage is where its first token is.
            start = kept.index(after[length - size]) if size else 1
            assert start >= begun  # BOS is said once
            assert after[length - size :] == kept[start : start + size]


def test_what_a_search_compares_on_begins_as_its_samples_do(tmp_path, dense, monkeypatch):
    (tmp_path / "text.txt").write_text("The owl hunts at night. " * 40)
    seen = []

    def splitting(run, auto, split=search_module._split):
        seen.append(split(run, auto))
        return seen[-1]

    monkeypatch.setattr(search_module, "_split", splitting)
    for begins in (True, False):
        tiny_tokenizer(begins=begins).save_pretrained(dense)
        keys = {"samples": 4, "seqlen": 24, "allocator.trials": 4, "allocator.repeat": 0.5}
        tawny.prune(
            dense,
            tmp_path / f"out-{begins}",
            sparsity=0.6,
            allocator="auto",
            solver="wanda",
            compute="float32",
            calibration=str(tmp_path / "text.txt"),
            **keys,
        )
        for part in seen.pop():
            assert bool((part.tokens[:, 0] == 1).all()) is begins and not (part.tokens[:, 1:] == 1).any()


def test_calibration_can_repeat_itself(tmp_path, dense):
    given = tokens(4, 24)
    keys = {"sparsity": 0.6, "allocator": "uniform", "solver": "sparsegpt", "compute": "float32"}
    tawny.prune(dense, tmp_path / "plain", calibration=given, **keys)
    tawny.prune(dense, tmp_path / "option", calibration=given, **{"calibration.repeat": 0.25}, **keys)
    tawny.prune(dense, tmp_path / "by-hand", calibration=Samples(given).repeating(0.25), **keys)
    assert weights(tmp_path / "option") == weights(tmp_path / "by-hand") != weights(tmp_path / "plain")
    with pytest.raises(RecipeError, match=r"calibration\.repeat.*0\.5"):
        tawny.prune(dense, calibration=given, **{"calibration.repeat": 0.6}, **keys)


def test_one_sample_leaves_nothing_to_compare_on():
    with pytest.raises(TextError, match="at least 2 samples"):
        prune(tiny_model("llama"), calibration=tokens(1, 24))


def test_without_optuna_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(search_module, "solve_levels", _too_late)
    with pytest.raises(MissingFeature, match=r"tawny\[search\]"):
        prune(tiny_model("llama"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////nowhere/study.db", "cannot be opened"),
        ("sqlite:///$NOT_SET", "NOT_SET, which is not set"),
    ],
)
def test_a_study_that_cannot_be_opened_is_told_of_before_the_work(monkeypatch, url, said):
    pytest.importorskip("optuna")
    monkeypatch.setattr(search_module, "solve_levels", _too_late)
    with pytest.raises(RecipeError, match=said):
        prune(tiny_model("llama"), **{"allocator.study": url})


def _too_late(*_: object, **__: object) -> None:
    raise AssertionError("levels were solved first")


def test_machines_share_a_study(dense, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    monkeypatch.setenv("PLACE", str(tmp_path / "study.db"))
    options = {"allocator.study": "sqlite:///$PLACE", "allocator.trials": 24}
    first = prune(dense, tmp_path / "a", **options)
    [name] = optuna.get_all_study_names(f"sqlite:///{tmp_path}/study.db")
    tried = len(optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/study.db").trials)
    second = prune(dense, tmp_path / "b", **options)
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/study.db")
    assert len(study.trials) > tried and first.search["shared"] and second.search["shared"]
    with pytest.raises(RecipeError, match="cannot be opened"):
        prune(dense, tmp_path / "c", **{"allocator.study": "nonsense://x"})
    with pytest.raises(RecipeError, match="variable NOWHERE, which is not set"):
        prune(dense, tmp_path / "d", **{"allocator.study": "sqlite:///$NOWHERE"})


def test_models_that_differ_in_their_weights_alone_share_no_study(tmp_path):
    optuna = pytest.importorskip("optuna")
    url = f"sqlite:///{tmp_path}/study.db"
    for seed in (0, 1):
        tiny_model("llama", seed).save_pretrained(tmp_path / str(seed) / "model")
        prune(tmp_path / str(seed) / "model", tmp_path / f"out{seed}", **{"allocator.study": url})
    assert len(optuna.get_all_study_names(url)) == 2
    # How many finalists a machine prunes decides no score.
    options = {"allocator.study": url, "allocator.finalists": 0}
    prune(tmp_path / "0" / "model", tmp_path / "again", **options)
    assert len(optuna.get_all_study_names(url)) == 2


def grid(tmp_path, owner, extra=0, **more):
    families = families_for(("owl", "dlp", "atp"), 0.6, 4)
    url = f"sqlite:///{tmp_path}/study.db?timeout=0.05"
    return Grid(families, lambda family, allocator: {}, seed=0, extra=extra, storage=url, owner=owner, **more)


def locked(tmp_path):
    """The database of a study, taken by another program."""
    taken = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    taken.execute("BEGIN EXCLUSIVE")
    return taken


def everything(asked):
    return [p.name for batch in iter(lambda: asked.ask(100), []) for p in batch]


def test_what_a_stopped_search_took_from_a_study_is_free_for_its_rerun_and_not_for_others(tmp_path):
    pytest.importorskip("optuna")
    first = grid(tmp_path, "one")
    lost = first.ask(4)
    first.tell(lost[0], 1.0)
    assert not {p.name for p in lost} & set(everything(grid(tmp_path, "two"))[:15])
    again = grid(tmp_path, "one")
    assert {p.name for p in again.ask(3)} == {p.name for p in lost[1:]}


def test_a_search_that_fails_gives_back_what_it_took(dense, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    url = f"sqlite:///{tmp_path}/study.db"
    scored = iter([[1.0]])  # of uniform, before anything is asked for
    monkeypatch.setattr(Scorer, "__call__", lambda *_: next(scored))
    with pytest.raises(StopIteration):
        prune(dense, tmp_path / "out", **{"allocator.study": url})
    [name] = optuna.get_all_study_names(url)
    states = {t.state.name for t in optuna.load_study(study_name=name, storage=url).trials}
    assert states == {"FAIL", "WAITING"}


@pytest.mark.parametrize("first", ["ask", "tell", "of_others"])
def test_a_search_whose_study_fails_goes_on_with_what_it_knows(tmp_path, first):
    pytest.importorskip("optuna")
    said = []
    mine = grid(tmp_path, "one", extra=3, say=said.append)
    asked = mine.ask(4)
    mine.tell(asked[0], 2.0)
    with closing(locked(tmp_path)):
        if first == "of_others":
            assert mine.of_others() == []
        if first == "ask":
            asked += mine.ask(1)
        for number, proposal in enumerate(asked[1:]):
            mine.tell(proposal, 1.0 + number)
        asked += [p for batch in iter(lambda: mine.ask(100), []) for p in batch]
    assert len(said) == 1 and "locked" in said[0] and "locked" in mine.failed
    grid_size = sum(len(made.grid) for made in mine.families.values())
    assert len(asked) == grid_size + 3 and len({p.name for p in asked[:grid_size]}) == grid_size
    assert 2.0 in [trial.value for trial in mine.study.trials]


def test_a_study_that_fails_is_said_and_recorded_and_the_model_is_pruned(dense, tmp_path):
    pytest.importorskip("optuna")
    taken = []

    class Locks(Hears):
        def step(self, text):
            if not taken and text.startswith("best"):
                taken.append(locked(tmp_path))

    progress = Locks()
    study = f"sqlite:///{tmp_path}/study.db?timeout=0.05"
    record = prune(dense, tmp_path / "out", progress=progress, **{"allocator.study": study})
    taken[0].close()
    assert record.search["shared"] and "locked" in record.search["study_failed"]
    assert sum("goes on without it" in text for text in progress.said) == 1
    assert len(record.search["trials"]) == FEW["allocator.trials"]


def test_a_study_that_fails_does_not_hide_what_stopped_the_search(dense, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    taken = []

    def stopped(*_):
        taken.append(locked(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(Scorer, "__call__", stopped)
    study = f"sqlite:///{tmp_path}/study.db?timeout=0.05"
    with pytest.raises(Interrupted):
        prune(dense, tmp_path / "out", **{"allocator.study": study})
    taken[0].close()


def test_machines_that_begin_a_study_at_once_enqueue_its_grid_once(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    grid(tmp_path, "one")
    real, created = Grid._trials, optuna.create_study
    looked, refused = [], []

    def stale(self, states):  # as it was before the other machine enqueued anything
        looked.append("WAITING" in states)
        return [] if looked.count(True) == 1 else real(self, states)

    def busy(**options):
        refused.append(1)
        if len(refused) == 1:
            raise RuntimeError("table studies already exists")
        return created(**options)

    monkeypatch.setattr(Grid, "_trials", stale)
    monkeypatch.setattr(optuna, "create_study", busy)
    second = grid(tmp_path, "two")
    waiting = [t for t in second.study.trials if t.state.name == "WAITING"]
    assert [t.number for t in waiting] == list(range(len(waiting))) and len(second.study.trials) > len(
        waiting
    )
    assert len(waiting) == sum(len(made.grid) for made in second.families.values())
    assert len(refused) == 2 and second.shared


def test_few_trials_see_every_family(tmp_path):
    pytest.importorskip("optuna")
    assert [p.name.split()[0] for p in grid(tmp_path, "one").ask(6)] == ["owl", "dlp", "atp"] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", [0.25, 0.5, 0.6, 0.7, 0.85])
def test_the_first_thing_tried_of_an_allocator_is_what_it_does_by_itself(family, target):
    made = families_for(FAMILIES, target, 4)[family]
    tried, alone = made.make(**made.grid[0]), ALLOCATORS[family]()
    shapes = reference.model(4)
    measures = []
    for block in range(4):
        linears = shapes.linears_of(block)
        measures.append(
            alone.measure({x.name: lifelike(*x.shape, seed=7 * block + i) for i, x in enumerate(linears)})
        )
    profile = Profile(shapes.linears, tuple(measures))
    assert tried.allocate(profile, target) == pytest.approx(alone.allocate(profile, target))


def test_every_blend_that_is_tried_is_what_it_does_by_itself(monkeypatch):
    """One profile serves all of them."""
    options = {"allocator.candidates": "blend", "allocator.trials": 12, "allocator.finalists": 0}
    kept = {}
    real = search_module.allocate

    def noting(allocator, *args):
        kept[allocator.of] = real(allocator, *args)
        return kept[allocator.of]

    monkeypatch.setattr(search_module, "allocate", noting)
    record = prune(tiny_model("llama"), calibration=tokens(8, 24, seed=4), **options)
    names = {trial["name"] for trial in record.search["trials"]}
    assert {f"blend of={of}" for of in BLENDS} <= names
    for of in BLENDS:
        options = {"sparsity": 0.6, "allocator": "blend", "allocator.of": of, "compute": "float32"}
        alone = tawny.prune(tiny_model("llama"), calibration=tokens(8, 24, seed=4)[:6], **options)
        assert kept[of] == pytest.approx(alone.allocation), of


@pytest.mark.parametrize("excluded", ["layers.0.*", "layers.2.*"])
def test_depth_is_counted_where_something_is_pruned(excluded):
    options = {"allocator.candidates": "atp", "allocator.trials": 2, "exclude": [excluded]}
    tried = prune(tiny_model("llama"), solver="magnitude", **options).search["blocks"]
    [atp] = [blocks for name, blocks in tried.items() if name.startswith("atp")]
    assert [share for share in atp if share] == pytest.approx([0.5, 0.7], abs=1e-3)


@pytest.mark.parametrize("target", [0.0, 0.999])
def test_families_can_be_made_at_any_sparsity(target):
    for made in families_for(FAMILIES, target, 1).values():
        for values in made.grid:
            made.make(**values)


def test_the_allocation_that_is_written_is_one_that_was_scored(dense, tmp_path):
    record = prune(
        tiny_model("llama", num_hidden_layers=6),
        sparsity=0.7,
        **{"allocator.trials": 8, "allocator.candidates": "atp", "allocator.levels": 11},
    )
    highest = record.search["levels"]["to"]
    for name, blocks in record.search["blocks"].items():
        assert max(blocks) <= highest + 0.01, name


def test_a_record_of_broken_models_is_json(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Scorer, "__call__", lambda self, candidates, windows: [float("inf")] * len(candidates)
    )
    monkeypatch.setattr(Scorer, "judge", lambda self, stream, windows: float("inf"))
    prune(dense, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "run.json").read_text(), parse_constant=pytest.fail)
    assert found["search"]["margin"] == 0 and found["search"]["trials"][0]["divergence"] is None


def test_a_plan_says_what_the_search_takes(dense):
    plan = tawny.plan(dense, sparsity=0.6, allocator="auto", calibration="wiki", compute="float32", **FEW)
    total = sum(x["shape"][0] * x["shape"][1] for x in plan.linears)
    assert plan.disk["search"] == 3 * total * 4 and plan.seconds["search"] > 0
    assert any("12 allocations" in note for note in plan.notes) and plan.allocation is None


@pytest.mark.parametrize(
    ("candidates", "solver", "needed"),
    [("owl,atp", "wanda", "norms"), ("owl,lsa", "wanda", "hessian"), ("atp", "alps", "hessian")],
)
def test_a_search_is_planned_by_what_its_candidates_and_solver_collect(dense, candidates, solver, needed):
    options = {"sparsity": 0.6, "allocator": "auto", "solver": solver, "compute": "float32", **FEW}
    recipe = resolve_recipe(None, **{**options, "allocator.candidates": candidates})
    assert needs_of_search(recipe) == needed
    stack = open_stack(dense, torch.float32, "cpu")
    by_block = [stack.linears(index) for index in range(len(stack))]
    demand = demand_of(recipe, stack, by_block, recipe.make_solver(), recipe.make_allocator(), 1)
    searching = demand.phases(spill=True, held=False)["search"]
    assert (searching["statistics"] > 0) == (needed == "hessian")
    assert tawny.plan(dense, recipe=recipe, calibration="wiki").seconds["profile"] == 0


def test_a_search_is_estimated_by_the_tokens_it_is_given_and_by_what_solves_its_levels(dense):
    stack = open_stack(dense, torch.float32, "cpu")
    by_block = [stack.linears(index) for index in range(len(stack))]

    def demand(samples=None, mask=False, **options):
        recipe = resolve_recipe(None, **{"sparsity": 0.6, "allocator": "auto", "solver": "wanda", **options})
        made = recipe.make_solver(), recipe.make_allocator()
        given = None
        if samples:
            ids = tokens(*samples)
            given = Samples(ids, torch.ones_like(ids) if mask else None)
        return demand_of(recipe, stack, by_block, *made, 1, samples, given=given)

    assert demand((512, 128)).searched == 32768 // 128 and demand().searched == 32768 // 2048
    assert demand((40, 128)).held_out == demand((40, 64)).held_out * 2 == 10 * 128 * stack.hidden_bytes
    whole, cut = demand((80, 4096), mask=True), demand((80, 4096))
    assert whole.held_out == 4 * cut.held_out and whole.candidates == 4 * cut.candidates

    def solver_bytes(**options):
        return demand(**options).phases(spill=True, held=False)["search"]["solver"]

    wide = {"calibration.seqlen": 16}  # so that no forward is larger
    assert solver_bytes(**{"allocator.proxy": "alps"}, **wide) > solver_bytes(**wide)
    held = demand(solver="magnitude", order="data", **{"allocator.proxy": "sparsegpt"}).phases(
        spill=True, held=True
    )
    assert "search, in data order" in held


def test_a_budget_counts_what_a_search_holds(dense, tmp_path):
    options = {"sparsity": 0.6, "allocator": "auto", "solver": "wanda", "compute": "float32", **FEW}
    more = {**options, "allocator.windows": 4000}
    few, many = (tawny.plan(dense, calibration="wiki", **k).memory["smallest"] for k in (options, more))
    assert many > few + 5 * 3998 * 1024 * 32 * 4
    for call in (
        lambda **k: tawny.plan(dense, calibration="wiki", **k),
        lambda **k: tawny.prune(dense, tmp_path / "out", calibration=tokens(8000, 1024), **k),
    ):
        with pytest.raises(RecipeError, match=r"cannot hold this run.*at least"):
            call(memory=few, **more)


class Hears(Silent):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_a_picture_that_cannot_be_drawn_does_not_fail_the_run(dense, tmp_path, monkeypatch):
    def broken(_, path, **__):
        path.write_text("half")
        raise ValueError("no ink")

    monkeypatch.setattr("tawny.report.plot.plot_allocations", broken)
    progress = Hears()
    prune(dense, tmp_path / "out", progress=progress)
    for kind in ("png", "svg"):
        assert f"allocation.{kind} could not be made: ValueError: no ink" in progress.said
    assert [path.name for path in (tmp_path / "out").glob("allocation.*")] == ["allocation.yaml"]
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("changes", [{"sparsity": 0.995}, {"pattern": "1:4", "sparsity": None}])
def test_a_sparsity_that_leaves_nothing_to_search_is_said(dense, tmp_path, changes):
    progress = Hears()
    record = prune(dense, tmp_path / "out", progress=progress, **changes)
    share = "75.0%" if "pattern" in changes else "99.5%"
    assert record.search["says"] == (
        f"auto: uniform, since a sparsity of {share} leaves no room for other allocations"
    )
    assert record.search["levels"]["count"] == 1 and any("at 1 level from" in text for text in progress.said)


def test_a_step_that_leaves_nothing_to_search_is_refused_before_the_work(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "solve_levels", _too_late)
    for model, out in ((dense, tmp_path / "out"), (tiny_model("llama"), None)):
        with pytest.raises(RecipeError, match=r"allocator\.step is 0\.4.*expected at most 0\.389$"):
            prune(model, out, **{"allocator.step": 0.4})
    assert not list(tmp_path.glob("out*"))


def test_the_last_line_says_who_won():
    from tawny.tables import record_tables

    record = prune(tiny_model("llama")).to_dict()
    assert str(record_tables(record)[-1]) == record["search"]["says"]
