"""How far features have moved, beside a slow obvious twin."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import tawny
from tawny.errors import ModelError, RecipeError
from tawny.evaluation import compare as compare_module
from tawny.evaluation import features as features_module
from tawny.model.streams import Samples
from tawny.progress import silent
from tests.encoders import inputs_for, padded, tiny_encoder
from tests.tiny import tiny_model


def pair(name):
    dense = tiny_encoder(name)
    pruned = copy.deepcopy(dense)
    tawny.prune(pruned, sparsity=0.6, solver="magnitude", allocator="uniform")
    return dense, pruned


def slowly(dense, pruned, inputs):
    """Error, cosine and equal neighbours, one position after another."""
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        G, F = (model.base_model(**inputs).last_hidden_state.double() for model in (dense, pruned))
    lost = energy = 0.0
    cosines, pooled = [], ([], [])
    for s in range(len(G)):
        real = [p for p in range(G.shape[1]) if mask is None or mask[s, p]]
        lost += sum(float((F[s, p] - G[s, p]).square().sum()) for p in real)
        energy += sum(float(G[s, p].square().sum()) for p in real)
        each = [float(F[s, p] @ G[s, p] / F[s, p].norm() / G[s, p].norm()) for p in real]
        cosines.append(sum(each) / len(each))
        for kept, X in zip(pooled, (G, F), strict=True):
            kept.append(sum(X[s, p] for p in real) / len(real))
    near = []
    for kept in pooled:
        angle = [[float(a @ b / a.norm() / b.norm()) if a is not b else -2.0 for b in kept] for a in kept]
        near.append([row.index(max(row)) for row in angle])
    same = sum(a == b for a, b in zip(*near, strict=True)) / len(G)
    return lost / energy, sum(cosines) / len(cosines), same


@pytest.mark.parametrize("name", ["bert", "masked", "vit"])
def test_features_are_compared_as_the_slow_twin_compares_them(name):
    dense, pruned = pair(name)
    inputs = inputs_for(dense, 10)
    inputs = padded(inputs) if "input_ids" in inputs else inputs
    samples = Samples(inputs, seqlen=17)
    found = tawny.features(pruned, dense, samples)
    error, cosine, same = slowly(dense, pruned, inputs)
    assert found.error == pytest.approx(error, rel=1e-4)
    assert found.cosine == pytest.approx(cosine, rel=1e-4)
    assert found.neighbours == pytest.approx(same)
    assert (found.kl is None) == (name == "bert")


def test_logits_are_compared_sample_by_sample_or_token_by_token():
    for name in ("masked", "vit"):
        dense, pruned = pair(name)
        inputs = inputs_for(dense, 5)
        with torch.no_grad():
            p, q = (model(**inputs).logits.flatten(0, -2).log_softmax(-1) for model in (dense, pruned))
        found = tawny.features(pruned, dense, Samples(inputs, seqlen=17))
        assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
        assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def test_a_model_beside_itself_has_lost_nothing():
    dense = tiny_encoder("vit")
    found = tawny.features(dense, copy.deepcopy(dense), inputs_for(dense))
    assert (found.error, found.neighbours, found.kl, found.top1, found.top5) == (0, 1, 0, 1, 1)


def test_models_that_take_different_things_are_refused():
    with pytest.raises(ModelError, match="the dense model takes input_ids and the other pixel_values"):
        tawny.features(
            tiny_encoder("vit"), tiny_encoder("bert"), inputs_for(tiny_encoder("bert"))["input_ids"]
        )


def test_a_single_score_is_no_distribution():
    dense = tiny_encoder("vit")
    dense.classifier = torch.nn.Linear(dense.classifier.in_features, 1)
    pruned = copy.deepcopy(dense)
    tawny.prune(pruned, sparsity=0.6, solver="magnitude", allocator="uniform")
    found = tawny.features(pruned, dense, Samples(inputs_for(dense), seqlen=17))
    assert found.kl is None and found.top1 is None and found.error > 0


def test_a_length_in_tokens_is_refused_for_pictures():
    dense, pruned = pair("vit")
    with pytest.raises(RecipeError, match="seqlen counts tokens, and this model takes pixel_values"):
        tawny.features(pruned, dense, seqlen=64)


def test_a_batch_is_timed_of_what_the_model_takes():
    for name, tokens in (("bert", 8), ("vit", None)):
        found = tawny.latency(tiny_encoder(name), batch=2, tokens=8, rounds=2)
        assert found.tokens == tokens and found.samples_per_second == pytest.approx(2 / found.seconds)


@pytest.mark.parametrize("seqlen", [None, 512])
def test_a_comparison_measures_features_on_windows_as_long_as_asked_for(seqlen, monkeypatch):
    asked, told = [], SimpleNamespace(to_dict=dict)
    monkeypatch.setattr(features_module, "features", lambda *_, **keys: asked.append(keys["seqlen"]) or told)
    setting = {"text": "wiki", "windows": 2, "seqlen": seqlen, "compute": "auto", "device": "cpu"}
    compare_module._features(None, "dense", setting, silent)
    assert asked == [seqlen]


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("encoder", ("bench", "--tokens", 3), "is an encoder and decodes nothing: leave --tokens out"),
        ("language", ("bench", "--batch", 2), "is measured with one text at a time: --batch is for encoders"),
        ("encoder", ("eval", "--stride", 4), "predicts no next token, so --stride does not apply to it"),
        ("encoder", ("eval", "--bos"), "predicts no next token, so --bos and --no-bos do not apply to it"),
        ("encoder", ("compare", "--bos"), "predicts no next token, so bos does not apply to it"),
    ],
)
def test_options_that_say_nothing_of_a_model_are_refused(run, tmp_path, kind, arguments, reason):
    folder = tmp_path / "model"
    (tiny_encoder("bert") if kind == "encoder" else tiny_model("llama")).save_pretrained(folder)
    verb, *options = arguments
    against = ("--against", folder) if verb == "eval" else ()
    code, out, err = run(verb, folder, *options, *against)
    assert (code, out) == (2, "") and reason in " ".join(err.split())


def test_the_error_of_an_error_is_that_of_a_ratio():
    """Lost a tenth of every sample's energy: that share is sure, however much the samples differ in energy."""
    found = features_module._Sums()
    found.rows = {
        "lost": [torch.tensor([0.1, 0.5, 2.0]).double()],
        "energy": [torch.tensor([1.0, 5.0, 20.0]).double()],
        "cosine": [torch.tensor([0.9, 0.9, 0.9]).double()],
    }
    found.pooled = [[torch.eye(3)], [torch.eye(3)]]
    made = found.finish()
    assert made["error"] == pytest.approx(0.1) and made["error_stderr"] == pytest.approx(0, abs=1e-8)
