"""Say the widths of a slim model in its config.json: one for all blocks, or `per_layer_config` where they differ.

Which settings make the widths no structure can tell, so their names are a table here; whether they do is proven by opening
the result (run.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tawny.errors import ModelError
from tawny.model.couplings import Coupling
from tawny.model.own_blocks import KEY, READS_GLOBAL
from tawny.patterns import MemberKind
from tawny.slimming.depth import settings_of_depth

_FFN = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
_HEADS, _GROUPS, _HEAD = "num_attention_heads", "num_key_value_heads", "head_dim"


def config_of_block(config: Any, index: int) -> Any:
    """The configuration that block `index` is built from: the model's, with what `per_layer_config` changes in it."""
    return config.per_layer_config[index] if KEY in config.to_dict() else config


def key_of_text(config: Any, raw: Mapping[str, Any]) -> str | None:
    """The key of config.json under which the widths of blocks lie; None where they lie at its top.

    Args:
        config: of the whole model; `raw` as its file has it.
    """
    text = config.get_text_config()
    # Older files of some models keep at the top what transformers nests once it has read them.
    return next((key for key, part in vars(config).items() if part is text and key in raw), None)


def settings_of_block(config: Any, couplings: Sequence[Coupling], kept: Sequence[int]) -> dict[str, int]:
    """What the configuration of one block would have to say: setting → value.

    Args:
        config: of the block, before.
        kept: members that each coupling keeps.

    Raises:
        ModelError: it has no setting for a width that has changed, or heads do not divide into the groups.
    """
    by_kind: dict[MemberKind, set[tuple[int, int, int]]] = {"channels": set(), "heads": set()}
    for coupling, count in zip(couplings, kept, strict=True):
        by_kind[coupling.kind].add((coupling.members, coupling.consumer.shape[1], count))
    settings: dict[str, int] = {}
    # Those that change come first: what keeps its width may then do without a setting.
    for members, _, count in sorted(by_kind["channels"], key=lambda found: found[0] == found[2]):
        keys = [key for key in _FFN if _of(config, key) in (members, None) and hasattr(config, key)]
        if not keys or any(settings.get(key, count) != count for key in keys):
            if count == members:  # as before, however the configuration says it
                continue
            raise ModelError(
                f"config.json of {config.model_type!r} cannot say that FFNs of {members} channels have {count}: experts of one block "
                "must keep equally many, and the width needs a setting of its own"
            )
        settings |= dict.fromkeys(keys, count)
    for members, width, count in by_kind["heads"]:
        heads = int(_of(config, _HEADS) or 0)
        groups = int(_of(config, _GROUPS) or members)  # those of a delta net or a convolution are others
        if not heads or heads % members or width % heads or members != groups:
            if count == members:
                continue
            raise ModelError(
                f"config.json of {config.model_type!r} cannot say that {members} groups of heads have become {count}: it tells of {heads} heads "
                f"in {groups} key-value groups, and of no others; slim channels only"
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
    """config.json, or the part of it that describes the blocks, with their widths.

    Args:
        config: of the blocks, before; `raw` as its file has it.
        blocks: `settings_of_block` of each that is left.
        dropped: numbers of those that are not.
    """
    settled = {**raw, **(settings_of_depth(config, raw, dropped) if dropped else {})}
    # Blocks are described anew below. Where they have become equal, nothing is left to say of single ones.
    for key in (KEY, READS_GLOBAL):
        settled.pop(key, None)
    names = getattr(type(config), "attribute_map", {})
    said = [{names.get(key, key): value for key, value in settings.items()} for settings in blocks]
    widths = {key for settings in said for key in settings}
    left = [index for index in range(len(blocks) + len(dropped)) if index not in dropped]
    said = [
        {**_before(config, index, widths), **settings} for index, settings in zip(left, said, strict=True)
    ]
    own: list[dict[str, Any]] = [{} for _ in blocks]
    for key in sorted({key for settings in said for key in settings}):
        values = [settings[key] for settings in said if key in settings]
        if all(value == values[0] for value in values):
            settled[key] = values[0]
            continue
        for mine, settings in zip(own, said, strict=True):
            if key in settings:
                mine[key] = settings[key]
    if any(own):
        digits = len(str(len(own) - 1))
        settled[KEY] = {str(index).zfill(digits): mine for index, mine in enumerate(own) if mine}
        settled[READS_GLOBAL] = True
    return settled


def _before(config: Any, index: int, widths: set[str]) -> dict[str, Any]:
    """One block's values of the settings that it, or another block, had of its own before."""
    own = {int(number): settings for number, settings in config.to_dict().get(KEY, {}).items()}
    # A block that has no new width of a kind, such as that of experts, must not keep the old one of all.
    others = {key for settings in own.values() for key in settings} - widths
    block = config_of_block(config, index)
    return {key: getattr(block, key) for key in {*others, *own.get(index, {})}}
