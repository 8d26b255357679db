"""The options that several verbs share: one name, one help text, one panel each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tawny.errors import UserError, nearest
from tawny.kinds import KINDS, names_of
from tawny.model.trust import trusting

# Panels of `--help`.
RECIPE, DATA, OUTPUT = "What to do", "Calibration", "Output and machine"
MOST_THREADS = 1024  # OpenMP ends the process where the system refuses it a thread


def option(names: str, help: str, panel: str, default: Any = None, **more: Any) -> Any:
    """The default of a parameter that is an option, from its names and the word for its value: `-s --sparsity SHARE`."""
    return shared(names, help, panel, default, **more)


def shared(names: str, help: str, panel: str, *default: Any, **more: Any) -> Any:
    """The same for `Annotated`: an option that several verbs share, whose default stands in their signatures."""
    words = names.split()
    flags = [word for word in words if word.startswith("-")]
    metavar = words[-1] if len(words) > len(flags) else None
    return typer.Option(*default, *flags, metavar=metavar, help=help, rich_help_panel=panel, **more)


def path_named(text: str) -> Path:
    """The path of an option; a shell leaves `~` as it is after `--out=`."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{text}: {error}") from None


def folder_named(text: str) -> Path:
    """The folder of `--out`; an empty text would be the one the command runs in."""
    if not text.strip():
        raise typer.BadParameter("it is empty; give a folder to write, such as ./pruned")
    return path_named(text)


Out = Annotated[Path, shared("--out DIR", "Folder to write.", OUTPUT, parser=folder_named)]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file, or smollm2 (packaged).")
]
RecipeFile = Annotated[
    Path | None,
    shared(
        "-c --recipe RECIPE",
        "Recipe to start from: a YAML file, or a name of `tawny list recipes`.",
        RECIPE,
        parser=path_named,
    ),
]
Device = Annotated[str | None, shared("--device DEVICE", "cpu, cuda, cuda:1 … Default: cpu.", OUTPUT)]


def _possible_threads(count: int | None) -> int | None:
    if count is not None and not 1 <= count <= MOST_THREADS:
        raise typer.BadParameter(
            f"{count} given, expected 1 to {MOST_THREADS}; leave it out for torch's own choice"
        )
    return count


def possible_seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise typer.BadParameter(f"{seed} given, expected 0 to {2**63 - 1}")
    return seed


Threads = Annotated[
    int | None,
    shared("--threads N", "CPU threads. Default: torch's own choice.", OUTPUT, callback=_possible_threads),
]
Memory = Annotated[
    str | None,
    shared("--memory SIZE", "Limit of peak memory, such as 6GB; the result does not depend on it.", OUTPUT),
]
AsJson = Annotated[bool, shared("--json", "Print one JSON document on stdout.", OUTPUT)]
Overwrite = Annotated[bool, shared("--overwrite", "Replace a finished folder.", OUTPUT)]
StartOver = Annotated[
    bool,
    shared(
        "--overwrite",
        "Replace what is finished; discard an unfinished run that began without it.",
        OUTPUT,
    ),
]


def _trust(context: typer.Context, asked_for: bool) -> bool:
    context.with_resource(trusting(asked_for))  # until the verb ends
    return asked_for


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code from a model's folder, which is refused otherwise.",
        callback=_trust,
        rich_help_panel=OUTPUT,
    ),
]


def packed_values(text: str) -> str:
    """A kind of packed values by name, in capitals or not.

    Raises:
        UserError: there is no such kind.
    """
    kind = text.lower()
    if kind not in KINDS:
        raise UserError(
            f"packed values {text!r} are not known{nearest(kind, tuple(KINDS))}; choose one of {names_of(KINDS.values())}"
        )
    return kind


@dataclass(frozen=True)
class Aim:
    """What a fit is to reach, from which measurements, and with how much work."""

    size: Annotated[
        str | None,
        shared(
            "--size SIZE",
            "Bytes of the weight files and their index, or of the GGUF file, such as 700MB or 4GB.",
            RECIPE,
        ),
    ] = None
    bits: Annotated[
        float | None,
        shared(
            "--bits BITS",
            "The same bytes as bits for each weight, embeddings and head included, such as 4.25.",
            RECIPE,
        ),
    ] = None
    speed: Annotated[
        float | None,
        shared("--speed RATE", "Tokens a second that this machine is to reach, such as 20.", RECIPE),
    ] = None
    ram: Annotated[
        str | None,
        shared(
            "--ram SIZE",
            "Memory of the machine that decodes, such as 8GB, with --context tokens in it.",
            RECIPE,
        ),
    ] = None
    context: Annotated[
        int | None,
        shared("--context N", "Of --ram: tokens of prompt and text. Default: 4096.", RECIPE),
    ] = None
    measured: Annotated[
        Path | None,
        shared(
            "--measured PATH",
            "Reuse what an earlier fit of the same model and text measured.",
            RECIPE,
            parser=path_named,
        ),
    ] = None
    to: Annotated[
        str | None,
        shared(
            "--to TARGET",
            "packed (default), a folder for Tawny's own decoder; gguf, one file for llama.cpp, Ollama and LM Studio; compressed-tensors, a folder "
            "for vLLM, SGLang and transformers.",
            RECIPE,
        ),
    ] = None
    kinds: Annotated[
        str | None,
        shared(
            "--kinds LIST",
            "Of gguf: the types that tensors may get, such as q4_k,q5_k,q6_k; of compressed-tensors w4, w8 or bf16 (unchanged). Default: all.",
            RECIPE,
        ),
    ] = None
    template: Annotated[
        Path | None,
        shared(
            "--template FILE",
            "Of gguf: whole file of the model, of any architecture, whose keys and other tensors are kept.",
            RECIPE,
            parser=path_named,
        ),
    ] = None
    quick: Annotated[
        bool,
        shared("--quick", "Round by best scales and solve nothing: sooner, with a higher KL.", RECIPE),
    ] = False

    def keys(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `tawny.fit` and `tawny.plan_fit`; `own`: what -o fit.KEY=VALUE says, which comes last."""
        named = {name: value for name, value in vars(self).items() if name != "quick"}
        return named | {f"fit.{key}": value for key, value in {"quick": self.quick or None, **own}.items()}
