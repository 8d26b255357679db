from __future__ import annotations

import json
import math
import sys

import pytest
import torch

import tawny
from tawny.cli import main
from tests.evaluation.questions import tiny_folder
from tests.tiny import FAMILIES, tiny_model, tokens


def slow(model, dense, ids):
    """The definition, on whole models: mean KL and top-1 of every window."""
    kl, same = [], []
    with torch.no_grad():
        for row in ids:
            p, q = (m(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1) for m in (dense, model))
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
            same.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    return torch.tensor(kl, dtype=torch.float64), torch.tensor(same, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_divergence_is_that_of_whole_models(family, tmp_path):
    dense = tiny_model(family)
    dense.save_pretrained(tmp_path)
    model = tiny_model(family)
    tawny.prune(model, sparsity=0.3, allocator="uniform", solver="magnitude")
    ids = tokens(4, 30)
    made = tawny.agreement(model, tmp_path, ids, compute="float32")
    kl, same = slow(model, dense, ids)
    assert made.kl == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
    assert made.kl_stderr == pytest.approx(float(kl.std()) / 2, rel=1e-2, abs=1e-6)
    assert made.top1 == pytest.approx(float(same.mean()), abs=0.02)
    assert made.kl > 0 and made.top1 < 1
    assert made.perplexity.perplexity == pytest.approx(tawny.evaluate(model, ids).perplexity, rel=1e-4)
    assert made.dense.perplexity == pytest.approx(tawny.evaluate(dense, ids).perplexity, rel=1e-4)


def test_a_model_agrees_with_itself_entirely():
    model = tiny_model("llama")
    made = tawny.agreement(model, model, tokens(2, 20))
    assert made.kl == 0 and made.kl_stderr == 0 and made.top1 == 1


def test_logits_in_pieces_add_up_to_the_same(monkeypatch):
    dense, model = tiny_model("llama"), tiny_model("llama", seed=3)
    whole = tawny.agreement(model, dense, tokens(2, 60))
    monkeypatch.setattr("tawny.evaluation.perplexity._LOGIT_BYTES", 1)
    pieces = tawny.agreement(model, dense, tokens(2, 60))
    assert pieces.kl == pytest.approx(whole.kl) and pieces.top1 == whole.top1
    assert pieces.perplexity.loss == pytest.approx(whole.perplexity.loss)


def test_models_whose_tokens_are_not_the_same_are_refused(tmp_path):
    first = tiny_folder(tmp_path / "first")
    with pytest.raises(tawny.UserError, match=r"knows 512 tokens.*same tokenizer"):
        tawny.agreement(tiny_model("llama"), tiny_model("llama", vocab_size=512), tokens())
    other = tiny_folder(tmp_path / "other")
    file = other / "tokenizer.json"
    known = json.loads(file.read_text())
    words = known["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(known))
    text = tmp_path / "text.txt"
    text.write_text("the owl hunts at night " * 30)
    with pytest.raises(tawny.UserError, match="different tokenizers"):
        tawny.agreement(other, first, str(text), seqlen=32)
    with pytest.raises(tawny.UserError, match="tokenizer="):
        tawny.agreement(tiny_model("llama"), tiny_model("llama"), str(text), seqlen=32)


def test_the_verb_shows_both(tmp_path, monkeypatch, capsys):
    dense, other = tiny_folder(tmp_path / "dense"), tiny_folder(tmp_path / "other", seed=2)
    text = tmp_path / "text.txt"
    text.write_text("the owl hunts at night and sleeps by day. " * 20)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tawny", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().out

    given = (other, "--text", text, "--seqlen", 64, "--windows", 3, "--against", dense)
    code, out = run(*given, "--json")
    made = json.loads(out)
    assert code == 0 and made["agreement"]["kl"] > 0 and made["perplexity"] > 1
    assert made["agreement"]["dense"]["windows"] == 3
    code, out = run(*given)
    assert code == 0 and "KL from dense" in out and "same next token" in out and "bits per byte" in out


def test_with_a_stride_each_token_is_predicted_once_with_at_least_the_rest_before_it(tmp_path):
    folder = tiny_folder(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(100)))
    made = tawny.evaluate(folder, str(text), seqlen=40, stride=15, compute="float32")
    assert made.windows == 5 and made.tokens == 39 + 4 * 15 and made.stride == 15
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    losses = []
    for start in range(0, 61, 15):
        row = ids[start : start + 40]
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
        losses.append(each if start == 0 else each[-15:])
    assert made.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert made.bits_per_byte == pytest.approx(made.loss * 99 / math.log(2) / 100, rel=1e-6)
    assert "15 apart" in made.recipe and "5 windows of 40" in made.recipe
    plain = tawny.evaluate(folder, str(text), seqlen=40)
    assert plain.tokens == 2 * 39 and "apart" not in plain.recipe
    with pytest.raises(tawny.UserError, match="--stride 41 is outside 1…40"):
        tawny.evaluate(folder, str(text), seqlen=40, stride=41)
