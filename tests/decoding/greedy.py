"""Whether a packed model says what the dense model with the same zeros says, up to the arithmetic's own ties.

How a tie is judged. Both models decode greedily from the same prompts; where they choose different tokens the packed
one goes on with the dense one's choice, so that every position of every prompt is compared. The two do the same sums
in another order, so their logits differ by rounding. How much rounding may do is measured without the packed model:
the dense model decodes with our matrix-vector kernel, token by token, and its logits are compared with those of one
forward of torch over the whole sequence. The largest difference of a logit over all positions is the arithmetic's
error `e`. A choice may differ only where the dense model's logits of the two tokens are less than 2e apart (each may be
wrong by e): there the arithmetic itself cannot tell them apart. And the packed model's logits may be no further than 2e
from the dense ones anywhere, so that it cannot hide behind ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tawny.decoding.decoder import Decoder
from tawny.decoding.swapped import kernels
from tawny.model.structure import find_stack


def prune(model):
    """Zeros at random, 7 in 10, in every linear of every block."""
    generator = torch.Generator().manual_seed(0)
    for module in find_stack(model)[1].modules():
        if isinstance(module, nn.Linear):
            module.weight.data[torch.rand(module.weight.shape, generator=generator) < 0.7] = 0
    return model


@dataclass
class Agreement:
    positions: int
    ties: int
    faults: list[str]
    error: float  # the arithmetic's
    difference: float  # between dense and packed


def greedy(model, prompt: Tensor, count: int, follow: list[int] | None = None) -> tuple[list[int], Tensor]:
    """Tokens chosen and logits `[count, vocabulary]`; with `follow`, those tokens are what is decoded."""
    chosen, logits = [], []
    with torch.inference_mode(), kernels(model):
        decoder = Decoder(model, len(prompt) + count)
        row = decoder.prefill(prompt)
        for index in range(count):
            logits.append(row.float().clone())
            chosen.append(int(row.argmax()))
            if index + 1 < count:
                row = decoder.step(follow[index] if follow else chosen[-1])
    return chosen, torch.stack(logits)


def compare(dense, packed, prompts: list[Tensor], count: int) -> Agreement:
    runs = []
    error = difference = 0.0
    for prompt in prompts:
        said, logits = greedy(dense, prompt, count)
        other, other_logits = greedy(packed, prompt, count, said)
        with torch.inference_mode():
            whole = dense(input_ids=torch.cat([prompt, torch.tensor(said[:-1])])[None]).logits[0]
        error = max(error, float((whole[len(prompt) - 1 :].float() - logits).abs().max()))
        difference = max(difference, float((other_logits - logits).abs().max()))
        runs.append((said, other, logits))
    ties, faults = 0, []
    for number, (said, other, logits) in enumerate(runs):
        for at, (a, b) in enumerate(zip(said, other, strict=True)):
            if a != b:
                gap = float(logits[at, a] - logits[at, b])
                ties += gap <= 2 * error
                if gap > 2 * error:
                    faults.append(f"prompt {number}, token {at}: {a} and {b} are {gap:.3g} apart")
    if difference > 2 * error:
        faults.append(f"logits differ by {difference:.3g}, rounding by {error:.3g}")
    return Agreement(len(prompts) * count, ties, faults, error, difference)
