from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from tawny.calibration.observe import observe
from tawny.calibration.suspended import can_suspend, in_lockstep
from tawny.model.stack import live_stack
from tawny.model.streams import Samples, Stream
from tests.tiny import tiny_model, tokens


def test_forwards_that_are_held_see_what_repeated_ones_see():
    stack = live_stack(tiny_model("llama"))
    linears = stack.linears(0)
    held, repeated = (Stream(stack, Samples(tokens(200, 24))) for _ in range(2))
    stages = observe(repeated, 0, linears, "none").stages
    assert can_suspend(stages, linears) and len(held) > 1
    with torch.no_grad():
        for stage, found in in_lockstep(held, 0, stages, "hessian", finish=True):
            again = observe(repeated, 0, stage.linears, "hessian").statistics
            assert found.keys() == again.keys()
            assert all(torch.equal(found[name].hessian, again[name].hessian) for name in found)
            for linear in stage.linears:  # what the next stages see, in both
                stack.weight(linear).mul_(0.5)
        observe(repeated, 0, linears, "none", advance=True)
    assert all(torch.equal(a, b) for a, b in zip(held.hidden, repeated.hidden, strict=True))


def test_a_walk_that_is_dropped_leaves_no_hook():
    stack = live_stack(tiny_model("llama"))
    stream, linears = Stream(stack, Samples(tokens(200, 24))), stack.linears(0)
    walk = in_lockstep(stream, 0, observe(stream, 0, linears, "none").stages, "norms", finish=False)
    next(walk)
    assert any(linear.module._forward_pre_hooks for linear in linears)
    walk.close()
    assert not any(linear.module._forward_pre_hooks for linear in linears)


def test_experts_run_alike_in_every_forward_that_is_held():
    model = tiny_model("qwen3_moe")
    stack = live_stack(model)
    before = model.config._experts_implementation
    linears = [linear for linear in stack.linears(0) if linear.expert is None]
    stream = Stream(stack, Samples(tokens(200, 24)))
    stages = observe(stream, 0, linears, "none").stages
    ran = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda *_: ran.append(model.config._experts_implementation))
    with torch.no_grad():
        for _ in in_lockstep(stream, 0, stages, "norms", finish=True):
            pass
    assert before != "eager" and ran == ["eager"] * len(stream) and len(stream) > 2
    assert model.config._experts_implementation == before


def test_a_configuration_inside_another_has_its_own_experts_again():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=tiny_model("qwen3_moe").config,
            vision_config=CLIPVisionConfig(**vision),
            image_token_index=1,
        )
    )
    text = model.config.get_text_config()
    model.config._experts_implementation = "eager"
    text._experts_implementation = "grouped_mm"
    with live_stack(model)._plain_experts():
        assert text._experts_implementation == "eager"
    assert (model.config._experts_implementation, text._experts_implementation) == ("eager", "grouped_mm")
