from __future__ import annotations

import pytest

import tawny
from tawny.calibration.text import Text
from tawny.evaluation import samples
from tawny.packed.opening import load_quietly
from tawny.precision import native_dtype
from tawny.progress import Silent
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer


def text(*paragraphs: str) -> Text:
    return Text("t", "\n\n".join(paragraphs), len(paragraphs), "")


def test_prompts_are_beginnings_of_paragraphs_spread_over_the_text():
    paragraphs = [" ".join(f"word{i}-{j}" for j in range(40)) for i in range(9)]
    made = samples.prompts_from(text("short", *paragraphs))
    assert [prompt.split()[0] for prompt in made] == ["word0-0", "word3-0", "word6-0"]
    assert all(1 < len(prompt.split()) <= samples.WORDS for prompt in made)


@pytest.mark.parametrize("paragraphs", [["only one"], ["一" * 500, "二" * 500], ["", "  ", "x"]])
def test_odd_texts_have_prompts_too(paragraphs):
    made = samples.prompts_from(text(*paragraphs))
    assert made and all(0 < len(prompt) <= 90 for prompt in made)


def test_a_model_that_would_not_fit_is_left_alone_and_that_is_said(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    monkeypatch.setattr(samples, "free_memory", lambda: 1000)
    said = []

    class Hears(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    assert samples.text_samples(tmp_path / "m", tmp_path / "m", ["a"], progress=Hears()) == []
    assert "would not fit" in said[-1]


def test_both_models_answer_every_prompt(tmp_path, monkeypatch):
    for name, seed in (("dense", 0), ("pruned", 1)):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    made = samples.text_samples(tmp_path / "dense", tmp_path / "pruned", ["ab cd", "ef"], tokens=5)
    assert [sample["prompt"] for sample in made] == ["ab cd", "ef"]
    for sample in made:
        for name in ("dense", "pruned"):
            model = load_quietly(tmp_path / name, native_dtype())
            alone = tawny.generate(
                model, sample["prompt"], max_tokens=5, chat=False, tokenizer=tiny_tokenizer()
            )
            assert sample[name] == " ".join(alone.text.split())
    assert any(sample["dense"] != sample["pruned"] for sample in made)
