from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tawny
from tawny.decoding.sampling import Sampler
from tawny.decoding.scheduler import Scheduler, TextRequest, Usage
from tawny.errors import RecipeError
from tawny.model.context import check_context, context_of, hard_context_of, longest_text
from tests.tiny import FAMILIES, tiny_config, tiny_model, tokens

TABLES = {"gpt2", "opt"}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_table_of_positions_ends_a_context(family):
    model = tiny_model(family)
    assert hard_context_of(model) == (128 if family in TABLES else None)
    beyond = tokens(1, 200)
    if family in TABLES:
        with pytest.raises(RecipeError, match=r"seqlen 200 .* context of 128; give --seqlen 128"):
            check_context(model, 200)
        with pytest.raises(IndexError), torch.no_grad():
            model(input_ids=beyond)
    else:
        check_context(model, 200)
        assert tawny.evaluate(model, beyond).tokens == 199


def of(family, **sizes):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=256, **sizes))


def test_a_table_that_the_model_makes_itself_ends_it_too():
    model = of("gptj", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    assert context_of(model) == hard_context_of(model) == 64


def test_a_table_that_is_made_in_every_forward_ends_it_too():
    model = of("mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    assert context_of(model) == hard_context_of(model) == 64
    keys = {"sparsity": 0.5, "allocator": "uniform", "solver": "wanda"}
    with pytest.raises(RecipeError, match="context of 64; give --seqlen 64"):
        tawny.prune(model, calibration=tokens(2, 65), **keys)
    assert tawny.prune(model, calibration=tokens(2, 64), **keys).zeros


def test_widths_that_happen_to_be_the_context_are_no_table():
    model = tiny_model("llama", hidden_size=128, intermediate_size=128, max_position_embeddings=128)
    for parameter in model.parameters():
        parameter.data[torch.rand(parameter.shape) < 0.7] = 0
    assert hard_context_of(model) is None
    assert hard_context_of(tawny.pack_model(model, head="int8")) is None
    assert hard_context_of(tiny_model("llama", max_position_embeddings=256)) is None  # as many as words


def test_a_model_without_weights_in_memory_can_be_asked():
    with torch.device("meta"):
        assert hard_context_of(AutoModelForCausalLM.from_config(tiny_config("gpt2"))) == 128


@pytest.mark.parametrize(
    ("more", "expected"), [({}, 128), ({"rope_type": "linear"}, 128), ({"rope_type": "yarn"}, 512)]
)
def test_a_model_with_yarn_is_made_for_the_length_of_its_factor(more, expected):
    """Qwen's cards leave `max_position_embeddings` at the length that was trained."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    model = tiny_model("llama", max_position_embeddings=128, rope_parameters=rope | more)
    assert context_of(model) == longest_text(model) == expected
    if more:
        unsaid = tiny_model("llama", max_position_embeddings=128, rope_parameters=rope | more)
        unsaid.config.rope_parameters["factor"] = None
        assert context_of(unsaid) == 128
    named = tiny_model("llama", max_position_embeddings=512, rope_parameters=rope | more)
    assert context_of(named) == 512


def test_a_text_ends_where_positions_that_begin_behind_the_padding_do():
    model = tiny_model("roberta", max_position_embeddings=34, pad_token_id=1, is_decoder=True)
    assert context_of(model) == 34 and longest_text(model) == 32
    with torch.inference_mode():
        scheduler = Scheduler(model, None, 99, 2)
        heard = [[], []]
        for number, listener in enumerate(heard):
            scheduler.submit(TextRequest(tokens(1, 28, number)[0], Sampler(0.0), None), listener.append)
        while scheduler.busy:
            scheduler.turn()
    for events in heard:
        assert isinstance(events[-1], Usage)
        assert events[-1].finish == "stop" or events[-1].made == 4
