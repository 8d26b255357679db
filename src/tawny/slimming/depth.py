"""Fewer blocks: the numbers in names of tensors, and what config.json says of the blocks one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tawny.errors import ModelError

_DEPTH = "num_hidden_layers"


def renumbered(key: str, index: int, made: int) -> str:
    """The name of a tensor of block `index`, once that is block `made`; the block's is the first number in it.

    Raises:
        ModelError: it is another number.
    """
    parts = key.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if place is None or int(parts[place]) != index:
        raise ModelError(
            f"{key} is a tensor of block {index}, and its name does not say so: the blocks cannot be renumbered"
        )
    return ".".join([*parts[:place], str(made), *parts[place + 1 :]])


def settings_of_depth(config: Any, raw: Mapping[str, Any], dropped: Sequence[int]) -> dict[str, Any]:
    """What config.json says otherwise without the blocks `dropped`: how many there are, and lists of one item a block.

    Args:
        config: of the model, before; `raw` as its file has it.
    """
    count = int(config.num_hidden_layers)
    name = getattr(type(config), "attribute_map", {}).get(_DEPTH, _DEPTH)
    settings: dict[str, Any] = {name: count - len(dropped)}
    # What a file leaves to a rule, such as every sixth block, no longer follows from the numbers.
    said = {**config.to_dict(), **raw}
    for key, value in said.items():
        if isinstance(value, list) and len(value) == count and not key.endswith("_id"):
            settings[key] = [item for index, item in enumerate(value) if index not in dropped]
    return settings
