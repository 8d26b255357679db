from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

import tawny
from tawny.recipe.schema import fingerprint_of
from tawny.report.card import model_card
from tawny.report.html import render_report, write_report
from tests.encoders import tiny_encoder
from tests.report.records import hostile_record, record
from tests.tiny import tiny_model, tokens

VOID = {"meta", "link", "br", "hr", "img", "input"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "formaction"}


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.mistakes: list[str] = []
        self.raw = text
        self.feed(text)
        self.close()
        self.mistakes += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **wanted: str):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]


PAGES = {
    "measured": record,
    "unmeasured": lambda: record(measured=False),
    "weights only": lambda: record("magnitude", "uniform"),
    "hostile": hostile_record,
}


@pytest.fixture(scope="module", params=PAGES)
def page(request):
    return Page(render_report(PAGES[request.param]()))


def test_the_page_is_well_formed_and_ids_are_unique(page):
    assert page.mistakes == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    for _, attributes in page.tags:
        for key in ("href", "xlink:href"):
            value = attributes.get(key) or ""
            assert not value.startswith("#") or value[1:] in ids, value
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in page.tags:
        for key in LOADING & set(attributes):
            assert re.match(r"#|data:,$", attributes[key] or ""), (tag, key, attributes[key])
    assert "@import" not in page.raw and not re.search(r"url\(\s*['\"]?https?:", page.raw)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")


def test_every_block_is_in_the_picture_and_in_the_tables(page):
    for block in range(3):
        assert page.all("tr", id=f"block-{block}")
        hits = page.all("rect", **{"data-block": str(block)})
        assert len(hits) == 2  # the wide picture and the narrow one
    assert page.text.count("block 2, ") == 2


def test_hostile_names_stay_words():
    text = render_report(hostile_record())
    page = Page(text)
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "49" not in page.text.split("evil/")[1][:200], "a template inside a name was run"
    assert "alert('x')" in page.text


def test_the_page_says_what_was_asked_and_what_came_out():
    text = Page(render_report(record())).text
    owl = "owl (M = 5.0, lambda = 0.08, granularity = block)"
    for words in ("tiny-llama", owl, "60.0 %", "31.25 ± 1.50", "12.50 ± 0.40", "× 2.50"):
        assert words in text, words
    assert "a bird of the night." in text and "a bird and a bird." in text
    assert "ab" * 32 in text and "AutoModelForCausalLM.from_pretrained('out')" in text
    assert "tawny prune tiny-llama --out out-again -c out/run.json" in text or "load_recipe" in text


def test_a_run_that_measured_nothing_says_so():
    text = Page(render_report(record("magnitude", "uniform", measured=False))).text
    assert "Nothing was measured" in text and "outliers before" not in text
    assert "none: the weights alone decided" in text


def test_a_name_in_a_command_is_quoted_for_the_shell():
    made = record()
    made.update(source="my model; rm -rf ~", text={"name": "wiki", "sha256": "cd" * 32})
    assert "tawny prune 'my model; rm -rf ~' --out" in Page(render_report(made)).text


@pytest.mark.parametrize(
    ("packed", "command"),
    [
        ({}, "tawny prune m --out out-again -c out/run.json"),
        ({"values": "bf16"}, "tawny prune m --out out-again -c out/run.json --pack bf16"),
        (
            {"values": "int8", "group": 128, "head": "int8"},
            "tawny prune m --out out-again-begun -c out/run.json\n"
            "tawny pack out-again-begun --out out-again --values int8 --group 128 --head int8",
        ),
    ],
)
def test_the_command_that_makes_it_again_packs_what_was_packed(packed, command):
    made = {**record(), "source": "m", "text": {"name": "wiki", "sha256": "cd" * 32}, "packed": packed}
    assert f"<code>{command}</code>" in render_report(made)


@pytest.mark.parametrize(
    ("asked", "solved", "packed", "command"),
    [
        (
            {},
            {"a": "int8", "b": "int4"},
            {"values": "int8", "group": 32},
            "tawny prune m --out out-again{how}",
        ),
        (
            {"head": "int8"},
            {"a": "int4"},
            {"values": "int4", "head": "int8"},
            "tawny prune m --out out-again{how}",
        ),
        ({}, {"a": "int4"}, {"values": "bf16"}, "tawny prune m --out out-again{how} --pack bf16"),
        (
            {},
            {"a": "int4"},
            {"values": "int4", "head": "int8"},
            "tawny prune m --out out-again{how} -o head=int8",
        ),
        (
            {"head": "int8"},
            {},
            {"values": "bf16", "head": "int8"},
            "tawny prune m --out out-again{how} --pack bf16",
        ),
        (
            {"head": "int8"},
            {},
            {"values": "bf16"},
            "tawny prune m --out out-again-begun{how} -o head=null\n"
            "tawny pack out-again-begun --out out-again --values bf16",
        ),
        (
            {"kind": "int4"},
            {"a": "int4"},
            {},
            "tawny prune m --out out-again-begun{how}\ntawny unpack out-again-begun --out out-again",
        ),
    ],
)
def test_a_recipe_with_kinds_packs_by_itself(asked, solved, packed, command):
    """Of several kinds, which goes where stands in the recipe alone."""
    check_command(asked, solved, packed, {}, command)


def check_command(asked, solved, packed, rounded, command):
    made = {**record(), "source": "m", "text": {}, "packed": packed, "values": solved, "rounded": rounded}
    made["recipe"]["values"] = asked
    how = " -c out/run.json"
    assert f"<code>{command.format(how=how)}</code>" in render_report(made)


@pytest.mark.parametrize(
    ("asked", "solved", "rounded", "more"),
    [
        ({}, {}, {"values": ["int4"]}, " --pack int4"),
        ({}, {}, {"head": "int8"}, " --pack f32 -o head=int8"),
        ({"head": "int8"}, {}, {"head": "int8"}, " --pack f32"),
        ({"kind": "int4"}, {"a": "int4"}, {"head": "int8"}, " -o head=int8"),
    ],
)
def test_what_was_rounded_and_unpacked_is_packed_and_unpacked_again(asked, solved, rounded, more):
    command = "tawny prune m --out out-again-begun{how}" + more
    check_command(asked, solved, {}, rounded, command + "\ntawny unpack out-again-begun --out out-again")


def test_what_was_rounded_after_it_was_measured_is_said():
    made = {**record(), "packed": {"values": "int3", "head": "int8"}}
    rounded = {"values": ["int3"], "head": "int8"}
    said = "measured before it was rounded to int3, head int8"
    for told, spoken in ((rounded, True), ({}, False)):
        made["rounded"] = told
        assert (said in render_report(made)) == spoken == (said in model_card(made))
    made["rounded"] = made["evaluation"]["pruned"]["rounded"] = rounded
    assert said not in render_report(made) + model_card(made)


def test_what_was_rounded_after_a_recovery_is_said():
    told = {"source": "before", "teacher": "dense", "text": {"name": "wiki"}, "settings": {}, "zeros": 1}
    said = "This was measured before it was rounded to int4"
    for before, now, spoken in (
        ({}, {"values": ["int4"]}, True),
        ({"values": ["int4"]}, {"values": ["int4"]}, False),
        (None, {"values": ["int4"]}, False),  # of an older version
    ):
        made = {**record(), "rounded": now, "recovery": {**told, "rounded": before}}
        assert (said in model_card(made, recovery=made["recovery"])) == spoken


def test_inputs_that_were_tensors_are_given_again_from_python():
    made = {**record(), "source": "m", "text": {"name": "pixel_values", "samples": 4, "seqlen": 8}}
    assert "recipe=recipe, calibration=tokens)" in Page(render_report(made)).text


def test_a_page_is_made_anew_though_the_allocation_file_has_changed(tmp_path):
    path = tmp_path / "allocation.yaml"
    path.write_text('"*": 0.6')
    made = record()
    made["recipe"]["allocator"] = {"name": "file", "path": str(path), "sha256": "ab" * 32}
    assert fingerprint_of(made["recipe"]) in render_report(made)


def test_a_record_with_nulls_for_what_was_not_finite_can_be_drawn():
    made = record()
    made["linears"][0]["error"] = None
    made["evaluation"]["pruned"] |= {"perplexity": None, "stderr": None}
    assert "inf" in render_report(made)


def test_the_page_tells_of_a_recovery_where_the_record_does():
    made = {**record(), "recovery": {"tokens": 5000, "text": {"name": "wiki"}}}
    assert "Trained after pruning on 5,000 tokens of wiki." in render_report(made)


def test_the_same_record_makes_the_same_bytes():
    assert render_report(record()) == render_report(json.loads(json.dumps(record())))


def test_infinite_numbers_and_a_single_block_can_be_drawn():
    made = record()
    made["linears"] = [x for x in made["linears"] if x["block"] == 0]
    made["linears"][0]["error"] = float("inf")
    made["evaluation"]["pruned"]["perplexity"] = float("inf")
    text = Page(render_report(made)).text
    assert "∞" in text and "inf" in text


def test_experts_share_a_column_of_the_heat_map():
    recipe = {"sparsity": 0.5, "solver": "wanda", "compute": "float32"}
    made = tawny.prune(tiny_model("mixtral"), recipe=recipe, calibration=tokens())
    page = Page(render_report(json.loads(made.to_json())))
    roles = {a["title"] for a in page.all("th", scope="col") if "title" in a}
    assert any("*" in role for role in roles) and len(roles) < 12


def test_blocks_of_several_stacks_share_the_columns_of_the_heat_map():
    made = tawny.prune(tiny_encoder("convnext"), sparsity=0.5, solver="magnitude", allocator="uniform")
    page = Page(render_report(json.loads(made.to_json())))
    assert {a["title"] for a in page.all("th", scope="col") if "title" in a} == {"pwconv1", "pwconv2"}


def test_every_prune_writes_its_report_and_it_can_be_made_again(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tawny.prune(tmp_path / "dense", tmp_path / "out", sparsity=0.5, calibration=tokens())
    made = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    again = write_report(run, tmp_path)
    assert again == tmp_path / "report.html" and again.read_text(encoding="utf-8") == made
    file = run["files"]["model.safetensors"]
    weights = tmp_path / "out" / "model.safetensors"
    assert file["bytes"] == weights.stat().st_size and len(file["sha256"]) == 64


def test_columns_of_linears_with_the_same_last_name_are_told_apart():
    made = record()
    names = {"self_attn.q_proj": "attention.output.dense", "self_attn.k_proj": "intermediate.dense"}
    for linear in made["linears"]:
        for old, new in names.items():
            linear["name"] = linear["name"].replace(old, new)
    page = Page(render_report(made))
    assert {"output.dense", "intermediate.dense"} <= set(page.words)


def test_training_that_helped_in_some_blocks_is_told_as_that():
    made = record() | {
        "refined": [
            {"best_epoch": 0, "also": [], "before": 1.0, "after": 1.0},
            {"best_epoch": 2, "also": [], "before": 1.0, "after": 0.5},
        ]
    }
    assert "helped in 1 of 2 blocks" in Page(render_report(made)).text
    assert "helped in 1 of 2 blocks" in model_card(made)


def test_what_the_output_feels_is_drawn_where_it_was_asked():
    keys = {"sparsity": 0.6, "solver": "sparsegpt", "output": "rows", "compute": "float32"}
    asked = json.loads(tawny.prune(tiny_model("llama"), calibration=tokens(), **keys).to_json())
    assert all(linear["notes"]["felt"] > 0 < linear["notes"]["output"] for linear in asked["linears"])
    page, plain = Page(render_report(asked)), Page(render_report(record()))
    first = sum(linear["notes"]["felt"] for linear in asked["linears"] if linear["block"] == 0)
    assert f"{first:.3g} nats" in page.text and "output feels" in page.text
    assert "nats" not in plain.text and "output feels" not in plain.text
