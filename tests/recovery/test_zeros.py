from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tawny
from tawny.errors import ModelError
from tawny.recovery.zeros import SparsityGuard
from tests.tiny import tiny_model, tokens

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8, dtype=dtype) for _ in range(2))
        self.head = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)) + x
        return self.head(x)


def pruned_net(dtype: torch.dtype, sparsity: float, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net(dtype)
    cut(net, sparsity)
    return net


@torch.no_grad()
def cut(net: Net, sparsity: float) -> None:
    for block in net.blocks:
        block.weight[torch.rand(8, 8) < sparsity] = 0
        block.weight[0, 0] = 0


def zeros(model: nn.Module) -> list[torch.Tensor]:
    return [block.weight.detach() == 0 for block in model.blocks]


def same(before: list[torch.Tensor], net: nn.Module) -> bool:
    return all(torch.equal(was, now) for was, now in zip(before, zeros(net), strict=True))


def steps(net, optimiser, count, dtype, clip=False):
    for index in range(count):
        torch.manual_seed(index)
        loss = net(torch.randn(5, 8, dtype=dtype)).float().square().mean()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimiser.step()
        optimiser.zero_grad()


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(OPTIMISERS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sparsity=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    early=st.booleans(),
    clip=st.booleans(),
    seed=st.integers(0, 5),
)
def test_not_one_zero_is_lost_to_any_optimiser(name, dtype, sparsity, early, clip, seed):
    net = pruned_net(dtype, 0.0, seed)
    optimiser = OPTIMISERS[name](net.parameters())
    if early:  # momentum from dense steps would move a zero although its gradient is masked
        steps(net, optimiser, 2, dtype)
    cut(net, sparsity)
    before = zeros(net)
    start = copy.deepcopy(net.state_dict())
    with tawny.keep_sparsity(net) as guard:
        if not early:
            optimiser = OPTIMISERS[name](net.parameters())
        steps(net, optimiser, 4, dtype, clip)
        assert all(bool((now | ~was).all()) for was, now in zip(before, zeros(net), strict=True))
    assert guard.zeros == sum(int(was.sum()) for was in before) and guard.changed == {}
    assert all(bool((now | ~was).all()) for was, now in zip(before, zeros(net), strict=True))
    assert not torch.equal(net.head.weight, start["head.weight"])  # the rest did train


def test_an_update_that_is_dense_by_design_is_undone():
    net = pruned_net(torch.float32, 0.5)
    before = zeros(net)
    optimiser = torch.optim.Muon([block.weight for block in net.blocks], lr=0.1)
    with tawny.keep_sparsity(net):
        steps(net, optimiser, 3, torch.float32)
        assert same(before, net)


def test_masked_training_is_what_training_only_the_survivors_gives():
    net = pruned_net(torch.float32, 0.5)
    twin = copy.deepcopy(net)
    masks = [~zero for zero in zeros(net)]
    with tawny.keep_sparsity(net):
        steps(net, torch.optim.AdamW(net.parameters(), lr=1e-2), 3, torch.float32, clip=True)
    optimiser = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for index in range(3):
        torch.manual_seed(index)
        twin(torch.randn(5, 8)).square().mean().backward()
        for block, mask in zip(twin.blocks, masks, strict=True):
            block.weight.grad *= mask
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            for block, mask in zip(twin.blocks, masks, strict=True):
                block.weight *= mask
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_that_other_code_changes_is_put_back_and_told_once():
    net = pruned_net(torch.float32, 0.5)
    before = zeros(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"zeros of 1 linears \(first 'blocks.1'\) were changed") as told:
        with tawny.keep_sparsity(net) as guard:
            for _ in range(2):
                net.blocks[1].weight.data[0, 0] = 3.0
                steps(net, optimiser, 1, torch.float32)
        assert guard.changed == {"blocks.1": 2}
    assert len(told) == 1 and same(before, net)


def test_a_strict_guard_raises_where_a_mask_is_changed():
    net = pruned_net(torch.float32, 0.5)
    said = "by something else than the optimiser"
    with pytest.raises(ModelError, match=said), tawny.keep_sparsity(net, strict=True):
        net.blocks[0].weight.data.fill_(1.0)
    assert bool((net.blocks[0].weight == 0).any())


def test_the_guard_lets_go_at_the_end_even_after_an_error():
    net = pruned_net(torch.float32, 0.5)
    with pytest.raises(ZeroDivisionError), tawny.keep_sparsity(net):
        raise ZeroDivisionError
    steps(net, torch.optim.SGD(net.parameters(), lr=0.1), 1, torch.float32)
    assert not any(bool(zero.any()) for zero in zeros(net))


def test_a_model_without_zeros_is_refused():
    with pytest.raises(ModelError, match="holds no zero in any linear"):
        tawny.keep_sparsity(Net(torch.float32)).__enter__()


def test_a_zero_outside_the_stack_is_not_held():
    net = pruned_net(torch.float32, 0.5)
    nn.init.zeros_(net.head.weight)
    with tawny.keep_sparsity(net):
        steps(net, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1), 1, torch.float32)
        net.head(torch.ones(1, 8)).sum().backward()
    assert bool((net.head.weight.grad != 0).any())


def test_a_guard_that_died_without_saying_so_masks_no_gradient():
    net = pruned_net(torch.float32, 0.5)
    guard = SparsityGuard(net)
    del guard
    net(torch.ones(2, 8)).sum().backward()
    assert all(bool((block.weight.grad[block.weight == 0] != 0).any()) for block in net.blocks)


def test_weights_that_are_sharded_are_refused():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = pruned_net(torch.float32, 0.5)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ModelError, match=r"blocks.0.weight is sharded.*expected whole weights"):
            tawny.keep_sparsity(net).__enter__()
    finally:
        dist.destroy_process_group()


# --- other people's loops ------------------------------------------------------------------------------------------


def pruned_decoder(family: str = "llama", **changes):
    model = tiny_model(family, **changes)
    tawny.prune(model, sparsity=0.5, allocator="uniform", solver="magnitude")
    return model


def decoder_zeros(model) -> dict[str, torch.Tensor]:
    found = {name: value.detach() == 0 for name, value in model.named_parameters() if value.dim() > 1}
    return {name: zero for name, zero in found.items() if zero.float().mean() > 0.3}


def test_the_callback_keeps_zeros_in_a_trainer(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = pruned_decoder()
    before = decoder_zeros(model)
    assert len(before) >= 21
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, weight_decay=0.1,
        disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    start = model.model.norm.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(model, arguments, train_dataset=rows, callbacks=[tawny.SparsityCallback()]).train()
    after = dict(model.named_parameters())
    assert all(bool((after[name] == 0)[zero].all()) for name, zero in before.items())
    assert not torch.equal(start, model.model.norm.weight)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize(("family", "bias"), [("llama", False), ("gpt2", False), ("gpt2", True)])
def test_a_lora_merges_into_exactly_the_model_that_was_trained(family, bias):
    peft = pytest.importorskip("peft")

    model = pruned_decoder(family)
    before = decoder_zeros(model)
    targets = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_fc"]
    config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=family == "gpt2", lora_bias=bias)
    adapted = peft.get_peft_model(model, config)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-2)
    ids = tokens(2)
    adapted.eval()
    with tawny.keep_sparsity(adapted):
        for _ in range(3):
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        assert not bias or any(
            bool(p.any()) for n, p in adapted.named_parameters() if "lora_B" in n and "bias" in n
        )
        with torch.no_grad():
            trained = adapted(input_ids=ids).logits
    merged = tawny.merge_adapter(adapted)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, trained, atol=2e-4, rtol=1e-3)
    after = dict(merged.named_parameters())
    assert all(bool((after[name] == 0)[zero].all()) for name, zero in before.items())
    assert sum(int((after[n] == 0).sum()) for n in before) == sum(int(z.sum()) for z in before.values())


def adapted_decoder(peft):
    """A pruned model with a LoRA whose product is not zero."""
    adapted = peft.get_peft_model(pruned_decoder(), peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_an_adapter_whose_guard_died_adds_its_whole_product():
    peft = pytest.importorskip("peft")

    adapted = adapted_decoder(peft)
    ids = tokens(2)
    whole = adapted(input_ids=ids).logits
    guard = SparsityGuard(adapted)
    assert not torch.allclose(adapted(input_ids=ids).logits, whole)
    del guard
    assert torch.equal(adapted(input_ids=ids).logits, whole)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_a_guard_inside_another_leaves_it_in_place():
    peft = pytest.importorskip("peft")

    adapted = adapted_decoder(peft)
    ids = tokens(2)
    whole = adapted(input_ids=ids).logits
    with tawny.keep_sparsity(adapted):
        masked = adapted(input_ids=ids).logits
        with tawny.keep_sparsity(adapted):
            assert torch.equal(adapted(input_ids=ids).logits, masked)
        assert torch.equal(adapted(input_ids=ids).logits, masked) and not torch.equal(masked, whole)
    assert torch.equal(adapted(input_ids=ids).logits, whole)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_a_lora_of_fused_experts_is_refused():
    peft = pytest.importorskip("peft")

    model = pruned_decoder("qwen3_moe")
    experts = next(name for name, p in model.named_parameters() if name.endswith("experts.gate_up_proj"))
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=[experts.partition("layers.0.")[2]]
    )
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ModelError, match="all experts at once"), tawny.keep_sparsity(adapted):
        pass
    adapted(input_ids=tokens(2))  # nothing of the guard is left


def test_merging_nothing_is_refused():
    with pytest.raises(ModelError, match="carries no peft adapter"):
        tawny.merge_adapter(pruned_decoder())
