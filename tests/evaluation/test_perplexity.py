from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import decoders

import tawny
from tawny.errors import RecipeError, TextError
from tawny.evaluation import perplexity as module
from tests.tiny import FAMILIES, tiny_model, tokens
from tests.tokenizer import tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_perplexity_is_that_of_the_models_own_loss(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    ids = tokens(5, 30)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    made = tawny.evaluate(tmp_path, ids, compute="float32")
    mean = sum(losses) / len(losses)
    assert made.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    spread = float(torch.tensor(losses).std()) / math.sqrt(5)
    assert made.stderr == pytest.approx(math.exp(mean) * spread, rel=1e-3)
    assert made.windows == 5 and made.tokens == 5 * 29
    live = tawny.evaluate(model, ids)
    assert live.perplexity == pytest.approx(made.perplexity, rel=1e-4)


def test_forwards_compute_in_what_the_cpu_multiplies_fastest(products, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    named = "float32" if products == "float32" else "bfloat16"
    assert tawny.evaluate(tmp_path, tokens()).loss == tawny.evaluate(tmp_path, tokens(), compute=named).loss


def test_the_json_holds_the_promised_keys():
    made = tawny.evaluate(tiny_model("llama"), tokens(2, 16)).to_dict()
    assert {"perplexity", "stderr", "windows", "tokens", "seconds", "text_sha256"} <= made.keys()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"windows": -1}, "windows -1 is not possible"),
        ({"windows": 0}, "windows 0 is not possible"),
        ({"seqlen": 0}, "seqlen 0 is not possible"),
        ({"seqlen": 1}, "seqlen 1 is not possible"),
        ({"compute": "fp32"}, "compute 'fp32' is unknown; give auto, float32"),
        ({"compute": "int8"}, "compute 'int8' is unknown"),
    ],
)
def test_an_impossible_measurement_is_named(keys, words, text, tmp_path):
    model = tiny_model("llama")
    with pytest.raises(RecipeError, match=words):
        tawny.evaluate(model, text, tokenizer=tiny_tokenizer(), **{"seqlen": 16, **keys})
    model.save_pretrained(tmp_path / "model")
    if "seqlen" not in keys:  # tokens are windows already
        with pytest.raises(RecipeError, match=words):
            tawny.evaluate(tmp_path / "model", tokens(3, 16), **keys)
    with pytest.raises(RecipeError, match="seqlen 1 "):
        tawny.evaluate(model, tokens(3, 1))
    with pytest.raises(TextError, match="expected integer tokens"):
        tawny.evaluate(model, tokens(3, 16)[0])


def test_windows_longer_than_a_table_of_positions_are_refused_before_the_text_is_read():
    short = tiny_model("gpt2")
    for model in (short, tiny_model("opt")):
        with pytest.raises(RecipeError, match=r"^seqlen 2048 is more than .* 128; give --seqlen 128$"):
            tawny.evaluate(model, "no such text", seqlen=2048, tokenizer=tiny_tokenizer())
        with pytest.raises(RecipeError, match="seqlen 129 is more"):
            tawny.evaluate(model, tokens(1, 129))
        assert tawny.evaluate(model, tokens(1, 128)).tokens == 127
    with pytest.raises(RecipeError, match="seqlen 129 is more"):
        tawny.agreement(tiny_model("llama"), short, tokens(1, 129))
    assert tawny.evaluate(tiny_model("llama"), tokens(1, 200)).tokens == 199


def test_the_recipe_says_which_tokens_of_overlapping_windows_count(text):
    model = tiny_model("llama")

    def recipe(**keys):
        made = tawny.evaluate(model, text, tokenizer=tiny_tokenizer(), seqlen=24, **keys)
        return made.recipe, made.tokens

    assert recipe(windows=3, stride=8) == (
        "the first 3 windows of 24 tokens, 8 apart, all of the first and the last 8 of each other counted, "
        "the first window's first token not predicted, loss in float32",
        23 + 2 * 8,
    )
    apart = "a window's first token not predicted, loss in float32"
    assert recipe(windows=3) == (f"the first 3 windows of 24 tokens, {apart}", 3 * 23)
    assert recipe(windows=1, stride=8) == (f"1 window of 24 tokens, {apart}", 23)


def by_hand(model, windows, stride):
    """Mean loss of the tokens that count, and how many these are."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        losses.append(each[-stride:] if losses and stride is not None else each)
    every = torch.cat(losses)
    return float(every.mean()), len(every)


def test_with_a_stride_each_token_is_predicted_once_with_at_least_the_rest_before_it(tmp_path):
    text, model, tokenizer = tmp_path / "text.txt", tiny_model("llama"), tiny_tokenizer()
    text.write_text("".join(chr(97 + i * i % 26) for i in range(100)))
    keys = {"tokenizer": tokenizer, "seqlen": 40, "compute": "float32"}
    made = tawny.evaluate(model, str(text), stride=15, **keys)
    assert made.windows == 5 and made.tokens == 39 + 4 * 15 and made.stride == 15
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    loss, count = by_hand(model, [ids[at : at + 40] for at in range(0, 61, 15)], 15)
    assert made.loss == pytest.approx(loss, rel=1e-4) and made.tokens == count
    assert made.bits_per_byte == pytest.approx(
        made.loss / math.log(2), rel=1e-6
    )  # the first byte is not predicted
    assert "15 apart" in made.recipe and "5 windows of 40" in made.recipe
    plain = tawny.evaluate(model, str(text), **keys)
    assert plain.tokens == 2 * 39 and "apart" not in plain.recipe
    with pytest.raises(RecipeError, match="--stride 41 is outside 1…40"):
        tawny.evaluate(model, str(text), stride=41, **keys)


def test_tokens_of_a_template_have_bytes_too(tmp_path):
    tokenizer, path = tiny_tokenizer(), tmp_path / "chat.jsonl"
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    path.write_text('{"messages": [{"role": "user", "content": "abcdefghij"}]}\n' * 8)
    keys = {"tokenizer": tokenizer, "seqlen": 12, "windows": 1, "compute": "float32"}
    made = tawny.evaluate(tiny_model("llama"), f"chat:{path}", **keys)
    # Twelve tokens, the first of which is not predicted: ten letters and `</s>`.
    assert made.tokens == 11 and made.bits_per_byte == pytest.approx(
        made.loss * 11 / math.log(2) / 14, rel=1e-6
    )


def test_what_a_model_writes_to_be_measured_on_is_what_no_run_is_calibrated_on(monkeypatch):
    seeds = []
    monkeypatch.setattr(module, "author_of", lambda *given, **_: seeds.append(given[2]) or 1 / 0)
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError):
        tawny.agreement(model, model, "self", tokenizer=tiny_tokenizer(), seqlen=24)
    # torch's generator on a CPU may read a part of a seed only, so that another number is no other seed.
    first = [float(torch.rand((), generator=torch.Generator().manual_seed(s))) for s in (*range(9), seeds[0])]
    assert len(set(first)) == 10


def test_bytes_of_short_strides_are_those_of_the_text(tmp_path):
    text, tokenizer = tmp_path / "text.txt", tiny_tokenizer()
    text.write_text("ab " * 40)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    keys = {"tokenizer": tokenizer, "seqlen": 12, "compute": "float32"}
    made = tawny.evaluate(tiny_model("llama"), str(text), stride=1, **keys)
    # All tokens but the first are predicted, and each is one byte.
    assert made.tokens == 119 and made.bits_per_byte == pytest.approx(made.loss / math.log(2), rel=1e-6)


@pytest.mark.parametrize("stride", [None, 9])
def test_every_window_begins_with_bos_where_the_tokenizer_begins_a_text_with_it(stride, text):
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer(begins=True)
    letters = Path(text).read_text()
    ids = torch.tensor(tokenizer(letters, add_special_tokens=False)["input_ids"])
    starts = [number * (stride or 23) for number in range(3)]
    loss, count = by_hand(model, [torch.cat([ids.new_ones(1), ids[at : at + 23]]) for at in starts], stride)
    keys = {"tokenizer": tokenizer, "seqlen": 24, "windows": 3, "compute": "float32"}
    made = tawny.evaluate(model, text, stride=stride, **keys)
    assert made.loss == pytest.approx(loss, rel=1e-4)
    assert made.bos and made.tokens == count and made.stride == (stride or 23)
    assert ("each begun with BOS" in made.recipe) and ("apart" in made.recipe) == (stride is not None)
    assert made.bits_per_byte == pytest.approx(made.loss / math.log(2), rel=1e-6)  # a byte a token
    whole = torch.tensor(tokenizer(letters)["input_ids"])[: 3 * 24].view(3, 24)
    papers = tawny.evaluate(model, text, bos=False, **keys)
    assert papers.loss == tawny.evaluate(model, whole, compute="float32").loss
    assert not papers.bos and "BOS" not in papers.recipe
    for bos in (None, False):
        apart = tawny.agreement(model, model, text, bos=bos, **keys)
        alone = tawny.evaluate(model, text, bos=bos, **keys)
        assert apart.perplexity.loss == pytest.approx(alone.loss, rel=1e-6)
    longest = [tawny.evaluate(model, text, stride=most, **keys) for most in (None, 23, 24)]
    assert len({(each.loss, each.recipe) for each in longest}) == 1
    assert {each.stride for each in longest} == {23}
    one = tawny.evaluate(model, text, **{**keys, "windows": 1})
    assert "1 window of 24 tokens begun with BOS, a" in one.recipe
    with pytest.raises(RecipeError, match="has no BOS"):
        tokenizer.bos_token = None
        tawny.evaluate(model, text, bos=True, **keys)


def test_inspection_counts_zeros_and_recognises_patterns(tmp_path):
    model = tiny_model("llama")
    keys = {"allocator": "uniform", "solver": "magnitude", "pattern": "2:4", "exclude": ["down_proj"]}
    tawny.prune(model, sparsity=0.5, **keys)
    model.save_pretrained(tmp_path)
    made = tawny.inspect(tmp_path)
    by_kind = {x.name.rsplit(".", 1)[1]: x for x in made.linears}
    assert by_kind["q_proj"].pattern == "2:4" and by_kind["q_proj"].sparsity == 0.5
    assert by_kind["down_proj"].pattern == "dense" and by_kind["down_proj"].zeros == 0
    assert made.zeros == sum(x.zeros for x in made.linears)
    assert made.sparsity == made.zeros / made.prunable
    assert {"name", "shape", "zeros", "sparsity", "pattern"} <= made.to_dict()["linears"][0].keys()


def test_a_plan_knows_the_model_without_touching_a_weight(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    made = tawny.plan(tmp_path, sparsity=0.5, allocator="uniform", solver="magnitude")
    assert len(made.blocks) == 3 and len(made.linears) == 21
    assert made.allocation is not None and set(made.allocation.values()) == {0.5}
    assert made.memory["peak"] > made.memory["interpreter"]
    assert tawny.plan(tmp_path, sparsity=0.5, allocator="owl").allocation is None


def test_a_profile_reports_every_m_and_sees_zeros():
    model = tiny_model("llama")
    before = tawny.profile(model, calibration=tokens(), compute="float32")
    assert list(before.shares) == ["3", "5", "7", "10"]
    assert all(a >= b for a, b in zip(before.shares["3"], before.shares["10"], strict=True))
    assert before.zeros == [0.0] * 3
    tawny.prune(model, sparsity=0.5, allocator="uniform", solver="magnitude")
    after = tawny.profile(model, calibration=tokens(), compute="float32")
    assert after.zeros == pytest.approx([0.5] * 3, abs=1e-3)
    assert all(abs(sum(v) / 3 - after.sparsity) < 0.01 for v in after.allocations.values())


def test_the_standard_error_counts_what_differs_within_a_text():
    """Two texts whose windows are alike: nothing is unsure, however far apart the texts are."""
    ids = tokens(6, 9)
    windows = module.Windows(ids, 9, of=(0, 1, 0, 0, 1, 1))
    means = torch.tensor([1.0, 5.0, 1.0, 1.0, 5.0, 5.0], dtype=torch.float64)
    assert windows.stderr(means) == pytest.approx(0, abs=1e-12)
    assert module.Windows(ids, 9).stderr(means) == pytest.approx(float(means.std()) / math.sqrt(6))
    spread = torch.tensor([0.1, 0.0, -0.1, 0.0, 0.3, -0.3], dtype=torch.float64)
    parts = [spread[[0, 2, 3]].var() / 3, spread[[1, 4, 5]].var() / 3]
    assert windows.stderr(means + spread) == pytest.approx(math.sqrt(float(sum(parts)) / 4))
    assert module.Windows(ids[:1], 9).stderr(means[:1]) == 0


def test_a_window_of_a_stride_counts_by_its_tokens():
    windows = module.Windows(tokens(3, 9), 2)
    counts = [8, 2, 2]  # the first window's tokens all count
    means = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    middle = sum(c * float(m) for c, m in zip(counts, means, strict=True)) / 12
    expected = sum((c / 12 * (float(m) - middle)) ** 2 for c, m in zip(counts, means, strict=True)) * 3 / 2
    assert windows.stderr(means) == pytest.approx(math.sqrt(expected))


def test_windows_of_several_texts_know_theirs(tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() if isinstance(text, Path) else Path(text).read_text())
    made = module.windows_of([f"{text}=0.75", f"{other}=0.25"], 16, 8, None, tiny_tokenizer())
    assert sorted(made.of) == [0] * 6 + [1] * 2
    alone = module.windows_of(str(text), 16, 6, None, tiny_tokenizer())
    assert alone.of == ()
    assert torch.equal(made.ids[torch.tensor(made.of) == 0], alone.ids)
