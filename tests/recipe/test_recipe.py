from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation import ALLOCATORS
from tawny.errors import PatternError, RecipeError, UserError
from tawny.recipe.files import dump_recipe, load_recipe, named_recipes
from tawny.recipe.merge import bare_keys, parse_override, resolve_recipe
from tawny.recipe.schema import Recipe, option_keys
from tawny.solvers import SOLVERS

# Classes with an option that must be given cannot be named alone.
ALLOCATORS_ALONE = sorted(
    name
    for name, kind in ALLOCATORS.items()
    if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(kind))
)
PRODUCTS = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides: str, **keys: object) -> str:
    with pytest.raises(UserError) as caught:
        resolve_recipe({"sparsity": 0.6}, overrides, **keys)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


def test_defaults_are_atp_alps_unstructured():
    recipe = resolve_recipe(sparsity=0.6)
    assert (recipe.allocator.name, recipe.solver.name, recipe.pattern) == ("atp", "alps", "unstructured")
    assert (recipe.calibration.samples, recipe.calibration.seqlen, recipe.seed) == (128, 2048, 0)


recipes = st.builds(
    lambda sparsity, allocator, solver, pattern, samples, seed, include, dtype, order, compat: resolve_recipe(
        {"sparsity": sparsity if pattern == "unstructured" else None},
        allocator=allocator,
        solver=solver,
        pattern=pattern,
        samples=samples,
        seed=seed,
        include=include,
        dtype=dtype,
        order=order,
        compat=compat,
    ),
    st.floats(0, 0.99),
    st.sampled_from(ALLOCATORS_ALONE),
    st.sampled_from(sorted(SOLVERS)),
    st.sampled_from(["unstructured", "2:4", "3:8"]),
    st.integers(1, 1000),
    st.integers(0, 2**40),
    st.lists(st.sampled_from(["*.mlp.*", "*q_proj", "2:4", "no", "1e-3"])),
    st.sampled_from([None, "bfloat16"]),
    st.sampled_from(["block", "data"]),
    st.sampled_from([None, "official"]),
)


@settings(deadline=None, max_examples=40)
@given(recipe=recipes)
def test_a_recipe_survives_its_mapping_its_yaml_and_its_json(recipe, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("recipe"), dump_recipe(recipe))
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe
    assert load_recipe(path) == recipe
    assert Recipe.from_mapping(json.loads(json.dumps(recipe.to_mapping()))) == recipe
    assert load_recipe(path).fingerprint() == recipe.fingerprint()


def test_a_fingerprint_changes_with_every_key_and_with_nothing_else():
    base = resolve_recipe(sparsity=0.6, allocator="owl", solver="sparsegpt")
    changes = [
        "sparsity=0.5",
        "allocator=uniform",
        "allocator.M=7",
        "lambda=0.1",
        "solver=wanda",
        "solver.damp=0.1",
        "pattern=row",
        "text=wiki",
        "samples=3",
        "seqlen=64",
        "calibration.repeat=0.25",
        "seed=1",
        "include=*",
        "exclude=*",
        "dtype=float32",
        "compute=float32",
        "order=data",
        "compat=official",
        "profile_samples=2",
        "device=cuda",
    ]
    prints = [base.fingerprint(), *(resolve_recipe(base, [change]).fingerprint() for change in changes)]
    assert len(set(prints)) == len(prints)
    spelt = {"solver": "sparsegpt", "allocator": {"name": "owl"}, "seed": 0, "sparsity": 0.6}
    assert resolve_recipe(spelt).fingerprint() == prints[0]
    assert resolve_recipe(base, ["M=5"]).fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("calibration.repat", "repeat"),
        ("refine.epoch", "epochs"),
        ("allocator.bet", "beta"),
        ("solver.dam", "damp"),
    ],
)
def test_a_mistyped_key_of_any_section_is_refused_with_the_nearest(key, near):
    with pytest.raises(RecipeError, match=f"{key} is not a known recipe key.*{near}"):
        resolve_recipe(sparsity=0.5, **{key: 1})


def test_a_fingerprint_is_the_same_on_every_machine():
    # Written down, so that a change of the format is noticed: it would orphan every interrupted run.
    recipe = resolve_recipe(sparsity=0.5, allocator="uniform", solver="magnitude", text="wiki")
    assert recipe.fingerprint() == "f5c16f67a0a06880a17e33e95328c607c8e740eefe9ff521aedfa7f412409b8c"


def test_two_of_four_in_yaml_stays_a_string(tmp_path):
    recipe = load_recipe(written(tmp_path, "pattern: 2:4\n"))
    assert recipe.pattern == "2:4" and recipe.sparsity == 0.5


def test_yaml_numbers_and_words_mean_what_they_look_like(tmp_path):
    recipe = load_recipe(
        written(tmp_path, "sparsity: 5e-1\nsolver: {name: sparsegpt, damp: 1e-3}\ninclude: [no, on, 12:30]\n")
    )
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
        ("sparsity: 0.5\npattern: [2, 4]\n", ["pattern"]),
        ("sparsity: true\n", ["sparsity"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_what_is_wrong(tmp_path, text, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_recipes_that_come_with_tawny_have_names_and_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    assert {path.stem for path in PRODUCTS} == set(named_recipes()) >= {"fast", "best"}
    assert load_recipe("best") == load_recipe(PRODUCTS[0].parent / "best.yaml")
    assert resolve_recipe("best", ["sparsity=0.7"]).sparsity == 0.7
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best").write_text("{sparsity: 0.1, solver: wanda}", encoding="utf-8")
    assert load_recipe("best").solver.name == "wanda"
    with pytest.raises(RecipeError, match=r"'fats' is neither a file nor one of best, fast, .*mean 'fast'"):
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


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 60, "nan", "inf", "much", [0.5]])
def test_sparsity_outside_zero_to_one_is_refused(value):
    message = refusal(sparsity=value)
    assert "sparsity" in message and str(value).strip("[]") in message


def test_a_percentage_is_recognised():
    assert "0.6?" in refusal(sparsity=60)


def test_sparsity_must_be_given_or_implied():
    with pytest.raises(RecipeError, match=r"-s 0\.6"):
        resolve_recipe()
    assert resolve_recipe(pattern="1:4").sparsity == 0.75


def test_n_of_m_refuses_another_sparsity_and_takes_its_own():
    assert "was given, here or by a recipe: say -s 0.5, or" in refusal("pattern=2:4")
    assert resolve_recipe(sparsity=0.5, pattern="2:4").sparsity == 0.5
    assert resolve_recipe(sparsity=0.333, pattern="2:3").sparsity == 1 - 2 / 3


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
        ("allocator.M=7", ["allocator.M is an option of allocator", "owl", "the allocator is atp"]),
        ("group=7", ["group is an option of solver", "sparsegpt", "the solver is alps"]),
        ("samples=0", ["calibration.samples", "0"]),
        ("seqlen=x", ["calibration.seqlen", "'x'"]),
        ("seed=-1", ["seed", "-1"]),
        ("dtype=int8", ["dtype", "int8", "bfloat16"]),
        ("order=random", ["order", "random"]),
        ("compat=unofficial", ["compat", "unofficial"]),
        ("device=CPU 3", ["device"]),
        ("include=[1]", ["include"]),
        ("include=''", ["include"]),
        ("justakey", ["KEY=VALUE"]),
        ("=3", ["KEY=VALUE"]),
        ("nothing.like.it=3", ["nothing.like.it"]),
    ],
)
def test_a_bad_override_is_one_line_that_names_key_value_and_neighbour(override, words):
    message = refusal(override)
    for word in words:
        assert word in message


def test_a_bad_pattern_is_refused_before_any_work():
    with pytest.raises(PatternError):
        resolve_recipe(pattern="5:4")


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
    assert parse_override("include=*.mlp.*") == ("include", "*.mlp.*")


def test_keyword_keys_beat_the_file_and_overrides_beat_both(tmp_path):
    path = written(tmp_path, "sparsity: 0.5\nseed: 1\ncalibration: wiki\n")
    recipe = resolve_recipe(path, ["seed=3"], seed=2, samples=4, solver=None)
    assert recipe.seed == 3 and recipe.calibration.text == "wiki" and recipe.calibration.samples == 4


def test_python_may_write_lambda_with_an_underscore():
    assert resolve_recipe(sparsity=0.5, allocator="owl", lambda_=0.2).allocator.options["lambda_"] == 0.2
    assert resolve_recipe({"sparsity": 0.5, "allocator": {"name": "owl", "lambda_": 0.2}}).to_mapping()[
        "allocator"
    ]["lambda"] == pytest.approx(0.2)


def test_compat_is_handed_down_to_the_classes_that_know_it():
    recipe = resolve_recipe(sparsity=0.5, solver="wanda", compat="official")
    assert recipe.make_allocator().compat == "official" and recipe.make_solver().compat == "official"
    assert "compat" not in recipe.to_mapping()["solver"]
    named = resolve_recipe(sparsity=0.5, compat="official")
    assert (named.allocator.name, named.solver.name) == ("owl", "sparsegpt")
    assert resolve_recipe({"sparsity": 0.5}, ["M=7", "compat=official"]).allocator.options["M"] == 7
    only = resolve_recipe({"sparsity": 0.5, "allocator": "owl"}, ["allocator.compat=official"])
    assert only.compat is None and only.make_allocator().compat == "official"
    assert Recipe.from_mapping(only.to_mapping()) == only


def test_only_what_the_official_code_does_leaves_bos_out_unasked():
    assert resolve_recipe(sparsity=0.5).bos is None
    assert resolve_recipe(sparsity=0.5, compat="official").bos is False
    for bos in (True, False):
        for compat in ([], ["compat=official"]):
            assert resolve_recipe({"sparsity": 0.5}, [f"calibration.bos={bos}", *compat]).bos is bos


def test_short_names_of_dtypes_and_torch_dtypes_are_taken():
    import torch

    assert resolve_recipe(sparsity=0.5, dtype="bf16").dtype == "bfloat16"
    assert resolve_recipe(sparsity=0.5, dtype=torch.float16).dtype == "float16"


def test_every_option_of_every_class_is_a_key():
    for section, registry, names in (
        ("allocator", ALLOCATORS, ALLOCATORS_ALONE),
        ("solver", SOLVERS, sorted(SOLVERS)),
    ):
        for name in names:
            mapping = resolve_recipe(sparsity=0.5, **{section: name}).to_mapping()[section]
            assert set(option_keys(registry[name])) - {"compat"} == set(mapping) - {"name", "compat"}


@pytest.mark.parametrize("path", PRODUCTS, ids=lambda path: path.stem)
def test_every_product_is_a_valid_recipe_that_says_what_it_is(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
    recipe = load_recipe(path)
    assert load_recipe(path).fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("path", PRODUCTS, ids=lambda path: path.stem)
def test_every_product_prunes_a_tiny_model(path):
    import tawny
    from tests.tiny import tiny_model, tokens

    recipe = load_recipe(path)
    record = tawny.prune(tiny_model("llama"), recipe=recipe, compute="float32", calibration=tokens())
    assert record.sparsity == pytest.approx(recipe.sparsity, abs=0.03)


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
