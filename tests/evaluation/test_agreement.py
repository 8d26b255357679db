from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tawny
from tawny.evaluation import agreement as agreement_module
from tawny.evaluation import hidden_states
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


def test_divergence_by_position_is_that_of_the_tokens_there(monkeypatch):
    monkeypatch.setattr(agreement_module._ranges, "__defaults__", (16,))
    monkeypatch.setattr("tawny.evaluation.perplexity._LOGIT_BYTES", 1)
    dense, model, ids = tiny_model("llama"), tiny_model("llama", seed=3), tokens(2, 60)
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits[:, :-1].log_softmax(-1) for m in (dense, model))
    kl = (p.exp() * (p - q)).sum(-1)
    made = tawny.agreement(model, dense, ids, compute="float32").kl_by_position
    assert [start for start, _ in made] == [0, 16, 32]
    for (_, mean), part in zip(made, (kl[:, :16], kl[:, 16:32], kl[:, 32:]), strict=True):
        assert mean == pytest.approx(float(part.mean()), rel=1e-3)


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


def test_models_whose_tokens_are_not_the_same_are_refused(tmp_path, text):
    first = tiny_folder(tmp_path / "first")
    with pytest.raises(tawny.UserError, match=r"knows 512 tokens.*same tokenizer"):
        tawny.agreement(tiny_model("llama"), tiny_model("llama", vocab_size=512), tokens())
    other = tiny_folder(tmp_path / "other")
    file = other / "tokenizer.json"
    known = json.loads(file.read_text())
    words = known["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(known))
    with pytest.raises(tawny.UserError, match="different tokenizers"):
        tawny.agreement(other, first, text, seqlen=32)
    with pytest.raises(tawny.UserError, match="tokenizer="):
        tawny.agreement(tiny_model("llama"), tiny_model("llama"), text, seqlen=32)


def test_the_verb_shows_both(tmp_path, text, run):
    dense, other = tiny_folder(tmp_path / "dense"), tiny_folder(tmp_path / "other", seed=2)
    given = ("eval", other, "--text", text, "--seqlen", 64, "--windows", 3, "--against", dense)
    code, out, _ = run(*given, "--json")
    made = json.loads(out)
    assert code == 0 and made["agreement"]["kl"] > 0 and made["perplexity"] > 1
    assert made["agreement"]["dense"]["windows"] == 3
    code, out, _ = run(*given)
    assert code == 0 and "KL from dense" in out and "same next token" in out and "bits per byte" in out


class Phases(tawny.progress.Silent):
    def __init__(self):
        self.seen = []

    def phase(self, name, total, unit="blocks"):
        self.seen.append(name)


@pytest.fixture
def keeps(tmp_path, monkeypatch):
    """Every walk is worth a file, in a cache of its own."""
    monkeypatch.setenv("TAWNY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hidden_states, "_WORTH", 0.0)
    return tmp_path / "cache" / "hidden"


def walked(model, dense, ids, **keys):
    """What was measured, and whether the dense model was walked for it."""
    phases = Phases()
    made = tawny.agreement(model, dense, ids, progress=phases, **keys)
    return made, "dense model" in phases.seen


def same(made, other):
    return (made.kl_by_window, made.top1, made.dense.loss) == (
        other.kl_by_window,
        other.top1,
        other.dense.loss,
    )


def test_a_dense_model_is_walked_once_for_the_same_windows(tmp_path, keeps):
    dense, model, ids = tmp_path / "dense", tiny_model("llama", seed=3), tokens(4, 30)
    tiny_model("llama").save_pretrained(dense)
    first, was_walked = walked(model, dense, ids, compute="float32")
    assert was_walked and len(list(keeps.iterdir())) == 1
    again, was_walked = walked(model, dense, ids, compute="float32")
    assert not was_walked and same(first, again)
    assert walked(model, dense, ids, compute="float32", cache=False)[1]
    phases = Phases()
    alone = tawny.evaluate(dense, ids, compute="float32", progress=phases)
    assert alone.loss == pytest.approx(first.dense.loss) and phases.seen == ["predicting"]
    assert walked(model, dense, ids, compute="bfloat16")[1]
    assert walked(model, dense, ids[:2], compute="float32")[1]
    tiny_model("llama", seed=5).save_pretrained(dense)
    other, was_walked = walked(model, dense, ids, compute="float32")
    assert was_walked and other.kl != first.kl
    assert tawny.evaluate(dense, ids[:3], compute="float32").loss > 0
    assert not walked(model, dense, ids[:3], compute="float32")[1]
    assert walked(model, tiny_model("llama"), ids)[1]  # a live one has no files to know it by


@pytest.mark.parametrize("in_its_place", [False, True])
def test_a_model_with_the_names_sizes_and_times_of_another_is_walked_itself(tmp_path, keeps, in_its_place):
    first, ids = tmp_path / "first", tokens(2, 30)
    tiny_model("llama").save_pretrained(first)
    one = tawny.evaluate(first, ids, compute="float32")
    time = (first / "model.safetensors").stat()
    second = first if in_its_place else shutil.copytree(first, tmp_path / "second")
    tiny_model("llama", seed=5).save_pretrained(second)
    os.utime(second / "model.safetensors", ns=(time.st_atime_ns, time.st_mtime_ns))
    other = tawny.evaluate(second, ids, compute="float32")
    assert other.loss == tawny.evaluate(second, ids, compute="float32", cache=False).loss != one.loss


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_kept_states_serve_a_model_whose_blocks_return_more_than_hidden_states(family, tmp_path, keeps):
    config = AutoConfig.for_model(family, vocab_size=256, hidden_size=32, num_hidden_layers=2, n_layer=2)
    config.num_attention_heads = config.n_head = 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    ids = tokens(2, 20)
    first = tawny.evaluate(tmp_path / "dense", ids)
    again = tawny.agreement(tmp_path / "dense", tmp_path / "dense", ids)
    assert len(list(keeps.iterdir())) == 1
    assert again.dense.loss == pytest.approx(first.loss) and again.kl == 0


@pytest.mark.parametrize("damage", [b"", b"\x00" * 40, None], ids=["empty", "zeros", "cut off"])
def test_what_is_damaged_is_walked_again(tmp_path, keeps, damage):
    dense, model, ids = tmp_path / "dense", tiny_model("llama", seed=3), tokens(4, 30)
    tiny_model("llama").save_pretrained(dense)
    first, _ = walked(model, dense, ids)
    (file,) = keeps.iterdir()
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)
    again, was_walked = walked(model, dense, ids)
    assert was_walked and same(first, again)
    assert not walked(model, dense, ids)[1]


def test_the_oldest_go_where_room_is_needed(tmp_path, keeps, monkeypatch):
    dense, model, ids = tmp_path / "dense", tiny_model("llama", seed=3), tokens(4, 30)
    tiny_model("llama").save_pretrained(dense)
    walked(model, dense, ids[:1])
    (first,) = keeps.iterdir()
    os.utime(first, (1, 1))
    monkeypatch.setattr(hidden_states, "KEPT_BYTES", first.stat().st_size + 10)
    walked(model, dense, ids[1:2])
    (left,) = keeps.iterdir()
    assert left != first
    walked(model, dense, ids)  # more than there is room for at all
    assert list(keeps.iterdir()) == [left]


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, keeps, monkeypatch):
    dense, model, ids = tmp_path / "dense", tiny_model("llama", seed=3), tokens(2, 30)
    tiny_model("llama").save_pretrained(dense)
    keeps.parent.write_text("in the way")
    first, was_walked = walked(model, dense, ids)
    assert was_walked and first.kl > 0

    def nobodys():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(hidden_states, "cache_folder", nobodys)
    assert walked(model, dense, ids)[1]
