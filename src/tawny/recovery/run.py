"""`recover`: train a pruned model until it is good again, without losing a zero.

Masked distillation: the survivors learn from next-token loss plus the KL to the dense model over the full vocabulary
(as in PERP, 2312.15230, only the mask is fixed; and as in distillation-aware pruning, the dense model is the teacher). The
teacher's hidden states come from disk (teacher.py), logits exist for a chunk of tokens (objective.py), the optimiser knows
survivors alone (coordinates.py). The loop is in training.py; a run that is stopped goes on from its last state to the same
curve (state.py). This file only finds out what is recovered: a packed folder (packed.py), or a dense folder or a live
model (dense.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tawny.errors import TextError
from tawny.model.checkpoint import is_packed
from tawny.model.source import resolve
from tawny.model.trust import opens_models
from tawny.process_group import refuse_several
from tawny.progress import Progress, silent
from tawny.recovery.dense import RecoveryRequest, recover_dense
from tawny.recovery.packed import check_grid, on_its_grid, recover_packed
from tawny.recovery.record import RecoveryRecord
from tawny.recovery.settings import Recovery
from tawny.run.place import place_of


@opens_models
def recover(
    source: str | Path | nn.Module,
    teacher: str | Path | nn.Module | None = None,
    out: str | Path | None = None,
    *,
    settings: Recovery | Mapping[str, Any] | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
    tokenizer: Any = None,
    text: Tensor | Mapping[str, Tensor] | str | Path | list[str] | None = None,
    held_out: Tensor | Mapping[str, Tensor] | None = None,
    trust_remote_code: bool = False,
    **keys: Any,
) -> RecoveryRecord:
    """Train what pruning left, on a text and against the dense model, with every zero staying zero.

    Args:
        source: a pruned folder, dense or packed (then so is `out`); or a live module, which is trained in place.
        teacher: the dense model, as a folder, hub id, `.gguf` file, `smollm2` or live module; None only with `kl=0`.
        out: folder to write; needed for a path, optional for a live module.
        settings: how; `keys` override single entries (`minutes=30, lr=2e-4, train="lora"`).
        progress: told how far the work is.
        overwrite: replace an existing `out` once the new one is complete, and discard an unfinished run, unless it is
            this same one, which goes on.
        tokenizer: for a live module and a text, or the image processor of one and pictures.
        text: name or path of a text, or several with shares, or tokens `[windows, seqlen]`. For models that see `images:DIR`.
            For encoders also tensors by the names that the model's forward gives them, samples along the first dimension.
        held_out: tokens `[windows, seqlen]`, or tensors by name, to measure on instead of a part of the text.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        UserError: something asked for cannot be done; one line says what can.
        NumericalError: the loss became NaN; the best model so far is written, if any was better than the start.
        Interrupted: the user pressed Ctrl-C. The same command goes on; a live model has its best weights so far.
    """
    refuse_several("recovery")
    several = isinstance(text, list) and all(isinstance(one, str | Path) for one in text)
    if several or isinstance(text, str | Path):
        keys["text"] = text
    elif text is not None and not isinstance(text, Tensor | Mapping):
        raise TextError(
            f"text is a {type(text).__name__}; expected a name, a path, or a torch tensor [windows, seqlen], or several by name for encoders"
        )
    chosen = Recovery.make(settings, **keys)
    given = text if isinstance(text, Tensor | Mapping) else None
    if isinstance(given, Tensor) and given.dim() == 2 and 0 not in given.shape:
        chosen = Recovery.make(chosen, seqlen=int(given.shape[1]))
    place = None if out is None else place_of(out)
    record = carry_out(
        RecoveryRequest(source, teacher, place, chosen, progress, overwrite, tokenizer, given, held_out)
    )
    if record.failure is not None:
        raise record.failure
    return record


def carry_out(request: RecoveryRequest) -> RecoveryRecord:
    """`recover`, but a loss that became NaN is no error once a better model is written: `failure` of the record has it."""
    source, out, settings, progress = request.source, request.out, request.settings, request.progress
    if out is not None and not isinstance(source, nn.Module):
        folder = resolve(source, progress.say)
        check_grid(settings, folder)
        if is_packed(folder):
            return recover_packed(request, folder, out)
        settings, kinds = on_its_grid(settings, folder, progress)
        request = replace(request, settings=settings, kinds=kinds)
    return recover_dense(request)
