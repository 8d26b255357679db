from __future__ import annotations

import pytest
import torch

import tawny
from tawny.allocation import scores
from tawny.allocation.owl import measure_outliers
from tawny.calibration.statistics import Statistics
from tawny.pruning import outliers
from tests.tiny import tiny_model, tokens

OPTIONS = {"sparsity": 0.6, "solver": "wanda", "compute": "float32"}


def test_counts_add_up_to_the_share_that_owl_measures(monkeypatch):
    monkeypatch.setattr(scores, "_PART", 100)  # several parts a linear
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(rows, columns, generator=generator) ** 3
        for name, rows, columns in (("a", 40, 24), ("b", 17, 64))
    }
    norms = {name: torch.rand(w.shape[1], generator=generator) + 0.1 for name, w in weights.items()}
    counts = outliers.count_outliers({name: lambda W=W: W for name, W in weights.items()}, norms, 5.0)
    linears = {name: (w, Statistics(9, norms[name].square())) for name, w in weights.items()}
    share = measure_outliers(linears, (5.0,))["outlier_share"]["5"]
    assert 100 * sum(counts.values()) / sum(w.numel() for w in weights.values()) == pytest.approx(share)
    assert sum(counts.values()) > 0


def test_a_run_records_outliers_before_and_after_with_the_allocators_M():
    options = {**OPTIONS, "allocator": "owl", "allocator.M": 3}
    record = tawny.prune(tiny_model("llama"), calibration=tokens(), **options)
    assert record.outlier_M == 3
    assert all(entry.outliers_before is not None and entry.outliers_after for entry in record.linears)
    # The first block sees the same inputs as the dense profile did.
    first = [entry for entry in record.linears if entry.block == 0]
    share = 100 * sum(entry.outliers_before for entry in first) / sum(a.shape[0] * a.shape[1] for a in first)
    assert share == pytest.approx(record.profile["blocks"][0]["outlier_share"]["3"], rel=1e-3)


def test_without_statistics_nothing_is_counted():
    record = tawny.prune(tiny_model("llama"), sparsity=0.5, allocator="uniform", solver="magnitude")
    assert all(entry.outliers_before is None and entry.outliers_after is None for entry in record.linears)


def test_experts_are_counted_one_by_one():
    options = {**OPTIONS, "allocator": "owl", "allocator.M": 3}
    record = tawny.prune(tiny_model("mixtral"), calibration=tokens(), **options)
    assert all(entry.outliers_after is not None for entry in record.linears)
    first = [entry for entry in record.linears if entry.block == 0]
    share = 100 * sum(entry.outliers_before for entry in first) / sum(a.shape[0] * a.shape[1] for a in first)
    assert share == pytest.approx(record.profile["blocks"][0]["outlier_share"]["3"], rel=1e-3)
