"""The table of families, from results small enough to check by eye; and that a family goes all the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "families.py"


def family(share=1.0, path="blocks", experts=0, left=None, **steps):
    made = {
        "causal": True,
        "built": {"outcome": "ok"},
        "found": {
            "outcome": "ok",
            "linears": 21,
            "experts": experts,
            "prunable": 60,
            "not_pruned": left or {},
        },
        "pruned": {"outcome": "ok"},
        "packed": {"outcome": "ok", "share": share, "distance_in_roundings": 1.25},
        "decoded": {"outcome": "ok", "paths": {"dense": "model", "packed": path}},
        **steps,
    }
    return {name: told for name, told in made.items() if told is not None}


def refused(reason):
    return {"outcome": "refused", "reason": reason}


def rendered(readme, **families):
    common = {
        "machine": {"cpu": "a processor", "threads": 1},
        "versions": {"torch": "2", "transformers": "5"},
        "date": "2026-01-01",
    }
    return readme["families"]({"families": families, **common})


def test_families_of_one_outcome_share_a_row(readme):
    made = rendered(readme, llama=family(), mistral=family(), mixtral=family(experts=24, path="model"))
    assert "| llama, mistral | dense | yes | 100% | yes, blocks |  |" in made
    assert "| mixtral | experts | yes | 100% | yes, model |  |" in made
    assert "Of 3 families 3 were tried as decoders. **3 are pruned** (all with calibration)" in made
    assert (
        "**3 packed** (3 whole) and **3 decoded** (2 with one call a token). Packed logits are at most 1.2"
        in made
    )
    assert "Not tried" not in made and "not decoders" not in made and "a processor, 1 thread," in made


def test_a_share_below_the_whole_is_not_rounded_to_it(readme):
    made = rendered(readme, llama=family(share=0.999))
    assert "| yes | 99% |" in made and "(0 whole)" in made


def test_what_is_refused_says_why_in_a_few_words(readme):
    said = "blocks of X hand each other more than hidden states; prune with magnitude"
    nothing = {"found": refused("none"), "packed": None, "decoded": None}
    made = rendered(
        readme,
        zamba=family(pruned=refused("X holds no list of blocks with linear weights; expected"), **nothing),
        gemma=family(pruned={"outcome": "ok", "refused": said}),
        other=family(pruned=refused("something | else; do this"), packed=None, decoded=None),
    )
    assert "| zamba | – | no | no | no | blocks of several classes |" in made
    assert (
        "| gemma | dense | by magnitude | 100% | yes, blocks | blocks hand on more than hidden states |"
        in made
    )
    assert "| other | dense | no | no | no | something / else |" in made
    assert "**1 are pruned** (1 of them by magnitude only)" in made


def test_an_error_is_shown_and_whether_transformers_makes_it_too(readme):
    wrong = {"outcome": "wrong", "reason": "packed, path model: 3 of 24 tokens"}
    made = rendered(
        readme,
        ours=family(decoded={**wrong, "transformers": "the same"}),
        theirs=family(decoded={**wrong, "transformers": "others"}),
    )
    assert "| ours | dense | yes | 100% | no | packed, path model: 3 of 24 tokens |" in made
    assert (
        "| theirs | dense | yes | 100% | no | packed, path model: 3 of 24 tokens; so do transformers' own |"
        in made
    )


def test_what_is_no_decoder_or_was_not_tried_stands_apart(readme):
    made = rendered(
        readme,
        llama=family(),
        xlnet=family(causal=False, decoded=None),
        blt={"built": {"outcome": "not tried", "reason": "no settings make it small: 9 weights"}},
    )
    decoders, others = made.split("These are not decoders")
    assert "xlnet" not in decoders and "| xlnet | dense | yes | 100% | – |  |" in others
    assert "could be made: blt (no settings make it small: 9 weights)." in others
    assert "Of 3 families 1 were tried" in decoders


def test_what_is_left_dense_is_said_where_it_is_much(readme):
    made = rendered(readme, dbrx=family(left={"a.w": 30, "b.w": 10}), mixtral=family(left={"gate": 1}))
    assert "more than 25% of the weights" in made and "largest such matrix: dbrx (40%, `a.w`)." in made
    assert "tiny models" not in rendered(readme, mixtral=family(left={"gate": 1}))


@pytest.mark.slow
def test_a_family_goes_all_the_way_and_an_unknown_one_is_refused(tmp_path):
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "made.json"), "--only"]
    subprocess.run([*command, "llama"], check=True, capture_output=True)
    made = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))["families"]["llama"]
    steps = ("built", "found", "pruned", "packed", "decoded")
    assert [made[step]["outcome"] for step in steps] == ["ok"] * 5
    assert made["packed"]["share"] == 1 and made["packed"]["distance_in_roundings"] < 10
    done = subprocess.run([*command, "lama"], capture_output=True, text=True)
    assert done.returncode == 2 and "no such family: lama" in done.stderr
