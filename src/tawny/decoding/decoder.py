"""One sequence of tokens: a prompt, its keys and values, and a step a token.

`prefill` runs the model's own forward over the prompt; `step` takes one token and returns the logits of the next.
A decoder knows no text, file or console, and any number of them may take turns on one model. Three things make a step
cheaper than transformers' own, each only where it applies:

- Keys and values go into reserved memory (cache.py). Layers that keep a window of the past, or something else than keys
  and values, keep transformers' own cache.
- Plain linears and experts run our products while `kernels(model)` is entered (swapped.py).
- A model whose blocks are the usual ones makes a token in one C++ call (step.py). The call is used only after it agreed
  with the model's own forward, where the text is and where it may end; see `Decoder._prove`.

Everything else is the model's own forward. A model that refuses transformers' cache gets its own back, and one that keeps
none reads the whole text again for each token. One whose rotary angles change at some length does so once, there.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tawny.decoding.cache import cache_in, holds_something, reserved_layer
from tawny.decoding.step import Step, find_rotary
from tawny.errors import UserError
from tawny.kinds import kind_of
from tawny.model.linears import changed
from tawny.model.structure import find_stack
from tawny.packed.linear import PackedLinear

# How far the quick path may be from the model's own logits, in units of what one rounding of each block's output does.
TOLERANCE = 3.0
# One such change may by chance move little, so the largest of several counts; most models need the first only.
_CHANGES = 8


class Decoder:
    """One sequence of at most `capacity` tokens. Use it under `torch.inference_mode()`.

    quick: None tries the C++ path and keeps it if it proves equal; False never does.
    reserve: tokens to set memory aside for at first; None: for all of `capacity`.
    """

    def __init__(
        self, model: Any, capacity: int, quick: bool | None = None, reserve: int | None = None
    ) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        self.model, self.capacity, self.length = model, capacity, 0
        self.device = next(model.parameters()).device
        config = model.config.get_text_config(decoder=True)
        self._reserve = capacity if reserve is None else min(capacity, reserve)
        self._border = border_of(model, capacity)
        self._short = torch.empty(1, 0, dtype=torch.long)  # everything so far, up to that border
        self.cache = self._new_cache()
        parameters = inspect.signature(model.forward).parameters
        # Transformers is renaming the argument; a model of either age must decode.
        self._cached = "cache" if "cache" in parameters else "past_key_values"
        self._arguments: dict[str, Any] = {self._cached: self.cache, "use_cache": True}
        if "logits_to_keep" in parameters:
            self._arguments["logits_to_keep"] = 1
        kinds = getattr(config, "layer_types", None) or ()
        plain = all(isinstance(layer, DynamicLayer) for layer in self.cache.layers)
        plain &= not any("linear" in kind or "attention" not in kind for kind in kinds)
        self._takes_positions = "position_ids" in parameters
        self._told = not plain and self._must_be_told(lambda: DynamicCache(config=config))
        self._read: Tensor | None = None  # everything so far, for a model without a cache
        self._want_quick = quick is not False and self._border is None
        self._quick: Step | None = None

    def _new_cache(self) -> Any:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache, kind = DynamicCache(config=self.model.config.get_text_config(decoder=True)), reserved_layer()
        cache.layers = [kind(self._reserve) if type(one) is DynamicLayer else one for one in cache.layers]
        return cache

    @property
    def path(self) -> str:
        """`blocks` once the C++ path is in use, else `model`."""
        return "model" if self._quick is None else "blocks"

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits `[vocabulary]` after a prompt `[tokens]`, or after the next part of one."""
        ids = ids.view(1, -1)
        if self.length:
            return self._forward(ids)
        try:
            logits = self._forward(ids)
        except (ValueError, AttributeError):  # a model that takes no cache but its own
            return self._prefill_by_its_own(ids)
        return logits if holds_something(self.cache) else self._prefill_by_its_own(ids)

    def _prefill_by_its_own(self, ids: Tensor) -> Tensor:
        """With the cache that the model makes, or without any."""
        self.length, self._want_quick, self._told = 0, False, False
        del self._arguments[self._cached]
        output = self._run(ids)
        self.length = ids.shape[1]
        cache = cache_in(output)
        if cache is None:
            self._read = ids
            self._arguments["use_cache"] = False
        else:
            self._arguments[self._cached] = cache
            self._told = self._must_be_told(None)
        return _last(output)

    def step(self, token: int) -> Tensor:
        """Logits `[vocabulary]` after one more token; the next step may overwrite them."""
        if self._want_quick:
            self._want_quick = False
            self._quick = self._trusted(token)
        if self._quick is None:
            return self._forward(torch.tensor([[token]]))
        self._check_room(1)
        if self.length == self._quick.capacity:
            for layer in self.cache.layers:
                layer.rewind(self.length)
                layer.grow(self.length + 1)
            self._quick, self._want_quick = None, True
            return self.step(token)
        logits = self._quick([(token, 0, self.length)])[0]
        self.length += 1
        return logits

    @property
    def memory(self) -> list[list[Tensor]] | None:
        """Keys and values `[1, capacity, heads, dim]` of every layer; None where one of them keeps something else."""
        if not all(isinstance(layer, reserved_layer()) for layer in self.cache.layers):
            return None
        held = [layer.memory for layer in self.cache.layers]
        return None if None in held else held

    def take(self, memory: list[list[Tensor]], length: int) -> None:
        """Use such memory, of which `length` tokens are filled, from now on."""
        self.length = length
        for layer, part in zip(self.cache.layers, memory, strict=True):
            layer.take(part, length)

    def _check_room(self, more: int) -> None:
        if self.length + more > self.capacity:
            raise UserError(
                f"{self.length + more} tokens are more than the {self.capacity} there is room for"
            )

    def _forward(self, ids: Tensor) -> Tensor:
        self._check_room(ids.shape[1])
        if self._read is not None:
            ids = self._read = torch.cat([self._read, ids], 1)
        elif self._border is not None:
            self._short = torch.cat([self._short, ids], 1)
            if self._short.shape[1] > self._border:
                self._border = None
                if self.length:
                    return self._read_again(self._short)
        output = self._run(ids)
        self.length = ids.shape[1] if self._read is not None else self.length + ids.shape[1]
        return _last(output)

    def _read_again(self, ids: Tensor) -> Tensor:
        """Begin anew with everything so far, because what the cache holds is no longer right."""
        self.length, self.cache = 0, self._new_cache()
        self._arguments[self._cached] = self.cache
        return self.prefill(ids)

    def _run(self, ids: Tensor) -> Any:
        more = dict(self._arguments)
        if self._told:
            positions = torch.arange(self.length, self.length + ids.shape[1], device=self.device)
            more["position_ids"] = positions[None]
        return self.model(input_ids=ids.to(self.device), **more)

    def _must_be_told(self, cache: Callable[[], Any] | None) -> bool:
        """Whether the model gives a token behind a cache the right position only if it is told it.

        Some ask the first layer how much the cache holds, which knows nothing of it where it is not attention. Others must
        not be told, since their positions begin past a padding token. So the second of two tokens is compared with both
        read at once.

        Args:
            cache: makes one; None for a model that makes its own.
        """
        known, own = _telling.setdefault(self.model, {}), cache is None
        if not self._takes_positions or own in known:
            return self._takes_positions and known[own]
        ids = torch.tensor([[1, 2]], device=self.device)

        def distance(whole: Tensor, **more: Any) -> float:
            given = {} if cache is None else {self._cached: cache()}
            first = self.model(input_ids=ids[:, :1], use_cache=True, **given)
            held = given or {self._cached: cache_in(first)}
            second = self.model(input_ids=ids[:, 1:], use_cache=True, **held, **more)
            return float((_last(second) - whole).float().norm())

        known[own] = False
        with torch.no_grad(), contextlib.suppress(Exception):  # one that cannot be asked so is not told
            whole = _last(self.model(input_ids=ids, use_cache=False))
            moved = distance(whole, position_ids=torch.ones_like(ids[:, :1]))
            known[own] = moved < distance(whole) / 2
        return known[own]

    # --- the quick path ------------------------------------------------------------------------------------

    def _trusted(self, token: int) -> Step | None:
        """The quick path, if this model's has proved equal up to the last position there is room for."""
        known = _proved.get(self.model, 0)
        if known is None or self.memory is None or self.device.type != "cpu" or self.length == self.capacity:
            return None
        for layer in self.cache.layers:
            if layer.capacity == self.length:
                layer.grow(self.length + 1)
        room = min(self.capacity, *(layer.capacity for layer in self.cache.layers))
        if any(map(changed, self.model.modules())):  # since it was proved, maybe
            return None
        memory = [(layer.memory[0][:, :room], layer.memory[1][:, :room]) for layer in self.cache.layers]
        quick = Step.build(self.model, memory)
        if quick is None:
            return None
        if known < room:
            _proved[self.model] = room if self._prove(quick, token, room - 1) else None
        return quick if _proved[self.model] else None

    def _prove(self, quick: Step, token: int, far: int) -> bool:
        """Whether the quick path may make the logits of every position from the next to the last there is room for.

        A model may do something that depends on the position and shows only far from the text's beginning (Ministral 3
        scales its queries). So the two paths are compared at both ends, and the model is asked whether it uses the
        position for anything but rotary angles.
        """
        near = self.length
        # Only the far end is new where less room was proved before.
        if not _proved.get(self.model) and not self._agree(quick, token):
            return False
        if near == far:
            return True
        if not self._only_angles_move(token, far):
            return False
        self._fill(near, far)
        self._rewind(far)
        agreed = self._agree(quick, token)
        self._rewind(near)
        return agreed

    def _only_angles_move(self, token: int, far: int) -> bool:
        """Whether a token's logits stay the same to the bit at a far position, its rotary angles held still.

        Comparing the two paths would not do in 16 bits, where a few per cent in a query's scale look like rounding.
        """
        if not self._takes_positions:
            return False
        near, ids = self.length, torch.tensor([[token]])

        def hold(module: nn.Module, args: Any, output: Any) -> Any:
            # Of its first argument it takes only the type.
            return module.forward(output[0], torch.tensor([[near]]))

        def logits_at(position: int) -> Tensor:
            output = self.model(input_ids=ids, position_ids=torch.tensor([[position]]), **self._arguments)
            self._rewind(near)
            return _last(output)

        hook = find_rotary(self.model).register_forward_hook(hold)
        try:
            return torch.equal(logits_at(near), logits_at(far))
        finally:
            hook.remove()

    def _fill(self, near: int, far: int) -> None:
        """Put the prompt's keys and values, disturbed so that no two are alike, where those to come will be."""
        generator = torch.Generator().manual_seed(0)
        for layer in self.cache.layers:
            for memory in layer.memory:
                known = memory[:, torch.arange(near, far) % near].float()
                noise = torch.randn(known.shape, generator=generator)
                memory[:, near:far] = known + noise * memory[:, :near].float().square().mean().sqrt()

    def _agree(self, quick: Step, token: int) -> bool:
        """Whether both paths give the next token the same logits, up to rounding.

        They do the same sums in another order and round at other places, so they never agree to the bit. How much
        rounding may move the logits is measured: the model's own forward runs a second time with the output of every
        block changed by half a unit in the last place, up or down at random: the most one rounding can do there. The
        two paths must not be further apart than `TOLERANCE` times what the largest of a few such changes makes (norms
        over the vocabulary). A missing scale, norm, bias or mask moves logits by tens of per cent, hundreds of times as much.
        Products with integers round activations to 16 bits, and a last bit of float32 decides where some of them go.
        """
        position = self.length
        logits = quick([(token, 0, position)])[0].clone()
        ids = torch.tensor([[token]])
        own = self._forward(ids).float()
        self._rewind(position)
        integers = any(isinstance(m, PackedLinear) and kind_of(m.kind).scaled for m in self.model.modules())
        least = (2**-14 if integers else 1e-5) * float((own - own.mean()).norm())
        apart = float((logits - own).norm())
        for seed in range(_CHANGES):
            with _rounded_once_more(self.model, seed):
                noisy = self._forward(ids).float()
            self._rewind(position)
            if apart <= TOLERANCE * (float((noisy - own).norm()) + least):
                return True
        return False

    def _rewind(self, length: int) -> None:
        self.length = length
        for layer in self.cache.layers:
            layer.rewind(length)


def _last(made: Any) -> Tensor:
    """Logits `[vocabulary]` after the last token of a forward."""
    logits: Tensor = made.logits[0, -1]
    return logits


def border_of(model: Any, capacity: int) -> int | None:
    """Tokens beyond which a model rotates all positions by other angles; None where `capacity` ends before.

    LongRoPE has two sets of angles (Ding et al. 2024), and keys of both do not go together. `dynamic` angles change beyond
    the model's context only, where every text ends.
    """
    config = model.config.get_text_config(decoder=True)
    said = getattr(config, "rope_parameters", None) or {}
    ropes = [said, *(part for part in said.values() if isinstance(part, dict))]  # one, or one a kind of layer
    own = getattr(config, "original_max_position_embeddings", None)
    borders = [rope.get("original_max_position_embeddings", own) for rope in ropes if "long_factor" in rope]
    return min((border for border in borders if border is not None and border < capacity), default=None)


# Whether a model must be told positions: with the cache it was given (False), and with one of its own (True).
_telling: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()

# Capacity up to which a model's quick path has proved equal; None where it has not.
_proved: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


@contextlib.contextmanager
def _rounded_once_more(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, every block's output is multiplied by 1 ± half a unit in the last place."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        signs = torch.randint(0, 2, hidden.shape, generator=generator).mul_(2).sub_(1)
        half = torch.finfo(hidden.dtype).eps / 2
        changed = (hidden.double() * (1 + signs * half)).to(hidden.dtype)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    hooks = [block.register_forward_hook(disturb) for block in find_stack(model)[1]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
