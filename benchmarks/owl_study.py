"""Do the claims of the OWL paper (2310.05175) hold here? One cell a recipe, one question a table.

    python benchmarks/owl_study.py --text wiki --text PATH.txt

- `lod`: does pruning destroy outliers, and who keeps them? Dense against pruned by each solver, uniform and OWL.
- `granularity`: one ratio a block against one a module (attention, FFN) and one a linear.
- `order`: OWL against OWL reversed, uniform, one global threshold, ER and ER-plus.
- `M`, `lambda`: how sensitive is it?
- `sweep`: 10 to 80 %, OWL against uniform.
- `calibration`: 1 to 128 samples.
- `cost`: the time of each allocator beside the time of pruning.

`--question NAME …` chooses some. A question's cells are shared with the others where they are the same, and the same
command goes on where a run was stopped (see cells.py). A tiny run:
`--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --sizes 1 4 --sweep 0.5`.
"""

from __future__ import annotations

from cells import Cells, Keys, parser_for


def questions(
    sparsity: float, solver: str, sweep: list[float], sizes: list[int], seed: int
) -> dict[str, dict[str, Keys]]:
    """Question → label → the cell that answers it."""

    def cell(allocator: str = "owl", **keys: object) -> Keys:
        return {"sparsity": sparsity, "allocator": allocator, "solver": solver, "seed": seed, **keys}

    return {
        "lod": {
            f"{each} + {allocator}": {**cell(allocator), "solver": each}
            for each in ("magnitude", "wanda", "sparsegpt")
            for allocator in ("uniform", "owl")
        },
        "granularity": {
            "block": cell(),
            "module": cell(**{"allocator.granularity": "module"}),
            "linear": cell(**{"allocator.granularity": "linear"}),
        },
        "order": {
            "owl": cell(),
            "uniform": cell("uniform"),
            "owl reversed": cell(**{"allocator.reverse": True}),
            "global": cell("global"),
            "er": cell("er"),
            "er-plus": cell("er-plus"),
        },
        "M": {f"{M}": cell(**({} if M == 5 else {"allocator.M": M})) for M in (3, 5, 7, 10)},
        "lambda": {
            f"{value}": cell(**({} if value == 0.08 else {"allocator.lambda": value}))
            for value in (0.02, 0.04, 0.08, 0.12, 0.15, 0.2)
        },
        "sweep": {
            f"{share:.0%} {allocator}": {**cell(allocator), "sparsity": share}
            for share in sweep
            for allocator in ("uniform", "owl")
        },
        "calibration": {
            f"{size} {allocator}": cell(allocator, **{"calibration.samples": size})
            for size in sizes
            for allocator in ("uniform", "owl")
        },
        "cost": {
            name: cell(name)
            for name in ("uniform", "er", "er-plus", "global", "owl", "dlp", "alpha", "atp", "lsa", "blend")
        },
    }


def main() -> None:
    parser = parser_for(__doc__, "owl_study.json")
    parser.set_defaults(samples=16, windows=4)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--solver", default="wanda")
    parser.add_argument("--sweep", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--question", nargs="+", default=None)
    args = parser.parse_args()
    cells = Cells(args)
    for seed in args.seeds:
        asked = questions(args.sparsity, args.solver, args.sweep, args.sizes, seed)
        unknown = set(args.question or ()) - set(asked)
        if unknown:
            raise SystemExit(f"--question {' '.join(unknown)} is unknown: {', '.join(asked)}")
        for question in args.question or asked:
            cells.results.setdefault("questions", {})[question] = {
                label: {k: v for k, v in keys.items() if k != "seed"}
                for label, keys in asked[question].items()
            }
            # An outlier is counted for every cell of the first question, and for nothing else.
            with_lod = {tuple(sorted(map(str, keys.items()))) for keys in asked["lod"].values()}
            cells.run(
                asked[question].values(),
                lod=lambda keys, some=with_lod: tuple(sorted(map(str, keys.items()))) in some,
            )
    cells.save()


if __name__ == "__main__":
    main()
