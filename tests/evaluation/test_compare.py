from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

import tawny
from tawny.errors import RecipeError
from tawny.evaluation import compare as module
from tawny.evaluation.compare import measure, short_names
from tawny.progress import Silent
from tawny.report.comparison import caption
from tests.encoders import tiny_encoder
from tests.evaluation.questions import tiny_folder
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model, the same pruned, and that packed."""
    folder = tmp_path_factory.mktemp("models")
    dense = tiny_folder(folder / "dense")
    tawny.prune(
        dense,
        folder / "pruned",
        sparsity=0.5,
        allocator="uniform",
        solver="magnitude",
        calibration=torch.randint(3, 200, (2, 16)),
    )
    tawny.pack(folder / "pruned", folder / "packed")
    return [str(folder / name) for name in ("dense", "pruned", "packed")]


@pytest.fixture
def here(monkeypatch):
    """In this process: the processes themselves have a test of their own."""

    class Here:
        def __init__(self, job, progress, noise):
            self.asked, self.row = (job["source"], job["against"], job["setting"], progress), None
            self.timed = False

        def go_on(self):
            self.row, self.timed = self.row or measure(*self.asked), True

        def end(self):
            pass

    monkeypatch.setattr(module, "_Process", Here)


def job(source, against, text):
    setting = {
        "text": text,
        "seqlen": 48,
        "windows": 3,
        "tasks": None,
        "task_data": None,
        "limit": None,
        "speed": True,
        "bos": None,
        "labels": None,
        "threads": 1,
        "rounds": 1,
        "prompt_tokens": 8,
        "compute": "float32",
        "device": "cpu",
        "cache": False,
    }
    return {"source": source, "against": against, "setting": setting, "trusted": False}


class Seen(Silent):
    def __init__(self):
        self.phases, self.steps, self.said = [], [], []

    def phase(self, name, total, unit="blocks"):
        self.phases.append(name)

    def step(self, text):
        self.steps.append(text)

    def say(self, text):
        self.said.append(text)


def test_models_in_processes_of_their_own_are_timed_in_turn_and_give_all_numbers(models, text):
    seen = Seen()
    jobs = [job(models[0], None, text), job(models[1], models[0], text)]
    dense, pruned = module._rows(jobs, ["dense", "pruned"], seen)
    assert dense["errors"] == pruned["errors"] == {}
    assert (dense["kind"], pruned["kind"]) == ("dense", "pruned")
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert pruned["perplexity"]["agreement"]["kl"] > 0 and pruned["perplexity"]["windows"] == 3
    assert all(
        row["speed"]["decode_tokens_per_second"] > 0 and row["file_bytes"] > 0 for row in (dense, pruned)
    )
    assert seen.steps[:4] == ["dense", "pruned"] * 2 and seen.phases[0] == "measuring speeds in turn"
    assert {"dense model", "pruned model", "comparing"} <= set(seen.phases)
    assert seen.said == ["measuring dense (1 of 2)", "measuring pruned (2 of 2)"]


def test_models_are_timed_together_as_far_as_half_of_the_memory_goes(models, text, monkeypatch):
    sizes = {model: module.file_bytes(module.resolve(model)) for model in models}
    monkeypatch.setattr(module, "free_memory", lambda: 2 * (sizes[models[0]] + sizes[models[1]]))
    jobs = [job(source, None, text) for source in (*models, "nowhere")]
    assert module._groups(jobs) == [jobs[:2], jobs[2:]]
    monkeypatch.setattr(module, "free_memory", lambda: None)  # where that cannot be asked
    assert module._groups(jobs) == [jobs]


def test_a_model_that_cannot_be_timed_waits_with_the_rest_until_the_others_are(models, text, tmp_path):
    shutil.copytree(models[0], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nonsense")
    seen = Seen()
    jobs = [job(str(tmp_path / "broken"), None, text), job(models[0], None, text)]
    broken, dense = module._rows(jobs, ["broken", "dense"], seen)
    assert "speed" in broken["errors"] and dense["errors"] == {}
    assert seen.steps[:2] == ["dense", "dense"] and seen.phases[0] == "measuring speeds in turn"


def test_a_process_that_dies_is_a_reason_and_no_crash(models, text, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (made,) = module._rows([job(models[0], None, text)], ["dense"], Silent())
    assert "ended early" in made["errors"]["model"]


def test_models_stand_side_by_side_and_differ_from_the_first(models, text, here):
    made = tawny.compare(
        models, text=text, seqlen=48, windows=3, rounds=1, prompt_tokens=8, compute="float32"
    )
    dense, pruned, packed = made.models
    assert [row["kind"] for row in made.models] == ["dense", "pruned", "packed"]
    assert [row["name"] for row in made.models] == ["dense", "pruned", "packed"]
    assert "agreement" not in dense["perplexity"] and pruned["perplexity"]["agreement"]["kl"] > 0
    assert packed["perplexity"]["perplexity"] == pytest.approx(pruned["perplexity"]["perplexity"], rel=0.02)
    assert packed["sparsity"] == pytest.approx(pruned["sparsity"], abs=1e-3)
    assert made.to_dict()["setting"]["windows"] == 3


def test_what_fails_for_one_model_is_said_and_the_others_stay(models, text, tmp_path, here):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nonsense")
    other = tiny_folder(tmp_path / "other", vocab_size=300)
    given = [models[0], str(tmp_path / "broken"), str(other), str(tmp_path / "nowhere")]
    made = tawny.compare(given, text=text, seqlen=48, windows=2, speed=False, compute="float32").to_dict()
    dense, broken, foreign, missing = made["models"]
    assert dense["errors"] == {} and dense["resident_bytes"] >= 0 and "speed" not in dense
    assert broken["errors"].keys() >= {"memory", "sparsity", "perplexity"}
    assert "tokenizer" in foreign["errors"]["agreement"] and foreign["perplexity"]["perplexity"] > 1
    assert "no such folder" in missing["errors"]["model"]
    from tawny.report.comparison import compared, to_html, to_markdown

    names = [row[0] for row in compared(made).rows]
    assert "bits per byte" in names and "perplexity" in names
    page, table = to_html(made), to_markdown(made)
    for shown in (page, table):
        assert "nowhere" in shown and "no such folder" in shown


def test_tasks_of_any_metric_are_compared_and_no_mean_mixes_them():
    from tawny.report.comparison import compared

    def asked(*tasks, mean=None):
        keys = ("name", "metric", "value", "stderr")
        found = [dict(zip(keys, task, strict=True)) for task in tasks]
        return {"tasks": found, "mean": mean, "stderr": None if mean is None else 0.01}

    piqa, arc = ("piqa", "acc", 0.7, 0.01), ("arc_easy", "acc", 0.6, 0.01)
    others = ("gsm8k", "exact_match", 0.5, 0.01), ("wikitext", "word_perplexity", 25.0, 0.0)
    mixed = {"models": [{"name": "a", "tasks": asked(piqa, *others)}, {"name": "b"}]}
    lines = {row[0]: row[1].text for row in compared(mixed).rows[1:]}
    assert lines["piqa, %"] == "70.0 ± 1.0" and lines["gsm8k, %"] == "50.0 ± 1.0"
    assert lines["wikitext, word_perplexity"] == "25" and "mean of the tasks, %" not in lines
    alike = {"models": [{"name": "a", "tasks": asked(piqa, arc, mean=0.65)}]}
    assert "mean of the tasks, %" in {row[0] for row in compared(alike).rows}


def test_the_verb_writes_a_table_a_page_and_one_document(models, text, tmp_path, here, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # libraries that are imported meanwhile set it to theirs
    given = (
        "compare",
        *models,
        "--text",
        text,
        "--seqlen",
        48,
        "--windows",
        2,
        "--no-speed",
        "--compute",
        "float32",
    )
    code, out, err = run(*given, "--markdown", tmp_path / "t.md", "--html", tmp_path / "t.html", "--json")
    made = json.loads(out)
    assert code == 0 and len(made["models"]) == 3 and "written to" in err
    table = (tmp_path / "t.md").read_text()
    assert table.startswith("| | dense | pruned | packed |") and "KL from dense" in table and "**" in table
    page = (tmp_path / "t.html").read_text()
    assert '<th scope="col">packed</th>' in page and "http" not in page.replace("http-equiv", "")
    code, out, _ = run(*given)
    assert code == 0
    for words in ("resident memory", "× ", "same next token as dense"):
        assert words in out, out


def test_a_page_that_cannot_be_made_costs_no_measurement(models, text, tmp_path, run, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("tawny.cli.compare.write", full)
    given = ["--text", text, "--seqlen", 48, "--windows", 1, "--no-speed", "--html", tmp_path / "t.html"]
    for earlier in (None, "yesterday's"):
        if earlier is not None:
            (tmp_path / "t.html").write_text(earlier)
        code, out, err = run("compare", models[0], *given, "--json")
        assert code == 0 and len(json.loads(out)["models"]) == 1  # one document
        assert "t.html could not be made" in err and (tmp_path / "t.html").exists() == bool(earlier)
    assert (tmp_path / "t.html").read_text() == earlier


def test_without_a_text_tasks_are_all_that_is_measured(run, monkeypatch):
    asked = []
    monkeypatch.setattr(tawny, "compare", lambda *_, **keys: asked.append(keys["text"]) or 1 / 0)
    for words, text in (
        (["--tasks", "owl7"], None),
        ([], "wikitext2"),
        (["--tasks", "owl7", "--text", "wiki"], "wiki"),
    ):
        run("compare", "a", *words)
        assert asked.pop() == text


def test_a_language_model_beside_an_encoder_has_a_perplexity(models, text, tmp_path, here, monkeypatch):
    monkeypatch.setattr(module, "MOST_WINDOWS", 2)
    tiny_encoder("bert").save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    made = tawny.compare([tmp_path / "encoder", models[0]], text=text, seqlen=48, speed=False).models[1]
    assert (made["perplexity"]["seqlen"], made["perplexity"]["windows"]) == (48, 2)
    made = tawny.compare([tmp_path / "encoder", models[0]], text=text, speed=False).models[1]
    assert "2048" in made["errors"]["perplexity"]  # as without the encoder: longer than the context


def test_mistakes_are_found_before_anything_is_measured(models, text, tmp_path, run):
    dense = models[0]
    for words, *wrong in (
        ("twice", dense, dense, "--text", text),
        (".md", dense, "--text", text, "--markdown", tmp_path / "t.txt"),
        ("does not exist", dense, "--text", text, "--html", tmp_path / "no" / "t.html"),
        ("neither a file", dense, "--text", tmp_path / "none.txt"),
        ("4096", dense, "--text", text, "--seqlen", 4096),
        ("no such folder", tmp_path / "a", tmp_path / "b", "--text", text),
    ):
        code, _, err = run("compare", *wrong)
        assert code == 2 and words in err
    for key, value in (("threads", 0), ("rounds", 0), ("limit", 0), ("compute", "int3")):
        with pytest.raises(RecipeError, match="give 1 or more" if value == 0 else "int3"):
            tawny.compare(dense, **{key: value})  # one model is not a list of letters


def test_the_caption_says_what_was_computed_in_and_which_tasks_were_shown_examples():
    tasks = [{"name": "rte", "shots": 0}, {"name": "gsm8k", "shots": 5}]
    row = {"name": "a", "tasks": {"lm_eval": "0.4", "limit": None, "compute": "bfloat16", "tasks": tasks}}
    told = {"setting": {"compute": "auto"}, "models": [row], "machine": {}, "versions": {}}
    said = " ".join(caption(told))
    assert "tasks, zero-shot but for gsm8k 5-shot, ±" in said and said.endswith("computed in bfloat16.")
    tasks.pop()
    assert "tasks, zero-shot, ±" in " ".join(caption(told))


def test_names_are_as_short_as_they_can_be():
    assert short_names(["/x/a", "/y/b"]) == ["a", "b"]
    assert short_names(["/x/a", "/y/a", "smollm2"]) == ["x/a", "y/a", "smollm2"]
    assert short_names(["a"]) == ["a"]


def test_every_model_is_measured_on_windows_that_begin_alike(text, tmp_path, here, run):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(begins=True).save_pretrained(folder)
    shutil.copytree(folder, tmp_path / "other")
    both = [folder, tmp_path / "other"]
    for flags, begun in (([], True), (["--bos"], True), (["--no-bos"], False)):
        code, out, _ = run("compare", *both, "--text", text, "--seqlen", 24, "--no-speed", *flags, "--json")
        assert code == 0
        measured = [model["perplexity"] for model in json.loads(out)["models"]]
        assert [each["bos"] for each in measured] == [begun] * 2
        alone = tawny.evaluate(folder, text, seqlen=24, windows=measured[0]["windows"], bos=begun)
        assert measured[0]["perplexity"] == pytest.approx(alone.perplexity, rel=1e-6)


def test_a_folder_of_tasks_that_is_not_there_is_refused_before_the_work(tmp_path, run):
    dense = tiny_folder(tmp_path / "dense")
    given = ("--text", "none", "--tasks", "owl7", "--task-data", tmp_path / "absent")
    code, _, err = run("compare", dense, *given)
    assert code == 2 and "no such folder" in err
