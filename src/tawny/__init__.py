"""Prune large language models to high sparsity, keep their quality, and make the sparsity pay.

    import tawny

    record = tawny.prune("smollm2", "out", sparsity=0.5, calibration="wiki")
    print(tawny.evaluate("out", "wiki", windows=8).perplexity)

Importing this package costs nothing: torch and transformers come with the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Comparison",
    "Found",
    "Generation",
    "Inspection",
    "Perplexity",
    "Plan",
    "Profile",
    "Recipe",
    "Record",
    "Recovery",
    "RecoveryRecord",
    "SparsityCallback",
    "Speed",
    "TaskResults",
    "TawnyError",
    "UserError",
    "__version__",
    "agreement",
    "bench",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "generate",
    "inspect",
    "keep_sparsity",
    "load",
    "load_recipe",
    "merge_adapter",
    "pack",
    "pack_linear",
    "pack_model",
    "plan",
    "profile",
    "prune",
    "recover",
    "recover_gradually",
    "search",
    "unpack",
]

_HOMES = {
    "Agreement": "tawny.evaluation.agreement",
    "Comparison": "tawny.evaluation.compare",
    "agreement": "tawny.evaluation.agreement",
    "Found": "tawny.searching.run",
    "Generation": "tawny.evaluation.bench",
    "Inspection": "tawny.evaluation.inspection",
    "Perplexity": "tawny.evaluation.perplexity",
    "Plan": "tawny.pruning.plan",
    "Profile": "tawny.allocation.profile",
    "Recipe": "tawny.recipe.schema",
    "Record": "tawny.record",
    "Recovery": "tawny.recovery.settings",
    "RecoveryRecord": "tawny.recovery.record",
    "SparsityCallback": "tawny.recovery.zeros",
    "Speed": "tawny.evaluation.bench",
    "TaskResults": "tawny.evaluation.tasks",
    "TawnyError": "tawny.errors",
    "UserError": "tawny.errors",
    "bench": "tawny.evaluation.bench",
    "compare": "tawny.evaluation.compare",
    "evaluate": "tawny.evaluation.perplexity",
    "evaluate_tasks": "tawny.evaluation.tasks",
    "generate": "tawny.evaluation.bench",
    "inspect": "tawny.evaluation.inspection",
    "keep_sparsity": "tawny.recovery.zeros",
    "load_recipe": "tawny.recipe.schema",
    "merge_adapter": "tawny.recovery.zeros",
    "load": "tawny.packed.opening",
    "pack": "tawny.packed.convert",
    "pack_linear": "tawny.packed.linear",
    "pack_model": "tawny.packed.live",
    "plan": "tawny.pruning.plan",
    "profile": "tawny.pruning.profile",
    "prune": "tawny.pruning.run",
    "search": "tawny.searching.run",
    "unpack": "tawny.packed.convert",
    "recover": "tawny.recovery.run",
    "recover_gradually": "tawny.recovery.gradual",
}

if TYPE_CHECKING:
    from tawny.allocation.profile import Profile
    from tawny.errors import TawnyError, UserError
    from tawny.evaluation.agreement import Agreement, agreement
    from tawny.evaluation.bench import Generation, Speed, bench, generate
    from tawny.evaluation.compare import Comparison, compare
    from tawny.evaluation.inspection import Inspection, inspect
    from tawny.evaluation.perplexity import Perplexity, evaluate
    from tawny.evaluation.tasks import TaskResults, evaluate_tasks
    from tawny.packed.convert import pack, unpack
    from tawny.packed.linear import pack_linear
    from tawny.packed.live import pack_model
    from tawny.packed.opening import load
    from tawny.pruning.plan import Plan, plan
    from tawny.pruning.profile import profile
    from tawny.pruning.run import prune
    from tawny.recipe.schema import Recipe, load_recipe
    from tawny.record import Record
    from tawny.recovery.gradual import recover_gradually
    from tawny.recovery.record import RecoveryRecord
    from tawny.recovery.run import recover
    from tawny.recovery.settings import Recovery
    from tawny.recovery.zeros import SparsityCallback, keep_sparsity, merge_adapter
    from tawny.searching.run import Found, search


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tawny' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


from tawny.packed import import_hook  # noqa: E402

import_hook.install()  # packed folders open through plain transformers, whichever of the two is imported first
