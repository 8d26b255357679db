"""Which allocator: perplexity of every allocator × solver × sparsity over calibration seeds, and what each costs.

    python benchmarks/allocators.py --text wiki --text PATH.txt --seeds 0 1 2

Cells are made seed by seed, so that a run that is stopped leaves whole tables of the first seeds. The same command goes
on (see cells.py). A tiny run: `--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --sparsity 0.5 --solver wanda`.
"""

from __future__ import annotations

import itertools

from cells import Cells, Keys, parser_for

ALLOCATORS = ["uniform", "er", "er-plus", "global", "owl", "dlp", "alpha", "atp", "lsa", "blend", "auto"]


def main() -> None:
    parser = parser_for(__doc__, "allocators.json")
    parser.set_defaults(samples=16, windows=4)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--allocator", nargs="+", default=ALLOCATORS)
    parser.add_argument("--solver", nargs="+", default=["wanda", "sparsegpt", "alps"])
    parser.add_argument(
        "--trials", type=int, default=None, help="of a search (auto); its default if left out"
    )
    args = parser.parse_args()
    cells = Cells(args)
    wanted: list[Keys] = []
    for seed, sparsity, solver, allocator in itertools.product(
        args.seeds, args.sparsity, args.solver, args.allocator
    ):
        keys: Keys = {"sparsity": sparsity, "allocator": allocator, "solver": solver, "seed": seed}
        if allocator == "auto" and args.trials is not None:
            keys["search.trials"] = args.trials
        wanted.append(keys)
    cells.run(wanted)


if __name__ == "__main__":
    main()
