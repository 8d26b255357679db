"""Trick: a token of each sequence through a whole decoder in one C++ call, for models whose blocks have the usual shape.

Bought: dense SmolLM2 in bf16 decodes 188 % more tokens a second than with transformers' own `generate`, and a model of
1.1 billion weights 89 % more, reserved memory and our products included (benchmarks/results/decode.json). Decoding a small model in Python spends most of its time between the products.
Paid: a proof for each model, a few tokens' time once.

A block of the usual shape is

    x += Wo · attention(rotary(Wq n), rotary(Wk n), Wv n)     n = rms_norm(x)
    x += Wdown · (silu(Wgate n) * (Wup n))                    n = rms_norm(x)

or, in a mixture, the second line for each expert that the router picks, times its share. `Step.build` describes all blocks to the library once (kernels/step.h), and a call then makes the logits of the next
token of one sequence or of several. It looks at which modules there are and what shapes they have, never at a model's name. That is a guess: a model
may scale, cap or add something that no module shows, or only far from the text's beginning. So a `Step` must be compared
with the model's own forward before it is trusted (decoding/decoder.py does).

Between products everything is float32; into products goes the model's own dtype, as in its own forward.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tawny.errors import ModelError
from tawny.kernels import native, ops
from tawny.model.structure import find_stack
from tawny.packed.expert_loop import can_run
from tawny.packed.experts import PackedExperts
from tawny.packed.linear import DenseLinear, PackedLinear

# Rotary embeddings whose angles do not depend on the length of the text.
_ROTARIES = ("default", "linear", "llama3", "yarn")
_Pointer, _Size, _Flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Product(ctypes.Structure):
    _fields_ = [
        *_fields(_Pointer, "packed weight bias"),
        *_fields(_Size, "rows cols"),
        *_fields(_Flag, "kind unused"),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        *_fields(_Product, "query key value output gate up down router"),
        *_fields(_Pointer, "experts norm_attention norm_mlp norm_query norm_key keys values"),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *_fields(_Pointer, "blocks norm"),
        *_fields(_Product, "head"),
        *_fields(_Pointer, "cosine sine hidden wide narrow scores logits"),
        *_fields(_Pointer, "routed shares mixed picks input gathered gated"),
        *_fields(
            _Size, "count width heads kv_heads dim rotated inner capacity places experts picked expert_inner"
        ),
        *_fields(ctypes.c_float, "eps scale"),
        *_fields(_Flag, "kind normalised"),
    ]


class _Token(ctypes.Structure):
    _fields_ = _fields(_Size, "place position")


class _UnusualShape(Exception):
    """The model is not of the usual shape."""


def _need(condition: object) -> None:
    if not condition:
        raise _UnusualShape


def _stack(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The list of the blocks, packed or not, and the module it is in."""
    path, blocks = find_stack(model)
    return model.get_submodule(path.rpartition(".")[0]), blocks


def find_rotary(model: nn.Module) -> Any:
    """The module that makes the rotary angles of a model that has a `Step`."""
    return _only(_stack(model)[0], lambda module: "inv_freq" in module._buffers)


class Step:
    """Calls of the library for one model and one cache; keeps alive whatever it has the address of."""

    @staticmethod
    def build(model: Any, memory: Sequence[tuple[Tensor, Tensor]]) -> Step | None:
        """None where the model, the machine or the library does not allow it.

        Args:
            model: a causal model on the CPU whose linears are `PackedLinear` and `DenseLinear`.
            memory: keys and values `[places, capacity, heads, dim]` of each block; a sequence has a place.
        """
        if not (native.chosen() and hasattr(native.library(), "tawny_step")):
            return None
        try:
            return Step(model, memory)
        except (_UnusualShape, ModelError, AttributeError, TypeError):
            return None

    def __init__(self, model: Any, memory: Sequence[tuple[Tensor, Tensor]]) -> None:
        _need(memory)
        places, self.capacity = memory[0][0].shape[:2]
        capacity = self.capacity
        self._library = native.library()
        self._library.tawny_step_sizes.restype = ctypes.c_int64
        self._library.tawny_step.argtypes = [_Pointer, ctypes.POINTER(_Token), _Size, _Flag]
        sizes = self._library.tawny_step_sizes()
        _need(sizes == ctypes.sizeof(_Decoder) << 32 | ctypes.sizeof(_Block))
        self._alive: list[Any] = [memory]
        base, blocks = _stack(model)
        self._embedding = model.get_input_embeddings()
        norm = _only(base, _is_norm)
        first = _parts(blocks[0])
        self._dtype: torch.dtype = norm.weight.dtype
        dtype = self._dtype
        _need(dtype in ops.FLOATS and len(memory) == len(blocks))
        dim = int(first["attention"].head_dim)
        heads, kv_heads = (first[name].out_features // dim for name in ("query", "key"))
        width = first["query"].in_features
        each = [_parts(block) for block in blocks]
        inner = next((parts["gate"].out_features for parts in each if "gate" in parts), 0)
        mixture = next((_mixture(parts, width) for parts in each if "experts" in parts), _Mixture())
        cosine, sine = self._angles(model, capacity, dtype)
        attention = {
            "query": (heads * dim, width),
            "key": (kv_heads * dim, width),
            "value": (kv_heads * dim, width),
            "output": (width, heads * dim),
        }
        mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        norms = {"norm_attention": width, "norm_mlp": width, "norm_query": dim, "norm_key": dim}
        described = (_Block * len(blocks))()
        for index, parts in enumerate(each):
            place = described[index]
            _need(parts["attention"].layer_idx == index and int(parts["attention"].head_dim) == dim)
            for name, tensor in zip(("keys", "values"), memory[index], strict=True):
                _need(tensor.shape == (places, capacity, kv_heads, dim) and tensor.dtype == dtype)
                _need(tensor.is_contiguous())
                setattr(place, name, tensor.data_ptr())
            if "experts" in parts:
                _need(_mixture(parts, width) == mixture)
                place.router = self._dense(parts["router"].weight)
                place.experts = self._experts(parts["experts"], mixture, width)
            for name, shape in (attention if "experts" in parts else attention | mlp).items():
                _need((parts[name].out_features, parts[name].in_features) == shape)
                setattr(place, name, self._product(parts[name]))
            for name, size in norms.items():
                if (module := parts[name]) is not None:
                    _need(module.weight.shape == (size,) and _eps(module) == _eps(norm))
                    setattr(place, name, self._floats(module.weight))
        head = model.get_output_embeddings()
        _need(head.in_features == width and norm.weight.shape == (width,))
        self._hidden = torch.zeros(places, width)
        self.logits = torch.zeros(places, head.out_features)
        widest = max(width, inner, heads * dim)
        wide = max(2 * inner, 2 * mixture.inner, (heads + 2 * kv_heads) * dim)
        buffers = {
            "cosine": cosine,
            "sine": sine,
            "hidden": self._hidden,
            "wide": torch.zeros(places, wide),
            "narrow": torch.zeros(places, width),
            "scores": torch.empty(places, heads, capacity),
            "routed": torch.zeros(places, max(mixture.experts, mixture.picked)),
            "shares": torch.zeros(places, mixture.picked),
            "mixed": torch.zeros(places, width),
            "picks": torch.zeros(places, mixture.picked, dtype=torch.long),
            "logits": self.logits,
        }
        self._alive += [described, buffers, model]
        self._decoder = _Decoder(
            blocks=ctypes.addressof(described),
            norm=self._floats(norm.weight),
            head=self._product(head),
            **{name: tensor.data_ptr() for name, tensor in buffers.items()},
            input=self._aligned(places * widest, dtype),
            gathered=self._aligned(places * width, dtype),
            gated=self._aligned(places * mixture.inner, dtype),
            count=len(blocks),
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            rotated=cosine.shape[1],
            inner=inner,
            capacity=capacity,
            places=places,
            experts=mixture.experts,
            picked=mixture.picked,
            expert_inner=mixture.inner,
            normalised=mixture.normalised,
            eps=_eps(norm),
            scale=float(getattr(first["attention"], "scaling", dim**-0.5)),
            kind=ops.FLOATS[dtype],
        )
        self._at = ctypes.addressof(self._decoder)

    def __call__(self, tokens: Sequence[tuple[int, int, int]]) -> Tensor:
        """Logits `[tokens, vocabulary]`, float32; the next call overwrites them.

        Args:
            tokens: of each sequence its token, its place and the token's position; no place twice.
        """
        hidden, count = self._hidden[: len(tokens)], len(tokens)
        hidden.copy_(self._embedding(torch.tensor([token for token, _, _ in tokens])))
        where = (_Token * count)(*(_Token(place, position) for _, place, position in tokens))
        code = self._library.tawny_step(self._at, where, count, torch.get_num_threads())
        if code:
            native.raise_for(code, f"decoding {count} tokens, the first at position {tokens[0][2]}")
        return self.logits[:count]

    def _product(self, linear: nn.Module) -> _Product:
        bias = None if linear.bias is None else self._floats(linear.bias)  # type: ignore[arg-type]
        rows, cols = linear.out_features, linear.in_features
        if isinstance(linear, PackedLinear):
            call = linear.prepared()
            _need(call is not None)
            assert call is not None
            self._alive.append(call)
            return _Product(call.address, None, bias, rows, cols, call.weight.kind.code)
        _need(isinstance(linear, DenseLinear))
        return self._dense(linear.weight, bias)  # type: ignore[arg-type]

    def _dense(self, weight: Tensor, bias: int | None = None) -> _Product:
        _need(weight.is_contiguous() and weight.device.type == "cpu" and weight.dtype is self._dtype)
        return _Product(None, weight.data_ptr(), bias, *weight.shape, ops.FLOATS[weight.dtype])

    def _experts(self, experts: Any, mixture: _Mixture, width: int) -> int:
        """Of each expert the product for gate and up, and the one for down."""
        described = (_Product * (2 * mixture.experts))()
        shapes = {"gate_up_proj": (2 * mixture.inner, width), "down_proj": (width, mixture.inner)}
        for number, (name, shape) in enumerate(shapes.items()):
            fused = getattr(experts, name)
            _need(len(fused) == mixture.experts)
            for expert in range(mixture.experts):
                one = fused[expert]
                product = self._product(one) if isinstance(one, PackedLinear) else self._dense(one)
                _need((product.rows, product.cols) == shape)
                described[2 * expert + number] = product
        self._alive.append(described)
        return ctypes.addressof(described)

    def _floats(self, tensor: Tensor) -> int:
        floats = tensor.detach().to("cpu", torch.float32).contiguous()
        self._alive.append(floats)
        return floats.data_ptr()

    def _aligned(self, count: int, dtype: torch.dtype) -> int:
        # A whole number of vectors, aligned, so that products take it as it is.
        memory = torch.zeros(-(-count // 64) * 64 * dtype.itemsize + 64, dtype=torch.uint8)
        self._alive.append(memory)
        return -(-memory.data_ptr() // 64) * 64

    def _angles(self, model: nn.Module, capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[capacity, rotated]`, rounded as the model itself rounds them."""
        rotary = find_rotary(model)
        _need(getattr(rotary, "rope_type", None) in _ROTARIES)
        angles = rotary(torch.zeros(1, dtype=dtype), torch.arange(capacity)[None])
        cosine, sine = (part[0].float().contiguous() for part in angles)
        _need(cosine.shape == sine.shape and cosine.shape[0] == capacity)
        return cosine, sine


@dataclass(frozen=True)
class _Mixture:
    """What is the same for all blocks with experts; zeros where there are none."""

    experts: int = 0
    picked: int = 0
    inner: int = 0
    normalised: bool = False


def _mixture(parts: dict[str, Any], width: int) -> _Mixture:
    """Of a block with experts; `_Other` if its router does anything but pick the likeliest of a softmax."""
    router, experts = parts["router"], parts["experts"]
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(router.weight.dtype)
    with torch.no_grad():
        routed = router(x)
        likely = torch.softmax((x @ router.weight.T).float(), -1)[0]
    picks = [t for t in routed if t.dtype is torch.long]
    shares = [t for t in routed if t.dtype.is_floating_point and t.shape == picks[0].shape]
    _need(len(picks) == 1 and len(shares) == 1)
    share, wanted = shares[0][0].float(), likely[picks[0][0]]
    _need(set(picks[0][0].tolist()) == set(likely.topk(len(wanted)).indices.tolist()))
    far = [float((share / w - 1).abs().max()) for w in (wanted, wanted / wanted.sum())]
    _need(min(far) < 0.02)
    return _Mixture(len(likely), len(wanted), experts.down_proj.shape[2], far[1] < far[0])


def _is_norm(module: nn.Module) -> bool:
    """A scale for each channel and nothing else."""
    return list(module._parameters) == ["weight"] and module.weight.dim() == 1  # type: ignore[operator]


def _eps(norm: nn.Module) -> float:
    value = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if value is None else value)  # type: ignore[arg-type]


# What a part of a block does, and what its module is called.
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_ATTENTION_NORMS = {"norm_query": "q_norm", "norm_key": "k_norm"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def _only(parent: nn.Module, wanted: Any) -> Any:
    children = [child for child in parent.children() if wanted(child)]
    _need(len(children) == 1)
    return children[0]


def _parts(block: nn.Module) -> dict[str, Any]:
    """The modules of a block by what they do; `_Other` if there are more or fewer."""
    parts: dict[str, Any] = {}
    norms = []
    for child in block.children():
        names = set(child._modules)
        if names >= {*_ATTENTION.values()}:
            _need(names <= {*_ATTENTION.values(), *_ATTENTION_NORMS.values()})
            parts["attention"] = child
            for part, name in (_ATTENTION | _ATTENTION_NORMS).items():
                parts[part] = getattr(child, name, None)
        elif "experts" in names:
            experts: Any = child.experts
            router = _only(child, partial(operator.is_not, experts))
            _need(list(router._parameters) == ["weight"] and not router._modules)
            _need(can_run(experts) and experts.has_gate and _is_silu(experts.act_fn))
            _need(not (experts.has_bias or experts.has_post_expert_norm))
            _need(isinstance(experts.down_proj, PackedExperts) or not experts.is_transposed)
            parts |= {"experts": experts, "router": router}
        elif names >= {*_MLP.values()}:
            _need(names <= {*_MLP.values(), "act_fn"} and _is_silu(child.act_fn))
            parts |= {part: getattr(child, name) for part, name in _MLP.items()}
        else:
            _need(_is_norm(child))
            norms.append(child)
    _need(len(norms) == 2 and "attention" in parts and ("gate" in parts) != ("experts" in parts))
    parts["norm_attention"], parts["norm_mlp"] = norms  # made in the order of their use
    return parts


def _is_silu(function: Any) -> bool:
    x = torch.linspace(-6, 6, 49)
    return torch.allclose(function(x), nn.functional.silu(x), atol=1e-6)
