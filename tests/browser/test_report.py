from __future__ import annotations

import json

import pytest

from tawny.report.html import write_report
from tests.report.records import hostile_record, record

# Every visible piece of text with the colours it is seen in. A canvas turns whatever form a colour is computed in
# (rgb, color(srgb …), with alpha) into numbers; backgrounds are laid over each other from the page upwards.
CONTRAST = """
const canvas = document.createElement("canvas"); canvas.width = canvas.height = 1;
const context = canvas.getContext("2d", { willReadFrequently: true });
const numbers = (colour) => {
  context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
};
const over = (top, bottom) => [0, 1, 2].map((i) => (top[i] * top[3] + bottom[i] * (255 - top[3])) / 255).concat(255);
const luminance = (c) => {
  const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const element = node.parentElement;
  if (!node.textContent.trim() || ["SCRIPT", "STYLE", "TITLE"].includes(element.tagName.toUpperCase())) continue;
  if (!element.checkVisibility() || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const inside = element instanceof SVGElement;
  let chain = [];
  for (let e = element; e; e = e.parentElement) chain.unshift(numbers(getComputedStyle(e).backgroundColor));
  const background = chain.reduce((below, layer) => over(layer, below), [255, 255, 255, 255]);
  const ink = over(numbers(inside ? style.fill : style.color), background);
  const [a, b] = [luminance(ink), luminance(background)].sort((x, y) => y - x);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
  found.push({ text: node.textContent.trim().slice(0, 40), ratio: (a + 0.05) / (b + 0.05), size, need: large ? 3 : 4.5, ink, background });
}
return found;
"""
OVERFLOW = """
const width = document.documentElement.clientWidth, out = [];
for (const e of document.querySelectorAll("body *")) {
  const box = e.getBoundingClientRect();
  if (!box.width || !e.checkVisibility() || e.closest(".scroll, pre, .skip, svg")) continue;
  if (box.right > width + 1 || box.left < -1) out.push(e.tagName + "." + e.className + " " + Math.round(box.right));
}
return { scroll: document.documentElement.scrollWidth, width, out };
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(record(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return write_report(hostile_record(), tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_nothing_overflows(show, page, width, scheme):
    browser = show(page, width, scheme)
    measured = browser.execute_script(OVERFLOW)
    assert measured["scroll"] <= measured["width"] == width and not measured["out"], measured
    seen = browser.execute_script(CONTRAST)
    assert len(seen) > 100
    assert any(entry["text"].startswith("Sparsity") for entry in seen)
    faint = [entry for entry in seen if entry["ratio"] < entry["need"]]
    assert not faint, faint
    small = [entry for entry in seen if entry["size"] < 10]
    assert not small, small
    assert browser.get_log("browser") == []


def test_the_measure_of_contrast_finds_faint_text(show, page):
    browser = show(page)
    browser.execute_script("document.querySelector('.lead').style.color = '#cfc8be'")
    browser.execute_script("document.querySelector('.wide svg text').style.fill = '#cfc8be'")
    faint = [entry for entry in browser.execute_script(CONTRAST) if entry["ratio"] < entry["need"]]
    assert len(faint) == 2 and all(1 < entry["ratio"] < 2 for entry in faint), faint


def test_the_two_schemes_differ_and_the_picture_follows(show, page):
    script = (
        "return [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('.wide svg text')).fill]"
    )
    light, dark = (show(page, 1280, scheme).execute_script(script) for scheme in ("light", "dark"))
    assert light[0] != dark[0] and light[1] != dark[1]


@pytest.mark.parametrize("width", [1280, 390])
def test_names_of_any_length_and_malice_neither_run_nor_overflow(show, hostile, width):
    browser = show(hostile, width)
    measured = browser.execute_script(OVERFLOW)
    assert measured["scroll"] <= measured["width"] and not measured["out"], measured
    assert browser.get_log("browser") == []  # an alert or a blocked load would be here
    assert browser.execute_script("return document.scripts.length") == 1


def test_the_page_asks_nothing_of_the_network(show, page):
    browser = show(page)
    browser.execute_script("return 1")
    asked = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert {url for url in asked if not url.startswith("data:")} <= {page.as_uri()}


@pytest.mark.parametrize(("width", "picture"), [(1280, ".wide"), (390, ".narrow")])
def test_a_block_tells_its_numbers_to_mouse_keyboard_and_finger(show, page, width, picture):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser = show(page, width)
    readout = browser.find_element(By.CSS_SELECTOR, ".readout")
    assert "Point at a block" in readout.text
    hits = browser.find_elements(By.CSS_SELECTOR, f"{picture} .hit")
    assert len(hits) == 3
    row = browser.execute_script(
        "return [...document.getElementById('block-1').cells].map(c => c.textContent.trim())"
    )
    ActionChains(browser).move_to_element(hits[1]).perform()
    assert all(value in readout.text for value in row), (readout.text, row)
    browser.execute_script("arguments[0].focus()", hits[0])
    assert readout.text.startswith("block 0")
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).send_keys(Keys.END).perform()
    assert readout.text.startswith("block 2")
    hits[1].click()
    assert readout.text.startswith("block 1")


def test_the_printed_page_has_the_picture_and_every_number(show, page):
    browser = show(page, 1280, "dark", media="print")
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert (
        browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert browser.execute_script("return document.getElementById('block-2').checkVisibility()")
    assert browser.execute_script("return document.querySelector('.wide svg').checkVisibility()")
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert len(pdf["data"]) > 10_000
