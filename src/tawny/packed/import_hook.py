"""Tell transformers about packed folders without importing it.

The trick of this file is an import hook. Packed folders must open through plain transformers, whichever is imported
first. When its registry of quantizers is loaded already, Tawny registers at once; else it waits for that import.

What it buys: 99 % of the time of `import tawny`, and with it of `tawny --help`. Registering at once would import
transformers (0.27 s against 33 to 42 s with cold files on two busy cores).
"""

from __future__ import annotations

__all__ = ["install"]

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def _register() -> None:
    # The module registers itself at its end: it may be what is importing transformers right now.
    importlib.import_module("tawny.packed.quantizer")


class _Loader(importlib.abc.Loader):
    """The module's own loader, and our registration after it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:  # get_source, get_filename, …
        return getattr(self.inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Answers for one module, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and hasattr(registry, "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
