"""Block reconstruction: train what a pruned block has left until it gives the dense block's outputs again.

EBFT, Guo et al. 2024 (2402.12419). A block's mask is fixed; its surviving weights, norms and biases are trained by
Adam so that the pruned block, fed what the pruned blocks before it give, puts out what the dense block puts out
after dense blocks:

    min over θ of  Σ_t Σ_h c_h (f(x_t; θ, mask) − y_t)²_h / ‖y_t‖²,   x from the pruned stream, y from the dense one,

    c_h ~ 1 / max(v_h, median v),   v_h the mean over tokens of y²_th / ‖y_t‖²

Both divisions are ours: what follows a block looks at it through a norm, whose gains make up for what channels differ in, so an
error counts against the size of its own token, and in a channel of more than the usual energy against that. As a share of
all energy it would be told against a few tokens, often the first of a sample, and a few channels, whose activations are
thousands of times larger (Sun et al. 2024, 2402.17762): such tokens hold 55 to 97 % of the energy in two thirds of
SmolLM2-135M's blocks; and of what any token has, five channels of 576 hold half there, and 74 to 98 % in Gemma 3 270M's.

What this file promises:

- Zeros stay zero, weights outside the pruned linears, norms and biases stay as they are, bit by bit.
- Some samples are held out and never trained on. The state that does best on them is kept, measured as it will be
  stored; where none does better than the start, every bit stays as it was.
- Masters, momenta and sums of gradients are float32, forwards run in the dtype of the stack, and the result is
  rounded to the dtype of the checkpoint, or to another that is to be written, once, at the end.
- A weight that was solved on a grid of few bits is trained through it, scales and levels (packed/on_grid.py), and stays there.
- The same samples, options and seed give the same bytes.

Steps are relative, as in Adafactor (1804.04235): a tensor moves by about `lr` times the root mean square of its own
survivors, so that one value serves a norm near 1 and a weight near 0.02, and a small model as well as a large one.

Held in memory, a weight of one block: 16 bytes (master, two momenta, gradient), its mask, and the best state in the
dtype of the checkpoint, beside what the walk holds anyway.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tawny.errors import TextError
from tawny.kinds import Kind
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import CHUNK_TOKENS, Stream
from tawny.packed.on_grid import OnGrid
from tawny.recipe.schema import Refinement

_BETAS = (0.9, 0.95)  # a run has tens of steps, not thousands: the second momentum forgets within one
_EPSILON = 1e-12
_WARMUP = 0.05  # of all steps
_LEAST = 1e-6  # of the mean of all: what a usual channel has at least, should most be dead
_SMALLEST = 1e-3  # what a tensor of zeros counts as when its steps are measured


@dataclass
class Refined:
    """What became of one block; losses are the error of tokens held out, 1 where nothing is put out."""

    block: int
    before: float
    after: float
    epochs: int = 0
    best_epoch: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    also: list[str] = field(default_factory=list)  # norms and biases that were changed
    stopped: str = ""


def holds_out(samples: int, options: Refinement, seed: int) -> tuple[list[int], list[int]]:
    """Samples to train on and samples held out; the same for every block.

    Raises:
        TextError: one sample cannot be both.
    """
    if samples < 2:
        raise TextError(
            f"refine.epochs={options.epochs} holds samples out to know when to stop, but there is {samples}; "
            "give at least 2 (--samples), or refine.epochs=0"
        )
    held = min(samples - 1, max(1, round(samples * options.holdout)))
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


def refine(
    stack: Stack,
    index: int,
    inputs: Stream,
    targets: Stream,
    linears: Sequence[Linear],
    solved: Mapping[str, Tensor],
    options: Refinement,
    seed: int,
    step: Callable[[int, int], None] = lambda done, total: None,
    dtype: torch.dtype | None = None,
    kinds: Mapping[str, tuple[Kind, int | None]] | None = None,
) -> Refined:
    """Train block `index`, which is loaded and pruned, in place.

    Args:
        inputs: the pruned stream in front of the block.
        targets: the dense stream after the block.
        linears: the pruned ones.
        solved: their weights in float32, before they were rounded; a missing one starts from the stored weight.
        seed: of the recipe.
        step: told how many of how many forwards are done.
        dtype: that the block will be written in, where it is not the checkpoint's.
        kinds: of few bits, with columns a scale, by linear: forwards then see its levels, and its scales are trained.
    """
    start = time.perf_counter()
    train, held = holds_out(len(inputs.samples), options, seed)
    pairs = _Pairs(stack, index, inputs, targets)
    with ExitStack() as stacked:
        stacked.enter_context(_borrowed(stack.model.parameters()))
        trained = _trained(stack, index, linears, solved, dtype, kinds or {})
        for entry in trained:
            stacked.callback(entry.close)
        before = pairs.loss(held)
        refined = Refined(index, before, before)
        if before > 0 and math.isfinite(before):
            _train(pairs, trained, train, held, options, seed, refined, step)
        elif not math.isfinite(before):
            refined.stopped = "the loss is not finite before the first step"
        for entry in trained:
            entry.finish()
        refined.also = [entry.name for entry in trained if entry.keep is None and entry.changed]
    refined.seconds = round(time.perf_counter() - start, 3)
    return refined


def _train(
    pairs: _Pairs,
    trained: list[_Trained],
    train: Sequence[int],
    held: Sequence[int],
    options: Refinement,
    seed: int,
    made: Refined,
    step: Callable[[int, int], None],
) -> None:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + made.block + 1) % 2**63)
    steps = -(-len(train) // options.batch)
    total, number = steps * options.epochs, 0
    for epoch in range(1, options.epochs + 1):
        order = [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        for first in range(0, len(order), options.batch):
            number += 1
            loss = pairs.descend(order[first : first + options.batch], 1 / made.before)
            if not math.isfinite(loss) or not all(entry.sound() for entry in trained):
                made.stopped = f"the loss is not finite in epoch {epoch}"
                return
            rate = options.lr * _schedule(number, total)
            for entry in trained:
                entry.step(rate, number)
            step(number, total)
        for entry in trained:
            entry.show(stored=True)
        loss = pairs.loss(held)
        made.epochs = epoch
        made.losses.append(loss)
        if loss < made.after:
            made.after, made.best_epoch = loss, epoch
            for entry in trained:
                entry.remember()
        elif epoch - made.best_epoch >= options.patience:
            made.stopped = f"no better for {options.patience} epochs"
            return
        for entry in trained:
            entry.show(stored=False)


def _schedule(number: int, total: int) -> float:
    """Up in a straight line, down along a cosine; never quite zero."""
    warmup = max(1.0, _WARMUP * total)
    return min(1.0, number / warmup) * 0.5 * (1 + math.cos(math.pi * (number - 0.5) / total))


class _Pairs:
    """Samples at the block's entrance and what should come out, gathered in any order."""

    def __init__(self, stack: Stack, index: int, inputs: Stream, targets: Stream) -> None:
        self.stack, self.index = stack, index
        self.samples = inputs.samples
        self.inputs, self.targets = inputs.hidden, targets.hidden
        self.chunk = inputs.slices[0].stop
        self.at_once = max(1, CHUNK_TOKENS // self.samples.seqlen)
        self.counts_H = self._channels(inputs.slices)

    def _channels(self, slices: Sequence[slice]) -> Tensor:
        """`[hidden]`: what an error of a channel counts, such that to put out nothing is to lose 1."""
        energies = []
        for rows, wanted in zip(slices, self.targets, strict=True):
            weight_BT = _weights(wanted, None if self.samples.mask is None else self.samples.mask[rows])
            energies.append((wanted.float().square() * weight_BT[..., None]).flatten(0, -2).sum(0))
        v_H = torch.stack(energies).sum(0)
        v_H /= v_H.sum().clamp(min=torch.finfo(torch.float32).tiny)
        usual_H = torch.maximum(v_H, v_H.median().clamp(min=_LEAST / len(v_H)))
        whole = (v_H / usual_H).sum()
        return 1 / (usual_H * torch.where(whole > 0, whole, 1.0))

    def _pick(self, hidden: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        return torch.stack([hidden[i // self.chunk][i % self.chunk] for i in chosen])

    def _forwards(self, chosen: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Output, target and weights of the tokens of a few samples at a time, so that activations stay small."""
        for first in range(0, len(chosen), self.at_once):
            part = list(chosen[first : first + self.at_once])
            samples = self.samples.take(part)
            call = self.stack.calls(samples.inputs)[self.index]
            output = self.stack.differentiable(self.index, self._pick(self.inputs, part), call)
            wanted = self._pick(self.targets, part)
            yield output, wanted, _weights(wanted, samples.mask)

    def loss(self, chosen: Sequence[int]) -> float:
        """What a token's output has lost, mean over tokens."""
        lost, tokens = 0.0, 0
        with torch.no_grad():
            for output, wanted, weight in self._forwards(chosen):
                lost += float(_squares(output, wanted, weight, self.counts_H))
                tokens += int((weight > 0).sum())
        return lost / tokens if tokens else 0.0

    def descend(self, chosen: Sequence[int], scale: float) -> float:
        """Gradients of the loss over `chosen`, times `scale`, into the leaves; returns the loss."""
        mask = self.samples.mask
        tokens = len(chosen) * self.samples.seqlen if mask is None else int(mask[list(chosen)].sum())
        scale, lost = scale / max(tokens, 1), 0.0
        with torch.enable_grad():
            for output, wanted, weight in self._forwards(chosen):
                squares = _squares(output, wanted, weight, self.counts_H)
                value = float(squares.detach())
                if not math.isfinite(value):
                    return value
                lost += value
                (squares * scale).backward()  # type: ignore[no-untyped-call]
        return lost / max(tokens, 1)


def _squares(made_BTH: Tensor, wanted_BTH: Tensor, weight_BT: Tensor, counts_H: Tensor) -> Tensor:
    """Weighted sum of squares of a difference, in float32."""
    squares_BTH = (made_BTH.float() - wanted_BTH.float()).square()
    return (squares_BTH @ counts_H).mul(weight_BT).sum()


def _weights(wanted_BTH: Tensor, mask_BT: Tensor | None) -> Tensor:
    """1/‖y‖² of every token; nothing where there is no token, or no output to be a share of."""
    energy_BT = wanted_BTH.float().square().sum(-1)
    counts_BT = energy_BT > torch.finfo(torch.float32).tiny  # a smaller one has no finite inverse
    if mask_BT is not None:
        counts_BT &= mask_BT.bool().to(counts_BT.device)
    return torch.where(counts_BT, 1 / energy_BT, 0.0)


class _Trained:
    """One tensor that is trained, in the orientation of its module."""

    def __init__(
        self,
        name: str,
        leaf: Tensor,
        stored: Tensor,
        master: Tensor,
        *,
        masked: bool,
        dtype: torch.dtype | None,
        grid: OnGrid | None = None,
        transposed: bool = False,
    ) -> None:
        self.name, self.leaf, self.stored = name, leaf, stored
        self.grid, self.transposed = grid, transposed
        self.dtype = dtype or stored.dtype
        size = _size(master, masked)
        self.master = master.to(leaf.device)  # a norm comes from where the checkpoint was read
        self.keep = self.master != 0 if masked else None
        if grid is not None and grid.whole and self.keep is not None:
            self.keep.fill_(True)
        self.gradient = torch.zeros_like(self.master)
        self.adam = _Adam(self.master, size)
        self.ends = None if grid is None else _Adam(grid.ends_OS.detach(), _size(grid.ends_OS, masked))
        self.best = stored.to(leaf.device, copy=True)  # forwards may see the very memory of what is stored
        self.changed = False
        with torch.no_grad():
            leaf.copy_(self._rounded(stored))  # a solver's weight may have reached the forwards unrounded
        leaf.requires_grad_(True)
        self._hook = leaf.register_post_accumulate_grad_hook(self._collect)  # type: ignore[no-untyped-call]

    def _collect(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.gradient += leaf.grad
        leaf.grad = None

    def sound(self) -> bool:
        return bool(torch.isfinite(self.gradient.sum()))

    def step(self, rate: float, number: int) -> None:
        """One step of Adam; a removed weight has no gradient and so never moves."""
        if self.keep is not None:
            self.gradient.mul_(self.keep)
        if self.grid is not None and self.ends is not None:
            made_OI, ends_OS = self.grid.gradients(self._turned(self.master), self._turned(self.gradient))
            self._turned(self.gradient).copy_(made_OI)
            self.ends.step(ends_OS, rate, number)
        self.adam.step(self.gradient, rate, number)
        self.show(stored=False)

    def _turned(self, tensor: Tensor) -> Tensor:
        """As `[out, in]`, or back."""
        return tensor.T if self.transposed else tensor

    def _value(self) -> Tensor:
        """The weight that the master stands for."""
        if self.grid is None or self.keep is None:
            return self.master
        return self._turned(self.grid.value(self._turned(self.master))).masked_fill(~self.keep, 0)

    def show(self, *, stored: bool) -> None:
        """Let forwards see the master, or what will be stored of it."""
        with torch.no_grad():
            value = self._value()
            self.leaf.copy_(self._rounded(value) if stored else value)

    def _rounded(self, value: Tensor) -> Tensor:
        """As the checkpoint holds it once it has been through the dtype that will be written."""
        return value.to(self.dtype).to(self.stored.dtype)

    def remember(self) -> None:
        value = self._rounded(self._value())
        self.changed = self.changed or not torch.equal(value, self.best)
        self.best.copy_(value)

    def finish(self) -> None:
        """The best state, which may be the first, into the block and what is stored of it."""
        with torch.no_grad():
            self.stored.copy_(self.best)
            self.leaf.copy_(self.best)

    def close(self) -> None:
        self._hook.remove()


def _size(master: Tensor, masked: bool) -> float:
    """Of a usual survivor."""
    survivors = int(torch.count_nonzero(master)) if masked else master.numel()
    return max(_SMALLEST, float(torch.linalg.vector_norm(master)) / math.sqrt(max(survivors, 1)))


class _Adam:
    """The momenta of a tensor, which it moves by about the rate times `size` a step."""

    def __init__(self, master: Tensor, size: float) -> None:
        self.master, self.size = master, size
        self.first, self.second = torch.zeros_like(master), torch.zeros_like(master)

    def step(self, gradient: Tensor, rate: float, number: int) -> None:
        """One step; the gradient is used up, and zero then."""
        slow, slower = _BETAS
        self.first.lerp_(gradient, 1 - slow)
        self.second.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
        root = torch.sqrt(self.second, out=gradient).div_(math.sqrt(1 - slower**number)).add_(_EPSILON)
        self.master.addcdiv_(self.first, root, value=-rate * self.size / (1 - slow**number))
        gradient.zero_()


@contextmanager
def _borrowed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Nothing but what is trained here has gradients; afterwards each is as trainable as its owner left it."""
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _trained(
    stack: Stack,
    index: int,
    linears: Sequence[Linear],
    solved: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    kinds: Mapping[str, tuple[Kind, int | None]],
) -> list[_Trained]:
    """The survivors of the pruned linears, and the block's norms and their biases."""
    trained: list[_Trained] = []
    for linear in linears:
        parameter = getattr(linear.module, linear.parameter)
        stored = stack.stored[linear.key] if stack.checkpoint else parameter.data
        weight_OI = solved[linear.name] if linear.name in solved else stack.weight(linear)
        master = (weight_OI.T if linear.transposed else weight_OI).contiguous()
        grid = OnGrid(weight_OI, *kinds[linear.name]) if linear.name in kinds else None
        how: dict[str, Any] = {"dtype": dtype, "grid": grid, "transposed": linear.transposed}
        trained.append(_Trained(linear.name, parameter, stored, master, masked=True, **how))
    owners = {id(linear.module) for linear in linears}
    seen: set[int] = set()  # modules of one block may share a norm
    for path, module in stack.blocks[index].named_modules():
        own = dict(module.named_parameters(recurse=False))
        # A router's or an excluded linear's bias belongs to what is left alone.
        if id(module) not in owners and any(value.dim() > 1 for value in own.values()):
            continue
        for leaf_name, value in own.items():
            if value.dim() == 1 and value.is_floating_point() and id(value) not in seen:
                seen.add(id(value))
                name = ".".join(filter(None, [stack.name(index), path, leaf_name]))
                stored = stack.stored[name] if stack.checkpoint else value.data
                master = stored.to(torch.float32, copy=True)
                trained.append(_Trained(name, value, stored, master, masked=False, dtype=dtype))
    return trained
