"""What other runtimes make of a pruned model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.shared import SHAPE_NAMES, machine_line


def runtimes(result: Mapping[str, Any]) -> str:
    """A row for each type of the file."""
    lines = [
        "| type | file | same tokens of our decoder | differs at a margin of at most | furthest logit |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        found = row["prompts"]
        whole = sum(one["equal"] == one["tokens"] for one in found)
        margins = [one["margin"] for one in found if one["margin"] is not None]
        said = f"{max(margins):.3f}" if margins else "–"
        furthest = max(one["largest_difference"] for one in found)
        lines.append(
            f"| {row['type']} | {row['bytes'] / 1e6:.0f} MB | {whole} of {len(found)} texts | {said} | {furthest:.3f} |"
        )
    prompts = [one for row in result["rows"] for one in row["prompts"]]
    same = sum(one["same_tokens_of_prompt"] for one in prompts)
    name = SHAPE_NAMES.get(result["model"], result["model"])
    count = max(one["tokens"] for one in prompts)
    return (
        f"{name} at {result['sparsity']:.0%}, up to {count} greedy tokens a text, our decoder in float32 on the bfloat16 weights. "
        f"llama.cpp tokenised {same} of {len(prompts)} prompts as we did. Where a text differs, *margin* is the distance of our two best "
        "logits there. *Furthest logit* is the largest difference of one logit up to there. Types that begin with Q round the weights, so "
        "their texts may differ anywhere.\n\n"
        + "\n".join(lines)
        + f"\n\n{machine_line(result)[:-7]} llama-cpp-python {result['llama_cpp_python']}.</sub>\n"
    )
