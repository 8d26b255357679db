from __future__ import annotations

import torch

from tawny.decoding.sampling import Sampler


def test_top_p_leaves_the_likeliest():
    logits = torch.tensor([0.0, 5.0, 4.0, -1.0])
    assert {Sampler(1.0, 0.5, seed)(logits) for seed in range(20)} == {1}
    assert {Sampler(1.0, 0.9, seed)(logits) for seed in range(40)} == {1, 2}


def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 1e-45, 5e-324, 1e-3):
        assert Sampler(temperature, 1.0, 0)(logits) == int(logits.argmax()), temperature
        assert Sampler(temperature, 0.9, 0)(logits) == int(logits.argmax()), temperature
