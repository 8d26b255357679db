"""A transformers model whose parameters weigh nothing and whose buffers are real.

No checkpoint holds non-persistent buffers (rotary frequencies, causal masks), so that building on the meta device loses them.
Here only parameters go to meta, each as it is registered, before anything initialises it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
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


def model_class(config: PretrainedConfig) -> Any:
    """What opens the model that a configuration describes: `from_pretrained` and `_from_config` or `from_config`.

    Language models open as causal ones, whatever of them a checkpoint names. Of other models it is the class that
    `architectures` names, or without one the base model.

    Raises:
        ModelError: transformers has no such class, or it is one with a decoder after its encoder.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    what = f"model type {config.model_type!r}"
    classes = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    known = {cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))}
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    named = getattr(config, "architectures", None) or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(
            f"config.json names the architectures {named!r}; expected a list of names such as ['LlamaForCausalLM']"
        )
    # A family such as BERT has a causal class too, but its checkpoints name another; it calls its plain one a decoder or not.
    decodes = getattr(config, "is_decoder", True) or not named
    causal = [
        n in known or "CausalLM" in n or "LMHead" in n or (n.endswith("Model") and decodes) for n in named
    ]
    both = bool(getattr(config, "is_encoder_decoder", False))
    if not both and ((own_code and (trusted() or not known)) or (known and (not named or any(causal)))):
        return AutoModelForCausalLM
    if not named and not both and type(config) in MODEL_MAPPING:
        return AutoModel
    # Classes that transformers does not export lie beside those that it does.
    modelling = type(config).__module__.replace(".configuration_", ".modeling_")
    remote = getattr(importlib.import_module(modelling), named[0], None) if named else None
    if remote is None:
        raise ModelError(
            f"{what} with architecture {named[0] if named else None!r} is none of transformers' models: correct config.json"
        )
    if "decoder_input_ids" in inspect.signature(remote.forward).parameters:
        raise ModelError(
            f"{what} is an encoder-decoder, whose decoder takes two streams of hidden states; expected a decoder or an encoder "
            "alone"
        )
    return remote


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model `config` describes, in eval mode, parameters on meta, buffers real.

    Raises:
        ModelError: as `model_class` does.
    """
    from transformers import PreTrainedModel, initialization

    kind = model_class(config)
    with _parameters_on_meta(), initialization.no_init_weights():
        if issubclass(kind, PreTrainedModel):
            model = kind._from_config(config, dtype=dtype)
        else:
            model = kind.from_config(config, dtype=dtype, trust_remote_code=trusted())
    return model.eval()


def read_config(folder: Path) -> PretrainedConfig:
    """What `config.json` in `folder` says, as transformers reads it.

    Raises:
        ModelError: it cannot be read, or needs code of its own. Or an adapter lies beside the weights, which transformers
            would apply where peft is installed, and block by block nobody would.
    """
    from transformers import AutoConfig

    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter beside its weights (adapter_config.json), expected a model alone; "
            "merge it with peft's merge_and_unload, or move the adapter's files away"
        )
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
        ModelError: it describes no decoder or encoder, or one that cannot be built.
    """
    config = read_config(folder)
    with using_config(folder):
        if getattr(config, "quantization_config", None):
            dict(config.quantization_config)  # what is not a mapping cannot be used
            del config.quantization_config  # weights are read unpacked and decoded
        for key, value in (changes or {}).items():
            setattr(config.get_text_config(), key, value)
        return build_skeleton(config, dtype)
