"""Channels that are zero are cut out of encoders, too."""

from __future__ import annotations

import pytest
import torch

import tawny
from tests.encoders import inputs_for, tiny_encoder


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_slim_encoder_computes_what_the_pruned_one_does(name, tmp_path):
    model = tiny_encoder(name)
    inputs = inputs_for(model)
    model.save_pretrained(tmp_path / "dense")
    keys = {"sparsity": 0.25, "allocator": "uniform", "pattern": "channels", "compute": "float32"}
    tawny.prune(tmp_path / "dense", tmp_path / "pruned", calibration=inputs, **keys)
    made = tawny.slim(tmp_path / "pruned", tmp_path / "slim")
    slim, pruned = (type(model).from_pretrained(tmp_path / folder).eval() for folder in ("slim", "pruned"))
    assert made.parameters == sum(p.numel() for p in slim.parameters()) < model.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(slim(**inputs)[0], pruned(**inputs)[0], rtol=1e-4, atol=1e-4)
