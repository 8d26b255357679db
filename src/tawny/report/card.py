"""The model card written beside the weights: what was done, with the exact recipe, and how to use the result."""

from __future__ import annotations

import yaml

from tawny.record import Record


def model_card(record: Record) -> str:
    """Markdown with hub metadata; everything in it comes from the record."""
    metadata: dict[str, object] = {
        "tags": ["pruned", "sparse", "tawny"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    if record.source.count("/") == 1 and not record.source.startswith((".", "/")):
        metadata["base_model"] = record.source
    recipe = record.recipe
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {record.source.rstrip('/').split('/')[-1]}, {record.sparsity:.1%} sparse",
        "",
        f"{record.zeros:,} of {record.prunable:,} prunable weights are zero ({record.sparsity:.2%}); "
        f"the model has {record.parameters:,} parameters in all. Allocated by `{recipe['allocator']['name']}`, "
        f"solved by `{recipe['solver']['name']}`, pattern `{recipe['pattern']}`{_afterwards(record)}.",
        "",
        f"{_untouched(record)} are those of the source, to the bit. The zeros are stored: this folder is "
        "as large as the dense one and opens with plain transformers:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False).strip(),
        "```",
        "",
        "Calibration text: " + ", ".join(f"{key} {value}" for key, value in record.text.items()) + "."
        if record.text
        else "No calibration text was needed.",
        "",
        "## Limits",
        "",
        "Pruning loses quality, and more of it the smaller the model and the higher the sparsity. Measure the model on "
        "your own task before relying on it.",
        "",
        "Every number here can be traced in `run.json`.",
        "",
    ]
    return "\n".join(lines)


def _afterwards(record: Record) -> str:
    """What was done to the survivors once the mask was chosen."""
    steps = ["refitted by least squares"] if record.recipe.get("refit") else []
    if record.refined:
        epochs = record.recipe["refine"]["epochs"]
        steps.append(
            f"trained block by block for {epochs} epoch{'s' * (epochs != 1)} to give the dense outputs"
        )
    return f"; the survivors were {' and '.join(steps)}" if steps else ""


def _untouched(record: Record) -> str:
    trained = any(made["also"] for made in record.refined)
    return (
        "Embeddings and head (not the blocks' norms and biases, which were trained along)"
        if trained
        else ("Embeddings, head, norms and biases")
    )
