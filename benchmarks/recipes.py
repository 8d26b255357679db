"""What the named recipes are worth: perplexity and time of each beside OWL with SparseGPT as the authors' code does it.

    python benchmarks/recipes.py --text wiki --text PATH.txt --seeds 0 1 2

A product is a file of `recipes/`, with single keys of it changed after a colon:
`fast:allocator=blend:refine.epochs=1`. The first one is what the others are compared with. Sparsity, seed and
calibration are this script's. The same command goes on where a run was stopped (see cells.py). A tiny run:
`--samples 4 --seqlen 128 --eval-seqlen 128 --windows 2 --sparsity 0.5 --product official-owl-sparsegpt-70 fast`.
"""

from __future__ import annotations

from cells import Cells, Keys, parser_for
from harness import ROOT

RECIPES = ROOT / "recipes"
PRODUCTS = ["official-owl-sparsegpt-70", "fast"]


def keys_of(product: str, sparsity: float, seed: int) -> Keys:
    name, *changes = product.split(":")
    if not (RECIPES / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise SystemExit(f"recipe {name!r} is not in {RECIPES.name}/: {known}")
    return {"recipe": name, "changes": changes, "sparsity": sparsity, "seed": seed}


def main() -> None:
    parser = parser_for(__doc__, "recipes.json")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--product", nargs="+", default=PRODUCTS)
    args = parser.parse_args()
    Cells(args).run(
        keys_of(product, sparsity, seed)
        for seed in args.seeds
        for product in args.product
        for sparsity in args.sparsity
    )


if __name__ == "__main__":
    main()
