"""Say the widths of a slim model in its config.json: one for all blocks, or `per_layer_config` where they differ.

Which settings make the widths no structure can tell, so their names are a table here; whether they do is proven by opening
the result (run.py).
"""

from __future__ import annotations

__all__ = ["described", "settings_of_block"]

from collections.abc import Mapping, Sequence
from typing import Any

from tawny.errors import ModelError
from tawny.model.couplings import Coupling
from tawny.model.own_blocks import KEY, READS_GLOBAL
from tawny.patterns import MemberKind
from tawny.slimming.depth import settings_of_depth

_FFN = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
_HEADS, _GROUPS, _HEAD = "num_attention_heads", "num_key_value_heads", "head_dim"


def settings_of_block(config: Any, couplings: Sequence[Coupling], kept: Sequence[int]) -> dict[str, int]:
    """What the configuration of one block would have to say: setting → value.

    Args:
        config: of the model, before.
        kept: members that each coupling keeps.

    Raises:
        ModelError: it has no setting for a width, or heads do not divide into the groups.
    """
    by_kind: dict[MemberKind, set[tuple[int, int, int]]] = {"channels": set(), "heads": set()}
    for coupling, count in zip(couplings, kept, strict=True):
        by_kind[coupling.kind].add((coupling.members, coupling.consumer.shape[1], count))
    settings: dict[str, int] = {}
    for members, _, count in by_kind["channels"]:
        keys = [key for key in _FFN if _of(config, key) in (members, None) and hasattr(config, key)]
        if not keys or any(settings.get(key, count) != count for key in keys):
            raise ModelError(
                f"config.json of {config.model_type!r} cannot say that FFNs of {members} channels have {count}: experts of one block "
                "must keep equally many, and the width needs a setting of its own"
            )
        settings |= dict.fromkeys(keys, count)
    for members, width, count in by_kind["heads"]:
        heads = int(_of(config, _HEADS) or 0)
        if not heads or heads % members or width % heads:
            raise ModelError(
                f"{heads} heads of {config.model_type!r} do not divide into {members} key-value groups of a width of {width}: "
                "slim channels only"
            )
        settings |= {_HEADS: heads // members * count, _HEAD: width // heads}
        if hasattr(config, _GROUPS):
            settings[_GROUPS] = count
    return settings


def _of(config: Any, key: str) -> Any:
    return getattr(config, key, None)


def described(
    config: Any, raw: Mapping[str, Any], blocks: Sequence[Mapping[str, int]], dropped: Sequence[int] = ()
) -> dict[str, Any]:
    """config.json with the widths of its blocks.

    Args:
        config: of the model, before; `raw` as its file has it.
        blocks: `settings_of_block` of each that is left.
        dropped: numbers of those that are not.
    """
    made = {**raw, **(settings_of_depth(config, raw, dropped) if dropped else {})}
    own: list[dict[str, int]] = [{} for _ in blocks]
    names = getattr(type(config), "attribute_map", {})
    for key in sorted({key for settings in blocks for key in settings}):
        values = {settings[key] for settings in blocks if key in settings}
        name = names.get(key, key)
        if len(values) == 1:
            made[name] = values.pop()
            continue
        for mine, settings in zip(own, blocks, strict=True):
            if key in settings:
                mine[name] = settings[key]
    if any(own):
        digits = len(str(len(own) - 1))
        made[KEY] = {str(index).zfill(digits): mine for index, mine in enumerate(own) if mine}
        made[READS_GLOBAL] = True
    return made
