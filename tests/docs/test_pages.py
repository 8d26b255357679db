"""The pages of the docs do what they say: links lead somewhere, examples run, quoted errors exist."""

from __future__ import annotations

import ast
import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import tawny
from tests.tiny import tiny_model, tokens

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def links():
    return runpy.run_path(str(SCRIPTS / "check_links.py"))


def test_every_link_anchor_and_picture_of_the_pages_exists(links):
    assert [line for page in links["pages"]() for line in links["broken"](page)] == []


def test_the_link_checker_finds_what_leads_nowhere(links, tmp_path):
    (tmp_path / "other.md").write_text("# A heading, twice\n\n## A heading, twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Mine\n[a](other.md) [b](#mine) [c](other.md#a-heading-twice-1) [d](https://example.org/x)\n"
        "`[not](a-link.md)`\n```\n[nor](this.md)\n```\n"
        '[1](gone.md) [2](#nothing) [3](other.md#no) ![4](x.png) <img src="y.svg">\n'
    )
    found = [re.sub(r"^.*?: ", "", line, count=1) for line in links["broken"](page)]
    assert found == [
        "gone.md: no such file",
        "#nothing: no such heading",
        "other.md#no: no such heading",
        "x.png: no such file",
        "y.svg: no such file",
    ]


def test_the_page_of_the_api_is_what_the_docstrings_say():
    script = runpy.run_path(str(SCRIPTS / "api_docs.py"))
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == script["render"](), "stale: run `make docs`"


def test_every_public_name_is_on_the_page_of_the_api_with_words():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in tawny.__all__:
        if not name.startswith("__"):
            entry = re.search(
                rf"^## (?:class )?tawny\.{name}\n\n(?:```.*?```\n\n)?(.)", page, re.MULTILINE | re.DOTALL
            )
            assert entry and entry.group(1).strip(), name


def messages() -> list[str]:
    """Every text in the sources, with … where a value is put in."""
    found = []
    for path in (ROOT / "src" / "tawny").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
    return found


def test_every_error_message_of_the_troubleshooting_page_exists():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [text for _, text in re.findall(r"^### (`+)(.*)\1$", page, re.MULTILINE)]
    assert len(quoted) > 20
    known = messages()
    for message in quoted:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip(" :;,()`")]
        pattern = re.compile(r"[^\n]*?".join(parts))
        assert any(pattern.search(text) for text in known), message


def test_the_allocator_of_the_guide_works(monkeypatch):
    from tawny.allocation import ALLOCATORS
    from tawny.allocation.registry import SINGLE

    page = (ROOT / "docs" / "add-an-allocator.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(first.splitlines()) <= 40
    space: dict = {"__name__": "example"}
    exec(compile(first, "add-an-allocator.md", "exec", dont_inherit=True), space)
    registered: dict = {}
    exec(second, {"SINGLE": registered, "Unequal": space["Unequal"]})
    assert set(registered) == {"unequal"} and set(SINGLE) < set(ALLOCATORS)
    monkeypatch.setitem(ALLOCATORS, "unequal", registered["unequal"])
    options = {"sparsity": 0.6, "solver": "wanda", "compute": "float32", "calibration": tokens()}
    made = {
        strength: tawny.prune(
            tiny_model("llama"), allocator="unequal", **{"allocator.strength": strength}, **options
        )
        for strength in (0.0, 0.2)
    }
    for record in made.values():
        assert abs(record.zeros - 0.6 * record.prunable) <= len(record.linears)
    assert {round(x.target, 2) for x in made[0.0].linears} == {0.6}
    spread = [block["spread"] for block in made[0.2].profile["blocks"]]
    targets = {x.block: x.target for x in made[0.2].linears}
    assert targets[spread.index(max(spread))] == min(targets.values()) < max(targets.values())


def test_the_pictures_are_drawn_from_the_committed_run(drawn, tmp_path):
    script = runpy.run_path(str(SCRIPTS / "docs_images.py"))
    import json

    record = json.loads(script["EXAMPLE"].read_text(encoding="utf-8"))
    assert "seconds" not in record and "machine" not in record
    told = []
    for text in (script["picture"](record), (script["IMAGES"] / "depth.svg").read_text(encoding="utf-8")):
        root = ET.fromstring(text)
        assert len([e for e in root.iter() if e.get("data-block")]) == 30
        told.append([e.text for e in root.iter() if e.tag.endswith("title")])
    assert told[0] == told[1] and len(told[0]) >= 30
    script["draw_allocations"](tmp_path / "a.svg")
    for path in (tmp_path / "a.svg", script["IMAGES"] / "allocators.svg"):
        assert len(list(ET.parse(path).getroot().iter())) > 100
    result = script["_result"]("frontier_qwen")
    drawn = (script["IMAGES"] / "frontier_qwen.svg").read_text(encoding="utf-8")
    speeds = result["speeds"]["cells"]
    assert speeds.keys() == result["cells"].keys()
    for name, found in speeds.items():
        assert f"<!-- {name.removeprefix('llama:').replace('fit:', '- -bits ')} -->" in drawn
        assert f"<!-- {found['decode_tokens_per_second']:.0f} tokens/s -->" in drawn
    first = (script["IMAGES"] / "glance.svg").read_text(encoding="utf-8")
    for points in script["glance"](result, script["_result"]("evidence")).values():
        assert all(f"<!-- {note.replace('--', '- -')} -->" in first for _, _, note in points)
    assert (script["IMAGES"] / "report.png").stat().st_size < 200_000
