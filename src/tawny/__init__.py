"""Make language models smaller: every part gets the budget that it can bear, in bits, zeros or channels.

    import tawny

    tawny.fit("smollm2", "small", size="80MB", calibration="wiki")
    print(tawny.generate("small", "What is an owl?").text)

Importing this package costs nothing: torch and transformers come with the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Accuracy",
    "Agreement",
    "Comparison",
    "Features",
    "FitPlan",
    "FitSettings",
    "Fitted",
    "Generation",
    "Inspection",
    "Latency",
    "Loops",
    "Perplexity",
    "Piece",
    "Plan",
    "Profile",
    "Recipe",
    "Record",
    "Recovery",
    "RecoveryPlan",
    "RecoveryRecord",
    "SearchPlan",
    "Searched",
    "Server",
    "Slimmed",
    "SparsityCallback",
    "Speed",
    "TaskResults",
    "TawnyError",
    "UserError",
    "__version__",
    "accuracy",
    "agreement",
    "bench",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "export",
    "features",
    "fit",
    "generate",
    "inspect",
    "keep_sparsity",
    "latency",
    "load",
    "load_recipe",
    "loops",
    "merge_adapter",
    "pack",
    "pack_linear",
    "pack_model",
    "plan",
    "plan_fit",
    "plan_recovery",
    "plan_search",
    "profile",
    "prune",
    "recover",
    "search",
    "serve",
    "slim",
    "stream",
    "unpack",
]

# Module → the public names that live there.
_NAMES = {
    "tawny.allocation.profile": "Profile",
    "tawny.choosing.fit": "fit",
    "tawny.choosing.fitted": "Fitted",
    "tawny.choosing.plan": "FitPlan SearchPlan plan_fit plan_search",
    "tawny.choosing.search": "search",
    "tawny.choosing.searched": "Searched",
    "tawny.choosing.settings": "FitSettings",
    "tawny.decoding.stream": "Generation Piece generate stream",
    "tawny.errors": "TawnyError UserError",
    "tawny.evaluation.accuracy": "Accuracy accuracy",
    "tawny.evaluation.agreement": "Agreement agreement",
    "tawny.evaluation.bench": "Speed bench",
    "tawny.evaluation.compare": "Comparison compare",
    "tawny.evaluation.features": "Features features",
    "tawny.evaluation.inspection": "Inspection inspect",
    "tawny.evaluation.latency": "Latency latency",
    "tawny.evaluation.loops": "Loops loops",
    "tawny.evaluation.perplexity": "Perplexity evaluate",
    "tawny.evaluation.tasks": "TaskResults evaluate_tasks",
    "tawny.exporting.run": "export",
    "tawny.packed.convert": "pack unpack",
    "tawny.packed.linear": "pack_linear",
    "tawny.packed.live": "pack_model",
    "tawny.packed.opening": "load",
    "tawny.pruning.plan": "Plan plan",
    "tawny.pruning.profile": "profile",
    "tawny.pruning.run": "prune",
    "tawny.recipe.files": "load_recipe",
    "tawny.recipe.schema": "Recipe",
    "tawny.record": "Record",
    "tawny.recovery.plan": "RecoveryPlan plan_recovery",
    "tawny.recovery.record": "RecoveryRecord",
    "tawny.recovery.run": "recover",
    "tawny.recovery.settings": "Recovery",
    "tawny.recovery.zeros": "SparsityCallback keep_sparsity merge_adapter",
    "tawny.serving.server": "Server serve",
    "tawny.slimming.run": "Slimmed slim",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

if TYPE_CHECKING:
    from tawny.allocation.profile import Profile
    from tawny.choosing.fit import fit
    from tawny.choosing.fitted import Fitted
    from tawny.choosing.plan import FitPlan, SearchPlan, plan_fit, plan_search
    from tawny.choosing.search import search
    from tawny.choosing.searched import Searched
    from tawny.choosing.settings import FitSettings
    from tawny.decoding.stream import Generation, Piece, generate, stream
    from tawny.errors import TawnyError, UserError
    from tawny.evaluation.accuracy import Accuracy, accuracy
    from tawny.evaluation.agreement import Agreement, agreement
    from tawny.evaluation.bench import Speed, bench
    from tawny.evaluation.compare import Comparison, compare
    from tawny.evaluation.features import Features, features
    from tawny.evaluation.inspection import Inspection, inspect
    from tawny.evaluation.latency import Latency, latency
    from tawny.evaluation.loops import Loops, loops
    from tawny.evaluation.perplexity import Perplexity, evaluate
    from tawny.evaluation.tasks import TaskResults, evaluate_tasks
    from tawny.exporting.run import export
    from tawny.packed.convert import pack, unpack
    from tawny.packed.linear import pack_linear
    from tawny.packed.live import pack_model
    from tawny.packed.opening import load
    from tawny.pruning.plan import Plan, plan
    from tawny.pruning.profile import profile
    from tawny.pruning.run import prune
    from tawny.recipe.files import load_recipe
    from tawny.recipe.schema import Recipe
    from tawny.record import Record
    from tawny.recovery.plan import RecoveryPlan, plan_recovery
    from tawny.recovery.record import RecoveryRecord
    from tawny.recovery.run import recover
    from tawny.recovery.settings import Recovery
    from tawny.recovery.zeros import SparsityCallback, keep_sparsity, merge_adapter
    from tawny.serving.server import Server, serve
    from tawny.slimming.run import Slimmed, slim


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
