"""Transformers that are no decoders: walked, pruned, packed and opened like them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, BertForMaskedLM, BertLMHeadModel, BertModel

import tawny
from tawny.calibration.observe import observe
from tawny.errors import ModelError, TextError, UserError
from tawny.model.skeleton import open_skeleton
from tawny.model.stack import live_stack
from tawny.model.streams import Samples, Stream
from tawny.packed.linear import PackedLinear
from tests.encoders import inputs_for, padded, tiny_encoder

KEYS = {"sparsity": 0.5, "allocator": "owl", "solver": "sparsegpt", "compute": "float32"}


@pytest.mark.parametrize("name", ["bert", "masked", "mpnet", "vit", "dinov2", "whisper"])
def test_blocks_that_run_one_by_one_give_the_models_own_output(name):
    model = tiny_encoder(name)
    given = inputs_for(model)
    for inputs in [given, padded(given)] if "input_ids" in given else [given]:
        stack = live_stack(model)
        hidden = stack.enter(inputs)
        with torch.no_grad():
            for index, call in enumerate(stack.calls(inputs)):
                hidden = stack.forward(index, hidden, call)
            torch.testing.assert_close(stack.output(inputs, hidden)[0], model(**inputs)[0])


def test_padding_is_no_part_of_what_a_linear_receives():
    model = tiny_encoder("bert")
    inputs = padded(inputs_for(model))
    stack = live_stack(model)
    linears = stack.linears(0)
    seen = observe(Stream(stack, Samples(inputs)), 0, linears, "norms").statistics[linears[0].name]
    states = stack.enter(inputs)[inputs["attention_mask"].bool()]
    assert seen.tokens == int(inputs["attention_mask"].sum())
    torch.testing.assert_close(seen.squared_norms, states.double().square().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("decodes", "kind", "expected"),
    [
        (False, BertModel, BertModel),
        (True, BertModel, BertLMHeadModel),
        (False, BertForMaskedLM, BertForMaskedLM),
    ],
)
def test_a_folder_opens_as_the_class_it_names_and_a_decoder_as_a_causal_one(
    decodes, kind, expected, tmp_path
):
    config = tiny_encoder("bert").config
    config.architectures, config.is_decoder = [kind.__name__], decodes
    config.save_pretrained(tmp_path)
    assert type(open_skeleton(tmp_path, torch.float32)) is expected


@pytest.mark.parametrize(
    ("name", "linears"), [("bert", 18), ("vit", 18), ("whisper", 18), ("swin", 24), ("convnext", 8)]
)
def test_a_pruned_encoder_is_packed_and_opens_in_transformers(name, linears, tmp_path):
    model = tiny_encoder(name)
    inputs = inputs_for(model)
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "1_Pooling").mkdir()
    (tmp_path / "dense" / "1_Pooling" / "config.json").write_text("{}")
    record = tawny.prune(tmp_path / "dense", tmp_path / "pruned", calibration=inputs, **KEYS)
    assert record.sparsity == pytest.approx(0.5, abs=1e-3)
    assert record.text["seqlen"] == live_stack(model).enter(inputs).shape[1]
    pruned = type(model).from_pretrained(tmp_path / "pruned").eval()
    tawny.pack(tmp_path / "pruned", tmp_path / "packed", "f32")
    assert (tmp_path / "packed" / "1_Pooling" / "config.json").read_text() == "{}"
    with torch.no_grad():
        for packed in (
            tawny.load(tmp_path / "packed"),
            type(model).from_pretrained(tmp_path / "packed").eval(),
        ):
            assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == linears
            torch.testing.assert_close(packed(**inputs)[0], pruned(**inputs)[0], rtol=1e-4, atol=1e-4)
    tawny.unpack(tmp_path / "packed", tmp_path / "again")
    files = [folder / "model.safetensors" for folder in (tmp_path / "again", tmp_path / "pruned")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_embedding_without_a_head_is_packed_and_looked_up(tmp_path):
    model = tiny_encoder("bert")
    model.save_pretrained(tmp_path / "dense")
    small, large = (tmp_path / name for name in ("int8", "plain"))
    reports = [
        tawny.pack(tmp_path / "dense", out, "f32", head=head)
        for out, head in ((small, "int8"), (large, None))
    ]
    assert reports[1].bytes - reports[0].bytes > 10_000
    packed = AutoModel.from_pretrained(small)
    words = packed.embeddings.word_embeddings
    ids = inputs_for(model)["input_ids"]
    torch.testing.assert_close(words(ids), words.table.dense(torch.float32)[ids])
    torch.testing.assert_close(words(ids), model.embeddings.word_embeddings(ids), rtol=0, atol=0.02)
    tawny.unpack(small, tmp_path / "again")
    again = BertModel.from_pretrained(tmp_path / "again").embeddings.word_embeddings.weight
    torch.testing.assert_close(again, words.table.dense(torch.float32))


def test_a_live_encoder_is_pruned_and_refined_on_what_it_takes():
    model = tiny_encoder("vit")
    record = tawny.prune(
        model, sparsity=0.6, solver="wanda", calibration=inputs_for(model), **{"refine.epochs": 2}
    )
    assert record.sparsity == pytest.approx(0.6, abs=1e-3)
    assert len(record.refined) == 3


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_channels_and_heads_of_an_encoder_are_removed_whole(name):
    model = tiny_encoder(name)
    keys = {"sparsity": 0.25, "allocator": "uniform", "pattern": "channels+heads"}
    record = tawny.prune(model, calibration=inputs_for(model), **keys)
    assert record.sparsity == pytest.approx(0.25, abs=0.05)
    weights = dict(model.named_modules())
    gone = {x.name: int((weights[x.name].weight == 0).all(1).sum()) for x in record.linears}
    queries = [count for key, count in gone.items() if "query" in key or "q_proj" in key]
    assert queries and all(count % 8 == 0 for count in queries) and any(queries)


@pytest.mark.parametrize(
    ("name", "pattern", "said"),
    [
        ("vit", "blocks", "says nothing of tokens: choose --solver influence"),
        (
            "swinv2",
            "channels+heads",
            "mlp.2 belongs to the channels of .* and to the heads of .*: remove one",
        ),
        ("swinv2", "2:4", "needs widths that 4 divides, but .*bias_mlp.0 .512, 2."),
    ],
)
def test_a_pattern_that_does_not_fit_an_encoder_is_refused_in_one_line(name, pattern, said):
    model = tiny_encoder(name)
    with pytest.raises(UserError, match=said) as error:
        tawny.prune(model, sparsity=0.5, pattern=pattern, calibration=inputs_for(model))
    assert "\n" not in str(error.value)


def test_what_needs_the_next_token_is_refused(tmp_path):
    model = tiny_encoder("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="predicts no next token and so has no perplexity"):
        tawny.evaluate(model, inputs_for(model)["input_ids"])
    with pytest.raises(ModelError, match="predicts no next token, by which models are compared"):
        tawny.search(tmp_path, sparsity=0.5, calibration=inputs_for(model)["input_ids"])
    with pytest.raises(ModelError, match="decodes nothing"):
        tawny.bench(tmp_path)
    with pytest.raises(TextError, match="pixel_values here, and this works on tokens only"):
        _ = Samples(inputs_for(tiny_encoder("vit")), seqlen=17).tokens
