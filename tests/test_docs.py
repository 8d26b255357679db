from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from tawny.recipe import load_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def readme():
    return runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))


def test_the_tables_of_the_readme_are_made_from_the_committed_results(readme):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme["render"](page) == page, "stale: run `make docs`"


def test_a_table_marks_the_better_allocator_and_names_the_machine(readme):
    def cell(allocator, value):
        evaluation = {"wiki": {"perplexity": value, "stderr": 1.0}}
        return {
            "sparsity": 0.7,
            "solver": "wanda",
            "allocator": allocator,
            "seconds": 9,
            "evaluation": evaluation,
        }

    made = readme["quality"](
        {
            "model": "m",
            "calibration": {"text": "wiki", "samples": 4, "seqlen": 64},
            "evaluation": {"texts": ["wiki"], "seqlen": 64, "windows": 3},
            "dense": {"wiki": {"perplexity": 10.0, "stderr": 0.5}},
            "cells": [cell("uniform", 30.0), cell("owl", 20.0)],
            "machine": {"cpu": "a processor", "threads": 2},
            "versions": {"torch": "2", "transformers": "5"},
            "date": "2026-01-01",
        }
    )
    assert "| 70% | wanda | 30.00 ± 1.00 | **20.00 ± 1.00** | 9 s |" in made
    assert "**10.00 ± 0.50**" in made and "a processor" in made


def test_the_recipe_in_the_quickstart_spells_out_the_defaults(tmp_path):
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", page, re.DOTALL).group(1)
    path = tmp_path / "recipe.yaml"
    path.write_text(block, encoding="utf-8")
    recipe = load_recipe(path)
    bare = tmp_path / "bare.yaml"
    bare.write_text("sparsity: 0.7\n", encoding="utf-8")
    assert recipe == load_recipe(bare)
    assert set(yaml.safe_load(block)) | {"version"} == set(recipe.to_mapping())


def test_the_demo_explains_itself():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        demo = runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="demo")
    finally:
        sys.path.pop(0)
    assert callable(demo["main"]) and demo["__doc__"]
