"""What a dense and a pruned model write after the same words: the number a person understands at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tawny.calibration.text import Text
from tawny.decoding.stream import generate
from tawny.machine import free_memory
from tawny.model.source import load_tokenizer, resolve
from tawny.packed.opening import load_quietly, loaded_bytes
from tawny.precision import native_dtype
from tawny.progress import Progress, silent

WORDS = 10  # of a prompt
TOKENS = 40  # of an answer
_LONGEST = 90  # characters, where words are not written apart


def prompts_from(text: Text, count: int = 3) -> list[str]:
    """The first words of `count` paragraphs, spread evenly over the text."""
    paragraphs = [" ".join(part.split()) for part in text.text.split("\n\n")]
    long = [part for part in paragraphs if len(part) >= 2 * _LONGEST]
    chosen = long or [part for part in paragraphs if part]
    step = max(1, len(chosen) // count)
    prompts = [" ".join(part.split()[:WORDS])[:_LONGEST].strip() for part in chosen[::step][:count]]
    return list(dict.fromkeys(prompts))


def text_samples(
    dense: str | Path,
    pruned: str | Path,
    prompts: Sequence[str],
    *,
    tokens: int = TOKENS,
    progress: Progress = silent,
) -> list[dict[str, str]]:
    """`[{"prompt", "dense", "pruned"}, …]`: both models' likeliest continuations, so that anyone gets the same words.

    Text needs a whole model in memory, which pruning does not: where it would not fit, the list is empty and the
    progress is told why.
    """
    folders = {"dense": resolve(dense, progress.say), "pruned": resolve(pruned, progress.say)}
    needed = max(loaded_bytes(folder) for folder in folders.values())
    free = free_memory()
    if free is not None and needed > 0.6 * free:
        progress.say("no samples of text: they need the whole model in memory, and it would not fit")
        return []
    samples = [{"prompt": prompt} for prompt in prompts]
    for name, folder in folders.items():
        progress.say(f"letting the {name} model write")
        tokenizer, model = load_tokenizer(folder), load_quietly(folder, native_dtype())
        for sample in samples:
            text = generate(model, sample["prompt"], max_tokens=tokens, chat=False, tokenizer=tokenizer)
            sample[name] = " ".join(text.text.split())
        del model
    return samples
