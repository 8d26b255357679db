from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tawny
from tawny.errors import RecipeError
from tawny.recipe.files import dump_recipe, load_recipe, named_recipes
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe
from tawny.solvers import SOLVERS
from tests.recipe.recipes import ALLOCATORS_ALONE, written
from tests.tiny import tiny_model, tokens

PRODUCTS = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


recipes = st.builds(
    lambda sparsity, pattern, **keys: resolve_recipe(
        {"sparsity": sparsity if pattern == "unstructured" else None}, pattern=pattern, **keys
    ),
    sparsity=st.floats(0, 0.99),
    allocator=st.sampled_from(ALLOCATORS_ALONE),
    solver=st.sampled_from(sorted(SOLVERS)),
    pattern=st.sampled_from(["unstructured", "2:4", "3:8"]),
    samples=st.integers(1, 1000),
    seed=st.integers(0, 2**40),
    include=st.lists(st.sampled_from(["*.mlp.*", "*q_proj", "2:4", "no", "1e-3"])),
    dtype=st.sampled_from([None, "bfloat16"]),
    compat=st.sampled_from([None, "official"]),
)


@settings(deadline=None, max_examples=40)
@given(recipe=recipes)
def test_a_recipe_survives_its_mapping_its_yaml_and_its_json(recipe, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("recipe"), dump_recipe(recipe))
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe
    assert load_recipe(path) == recipe
    assert Recipe.from_mapping(json.loads(json.dumps(recipe.to_mapping()))) == recipe
    assert load_recipe(path).fingerprint() == recipe.fingerprint()


def test_yaml_numbers_and_words_mean_what_they_look_like(tmp_path):
    ratio = load_recipe(written(tmp_path, "pattern: 2:4\n"))
    assert ratio.pattern == "2:4" and ratio.sparsity == 0.5
    text = "sparsity: 5e-1\nsolver: {name: sparsegpt, damp: 1e-3}\ninclude: [no, on, 12:30]\n"
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.sparsity == 0.5 and recipe.solver.options["damp"] == 0.001
    assert recipe.include == ("no", "on", "12:30")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparsity: 0.5\nsparsity: 0.6\n", ["twice", ":2:"]),
        ("sparsity: [0.5\n", ["not valid YAML"]),
        ("- sparsity\n", ["mapping"]),
        ("", ["mapping"]),
        ("sparsity: 0.5\nsamples: 3\n", ["calibration"]),
        ("sparsity: 0.5\nsovler: wanda\n", ["sovler", "'solver'"]),
        ("sparsity: 0.5\nallocator: {name: owl, m: 3}\n", ["allocator.m", "'M'"]),
        ("sparsity: 0.5\nallocator: {name: uniform, M: 3}\n", ["allocator.M", "uniform"]),
        ("sparsity: 0.5\ncalibration: {sample: 3}\n", ["calibration.sample", "'samples'"]),
        ("sparsity: 0.5\nversion: 7\n", ["version 7"]),
        ("sparsity: 0.5\norder: data\n", ["order is not a known recipe key"]),
        ("sparsity: 0.5\npattern: [2, 4]\n", ["pattern"]),
        ("sparsity: true\n", ["sparsity"]),
        (
            "sparsity: 0.5\nallocator: {name: owl, lambda: 0.1, lambda_: 0.2}\n",
            ["allocator.lambda", "twice", "lambda_"],
        ),
        ('sparsity: "\\UFFFFFFFF"\n', ["not valid YAML"]),
        ('sparsity: !!int "abc"\n', ["not valid YAML", "abc"]),
        ('sparsity: !!bool "maybe"\n', ["not valid YAML", "maybe"]),
        ("seed: &a [1]\nsparsity: *a\n", ["not valid YAML", "alias *a", ":2"]),
        ("sparsity: " + 5000 * "9" + "\n", ["not valid YAML", "digits"]),
        ("sparsity: " + 5000 * "[" + "\n", ["not valid YAML", "deep"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_what_is_wrong(tmp_path, text, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_recipes_that_come_with_tawny_have_names_and_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    assert {path.stem for path in PRODUCTS} == set(named_recipes()) >= {"fast", "quick"}
    assert load_recipe("fast") == load_recipe(PRODUCTS[0].parent / "fast.yaml")
    assert resolve_recipe("fast", ["sparsity=0.7"]).sparsity == 0.7
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fast").write_text("{sparsity: 0.1, solver: wanda}", encoding="utf-8")
    assert load_recipe("fast").solver.name == "wanda"
    with pytest.raises(RecipeError, match=r"'fats' is neither a file nor one of fast, .*mean 'fast'"):
        load_recipe("fats")


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="not text"):
        load_recipe(tmp_path / "model.bin")


def test_a_record_is_read_as_the_recipe_it_holds(tmp_path):
    recipe = resolve_recipe(sparsity=0.6, samples=3)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"record_version": 1, "recipe": recipe.to_mapping(), "sparsity": 0.61}))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("path", PRODUCTS, ids=lambda path: path.stem)
def test_every_product_says_what_it_is_and_prunes_a_tiny_model(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
    recipe = load_recipe(path)
    assert load_recipe(path).fingerprint() == recipe.fingerprint()
    record = tawny.prune(tiny_model("llama"), recipe=recipe, compute="float32", calibration=tokens())
    assert record.sparsity == pytest.approx(recipe.sparsity, abs=0.03)
