from __future__ import annotations

import re
from pathlib import Path

import yaml

from tawny.recipe.files import load_recipe

ROOT = Path(__file__).parents[1]


def test_the_tables_of_a_page_are_made_from_the_committed_results(readme):
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in readme["TABLES"]}
    stale = [name for name, page in pages.items() if readme["render"](page, name) != page]
    assert not stale, "run `make docs`"


def test_every_page_of_results_stands_in_its_index(readme):
    folder = ROOT / "docs" / "results"
    index = (folder / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in folder.iterdir()} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == pages
    assert pages <= {Path(name).name for name in readme["TABLES"]}


def study(cells):
    return {
        "model": "m",
        "calibration": {"text": "wiki", "samples": 4, "seqlen": 64},
        "evaluation": {"texts": ["wiki"], "seqlen": 64, "windows": 3},
        "dense": {
            "evaluation": {"wiki": {"perplexity": 10.0, "stderr": 0.5}},
            "lod": {"shares": {"5": [0.5, 1.5]}},
        },
        "cells": {str(i): cell for i, cell in enumerate(cells)},
        "machine": {"cpu": "a processor", "threads": 2},
        "versions": {"torch": "2", "transformers": "5"},
        "date": "2026-01-01",
    }


def pruned(value, allocator="owl", seed=0, **changes):
    return {
        "sparsity": 0.7,
        "allocator": allocator,
        "solver": "wanda",
        "seed": seed,
        "seconds": 9.0,
        "threads": 1,
        "cpu": "a processor",
        "phases": {"profile": 2.0, "total": 9.0},
        "achieved": 0.7,
        "mean_error": 0.1,
        "winner": None,
        "bos": False,
        "evaluation": {"wiki": {"perplexity": value, "stderr": 3.0}},
        **changes,
    }


def test_the_table_of_allocators_takes_the_mean_over_seeds_and_says_what_each_costs(readme):
    cells = [
        pruned(30.0),
        pruned(38.0, seed=1, seconds=40.0),
        pruned(60.0, "uniform"),
        pruned(60.0, "uniform", seed=1),
    ]
    made = readme["allocators"](study(cells))
    assert "| wanda | 70% | 60.00 ± 3.00 | **34.00 ± 5.00** |" in made  # 5² = 3² + 4²
    assert "| wanda | 9 | 9 |" in made and "seeds: 2" in made and "1 thread each" in made
    assert "**10.00 ± 0.50**" in made and "a processor, 1 thread," in made


def test_times_of_two_machines_stand_in_rows_of_their_own(readme):
    cells = [
        pruned(30.0, seconds=40.0),
        pruned(30.0, "uniform", seconds=20.0),
        pruned(30.0, seed=1, seconds=90.0, cpu="a slower one"),
    ]
    made = readme["allocators"](study(cells))
    assert "| wanda, a processor | 20 | 40 |" in made and "| wanda, a slower one | – | 90 |" in made
    assert "a processor and a slower one, 1 thread," in made
    made = readme["allocators"](
        study([pruned(30.0, seconds=40.0), pruned(30.0, seed=1, seconds=25.0, threads=2)])
    )
    assert "| wanda, 2 threads | 25 |" in made and "| wanda, 1 thread | 40 |" in made


def test_the_table_of_allocators_compares_auto_with_the_best_single_one_over_the_same_seeds(readme):
    cells = [pruned(30.0), pruned(99.0, seed=1), pruned(60.0, "uniform"), pruned(33.0, "auto")]
    made = readme["allocators"](study(cells))
    assert "best single allocator of each row: +10.0% to +10.0%; against uniform: -45.0% to -45.0%" in made


def test_the_rows_of_allocators_come_in_one_order_whoever_measured_first(readme):
    cells = [pruned(30.0, solver="alps"), pruned(30.0, "er"), pruned(30.0, "uniform", sparsity=0.5)]
    rows = [line for line in readme["allocators"](study(cells)).splitlines() if "± 3.00" in line]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| wanda", "50%"],
        ["| wanda", "70%"],
        ["| alps", "70%"],
    ]


def test_the_table_of_solvers_names_what_follows_a_solve(readme):
    cells = [
        pruned(30.0),
        pruned(20.0, refit=True, seed=0),
        pruned(40.0, **{"refine.epochs": 3}, sparsity=0.5),
    ]
    made = readme["solvers"](study(cells))
    assert "| wanda + refit | – | 20.00 ± 3.00 |" in made and "| wanda + refine | 40.00 ± 3.00 | – |" in made
    assert "| wanda | – | 10.00% |" in made and "| wanda | – | 9 |" in made


def test_the_study_of_owl_answers_each_question_from_its_cells(readme):
    keys = {"sparsity": 0.7, "allocator": "owl", "solver": "wanda"}
    found = study([pruned(30.0, lod={"shares": {"5": [0.2, 0.4]}}), pruned(40.0, **{"allocator.M": 7})])
    found["questions"] = {
        "lod": {"wanda + owl": keys},
        "M": {"5": keys, "7": {**keys, "allocator.M": 7}, "9": {**keys, "allocator.M": 9}},
        "cost": {"owl": keys},
    }
    made = readme["owl_study"](found)
    assert "| dense | 10.00 ± 0.50 | 1.000 % |" in made and "| wanda + owl | 30.00 ± 3.00 | 0.300 % |" in made
    assert "| 7 | 40.00 ± 3.00 |" in made and "| 9 |" not in made
    assert "| owl | 30.00 ± 3.00 | 2.0 s | 9 s |" in made


def test_the_tables_of_the_readme_say_what_the_results_say(readme):
    def cell(value, top1, unsure=0.1):
        return {"texts": {"wiki": {"perplexity": value, "stderr": unsure * value, "top1": top1}}}

    evidence = {
        "setting": {"windows": 4, "eval_seqlen": 1024},
        "cells": {
            "dense": {"bytes": 4e9, "decode_tokens_per_second": 5.0, "texts": {"wiki": {"perplexity": 10.0}}},
            "sparsegpt:0.5": cell(20.0, 0.6),
            "sparsegpt:0.6": cell(40.0, 0.5),
            "official-owl-sparsegpt-70:0.5": cell(18.0, 0.65),
            "official-owl-sparsegpt-70:0.6": cell(30.0, 0.55, unsure=0.4),
            "fast:0.5": cell(15.0, 0.7),
            "fast:0.6": cell(25.0, 0.61),
        },
    }
    made = readme["owl"](evidence)
    assert "| SparseGPT, every block alike | 60.0% | 2.00 | 50.0% | 4.00 |" in made
    assert "| OWL's shares and SparseGPT | 65.0% | 1.80 | 55.0% | 3.0 ± 1.2 |" in made
    assert "| `tawny prune -c fast` | 70.0% | 1.50 | 61.0% | 2.50 |" in made

    speeds = {"llama:Q4_K_M": 10.0, "fit:5": 15.0, "llama:Q3_K_M": 11.0, "fit:4.13": 19.0, "fit:3.38": 20.0}
    frontier = {
        "setting": {"windows": 8, "eval_seqlen": 513, "texts": ["wiki"]},
        "cells": {name: {"bytes": 1e9, "texts": {"wiki": {"top1": 0.8}}} for name in speeds},
        "speeds": {
            "cells": {name: {"decode_tokens_per_second": value} for name, value in speeds.items()},
            "cpu": "a processor",
        },
    }
    made = readme["glance"](frontier, evidence)
    assert "| **`tawny fit --bits 5`** | 1,000 MB | 80.0% | 15.0 |" in made
    assert "| llama.cpp Q3_K_M | 1,000 MB | 80.0% | 11.0 |" in made
    assert "4,096 tokens of `wiki`: ± 0.6 points" in made  # sqrt(0.8 · 0.2 / 4096)
    assert "The original has 4.00 GB and makes 5.0 tokens/s" in made


def test_the_pages_stay_as_short_as_they_promise():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 160 and len(page.split()) <= 1400
    guide = (ROOT / "docs" / "decision-guide.md").read_text(encoding="utf-8")
    assert len(guide.splitlines()) <= 120
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1]
    assert "(unreleased)" not in changes.splitlines()[0] or len(changes.splitlines()) <= 26


def test_every_question_of_the_log_stands_in_its_index():
    folder = ROOT / "docs" / "log"
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == {p.name for p in folder.iterdir()} - {"README.md"}


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
