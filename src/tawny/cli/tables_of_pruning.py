"""What prune and plan show alike: the recipe in a line, and the sparsity of every block."""

from __future__ import annotations

from collections.abc import Sequence

from tawny.calibration.mixture import in_words, parse_texts
from tawny.report.frames import Frame, Result, table
from tawny.report.view import by_block, mean_of
from tawny.words import bar, percent


def recipe_words(recipe: Result, reads_text: bool, seqlen: int) -> str:
    """The recipe in a line; a sample of its calibration makes `seqlen` hidden states."""
    text = recipe["calibration"]
    factor = recipe.get("output", {}).get("factor", "none")
    steps = f" + output {factor}" if factor != "none" else ""
    steps += " + refit" if recipe.get("refit") else ""
    if epochs := recipe.get("refine", {}).get("epochs"):
        steps += f" + {epochs} epoch{'s' * (epochs != 1)} a block"
    values = recipe.get("values", {})
    if values.get("mean"):
        steps += f" on {', '.join(values['of'])} at {values['mean']:g} bits"
    elif values.get("kind"):
        steps += f" on {values['kind']}"
    unit = "patches" if any(source.is_pictures for source in parse_texts(text["text"])) else "tokens"
    seen = f"calibrated on {text['samples']} × {seqlen} {unit} of {in_words(text['text'])}"
    return (
        f"{recipe['allocator']['name']} + {recipe['solver']['name']}{steps}, {recipe['pattern']}, "
        f"{seen if reads_text else 'no text needed'}"
    )


def allocation_table(linears: Sequence[Result]) -> Frame:
    """Sparsity block by block, with the reconstruction error where it is known.

    Args:
        linears: with `block`, `shape`, `sparsity`, and maybe `error` and `pattern`.
    """
    errors = any("error" in linear for linear in linears)
    frame = table("block", "linears", "sparsity", "", *["error"] * errors, left=(3,))
    for block, members in by_block(linears):
        share = mean_of(members, "sparsity")
        # The pattern is worth its place only where blocks may differ in it.
        patterns = {linear.get("pattern", "") for linear in members}
        pattern = f"  {patterns.pop()}" if len(patterns) == 1 and ":" in next(iter(patterns)) else ""
        error = [f"{mean_of(members, 'error'):.4f}"] if errors else []
        frame.add(str(block), str(len(members)), percent(share) + pattern, bar(share), *error)
    return frame
