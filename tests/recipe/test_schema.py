from __future__ import annotations

import dataclasses
import math

import pytest

from tawny.allocation import ALLOCATORS
from tawny.checked import plain_key
from tawny.errors import PatternError, RecipeError
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe
from tawny.solvers import SOLVERS
from tests.recipe.recipes import ALLOCATORS_ALONE, refusal


def test_defaults_are_curves_alps_unstructured():
    recipe = resolve_recipe(sparsity=0.6)
    assert (recipe.allocator.name, recipe.solver.name, recipe.pattern) == ("curves", "alps", "unstructured")
    assert resolve_recipe(sparsity=0.6, output="none").allocator.name == "atp"
    # atp's band is so narrow that all blocks are 2:4
    assert resolve_recipe(pattern="2:4").allocator.name == "atp"
    assert (recipe.calibration.samples, recipe.calibration.seqlen, recipe.seed) == (128, 2048, 0)


def test_owl_shares_bits_unless_another_is_named():
    values = {"mean": 3.5, "of": ["int3", "int8"]}
    assert Recipe.from_mapping({"values": values}).allocator.name == "owl"
    assert resolve_recipe(values=values).allocator.name == "owl"
    assert resolve_recipe(values=values, allocator="dlp").allocator.name == "dlp"
    assert resolve_recipe(values=values, overrides=["allocator.M=7"]).allocator.options["M"] == 7


@pytest.mark.parametrize("key", ["samples", "seed", "refine", "refine.lr", "lambda"])
def test_a_truth_is_no_number(key):
    with pytest.raises(RecipeError, match=f"{key}.*is True; expected a"):
        resolve_recipe(sparsity=0.5, allocator="owl", overrides=[f"{key}=true"])


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
        "compat=official",
        "profile_samples=2",
        "device=cuda",
    ]
    prints = [base.fingerprint(), *(resolve_recipe(base, [change]).fingerprint() for change in changes)]
    assert len(set(prints)) == len(prints)
    spelt = {"solver": "sparsegpt", "allocator": {"name": "owl"}, "seed": 0, "sparsity": 0.6}
    assert resolve_recipe(spelt).fingerprint() == prints[0]
    assert resolve_recipe(base, ["M=5"]).fingerprint() == prints[0]


def test_a_fingerprint_is_the_same_on_every_machine():
    # Written down, so that a change of the format is noticed: it would orphan every interrupted run.
    recipe = resolve_recipe(sparsity=0.5, allocator="uniform", solver="magnitude", text="wiki")
    assert recipe.fingerprint() == "05acce8e90c36746e0f770c506708913d3de265dfd6a81cec025dfa9e53be28a"


@pytest.mark.parametrize(
    ("section", "name", "option", "values"),
    [
        ("solver", "alps", "rho", [0, 1e30, 1e-320, math.nan]),
        ("solver", "alps", "damp", [0, 1e36]),
        ("solver", "alps", "iterations", [-1, 2**31]),
        ("solver", "alps", "steps", [10**20]),
        ("solver", "sparsegpt", "damp", [-0.1, math.nan, 1e308]),
        ("solver", "sparsegpt", "group", [0, 10**20 - 1]),
        ("solver", "obs", "group", [0]),
        ("solver", "ria", "a", [-1]),
        ("solver", "divergence", "again", [0]),
        ("allocator", "owl", "M", [0, math.nan, math.inf]),
        ("allocator", "owl", "lambda", [-0.1, math.nan]),
        ("allocator", "alpha", "epsilon", [2]),
        ("allocator", "dlp", "alpha", [-0.1]),
        ("allocator", "lsa", "alpha", [3, math.nan, "much"]),
        ("allocator", "atp", "beta", [-0.01, math.nan, math.inf]),
        ("allocator", "file", "tolerance", [-1, math.nan]),
        ("allocator", "file", "step", [0]),
        ("allocator", "file", "path", [""]),
    ],
)
def test_an_option_out_of_range_is_refused_with_what_was_expected(section, name, option, values):
    more = {"path": "a"} if name == "file" else {}
    for value in values:
        with pytest.raises(RecipeError, match=rf"^{section}\.{option} is .*; expected (a|the|half) "):
            resolve_recipe(sparsity=0.5, **{section: {"name": name, **more, option: value}})


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 60, "nan", "inf", "much", [0.5]])
def test_sparsity_outside_zero_to_one_is_refused(value):
    message = refusal(sparsity=value)
    assert "sparsity" in message and str(value).strip("[]") in message
    assert value != 60 or "0.6?" in message  # a percentage is recognised


def test_sparsity_must_be_given_or_implied():
    with pytest.raises(RecipeError, match=r"-s 0\.6"):
        resolve_recipe()
    assert resolve_recipe(pattern="1:4").sparsity == 0.75


def test_n_of_m_refuses_another_sparsity_and_takes_its_own():
    assert "was given, here or by a recipe: say -s 0.5, or" in refusal("pattern=2:4")
    assert resolve_recipe(sparsity=0.5, pattern="2:4").sparsity == 0.5
    assert resolve_recipe(sparsity=0.333, pattern="2:3").sparsity == 1 - 2 / 3
    with pytest.raises(PatternError):
        resolve_recipe(pattern="5:4")


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
            fields = {plain_key(field.name) for field in dataclasses.fields(registry[name])}
            assert fields - {"compat"} == set(mapping) - {"name", "compat"}


def test_values_are_a_kind_or_a_mean_of_several():
    bits = Recipe.from_mapping({"values": "int4"})
    assert (bits.sparsity, bits.values.names, bits.values.grid("int4").group) == (0.0, ("int4",), 32)
    both = Recipe.from_mapping({"values": {"kind": "int3", "group_size": 128}, "sparsity": 0.5})
    assert (both.sparsity, both.values.grid("int3").group) == (0.5, 128)
    mixed = Recipe.from_mapping({"values": {"mean": 3.5, "of": ["int3", "int4"]}, "allocator": "owl"})
    assert mixed.values.names == ("int3", "int4") and Recipe.from_mapping(mixed.to_mapping()) == mixed


@pytest.mark.parametrize(
    "keys,line",
    [
        ({"values": "int7"}, "int7"),
        ({"values": "bf16"}, "bf16 are floats"),
        ({"values": {"group_size": 64}}, "expected a kind with it"),
        ({"values": {"kind": "int4", "group_size": 48}}, "group 48 is not possible"),
        ({"values": {"mean": 3.5, "of": ["int4"]}}, "two kinds or more"),
        ({"values": {"mean": 9, "of": ["int4", "int8"]}}, "expected 4 to 8 bits"),
        ({"values": {"mean": 5, "of": ["int4", "int8"]}, "sparsity": 0.5}, "leave one out"),
        ({"values": "int4", "refit": True}, "refit moves survivors off the grid"),
    ],
)
def test_values_that_do_not_fit_are_refused_in_one_line(keys, line):
    with pytest.raises(RecipeError, match=line) as error:
        Recipe.from_mapping(keys)
    assert "\n" not in str(error.value)
