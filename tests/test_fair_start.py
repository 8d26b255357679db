"""The model that comparisons start from computes what its source computes."""

from __future__ import annotations

import runpy

import pytest
import torch

from tests.conftest import BENCHMARKS
from tests.tiny import tiny_model, tokens


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_channels_leave_the_logits(family):
    model, scaled = tiny_model(family), tiny_model(family)
    runpy.run_path(str(BENCHMARKS / "fair_start.py"))["scale_channels"](scaled, seed=3)
    before, after = model.state_dict(), scaled.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert all(
        any(part in name for name in changed) for part in ("q_proj", "v_proj", "o_proj", "down_proj", "norm")
    )
    with torch.no_grad():
        made = [each(tokens(2, 16)).logits for each in (model, scaled)]
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-4 * float(made[0].abs().max()))
