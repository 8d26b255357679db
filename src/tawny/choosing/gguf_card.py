"""The card beside a GGUF file: what is in it, how near it is to the dense model, and how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tawny.gguf_kinds import GGUF_KINDS
from tawny.words import kl_text, percent, size


def gguf_card(facts: Mapping[str, Any]) -> str:
    """Markdown.

    Args:
        facts: of `Fitted`, plain.
    """
    out, row = Path(facts["out"]), next(x for x in facts["finalists"] if x["name"] == facts["winner"])
    recipe = facts["recipe"]
    counts = Counter(each["kind"] for each in facts["linears"].values())
    kinds = [name for name in GGUF_KINDS if counts[name]]
    given = recipe["calibration"]["text"]
    # Names of files, and not where they lie on the machine that made this.
    text = ", ".join(Path(each).name for each in ([given] if isinstance(given, str) else given))
    seen = f"{recipe['calibration']['samples']} × {recipe['calibration']['seqlen']} tokens"
    solved = f"solved on its grid by `{recipe['solver']['name']}`"
    how = "rounded to its grid by best scales" if facts["settings"]["quick"] else solved
    lines = [
        "---",
        "library_name: gguf",
        "tags: [gguf, quantized]",
        "---",
        f"# {out.name}",
        "",
        f"{Path(str(facts['source'])).name} in {size(facts['bytes'])}, {facts['bits']:.3f} bits a weight, for llama.cpp, Ollama and LM "
        "Studio.",
        f"Each tensor has a type of its own. Values were {how}.",
        "",
        "| | |",
        "|---|---|",
        f"| KL to the dense model | {kl_text(row['kl'], row['kl_stderr'])} nats a token |",
        f"| same next token | {percent(row['top1'], 1)} |",
        f"| perplexity | {row['perplexity']:.2f} (dense {row['dense_perplexity']:.2f}) |",
        f"| measured on | {facts['held_out']['deciding']} windows of {facts['held_out']['tokens']} tokens, held out of the calibration |",
        f"| calibration | {text}, {seen} |",
        f"| linears | {', '.join(f'{counts[name]} × {GGUF_KINDS[name].type}' for name in kinds)} |",
        f"| head | {_type(row['head'])} |",
        *([f"| embedding | {_type(row['embedding'] or row['head'])} |"] if facts["embedding"] else []),
        "",
        "```",
        f"llama-cli -m {out.name}",
        f"printf 'FROM ./{out.name}' > Modelfile && ollama create {out.stem} -f Modelfile && ollama run {out.stem}",
        "```",
        "",
        "Made by `tawny fit --to gguf`. Everything that was measured is in the JSON file beside it.",
        "",
    ]
    return "\n".join(lines)


def _type(kind: str | None) -> str:
    return "as it was" if kind is None else GGUF_KINDS[kind].type
