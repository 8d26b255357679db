"""The chat page of `tawny serve`, on a desk and on a phone."""

from __future__ import annotations

import json

import pytest

import tawny
from tests.serving.tiny import byte_tokenizer, served_model

# What is wider than the window, and what is too small for a finger.
WIDER = "return document.documentElement.scrollWidth > innerWidth"
SMALL = """return [...document.querySelectorAll("button, form textarea")].filter(
  (e) => e.getBoundingClientRect().height < 44).map((e) => e.id)"""


@pytest.fixture(scope="module")
def server():
    with tawny.serve(served_model(), tokenizer=byte_tokenizer(), name="tiny") as running:
        yield running


@pytest.fixture(params=[1280, 390])
def page(request, browser, server):
    width = request.param
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(server.address)
    until(browser, "return document.title === 'tiny'")
    return browser


def until(browser, script, *arguments):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30, 0.02).until(lambda b: b.execute_script(script, *arguments))


def say(browser, text):
    from selenium.webdriver.common.by import By

    browser.find_element(By.ID, "text").send_keys(text)
    browser.find_element(By.ID, "send").click()


BOXES = "return [...document.querySelectorAll('#talk > div')].map((e) => [e.className, e.textContent])"


def test_an_answer_streams_can_be_stopped_and_is_remembered(page, server):
    from selenium.webdriver.common.by import By

    button = page.find_element(By.ID, "send")
    assert not page.execute_script(WIDER) and page.execute_script(SMALL) == []
    say(page, "<b>Hi</b>")
    # Some of the answer is there while the rest is still being made.
    until(page, "return document.querySelector('.assistant')?.textContent.length > 3")
    assert button.text == "Stop"
    button.click()
    until(page, "return document.querySelector('.note')?.textContent === 'stopped'")
    assert button.text == "Send"
    boxes = page.execute_script(BOXES)
    assert boxes[0] == ["user", "<b>Hi</b>"] and len(boxes[1][1]) < 900  # text is text
    assert not page.execute_script(WIDER)
    say(page, "And?")
    until(page, "return document.querySelectorAll('.note').length === 2")
    sent = [
        json.loads(asked["params"]["request"]["postData"])
        for entry in page.get_log("performance")
        if (asked := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
        and "postData" in asked["params"]["request"]
    ]
    assert [[m["role"] for m in one["messages"]] for one in sent] == [["user"], ["user", "assistant", "user"]]
    assert sent[1]["messages"][1]["content"] == boxes[1][1]
    page.find_element(By.ID, "clear").click()
    assert page.execute_script(BOXES) == []
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_what_goes_wrong_is_shown_and_the_text_is_not_lost(page):
    say(page, "x" * 2000)
    until(page, "return document.querySelector('.error')?.textContent.includes('context is 1024')")
    assert len(page.execute_script("return document.getElementById('text').value")) == 2000
