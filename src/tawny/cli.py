"""The verbs of `tawny`: each one short function from arguments to a recipe, a library call, and a table.

Everything that decides a result is a key of the recipe; an option exists only for the keys that are used daily, all
others are `-o KEY=VALUE` or a file with `-c`. torch and transformers are imported inside the verbs, so that help
answers at once. Every verb turns a failure into one line and an exit code: 2 for what the user can put right, 1 for
the rest.
"""

from __future__ import annotations

__all__ = ["app", "main"]

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tawny.errors import MissingFeature, OutputError, TawnyError, UserError

if TYPE_CHECKING:
    from tawny.console import Console
    from tawny.recipe import Recipe

EVAL_WINDOWS = 20  # of `tawny prune --eval`; enough for a standard error, few enough to wait for

app = typer.Typer(
    name="tawny",
    help="Prune large language models to high sparsity with OWL, and measure what is left.",
    epilog="\b\nExamples:\n"
    "  tawny prune smollm2 --out pruned -s 0.5 --calibration wiki\n"
    "  tawny eval pruned --text wiki --windows 8\n"
    "  tawny doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Frames and panels are for a window; a pipe gets plain text.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_RECIPE, _DATA, _OUTPUT = "What to do", "Calibration", "Output and machine"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file, or smollm2 (packaged).")
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        "-s",
        "--sparsity",
        metavar="SHARE",
        help="Share of weights to remove, in [0, 1).",
        rich_help_panel=_RECIPE,
    ),
]
AllocatorName = Annotated[
    str | None,
    typer.Option(
        "-a",
        "--allocator",
        metavar="NAME",
        help="How blocks share the budget. Default: owl.",
        rich_help_panel=_RECIPE,
    ),
]
SolverName = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--solver",
        metavar="NAME",
        help="How a linear is pruned. Default: sparsegpt.",
        rich_help_panel=_RECIPE,
    ),
]
PatternName = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--pattern",
        metavar="PATTERN",
        help="Legal masks: unstructured, or n:m (n kept of every m) such as 2:4. Default: unstructured.",
        rich_help_panel=_RECIPE,
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "-c", "--recipe", metavar="FILE", help="Recipe (YAML) to start from.", rich_help_panel=_RECIPE
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--option",
        metavar="KEY=VALUE",
        help="Any other recipe key, such as allocator.M=7 or include=*.mlp.*; repeatable.",
        rich_help_panel=_RECIPE,
    ),
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="c4, wikitext2, ptb, wiki, or a .txt/.jsonl file. Default: c4.",
        rich_help_panel=_DATA,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", help="Windows of text. Default: 128.", rich_help_panel=_DATA),
]
SeqLen = Annotated[
    int | None,
    typer.Option("--seqlen", metavar="N", help="Tokens a window. Default: 2048.", rich_help_panel=_DATA),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Chooses the windows. Default: 0.", rich_help_panel=_DATA),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Storage: float32, bfloat16 or float16. Default: the checkpoint's own.",
        rich_help_panel=_OUTPUT,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps … Default: cpu.", rich_help_panel=_OUTPUT
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=_OUTPUT)
]


@contextmanager
def _console(as_json: bool) -> Iterator[Console]:
    """A console for the body of a verb; whatever goes wrong in it becomes one line and an exit code."""
    from tawny.console import Console

    # The library reports what matters itself; warnings of others are noise between a user and a result.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console = Console(as_json)
    try:
        yield console
    except TawnyError as error:
        _fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail(console, "stopped by Ctrl-C; nothing unfinished looks finished", 1)
    except BrokenPipeError:  # `tawny list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except MemoryError:
        _fail(
            console, "out of memory: use fewer --samples or a shorter --seqlen (`tawny plan` estimates it)", 1
        )
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _fail(console, f"{error.strerror or error}{where}", 1)
    except Exception as error:
        if os.environ.get("TAWNY_DEBUG"):
            raise
        _fail(console, f"unexpected {type(error).__name__}: {error} (TAWNY_DEBUG=1 shows where)", 1)


def _fail(console: Console, message: str, exit_code: int) -> None:
    console.error(message, exit_code)
    raise typer.Exit(exit_code)


def _recipe(recipe: Path | None, option: list[str] | None, **keys: Any) -> Recipe:
    """A file, then the named options, then `-o`."""
    from tawny.recipe import resolve_recipe

    named = {key.replace("calibration_", "calibration."): value for key, value in keys.items()}
    chosen = resolve_recipe(recipe, option or (), **named)
    _check_device(chosen.device)
    return chosen


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise MissingFeature(
            f"device {device!r} cannot be used ({reason}): `tawny doctor` lists those that can"
        ) from None


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny prune smollm2 --out pruned -s 0.5 --calibration wiki --eval wiki\n"
    "  tawny prune Qwen/Qwen3-8B --out pruned -s 0.7 -m wanda -o lambda=0.15\n"
    "  tawny prune ./model --out pruned -c recipes/owl-wanda-mixed-3-8.yaml"
)
def prune(
    model: Model,
    *,
    sparsity: Sparsity = None,
    allocator: AllocatorName = None,
    solver: SolverName = None,
    pattern: PatternName = None,
    recipe: RecipeFile = None,
    option: Overrides = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: SeqLen = None,
    seed: Seed = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder to write the pruned model to.", rich_help_panel=_OUTPUT
        ),
    ],
    dtype: Dtype = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished folder.", rich_help_panel=_OUTPUT)
    ] = False,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="TEXT",
            help=f"Then compare dense and pruned: perplexity on up to {EVAL_WINDOWS} windows.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prune MODEL and write it as a Hugging Face checkpoint with real zeros."""
    with _console(as_json) as console:
        chosen = _recipe(
            recipe,
            option,
            sparsity=sparsity,
            allocator=allocator,
            solver=solver,
            pattern=pattern,
            calibration_text=calibration,
            calibration_samples=samples,
            calibration_seqlen=seqlen,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        windows = 0 if evaluate is None else _windows(model, evaluate, chosen)
        import tawny

        with console.watching() as watch:
            record = tawny.prune(model, out, recipe=chosen, watch=watch, overwrite=overwrite)
        if evaluate is not None:
            record.evaluation = _compare(console, model, out, evaluate, windows, chosen)
            record.evaluation["pruned"]["sparsity"] = record.sparsity
            _rewrite(out / "run.json", record.to_json())
        from tawny.tables import record_tables

        console.result(record.to_dict(), record_tables)


def _windows(model: str, text: str, recipe: Recipe) -> int:
    """How many windows to compare on; asked before the work, since too short a text should not cost a whole run."""
    from tawny.calibration.text import evaluation_windows, load_text, tokenise
    from tawny.model.source import load_tokenizer, resolve

    loaded = load_text(text, "evaluation")
    ids = tokenise(loaded, load_tokenizer(resolve(model)))
    available = evaluation_windows(ids, recipe.calibration.seqlen, name=f"text {loaded.name!r}")
    return min(EVAL_WINDOWS, len(available))


def _compare(
    console: Console, model: str, out: Path, text: str, windows: int, recipe: Recipe
) -> dict[str, Any]:
    """Perplexity of both models on the same windows."""
    import tawny

    measured: dict[str, Any] = {}
    for name, source in (("dense", model), ("pruned", str(out))):
        with console.watching() as watch:
            watch.say(f"measuring the {name} model on {text}")
            result = tawny.evaluate(
                source,
                text,
                seqlen=recipe.calibration.seqlen,
                windows=windows,
                device=recipe.device,
                watch=watch,
            )
        measured[name] = result.to_dict()
    return measured


def _rewrite(path: Path, content: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(content, encoding="utf-8")
    beside.replace(path)


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny plan smollm2 -s 0.7\n"
    "  tawny plan ./model -c recipes/owl-sparsegpt-70.yaml --samples 32\n"
    "  tawny plan ./model -s 0.6 -a uniform -m wanda -o 'exclude=*.down_proj' --json"
)
def plan(
    model: Model,
    sparsity: Sparsity = None,
    allocator: AllocatorName = None,
    solver: SolverName = None,
    pattern: PatternName = None,
    recipe: RecipeFile = None,
    option: Overrides = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: SeqLen = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show what the same `tawny prune` would do, and what it would take, without doing it."""
    with _console(as_json) as console:
        chosen = _recipe(
            recipe,
            option,
            sparsity=sparsity,
            allocator=allocator,
            solver=solver,
            pattern=pattern,
            calibration_text=calibration,
            calibration_samples=samples,
            calibration_seqlen=seqlen,
            dtype=dtype,
            device=device,
        )
        import tawny

        with console.watching() as watch:
            made = tawny.plan(model, recipe=chosen, watch=watch).to_dict()
        from tawny.tables import plan_tables

        console.result(made, plan_tables)


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny profile smollm2 --calibration wiki --samples 16 --seqlen 1024\n"
    "  tawny profile ./model -M 5 -M 10 --plot outliers.png\n"
    "  tawny profile pruned --calibration wiki --json"
)
def profile(
    model: Model,
    multiples: Annotated[
        list[float] | None,
        typer.Option(
            "-M",
            metavar="M",
            help="Outliers are above M times the mean; repeatable. Default: 3, 5, 7, 10.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    sparsity: Annotated[
        float,
        typer.Option(
            "-s",
            "--sparsity",
            metavar="SHARE",
            help="For the sparsities OWL would give.",
            rich_help_panel=_RECIPE,
        ),
    ] = 0.7,
    recipe: RecipeFile = None,
    option: Overrides = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: SeqLen = None,
    seed: Seed = None,
    device: Device = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Also draw it, as .png or .svg.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the layerwise outlier distribution (LOD) of MODEL, dense or pruned."""
    with _console(as_json) as console:
        if plot is not None:
            _check_plot(plot)
        chosen = _recipe(
            recipe,
            option,
            sparsity=sparsity if recipe is None else None,
            calibration_text=calibration,
            calibration_samples=samples,
            calibration_seqlen=seqlen,
            seed=seed,
            device=device,
        )
        import tawny

        with console.watching() as watch:
            report = tawny.profile(model, recipe=chosen, Ms=multiples or (3, 5, 7, 10), watch=watch).to_dict()
        if plot is not None:
            from tawny.report.plot import plot_profile

            plot_profile(report, plot)
            console.note(f"drawn to {plot}")
        from tawny.tables import profile_tables

        console.result(report, profile_tables)


def _check_plot(path: Path) -> None:
    if path.suffix not in (".png", ".svg"):
        raise OutputError(f"--plot {path} is neither .png nor .svg: name one of these")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"--plot {path}: its folder does not exist; make it first")


@app.command(
    "eval",
    epilog="\b\nExamples:\n"
    "  tawny eval smollm2 --text wiki --windows 8\n"
    "  tawny eval pruned --text wikitext2 --seqlen 4096\n"
    "  tawny eval ./model --text notes.txt --seqlen 512 --json",
)
def eval_(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="c4, wikitext2, ptb, wiki, or a .txt/.jsonl file.",
            rich_help_panel=_DATA,
        ),
    ] = "wikitext2",
    seqlen: Annotated[
        int, typer.Option("--seqlen", metavar="N", help="Tokens a window.", min=2, rich_help_panel=_DATA)
    ] = 2048,
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows",
            metavar="N",
            help="How many from the start of the text. Default: all.",
            min=1,
            rich_help_panel=_DATA,
        ),
    ] = None,
    compute: Annotated[
        str,
        typer.Option(
            "--compute", metavar="DTYPE", help="auto, float32, bfloat16 or float16.", rich_help_panel=_OUTPUT
        ),
    ] = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity of MODEL on a text, block by block: what can be pruned can be evaluated in the same memory."""
    with _console(as_json) as console:
        if compute not in ("auto", "float32", "bfloat16", "float16"):
            from tawny.errors import RecipeError

            raise RecipeError(f"--compute {compute!r} is unknown: give auto, float32, bfloat16 or float16")
        _check_device(device or "cpu")
        import tawny

        with console.watching() as watch:
            measured = tawny.evaluate(
                model,
                text,
                seqlen=seqlen,
                windows=windows,
                compute=compute,
                device=device or "cpu",
                watch=watch,
            ).to_dict()
        from tawny.tables import perplexity_tables

        console.result(measured, perplexity_tables)


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny inspect pruned\n"
    "  tawny inspect smollm2\n"
    "  tawny inspect pruned --json | jq '.sparsity'"
)
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Show what a checkpoint really holds, linear by linear: zeros, n:m patterns, ties."""
    with _console(as_json) as console:
        import tawny

        with console.watching() as watch:
            found = tawny.inspect(model, watch=watch).to_dict()
        from tawny.tables import inspection_tables

        console.result(found, inspection_tables)


@app.command(
    "list", epilog="\b\nExamples:\n  tawny list\n  tawny list solvers\n  tawny list allocators --json"
)
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="allocators, solvers, patterns, texts or keys. Default: all."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what a recipe can name: allocators, solvers, patterns, texts, and its keys."""
    with _console(as_json) as console:
        from tawny.catalogue import catalogue
        from tawny.errors import nearest
        from tawny.tables import listing_tables

        listing = catalogue()
        if kind is not None:
            if kind not in listing:
                raise UserError(
                    f"nothing of the kind {kind!r} to list{nearest(kind, listing)}: {', '.join(listing)}"
                )
            listing = {kind: listing[kind]}
        console.result(listing, listing_tables)


@app.command(
    epilog="\b\nExamples:\n  tawny doctor\n  tawny doctor --json\n  tawny doctor --json | jq '.cpu.features'"
)
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has and what is missing, and how to get it."""
    with _console(as_json) as console:
        from tawny.doctor import examine
        from tawny.tables import doctor_tables

        report = examine()
        console.result(report, doctor_tables)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        import tawny

        print(f"tawny {tawny.__version__}")
        raise typer.Exit()


def main() -> None:
    """The entry point of the `tawny` command."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # typer's own usage errors: what it would say in four lines, in one.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "tawny"
        print(f"error: {error.format_message()} ({where} --help shows the options)", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
