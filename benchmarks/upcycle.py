"""A mixture made of a dense model: a stand-in where no mixture of real size can be had.

    python benchmarks/upcycle.py --out MIXTURE --text wiki

The strongest half of each FFN's channels becomes a shared expert, the others are split into `--experts`, of channels that are
active together. A router learns which experts a token needs, the `--picks` of the largest outputs. Then the down projections
are refitted by least squares to what the dense FFN gave, a few sweeps over all experts. The result is a Qwen2-MoE, which plain
transformers opens: gates are nearly equal, so that the shared and the picked experts sum to about the dense output. At the end
it says how near it is to its source.

It has no redundancy that training a mixture would give: what is measured on it says how methods compare, not what a real
mixture can lose.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from harness import parser_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import tawny
from tawny.evaluation.perplexity import windows_of
from tawny.model.source import load_tokenizer, resolve

GATES = 0.1  # standard deviation of the router's scores: gates of picked experts differ by about a tenth
STEPS, RATE = 100, 0.03  # of the router
DAMP = 0.01  # of the mean of the diagonal, towards the weights that were
KEYS = ("gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", default="wiki")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--picks", type=int, default=8)
    parser.add_argument(
        "--windows", type=int, default=16, help="of 512 tokens, after those that are evaluated on"
    )
    parser.add_argument(
        "--skip", type=int, default=16, help="windows at the beginning that are left to evaluate on"
    )
    parser.add_argument("--sweeps", type=int, default=2)
    args = parser.parse_args()
    upcycle(args)
    near = tawny.agreement(str(args.out), args.model, args.text, seqlen=512, windows=8)
    print(f"KL {near.kl:.4f}, first choices {near.top1:.1%}, perplexity {near.perplexity.perplexity:.2f}")


@torch.no_grad()
def upcycle(args: argparse.Namespace) -> None:
    folder = resolve(args.model)
    tokenizer = load_tokenizer(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = windows_of(args.text, 512, args.skip + args.windows, None, tokenizer).ids[args.skip :]
    entering = inputs_of_ffns(dense, ids)
    config = dense.config.to_dict()
    keys = {key: config[key] for key in Qwen2MoeConfig().to_dict() if key in config and key != "model_type"}
    keys |= {
        "architectures": ["Qwen2MoeForCausalLM"],
        "shared_expert_intermediate_size": (shared := config["intermediate_size"] // 2),
        "moe_intermediate_size": (config["intermediate_size"] - shared) // args.experts,
        "num_experts": args.experts,
        "num_experts_per_tok": args.picks,
        "norm_topk_prob": True,
        "qkv_bias": False,
    }
    mixture = Qwen2MoeForCausalLM(Qwen2MoeConfig(**keys)).eval()
    rest = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    mixture.load_state_dict(rest, strict=False)
    for index, x_TH in enumerate(entering):
        source: Any = dense.model.layers[index].mlp
        split(source, mixture.model.layers[index].mlp, x_TH.float(), args.sweeps, index)
    mixture.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def inputs_of_ffns(model: Any, ids: Tensor) -> list[Tensor]:
    """`[T, H]` bfloat16 of each block."""
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, args, own=own: own.append(args[0].flatten(0, 1).bfloat16())
        )
        for layer, own in zip(model.model.layers, seen, strict=True)
    ]
    for window in ids:
        model.model(window[None])
    for hook in hooks:
        hook.remove()
    return [torch.cat(own) for own in seen]


def split(ffn: Any, mixture: Any, x_TH: Tensor, sweeps: int, index: int) -> None:
    """Make the experts and the router of one block."""
    experts, router, shared = mixture.experts, mixture.gate, mixture.shared_expert
    count, picks = len(experts.down_proj), router.top_k
    G, U, D = (getattr(ffn, key).weight for key in KEYS)
    activations_TC = nn.functional.silu(x_TH @ G.T) * (x_TH @ U.T)
    strength_C = activations_TC.square().mean(0) * D.square().sum(0)
    order_C = strength_C.argsort(descending=True)
    common, rest = order_C[: len(order_C) // 2], order_C[len(order_C) // 2 :]
    mixture.shared_expert_gate.weight.zero_()  # its sigmoid is a half
    for key, W in zip(KEYS, (G[common], U[common], 2 * D[:, common]), strict=True):
        getattr(shared, key).weight.copy_(W)
    dense_TH = activations_TC[:, rest] @ D[:, rest].T
    whole = float((activations_TC @ D.T).square().sum())
    members = [rest[some] for some in clusters(activations_TC[:, rest].abs() * D[:, rest].norm(dim=0), count)]
    sizes_TE = torch.stack([(activations_TC[:, some] @ D[:, some].T).norm(dim=1) for some in members], 1)
    needed_TE = torch.zeros_like(sizes_TE).scatter_(1, sizes_TE.topk(picks).indices, 1.0)
    for expert, some in enumerate(members):
        experts.gate_up_proj[expert] = torch.cat([G[some], U[some]])
        experts.down_proj[expert] = picks * D[:, some]
    router.weight.copy_(learnt(x_TH, needed_TE))
    _, gates, picked = router(x_TH)
    agreed = float(needed_TE.gather(1, picked).mean())
    missing_TH = dense_TH - experts(x_TH, picked, gates)
    before = float(missing_TH.square().sum()) / whole
    for _ in range(sweeps):
        refit(experts, x_TH, picked, gates, missing_TH)
    after = float(missing_TH.square().sum()) / whole
    print(
        f"block {index}: {agreed:.0%} of the experts needed are picked, missing {before:.3f} to {after:.3f}",
        flush=True,
    )


def refit(experts: Any, x_TH: Tensor, picked_TK: Tensor, gates_TK: Tensor, missing_TH: Tensor) -> None:
    """Move the down projection of one expert after the other to where the least is missing, by least squares."""
    for expert in picked_TK.unique().tolist():
        rows, places = (picked_TK == expert).nonzero(as_tuple=True)
        gate_NI, up_NI = (x_TH[rows] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        A_NI = gates_TK[rows, places, None] * nn.functional.silu(gate_NI) * up_NI
        H_II = A_NI.T @ A_NI
        H_II.diagonal().add_(DAMP * H_II.diagonal().mean())
        change_IO = torch.linalg.solve(H_II, A_NI.T @ missing_TH[rows])
        experts.down_proj[expert] += change_IO.T
        missing_TH[rows] -= A_NI @ change_IO


def clusters(active_TC: Tensor, count: int) -> list[Tensor]:
    """Channels in groups of one size: those that go best with the strongest one that is left, again and again."""
    unit_TC = active_TC - active_TC.mean(0)
    unit_TC /= unit_TC.norm(dim=0).clamp(min=1e-12)
    alike_CC, left = unit_TC.T @ unit_TC, active_TC.square().sum(0)
    groups = []
    for _ in range(count):
        near_C = alike_CC[left.argmax()].masked_fill(left < 0, -torch.inf)
        groups.append(near_C.topk(len(left) // count).indices)
        left[groups[-1]] = -1
    return groups


@torch.enable_grad()
def learnt(x_TH: Tensor, needed_TE: Tensor) -> Tensor:
    """A router's weight `[E, H]`, by logistic regression."""
    scale_H = x_TH.square().mean(0).sqrt().clamp(min=1e-6)
    W_EH = nn.Parameter(torch.zeros(needed_TE.shape[1], x_TH.shape[1]))
    optimizer = torch.optim.Adam([W_EH], lr=RATE)
    x_TH, needed_TE = x_TH[::2] / scale_H, needed_TE[::2]
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        loss = nn.functional.binary_cross_entropy_with_logits(x_TH @ W_EH.T, needed_TE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    W_EH = W_EH.detach()
    return GATES * W_EH / (x_TH @ W_EH.T).std() / scale_H


if __name__ == "__main__":
    main()
