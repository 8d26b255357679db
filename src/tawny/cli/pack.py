"""`tawny pack`: a checkpoint with zeros becomes a file without them."""

from __future__ import annotations

import tawny
from tawny.cli.console import Console
from tawny.cli.options import RECIPE, Model, Out, Overwrite, option, packed_values
from tawny.cli.root import verb
from tawny.kinds import KINDS
from tawny.report.frames import Frame, Result, facts
from tawny.words import duration, percent, size


@verb(
    "tawny pack pruned --out packed",
    "tawny pack pruned --out packed --values int8 --head int8",
    "tawny pack pruned --out packed --values int8 --group 128 --json",
)
def pack(
    model: Model,
    console: Console,
    *,
    values: str | None = option(
        "--values KIND",
        "Surviving weights as "
        + ", ".join(f"{k.name} ({k.help})" for k in KINDS.values())
        + ". Default: what they were solved for, else bf16.",
        RECIPE,
    ),
    group: int | None = option(
        "--group COLUMNS",
        f"Columns that share a scale, of integers: 32, 64 or 128. Default: {KINDS['int4'].span(None)}, and the whole row with int8.",
        RECIPE,
    ),
    head: str | None = option(
        "--head KIND",
        "Pack head and embedding too, int8 say; if they are tied, one matrix serves both.",
        RECIPE,
    ),
    embedding: str | None = option(
        "--embedding KIND", "Another kind for an embedding that is not the head's weight.", RECIPE
    ),
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Pack MODEL: a bit mask and the surviving values instead of matrices full of zeros."""
    with console.progress() as progress:
        report = tawny.pack(
            model,
            out,
            None if values is None else packed_values(values),
            group,
            None if head is None else packed_values(head),
            None if embedding is None else packed_values(embedding),
            overwrite=overwrite,
            progress=progress,
        )
    from tawny.report.publish import refresh

    refresh(out)
    console.result(report.to_dict(), pack_tables)


def pack_tables(report: Result) -> list[Frame]:
    """What packing saved, and what it could not pack."""
    linears = report["linears"]
    packed = [linear for linear in linears if linear["form"] == "packed"]
    weights = [linear["shape"][0] * linear["shape"][1] for linear in packed]
    kept = [w * (1 - linear["sparsity"]) for w, linear in zip(weights, packed, strict=True)]
    kind = report["values"] + (f", a scale each {report['group']} columns" if report["group"] else "")
    ends = "".join(f", {end} {report[end]}" for end in ("head", "embedding") if report[end])
    rows = [
        ("size", f"{size(report['bytes'])}, {percent(report['ratio'], 1)} of {size(report['source_bytes'])}"),
        ("values", kind + ends),
        (
            "packed",
            f"{report['packed']} weights, {percent(1 - sum(kept) / sum(weights), 1)} zeros, "
            f"{8 * sum(linear['bytes'] for linear in packed) / sum(weights):.2f} bits each"
            if packed
            else "nothing",
        ),
    ]
    if report["dense"]:
        rows.append(("dense", f"{report['dense']} linears with too few zeros to pay"))
    if report["untouched"]:
        rows.append(("untouched", f"{len(report['untouched'])} weights stay as they are"))
    rows += [
        ("time", duration(report["seconds"])),
        ("written", f"{report['out']}: `tawny.load`, or `import tawny` before transformers, opens it"),
    ]
    return [facts(rows)]
