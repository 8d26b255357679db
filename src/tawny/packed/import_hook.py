"""Tell transformers about packed folders and blocks of different widths without importing it.

The trick of this file is an import hook. Folders of Tawny must open through plain transformers, whichever is imported
first. When the module that something is registered with is loaded already, Tawny registers at once; else it waits for that import.

What it buys: 99 % of the time of `import tawny`, and with it of `tawny --help`. Registering at once would import
transformers (0.27 s against 33 to 42 s with cold files on two busy cores).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Module of transformers → what must be there before it can be registered with, and ours, which registers itself at its end.
_REGISTRIES = {
    "transformers.quantizers.auto": ("register_quantizer", "tawny.packed.quantizer"),
    "transformers.modeling_utils": ("PreTrainedModel", "tawny.model.own_blocks"),
}


class _RegisteringLoader(importlib.abc.Loader):
    """The module's own loader, and our registration after it."""

    def __init__(self, inner: Any, ours: str) -> None:
        self.inner = inner
        self.ours = ours

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        # Ours may be what is importing transformers right now.
        importlib.import_module(self.ours)

    def __getattr__(self, name: str) -> Any:  # get_source, get_filename, …
        return getattr(self.inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Answers for each of some modules, once."""

    def __init__(self, awaited: Sequence[str]) -> None:
        self.awaited = list(awaited)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.awaited:
            return None
        self.awaited.remove(fullname)
        if not self.awaited:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, _REGISTRIES[fullname][1])
        return spec


def install() -> None:
    awaited = []
    for registry, (needed, ours) in _REGISTRIES.items():
        if hasattr(sys.modules.get(registry), needed):
            importlib.import_module(ours)
        else:
            awaited.append(registry)
    if awaited and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(awaited))
