"""What stays of a mixture is refitted to what the whole mixture gave: the samples of one block as numbers for the solver.

The tokens of all samples are in memory while a block is refitted, with what the output misses for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tawny.calibration.products import ExpertProducts, Fused
from tawny.model.mixtures import Mixture, real_tokens, routed, without
from tawny.model.stack import Stack
from tawny.run.walk import Block
from tawny.solvers.experts import Missing, refit_experts


def refit_block(block: Block, name: str, mixture: Mixture, gone: Tensor) -> dict[str, float]:
    """Refit the experts of a loaded block that stay, on a stream that has not advanced.

    Returns:
        ‖dense output − output‖² over ‖dense output‖² of the mixture, `before` and `after`.
    """
    stack, run, stream = block.stack, block.run, block.streams[name]
    parts, whole = [], torch.zeros(3, dtype=torch.float64)  # dense, before, after
    for chunk in range(len(stream)):
        call, valid = stream.call(block.index, chunk), stream.valid(chunk)
        with routed(mixture) as calls:
            stack.forward(block.index, stream.hidden[chunk].clone(), call)
            with without(mixture, gone):
                stack.forward(block.index, stream.hidden[chunk].clone(), call)
        dense, left = (real_tokens(valid, one) for one in calls)
        missing_TH = dense.output.float() - left.output.float()
        whole[0] += dense.output.float().square().sum(dtype=torch.float64).cpu()
        whole[1] += missing_TH.square().sum(dtype=torch.float64).cpu()
        parts.append(Missing(left.tokens, left.picked, left.gates, missing_TH))
        run.progress.detail("observing what is missing", chunk + 1, len(stream))
    down, _ = _last_product(stack, mixture, parts[0].tokens[:1], 0)
    linears = {linear.expert: linear for linear in mixture.linears if linear.key == down}

    def entering(x_NH: Tensor, expert: int) -> Tensor:
        return _last_product(stack, mixture, x_NH, expert)[1]

    def renew(expert: int, change_OI: Tensor) -> Tensor:
        W_OI = stack.stored_weight(linears[expert]).float()
        return stack.set_weight(linears[expert], W_OI + change_OI).to(stack.device).float() - W_OI

    stay = [expert for expert in range(mixture.count) if expert not in gone.tolist()]
    refit_experts(parts, stay, linears[0].shape, entering, renew, run.ranks.sum)
    whole[2] = sum(float(part.missing.square().sum(dtype=torch.float64)) for part in parts)
    run.ranks.sum([whole])
    dense_energy = max(float(whole[0]), 1e-300)
    return {"before": float(whole[1]) / dense_energy, "after": float(whole[2]) / dense_energy}


def _last_product(stack: Stack, mixture: Mixture, x_NH: Tensor, expert: int) -> tuple[str, Tensor]:
    """The parameter that makes an expert's output, and its inputs `[N, I]`."""
    parameters = {x.key: x for x in mixture.linears}.values()
    fused = [Fused(x.key, x.module.get_parameter(x.parameter), x.transposed) for x in parameters]
    products: list[tuple[str, Tensor]] = []
    watch = ExpertProducts(
        fused,
        lambda key, _expert, x, _product, _gathered: products.append((key, x)),
        lambda key, x_ENI, _product: products.append((key, x_ENI[expert])),
    )
    picked_N1 = torch.full((len(x_NH), 1), expert, device=x_NH.device)
    with stack.plain_experts(), watch:
        mixture.outputs(x_NH, picked_N1, x_NH.new_ones(len(x_NH), 1))
    return products[-1]
