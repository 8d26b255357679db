"""Tiny models gain nothing from threads, and two test workers with two threads each lose a lot."""

from __future__ import annotations

import os
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tawny import precision
from tawny.cpu import PRODUCTS
from tawny.kernels import native
from tawny.report import figures, plot, recovery

torch.set_num_threads(1)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
IN_EARNEST = figures.draw_panels, plot.save


def pytest_report_header():
    return f"kernels: {', '.join(native.available())}; products: {', '.join(PRODUCTS)}; here {precision.products()}"


@pytest.fixture(autouse=True)
def gradients():
    """Nothing leaves torch's gradients another way than it found them."""
    yield
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert enabled, "gradients were left off"


@contextmanager
def pictures(draw_panels, save):
    """While it lasts, pages and folders get their pictures from these."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, recovery):
            patch.setattr(module, "draw_panels", draw_panels)
        patch.setattr(plot, "save", save)
        yield


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """To draw takes longer than a tiny run does: pictures are empty where `drawn` is not asked for."""
    empty = "<svg></svg>", 1, lambda x: x
    with pictures(lambda *_, **__: empty, lambda _, path: path.write_text("a picture")):
        yield


@pytest.fixture
def drawn():
    """Ask for it where a picture is looked at."""
    with pictures(*IN_EARNEST):
        yield


@pytest.fixture(params=PRODUCTS)
def products(request, monkeypatch):
    """How matrices are multiplied: as on each kind of CPU in turn, in processes that a test starts, too."""
    monkeypatch.setenv("TAWNY_CPU", f"kernel={native.kernel_name()} products={request.param}")
    with precision.force(request.param):
        yield request.param


@pytest.fixture(params=native.available())
def kernel(request):
    """Each kernel that this CPU can run, plain torch among them."""
    with native.force(request.param):
        yield request.param


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line as a user does; returns exit code, stdout, stderr."""
    from tawny.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tawny", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def readme():
    """The names of benchmarks/readme.py, which makes the tables of the pages."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return runpy.run_path(str(BENCHMARKS / "readme.py"))
    finally:
        sys.path.pop(0)
