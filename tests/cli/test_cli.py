from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tawny
from tawny.cli.recipe_options import Given, _spelled_out
from tawny.errors import ModelError, NumericalError, OutputError
from tawny.evaluation.perplexity import Perplexity
from tawny.record import Record
from tests.serving.tiny import byte_tokenizer, served_model
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

# With a result, and so with --json; docs/cli.md names every verb.
ROOT = Path(__file__).parents[2]
CLI_DOCS = runpy.run_path(str(ROOT / "scripts" / "cli_docs.py"))
VERBS = [name for name, _ in CLI_DOCS["verbs"]() if name not in ("chat", "serve")]


def measured(value: float = 20.0) -> Perplexity:
    return Perplexity(value, 0.5, 3.0, 4, 64, 252, 1.0, "wiki", "ab" * 32, "float32", 10**9)


def answering(monkeypatch, name, result):
    """Replace a library call; the arguments it was given are kept."""
    calls = []

    def call(*args, **keys):
        calls.append((args, keys))
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(tawny, name, call)
    return calls


@pytest.fixture
def recipe_of(run, monkeypatch):
    """The recipe that `tawny prune` makes of some words, over 50 % sparsity."""
    calls = answering(monkeypatch, "prune", Record(recipe={}))

    def call(*words):
        code, _, err = run("prune", "m", "--out", "o", "-s", 0.5, *words, "--json")
        assert code == 0, err
        return calls[-1][1]["recipe"]

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_three_examples_and_has_at_most_twenty_four_options(run, verb):
    code, out, _ = run(*verb.split(), "--help")
    assert code == 0
    options, _, examples = out.partition("Examples:")
    lines = [line.strip() for line in examples.strip().splitlines()]
    assert len(lines) == 3 and all(line.startswith("tawny ") for line in lines)
    listed = [line for line in options.splitlines() if line.startswith("  -")]
    assert "--json" in options and len(listed) <= 24  # --help and --trust-remote-code are not counted


def test_the_help_of_all_lists_the_verbs(run):
    code, out, _ = run("--help")
    assert code == 0 and all(f"  {verb.split()[0]} " in out for verb in VERBS)


def test_who_gives_no_verb_is_shown_the_help_as_it_is(run):
    code, out, err = run()
    assert (code, err) == (2, "") and out == run("--help")[1] and out.count("\n") > 20


def test_help_imports_no_heavy_library_and_python_dash_m_is_the_same_command():
    script = (
        "import sys; from tawny.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["prune", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", done
    done = subprocess.run([sys.executable, "-m", "tawny", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"tawny {tawny.__version__}"


def test_the_page_of_the_docs_is_what_the_command_line_says():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == CLI_DOCS["render"](), "stale: run `make docs`"


def test_every_example_of_the_help_is_a_valid_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "allocation.yaml").write_text("'*': 0.7")
    verbs = dict(CLI_DOCS["verbs"]())
    for command in verbs.values():
        for line in CLI_DOCS["_examples"](command.epilog).splitlines()[1:-1]:
            _, *words = shlex.split(line.partition(" | ")[0])
            count = 1 if words[0] in verbs else 2
            context = verbs[" ".join(words[:count])].make_context(words[0], words[count:])
            shared = [field.name for field in fields(Given)]
            if set(shared) <= context.params.keys():
                fits = any(context.params.get(name) is not None for name in ("size", "bits", "speed"))
                given = {name: context.params[name] for name in shared}
                Given(**given | ({"sparsity": 0.0} if fits else {})).recipe()  # a fit finds it


def test_the_arguments_of_prune_become_a_recipe(run, monkeypatch, tmp_path):
    record = Record(recipe={}, out=str(tmp_path / "out"))
    calls = answering(monkeypatch, "prune", record)
    code, out, err = run(
        *("prune", "model", "--out", tmp_path / "out", "-s", 0.6, "-a", "uniform", "-m", "wanda"),
        *("--calibration", "wiki", "--samples", 3, "--seqlen", 64, "-o", "seed=5", "-o", "dtype=bfloat16"),
        *("--memory", "6GB", "-o", "include=*.mlp.*", "-o", "refit=true", "--overwrite", "--json"),
    )
    assert code == 0, err
    (args, keys) = calls[0]
    recipe = keys["recipe"]
    assert args == ("model", tmp_path / "out") and keys["overwrite"] is True
    assert keys["memory"] == "6GB"
    assert (recipe.sparsity, recipe.allocator.name, recipe.solver.name) == (0.6, "uniform", "wanda")
    assert recipe.calibration.text == "wiki" and recipe.calibration.samples == 3
    assert recipe.calibration.seqlen == 64 and recipe.seed == 5 and recipe.dtype == "bfloat16"
    assert recipe.include == ("*.mlp.*",) and recipe.refit
    assert json.loads(out) == json.loads(record.to_json())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--seed", "7"), {"seed": 7}),
        (("--seed=7", "--compute", "float32"), {"seed": 7, "compute": "float32"}),
        (("--profile-samples", 3, "--include=*.mlp.*"), {"profile_samples": 3, "include": ("*.mlp.*",)}),
    ],
)
def test_any_recipe_key_is_an_option_too(recipe_of, words, expected):
    recipe = recipe_of(*words)
    assert {key: getattr(recipe, key) for key in expected} == expected


def test_the_keys_of_a_section_are_options_bare_or_dotted(recipe_of):
    bare = recipe_of("-a", "owl", "--M", "7", "--solver.damp=0.1")
    assert bare.allocator.options["M"] == 7 and bare.solver.options["damp"] == 0.1
    words = ("-a", "owl", "--allocator.M", "7", "--calibration.text", "t.txt", "--calibration.samples=3")
    dotted = recipe_of(*words)
    assert dotted.allocator.options["M"] == 7
    assert (dotted.calibration.text, dotted.calibration.samples) == ("t.txt", 3)


@pytest.mark.parametrize(
    "key", ["allocator.M", "M", "allocator.beta", "allocator.path", "solver.a", "solver.rho"]
)
def test_a_recipe_key_is_never_taken_for_a_slip_of_an_option(key):
    known = {"--allocator", "--solver", "--calibration", "-M", "--device"}
    assert list(_spelled_out([f"--{key}", "7"], known)) == ["-o", f"{key}=7"]
    assert list(_spelled_out([f"--{key}=7"], known)) == ["-o", f"{key}=7"]


def test_the_file_of_an_allocation_is_given_in_the_place_of_an_allocator(recipe_of, tmp_path):
    (tmp_path / "a.yaml").write_text("'*': 0.5")
    allocator = recipe_of("-a", tmp_path / "a.yaml").allocator
    assert (allocator.name, allocator.options["path"]) == ("file", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "arguments", [("prune", "m", "--json"), ("inspect", "--json"), ("--json", "list"), ("prun", "--json")]
)
def test_a_usage_error_with_json_is_the_document(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and err.count("\n") == 1
    document = json.loads(out)
    assert document["exit_code"] == 2 and err == f"error: {document['error']}\n"


@pytest.mark.parametrize(
    ("arguments", "verb", "name"),
    [
        (("compare", "m", "--html"), "compare", "page.html"),
        (("compare", "m", "--markdown"), "compare", "page.md"),
        (("profile", "m", "--plot"), "profile", "page.svg"),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_refused_before_measuring(
    run, monkeypatch, tmp_path, arguments, verb, name
):
    calls = answering(monkeypatch, verb, SimpleNamespace(to_dict=dict))
    (tmp_path / name).mkdir()
    code, out, err = run(*arguments, tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1) and "is a folder: name a file" in err
    assert calls == []


def test_a_tilde_that_the_shell_left_is_the_home_folder(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("sparsity: 0.5")
    pruned, compared = (
        answering(monkeypatch, verb, SimpleNamespace(to_dict=dict, evaluation={}))
        for verb in ("prune", "compare")
    )
    run("prune", "m", "--out=~/pruned", "--recipe=~/r.yaml", "--json")
    assert pruned[0][0] == ("m", tmp_path / "pruned") and pruned[0][1]["recipe"].sparsity == 0.5
    (tmp_path / "t.md").mkdir()
    code, _, err = run("compare", "m", "--markdown=~/t.md")
    assert code == 2 and f"{tmp_path / 't.md'} is a folder" in err and not compared
    code, _, err = run("export", "m", "--to", "gguf", "--out=~nobody-of-that-name/m.gguf")
    assert code == 2 and "~nobody-of-that-name" in err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ((), []),
        (("-o", "seed=1"), []),
        (("-o", "allocator=dlp"), ["dlp"]),
        (("--allocator", "dlp"), ["dlp"]),
        (("-c", "fast"), ["atp"]),
        (("-c", "owl-wanda-70"), []),  # OWL for each M
        (("-o", "allocator.name=dlp"), ["dlp"]),
        (("-c", "seed.yaml"), []),
        (("-c", "fast", "--allocators", "owl, dlp"), ["owl", "dlp"]),
    ],
)
def test_a_profile_shows_the_allocator_that_was_named(run, monkeypatch, tmp_path, words, shown):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed.yaml").write_text("seed: 4")
    calls = answering(monkeypatch, "profile", SimpleNamespace(to_dict=dict))
    code, _, err = run("profile", "m", *words, "--json")
    assert code == 0, err
    assert calls[0][1]["allocators"] == shown


def test_options_of_a_search_are_told_from_those_of_its_recipe(run, monkeypatch, tmp_path):
    calls = answering(monkeypatch, "search", SimpleNamespace(to_dict=dict))
    options = ("-s", 0.6, "--budget", "10m", "-o", "search.trials=7", "-o", "seed=3", "--json")
    code, _, err = run("search", "model", "--out", tmp_path / "a.yaml", *options)
    given = calls[0][1]
    assert code == 0, err
    assert (given["settings"].budget, given["settings"].trials, given["recipe"].seed) == ("10m", 7, 3)
    code, _, err = run("search", "model", "--out", tmp_path / "a.yaml", "-s", 0.6, "-o", "search.trial=7")
    assert code == 2 and "did you mean 'trials'" in err and err.count("\n") == 1


def test_a_recipe_file_is_the_base_and_options_change_it(recipe_of, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("sparsity: 0.7\nseed: 4\nsolver: wanda\n")
    recipe = recipe_of("-c", path, "-o", "seed=9")
    assert (recipe.sparsity, recipe.seed, recipe.solver.name) == (0.5, 9, "wanda")


@pytest.mark.parametrize(
    ("recipe", "arguments", "sparsity"),
    [
        (None, (), 0.7),
        (None, ("-s", 0.3), 0.3),
        (None, ("-o", "pattern=2:4"), 0.5),
        ("sparsity: 0.6", (), 0.6),
        ("sparsity: 0.6", ("-s", 0.3), 0.3),
        ("seed: 4", (), 0.7),
        ("seed: 4", ("-s", 0.3), 0.3),
        ("pattern: '3:8'", (), 0.625),
        ("seed: 4", ("-o", "sparsity=0.2"), 0.2),
    ],
)
def test_the_sparsity_of_a_profile_is_what_was_said_last_else_the_recipes_else_the_default(
    run, monkeypatch, tmp_path, recipe, arguments, sparsity
):
    calls = answering(monkeypatch, "profile", SimpleNamespace(to_dict=dict))
    if recipe is not None:
        (tmp_path / "r.yaml").write_text(recipe)
        arguments = ("-c", tmp_path / "r.yaml", *arguments)
    code, _, err = run("profile", "m", *arguments, "--json")
    assert code == 0, err
    assert calls[0][1]["recipe"].sparsity == sparsity


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune", "m", "--out", "o"], "sparsity is missing"),
        (["prune", "m", "--out", "o", "-s", "60"], "0.6?"),
        (["prune", "m", "--out", "o", "-s", "0.5", "-m", "sparsgpt"], "'sparsegpt'"),
        (["prune", "m", "--out", "o", "-s", "0.5", "-o", "lamda=1"], "'lambda'"),
        (["prune", "m", "--out", "o", "-s", "0.5", "-a", "none.yaml"], "neither a file nor one of uniform"),
        (["prune", "m", "--out", "o", "-s", "0.6", "-p", "2:4"], "implies"),
        (["prune", "m", "--out", "o", "-s", "0.5", "-c", "none.yaml"], "cannot be read"),
        (["prune", "m", "--out", "o", "-s", "0.5", "-c", "fst"], "'fast'"),
        (["prune", "m", "--out", "o", "-s", "0.5", "--eval", "wikitext"], "'wikitext2'"),
        (["prune", "m", "--out", "o", "-s", "much"], "tawny prune --help"),
        (["prune", "m"], "--out"),
        (["prune", "m", "--out", "o", "--sparsty", "0.5"], "--sparsity"),
        (["prune", "m", "--out", "o", "-s", "0.5", "--sede", "3"], "seed"),
        (["prune", "m", "--out", "o", "-s", "0.5", "--seed"], "--seed"),
        (["prun"], "prune"),
        (["eval", "m", "--compute", "int8"], "bfloat16"),
        (["eval", "m", "--windows", "0"], "--windows"),
        (["eval", "m", "--limit", "5"], "--limit can be used with --tasks only"),
        (["eval", "m", "--text", "t", "--task-data", "d", "--limit", "5"], "--limit and --task-data can"),
        (["eval", "m", "--tasks", "rte", "--windows", "4"], "--windows can be used with --text only"),
        (["eval", "m", "--tasks", "rte", "--stride", "4", "--seqlen", "9"], "--seqlen and --stride can"),
        (["eval", "m", "--tasks", "rte", "--no-bos"], "--bos or --no-bos can"),
        (["eval", "m", "--tasks", "rte", "--strict"], "--strict can"),
        (["compare", "m", "--tasks", "rte", "--windows", "4"], "--windows can be used with --text only"),
        (
            ["compare", "m", "--text", "none", "--limit", "5", "--task-data", "d"],
            "--limit and --task-data can",
        ),
        (["profile", "m", "--plot", "x.pdf"], ".svg"),
        (["profile", "m", "-s", "0.7", "-o", "pattern=2:4"], "implies"),
        (["profile", "m", "-M", "0"], "M is 0; expected a positive"),
        (["profile", "m", "-M", "5", "-M", "-1"], "M is -1; expected a positive"),
        (["profile", "m", "-M", "nan"], "M is nan; expected a positive"),
        (["profile", "m", "--plot", "/no/such/folder/x.png"], "does not exist"),
        (["profile", "m", "--plot", "/proc/x.png"], "nothing can be written in its folder"),
        (["compare", "m", "--html", "/proc/x.html"], "nothing can be written in its folder"),
        (["list", "solver"], "'solvers'"),
        (["inspect", "/no/such/folder"], "no such folder"),
        (["generate", "m", "hi", "--seed", "9" * 23], f"{'9' * 23} given, expected 0 to"),
        (["generate", "m", "hi", "--seed", "-1"], "-1 given, expected 0 to"),
        (["generate", "m", "hi", "--threads", "100000"], "100000 given, expected 1 to 1024"),
        (["bench", "m", "--threads", "0"], "0 given, expected 1 to 1024"),
        (["compare", "m", "--threads", "2000"], "2000 given, expected 1 to 1024"),
        (["prune", "m", "--out", "", "-s", "0.5"], "give a folder to write"),
        (["recover", "m", "--out", ""], "give a folder to write"),
        (["pack", "m", "--out", ""], "give a folder to write"),
        (["unpack", "m", "--out", ""], "give a folder to write"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and words in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ModelError("not a decoder"), 2, "not a decoder"),
        (OutputError("taken"), 2, "taken"),
        (NumericalError("model.layers.0.q: NaN"), 1, "model.layers.0.q: NaN"),
        (KeyboardInterrupt(), 1, "Ctrl-C"),
        (OSError(28, "No space left on device", "shard"), 1, "No space left on device: shard"),
        (MemoryError(), 1, "out of memory"),
        (ValueError("two\nlines"), 1, "unexpected ValueError: two lines"),
    ],
)
def test_a_failure_is_one_line_and_its_exit_code(run, monkeypatch, error, code, words):
    answering(monkeypatch, "inspect", error)
    got, out, err = run("inspect", "m")
    assert (got, out, err.count("\n")) == (code, "", 1) and words in err
    got, out, err = run("inspect", "m", "--json")
    assert got == code and words in json.loads(out)["error"]


def test_a_bug_can_be_seen_in_full(run, monkeypatch):
    answering(monkeypatch, "inspect", ValueError("deep"))
    monkeypatch.setenv("TAWNY_DEBUG", "1")
    with pytest.raises(ValueError, match="deep"):
        run("inspect", "m")


def test_a_device_this_machine_lacks_is_the_users_mistake(run, monkeypatch):
    answering(monkeypatch, "evaluate", measured())

    def refuse(*args, **keys):
        raise RuntimeError("no such device\nat all")

    monkeypatch.setattr(torch, "empty", refuse)
    code, _, err = run("eval", "m", "--device", "xpu")
    assert code == 2 and "'xpu'" in err and "tawny doctor" in err and err.count("\n") == 1


def test_eval_prints_the_keys_that_programs_read(run, monkeypatch):
    calls = answering(monkeypatch, "evaluate", measured())
    code, out, _ = run("eval", "m", "--text", "wiki", "--seqlen", 64, "--windows", 4, "--json")
    assert code == 0
    assert {"perplexity", "stderr", "windows", "tokens", "seconds", "text_sha256"} <= set(json.loads(out))
    assert calls[0][0] == ("m", ["wiki"]) and calls[0][1]["windows"] == 4
    for flags, bos in (([], None), (["--bos"], True), (["--no-bos"], False)):
        assert run("eval", "m", *flags)[0] == 0 and calls[-1][1]["bos"] is bos
    assert "20.00 ± 0.50" in run("eval", "m")[1]


def test_every_list_and_the_doctor_answer_in_both_forms(run):
    for verb in ("list", "doctor"):
        code, out, _ = run(verb, "--json")
        assert code == 0 and json.loads(out)
        code, out, _ = run(verb)
        assert code == 0 and out.strip() and "\x1b" not in out
    recipes = json.loads(run("list", "recipes", "--json")[1])["recipes"]
    told = {entry["name"]: entry["summary"] for entry in recipes}
    assert told["fast"].startswith("ALPS under") and "#" not in told["fast"]
    assert "sparsegpt" in run("list", "solvers")[1] and "owl" not in run("list", "solvers")[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny llama with a tokenizer of characters, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics.values())[:40_000], encoding="utf-8")
    return path


def test_the_verbs_work_on_a_real_folder_from_plan_to_inspection(drawn, run, model, text, tmp_path):
    out = tmp_path / "pruned"
    data = ("--calibration", text, "--samples", 4, "--seqlen", 32, "-o", "compute=float32")
    code, shown, err = run("plan", "prune", model, "-s", 0.5, *data)
    assert code == 0 and "prunable" in shown, err
    code, shown, err = run("profile", model, *data, "--plot", tmp_path / "p.svg")
    assert code == 0 and "M=5" in shown and (tmp_path / "p.svg").stat().st_size > 1000, err
    code, shown, err = run("prune", model, "--out", out, "-s", 0.5, *data, "--eval", text)
    assert code == 0 and "dense" in shown and "± " in shown, err
    record = json.loads((out / "run.json").read_text())
    assert record["evaluation"]["pruned"]["perplexity"] > 0 and record["recipe"]["sparsity"] == 0.5
    assert not list(out.glob("*.new")) and not list(tmp_path.glob("*.partial"))
    code, shown, err = run("inspect", out, "--json")
    found = json.loads(shown)
    assert code == 0 and found["sparsity"] == pytest.approx(0.5, abs=1e-3), err
    assert {"name", "shape", "zeros", "sparsity", "pattern"} <= set(found["linears"][0])
    code, _, err = run("prune", model, "--out", out, "-s", 0.5, *data)
    assert code == 2 and "--overwrite" in err
    code, shown, err = run(
        "prune", model, "--out", out, "-c", out / "run.json", "-s", 0.25, "--overwrite", "--json"
    )
    assert code == 0 and json.loads(shown)["sparsity"] == pytest.approx(0.25, abs=1e-3), err


def test_prune_compares_in_the_dtype_of_its_recipe(run, model, text, tmp_path):
    how = ("-s", 0.5, "-m", "magnitude", "-a", "uniform", "--seqlen", 32, "--eval", text, "--json")
    for compute in ("bfloat16", "float32"):
        code, shown, err = run("prune", model, "--out", tmp_path / compute, *how, "-o", f"compute={compute}")
        assert code == 0, err
        made = json.loads(shown)
        assert [made["evaluation"][which]["compute"] for which in ("dense", "pruned")] == [compute] * 2


@pytest.mark.parametrize("verb", ["prune", "profile", "eval"])
def test_a_weight_that_is_not_finite_is_named_with_a_way_out(run, text, tmp_path, verb):
    bad = tiny_model("llama")
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    bad.save_pretrained(tmp_path / "bad")
    tiny_tokenizer().save_pretrained(tmp_path / "bad")
    data = ("--seqlen", 32, *(("--text", text) if verb == "eval" else ("--calibration", text)))
    out = ("--out", tmp_path / "out", "-s", 0.5) if verb == "prune" else ()
    for compute, words in (
        ("float32", "check the checkpoint"),
        ("bfloat16", "try compute=float32, or check"),
    ):
        code, _, err = run(verb, tmp_path / "bad", *data, *out, "--compute", compute)
        told = err.splitlines()[-1]
        assert (
            code == 1
            and f"model.layers.1.mlp.up_proj.weight [48, 32] holds NaN or infinite weights in {compute}; {words}"
            in told
        )


def test_who_needs_no_text_says_so_and_who_packs_nothing_too(run, model, tmp_path):
    no_text = ("-s", 0.01, "-m", "magnitude", "-a", "uniform")
    for arguments in (["plan", "prune", model], ["prune", model, "--out", tmp_path / "out"]):
        code, shown, err = run(*arguments, *no_text)
        words = " ".join(shown.split())
        assert code == 0 and "no text needed" in words and "calibrated" not in words and "()" not in words, (
            err
        )
    code, shown, err = run("pack", tmp_path / "out", "--out", tmp_path / "packed", "--values", "f32")
    assert code == 0 and re.search(r"packed\W+nothing", shown) and "zeros," not in shown, err


def test_what_a_search_writes_is_an_allocator_of_prune(run, model, text, tmp_path):
    out = tmp_path / "allocation.yaml"
    data = ("--calibration", text, "--samples", 4, "--seqlen", 32, "-o", "compute=float32", "-m", "wanda")
    few = ("--trials", 3, "-o", "search.levels=3", "-o", "search.windows=1")
    code, shown, err = run("search", model, "--out", out, "-s", 0.7, *data, *few)
    assert code == 0, err
    told = json.loads(out.with_suffix(".json").read_text())
    assert " ".join(shown.split()).endswith(" ".join(told["says"].split()))
    assert all(out.with_suffix(kind).is_file() for kind in (".yaml", ".json", ".png", ".svg"))
    code, _, err = run("prune", model, "--out", tmp_path / "o", "-s", 0.7, *data, "-a", out)
    assert code == 0, err
    assert json.loads((tmp_path / "o" / "run.json").read_text())["allocation"] == told["allocation"]


def test_too_little_text_says_how_short(run, model, text, tmp_path):
    code, _, err = run("eval", model, "--text", text, "--seqlen", 4096, "--windows", 50)
    assert code == 2 and "short" in err
    (tmp_path / "tiny.txt").write_text("a few words")
    # Said before the work, not after it.
    data = ("--calibration", text, "--samples", 2, "--seqlen", 32, "--eval", tmp_path / "tiny.txt")
    for words in (("--calibration", tmp_path / "tiny.txt"), data):
        code, _, err = run("prune", model, "--out", tmp_path / "o", "-s", 0.5, *words)
        assert code == 2 and "short" in err and not (tmp_path / "o").exists()


def test_generate_says_on_stderr_that_it_fetches_a_model(run, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(model))
    words = ("generate", "owl/tiny", "the owl", "-n", 2)
    code, shown, err = run(*words)
    assert code == 0 and "fetching owl/tiny from the hub\n" in err and "fetching" not in shown, err
    code, document, err = run(*words, "--json")
    assert code == 0 and shown == json.loads(document)["text"] + "\n" and "fetching" not in err, err


def test_a_text_that_is_too_long_does_not_end_a_chat_and_a_cut_answer_is_told(run, monkeypatch, tmp_path):
    served_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("w" * 2000 + "\nHi\n"))
    code, shown, err = run("chat", tmp_path, "-t", 0, "-n", 3)
    assert code == 0 and shown.strip(), err
    assert "the context is 1024; shorten it\nthe answer was cut at 3 tokens" in err


def test_a_head_of_a_gguf_file_needs_no_packed_folder(recipe_of):
    assert recipe_of("--values", "q4_0", "-o", "values.head=q6_k").values.head == "q6_k"
