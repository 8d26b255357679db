"""See what the linears of one block receive: statistics of their inputs, and the stages they form.

Linears that receive the very same tensor (q/k/v, gate/up) form a stage and share one set of statistics. That is
found by watching a forward, never by name: a hook on each linear compares the tensor it gets with those seen before
in the same forward. Fused experts are not modules; products with the memory of their parameter are watched instead,
so each expert gets statistics of exactly the tokens that were routed to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tawny.calibration.products import ExpertProducts, Fused, first_argument
from tawny.calibration.statistics import Accumulator, Needs, Statistics
from tawny.errors import ModelError, NumericalError
from tawny.model.couplings import Coupling
from tawny.model.linears import Linear
from tawny.model.streams import Stream, way_out


@dataclass
class Stage:
    """Linears of a block that are ready to be solved together: one shared input, the experts of one parameter, or a coupling."""

    linears: list[Linear] = field(default_factory=list)
    coupling: Coupling | None = None


@dataclass
class Observation:
    """What one walk of all samples through a block showed.

    Attributes:
        statistics: by linear name; linears of a shared input share the object. Empty when nothing was needed.
        stages: in call order.
    """

    statistics: dict[str, Statistics]
    stages: list[Stage]


class _Enough(Exception):
    """Everything asked for has been seen; the rest of this forward is not needed."""


class Input:
    """One distinct input tensor of a block: the linears that receive it, in call order, and its statistics."""

    def __init__(self, linears: Sequence[Linear], needs: Needs, device: torch.device) -> None:
        self.linears = list(linears)
        width = linears[0].shape[1]
        self._statistics = None if needs == "none" else Accumulator(width, needs, device)

    def count(self, x: Tensor, valid: Tensor | None) -> None:
        """Add the rows of `x`, without padding where `valid` says so."""
        rows = x.reshape(-1, x.shape[-1])
        if valid is not None and rows.shape[0] == valid.numel():
            rows = rows[valid.reshape(-1)]
        self.add(rows)

    def add(self, rows_TI: Tensor) -> None:
        if self._statistics is not None:
            self._statistics.add(rows_TI)

    def finish(self, exact: bool) -> dict[str, Statistics]:
        """By linear name; they are not kept here any longer.

        Raises:
            NumericalError: an activation was not finite.
        """
        if self._statistics is None:
            return {}
        statistics, self._statistics = self._statistics.finish(exact), None
        if not bool(torch.isfinite(statistics.squared_norms).all()):
            first = self.linears[0]
            compute = getattr(first.module, first.parameter).dtype
            raise NumericalError(f"{first.name} receives NaN or infinite activations {way_out(compute)}")
        return {linear.name: statistics for linear in self.linears}


def padding(stream: Stream, chunk: int) -> Tensor | None:
    """Which tokens of a chunk are none, if any: `stream.valid`, or None where all count."""
    valid = stream.valid(chunk)
    return None if valid is None or bool(valid.all()) else valid


class _Watcher:
    def __init__(self, linears: Sequence[Linear], needs: Needs, device: torch.device, exact: bool) -> None:
        self.linears, self.needs, self.device, self.exact = linears, needs, device, exact
        self.experts = {
            (linear.key, linear.expert): linear for linear in linears if linear.expert is not None
        }
        self.inputs: list[Input] = []
        self.input_of: dict[str, Input] = {}
        self.stages: list[Stage] = []
        self.learning = True  # the first chunk teaches who shares an input; later ones only count it once
        self.last: Linear | None = None
        self._stage_of_key: dict[str, Stage] = {}
        self.begin(None)

    def begin(self, valid: Tensor | None) -> None:
        self.valid = valid
        self._this_forward: list[tuple[Tensor, int, Input]] = []

    def module_called(
        self, linear: Linear, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = first_argument(args, kwargs)
        if self.learning and linear.name not in self.input_of:
            shared = next(
                (known for t, version, known in self._this_forward if _same_tensor(t, version, x)), None
            )
            if shared is not None:
                shared.linears.append(linear)
                self.input_of[linear.name] = shared
            else:
                entry = self._new(linear, x)
                self.stages.append(Stage(entry.linears))
                self._this_forward.append((x, x._version, entry))
        source = self.input_of.get(linear.name)
        if source is None:
            raise ModelError(
                f"{linear.name} is called for some samples and not for others; exclude it to go on"
            )
        if source.linears[0] is linear:
            source.count(x, self.valid)
        if linear is self.last:
            raise _Enough

    def expert_called(
        self, key: str, expert: int, x: Tensor, product: Tensor, gathered: Tensor | None
    ) -> None:
        """One expert multiplies the rows of the tokens in `gathered`."""
        x = x.reshape(-1, x.shape[-1])
        if self.valid is not None and (key, expert) in self.experts:
            if gathered is None or gathered.numel() != len(x):
                raise self._hides_tokens(self.experts[key, expert])
            x = x[self.valid.reshape(-1)[gathered.to(self.valid.device)].to(x.device)]
        self._expert_receives(key, expert, x)

    def experts_called(self, key: str, x_ETI: Tensor, product: Tensor) -> None:
        """Every expert multiplies a row for every token, which is zero where the token was not routed to it.

        A row of zeros adds nothing to norms or Hessians, whatever made it one. It must not be counted as a token
        either: an expert that saw none is pruned by its weights alone and said to be, and would otherwise be solved by a
        Hessian of zeros.
        """
        valid = None if self.valid is None else self.valid.reshape(-1)
        for expert, x_TI in enumerate(x_ETI):
            if valid is not None and (key, expert) in self.experts:
                if len(valid) != len(x_TI):
                    raise self._hides_tokens(self.experts[key, expert])
                x_TI = x_TI[valid]
            self._expert_receives(key, expert, x_TI[x_TI.any(-1)])

    def _expert_receives(self, key: str, expert: int, x_TI: Tensor) -> None:
        if key not in self._stage_of_key:  # also by an expert that is not pruned
            self._stage_of_key[key] = Stage()
            self.stages.append(self._stage_of_key[key])
        linear = self.experts.get((key, expert))
        if linear is None:
            return
        if linear.name not in self.input_of:
            self._new(linear, x_TI)
        self.input_of[linear.name].add(x_TI)

    def _hides_tokens(self, linear: Linear) -> ModelError:
        return ModelError(
            f"{linear.name} is not seen to gather its tokens, so padding among them cannot be left out: "
            "give samples without padding, or exclude the experts"
        )

    def _new(self, linear: Linear, x: Tensor) -> Input:
        if x.shape[-1] != linear.shape[1]:
            raise ModelError(
                f"{linear.name} {list(linear.shape)} received inputs of width {x.shape[-1]}; expected {linear.shape[1]}"
            )
        entry = Input([linear], self.needs, self.device)
        self.inputs.append(entry)
        self.input_of[linear.name] = entry
        return entry

    def learnt(self, to_the_end: bool) -> None:
        """After the first chunk: all must have been seen, and the last plain linear may end a forward."""
        self.learning = False
        for linear in self.linears:
            seen = linear.name in self.input_of if linear.expert is None else linear.key in self._stage_of_key
            if not seen:
                raise ModelError(
                    f"{linear.name} {list(linear.shape)} takes no part in the forward of its block in a way that can be "
                    "observed; exclude it (-o exclude=GLOB) to prune the rest"
                )
        if self.inputs and not self.experts and not to_the_end:
            self.last = self.inputs[-1].linears[0]

    def observation(self) -> Observation:
        for linear in self.experts.values():  # also one that no token reached
            self._stage_of_key[linear.key].linears.append(linear)
        unseen = [linear for linear in self.linears if linear.name not in self.input_of]
        statistics: dict[str, Statistics] = {}
        for source in (*self.inputs, *(Input([linear], self.needs, self.device) for linear in unseen)):
            statistics |= source.finish(self.exact)
        return Observation(statistics, [stage for stage in self.stages if stage.linears])

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as leaving:
            for linear in self.linears:
                if linear.expert is None:
                    called = partial(self.module_called, linear)
                    leaving.enter_context(linear.module.register_forward_pre_hook(called, with_kwargs=True))
            if fused := Fused.of(self.linears):
                leaving.enter_context(ExpertProducts(fused, self.expert_called, self.experts_called))
            yield


def _same_tensor(a: Tensor, version: int, b: Tensor) -> bool:
    """Whether `b` is the memory of `a`, unchanged since its `version`, seen with the same last dimension."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.numel() == b.numel()
        and a.shape[-1] == b.shape[-1]
        and a.is_contiguous() == b.is_contiguous()
        and version == b._version
    )


def observe(
    stream: Stream,
    index: int,
    linears: Sequence[Linear],
    needs: Needs,
    *,
    advance: bool = False,
    exact: bool = False,
    step: Callable[[], None] = lambda: None,
) -> Observation:
    """Walk all samples through block `index` (which must be loaded) and collect what `linears` receive.

    Args:
        stream: hidden states in front of the block.
        linears: those to watch; experts of one fused parameter count one by one.
        needs: "none" finds only the stages, from one chunk.
        advance: keep the outputs as the new hidden states. Without it a forward ends as soon as the last watched
            linear has received its input.
        exact: leave Hessians unrounded (`Accumulator.finish`).
        step: called after each chunk.

    Raises:
        ModelError: a linear takes no observable part in the forward.
        NumericalError: an activation is not finite; names the weight of the block that makes it so, if there is one.
    """
    watcher = _Watcher(linears, needs, stream.stack.device, exact)
    if not linears and not advance:
        return Observation({}, [])
    with watcher.attached():
        for chunk, hidden in enumerate(stream.hidden):
            watcher.begin(padding(stream, chunk))
            with contextlib.suppress(_Enough):
                outputs = stream.stack.forward(index, hidden, stream.call(index, chunk))
                if advance:
                    stream.replace(index, chunk, outputs)
            if chunk == 0:
                watcher.learnt(to_the_end=advance)
            step()
            if needs == "none" and not advance:
                break
    try:
        return watcher.observation()
    except NumericalError:
        stream.check_weights(index)
        raise
