"""Allocations that people and EvoPress write."""

from __future__ import annotations

import json

import pytest

import tawny
from tawny.allocation import File, LinearInfo, Profile
from tawny.errors import RecipeError
from tawny.recipe.schema import Recipe
from tests.reference import allocators as reference
from tests.tiny import tiny_model

NAMES = [f"model.layers.{block}.{part}" for block in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")]
PROFILE = Profile(tuple(LinearInfo(name, (8, 8), i // 2) for i, name in enumerate(NAMES)))


@pytest.fixture
def allocate(tmp_path):
    def allocate(text: str, target: float = 0.5, name: str = "a.yaml", **options):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return File(path=str(path), **options).allocate(PROFILE, target)

    return allocate


def test_a_name_beats_a_glob_and_a_later_glob_an_earlier_one(allocate) -> None:
    text = """
    model.layers.1.mlp.up_proj: 0.75   # the name is above the globs and still wins
    "*": 0.9
    "model.layers.0.*": 0.25
    "model.layers.1.*": 0.75
    """
    assert list(allocate(text).values()) == [0.25, 0.25, 0.75, 0.75]


def test_json_and_yaml_and_a_run_record_say_the_same(allocate) -> None:
    table = dict(zip(NAMES, (0.25, 0.5, 0.5, 0.75), strict=True))
    lines = "\n".join(f"{name}: {value}" for name, value in table.items())
    nested = json.dumps({"recipe": {"sparsity": 0.5}, "allocation": table}, indent="\t")
    indented = "allocation:\n" + "\n".join(f"  {name}: {value}" for name, value in table.items())
    for text in (lines, json.dumps(table), nested, indented):
        assert allocate(text) == table


def test_numbers_are_taken_as_they_are_and_a_wrong_mean_is_refused_with_the_right_one(allocate) -> None:
    assert set(allocate('"*": 0.5004').values()) == {0.5004}
    with pytest.raises(
        RecipeError, match=r"removes 0\.6000 of the weights, not the 0\.5000 asked for: use -s 0\.6000"
    ):
        allocate('"*": 0.6')
    assert set(allocate('"*": 0.6', tolerance=0.2).values()) == {0.6}


def test_evopress_levels_become_weights_more_or_less(allocate) -> None:
    text = "\n".join(f"{name}: {level}" for name, level in zip(NAMES, (-2, 1, 0, 1), strict=True))
    found = allocate(text, name="final_configuration.txt", step=4)
    assert list(found.values()) == [(32 - 8) / 64, 36 / 64, 0.5, 36 / 64]
    assert reference.removed_in_all(found, PROFILE) == 128
    # its own step for 8 levels: ⌊0.5·0.5/8·8²⌋ = 2
    assert list(allocate(text, name="x.txt").values()) == [28 / 64, 34 / 64, 0.5, 34 / 64]
    # whole numbers of which one is negative are levels wherever they stand
    assert allocate(text, step=4) == found
    with pytest.raises(RecipeError, match=r"level 9, which is sparsity 1\.06"):
        allocate('"*": 9', name="a.txt", step=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('"*": 0.5\n"*": 0.6', r"a\.yaml:2: \* is given twice, first as 0\.5"),
        ('"*": 70', r"q_proj has 70, expected a share .* did you mean 0\.7\?"),
        ('"*": 70%', r"a\.yaml:1: \* has '70%', expected a sparsity"),
        ('"*": 0.5\nmodel.layers.1.self_attn.k_proj: 0.5', r":2: no prunable linear .*did you mean 'model"),
        ('"*": 0.5\n"*.experts.*": 0.5', r":2: no prunable linear"),
        ("model.layers.0.mlp.up_proj: 0.5", r"says nothing of .*q_proj, .*q_proj, .*up_proj: add lines"),
        ("- 0.5", "not a mapping"),
        ("a: [", r"a\.yaml:\d+: not valid YAML"),
        ('"*": 0.5\x07', r"a\.yaml: not valid YAML: unacceptable character #x0007"),
        ('{"allocation": [1, 2]}', r"a\.yaml: allocation is not a mapping"),
        ('{"allocation": null}', r"a\.yaml: allocation is not a mapping"),
        ("recipe: 1\nallocation: [1, 2]", r"a\.yaml:2: allocation is not a mapping"),
        (
            'allocation: {"*": 0.5}\nvaluse: {"*": int4}',
            r"a\.yaml:2: valuse stands .*did you mean 'values'\?",
        ),
        ('{"allocation": {"*": 0.5}, "valuse": {}}', r"a\.yaml: valuse stands beside the section allocation"),
        (
            'allocation: {"*": 0.5}\nallocation: {"*": 0.6}',
            r"a\.yaml:2: the section allocation is given twice",
        ),
        (
            '{"values": {}, "allocation": {"*": 0.5}, "values": {}}',
            r"a\.yaml: the section values is given twice",
        ),
        ('"*": .nan', r"has '?\.nan"),
        ('"*": -0.1', r"q_proj has -0\.1, expected a share"),
        ('"*": {a: 1}', "expected a sparsity"),
        ('{"*": true}', "expected a sparsity"),
        ('{"*": [[0.5]]}', r"a\.yaml: \* has a list or a mapping, expected a sparsity"),
        ('"*": &a [*a]', r"a\.yaml:1: \* has a list or a mapping, expected a sparsity"),
        ("? [a, b]: 0.6", r"a\.yaml:1: a list or a mapping is given a value"),
        ("{a: 0.5, ? {b: c} : 0.6}", r"a\.yaml:1: a list or a mapping is given a value"),
        ('{"*": ' + "[" * 5000 + "]" * 5000 + "}", r"a\.yaml: nested too deeply"),
        ('"*": ' + "[" * 5000 + "]" * 5000, r"a\.yaml: nested too deeply"),
        ('"*": ' + "x" * 3000, r"\* has 'x{56}\.\.\., expected a sparsity"),
        ('"*": ' + "7" * 3000, r"q_proj has 7{57}\.\.\., expected a share"),
        ("x" * 100 + ": 1\n" + "x" * 100 + ": 1", r":2: x{57}\.\.\. is given twice"),
        ('"*": 0.5\n"a\\nb": 0.6', ":2: no prunable linear is called a b"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(allocate, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        allocate(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_file_that_cannot_be_read_is_named(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml' cannot be read: No such file"):
        File(path=str(tmp_path / "nowhere.yaml")).allocate(PROFILE, 0.5)
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    for path, says in (
        (str(tmp_path / "b"), "it is not text"),
        ("a\x00b", r"'a\\x00b' cannot be read: embedded null byte"),
        ("a" * 5000, r"a' cannot be read: File name too long"),
    ):
        with pytest.raises(RecipeError, match=says):
            File(path=path).allocate(PROFILE, 0.5)


def test_the_recipe_knows_the_contents_of_its_file(tmp_path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('"*": 0.5', encoding="utf-8")
    options = {"sparsity": 0.5, "allocator": {"name": "file", "path": str(path)}}
    recipe = Recipe.from_mapping(options)
    assert len(recipe.allocator.options["sha256"]) == 64
    assert Recipe.from_mapping(recipe.to_mapping()).make_allocator().allocate(PROFILE, 0.5)
    path.write_text('"*": 0.50001', encoding="utf-8")
    assert Recipe.from_mapping(options).fingerprint() != recipe.fingerprint()
    with pytest.raises(RecipeError, match="has changed"):
        recipe.make_allocator().allocate(PROFILE, 0.5)


def test_a_file_may_say_the_kind_of_each_linear_beside_its_sparsity(tmp_path) -> None:
    text = 'allocation: {"*": 0.25}\nvalues:\n  "*": int4\n  "model.layers.1.*": int8\n'
    path = tmp_path / "a.yaml"
    path.write_text(text)
    file = File(path=str(path))
    assert list(file.kinds(PROFILE).values()) == ["int4", "int4", "int8", "int8"]
    assert set(file.allocate(PROFILE, 0.25).values()) == {0.25}
    recipe = Recipe.from_mapping({"sparsity": 0.25, "allocator": str(path)})
    assert recipe.values.of == file.named_kinds == ("int4", "int8")
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe
    path.write_text(text.replace("int4", "bf16"))  # as it is
    assert Recipe.from_mapping({"sparsity": 0.25, "allocator": str(path)}).values.of == ("int8",)
    assert set(File(path=str(path)).kinds(PROFILE).values()) == {"int8"}
    path.with_suffix(".json").write_text(json.dumps({"values": {}, "allocation": {"*": 0.25}}))
    assert File(path=str(path.with_suffix(".json"))).kinds(PROFILE) == {}
    wrong = {
        text.replace("int4", "int9"): r":3: \* has values 'int9', expected int8",
        'allocation: {"*": 0.25}\nvalues: 1': r":2: values is not a mapping of linears to values, .*int4",
        'allocation: {"*": 0.25}\nvalues: {"*": [int4]}': r":2: \* has a list or a mapping, expected values such as int4",
        text + "values: {}": r":5: the section values is given twice",
    }
    for written, says in wrong.items():
        path.write_text(written)
        with pytest.raises(RecipeError, match=says):
            Recipe.from_mapping({"sparsity": 0.25, "allocator": str(path)})
    path.write_text('allocation: {"*": 0.25}\nvalues: {"model.layers.1.*": int4}')
    with pytest.raises(
        RecipeError, match=r"the section values says nothing of .*a first line such as '\"\*\": int4'"
    ):
        File(path=str(path)).kinds(PROFILE)


def test_kinds_without_a_mean_are_for_a_file_that_gives_them(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"values\.of is \['int4'\] without values\.mean"):
        Recipe.from_mapping({"sparsity": 0.5, "allocator": "owl", "values": {"of": ["int4"]}})
    (tmp_path / "a.yaml").write_text('allocation: {"*": 0}\nvalues: {"*": int3}\n')
    given = {"allocator": str(tmp_path / "a.yaml"), "values": {"of": ["int4"]}}
    with pytest.raises(RecipeError, match=r"values\.of is \['int4'\], and the allocation file has int3"):
        tawny.prune(tiny_model("llama"), solver="magnitude", sparsity=0, **given)
