"""What the model's output feels of an error at one linear's outputs: the factor G of the Fisher information.

Where a weight changes by Δ, the model's output diverges by `½ E[(Σ_t g_tᵀ Δ x_t)²]` to second order, with x a linear's inputs and
g the gradient at its outputs of log p(y), y drawn from the model itself (the true Fisher, not the empirical one of the text's own
tokens). Without the terms between tokens and between x and g that is `½ tr(G Δ H Δᵀ)` nats a token, `G = E[g gᵀ]`, `H = E[x xᵀ]`:
Martens & Grosse 2015 (K-FAC, 1503.05671); van der Ouderaa 2024 (LLM Surgeon, 2312.17244) prunes with it.

G is kept whole up to `BLOCK` outputs, and by diagonal blocks of at most so many beyond, whose cost grows with the outputs only.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tawny.calibration.gram import add_squares, mirrored
from tawny.calibration.products import ExpertProducts, Fused, first_argument
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import Stream
from tawny.model.structure import TOKENS

Factor = Literal["none", "rows", "whole"]
FACTORS: tuple[Factor, ...] = ("none", "rows", "whole")  # each holds what the ones before it tell
Add = Callable[[Tensor, Tensor], None]
BLOCK = 2048  # outputs: an eigenbasis of so many takes seconds


def most_felt(wanted: Iterable[Factor]) -> Factor:
    """What serves all of them."""
    return max(wanted, key=FACTORS.index, default="none")


@dataclass(frozen=True)
class OutputFactor:
    """G at the outputs of ONE linear.

    Attributes:
        tokens: that the linear multiplied; of an expert, those routed to it.
        diagonal: `[out]` float32, E[g_i²] over these tokens, in nats² a squared unit of output.
        blocks: the diagonal blocks of G, each `[rows, rows]` float32, from the first rows to the last; none where only the
            diagonal was asked for.
    """

    tokens: int
    diagonal: Tensor
    blocks: Sequence[Tensor] = ()

    @property
    def mean(self) -> float:
        """The mean of the diagonal."""
        return float(self.diagonal.mean())

    def felt(self, D_OI: Tensor, H: Tensor, tokens: int) -> float:
        """½ tr(G D H Dᵀ), in nats a token that the linear multiplies.

        Args:
            D_OI: what the weight changes by.
            H: `XᵀX` of `tokens` inputs, `[in, in]` or its diagonal `[in]`.
        """
        rows_OI = D_OI @ H if H.dim() == 2 else D_OI * H
        if not self.blocks:
            total = self.diagonal.double() @ torch.linalg.vecdot(rows_OI, D_OI).double()
        else:
            total = self.diagonal.new_zeros((), dtype=torch.float64)
            for rows, G_RR in zip(diagonal_blocks(len(D_OI)), self.blocks, strict=True):
                total += torch.linalg.vecdot(G_RR @ D_OI[rows], rows_OI[rows]).double().sum()
        return 0.5 * float(total) / max(tokens, 1)


def diagonal_blocks(out: int, most: int = BLOCK) -> list[slice]:
    """The rows of each diagonal block: as few blocks as `most` rows allow, of equal size to within one row."""
    count = -(-out // most)
    edges = [out * place // count for place in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def factor_bytes(out: int, factor: Factor) -> int:
    """Memory of one factor while it is added up."""
    places = diagonal_blocks(out) if factor == "whole" else []
    squares: int = sum((rows.stop - rows.start) ** 2 for rows in places)
    return 8 * (squares + out)


class OutputAccumulator:
    """Adds up G over many chunks of tokens: a chunk in float32, and chunks in float64, so that their order does not matter."""

    def __init__(self, out: int, factor: Factor, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._places = diagonal_blocks(out) if factor == "whole" else []
        shapes: list[tuple[int, ...]] = [(rows.stop - rows.start,) * 2 for rows in self._places] or [(out,)]
        self.sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
        """The blocks, or the diagonal where it is enough: what several processes add up."""

    def add(self, g_TO: Tensor, _x_TI: Tensor | None = None) -> None:
        """Gradients `[tokens, out]` of any float dtype."""
        self.tokens += len(g_TO)
        g = g_TO.to(torch.float32)
        if not self._places:
            self.sums[0] += g.square().sum(0)  # a tenth of the time of `vector_norm`
            return
        for rows, G_RR in zip(self._places, self.sums, strict=True):
            add_squares(G_RR, g[:, rows], g_TO.dtype == torch.bfloat16)

    def finish(self) -> OutputFactor:
        """Means over the tokens; nothing can be added any more."""
        means = []
        while self.sums:  # one after another: they are large
            means.append(self.sums.pop(0).div_(max(self.tokens, 1)).float())
        if not self._places:
            return OutputFactor(self.tokens, means[0])
        blocks = tuple(map(mirrored, means))
        return OutputFactor(self.tokens, torch.cat([G_RR.diagonal() for G_RR in blocks]), blocks)


@contextlib.contextmanager
def watch_gradients(linears: Sequence[Linear], add: Mapping[str, Add], stream: Stream) -> Iterator[None]:
    """Inside, forwards through the loaded block of `linears` that are run backward are told, by linear name.

    Padding is not counted: nothing is felt of it. Experts count the tokens that were routed to them.

    Args:
        add: is given gradients `[tokens, out]` at the outputs, and inputs `[tokens, in]`.
    """
    experts = {(x.key, x.expert): add[x.name] for x in linears if x.expert is not None}
    padded = stream.samples.mask is not None

    def count(some: Sequence[Add | None], gaps: bool, x: Tensor, gradient: Tensor) -> None:
        apart = zip(x, gradient, strict=True) if len(some) > 1 else [(x, gradient)]
        for own, (x_TI, g_TO) in zip(some, apart, strict=True):
            x_TI, g_TO = x_TI.reshape(-1, x_TI.shape[-1]), g_TO.reshape(-1, g_TO.shape[-1])
            felt_T = g_TO.any(-1) if gaps else slice(None)
            if own is not None:
                own(g_TO[felt_T], x_TI[felt_T])

    def called(own: Add, _module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if output.requires_grad:
            _on_gradient(output, partial(count, [own], padded, first_argument(args, kwargs).detach()))

    def one(key: str, expert: int, x: Tensor, product: Tensor, _gathered: Tensor | None) -> None:
        if product.requires_grad and (key, expert) in experts:
            _on_gradient(product, partial(count, [experts[key, expert]], padded, x.detach()))

    def every(key: str, x: Tensor, product: Tensor) -> None:
        if product.requires_grad:
            some = [experts.get((key, e)) for e in range(len(product))]
            _on_gradient(product, partial(count, some, True, x.detach()))

    with contextlib.ExitStack() as leaving:
        for linear in linears:
            if linear.expert is None:
                hook = partial(called, add[linear.name])
                leaving.enter_context(linear.module.register_forward_hook(hook, with_kwargs=True))
        if fused := Fused.of(linears):
            leaving.enter_context(ExpertProducts(fused, one, every))
        yield


def _on_gradient(made: Tensor, call: Callable[[Tensor], None]) -> None:
    made.register_hook(call)  # type: ignore[no-untyped-call]


def gradient_of_drawn_tokens(
    stack: Stack, stream: Stream, chunk: int, seeds: Sequence[int], rows: int
) -> Tensor:
    """The gradient `[batch, tokens, hidden]` at the last block's outputs of Σ log p(y), each y drawn from what the model predicts.

    Args:
        stream: holds the last block's outputs.
        seeds: one for each sample of the chunk, which its draws depend on alone.
        rows: tokens whose logits are there at once.
    """
    hidden_BTH, tokens_ST = stream.hidden[chunk], stream.samples.tokens[stream.slices[chunk]]
    valid = stream.valid(chunk)
    gradient_BTH = torch.zeros_like(hidden_BTH)
    for sample, seed in enumerate(seeds):
        draws = torch.Generator().manual_seed(seed)
        for start in range(0, hidden_BTH.shape[1], rows):
            here = slice(start, start + rows)
            leaf = hidden_BTH[sample : sample + 1, here].detach().clone().requires_grad_()
            with torch.enable_grad():
                logits_TV = stack.tail({TOKENS: tokens_ST[sample : sample + 1, here]}, leaf)[0]
            chances_TV = logits_TV.detach().float().softmax(-1)
            even_T = torch.rand(len(chances_TV), generator=draws, dtype=torch.float64).to(leaf.device)
            drawn_T = _drawn(chances_TV, even_T)
            # The gradient of log p(y) at the logits: one where y is, less p.
            at_logits_TV = chances_TV.neg_()
            at_logits_TV[torch.arange(len(drawn_T)), drawn_T] += 1.0
            if valid is not None:
                at_logits_TV[~valid[sample, here].to(leaf.device)] = 0.0
            (felt,) = torch.autograd.grad(logits_TV, leaf, at_logits_TV.to(logits_TV.dtype))
            gradient_BTH[sample, here] = felt[0]
    return gradient_BTH


def _drawn(chances_TV: Tensor, even_T: Tensor) -> Tensor:
    """[T] one of V by its chance, from a number in [0, 1): first a group of neighbours, then one of these."""
    groups = math.isqrt(chances_TV.shape[1]) + 1
    size = -(-chances_TV.shape[1] // groups)
    padded_TV = nn.functional.pad(chances_TV, (0, groups * size - chances_TV.shape[1]))
    chances_TGS = padded_TV.view(-1, groups, size)
    below_TG = chances_TGS.sum(-1).double().cumsum(-1)
    at_T = even_T * below_TG[:, -1]
    group_T = torch.searchsorted(below_TG, at_T[:, None], right=True)[:, 0].clamp_(max=groups - 1)
    every_T = torch.arange(len(at_T), device=at_T.device)
    before_T = torch.where(group_T > 0, below_TG[every_T, (group_T - 1).clamp(min=0)], 0.0)
    share_T = (at_T - before_T) / (
        below_TG[every_T, group_T] - before_T
    )  # of the group's own sum, which is rounded
    below_TS = chances_TGS[every_T, group_T].double().cumsum(-1)
    place_T = torch.searchsorted(below_TS, (share_T * below_TS[:, -1])[:, None], right=True)[:, 0]
    return (group_T * size + place_T.clamp_(max=size - 1)).clamp_(max=chances_TV.shape[1] - 1)


def gradient_of_features(stack: Stack, stream: Stream, chunk: int, seeds: Sequence[int]) -> Tensor:
    """As `gradient_of_drawn_tokens`, of a model that predicts no tokens: its features, each with Gaussian noise of variance one."""
    part = stream.slices[chunk]
    leaf = stream.hidden[chunk].detach().clone().requires_grad_()
    with torch.enable_grad():
        features = stack.features(stream.samples.take(part).inputs, leaf)
        noise = [
            torch.randn(features.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        weights = torch.stack(noise).to(features)
        valid = stream.valid(chunk)
        if valid is not None and valid.shape == features.shape[:2]:
            weights *= valid.to(features)[..., None]
        (gradient,) = torch.autograd.grad((features * weights).sum(), leaf)
    return gradient
