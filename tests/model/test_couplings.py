"""Which rows and columns are found to go together, and which models are refused."""

from __future__ import annotations

import pytest
import torch

import tawny
from tawny.errors import ModelError
from tawny.model.couplings import couple, find_couplings
from tawny.model.stack import live_stack
from tests.tiny import tiny_model, tokens

# Family → (kind, members, rows a member in all producers, columns a member) of each coupling of the first block.
FOUND = {
    "llama": [("heads", 2, 32, 16), ("channels", 48, 2, 1)],
    "qwen3": [("heads", 2, 32, 16), ("channels", 48, 2, 1)],
    "gpt2": [("heads", 4, 24, 8), ("channels", 128, 1, 1)],
    "gpt_neox": [("heads", 4, 24, 8), ("channels", 48, 1, 1)],
    "mixtral": [("heads", 2, 32, 16), *[("channels", 48, 2, 1)] * 4],
    "falcon": [("channels", 128, 1, 1)],  # one key-value group cannot leave
    "olmo2": [("channels", 48, 2, 1)],  # a norm over all heads
}


@pytest.mark.parametrize("family", FOUND)
def test_members_are_found_by_structure(family):
    stack = live_stack(tiny_model(family))
    found = find_couplings(stack)
    shapes = [
        (x.kind, x.members, sum(rows.index_GR.shape[1] for rows in x.producers), x.columns_GC.shape[1])
        for x in found[0]
    ]
    assert shapes == FOUND[family] and len(found) == len(stack)
    for couplings in found:
        for coupling in couplings:
            for rows in coupling.producers:  # every row belongs to one member
                assert rows.index_GR.flatten().sort().values.tolist() == list(range(rows.linear.shape[0]))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_rows_of_members_whose_columns_are_zero_make_no_difference(family):
    model = tiny_model(family)
    stack, ids = live_stack(model), tokens(2, 12)
    dice = torch.Generator().manual_seed(1)
    gone = []
    for coupling in (x for some in find_couplings(stack) for x in some):
        leaves_G = torch.rand(coupling.members, generator=dice) < 0.5
        W = stack.weight(coupling.consumer)
        stack.set_weight(coupling.consumer, W.index_fill_(1, coupling.columns_GC[leaves_G].flatten(), 0))
        gone.append((coupling, leaves_G))
    with torch.no_grad():
        expected = model(ids).logits
        for coupling, leaves_G in gone:
            for rows in coupling.producers:
                W = stack.weight(rows.linear)
                stack.set_weight(rows.linear, W.index_fill_(0, rows.index_GR[leaves_G].flatten(), 0))
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)


def test_what_cannot_be_proven_or_is_chosen_in_part_is_refused_in_one_line():
    for family, keys, said in (
        ("falcon", {"pattern": "channels"}, "self_attention.*is in no coupling.*exclude"),
        ("falcon", {"pattern": "heads", "exclude": "self_attention.*"}, "has no heads"),
        ("llama", {"pattern": "channels", "exclude": "up_proj"}, "need .*up_proj too"),
    ):
        with pytest.raises(ModelError, match=said):
            tawny.prune(tiny_model(family), sparsity=0.3, solver="magnitude", allocator="uniform", **keys)
    made = tawny.prune(
        tiny_model("falcon"), sparsity=0.25, pattern="channels", solver="magnitude", allocator="uniform",
        exclude="self_attention.*",
    )  # fmt: skip
    assert made.sparsity == pytest.approx(0.25)


def test_a_weight_that_is_used_outside_its_block_is_refused():
    model = tiny_model("llama", vocab_size=48)
    model.model.layers[1].mlp.up_proj.weight = model.model.embed_tokens.weight
    stack = live_stack(model)
    with pytest.raises(ModelError, match=r"up_proj\.weight is tied"):
        couple(stack, [stack.linears(index) for index in range(len(stack))], ["channels"])
