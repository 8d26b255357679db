"""The random models of families.py: tiny by the settings of tiny.yaml that a family's configuration has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tawny.errors import first_line

VOCABULARY = 256
LARGEST = 30_000_000  # weights of a model that is still tiny

Settings = Mapping[str, Any]
TINY: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text(encoding="utf-8"))
SHARED = TINY["shared"]


def config_of(family: str) -> Any:
    """A tiny configuration; one made of parts has tiny parts."""
    settings = {**SHARED["standard"], **TINY["causal"].get(family, SHARED["experts"])}
    kind = CONFIG_MAPPING[family]
    for name, part in getattr(kind, "sub_configs", {}).items():
        named = TINY["parts"].get(family, {}).get(name) or getattr(part, "model_type", "")
        if name in settings:
            continue
        if named in TINY["causal"] or ("text" in name and named in CONFIG_MAPPING):
            settings[name] = config_of(named)
        elif named:
            of = CONFIG_MAPPING[named] if named in CONFIG_MAPPING else part  # noqa: SIM401 - get() finds nothing there
            settings[name] = _known(of, {**SHARED["standard"], **SHARED["senses"]})
    return _known(kind, settings)


def _known(kind: Any, settings: Settings) -> Any:
    """A configuration with those settings that its class has."""
    known = set(getattr(kind, "attribute_map", None) or {})
    for parent in kind.__mro__:
        known |= set(getattr(parent, "__annotations__", {}))
        known |= set(inspect.signature(parent.__init__).parameters) if parent is not object else set()
    return kind(**{key: value for key, value in settings.items() if key in known})


def tokens(samples: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


class NotTried(Exception):
    """There is no tiny model of this family to try Tawny on."""


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits of a whole forward without a cache."""
    takes = inspect.signature(model.forward).parameters
    made: Tensor = model(input_ids=ids, **({"use_cache": False} if "use_cache" in takes else {})).logits
    return made


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def with_outliers(model: Any) -> Any:
    """The model with random matrices, a hundredth of whose weights are large."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.2 + (noise.abs() > 2.5) * noise)
    return model


def tiny_model(family: str) -> Any:
    """A random model whose weights differ enough to have outliers."""
    try:
        config = config_of(family)
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config)
        size = sum(p.numel() for p in shapes.parameters())
        if size > LARGEST:
            raise NotTried(f"no settings here make it small: {size:,} weights")
        torch.manual_seed(0)
        model = with_outliers(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        seen = logits_of(model, tokens(2, 16, 0))
    except NotTried:
        raise
    except Exception as error:
        raise NotTried(said(error)) from error
    if not bool(seen.isfinite().all()):
        raise NotTried("a random model of it gives NaN")
    return model
