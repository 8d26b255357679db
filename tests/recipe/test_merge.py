from __future__ import annotations

from pathlib import Path

import pytest

from tawny.allocation import ALLOCATORS
from tawny.errors import RecipeError
from tawny.recipe.files import load_recipe
from tawny.recipe.merge import bare_keys, changes_from, parse_override, resolve_recipe
from tawny.solvers import SOLVERS
from tests.recipe.recipes import refusal, written


def test_one_n_of_m_may_replace_another():
    base = resolve_recipe(pattern="2:4")
    assert resolve_recipe(base, ["pattern=1:4"]).sparsity == 0.75
    assert resolve_recipe(base, ["pattern=unstructured"]).sparsity == 0.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lamda=1", ["'lambda'"]),
        ("allocater.M=2", ["allocater.M", "'allocator'"]),
        ("solver.dmp=2", ["solver.dmp", "'damp'"]),
        ("solver.damp=much", ["solver.damp", "'much'"]),
        ("solver=sparsgpt", ["sparsgpt", "'sparsegpt'"]),
        ("allocator=owl2", ["owl2", "'owl'"]),
        ("rho=-1", ["solver.rho", "-1"]),
        ("allocator.M=7", ["allocator.M is an option of allocator", "owl", "the allocator is curves"]),
        ("group=7", ["group is an option of solver", "sparsegpt", "the solver is alps"]),
        ("samples=0", ["calibration.samples", "0"]),
        ("seqlen=x", ["calibration.seqlen", "'x'"]),
        ("seed=-1", ["seed", "-1"]),
        ("dtype=int8", ["dtype", "int8", "bfloat16"]),
        ("order=data", ["order is not a known recipe key"]),
        ("compat=unofficial", ["compat", "unofficial"]),
        ("device=CPU 3", ["device"]),
        ("include=[1]", ["include"]),
        ("include=''", ["include"]),
        ("calibration.repat=1", ["calibration.repat is not a known recipe key", "repeat"]),
        ("refine.epoch=1", ["refine.epoch is not a known recipe key", "epochs"]),
        ("allocator.strenth=1", ["allocator.strenth is not a known recipe key", "strength"]),
        ("solver.dam=1", ["solver.dam is not a known recipe key", "damp"]),
        ("justakey", ["KEY=VALUE"]),
        ("=3", ["KEY=VALUE"]),
        ("nothing.like.it=3", ["nothing.like.it"]),
    ],
)
def test_a_bad_override_is_one_line_that_names_key_value_and_neighbour(override, words):
    message = refusal(override)
    for word in words:
        assert word in message


def test_overrides_may_be_dotted_or_bare():
    recipe = resolve_recipe(
        {"sparsity": 0.6, "allocator": "owl", "solver": "sparsegpt"},
        ["M=7", "allocator.lambda=0.2", "damp=0.1", "samples=3", "calibration.seqlen=64"],
    )
    assert recipe.make_allocator() == ALLOCATORS["owl"](M=7, lambda_=0.2)
    assert recipe.make_solver() == SOLVERS["sparsegpt"](damp=0.1)
    assert (recipe.calibration.samples, recipe.calibration.seqlen) == (3, 64)


def test_a_bare_key_that_two_sections_know_is_refused(monkeypatch):
    import tawny.recipe.schema as module

    monkeypatch.setattr(module, "option_keys", lambda kind: {"damp": "damp"})
    with pytest.raises(RecipeError, match=r"allocator\.damp or solver\.damp"):
        resolve_recipe({"sparsity": 0.5}, ["damp=1"])


def test_another_solver_does_not_inherit_the_options_of_the_first():
    base = resolve_recipe({"sparsity": 0.5, "solver": {"name": "sparsegpt", "damp": 0.1}})
    assert "damp" not in resolve_recipe(base, ["solver=wanda"]).solver.options
    assert resolve_recipe(base, ["solver=sparsegpt"]).solver.options["damp"] == 0.1


def test_the_order_of_a_name_and_its_options_does_not_matter():
    first = resolve_recipe({"sparsity": 0.5}, ["group=64", "solver=sparsegpt"])
    second = resolve_recipe({"sparsity": 0.5}, ["solver=sparsegpt", "group=64"])
    assert first == second


def test_globs_are_texts_and_add_up():
    recipe = resolve_recipe({"sparsity": 0.5}, ["include=*.mlp.*", "include=*.q_proj", "exclude=[a, b]"])
    assert recipe.include == ("*.mlp.*", "*.q_proj") and recipe.exclude == ("a", "b")
    with pytest.raises(RecipeError, match="include"):
        resolve_recipe({"sparsity": 0.5}, ["include=5", "include=*.q_proj", "include=7"])
    assert parse_override("include=*.mlp.*") == ("include", "*.mlp.*")


def test_keyword_keys_beat_the_file_and_overrides_beat_both(tmp_path):
    path = written(tmp_path, "sparsity: 0.5\nseed: 1\ncalibration: {text: wiki, samples: 9}\n")
    recipe = resolve_recipe(path, ["seed=3"], seed=2, samples=4, solver=None)
    assert recipe.seed == 3 and recipe.calibration.text == "wiki" and recipe.calibration.samples == 4


def test_python_may_write_lambda_with_an_underscore():
    assert resolve_recipe(sparsity=0.5, allocator="owl", lambda_=0.2).allocator.options["lambda_"] == 0.2
    assert resolve_recipe({"sparsity": 0.5, "allocator": {"name": "owl", "lambda_": 0.2}}).to_mapping()[
        "allocator"
    ]["lambda"] == pytest.approx(0.2)


@pytest.mark.parametrize("section", ["allocator", "solver"])
def test_a_name_that_is_no_text_is_refused_though_an_option_follows_it(section):
    with pytest.raises(RecipeError, match=rf"{section} \['a'\] is unknown"):
        resolve_recipe({"sparsity": 0.6, section: {"name": ["a"]}}, ["M=5"])


def test_bare_keys_are_those_that_some_recipe_knows_without_their_section():
    assert {"seed", "text", "epochs", "M", "lambda", "damp", "rho"} <= bare_keys()
    assert "name" not in bare_keys() and "lambda_" not in bare_keys()


@pytest.mark.parametrize("name", ["allocation.yaml", "./a", "a.json"])
def test_the_path_of_an_allocation_is_taken_where_the_name_of_an_allocator_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text('"*": 0.6\n', encoding="utf-8")
    expected = resolve_recipe(sparsity=0.6, allocator={"name": "file", "path": name})
    assert expected.allocator.options["sha256"]
    for value in (name, Path(name), {"name": name}):
        assert resolve_recipe(sparsity=0.6, allocator=value).allocator.name == "file"
    assert resolve_recipe({"sparsity": 0.6}, [f"allocator={name}"]) == expected
    assert load_recipe(written(tmp_path, f"sparsity: 0.6\nallocator: {name}\n")) == expected
    looser = resolve_recipe({"sparsity": 0.6}, [f"allocator={name}", "tolerance=0.01"])
    assert looser.allocator.options["tolerance"] == 0.01
    Path("other.yaml").write_text('"*": 0.5\n', encoding="utf-8")
    other = resolve_recipe(expected, allocator="other.yaml").allocator.options
    assert other["path"] == "other.yaml" and other["sha256"] != expected.allocator.options["sha256"]


@pytest.mark.parametrize("name", ["owll", "owl.yaml", "no/such/file"])
def test_an_allocator_that_is_neither_a_name_nor_a_file_is_refused_with_both(name):
    message = refusal(f"allocator={name}")
    assert f"allocator {name!r} is neither a file nor one of uniform, " in message
    assert "owl" not in name or "mean 'owl'" in message


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"solver": "sparsegpt", "solver.damp": 0.02, "calibration.text": ["wiki=0.5", "self=0.5"], "seed": 3},
        {"compat": "official", "exclude": ["*.q_proj"], "values": "int4", "values.group_size": 64},
        {"pattern": "channels", "allocator": "owl", "allocator.M": 7},
    ],
)
def test_changes_from_a_recipe_make_the_other_of_it(keys):
    base, recipe = resolve_recipe(sparsity=0.5), resolve_recipe(sparsity=0.5, **keys)
    changes = changes_from(recipe, base)
    assert resolve_recipe(base, changes) == recipe
    assert bool(changes) == bool(keys)
