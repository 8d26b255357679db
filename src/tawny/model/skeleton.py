"""A transformers model whose parameters weigh nothing and whose buffers are real.

No checkpoint holds non-persistent buffers (rotary frequencies, causal masks), so that building on the meta device loses them.
Here only parameters go to meta, each as it is registered, before anything initialises it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tawny.errors import ModelError, in_one_line
from tawny.model.trust import refusing_code, trusted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MOST_BLOCKS = 1000  # several times those of the deepest model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model `config` describes, in eval mode, parameters on meta, buffers real.

    Raises:
        ModelError: the configuration is not one of a decoder-only causal language model.
    """
    from transformers import AutoModelForCausalLM, initialization
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    what = f"model type {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{what} is an encoder-decoder; expected a decoder-only causal language model")
    made = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    known = {cls.__name__ for cls in (made if isinstance(made, tuple) else (made,))}
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    own_code = own_code and (trusted() or not known)
    if not known and not own_code:
        raise ModelError(
            f"{what} has no causal language model in transformers; expected a decoder-only model"
        )
    named = list(getattr(config, "architectures", None) or [])
    # An encoder such as BERT has a causal class too, but its checkpoints name a masked one.
    causal = any(n in known or "CausalLM" in n or "LMHead" in n or n.endswith("Model") for n in named)
    if named and not own_code and not causal:
        raise ModelError(
            f"{what} with architecture {named[0]!r} is not a causal decoder; expected one of {sorted(known)}"
        )
    with _parameters_on_meta(), initialization.no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted())
    return model.eval()


def read_config(folder: Path) -> PretrainedConfig:
    """What `config.json` in `folder` says, as transformers reads it.

    Raises:
        ModelError: it cannot be read, or needs code of its own.
    """
    from transformers import AutoConfig

    with using_config(folder):
        return possible(AutoConfig.from_pretrained(folder, trust_remote_code=trusted()))


def possible(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration, unless building its blocks would seem never to end.

    Raises:
        ModelError: it names more blocks than any model has.
    """
    count = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(count, int) and count > MOST_BLOCKS:
        raise ModelError(f"the configuration names {count} blocks; expected at most {MOST_BLOCKS}")
    return config


@contextlib.contextmanager
def using_config(folder: Path) -> Iterator[None]:
    """Say in one line what is wrong with `config.json`: a wrong value fails wherever a model happens to use it.

    Raises:
        ModelError: it cannot be used, or needs code of its own.
    """

    def text(said: str) -> str:
        return f"{folder}/config.json cannot be used: {said}; correct it, or fetch it again"

    with in_one_line(ModelError, text), refusing_code(folder):
        yield


def open_skeleton(
    folder: Path, dtype: torch.dtype, changes: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """`build_skeleton` of what `config.json` in `folder` describes; a packed or quantised folder is taken as the dense one.

    Args:
        changes: settings that take the place of the file's.

    Raises:
        ModelError: it describes no decoder-only causal language model, or one that cannot be built.
    """
    config = read_config(folder)
    with using_config(folder):
        if getattr(config, "quantization_config", None):
            dict(config.quantization_config)  # what is no mapping cannot be used
            del config.quantization_config  # weights are read unpacked and decoded
        for key, value in (changes or {}).items():
            setattr(config.get_text_config(), key, value)
        return build_skeleton(config, dtype)
