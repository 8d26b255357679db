from __future__ import annotations

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

import tawny
from tawny.report.card import front_matter, model_card, packed_note
from tawny.report.html import render_report
from tawny.report.publish import publish
from tests.report.records import hostile_record, record
from tests.tiny import tiny_model, tokens

BASE = """---
license: apache-2.0
language: [en, de]
tags: [safetensors, onnx]
base_model: someone/base
model-index: [{name: x, results: []}]
widget: [{text: hello}]
---
# The base model
"""


def test_the_card_inherits_what_the_weights_are_bound_by_and_no_results_of_the_dense_model():
    metadata = front_matter(model_card(record(), front_matter(BASE)))
    assert metadata["license"] == "apache-2.0" and metadata["language"] == ["en", "de"]
    assert metadata["base_model"] == "someone/base"
    assert metadata["tags"] == ["safetensors", "onnx", "pruned", "sparse", "tawny"]
    assert not {"model-index", "widget"} & set(metadata)


def test_a_hub_model_is_the_base_of_its_pruned_self():
    made = {**record(), "source": "HuggingFaceTB/SmolLM2-135M", "revision": "a" * 40}
    text = model_card(made, front_matter(BASE))
    assert front_matter(text)["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "a" * 40 in text and ModelCard(text).data.base_model == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("source", ["mods/loc", "loc", "../mods"])
def test_a_local_folder_is_no_hub_id_and_its_own_base_stays(source):
    made = {**record(), "source": source}
    assert front_matter(model_card(made, front_matter(BASE)))["base_model"] == "someone/base"
    assert "base_model" not in front_matter(model_card(made))


def test_a_local_folder_with_the_name_of_a_snapshot_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "snapshots" / ("a" * 40)).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made = {**record(), "source": f"snapshots/{'a' * 40}", "revision": "a" * 40}
    assert front_matter(model_card(made, front_matter(BASE)))["base_model"] == "someone/base"


def test_odd_metadata_of_a_base_card_is_kept_as_far_as_it_makes_sense():
    odd = "\ufeff---\nlicense: mit\nlanguage: no\ntags: [{license: mit}, llama, 3]\n---\n"
    metadata = front_matter(model_card(record(), front_matter(odd)))
    assert (metadata["license"], metadata["language"]) == ("mit", "no")
    assert metadata["tags"] == ["llama", "pruned", "sparse", "tawny"]
    several = front_matter(model_card(record(), {"language": ["en", False], "tags": {"a": 1}}))
    assert several["language"] == ["en", "no"] and several["tags"] == ["pruned", "sparse", "tawny"]


@pytest.mark.parametrize(
    "base", ["\ufeff" + BASE, BASE.replace("[safetensors, onnx]", "[{license: mit}, llama]\nx: 2024-01-45")]
)
def test_pruning_ends_whatever_the_base_card_says(base, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(base, encoding="utf-8")
    tawny.prune(tmp_path / "dense", tmp_path / "out", sparsity=0.5, allocator="uniform", solver="magnitude")
    metadata = front_matter((tmp_path / "out" / "README.md").read_text())
    assert metadata["library_name"] == "transformers"
    assert metadata.get("license") == ("apache-2.0" if base.startswith("\ufeff") else None)


def test_the_card_of_a_recovered_model_says_so_and_claims_no_untouched_norms():
    plain = record()
    plain["recovery"] = {
        "settings": {"method": "distill", "train": "survivors"},
        "teacher": "some*dense*model",
        "text": {"name": "wiki"},
        "tokens": 12345,
        "start": {"perplexity": 31.25},
        "best": {"perplexity": 21.5},
        "zeros_before": 1000,
        "zeros": 1001,
    }
    text = model_card(plain)
    section = text.split("## Recovered\n\n")[1].split("\n## ")[0]
    assert (
        "12,345 tokens of wiki (distill, survivors) against the dense model some\\*dense\\*model." in section
    )
    assert "31.25 → 21.50" in section and "1,001 weights are zero, 1,000 were before" in section
    assert "Embeddings and head (not norms and biases" in text and "head, norms and biases are" not in text
    assert "measured before its recovery" in text
    assert "Recovered" not in model_card(record()) and "before its recovery" not in model_card(record())
    assert "## Recovered\n\nTrained after pruning." in model_card(plain, recovery={"stopped": "tokens"})


def test_a_packed_head_is_not_that_of_the_source():
    packed = {**record(), "packed": {"values": "bf16", "head": "int8"}}
    assert "Norms and biases are those of the source" in model_card(packed)
    assert "to the bit" not in model_card(packed, recovery={"tokens": 1})


@pytest.mark.parametrize("pattern", ["channels", "heads", "blocks"])
def test_biases_that_leave_with_whole_members_are_not_those_of_the_source(pattern):
    made = record()
    made["recipe"]["pattern"] = pattern
    assert "Embeddings, head and norms are those of the source, to the bit." in model_card(made)
    made["packed"] = {"values": "bf16", "embedding": "int8"}
    assert "Head and norms are those of the source, to the bit." in model_card(made)
    made["packed"]["head"] = "int8"
    assert " Norms are those of the source, to the bit." in model_card(made)


def test_a_model_stored_in_a_dtype_of_its_own_is_neither_the_source_to_the_bit_nor_as_large():
    plain, other = record(), record()
    other["recipe"]["dtype"] = "float16"
    for claim in ("to the bit", "as large as the dense one"):
        assert claim in model_card(plain) and claim not in model_card(other)
    assert "The zeros are stored: this folder opens with plain transformers." in model_card(other)


@pytest.mark.parametrize("opens", [["AutoModelForImageClassification", "AutoImageProcessor"], ["AutoModel"]])
def test_only_a_model_that_writes_text_is_tagged_so(opens):
    assert front_matter(model_card(record()))["pipeline_tag"] == "text-generation"
    older = {key: value for key, value in record().items() if key != "opens"}
    assert front_matter(model_card(older))["pipeline_tag"] == "text-generation"
    made = {**record(), "opens": opens}
    assert "pipeline_tag" not in front_matter(model_card(made))
    assert front_matter(model_card(made, {"pipeline_tag": "x"}))["pipeline_tag"] == "x"


def test_card_and_page_say_who_chose_the_blocks_that_left(tmp_path):
    made = tawny.prune(tiny_model("llama"), sparsity=0.34, pattern="blocks", calibration=tokens())
    plain = json.loads(made.to_json())
    plain["source"] = "tiny-llama"
    card, page = model_card(plain), render_report(plain)
    assert "`divergence` chose the 1 of 3 blocks that left." in card and "shared the budget" not in card
    assert "divergence chose the 1 of 3 blocks that left." in page and "shared the budget" not in page
    plain["recipe"]["allocator"] = {"name": "file", "path": "a.yaml"}
    assert "An allocation file chose the 1 of 3 blocks that left." in model_card(plain)


def test_card_and_page_count_patches_of_pictures():
    made = record()
    made["text"] = {"name": "sample", "samples": 8, "seqlen": 17, "files": [], "skipped": []}
    assert "8 × 17 patches of sample" in model_card(made) and "8 × 17 patches of sample" in render_report(
        made
    )
    assert "24 tokens of" in render_report(record())


def test_the_card_has_numbers_with_errors_hashes_limits_and_the_recipe():
    text = model_card(record())
    assert "| perplexity | 12.50 ± 0.40 | 31.25 ± 1.50 |" in text
    assert "ab" * 32 in text and "cd" * 32 in text
    assert "## Intended use and limits" in text and "Not measured" in model_card(record(measured=False))
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == record()["recipe"]


def test_hostile_names_stay_words():
    text = model_card(hostile_record())
    for card in (text, model_card({**hostile_record(), "source": "<script>x"})):
        words = re.sub(r"```.*?```|`[^`\n]*`", "", card.split("---\n", 2)[2], flags=re.DOTALL)
        assert not re.search(r"(?<!\\)<(script|img)", words) and "\\<script\\>" in words
    assert ModelCard(text).data.tags[-1] == "tawny"


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "# no metadata",
        "---\nlicense: [\n---\n",
        "---\njust words\n---\n",
        "---\n",
        "---\nx: 2024-13-45\n---\n",
    ],
)
def test_a_base_card_without_usable_metadata_is_none(broken):
    assert front_matter(broken) == {}
    assert front_matter(model_card(record(), front_matter(broken)))["library_name"] == "transformers"


def test_publishing_again_keeps_what_was_inherited_and_the_note_of_packing(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(BASE)
    out = tmp_path / "out"
    made = tawny.prune(tmp_path / "dense", out, sparsity=0.5, calibration=tokens())
    card = (out / "README.md").read_text()
    assert front_matter(card)["license"] == "apache-2.0" and made.files["model.safetensors"]["sha256"] in card
    note = "<!-- packed -->\n\n> a note\n\n<!-- /packed -->\n"
    (out / "README.md").write_text(card.replace("\n# ", f"\n{note}# ", 1))
    made.evaluation = record()["evaluation"]
    publish(made, out)
    again = (out / "README.md").read_text()
    assert front_matter(again) == front_matter(card) and packed_note(again) == note
    assert "12.50 ± 0.40" in again and "31.25 ± 1.50" in (out / "report.html").read_text()
    assert json.loads((out / "run.json").read_text())["evaluation"]["dense"]["perplexity"] == 12.5
    assert not list(out.glob("*.new"))
