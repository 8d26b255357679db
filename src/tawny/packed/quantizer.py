"""transformers' side of packed folders: `from_pretrained(DIR)` of its classes works once `tawny` is imported.

Packed shards carry names that plain transformers does not look for, so without this module it fails loudly instead
of making weights up. The quantizer tells it where they are, in memory only; swaps packed modules in before weights
are mapped; and checks every tensor afterwards, before anybody can run the model.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tawny.errors import CheckpointError
from tawny.model.checkpoint import METHOD
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.model.tensorfile import natural
from tawny.packed import format
from tawny.packed.checking import check
from tawny.packed.experts import PackedExperts
from tawny.packed.folder import PackedCheckpoint, PackedFolder, PackedLinearEntry
from tawny.packed.install import (
    ends_of,
    install_experts,
    install_head,
    install_linear,
    install_table,
    keep_dense,
    table_of,
)
from tawny.packed.linear import PackedLinear

logger = logging.getLogger(__name__)
_verify: ContextVar[bool] = ContextVar("tawny_verify", default=True)


@contextlib.contextmanager
def verification(hashes: bool) -> Iterator[None]:
    """Inside, packed folders are opened with or without a look at every hash."""
    token = _verify.set(hashes)
    try:
        yield
    finally:
        _verify.reset(token)


class TawnyConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of config.json."""

    def __init__(
        self,
        values: str = "bf16",
        group: int | None = None,
        head: str | None = None,
        embedding: str | None = None,
        version: int = format.VERSION,
        **rest: Any,
    ) -> None:
        if version != format.VERSION:
            raise CheckpointError(format.of_another(version))
        self.quant_method = METHOD
        self.version = version
        self.values = values
        self.group = group
        self.head = head
        self.embedding = embedding
        rest.pop("quant_method", None)
        # What is called like a method would stand in its place.
        self.__dict__.update({key: value for key, value in rest.items() if not hasattr(type(self), key)})


class TawnyQuantizer(HfQuantizer):  # type: ignore[misc]
    """Opens a packed folder; there is nothing it could quantise on the fly (`tawny.pack` does that)."""

    requires_calibration = True  # that is: only folders that are packed already
    folder: PackedFolder | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        return

    # Called before transformers looks for weights. The names differ between its versions; each is called at most once.
    def update_attn_implementation(self, config: Any) -> Any:
        config.transformers_weights = INDEX
        return config

    update_tp_plan = update_attn_implementation

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Types of packed tensors are the format's; all others follow the model."""
        names = getattr(converter, "source_patterns", None) or [""]
        if self.folder is not None and any(name in self.folder.packed_names for name in names):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files:
            raise CheckpointError("a packed model is opened from its folder; none was given")
        self.folder = folder = _fitting(model, Path(checkpoint_files[0]).parent)
        _install_experts(model, folder)
        for name, entry in folder.linears.items():
            if entry.parameter is not None:
                continue
            table = entry.embedding if entry.embedding and name == table_of(entry.embedding) else None
            old = model.get_submodule(table or name)
            biased = getattr(old, "bias", None) is not None
            packed = PackedLinear.empty(entry.form, biased, old.weight.dtype, "meta")
            _expect(packed, entry)
            # Initialisers of some models reach for the weights of their linears; this one says it needs nothing.
            packed.weight._is_hf_initialized = True  # type: ignore[attr-defined]
            if table is not None:
                install_table(model, table, packed)
            elif entry.embedding is None:
                install_linear(model, name, packed)
                _untie(model, f"{name}.weight")
            else:
                install_head(model, name, entry.embedding, packed)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self.folder is not None
        for name, entry in self.folder.linears.items():
            module = model.get_submodule(name)
            if entry.full:
                module.register_buffer("masks", format.full_masks(entry.shape).to(module.values.device))
        if _verify.get():
            self.folder.verify()
        for name in self.folder.linears:
            check(model.get_submodule(name).packed, name)
        for name in self.folder.dense:
            keep_dense(model, name)
        outside, _, _ = ends_of(model)
        if outside is not None:
            keep_dense(model, outside)
        return model

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        # transformers asks before it refuses to save, and refers to what was logged.
        logger.warning(
            "save_pretrained cannot write packed weights: write a packed folder with tawny.pack or `tawny pack`, "
            "and get a dense checkpoint back with `tawny unpack`"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _expect(made: PackedLinear, entry: PackedLinearEntry) -> None:
    """Buffers as the file has them: no masks where every weight is there."""
    if entry.full:
        made.register_buffer("masks", made.masks, persistent=False)


def _install_experts(model: Any, folder: PackedFolder) -> None:
    """Packed experts, empty yet, in the place of the fused parameters that the folder holds packed."""
    for key, parameter in list(model.named_parameters()):
        if (entries := folder.experts.get(key)) is None:
            continue
        empty = [PackedLinear.empty(entry.form, device="meta").packed for entry in entries]
        experts = PackedExperts(empty, entries[0].transposed, parameter.dtype)
        for expert, entry in zip(experts, entries, strict=True):
            _expect(expert, entry)
        install_experts(model, key, experts)


def _fitting(model: Any, path: Path) -> PackedFolder:
    """The packed folder, once every weight it names has been found in the model, and every weight of the model in it.

    Raises:
        CheckpointError: names the weight that does not fit, or the class that opens the folder.
    """
    checkpoint = PackedCheckpoint(path)
    try:
        return _fitted(model, path, checkpoint)
    except CheckpointError as error:
        if held := _of_another_class(model):
            raise CheckpointError(f"{path} {held}") from error
        raise


def _of_another_class(model: Any) -> str:
    """Of a model that is not what its folder holds: what that is, and what opens it; otherwise ""."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from tawny.model.skeleton import model_class

    named, opens = model.config.architectures or [], model_class(model.config).__name__
    classes = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    # Language models open as causal ones, whatever of them the configuration names.
    causal = opens == "AutoModelForCausalLM" and type(model) in (
        classes if isinstance(classes, tuple) else (classes,)
    )
    if not named or type(model).__name__ in named or causal:
        return ""
    part = (
        f"; its base model is `.{model.base_model_prefix}`" if type(model).__name__.endswith("Model") else ""
    )
    return f"holds a {named[0]}, not a {type(model).__name__}: open it with {opens} or tawny.load{part}"


def _fitted(model: Any, path: Path, checkpoint: PackedCheckpoint) -> PackedFolder:
    checkpoint.map_to(model)
    folder = checkpoint.packed
    modules = dict(model.named_modules())
    targets = {source: unit.targets for unit in checkpoint.units for source in unit.sources}

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: {what}; the packed folder is damaged or of another model: pack it again"
        )

    parameters = dict(model.named_parameters())
    for name, entries in folder.experts.items():
        shape = (len(entries), *entries[0].shape_of())
        if name not in parameters or tuple(parameters[name].shape) != shape:
            raise refuse(
                f"the model has no parameter {name!r} of shape {list(shape)}, whose experts are packed"
            )
        for source in (source for entry in entries for source in entry.sources):
            if targets.get(source) != [name]:
                raise refuse(f"{name!r} is packed in the place of {targets.get(source)}")
        if entries[0].rows is not None and not _in_order(entries, checkpoint):
            raise refuse(f"the experts of {name!r} are not in the order of their sources")
    for name, entry in folder.linears.items():
        if entry.parameter is not None:
            continue
        weights = {f"{name}.weight"} | ({f"{entry.embedding}.weight"} if entry.embedding else set())
        own_table = entry.embedding is not None and name == table_of(entry.embedding)
        for module in (None if own_table else name, entry.embedding):
            if module is not None and getattr(modules.get(module), "weight", None) is None:
                raise refuse(f"the model has no weight {module!r}, which is packed")
        for target in (target for source in entry.sources for target in targets.get(source, ())):
            if target not in weights:
                raise refuse(f"{name!r} is packed in the place of {target!r}")
    for name in folder.dense:
        if name not in modules:
            raise refuse(f"the model has no linear {name!r}, which the index calls dense")
    return folder


def _in_order(entries: Sequence[PackedLinearEntry], checkpoint: PackedCheckpoint) -> bool:
    """Whether the e-th expert consists of the e-th of each kind of source, the kinds in one order for all."""
    pattern_of = {s: p for unit in checkpoint.units for s, p in zip(unit.sources, unit.patterns, strict=True)}
    kinds = [pattern_of[source] for source in entries[0].sources]
    columns = zip(*(entry.sources for entry in entries), strict=True)
    return all(
        [pattern_of[source] for source in column] == [kind] * len(column)
        and list(column) == sorted(column, key=natural)
        for kind, column in zip(kinds, columns, strict=True)
    )


def _untie(model: Any, weight: str) -> None:
    """A packed weight that serves no embedding was stored apart from the one the configuration ties it to."""
    keys = getattr(model, "all_tied_weights_keys", None)
    if isinstance(keys, dict):
        model.all_tied_weights_keys = {k: v for k, v in keys.items() if weight not in (k, v)}


def register() -> None:
    """Make transformers know the method; again is no harm."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = TawnyConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = TawnyQuantizer


register()
