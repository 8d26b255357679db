"""Whole channels and heads: solver by allocator by sparsity, the same calibration for all.

    python benchmarks/structured.py --text wiki

Cells are made sparsity by sparsity; the same command goes on (see cells.py). A tiny run:
`--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --sparsity 0.2 --solver flap --allocator uniform`.
"""

from __future__ import annotations

import itertools

from cells import Cells, Keys, parser_for

SOLVERS = ["obs", "flap", "wanda", "magnitude"]
ALLOCATORS = ["uniform", "owl"]


def main() -> None:
    parser = parser_for(__doc__, "structured.json")
    parser.set_defaults(samples=16, seqlen=512, eval_seqlen=512)
    parser.add_argument("--pattern", nargs="+", default=["channels+heads"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--allocator", nargs="+", default=ALLOCATORS)
    parser.add_argument("--solver", nargs="+", default=SOLVERS)
    args = parser.parse_args()
    wanted: list[Keys] = [
        {"pattern": pattern, "sparsity": sparsity, "allocator": allocator, "solver": solver, "seed": seed}
        for seed, pattern, sparsity, allocator, solver in itertools.product(
            args.seeds, args.pattern, args.sparsity, args.allocator, args.solver
        )
    ]
    Cells(args).run(wanted)


if __name__ == "__main__":
    main()
