"""Blocks of different widths: `per_layer_config` of a config.json, before transformers builds what it says.

transformers reads what each block changes in the configuration (`{"per_layer_config": {"00": {"intermediate_size": 1229}, …}}`), and
so far leaves building such blocks to others: by itself it builds all of one width, and fails on the shapes of the weights.

The trick of this file is a method replaced for all models: `PreTrainedModel.post_init`, which each model calls when its modules are
made, first gives every block that has settings of its own a block built from them. What it buys: folders of `tawny slim`
open through `AutoModelForCausalLM.from_pretrained`, packed or dense, with no model class of ours.
"""

from __future__ import annotations

from typing import Any

KEY = "per_layer_config"
READS_GLOBAL = (
    "allow_global_per_layer_attribute_access"  # or transformers raises where code asks for one width of all
)


def register() -> None:
    """Let transformers build blocks of their own widths, once."""
    from transformers.modeling_utils import PreTrainedModel

    plain = PreTrainedModel.post_init
    if plain.__module__ == __name__:
        return

    def post_init(self: Any) -> None:
        if getattr(self.config, "is_heterogeneous", False):
            _build_own(self)
        plain(self)

    PreTrainedModel.post_init = post_init


def _build_own(model: Any) -> None:
    """Build anew, in place, the blocks that have settings of their own."""
    from torch import nn

    config = model.config
    own = config.to_dict().get(KEY, {})
    for held in model.children():
        if isinstance(held, nn.ModuleList) and len(held) == config.num_hidden_layers:
            for index in map(int, own):
                held[index] = type(held[index])(config.per_layer_config[index], index)


register()
