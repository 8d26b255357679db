"""Which solver, and what one more step is worth: every solver, alone, refitted, refined, and both.

    python benchmarks/solvers.py --text wiki --text PATH.txt --seeds 0 1 2

Cells are made seed by seed and step by step, so that a run that is stopped leaves whole tables; the same command goes
on (see cells.py). `mean_error` is the share of a linear's output energy that its solve and refit destroyed, averaged
over linears: in refined rows behind refined blocks, and before the block itself is.
`refine+repeat` refines on samples whose last quarter says again what stood before it. A tiny run:
`--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --sparsity 0.5 --solver wanda --epochs 1`.
"""

from __future__ import annotations

import itertools

from cells import Cells, Keys, parser_for

SOLVERS = ["wanda", "ria", "sparsegpt", "alps"]
STEPS = ["alone", "refit", "refine", "refine+repeat", "refit+refine"]


def keys_of(sparsity: float, allocator: str, solver: str, step: str, seed: int, epochs: int) -> Keys:
    keys: Keys = {"sparsity": sparsity, "allocator": allocator, "solver": solver, "seed": seed}
    if "refit" in step:
        keys["refit"] = True
    if "refine" in step:
        keys["refine.epochs"] = epochs
    if "repeat" in step:
        keys["calibration.repeat"] = 0.25
    return keys


def main() -> None:
    parser = parser_for(__doc__, "solvers.json")
    parser.set_defaults(samples=16, windows=4)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--allocator", default="uniform", help="the same for every cell")
    parser.add_argument("--solver", nargs="+", default=SOLVERS)
    parser.add_argument("--step", nargs="+", choices=STEPS, default=["alone", "refit", "refine"])
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    wanted = [
        keys_of(sparsity, args.allocator, solver, step, seed, args.epochs)
        for seed, step, sparsity, solver in itertools.product(
            args.seeds, args.step, args.sparsity, args.solver
        )
        if not (solver == "alps" and step == "refit")  # ALPS ends with the refit already
    ]
    Cells(args).run(wanted)


if __name__ == "__main__":
    main()
