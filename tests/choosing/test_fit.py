"""`tawny.fit` through the front door."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tawny
from tawny.choosing import finalists as finalists_module
from tawny.choosing import fit as module
from tawny.choosing import formats
from tawny.choosing import pace as pace_module
from tawny.choosing.demand import FitDemand
from tawny.choosing.divergence import Reference, Scorer
from tawny.choosing.fitted import _zeros_told
from tawny.choosing.kept import Measured
from tawny.choosing.level import KINDS_TRIED, SPARSITIES, UNMEASURED, Level, Measures
from tawny.choosing.limit import Room, Target, room_for
from tawny.choosing.measuring import ask, few_bits, in_nats
from tawny.choosing.packed_size import PackedSize
from tawny.choosing.settings import FitSettings
from tawny.choosing.table import Table
from tawny.decoding.sequences import bytes_of_text
from tawny.errors import Interrupted, NumericalError, RecipeError, TextError, UserError
from tawny.kinds import KINDS
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.model.streams import Samples
from tawny.packed.folder import PackedFolder
from tawny.patterns import removed_count
from tawny.progress import silent
from tawny.pruning import packing
from tawny.pruning import session as session_module
from tawny.pruning.prepare import prepare
from tawny.recipe.merge import resolve_recipe
from tawny.run.memory import Load
from tawny.run.run import Run
from tests.model.formats import FORMATS, quantised
from tests.tiny import tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
TOKENS = tokens(40, 24)
KEYS = {"solver": "sparsegpt", "calibration": TOKENS, "fit.windows": 2, "fit.deciding": 6}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "dense"
    tiny_model("qwen2", dtype=torch.bfloat16, **SHAPE).save_pretrained(folder)
    return folder


def prepared(folder, **keys):
    """The job of a model that nothing is removed from."""
    return prepare(resolve_recipe(**{"sparsity": 0.0, "allocator": "uniform", **keys}), folder, silent, "cpu")


@pytest.fixture(scope="module")
def job(dense):
    return prepared(dense)


def saved(folder, family="llama"):
    """A tiny model with an embedding of its own."""
    tiny_model(family, dtype=torch.bfloat16, **SHAPE).save_pretrained(folder)
    return folder


def size_of(sizes, job, kind, head=None, embedding=None, group=None, sparsity=0.0):
    """What packing a whole model is planned to take."""
    level = Level(sparsity, kind)
    ends = sizes.rest + sizes.of_head(head) + sizes.of_embedding(embedding or head)
    return ends + sum(sizes.linear(x, level, group) for x in job.linears)


@pytest.fixture(scope="module")
def fitted(dense):
    return tawny.fit(dense, dense.parent / "fitted", bits=9, **KEYS)


def weights(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def test_a_lead_that_is_the_same_in_every_window_is_sure():
    theirs = [0.2, 0.5, 0.9]
    rows = [
        {"uniform": True, "kl": 1.6 / 3, "kl_by_window": theirs},
        {"uniform": False, "kl": 0.96 / 3, "kl_by_window": [0.6 * each for each in theirs]},
    ]
    uniform, other = (SimpleNamespace(row=row) for row in rows)
    lead, stderr = finalists_module.lead_over_uniform(other, [uniform, other])
    assert (lead, stderr) == (pytest.approx(0.4), pytest.approx(0, abs=1e-12))
    rows[1]["kl_by_window"][0] += 0.1
    assert finalists_module.lead_over_uniform(other, [uniform, other])[1] > 0.01


def test_the_model_fits_and_is_the_nearest_of_the_finalists(dense, fitted):
    folder = dense.parent / "fitted"
    rows = {row["name"]: row for row in fitted.finalists}
    assert fitted.bytes <= fitted.budget
    assert any(row["uniform"] for row in rows.values()) or "which was not made" in fitted.says
    for row in rows.values():
        assert 0.85 * row["planned"] <= row["bytes"] <= row["planned"]
    taken = (
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) + (folder / INDEX).stat().st_size
    )
    assert taken == fitted.bytes == rows[fitted.winner]["bytes"]
    assert rows[fitted.winner]["kl"] == min(row["kl"] for row in rows.values())
    found = tawny.agreement(folder, dense, TOKENS[-6:])
    assert found.kl == rows[fitted.winner]["kl"]
    kinds = {entry.name: entry.values for entry in PackedFolder(folder).linears.values()}
    assert {name: level["kind"] for name, level in fitted.linears.items()}.items() <= kinds.items()


def test_the_record_tells_of_the_fit_and_its_recipe_makes_the_model_again(dense, fitted, tmp_path):
    folder = dense.parent / "fitted"
    assert not (dense.parent / "fitted.partial").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["fit"]["says"] == fitted.says and run["out"] == str(folder)
    assert run["fit"]["winner"] == fitted.winner and run["fit"]["seconds"] == fitted.seconds
    assert "Chosen for its size" in (folder / "README.md").read_text()
    page = (folder / "report.html").read_text()
    assert "Chosen for its size" in page and "the whole fit" in page
    assert {"fit.png", "fit.svg", "fit.json"} <= {path.name for path in folder.iterdir()}
    recipe = tawny.load_recipe(folder / "recipe.yaml")
    tawny.prune(dense, tmp_path / "again", recipe=recipe, calibration=TOKENS[:-8])
    tawny.pack(tmp_path / "again", tmp_path / "packed")
    assert weights(tmp_path / "packed") == weights(folder)


def test_a_fit_that_was_stopped_goes_on_and_gives_the_same(dense, fitted, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    for home, place in ((module, "react_ends"), (packing, "pack")):
        with monkeypatch.context() as patched:
            patched.setattr(home, place, stop)
            with pytest.raises(Interrupted, match="kept"):
                tawny.fit(dense, tmp_path / "fitted", bits=9, **KEYS)
        assert not (tmp_path / "fitted").exists()
    monkeypatch.setattr(module, "measure", stop)  # what was measured is not measured again
    monkeypatch.chdir(tmp_path)  # another spelling of the same folder
    again = tawny.fit(dense, "fitted", bits=9, **KEYS)
    assert again.finalists == fitted.finalists and again.resumed == 2
    assert weights(tmp_path / "fitted") == weights(dense.parent / "fitted")


def test_another_size_takes_what_was_measured(dense, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "measure", None)  # would be called
    again = tawny.fit(dense, tmp_path / "again", bits=9, measured=dense.parent / "fitted", **KEYS)
    assert again.finalists == fitted.finalists
    other = tawny.fit(
        dense, tmp_path / "other", bits=9, measured=dense.parent / "fitted", **{**KEYS, "solver": "alps"}
    )
    assert other.linears == fitted.linears and other.recipe["solver"]["name"] == "alps"
    refused = {
        "differs in the recipe's seed": {"seed": 1},
        "differs in held-out text": {
            "fit.deciding": 4
        },  # of tokens that are given, others are kept back then
        "was not made by": {"measured": tmp_path},
        "none' is not there": {"measured": tmp_path / "none"},
    }
    for words, keys in refused.items():
        with pytest.raises(RecipeError, match=words):
            tawny.fit(
                dense, tmp_path / "no", bits=8.5, **{"measured": dense.parent / "fitted", **KEYS, **keys}
            )


@pytest.mark.parametrize("mixed", [False, True])
def test_the_model_writes_other_text_to_decide_by(mixed, dense, tmp_path, monkeypatch):
    folder = tmp_path / "dense"
    shutil.copytree(dense, folder)
    tiny_tokenizer().save_pretrained(folder)
    text = ["self"]
    if mixed:
        (tmp_path / "plain.txt").write_text("some text that somebody wrote " * 400)
        text = ["self=0.5", f"{tmp_path / 'plain.txt'}=0.5"]
    read, tokenised = [], session_module.tokenise
    decided, held_out_windows = [], module.held_out_windows
    seeds, author_of = [], session_module.author_of

    def reading(*given, **keys):
        read.append(tokenised(*given, **keys))
        return read[-1]

    def deciding(tokens, *given):
        decided.append(tokens)
        return held_out_windows(tokens, *given)

    def writing(model, tokenizer, seed, *given, **keys):
        seeds.append(seed)
        return author_of(model, tokenizer, seed, *given, **keys)

    monkeypatch.setattr(session_module, "tokenise", reading)
    monkeypatch.setattr(module, "held_out_windows", deciding)
    monkeypatch.setattr(session_module, "author_of", writing)
    keys = {"calibration.samples": 16, "calibration.seqlen": 64, "calibration.text": text, "fit.length": 16}
    made = tawny.fit(folder, tmp_path / "out", bits=9, **{**KEYS, **keys, "calibration": None})
    (apart,), finalists = decided, len(made.finalists)
    calibrated = [each.ids for each in read if each is not apart]
    assert len(calibrated) == 1 + finalists and all(torch.equal(ids, calibrated[0]) for ids in calibrated)
    assert seeds == [0, 1, *[0] * finalists]  # of another seed it is other text
    if mixed:  # of what somebody wrote, the same places are free
        plain = apart.ids[apart.parts[1].start :]
        assert torch.equal(plain, calibrated[0][-len(plain) :])


def test_a_plan_says_what_would_come_out(dense, fitted, run):
    keys = {"solver": "sparsegpt", "calibration.seqlen": 24, "calibration.samples": 32}
    plan = tawny.plan_fit(dense, bits=9, measured=dense.parent / "fitted", **keys)
    rows = {row["name"]: row for row in fitted.finalists}
    best = min(rows.values(), key=lambda row: row["expected"])
    assert plan.finalists == list(rows) and plan.budget == fitted.budget
    assert (plan.chosen["bytes"], plan.expected) == (best["planned"], best["expected"])
    parts = sum(plan.chosen[part] for part in ("blocks", "head", "embedding", "rest"))
    assert parts == plan.chosen["bytes"] <= plan.budget
    assert sum(plan.chosen["kinds"].values()) == pytest.approx(1)
    fits = [row["kind"] for row in plan.kinds if row["fits"]]
    assert fits[-2:] == ["int3", "int2"] and "int8" not in fits
    code, shown, _ = run("plan", "fit", dense, "--size", plan.smallest, "--seqlen", 24, "--json")
    alike = json.loads(shown)  # nothing is measured yet
    assert code == 0 and alike["expected"] is None and alike["chosen"]["bytes"] <= plan.smallest
    code, _, err = run("plan", "fit", dense, "--size", plan.smallest - 1, "--seqlen", 24)
    assert code == 2 and f"--size {plan.smallest}" in err
    code, _, err = run("plan", "fit", dense, "--size", "1GB", "--sparsity", "0.5")
    assert code == 2 and "a fit chooses -o sparsity itself" in err


def test_a_speed_becomes_bytes_that_a_token_reads(dense, job, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(pace_module, "_STREAMED", 1_000_000)
    monkeypatch.setattr(pace_module, "_WEIGHTS", 1 << 14)
    pace = pace_module.measured_pace(job.linears, silent)
    assert pace.bandwidth > 0 and min(pace.slower.values()) >= 1
    pace = replace(pace, bandwidth=2e6, slower=dict.fromkeys(pace.slower, 1.0))
    monkeypatch.setattr(module, "measured_pace", lambda *_: pace)
    measured = {"measured": dense.parent / "fitted", **KEYS}
    quick = tawny.fit(dense, tmp_path / "quick", speed=20, **measured)
    assert quick.budget is None and quick.speed["asked"] == 20 and quick.speed["measured"] > 0
    assert quick.bytes < 2e6 / 20 + PackedSize(job).rest
    assert "(target: 20)" in quick.says and "attention" in quick.speed["assumes"]
    monkeypatch.setattr(module, "resident_memory", lambda: 10**12)
    bounded = tawny.fit(dense, tmp_path / "bounded", speed=20, memory="900GB", **measured)
    assert bounded.speed is None and any("its speed was not measured" in line for line in bounded.warnings)
    slow = dict.fromkeys(pace.slower, 9.0)  # kernels that are far slower than memory
    monkeypatch.setattr(module, "measured_pace", lambda *_: replace(pace, slower=slow))
    with pytest.raises(
        RecipeError, match=r"cannot write 20 tokens a second .* give --speed [0-9.]+, or less"
    ):
        tawny.fit(dense, tmp_path / "slow", speed=20, **measured)
    assert not (tmp_path / "slow.partial").exists()


def test_a_level_whose_mask_takes_longer_than_whole_int8_counts_as_that():
    """By an injected pace: a mask takes 20 cycles for 64 weights, however few are left."""
    sizes = {f"{kind}@{share}": 100 for kind in KINDS_TRIED for share in (0.0, 0.5, 0.7)}
    slower = dict.fromkeys(sizes, 1.0)
    slower["int8@0.0"], sizes["int8@0.0"] = 1.5, 200
    slower |= {"int3@0.5": 3.5, "int4@0.7": 3.1, "int4@0.0": 9.0}  # whole int8 takes 3, whole levels stay
    assert pace_module.without_masks(slower, sizes) == {"int3@0.5": 3.0}


def test_an_embedding_of_its_own_takes_bytes_of_the_file_and_one_row_of_a_token(tmp_path):
    sizes = PackedSize(prepared(saved(tmp_path / "dense")))
    for kind in (None, "int8", "int4"):
        assert 0.9 < sizes.of_embedding(kind) / sizes.of_head(kind) < 1.1
    pace = pace_module.Pace(1.0, {pace_module.DENSE: 1.0, "int8@0.0": 1.0}, (1, 1), 1, "")
    read = pace_module.ReadPerToken(sizes, pace)
    assert read.of_head("int8") == sizes.of_head("int8") and read.of_embedding("int8") == 0
    made = tawny.fit(tmp_path / "dense", tmp_path / "fitted", bits=9, **KEYS)
    assert made.bytes <= made.budget
    costs = list(made.embedding.values())
    assert len(costs) == len(made.head) and 0 < costs[0] < costs[-1]


def test_a_probe_that_breaks_the_model_down_is_the_worst_of_all(dense, tmp_path, monkeypatch):
    measure, calls = Scorer.__call__, []

    def breaking(self, candidates, windows):
        calls.append(len(candidates))
        made = measure(self, candidates, windows)
        return [math.inf, *made[1:]] if len(calls) == 1 else made

    monkeypatch.setattr(Scorer, "__call__", breaking)
    fitted = tawny.fit(dense, tmp_path / "fitted", bits=9, **KEYS)
    known = json.loads((tmp_path / "fitted" / "measured.json").read_text())["reactions"]["reactions"]
    assert fitted.bytes and all(math.isfinite(value) for value in known.values()) and max(known.values()) > 1


def test_a_kind_of_a_head_that_breaks_the_model_down_is_not_chosen(dense, tmp_path, monkeypatch):
    measure, calls = Scorer.of_hidden, []

    def breaking(self, *given):
        calls.append(given)
        if len(calls) == 1:
            raise NumericalError("not a number")
        return measure(self, *given)

    monkeypatch.setattr(Scorer, "of_hidden", breaking)
    fitted = tawny.fit(dense, tmp_path / "fitted", bits=9, **KEYS)
    assert set(fitted.head) == {"int8", "int6", "int5", "int4", "int3"} and fitted.bytes
    assert "int2" in tawny.fit(dense, tmp_path / "usual", bits=9, **KEYS).head


def test_head_and_embedding_get_kinds_of_their_own(tmp_path):
    job = prepared(saved(tmp_path / "dense"))
    sizes = PackedSize(job)
    none = {str(share): 0.0 for share in SPARSITIES}
    measures = {x.name: Measures(dict.fromkeys(KINDS_TRIED, 0.0), none, 0, False) for x in job.linears}
    little, much = ({kind: i * step for i, kind in enumerate(KINDS_TRIED)} for step in (0.01, 1.0))
    found = Measured(measures, dict.fromkeys(measures, 0.0), much, little)
    least = sum(sizes.linear(x, Level(0.0, "int2")) for x in job.linears)
    budget = sizes.rest + least + sizes.of_head("int8") + sizes.of_embedding("int3")
    best = Table(job, Room(sizes, budget), found).chosen(budget, zeros=False)
    assert best is not None and best.bytes <= budget
    assert (best.head, best.embedding) == ("int8", "int3")
    assert best.expected == pytest.approx(little["int3"])
    table = Table(job, Room(sizes, budget), found)
    assert [each.head for each in table.finalists()] == ["int8"]
    with pytest.raises(RecipeError, match=f"give --size {math.ceil(table.least)}, or more"):
        Table(job, Room(sizes, table.least / 2), found).finalists()


def test_memory_counts_what_finalists_take_beside_the_model_that_measured(dense):
    job = prepared(dense, solver="sparsegpt", refine={"epochs": 1})
    demand = FitDemand.of(FitSettings(), job, Load(8, 24, 1000))
    phases = demand.phases(spill=False)
    alone = demand.finalist.phases(spill=False)
    assert "refine" in alone and {f"finalists, {name}" for name in alone} <= phases.keys()
    for name, parts in alone.items():
        beside = sum(phases[f"finalists, {name}"].values()) - sum(parts.values())
        assert beside == phases["text"]["embeddings"] + job.stack.late_bytes > 0
    assert sum(phases["judging"].values()) > 2 * beside


def test_a_fit_of_which_nothing_can_be_made_keeps_what_it_measured(dense, fitted, tmp_path, monkeypatch):
    def breaks(*_, **__):
        raise NumericalError("NaN in block 1")

    out = tmp_path / "made"
    with monkeypatch.context() as patched:
        patched.setattr(formats.Packed, "make", breaks)
        with pytest.raises(
            RecipeError, match=r"NaN in block 1: give a larger size.* with --measured .* again"
        ):
            tawny.fit(dense, out, bits=8, **KEYS)
    monkeypatch.setattr(module, "measure", None)  # would be called
    again = tawny.fit(dense, out, bits=9, measured=out, overwrite=True, **KEYS)
    assert again.finalists == fitted.finalists and not (tmp_path / "made.partial").exists()


def test_a_fit_that_is_stopped_in_a_finalist_says_what_it_keeps(dense, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise Interrupted("stopped by Ctrl-C; the source is untouched and nothing was finished yet")

    monkeypatch.setattr(formats.Packed, "make", stopped)
    with pytest.raises(
        Interrupted, match=r"untouched and the results of a fit are kept in .*made\.partial: "
    ):
        tawny.fit(dense, tmp_path / "made", bits=8, **KEYS)


def test_zeros_are_tried_where_they_promise_enough(job):
    sizes = PackedSize(job)
    budget = size_of(sizes, job, "int3", "int8") - sizes.of_embedding("int8")
    names = {}
    for cost in (0.0, 10.0):
        zeros = {str(share): cost for share in SPARSITIES}
        bits = {kind: float(i) for i, kind in enumerate(KINDS_TRIED)}
        measures = {x.name: Measures(bits, zeros, 0, False) for x in job.linears}
        found = Measured(measures, dict.fromkeys(measures, 1.0), {"int8": 0.0}, {})
        names[cost] = [each.name for each in Table(job, Room(sizes, budget), found).finalists()]
    assert names[0.0] == ["zeros and bits by the linear"]  # nothing is as near
    assert not any("zeros" in name for name in names[10.0])


def test_a_finalist_that_is_expected_to_be_far_behind_is_not_made(job):
    sizes = PackedSize(job)
    zeros, bits = (
        {str(share): 1000.0 for share in SPARSITIES},
        dict(zip(KINDS_TRIED, (1, 2, 4, 8, 16, 32, 64), strict=False)),
    )
    measures = {x.name: Measures(bits, zeros, 0, False) for x in job.linears}
    reactions = {x.name: 1.0 + 9 * (i % 2) for i, x in enumerate(job.linears)}
    budget = size_of(sizes, job, "int4", "int8") - sizes.of_embedding("int8")
    table = Table(job, Room(sizes, budget), Measured(measures, reactions, {"int8": 0.0}, {}))
    best, uniform = table.chosen(budget, zeros=False), table.uniform()
    near = uniform.expected <= 1.25 * best.expected
    assert [each.uniform is None for each in table.finalists()] == [True, False][: 1 + near] and not near


def test_a_uniform_finalist_names_what_its_embedding_becomes(tmp_path):
    job = prepared(saved(tmp_path / "dense"))
    sizes = PackedSize(job)
    bits = dict(zip(KINDS_TRIED, (1, 2, 4, 8, 16, 32, 64), strict=False))
    measures = {
        x.name: Measures(bits, {str(share): 9.0 for share in SPARSITIES}, 0, False) for x in job.linears
    }
    found = Measured(measures, dict.fromkeys(measures, 1.0), {"int8": 0.0}, {"int8": 0.0})
    uniform = Table(job, Room(sizes, size_of(sizes, job, "int4", "int8")), found).uniform()
    assert sizes.embedding and uniform.embedding == "int8"
    assert uniform.name.endswith("head int8, embedding int8")


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen3_moe"])
def test_bytes_are_known_before_packing(family, tmp_path):
    many = {"num_experts": 48} if family == "qwen3_moe" else {}  # each is named in the index
    model = tiny_model(family, dtype=torch.bfloat16, **SHAPE, **many)
    model.get_output_embeddings().weight.data[:4] = 0  # zeros that nobody removed
    model.save_pretrained(tmp_path / "dense")
    for number, (kind, group, sparsity, head, embedding) in enumerate(
        [
            ("int8", None, 0.0, "int8", "int4"),
            ("int4", 32, 0.0, None, "int6"),
            ("int3", None, 0.5, "int4", None),
        ]
    ):
        embedding = None if model.config.tie_word_embeddings else embedding
        values = {"kind": kind, "group_size": group, "head": head, "embedding": embedding}
        job = prepared(tmp_path / "dense", solver="magnitude", sparsity=sparsity, values=values)
        sizes = PackedSize(job)
        planned = size_of(sizes, job, kind, head, embedding, group, sparsity)
        tawny.prune(tmp_path / "dense", tmp_path / f"{number}.dense", recipe=job.recipe)
        made = tawny.pack(tmp_path / f"{number}.dense", tmp_path / str(number))
        assert 0.85 * planned <= made.file_bytes <= planned
        tensors = sum(x.bytes for x in made.linears)
        kept = [x.numel - removed_count(x.numel, sparsity) for x in job.linears]
        assert tensors > sum(kept) * KINDS[kind].bits / 8


def test_bytes_are_known_where_a_quantised_head_is_decoded(tmp_path):
    quantised(tmp_path / "dense", FORMATS["GPTQ, 8 bits"])
    job = prepared(tmp_path / "dense", solver="magnitude", values={"kind": "int4", "head": "int8"})
    sizes = PackedSize(job)
    assert any(key.startswith("lm_head") for key in job.stack.checkpoint.coded) and sizes.head
    planned = size_of(sizes, job, "int4", "int8")
    tawny.prune(tmp_path / "dense", tmp_path / "pruned", recipe=job.recipe)
    made = tawny.pack(tmp_path / "pruned", tmp_path / "packed")
    assert 0.85 * planned <= made.file_bytes <= planned


def test_why_there_are_no_zeros_is_said_as_it_was(job):
    plain, sparse = (
        SimpleNamespace(levels={x.name: Level(share, "int4") for x in job.linears}) for share in (0.0, 0.5)
    )
    every = [Level(0.0, "int4"), Level(0.5, "int4")]
    assert "do not skip them" in _zeros_told(job, every[:1], plain, [plain])
    assert "less than 3 %" in _zeros_told(job, every, plain, [plain])
    assert "farther from the dense one" in _zeros_told(job, every, plain, [sparse, plain])
    assert _zeros_told(job, every, sparse, [plain, sparse]).startswith("zeros in 14 of 14 linears")


def test_held_out_text_that_decides_by_one_window_is_too_little(dense, tmp_path):
    (tmp_path / "short.txt").write_text("a" * 56)  # one sample of 24 leaves two windows of 12
    keys = {
        "calibration.samples": 1,
        "calibration.seqlen": 24,
        "fit.length": 12,
        "tokenizer": tiny_tokenizer(),
    }
    with pytest.raises(
        TextError, match=r"leaves 2 windows of 12 tokens .* expected 3 or more: give a longer"
    ):
        tawny.fit(dense, tmp_path / "out", bits=9, **{**KEYS, **keys, "calibration": tmp_path / "short.txt"})


def test_ram_leaves_what_a_text_and_the_program_do_not_take(dense):
    job, text = prepared(dense), bytes_of_text(tiny_model("qwen2", dtype=torch.bfloat16, **SHAPE), 64)
    assert text == 64 * 2 * 2 * SHAPE["num_hidden_layers"] * job.stack.model.config.num_key_value_heads * 16
    for context, ram in ((64, 600_000_000), (128, 600_000_000 + text)):
        room = room_for(job, Target.of(None, None, None, ram, context), PackedSize(job), lambda: None)
        assert room.budget == 100_000_000 - text
    with pytest.raises(
        RecipeError, match=r"does not fit into 500 MB: its weights take at least .*; give --ram \d+"
    ):
        room_for(job, Target.of(None, None, None, "500MB", 64), PackedSize(job), lambda: None)
    with pytest.raises(RecipeError, match="context 64 belongs to ram: give --ram with it"):
        Target.of("1MB", None, None, None, 64)
    with pytest.raises(RecipeError, match="context 0 is not possible; expected a number of tokens above 0"):
        Target.of(None, None, None, "1GB", 0)


def test_what_cannot_be_is_said_before_the_work(dense, tmp_path, run):
    out = tmp_path / "out"
    refused = {
        "either size": {},
        r"cannot be made as small as 10 kB: .* give --size \d+ \(or --bits [0-9.]+\), or more": {
            "size": "10kB"
        },
        "bits 40.0 is not possible": {"bits": 40.0},
        "is not a size": {"size": "much"},
        "leave sparsity out": {"bits": 4, "sparsity": 0.5},
        "leave dtype out": {"bits": 4, "dtype": "float32"},
        "leave values out": {"bits": 4, "values.head": "int8"},
        "leave include out": {"bits": 4, "include": "*.q_proj"},
        "choose alps or sparsegpt": {"bits": 4, "solver": "wanda"},
        "speed -1 is not possible": {"speed": -1},
        "fit.window is not a known fit key": {"bits": 4, "fit.window": 2},
        "give at least 4 samples": {"bits": 9, "calibration": TOKENS[:3]},
    }
    for words, changes in refused.items():
        with pytest.raises((RecipeError, TextError), match=words):
            tawny.fit(dense, out, **{**KEYS, **changes})
    with pytest.raises(UserError, match="save the live model"):
        tawny.fit(tiny_model("llama"), out, bits=4)
    code, _, err = run("fit", dense, "--size", "1GB", "--bits", "4", "--out", out, "--calibration", "wiki")
    assert code == 2 and "size 1GB and bits 4.0 are several" in err and not out.exists()
    code, _, err = run("fit", dense, "--size", "10kB", "--out", out, "--calibration", "absent.txt")
    assert code == 2 and "as small as 10 kB" in err  # no text is read for it


@pytest.mark.parametrize("words", [("--sparsity", 0.5), ("--allocator", "owl"), ("-o", "values.kind=int4")])
def test_the_verb_refuses_what_a_fit_chooses(dense, tmp_path, run, words):
    for verb in (["fit"], ["plan", "fit"]):
        out = ("--out", tmp_path / "x") if verb == ["fit"] else ()
        code, _, err = run(*verb, dense, "--bits", 9, *out, *words)
        assert code == 2 and "a fit chooses" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("sparsity: 0.7\nallocator: owl", "a fit chooses sparsity and allocator itself"),
        ("pattern: '2:4'", "a fit chooses pattern itself"),
        ("seed: 4", None),
        ("allocator: {name: uniform}\nsparsity: 0", None),
    ],
)
def test_the_verb_says_what_of_a_recipe_is_not_used(monkeypatch, tmp_path, run, recipe, words):
    (tmp_path / "r.yaml").write_text(f"{recipe}\nsolver: sparsegpt")
    made = []
    for name in ("fit", "plan_fit"):
        monkeypatch.setattr(tawny, name, lambda *_, **keys: made.append(keys["recipe"]) or 1 / 0)
    for verb in (("fit", "m", "--out", tmp_path / "x"), ("plan", "fit", "m")):
        err = run(*verb, "--bits", 4, "-c", tmp_path / "r.yaml")[2]
        assert words in err if words else "a fit chooses" not in err
    for recipe in made:
        assert (recipe.sparsity, recipe.allocator.name, recipe.pattern) == (0.0, "uniform", "unstructured")
        assert recipe.solver.name == "sparsegpt"
    assert len(made) == 2


@pytest.mark.parametrize("kind", [None, "int3"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_only_what_was_rounded_is_told_to_have_been(sparsity, kind):
    model = tiny_model("qwen2", dtype=torch.bfloat16, **SHAPE)
    keys = {"solver": "magnitude", "allocator": "uniform", "sparsity": sparsity}
    if kind or sparsity:
        tawny.prune(model, calibration=TOKENS, values=kind, **keys)
    job = prepared(model)
    assert bool(few_bits(job)) == (kind is not None)


def test_the_verb_shows_a_fit_in_both_formats(dense, fitted, tmp_path, run, monkeypatch):
    monkeypatch.setattr(tawny, "fit", lambda *_, **__: fitted)
    words = ("fit", dense, "--bits", 9, "--out", tmp_path / "x", "--calibration", "wiki")
    assert json.loads(run(*words, "--json")[1])["winner"] == fitted.winner
    assert fitted.winner in " ".join(run(*words)[1].split())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_felt_of_a_small_change_is_the_divergence_that_it_makes(family):
    """In the last block, where a token's error reaches no other token."""
    model = tiny_model(family, **SHAPE).eval()
    job, ids = prepared(model), tokens(200, 16)
    linear, stack = job.by_block[-1][-1], job.stack
    W_OI = stack.weight(linear).clone()
    random = torch.Generator().manual_seed(0)
    changed_OI = W_OI + 0.05 * W_OI.std() * torch.randn(W_OI.shape, generator=random)
    store = SimpleNamespace(
        open=lambda _: None, read=lambda x, _: changed_OI if x is linear else stack.weight(x)
    )
    with torch.no_grad():
        felt = ask(SimpleNamespace(run=Run.unkept(silent), job=job), store, Samples(ids))
        dense = Reference(model(input_ids=ids).logits.flatten(0, 1))
        stack.set_weight(linear, changed_OI)
        lost = dense.divergence(model(input_ids=ids).logits.flatten(0, 1)).mean()
    assert felt.pop(linear.name)[0] == pytest.approx(float(lost), rel=0.15)
    assert not any(nats for nats, _ in felt.values()) and len(felt) == len(job.linears) - 1


def test_what_a_role_loses_is_shared_out_by_what_is_felt():
    felt = {f"{block}.{role}": (0.001 * (1 + block), 10**9) for block in range(4) for role in ("q", "up")}
    found = in_nats(felt, {"*.q": 0.02, "*.up": math.inf})
    assert [found[f"{block}.q"] for block in range(4)] == pytest.approx([0.002, 0.004, 0.006, 0.008])
    assert sum(found[f"{block}.up"] for block in range(4)) == pytest.approx(10)
    felt = {"0.q": (0.01, 10**9), "1.q": (0.02, 10**9), "2.q": (0.9, 0)}  # no token was routed to the last
    assert in_nats(felt, {"*.q": 0.34})["2.q"] == pytest.approx(0.31)
    assert not any(in_nats({"0.q": (0.0, 9)}, {"*.q": 1.0}).values())


def test_a_linear_that_is_sparse_already_runs_as_one_with_a_mask():
    info = SimpleNamespace(numel=1000)
    pace = SimpleNamespace(slower={"int4@0.0": 1.0, "int4@0.5": 2.0, "int4@0.7": 3.0})
    sizes = SimpleNamespace(linear=lambda *_: 10)
    read = pace_module.ReadPerToken(sizes, pace)
    costs = [
        read.linear(info, Level(sparsity, "int4"), measures=replace(UNMEASURED, had=zeros))
        for sparsity, zeros in [(0, 0), (0, 5), (0, 600), (0.5, 0), (0.5, 800)]
    ]
    assert costs == [10, 10, 20, 20, 30]


@pytest.mark.parametrize(("kind", "zero_rows"), [("int4", 0), ("int3", 0), ("int2", 0), ("int2", 3)])
def test_bytes_of_masks_are_kept_only_where_a_kind_rounds_enough_to_zero(kind, zero_rows, tmp_path):
    """Else a part of the size that was asked for is never spent."""
    model = tiny_model("llama", dtype=torch.bfloat16, **SHAPE)
    for linear in (x for x in model.model.layers.modules() if isinstance(x, torch.nn.Linear)):
        linear.weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        linear.weight.data[:zero_rows] = 0
    model.save_pretrained(tmp_path / "dense")
    job = prepared(tmp_path / "dense", solver="magnitude", values={"kind": kind})
    tawny.prune(tmp_path / "dense", tmp_path / "pruned", recipe=job.recipe)
    tawny.pack(tmp_path / "pruned", tmp_path / "packed")
    pruned = tawny.load(tmp_path / "pruned")
    sizes, planned, reserved = PackedSize(job), 0, 0
    for x in job.linears:
        rounds = float((pruned.get_submodule(x.name).weight == 0).float().mean())
        known = replace(UNMEASURED, had=zero_rows * x.shape[1])
        planned += sizes.linear(x, Level(0.0, kind), measures=replace(known, rounds={kind: rounds}))
        reserved += sizes.linear(x, Level(0.0, kind), measures=known)
    rest = sizes.rest + sizes.of_head(None) + sizes.of_embedding(None)
    packed = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    packed += (tmp_path / "packed" / INDEX).stat().st_size
    assert packed <= rest + planned <= rest + reserved
    assert (planned < 0.97 * reserved) == (kind in ("int4", "int3"))


def test_pieces_of_several_samples_begin_with_their_bos_and_those_of_one_as_they_are():
    given = torch.arange(24).reshape(2, 12)
    apart = module._pieces(given, 4)
    assert torch.equal(apart, given.reshape(6, 4))
    given[:, 0] = 99
    assert module._pieces(given, 5)[:, 0].tolist() == [99] * 4
    assert module._pieces(given[:1], 4)[:, 0].tolist() == [99, 4, 8]
