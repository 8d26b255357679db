from __future__ import annotations

import math

import pytest
import torch

from tawny.decoding.sampling import Sampler, likelihood
from tawny.errors import RecipeError


def test_top_p_leaves_the_likeliest():
    logits = torch.tensor([0.0, 5.0, 4.0, -1.0])
    assert {Sampler(1.0, 0.5, seed)(logits) for seed in range(20)} == {1}
    assert {Sampler(1.0, 0.9, seed)(logits) for seed in range(40)} == {1, 2}


def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 1e-45, 5e-324, 1e-3):
        assert Sampler(temperature, 1.0, 0)(logits) == int(logits.argmax()), temperature
        assert Sampler(temperature, 0.9, 0)(logits) == int(logits.argmax()), temperature


LOGITS = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])


def drawn(count=60, **keys):
    return {Sampler(2.0, seed=seed, **keys)(LOGITS) for seed in range(count)}


def test_only_the_likeliest_are_drawn():
    assert drawn() == {0, 1, 2, 3, 4} and drawn(top_k=2) == {0, 1}
    assert drawn(min_p=math.exp(-1.01)) == {0, 1, 2}  # a third of the likeliest, at temperature 2
    # Of what top_k leaves, the likeliest has 62 %.
    assert drawn(top_k=2, top_p=0.6) == {0} and drawn(top_k=2, top_p=0.63) == {0, 1}


@pytest.mark.parametrize(
    "keys",
    [
        {"top_p": 0.9},
        {"top_p": 0.99},
        {"top_k": 40},
        {"top_k": 600, "min_p": 0.1},
        {"top_k": 5000, "top_p": 0.7, "temperature": 3.0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bfloat16 many shares are equal
def test_the_likeliest_few_are_drawn_as_if_all_were_sorted(keys, dtype, monkeypatch):
    logits = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    keys = {"temperature": 1.0, "seed": 7, **keys}
    one, other = Sampler(**keys), Sampler(**keys)
    quick = [one(logits) for _ in range(30)]
    monkeypatch.setattr("tawny.decoding.sampling._LIKELIEST", 5000)
    assert quick == [other(logits) for _ in range(30)]


def test_penalties_count_what_was_made():
    once = Sampler(presence_penalty=1.5, frequency_penalty=0.0)
    assert [once(LOGITS) for _ in range(5)] == [0, 1, 0, 0, 0]  # 1.5 against 0.5, once and for all
    each = Sampler(frequency_penalty=1.5)
    assert [each(LOGITS) for _ in range(4)] == [0, 1, 0, 2]
    # Of the prompt, too: a positive logit is divided, a negative one multiplied.
    assert Sampler(repetition_penalty=4.0, prompt=torch.tensor([0, 1]))(LOGITS) == 2
    below = Sampler(repetition_penalty=4.0, prompt=torch.tensor([0]))
    assert below(torch.tensor([-1.0, -2.0])) == 1


def test_biases_and_constraints_move_the_choice_and_not_the_logits():
    class Odd:
        over, taken = False, []

        def allowed(self):
            return torch.arange(5) % 2 == 1

        def take(self, token):
            self.taken.append(token)

    assert Sampler(logit_bias={4: 5.0})(LOGITS) == 4
    assert Sampler(logit_bias={1: -50.0}, constraint=Odd())(LOGITS) == 3 and Odd.taken == [3]
    assert torch.equal(LOGITS, torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]))
    for key, value in {
        "top_k": -1,
        "min_p": 2.0,
        "repetition_penalty": 0.0,
        "presence_penalty": math.nan,
    }.items():
        with pytest.raises(RecipeError, match=f"{key} {value}"):
            Sampler(**{key: value})


def test_likelihoods_are_those_of_the_model():
    found = likelihood(LOGITS, 2, 2)
    shares = LOGITS.softmax(0)
    assert found.logprob == pytest.approx(math.log(shares[2]), abs=1e-6)
    assert [token for token, _ in found.top] == [0, 1]
    assert math.exp(found.top[0][1]) == pytest.approx(float(shares[0]), abs=1e-6)
